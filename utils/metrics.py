"""Quality of a reconstruction, on the 8-bit values that a file would hold."""

import math

from pytorch_msssim import ms_ssim
from torch import Tensor

# Five scales of an 11-pixel window: the coarsest must still hold one (pytorch-msssim asks for more than this).
MS_SSIM_SMALLEST = 160


def mse(a: Tensor, b: Tensor) -> float:
    """Mean squared error of two uint8 images of one shape, on the 0–255 scale."""
    return float((a.double() - b.double()).square().mean())


def psnr(a: Tensor, b: Tensor) -> float:
    """PSNR in dB of two uint8 images of one shape; infinite where they are equal."""
    error = mse(a, b)
    return 10 * math.log10(255**2 / error) if error else math.inf


def ms_ssim_value(a: Tensor, b: Tensor) -> float | None:
    """MS-SSIM in [0, 1] of two uint8 images `[3, H, W]`; None where a side is too small for five scales."""
    if min(a.shape[1:]) <= MS_SSIM_SMALLEST:
        return None
    return float(ms_ssim(a[None].float(), b[None].float(), data_range=255))


def decibels(value: float) -> float:
    """MS-SSIM as −10 · log10(1 − value) dB."""
    return -10 * math.log10(1 - value) if value < 1 else math.inf
