"""The λ ladders, and the rate index that stands for λ.

A rate is named by an index, a float: 0 … 5 are the six λ of the published models, and log λ is piecewise linear between
them and beyond. The loss is λ · 255² · MSE + bits per pixel, or λ · (1 − MS-SSIM) + bits per pixel.

Training sees [0, 5] alone. Beyond it, in [−2, 7], the m before the entropy model is that of the nearer end of the
ladder times √(λ / λ_end), and the m before synthesis is divided by as much: the quantization step changes. Where D goes
with the step squared and R falls with its logarithm, λ · D + R is least at a step that goes with 1/√λ.
"""

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

LADDERS = {
    "mse": (0.0025, 0.0035, 0.0067, 0.0130, 0.0250, 0.05),
    # The λ of TCM's six published MS-SSIM models (CVPR 2023, arXiv 2303.14978, section 4.1).
    "ms-ssim": (3.0, 5.0, 8.0, 16.0, 36.0, 64.0),
}
LADDER = LADDERS["mse"]
LAST_INDEX = float(len(LADDER) - 1)  # of the ladder; the first is 0
MIN_INDEX, MAX_INDEX = -2.0, LAST_INDEX + 2
INDEX_RANGE = f"[{MIN_INDEX:g}, {MAX_INDEX:g}]"  # for messages


def index_to_lambda(index: "Tensor | float", metric: str = "mse") -> "Tensor | float":
    """λ of an index: a tensor gives a tensor of its shape, a number gives a float."""
    import torch

    if not isinstance(index, torch.Tensor):
        return float(index_to_lambda(torch.tensor(float(index), dtype=torch.float64), metric))
    index = index if index.is_floating_point() else index.float()
    logs = torch.tensor(LADDERS[metric], dtype=index.dtype, device=index.device).log()
    lower = index.floor().clamp(0, LAST_INDEX - 1)
    start = logs[lower.long()]
    end = logs[lower.long() + 1]
    return (start + (index - lower) * (end - start)).exp()


def in_range(index: float) -> bool:
    """Whether a rate may have this index; NaN may not."""
    return MIN_INDEX <= index <= MAX_INDEX


def log_gain(index: "Tensor") -> "Tensor":
    """½ · ln(λ / λ_end) where an index lies beyond an end of the ladder, and 0 within, of the shape of `index`.

    λ is that of the ladder for MSE, also in codecs for MS-SSIM: what is coded depends on the index alone.
    """
    beyond = index - index.clamp(0.0, LAST_INDEX)
    below, above = (0.5 * math.log(LADDER[i + 1] / LADDER[i]) for i in (0, -2))
    return below * beyond.clamp(max=0.0) + above * beyond.clamp(min=0.0)


def middle_lambda(metric: str = "mse") -> float:
    """Geometric mean of the ends of a ladder."""
    return math.sqrt(LADDERS[metric][0] * LADDERS[metric][-1])


def check_index(index: "Tensor | float", batch: int) -> "Tensor":
    """The index of every image as a float32 tensor `[batch]`, or of every place `[batch, 1, h, w]`.

    Takes a number, a tensor of 1 or `batch` elements, or maps `[1 or batch, 1, h, w]` on the grid of the latent, one
    place for 16×16 pixels. ValueError if an index is no number, or not within [−2, 7].
    """
    import torch

    try:
        index = torch.as_tensor(index, dtype=torch.float32)
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f"a rate index is a number or a tensor of numbers, not {index!r}") from None
    if index.dim() != 4:
        index = index.flatten()
    elif index.shape[1] != 1:
        raise ValueError(f"a map of indexes must be [B, 1, h, w], not {list(index.shape)}")
    if len(index) not in (1, batch):
        raise ValueError(f"{len(index)} indexes for {batch} images: give one, or one per image")
    if not (index.numel() and (index >= MIN_INDEX).all() and (index <= MAX_INDEX).all()):  # NaN is refused too
        raise ValueError(f"index must lie in {INDEX_RANGE}, not {index.flatten()[:8].tolist()}")
    return index.expand(batch, *index.shape[1:])
