"""The closed-form start of TCM: a KLT in each of the four strided layers."""

import torch
from compressai.layers import ResidualBlockUpsample, ResidualBlockWithStride
from torch import Tensor
from torch.nn import functional as F

from models import TCM
from models.layers import ConvTransBlock
from utils.training.klt_start.common import hierarchy, least_squares, rounded_latents, zero

HEADROOM = 1.5  # distance of LeakyReLU's bend below zero, in units of the sample's least value


def write(model: TCM, x: Tensor, scale: float, wiener: bool) -> list[Tensor]:
    """Write the start into a model whose LAEs have theirs; arguments and result as `klt_start` says."""
    color, levels, bases, lost = hierarchy(x, (2 * model.N,) * 3 + (model.M,))
    y = scale * levels[-1]
    _write_analysis(model, bases, levels, color=color, scale=scale)
    backward = [F.pad(basis[:, :, None, None], (1, 1, 1, 1)) for basis in reversed(bases)]
    backward[0] /= scale
    _write_synthesis(model, _wiener(model, y, levels, transposes=backward) if wiener else backward, color)
    for block in (*model.g_a, *model.g_s):
        if isinstance(block, ConvTransBlock):
            zero(block.conv1_2)
    deviations = F.pad(y.square().mean((0, 2, 3)).sqrt(), (0, model.M - y.shape[1]))
    for i, part in enumerate(deviations.chunk(model.num_slices)):
        for transforms in (model.cc_mean_transforms, model.cc_scale_transforms, model.lrp_transforms):
            zero(transforms[i][-1])
        model.cc_scale_transforms[i][-1].bias.copy_(part)
    return lost


def _write_analysis(model: TCM, bases: list[Tensor], levels: list[Tensor], color: Tensor, scale: float) -> None:
    """KLT in the four lower right taps, which see one 2×2 block in a 3×3 convolution of stride 2 and padding 1."""
    strided = [layer for layer in model.g_a if isinstance(layer, ResidualBlockWithStride)] + [model.g_a[-1]]
    for stage, (layer, basis) in enumerate(zip(strided, bases, strict=True)):
        below = basis.shape[0] // 4
        k = basis.shape[1]
        taps = basis.T.view(k, below, 2, 2)
        last = layer is model.g_a[-1]
        conv = layer if last else layer.conv1
        zero(conv, None if last else k)  # latent channels beyond the KLT stay zero
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
        zero(layer.skip, k)


def _write_synthesis(model: TCM, backward: list[Tensor], color: Tensor) -> None:
    """Write convolutions `[4 below, k, 3, 3]` into the upsampling blocks' skip branches, and zero the main ones."""
    blocks = [layer for layer in model.g_s if isinstance(layer, ResidualBlockUpsample)]
    for conv, weight in zip([*(block.upsample[0] for block in blocks), model.g_s[-1][0]], backward, strict=True):
        rows, k = weight.shape[:2]
        zero(conv, rows)
        conv.weight[:rows, :k] = weight
    for block, weight in zip(blocks, backward, strict=False):
        zero(block.conv, len(weight) // 4)
    model.g_s[-1][0].bias.copy_(color.repeat_interleave(4))


def _wiener(model: TCM, y: Tensor, levels: list[Tensor], transposes: list[Tensor]) -> list[Tensor]:
    """Convolutions `[4 below, k, 3, 3]` that estimate, stage by stage, the level below from rounded latents."""
    u, weights = rounded_latents(model, y)
    filters = []
    for level, transpose in zip(levels[-2::-1], transposes, strict=True):
        filters.append(least_squares(u, F.pixel_unshuffle(level, 2), transpose=transpose, weights=weights))
        u = F.pixel_shuffle(F.conv2d(u, filters[-1], padding=1), 2)
    return filters
