"""Weights to start training from: a transform codec in closed form, written into a new model.

Training from random weights spends its first 100,000 steps on finding out that photographs are low-pass and that
a good transform decorrelates them ("On Disentangled Training for Nonlinear Transform in Learned Image Compression",
ICLR 2025). That part is a Karhunen-Loève transform (KLT), the eigenvectors of a covariance matrix:

- Analysis of a TCM: each of the four strided layers of `g_a` takes 2×2 blocks of the layer before to the coefficients
  of their KLT, of which it keeps as many as it has room for: 3 → 12 → 48 → min(192, 2N) → M channels (of a Hyperprior
  likewise, with N for 2N). That of a DepthConv takes 8×8 pixels, and then 2×2 places, to their coefficients:
  192 → min(192, width) → M channels.
- Synthesis: `g_s` goes back, each layer by the linear least-squares estimate from the place itself and (where it is a
  3×3 convolution) the strongest coefficients of the eight around it, a Wiener filter fitted to rounded latents: it
  smooths the steps between blocks that rounding made.
- Scale: rounding to whole numbers is quantizing the coefficients in steps Δ. With an orthonormal transform the
  loss λ · 255² · MSE + bpp is, summed over a picture, Σ (λ/3 · d + r) over all coefficients of distortion d and rate r:
  MSE is a mean over three colors, bpp over pixels. At high rate r = h − ½ log2(12 d), whose slope dr/dd is
  −1 / (2 ln 2 · d). The sum is least where that equals −λ/3, at d = 3 / (2 ln 2 · λ). Uniform quantization has
  d = Δ²/12, so Δ = √(12 d) = √(18 / (ln 2 · λ)): 45 on the 0–255 scale at λ = 0.013.
- LAEs: Δ goes with λ^−½, so ln m = ½ ln(λ/λ_mid), the same for all channels, and its inverse before synthesis. As
  m lies within (1/e, e), λ_mid is the geometric mean of the ladder's ends; g_a has the Δ of λ_mid. α = 0. So the
  entropy of the latent is R(λ) = Σ log m(λ) + C from the start (TCSVT 2025, the R-λ model).
- Entropy model: σ is each channel's deviation at λ_mid, μ and the latent residuals are zero. The bits that the model
  counts follow that R(λ) once σ has learned to follow m, which a fixed-rate model need not.

MS-SSIM has no such closed form: its ladder's rungs take the Δ of the MSE rungs at the same index.

Everything else stays at its random start and takes no part at first: blocks begin as the identity, channels beyond
those kept reach no output.
"""

import math
import time
from collections.abc import Callable

import torch
from torch import Tensor

from models import Codec, VariableRate
from models.lambdas import LADDERS, index_to_lambda, middle_lambda
from models.registry import fixed_rate
from utils.errors import UserError
from utils.training.klt_start import depthconv, hyperprior, tcm
from utils.training.klt_start.common import write_lae
from utils.training.patches import PatchDataset

SAMPLE = 2**24  # pixels of photographs that covariances are measured on
WRITERS: dict[str, Callable[[Codec, Tensor, float, bool], list[Tensor]]] = {
    "TCM": tcm.write,
    "DepthConv": depthconv.write,
    "Hyperprior": hyperprior.write,
}


def sample_patches(dataset: PatchDataset) -> Tensor:
    """The first patches of a run, uint8 `[P, 3, h, w]`, which depend on its seed alone: the same in every process."""
    area = dataset.size[0] * dataset.size[1]
    count = max(1, min(SAMPLE // area, 16 * len(dataset.paths)))  # more patches of one photograph add little
    return torch.cat([dataset[position].patches.cpu() for position in range(count)])


def quantization_step(lmbda: float) -> float:
    """Δ of the KLT coefficients, on the 0–255 scale, at which λ · 255² · MSE + bpp is least (derived above)."""
    return math.sqrt(18 / (math.log(2) * lmbda))


@torch.no_grad()
def klt_start(model: Codec, patches: Tensor, lmbda: float | None = None, wiener: bool = True) -> dict:
    """Write the closed-form start into a new model.

    The function of its backbone gets the photographs in [0, 1], how many steps Δ one has, and `wiener`, and returns the
    energy that each of its stages loses.

    Args:
        patches: uint8 `[P, 3, h, w]` of photographs, sides multiples of 16.
        lmbda: λ of a fixed-rate model, of its metric; a variable-rate one has the whole ladder.
        wiener: synthesis as a least-squares estimate; otherwise by the transposes of the analysis alone.

    Returns:
        A training record with the energy lost in each stage and the seconds.

    Raises:
        UserError: no start is known for its backbone.
    """
    backbone = fixed_rate(type(model)).__name__
    if backbone not in WRITERS:
        raise UserError(f"a {backbone} has no start in closed form: give --init random, or a --checkpoint")
    began = time.monotonic()
    x = patches.cpu().float() / 255
    variable = isinstance(model, VariableRate)
    scale = 255 / quantization_step(middle_lambda() if variable else _mse_lambda(model.metric, lmbda))
    if variable:
        write_lae(model.modnet_ga, 1)
        write_lae(model.modnet_gs, -1)
    lost = WRITERS[backbone](model, x, scale=scale, wiener=wiener)
    return {
        "stage": "klt start",
        "metric": model.metric,
        **({} if variable else {"lambda": lmbda}),
        "patches": len(patches),
        "mse_lost_in_each_stage": [round(255**2 * float(energy) / x.numel(), 2) for energy in lost],
        "seconds": round(time.monotonic() - began, 1),
    }


def _mse_lambda(metric: str, lmbda: float) -> float:
    """The λ of the MSE ladder at the index where another ladder has the given one."""
    logs = torch.tensor(LADDERS[metric], dtype=torch.float64).log()
    value = torch.tensor(lmbda, dtype=torch.float64).log()
    lower = int((logs[1:-1] <= value).sum())
    return index_to_lambda(lower + float((value - logs[lower]) / (logs[lower + 1] - logs[lower])))
