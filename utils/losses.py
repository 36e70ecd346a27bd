"""Rate and rate-distortion loss, per sample."""

import torch
from pytorch_msssim import ms_ssim
from torch import Tensor


def bits(likelihoods: Tensor) -> Tensor:
    """−Σ log2 of likelihoods `[B, …]`: bits of each image, `[B]`."""
    return -likelihoods.flatten(1).log2().sum(1)


def rate_distortion(out: dict, x: Tensor, lmbda: Tensor, metric: str = "mse") -> dict[str, Tensor]:
    """loss = mean_b(λ_b · D_b) + bpp (TCSVT 2025; SPEC's joint training).

    Args:
        out: what `TCM.forward` returned.
        x: images `[B, 3, H, W]` in [0, 1].
        lmbda: λ of each sample, `[B]`.
        metric: D is 255² · MSE for "mse", 1 − MS-SSIM for "ms-ssim" (sides above 160 then).

    Returns:
        `loss` (scalar, for the optimiser), and per sample `[B]`: `bpp`, `bpp_z` (the part of it that z
        takes), `mse` on the 0–255 scale, `distortion` (D).
    """
    pixels = x.shape[-2] * x.shape[-1]
    x_hat = out["x_hat"].float()
    bpp_z = bits(out["likelihoods"]["z"]) / pixels
    bpp = bits(out["likelihoods"]["y"]) / pixels + bpp_z
    mse = 255**2 * (x_hat - x).square().mean((1, 2, 3))
    distortion = mse if metric == "mse" else 1 - ms_ssim(x_hat, x, data_range=1.0, size_average=False)
    loss = (lmbda * distortion).mean() + bpp.mean()
    return {"loss": loss, "bpp": bpp, "bpp_z": bpp_z, "mse": mse, "distortion": distortion}


def psnr_of_mse(mse: Tensor) -> Tensor:
    """PSNR in dB of a mean squared error on the 0–255 scale."""
    return 10 * torch.log10(255**2 / mse)
