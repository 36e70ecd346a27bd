"""What the closed-form starts of all backbones share; the package's docstring derives it."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models import LAE, Codec, VariableRate
from models.lambdas import LAST_INDEX, index_to_lambda, middle_lambda

NEIGHBORS = 16  # coefficients of each place around that synthesis looks at; with more it learns the sample's noise
PRIOR = 8000  # weight of the transposed transform in that fit, in places of the sample


def klt(blocks: Tensor, most: int) -> Tensor:
    """The leading eigenvectors of the covariance of `[B, C, h, w]` over places: orthonormal columns `[C, k]`."""
    rows = blocks.transpose(0, 1).flatten(1)
    _, vectors = torch.linalg.eigh((rows @ rows.T).double() / rows.shape[1])
    vectors = vectors.flip(1)[:, : min(most, len(rows))]
    return (vectors * torch.where(vectors.sum(0) < 0, -1.0, 1.0)).float()


def zero(conv: nn.Conv2d, outputs: int | None = None) -> None:
    """Zero the first outputs of a convolution, or all."""
    conv.weight[:outputs] = 0
    conv.bias[:outputs] = 0


def write_lae(lae: LAE, sign: int) -> None:
    """ln m = sign · ½ ln(λ/λ_mid) at whole indexes, and f_λ piecewise linear between: one ReLU for each piece."""
    first, last = lae.mask.lmd_map.fc_layers
    pieces = int(LAST_INDEX)
    lambdas = torch.tensor([index_to_lambda(i) for i in range(pieces + 1)], dtype=torch.float64)
    log_m = 0.5 * (lambdas / middle_lambda()).log()
    logits = log_m / (1 - log_m.abs())  # the inverse of softsign
    slopes = logits.diff()
    first.weight[:pieces] = 1
    first.bias[:pieces] = -torch.arange(float(pieces))
    last.weight[:] = 0
    last.weight[:, :pieces] = sign * slopes.diff(prepend=torch.zeros(1, dtype=torch.float64)).float()
    last.bias[:] = sign * float(logits[0])


def hierarchy(x: Tensor, widths: Sequence[int]) -> tuple[Tensor, list[Tensor], list[Tensor], list[Tensor]]:
    """KLTs of 2×2 blocks, each on the coefficients before it, the first on photographs `[P, 3, h, w]` in [0, 1].

    Returns:
        The mean color; the coefficients after each KLT, the photographs less the color first; the bases, orthonormal
        columns `[4 · below, k]` with k up to a width; and the energy that each loses.
    """
    color = x.mean((0, 2, 3))
    levels = [x - color.view(1, 3, 1, 1)]
    bases = []
    lost = []
    for width in widths:
        blocks = F.pixel_unshuffle(levels[-1], 2)
        bases.append(klt(blocks, width))
        levels.append(F.conv2d(blocks, bases[-1].T[:, :, None, None]))
        lost.append(blocks.square().sum() - levels[-1].square().sum())
    return color, levels, bases, lost


def rounded_latents(model: Codec, y: Tensor) -> tuple[Tensor, Tensor]:
    """Latents y `[P, k, h, w]` as synthesis sees them, and how much an error of each weighs, `[P, 1, 1]`.

    Rates are spread evenly over the patches, and errors weigh λ, as in the loss.
    """
    if not isinstance(model, VariableRate):
        return y.round(), torch.ones(len(y), 1, 1)
    index = torch.linspace(0, LAST_INDEX, len(y))
    mask = model.modnet_ga.mask
    m = mask.log_m(*mask.rate(index), torch.zeros(1))[:, : y.shape[1]].exp()
    weights = index_to_lambda(index).view(-1, 1, 1)
    return (y * m).round() / m, weights / weights.mean()


def least_squares(u: Tensor, target: Tensor, transpose: Tensor, weights: Tensor) -> Tensor:
    """The convolution `[D, k, n, n]`, n = 1 or 3, that estimates a target `[P, D, h, w]` best from u `[P, k, h, w]`.

    Beside the place itself it looks at the first NEIGHBORS channels of those around. Where the sample is small the fit
    stays near the transposed transform `[D, k, n, n]`, as if this had been right in `PRIOR` places.
    """
    size = transpose.shape[-1]
    near = NEIGHBORS if size > 1 else 0
    used = torch.zeros(transpose.shape[1:], dtype=torch.bool)  # the taps that may differ from zero
    used[:, size // 2, size // 2] = used[:near] = True
    gram = torch.zeros(int(used.sum()), int(used.sum()), dtype=torch.float64)
    cross = torch.zeros(len(gram), target.shape[1], dtype=torch.float64)
    for part, wanted, weight in zip(u.split(32), target.split(32), weights.split(32), strict=True):
        seen = part[:, near:].flatten(2)
        if near:
            seen = torch.cat((F.unfold(part[:, :near], size, padding=size // 2), seen), 1)  # in the order of `used`
        weighed = (weight * seen).transpose(0, 1).flatten(1)
        gram += weighed @ seen.transpose(0, 1).flatten(1).T
        cross += weighed @ wanted.flatten(2).transpose(0, 1).flatten(1).T
    cross -= gram @ transpose[:, used].T.double()
    places = target[:, 0].numel()
    gram.diagonal().mul_(1 + PRIOR / places).add_(1e-6 * gram.diagonal().mean() + 1e-12)
    fitted = transpose.clone()
    fitted[:, used] += torch.linalg.solve(gram, cross).T.float()
    return fitted
