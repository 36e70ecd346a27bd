"""Maps of rate indexes for training, so that the networks meet several qualities in one picture."""

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from models.lambdas import LAST_INDEX
from utils.codec.quality_map import CELL, LATENTS_PER_CELL, enlarge

MAX_BLOCKS = 3


def draw_maps(index: Tensor, rate_uniform: Tensor, height: int, width: int, share: float) -> Tensor:
    """The index of every place of the latents of patches, `[B, 1, height / 16, width / 16]`.

    Most have the patch's own index everywhere. A share of them have blocks of another index, or a smooth field.

    Args:
        index: one per patch, `[B]`.
        rate_uniform: in [0, 1), `[B]`; what is drawn for a patch is a function of it.
        height, width: size of the patches, in pixels.
    """
    size = height // CELL, width // CELL
    samples = zip(index.tolist(), rate_uniform.tolist(), strict=True)
    cells = torch.stack([_draw_map(own, uniform, size=size, share=share) for own, uniform in samples])
    return enlarge(cells, LATENTS_PER_CELL)[:, None]


def _draw_map(index: float, rate_uniform: float, size: tuple[int, int], share: float) -> Tensor:
    random = np.random.default_rng(int(rate_uniform * 2**32))
    cells = torch.full(size, index)
    if random.random() >= share:
        return cells
    if random.random() < 0.5:
        ends = torch.from_numpy(random.uniform(0, LAST_INDEX, (1, 1, 2, 2))).float()
        return F.interpolate(ends, size, mode="bilinear", align_corners=True)[0, 0]
    for _ in range(random.integers(1, MAX_BLOCKS + 1)):
        (top, bottom), (left, right) = (np.sort(random.integers(0, side + 1, 2)) for side in size)
        cells[top : bottom + 1, left : right + 1] = random.uniform(0, LAST_INDEX)
    return cells
