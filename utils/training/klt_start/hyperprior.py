"""The closed-form start of the zoo's hyperprior models: a KLT of 2×2 blocks in each of the four strided layers."""

import torch
from compressai.layers import GDN
from torch import Tensor, nn
from torch.nn import functional as F

from models import Hyperprior
from utils.training.klt_start.common import hierarchy, least_squares, rounded_latents, zero

TAPS = slice(2, 4)  # the middle and the next of the five in each direction: the place itself and the next one


def write(model: Hyperprior, x: Tensor, scale: float, wiener: bool) -> list[Tensor]:
    """Write the start into a model whose LAEs have theirs; arguments and result as `klt_start` says."""
    color, levels, bases, lost = hierarchy(x, (model.config.N,) * 3 + (model.M,))
    y = scale * levels[-1]
    down = [layer for layer in model.g_a if isinstance(layer, nn.Conv2d)]
    for layer, basis in zip(down, bases, strict=True):
        k = basis.shape[1]
        zero(layer)
        layer.weight[:k, : basis.shape[0] // 4, TAPS, TAPS] = basis.T.view(k, -1, 2, 2)
    down[0].bias[: bases[0].shape[1]] = -(bases[0].view(3, 4, -1).sum(1).T @ color)
    down[-1].weight.mul_(scale)

    u, weights = rounded_latents(model, y)
    up = [layer for layer in model.g_s if isinstance(layer, nn.ConvTranspose2d)]
    for layer, basis, level in zip(up, reversed(bases), levels[-2::-1], strict=True):
        taps = basis[:, :, None, None] / (scale if layer is up[0] else 1)
        if wiener:
            taps = least_squares(u, F.pixel_unshuffle(level, 2), transpose=taps, weights=weights)
        u = F.pixel_shuffle(F.conv2d(u, taps), 2)
        rows, k = taps.shape[:2]
        layer.weight.zero_()
        layer.bias.zero_()
        layer.weight[:k, : rows // 4, TAPS, TAPS] = taps[:, :, 0, 0].T.view(k, -1, 2, 2)
    up[-1].bias.copy_(color)

    for layer in (*model.g_a, *model.g_s):
        if isinstance(layer, GDN):  # β is 1 already
            layer.gamma.copy_(layer.gamma_reparam.init(torch.zeros_like(layer.gamma)))
    last = model.h_s[4]
    zero(last)
    last.bias[: y.shape[1]] = y.square().mean((0, 2, 3)).sqrt()  # before the means, where there are any
    return lost
