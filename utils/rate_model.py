"""The R-λ model: bits at any rate index from the bits at one, and the index that meets a target (TCSVT 2025).

Scaling a continuous latent by m adds log m to its entropy, so R(λ) = Σ log2 m(λ) + C, C depending on the image
alone. Quantised latents depart from that: one that is almost surely zero stays so whatever its scale. For a
Gaussian of scale σ, rounded, the entropy grows by s(σ) = dH/dlog2 σ bits for each doubling, which is one for
σ of some steps and nothing far below. So what is used to steer the rate is

    R(λ) = Σ s(σ) · log2 m(λ) + C

with the σ that the entropy model gave where the image was probed. With s = 1 it is the paper's.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from compressai.entropy_models import GaussianConditional
from torch import Tensor
from torch.nn import functional as F

from models.sensitive import table_index
from models.tcm import TCM_VBR
from utils.ladder import MAX_INDEX

GRID = np.linspace(0, MAX_INDEX, 51)
_APART = 0.1  # probes nearer than this say nothing about the slope: rounding moves the bits up and down
_SLOPES = 1 / 3, 3.0  # limits of a slope that two probes suggest for what lies beyond them
_NEGLIGIBLE = 0.01  # latents whose bits hardly follow their scale are left out: four in five at low rates


def entropy(sigma: float) -> float:
    """Bits of a rounded zero-mean Gaussian of scale σ, in steps."""
    edges = torch.arange(0.5, 12 * sigma + 2, dtype=torch.float64)
    above = 0.5 * torch.erfc(edges / sigma / math.sqrt(2))  # P(x > edge); the lower half is the same mirrored
    p = torch.cat([(1 - 2 * above[:1]), above[:-1] - above[1:], above[:-1] - above[1:]])
    return float(-torch.special.xlogy(p, p).sum() / math.log(2))


def sensitivity(gaussian: GaussianConditional) -> Tensor:
    """s = dH/dlog2 σ at every level of the scale table, float32 on its device, between 0 and 1."""
    levels = gaussian.scale_table.double().cpu()
    step = 1.01
    change = [entropy(s * step) - entropy(s / step) for s in levels.tolist()]
    return (torch.tensor(change) / (2 * math.log2(step))).clamp(0, 1).to(gaussian.scale_table)


@dataclass(frozen=True)
class Solution:
    """An index for a target, and the bits that the curve has there; `reachable` is whether it has the target's."""

    index: float
    bits: float
    reachable: bool


class RateCurve:
    """Bits of one image against the index: a shape that is known, and what probes measured.

    Between two probes the shape is stretched to meet both; beyond them it has the slope of the two nearest, within
    limits, and unless they are so near that it is noise. With one probe, it has its own: slope one.

    Args:
        shape: Σ log2 m (or Σ s · log2 m) at the indices of GRID, up to a constant.
    """

    def __init__(self, shape: Sequence[float]) -> None:
        self.shape = np.asarray(shape, np.float64)
        self.probes: dict[float, float] = {}

    def calibrate(self, index: float, bits: float) -> None:
        """Bits measured at an index, in place of what may have been measured there before."""
        self.probes[index] = bits

    def shape_at(self, index: float | np.ndarray) -> np.ndarray:
        """The shape between the points of GRID."""
        return np.interp(index, GRID, self.shape)

    def predict(self, index: float | np.ndarray) -> np.ndarray:
        """Bits at some indices. ValueError without a probe."""
        if not self.probes:
            raise ValueError("calibrate the curve with the bits at one index first")
        at = np.array(sorted(self.probes))
        measured = np.array([self.probes[i] for i in at])
        x = np.atleast_1d(np.asarray(index, np.float64))
        if len(at) == 1:
            return measured + self.shape_at(x) - self.shape_at(at)
        # Along the shape where it rises, which makes a measured slope of what was one; else along the index.
        along, unit = self.shape, 1.0
        if not self.rises:
            along, unit = GRID, (measured[-1] - measured[0]) / (at[-1] - at[0])
        known, here = np.interp(at, GRID, along), np.interp(x, GRID, along)
        result = np.interp(here, known, measured)
        for end, inner, beyond in ((0, 1, x < at[0]), (-1, -2, x > at[-1])):
            run = unit * (known[end] - known[inner])
            apart = abs(at[end] - at[inner]) >= _APART and run != 0
            slope = np.clip((measured[end] - measured[inner]) / run, *_SLOPES) if apart else 1.0
            result[beyond] = measured[end] + slope * unit * (here[beyond] - known[end])
        return result

    @property
    def rises(self) -> bool:
        """Whether the shape is strictly monotone."""
        return bool((np.diff(self.shape) > 0).all())

    def solve(self, bits: float) -> Solution:
        """The index where the curve has so many bits; the highest, where there are several.

        Where it never has, the index with the nearest number.
        """
        grid = np.unique(np.concatenate([GRID, list(self.probes)]))
        predicted = self.predict(grid)
        over = predicted - bits
        crossed = np.flatnonzero(over[:-1] * over[1:] <= 0)
        if not len(crossed):
            nearest = int(np.abs(over).argmin())
            return Solution(float(grid[nearest]), float(predicted[nearest]), False)
        left = int(crossed[-1])
        rise = predicted[left + 1] - predicted[left]
        share = -over[left] / rise if rise else 1.0
        return Solution(float(grid[left] + share * (grid[left + 1] - grid[left])), float(bits), True)


class RateModel:
    """R(index) of one image, from its latent before the LAE; attn(y) is computed once.

    Args:
        model: TCM_VBR.
        y: `[1, M, h, w]`, g_a of the image.
    """

    def __init__(self, model: TCM_VBR, y: Tensor) -> None:
        self.mask, self.y = model.modnet_ga.mask, y
        self.gaussian = model.gaussian_conditional
        with torch.no_grad():
            self.content = self.mask.content(y)

    @torch.no_grad()
    def log_m(self, index: float) -> Tensor:
        """ln m `[1, M, h, w]`."""
        return F.softsign(self.mask.rate(torch.tensor([float(index)])) + self.content)

    def scaled(self, index: float) -> Tensor:
        """y · m `[1, M, h, w]`: the latent that is coded."""
        return self.y * self.log_m(index).exp()

    def log2_m(self, index: float) -> float:
        """Σ log2 m: the paper's number of bits, up to C."""
        return float(self.log_m(index).double().sum()) / math.log(2)

    @torch.no_grad()
    def curve(self, sigma: Tensor) -> RateCurve:
        """Σ s(σ) · log2 m + C.

        Args:
            sigma: of every latent, `[1, M, h, w]`, where the image was probed.
        """
        weights = sensitivity(self.gaussian)[table_index(self.gaussian, sigma).long()].flatten()
        chosen = (weights > _NEGLIGIBLE).nonzero().flatten()
        weights, content = weights[chosen] / math.log(2), self.content.flatten()[chosen]
        channels = chosen // math.prod(self.y.shape[2:])
        rates = self.mask.rate(torch.from_numpy(GRID).float()).flatten(1)  # [51, M]
        return RateCurve([float((F.softsign(rate[channels] + content) * weights).double().sum()) for rate in rates])
