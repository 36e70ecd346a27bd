"""Rate and rate-distortion loss, per sample."""

import torch
from torch import Tensor


def bits(likelihoods: Tensor) -> Tensor:
    """−Σ log2 of likelihoods `[B, …]`: bits of each image, `[B]`."""
    return -likelihoods.flatten(1).log2().sum(1)


def rate_distortion(out: dict, x: Tensor, lmbda: Tensor) -> dict[str, Tensor]:
    """loss = mean_b(255² · λ_b · MSE_b) + bpp (TCSVT 2025; SPEC's joint training).

    Args:
        out: what `TCM.forward` returned.
        x: images `[B, 3, H, W]` in [0, 1].
        lmbda: λ of each sample, `[B]`.

    Returns:
        `loss` (scalar, for the optimiser), and per sample `[B]`: `bpp`, `mse` on the 0–255 scale.
    """
    pixels = x.shape[-2] * x.shape[-1]
    bpp = sum(bits(likelihoods) for likelihoods in out["likelihoods"].values()) / pixels
    mse = 255**2 * (out["x_hat"].float() - x).square().mean((1, 2, 3))
    return {"loss": (lmbda * mse).mean() + bpp.mean(), "bpp": bpp, "mse": mse}


def psnr_of_mse(mse: Tensor) -> Tensor:
    """PSNR in dB of a mean squared error on the 0–255 scale."""
    return 10 * torch.log10(255**2 / mse)
