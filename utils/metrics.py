"""Rate, distortion and the loss λ · D + bpp: of likelihoods in training, and of 8-bit pictures in evaluation."""

import math

import torch
from pytorch_msssim import ms_ssim
from torch import Tensor
from torch.nn import functional as F

# Five scales of an 11-pixel window: the coarsest must still hold one (pytorch-msssim asks for more than this).
MS_SSIM_SMALLEST = 160
MS_SSIM_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
WINDOW = 11
AT_ONCE = 2**24  # samples of large pictures that are compared at once


def bits(likelihoods: Tensor) -> Tensor:
    """−Σ log2 of likelihoods `[B, …]`: bits of each image, `[B]`."""
    return -likelihoods.flatten(1).log2().sum(1)


def rate_distortion(
    out: dict, x: Tensor, lmbda: Tensor, metric: str = "mse", weights: Tensor | None = None
) -> dict[str, Tensor]:
    """The training loss λ · D + bpp of each sample (TCSVT 2025).

    Args:
        out: what `Codec.forward` returned.
        x: images `[B, 3, H, W]` in [0, 1].
        lmbda: λ of each sample, `[B]`.
        metric: D is 255² · MSE for "mse", 1 − MS-SSIM for "ms-ssim" (sides above 160 then).
        weights: factors on the squared errors in D, `[1 or B, 1, H, W]`. MS-SSIM has none.

    Returns:
        per sample, `[B]`: `loss`, `bpp`, `bpp_z` (the part of it that z takes), `mse` on the 0–255 scale, and
        `distortion` (D).
    """
    pixels = x.shape[-2] * x.shape[-1]
    x_hat = out["x_hat"].float()
    bpp_z = bits(out["likelihoods"]["z"]) / pixels
    bpp = bits(out["likelihoods"]["y"]) / pixels + bpp_z
    errors = (x_hat - x).square()
    mse = 255**2 * errors.mean((1, 2, 3))
    if metric == "mse":
        distortion = mse if weights is None else 255**2 * (weights * errors).mean((1, 2, 3))
    else:  # contiguous: depthwise convolutions of channels-last images may run in TF32 on a GPU
        distortion = 1 - ms_ssim(x_hat.contiguous(), x.contiguous(), data_range=1.0, size_average=False)
    return {"loss": lmbda * distortion + bpp, "bpp": bpp, "bpp_z": bpp_z, "mse": mse, "distortion": distortion}


def psnr_of_mse(mse: Tensor | float) -> Tensor:
    """PSNR in dB of a mean squared error on the 0–255 scale."""
    return 10 * torch.log10(255**2 / torch.as_tensor(mse))


def mse(a: Tensor, b: Tensor, weights: Tensor | None = None) -> float:
    """Mean squared error of two uint8 images of one shape, on the 0–255 scale, with weights `[1, H, W]` or without."""
    total = 0.0
    rows = max(1, AT_ONCE // max(1, a[:, :1].numel()))
    for start in range(0, a.shape[1], rows):
        here = slice(start, start + rows)
        errors = (a[:, here].double() - b[:, here].double()).square_()
        total += float((errors if weights is None else errors * weights[:, here]).sum())
    return total / a.numel()


def psnr(a: Tensor, b: Tensor) -> float:
    """PSNR in dB of two uint8 images of one shape; infinite where they are equal."""
    error = mse(a, b)
    return 10 * math.log10(255**2 / error) if error else math.inf


def ms_ssim_value(a: Tensor, b: Tensor) -> float | None:
    """MS-SSIM in [0, 1] of two uint8 images `[3, H, W]`; None where a side is too small for five scales."""
    if min(a.shape[1:]) <= MS_SSIM_SMALLEST:
        return None
    if a.numel() > AT_ONCE:
        return _ms_ssim_in_bands(a, b)
    return float(ms_ssim(a[None].float().contiguous(), b[None].float().contiguous(), data_range=255))


def _ms_ssim_in_bands(a: Tensor, b: Tensor) -> float:
    """`ms_ssim` of large uint8 images `[3, H, W]`, which would take some forty times the memory of the images."""
    from pytorch_msssim.ssim import _fspecial_gauss_1d, _ssim  # private: here, where only large pictures depend on them

    window = _fspecial_gauss_1d(WINDOW, 1.5).repeat(3, 1, 1, 1)
    images = (a[None], b[None])
    values = []
    for level in range(len(MS_SSIM_WEIGHTS)):
        height, width = images[0].shape[2:]
        rows = max(2, AT_ONCE // (3 * width) // 2 * 2)
        last = level == len(MS_SSIM_WEIGHTS) - 1
        total = 0.0
        pooled = ([], [])
        for start in range(0, height, rows):
            bands = [x[:, :, start : start + rows + WINDOW - 1].float().contiguous() for x in images]
            if (count := bands[0].shape[2] - WINDOW + 1) > 0:
                total = total + count * _ssim(*bands, 255, window, size_average=False)[0 if last else 1].double()
            above = height % 2  # rows of zeros that pooling adds on top of an odd number
            for x, parts in zip(images, () if last else pooled, strict=False):
                part = x[:, :, max(0, start - above) : start + rows - above].float()
                part = F.pad(part, (0, 0, above if start == 0 else 0, 0))
                parts.append(F.avg_pool2d(part, 2, padding=(0, width % 2)))
        values.append(torch.relu(total / (height - WINDOW + 1)))
        images = images if last else tuple(torch.cat(parts, 2) for parts in pooled)
    weights = torch.tensor(MS_SSIM_WEIGHTS, dtype=torch.float64, device=a.device).view(-1, 1, 1)
    return float((torch.stack(values) ** weights).prod(0).mean())


def distortion(a: Tensor, b: Tensor, metric: str, weights: Tensor | None = None) -> float | None:
    """D of the loss for two uint8 images `[3, H, W]`: MSE, or 1 − MS-SSIM (None where that cannot be computed).

    weights: as those of `mse`; MS-SSIM has none.
    """
    if metric == "mse":
        return mse(a, b, weights)
    value = ms_ssim_value(a, b)
    return None if value is None else 1 - value
