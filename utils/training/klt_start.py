"""Weights to start training from: a transform codec in closed form, written into a TCM or TCM_VBR.

Training from random weights spends its first 100,000 steps on finding out that photographs are low-pass and that
a good transform decorrelates them ("On Disentangled Training for Nonlinear Transform in Learned Image Compression",
ICLR 2025). That part is a Karhunen-Loève transform (KLT), the eigenvectors of a covariance matrix:

- Analysis: each of the four strided layers of `g_a` takes 2×2 blocks of the layer before to the coefficients of
  their KLT, of which it keeps as many as it has room for: 3 → 12 → 48 → min(192, 2N) → M channels.
- Synthesis: `g_s` goes back, each layer by the linear least-squares estimate from the place itself and the strongest
  coefficients of the eight around it (a Wiener filter), fitted to rounded latents: it smooths the steps between blocks
  that rounding made.
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

MS-SSIM has no such closed form: its ladder's rungs take the Δ of the MSE rungs they were published beside.

Everything else stays at its random start and takes no part at first: blocks begin as the identity, channels beyond
those kept reach no output.
"""

import math
import time

import torch
from compressai.layers import ResidualBlockUpsample, ResidualBlockWithStride
from torch import Tensor, nn
from torch.nn import functional as F

from models import LAE, TCM, TCM_VBR
from models.lambdas import LADDERS, MAX_INDEX, index_to_lambda, middle_lambda
from models.layers import ConvTransBlock
from utils.training.patches import PatchDataset

SAMPLE = 2**24  # pixels of photographs that covariances are measured on
NEIGHBORS = 16  # coefficients of each place around that synthesis looks at; with more it learns the sample's noise
PRIOR = 8000  # weight of the transposed transform in that fit, in places of 2×2 blocks of the sample
HEADROOM = 1.5  # distance of LeakyReLU's bend below zero, in units of the sample's least value


def sample_patches(dataset: PatchDataset) -> Tensor:
    """The first patches of a run, uint8 `[P, 3, h, w]`, which depend on its seed alone: the same in every process."""
    area = dataset.size[0] * dataset.size[1]
    count = max(1, min(SAMPLE // area, 16 * len(dataset.paths)))  # more patches of one photograph add little
    return torch.cat([dataset[position].patches.cpu() for position in range(count)])


def quantization_step(lmbda: float) -> float:
    """Δ of the KLT coefficients, on the 0–255 scale, at which λ · 255² · MSE + bpp is least (derived above)."""
    return math.sqrt(18 / (math.log(2) * lmbda))


@torch.no_grad()
def klt_start(model: TCM, patches: Tensor, lmbda: float | None = None, wiener: bool = True) -> dict:
    """Write the closed-form start into a new model.

    Args:
        patches: uint8 `[P, 3, h, w]` of photographs, sides multiples of 16.
        lmbda: λ of a fixed-rate TCM, of the model's metric; a TCM_VBR has the whole ladder.
        wiener: synthesis as a least-squares estimate; otherwise by the transposes of the analysis alone.

    Returns:
        A training record with the energy lost in each stage and the seconds.
    """
    began = time.monotonic()
    x = patches.cpu().float() / 255
    color = x.mean((0, 2, 3))
    levels = [x - color.view(1, 3, 1, 1)]  # the coefficients after each stage
    bases: list[Tensor] = []
    lost: list[float] = []
    for width in (2 * model.N,) * 3 + (model.M,):
        blocks = F.pixel_unshuffle(levels[-1], 2)
        bases.append(_klt(blocks, width))
        levels.append(F.conv2d(blocks, bases[-1].T[:, :, None, None]))
        lost.append(255**2 * float(blocks.square().sum() - levels[-1].square().sum()) / x.numel())
    variable = isinstance(model, TCM_VBR)
    scale = 255 / quantization_step(middle_lambda() if variable else _mse_lambda(model.metric, lmbda))
    y = scale * levels[-1]

    _write_analysis(model, bases, levels, color, scale)
    if variable:
        _write_lae(model.modnet_ga, 1)
        _write_lae(model.modnet_gs, -1)
    backward = [F.pad(basis[:, :, None, None], (1, 1, 1, 1)) for basis in reversed(bases)]
    backward[0] /= scale
    _write_synthesis(model, _wiener(model, y, levels, backward) if wiener else backward, color)
    for block in (*model.g_a, *model.g_s):
        if isinstance(block, ConvTransBlock):
            _zero(block.conv1_2)
    deviations = torch.zeros(model.M)
    deviations[: y.shape[1]] = y.square().mean((0, 2, 3)).sqrt()
    for i, part in enumerate(deviations.chunk(model.num_slices)):
        for transforms in (model.cc_mean_transforms, model.cc_scale_transforms, model.lrp_transforms):
            _zero(transforms[i][-1])
        model.cc_scale_transforms[i][-1].bias.copy_(part)
    return {
        "stage": "klt start",
        "metric": model.metric,
        **({} if variable else {"lmd": lmbda}),
        "patches": len(patches),
        "mse_lost_in_each_stage": [round(value, 2) for value in lost],
        "seconds": round(time.monotonic() - began, 1),
    }


def _klt(blocks: Tensor, most: int) -> Tensor:
    """The leading eigenvectors of the covariance of `[B, C, h, w]` over places: orthonormal columns `[C, k]`."""
    rows = blocks.transpose(0, 1).flatten(1)
    _, vectors = torch.linalg.eigh((rows @ rows.T).double() / rows.shape[1])
    vectors = vectors.flip(1)[:, : min(most, len(rows))]
    return (vectors * torch.where(vectors.sum(0) < 0, -1.0, 1.0)).float()


def _mse_lambda(metric: str, lmbda: float) -> float:
    """The λ of the MSE ladder at the index where another ladder has the given one."""
    logs = torch.tensor(LADDERS[metric], dtype=torch.float64).log()
    value = torch.tensor(lmbda, dtype=torch.float64).log()
    lower = int((logs[1:-1] <= value).sum())
    return index_to_lambda(lower + float((value - logs[lower]) / (logs[lower + 1] - logs[lower])))


def _zero(conv: nn.Conv2d, outputs: int | None = None) -> None:
    """Zero the first outputs of a convolution, or all."""
    conv.weight[:outputs] = 0
    conv.bias[:outputs] = 0


def _write_analysis(model: TCM, bases: list[Tensor], levels: list[Tensor], color: Tensor, scale: float) -> None:
    """KLT in the four lower right taps: of a 3×3 convolution of stride 2 and padding 1 they see one 2×2 block."""
    strided = [layer for layer in model.g_a if isinstance(layer, ResidualBlockWithStride)] + [model.g_a[-1]]
    for stage, (layer, basis) in enumerate(zip(strided, bases, strict=True)):
        below, k = basis.shape[0] // 4, basis.shape[1]
        taps = basis.T.view(k, below, 2, 2)
        last = layer is model.g_a[-1]
        conv = layer if last else layer.conv1
        _zero(conv, None if last else k)  # latent channels beyond the KLT stay zero
        conv.weight[:k, :below, 1:, 1:] = scale * taps if last else taps
        if stage == 0:
            conv.bias[:k] = -(taps.sum((2, 3)) @ color)
        if last:
            continue
        # LeakyReLU passes positive values unchanged: a lift above zero before it is taken back after it.
        lift = -HEADROOM * levels[stage + 1].amin((0, 2, 3)).clamp(max=-0.2)
        conv.bias[:k] += lift
        layer.conv2.weight[:k] = 0
        layer.conv2.weight[range(k), range(k), 1, 1] = 1
        layer.conv2.bias[:k] = -lift
        layer.gdn.gamma[:k] = layer.gdn.gamma_reparam.init(torch.zeros_like(layer.gdn.gamma[:k]))
        _zero(layer.skip, k)


def _write_synthesis(model: TCM, backward: list[Tensor], color: Tensor) -> None:
    """Write convolutions `[4 below, k, 3, 3]` into the upsampling blocks' skip branches, and zero the main ones."""
    blocks = [layer for layer in model.g_s if isinstance(layer, ResidualBlockUpsample)]
    for conv, weight in zip([*(block.upsample[0] for block in blocks), model.g_s[-1][0]], backward, strict=True):
        rows, k = weight.shape[:2]
        _zero(conv, rows)
        conv.weight[:rows, :k] = weight
    for block, weight in zip(blocks, backward, strict=False):
        _zero(block.conv, len(weight) // 4)
    model.g_s[-1][0].bias.copy_(color.repeat_interleave(4))


def _write_lae(lae: LAE, sign: int) -> None:
    """ln m = sign · ½ ln(λ/λ_mid) at whole indexes, and f_λ piecewise linear between: one ReLU for each piece."""
    first, last = lae.mask.lmd_map.fc_layers
    pieces = int(MAX_INDEX)
    lambdas = torch.tensor([index_to_lambda(i) for i in range(pieces + 1)], dtype=torch.float64)
    log_m = 0.5 * (lambdas / middle_lambda()).log()
    logits = log_m / (1 - log_m.abs())  # the inverse of softsign
    slopes = logits.diff()
    first.weight[:pieces] = 1
    first.bias[:pieces] = -torch.arange(float(pieces))
    last.weight[:] = 0
    last.weight[:, :pieces] = sign * slopes.diff(prepend=torch.zeros(1, dtype=torch.float64)).float()
    last.bias[:] = sign * float(logits[0])


def _wiener(model: TCM, y: Tensor, levels: list[Tensor], transposes: list[Tensor]) -> list[Tensor]:
    """Convolutions `[4 below, k, 3, 3]` that estimate, stage by stage, the level below from rounded latents.

    Rates are spread evenly over the patches, and errors weigh λ, as in the loss. Where the sample is small the fit
    stays near the transposes, as if these had been right in `PRIOR` places.
    """
    if isinstance(model, TCM_VBR):
        index = torch.linspace(0, MAX_INDEX, len(y))
        m = model.modnet_ga.mask.log_m(model.modnet_ga.mask.rate(index), torch.zeros(1))[:, : y.shape[1]].exp()
        u, weights = (y * m).round() / m, index_to_lambda(index).view(-1, 1, 1)
    else:
        u, weights = y.round(), torch.ones(len(y), 1, 1)
    weights = weights / weights.mean()
    filters = []
    for level, transpose in zip(levels[-2::-1], transposes, strict=True):
        target = F.pixel_unshuffle(level, 2)
        used = torch.zeros(u.shape[1], 3, 3, dtype=torch.bool)  # the taps that may differ from zero
        used[:, 1, 1] = used[:NEIGHBORS] = True
        gram = torch.zeros(int(used.sum()), int(used.sum()), dtype=torch.float64)
        cross = torch.zeros(len(gram), target.shape[1], dtype=torch.float64)
        for part, wanted, weight in zip(u.split(32), target.split(32), weights.split(32), strict=True):
            near = F.unfold(part[:, :NEIGHBORS], 3, padding=1)
            seen = torch.cat((near, part[:, NEIGHBORS:].flatten(2)), 1)  # in the order of `used`
            weighed = (weight * seen).transpose(0, 1).flatten(1)
            gram += weighed @ seen.transpose(0, 1).flatten(1).T
            cross += weighed @ wanted.flatten(2).transpose(0, 1).flatten(1).T
        cross -= gram @ transpose[:, used].T.double()
        places = target[:, 0].numel()
        gram.diagonal().mul_(1 + PRIOR / places).add_(1e-6 * gram.diagonal().mean() + 1e-12)
        filters.append(transpose.clone())
        filters[-1][:, used] += torch.linalg.solve(gram, cross).T.float()
        u = F.pixel_shuffle(F.conv2d(u, filters[-1], padding=1), 2)
    return filters
