"""The R-λ model: bits at any rate index from the bits at one, and the index that meets a target (TCSVT 2025).

Scaling a continuous latent by m adds log m to its entropy, so R(λ) = Σ log2 m(λ) + C, with C depending on the image
alone. Quantized latents depart from that: one that is almost surely zero stays zero whatever its scale. Rate control
therefore uses the entropy H of a rounded Gaussian,

    R(λ) = Σ H(σ · m(λ) / m(λ₀)) + C

with the σ that the entropy model gave at a trial encode, at λ₀. Where σ is several steps, H(σ) is log2 σ plus a
constant, and this is the paper's model; where σ is far below one step, H is zero at every λ.
"""

import functools
import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from models import VariableRate
from models.coding.tables import rounded_gaussians
from models.lambdas import MAX_INDEX, MIN_INDEX
from models.large.bands import content_bands, gather, latent_height, located, log_m_of_band
from utils.codec.quality_map import LATENTS_PER_CELL, QualityMap, enlarge, index_of_places

GRID = np.arange(MIN_INDEX, MAX_INDEX + 0.25, 0.25)
_MIN_DISTANCE = 0.1  # measurements at nearer indexes say nothing about the slope: rounding moves the bits up and down
_SLOPES = 1 / 3, 3.0  # limits of the slope outside of the measurements
_REACH = 3.25  # the change of ln m between two indexes is less: 2, and both gains
_LOG_STEP = 1 / 8  # between the values of ln σ at which H is computed
_FINE = 128  # parts that these steps are cut into


def entropy(sigma: float) -> float:
    """Entropy in bits of a rounded zero-mean Gaussian of scale σ, in quantization steps."""
    p = rounded_gaussians(torch.tensor([sigma], dtype=torch.float64), math.ceil(12 * sigma) + 1)
    return float(-torch.special.xlogy(p, p).sum() / math.log(2))


@functools.lru_cache(maxsize=8)
def _entropies(first: float, count: int) -> list[float]:
    """H at ln σ = first, first + _LOG_STEP, …: a twentieth of a trial encode's time, and the same for every picture."""
    return [entropy(math.exp(first + _LOG_STEP * i)) for i in range(count)]


class EntropyTable:
    """H of rounded Gaussians by ln σ, as far around the levels of a scale table as m reaches, on its device."""

    def __init__(self, scale_table: Tensor) -> None:
        self.log_levels = scale_table.double().log().float()
        self.first = float(self.log_levels[0]) - _REACH
        count = math.ceil((float(self.log_levels[-1]) + _REACH - self.first) / _LOG_STEP) + 2
        known = _entropies(self.first, count)
        fine = np.interp(np.arange(_FINE * (count - 1)) / _FINE, np.arange(count), known)
        self.entropies = torch.from_numpy(fine).to(self.log_levels)

    def __call__(self, log_sigma: Tensor) -> Tensor:
        """Entropies in bits of `[n]`."""
        at = (log_sigma - self.first).mul_(_FINE / _LOG_STEP).int()
        return self.entropies.index_select(0, at)


class RateCurve:
    """Bits of one image against the index: a known shape, calibrated by measurements.

    With one measurement the shape is shifted to meet it. Between two measurements it is stretched to meet both. Outside
    of all it continues with the slope of the two outermost ones on that side, clipped to _SLOPES, or with slope one
    where these are less than _MIN_DISTANCE apart.

    Args:
        shape: Σ log2 m (or Σ H) at the indexes of GRID, up to a constant.
    """

    def __init__(self, shape: Sequence[float]) -> None:
        self.shape = np.asarray(shape, np.float64)
        self.measured: dict[float, float] = {}

    def calibrate(self, index: float, bits: float) -> None:
        """Take in the bits measured at an index; they replace an earlier measurement there."""
        self.measured[index] = bits

    def shape_at(self, index: float | np.ndarray) -> np.ndarray:
        """The shape between the points of GRID."""
        return np.interp(index, GRID, self.shape)

    def predict(self, index: float | np.ndarray) -> np.ndarray:
        """Bits at some indexes. ValueError before the first `calibrate`."""
        if not self.measured:
            raise ValueError("calibrate the curve with the bits at one index first")
        at = np.array(sorted(self.measured))
        measured = np.array([self.measured[i] for i in at])
        x = np.atleast_1d(np.asarray(index, np.float64))
        if len(at) == 1:
            return measured + self.shape_at(x) - self.shape_at(at)
        # Interpolate along the shape where it rises, which stretches its slope of one; else along the index.
        along = self.shape
        unit = 1.0
        if not (np.diff(self.shape) > 0).all():
            along = GRID
            unit = (measured[-1] - measured[0]) / (at[-1] - at[0])
        known, here = np.interp(at, GRID, along), np.interp(x, GRID, along)
        result = np.interp(here, known, measured)
        for end, inner, beyond in ((0, 1, x < at[0]), (-1, -2, x > at[-1])):
            run = unit * (known[end] - known[inner])
            apart = abs(at[end] - at[inner]) >= _MIN_DISTANCE and run != 0
            slope = np.clip((measured[end] - measured[inner]) / run, *_SLOPES) if apart else 1.0
            result[beyond] = measured[end] + slope * unit * (here[beyond] - known[end])
        return result

    def solve(self, bits: float) -> float:
        """The highest index at which the curve has these bits; if it never has, the index whose bits are nearest."""
        grid = np.unique(np.concatenate([GRID, list(self.measured)]))
        predicted = self.predict(grid)
        over = predicted - bits
        crossed = np.flatnonzero(over[:-1] * over[1:] <= 0)
        if not len(crossed):
            return float(grid[np.abs(over).argmin()])
        left = crossed[-1]
        rise = predicted[left + 1] - predicted[left]
        share = -over[left] / rise if rise else 1.0
        return float(grid[left] + share * (grid[left + 1] - grid[left]))


class RateModel:
    """R(index) of one image, from its latent before the LAE. attn(y) is computed once, or anew each time where
    y is large.

    Args:
        model: a variable-rate codec.
        y: `[1, M, h, w]`, g_a of the image.
        quality_map: where the index differs from that of the file; index arguments are then the file's base index.
    """

    @torch.no_grad()
    def __init__(self, model: VariableRate, y: Tensor, quality_map: QualityMap | None = None) -> None:
        self.quality_map = quality_map
        self.mask = model.modnet_ga.mask
        self.gaussian = model.gaussian_conditional
        self.y = y
        self.band_height = latent_height(y.shape[3])
        self._content = list(content_bands(self.mask, y, self.band_height)) if y.shape[2] <= self.band_height else None

    def content(self) -> Iterator[tuple[slice, Tensor]]:
        """α · attn(y) in bands, each with its place."""
        return located(self._content or content_bands(self.mask, self.y, self.band_height))

    @torch.no_grad()
    def log_m(self, index: float) -> Iterator[tuple[slice, Tensor]]:
        """ln m in bands, each with its place."""
        places = self.index_of_places(index)
        for here, content in self.content():
            yield here, log_m_of_band(self.mask, places, here=here, content=content)

    def index_of_places(self, index: float) -> Tensor:
        """The index `[1]`, or where there is a map that of every place of the latent, `[1, 1, h, w]`."""
        if self.quality_map is None:
            return torch.tensor([float(index)])
        return index_of_places(index, self.quality_map.cell_offsets(index), self.quality_map.cells.shape)

    @torch.no_grad()
    def scaled(self, index: float, in_place: bool = False) -> Tensor:
        """The latent that is coded, y · m `[1, M, h, w]`. With in_place it overwrites y, and ends the model's use."""
        bands = ((here, self.y[:, :, here] * log_m.exp()) for here, log_m in self.log_m(index))
        if not in_place:
            return gather((band for _, band in bands), self.y.shape[2])
        for here, band in bands:
            self.y[:, :, here] = band
        return self.y

    @torch.no_grad()
    def moved(self, scaled: Tensor, index: float, other: float) -> Tensor:
        """A latent that was scaled for an index, scaled for another one."""
        both = [self.index_of_places(at) for at in (index, other)]

        def change(here: slice, content: Tensor) -> Tensor:
            before, after = (log_m_of_band(self.mask, places, here=here, content=content) for places in both)
            return after - before

        bands = (scaled[:, :, here] * change(here, content).exp() for here, content in self.content())
        return gather(bands, self.y.shape[2])

    def log2_m(self, index: float) -> float:
        """Σ log2 m, the paper's number of bits up to C."""
        return sum(float(log_m.double().sum()) for _, log_m in self.log_m(index)) / math.log(2)

    @torch.no_grad()
    def curve(self, index: float, rows: Tensor) -> RateCurve:
        """Σ H(σ · m / m(index)) + C, not calibrated.

        Args:
            index: that of a trial encode.
            rows: scale-table rows that code its latents, `[1, M, h, w]`, which say how large σ is. The σ of row 0 may
                be anything below it: its latents are taken as dead.
        """
        points = np.append(GRID, index)
        cells = None
        if self.quality_map:
            points = self.quality_map.indexes(points)  # [38, K]
            cells = enlarge(torch.from_numpy(self.quality_map.cells), LATENTS_PER_CELL).to(self.y.device)
        rates = torch.broadcast_tensors(*self.mask.rate(torch.from_numpy(points).flatten().float()))
        *parts, own = torch.stack(rates, -1).view(len(GRID) + 1, -1, 2)  # [K · M, 2] each
        table = EntropyTable(self.gaussian.scale_table)
        shape = np.zeros(len(GRID))
        for here, content in self.content():
            rows_here = rows[:, :, here].to(content.device).int().flatten()
            alive = rows_here.nonzero().flatten()
            values = content.flatten()[alive]
            places = content[0, 0].numel()
            which = alive // places
            if cells is not None:
                which += self.y.shape[1] * cells[here].flatten()[alive % places]
            chosen = (part.index_select(0, which).unbind(1) for part in (own, *parts))
            log_m = (self.mask.log_m(*rate, values) for rate in chosen)
            log_sigma = table.log_levels[rows_here[alive]] - next(log_m)
            entropies = [table(log_sigma + change).double().sum() for change in log_m]
            shape += torch.stack(entropies).cpu().numpy()  # from a GPU at once
        return RateCurve(shape)
