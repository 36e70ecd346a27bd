"""λ of an index (utils/ladder.py): log λ is piecewise linear in it.

Loss = λ · 255² · MSE + bits per pixel, or λ · (1 − MS-SSIM) + bits per pixel.
"""

import math

import torch
from torch import Tensor

from utils.ladder import LADDERS, MAX_INDEX


def index_to_lambda(index: Tensor | float, metric: str = "mse") -> Tensor | float:
    """λ of an index: a tensor `[B]` gives a tensor of its shape, a number gives a float."""
    if not isinstance(index, Tensor):
        return float(index_to_lambda(torch.tensor(float(index), dtype=torch.float64), metric))
    index = index if index.is_floating_point() else index.float()
    logs = torch.tensor(LADDERS[metric], dtype=index.dtype, device=index.device).log()
    lower = index.floor().clamp(0, MAX_INDEX - 1)
    start, end = logs[lower.long()], logs[lower.long() + 1]
    return (start + (index - lower) * (end - start)).exp()


def middle_lambda(metric: str = "mse") -> float:
    """Geometric mean of the ends of the ladder."""
    return math.sqrt(LADDERS[metric][0] * LADDERS[metric][-1])


def check_index(index: Tensor | float, batch: int) -> Tensor:
    """The index of every image as a float32 tensor `[batch]`.

    Takes a number or a tensor of 1 or `batch` elements; ValueError if it is not within [0, 5].
    """
    index = torch.as_tensor(index, dtype=torch.float32).flatten()
    if len(index) not in (1, batch):
        raise ValueError(f"{len(index)} indices for {batch} images: give one, or one an image")
    if not ((index >= 0) & (index <= MAX_INDEX)).all():  # not: a NaN compares false
        raise ValueError(f"index must lie in [0, {MAX_INDEX:g}], not {index.tolist()}")
    return index.expand(batch)


def draw_index(batch: int) -> Tensor:
    """Indices of a training batch, uniform over [0, 5]: `[batch]`, on the CPU."""
    return torch.rand(batch) * MAX_INDEX
