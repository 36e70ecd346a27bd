"""Does R = Σ log2 m + C hold? Bits at 21 indices against the model, image by image (TCSVT 2025, the R-λ model)."""

import math
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
from torch import Tensor

from models.tcm import TCM_VBR
from utils.files import atomic_write
from utils.ladder import MAX_INDEX
from utils.lambdas import index_to_lambda
from utils.memory import room_for_a_picture
from utils.rate_control import START, Picture
from utils.report import cell, finite

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402 (after the choice of a backend that needs no screen)

INDICES = np.linspace(0, MAX_INDEX, 21)
MODELS = {"paper": "Σ log2 m", "sensitivity": "Σ s(σ) · log2 m"}


@dataclass
class Study:
    """One image: bits of its file at INDICES, and what each of MODELS says, up to a constant."""

    image: str
    metric: str
    pixels: int
    bits: np.ndarray
    models: dict[str, np.ndarray]

    def fit(self, name: str) -> tuple[float, float]:
        """Least squares of bits against a model: slope (one, if it holds) and R²; NaN where either is level."""
        x, y = self.models[name], self.bits
        if np.ptp(x) < 1 or np.ptp(y) < 1:  # bits
            return math.nan, math.nan
        slope, offset = np.polyfit(x, y, 1)
        return float(slope), float(1 - ((y - slope * x - offset) ** 2).sum() / ((y - y.mean()) ** 2).sum())

    def one_probe_error(self, name: str) -> float:
        """Mean relative error over INDICES of what slope one predicts from the bits at START."""
        middle = int(np.abs(INDICES - START).argmin())
        x = self.models[name]
        return float(np.abs((self.bits[middle] + x - x[middle]) / self.bits - 1).mean())

    def local_slopes(self, name: str) -> np.ndarray:
        """Slope between whole indices, `[5]`: bits measured for a bit predicted."""
        rise, run = np.diff(self.bits[::4]), np.diff(self.models[name][::4])
        return np.divide(rise, run, out=np.full(len(run), math.nan), where=np.abs(run) >= 1)

    @property
    def monotone(self) -> bool:
        """Whether more quality always costs more bits."""
        return bool((np.diff(self.bits) > 0).all())


@room_for_a_picture()
def study(model: TCM_VBR, name: str, image: Tensor) -> Study:
    """Measure one picture, uint8 `[3, H, W]` on the model's device."""
    picture = Picture(model, image)
    curve = picture.rate_model.curve(picture.quantise(START).quantised.sigma)
    sensitive = np.array([curve.shape_at(index) for index in INDICES])
    paper = np.array([picture.rate_model.log2_m(index) for index in INDICES])
    bits = np.array([picture.quantise(index).bits for index in INDICES])
    return Study(name, model.metric, picture.height * picture.width, bits, {"paper": paper, "sensitivity": sensitive})


def summary(studies: list[Study]) -> dict:
    """For JSON: fits of every image, their means, and the median slope between whole indices."""
    images = [
        {
            "image": s.image,
            "pixels": s.pixels,
            "index": INDICES.tolist(),
            "bits": s.bits.round().tolist(),
            "models": {name: values.round(1).tolist() for name, values in s.models.items()},
            "monotone": s.monotone,
            "fits": {name: dict(zip(("slope", "r2"), map(finite, s.fit(name)), strict=True)) for name in MODELS},
            "one_probe_error": {name: s.one_probe_error(name) for name in MODELS},
        }
        for s in studies
    ]
    means = {
        name: {
            "slope": finite(float(np.mean([s.fit(name)[0] for s in studies]))),
            "r2": finite(float(np.mean([s.fit(name)[1] for s in studies]))),
            "one_probe_error": float(np.mean([s.one_probe_error(name) for s in studies])),
            "slope_between_indices": [finite(float(v)) for v in np.median([s.local_slopes(name) for s in studies], 0)],
        }
        for name in MODELS
    }
    return {"models": MODELS, "means": means, "images": images}


def table(means: dict) -> str:
    """The means of `summary` in lines."""
    gaps = " ".join(f"{f'{i}–{i + 1}':>6}" for i in range(5))
    lines = [f"{'R = … + C':<18} {'slope':>6} {'R²':>6} {'one-probe error':>15}   median slope between indices {gaps}"]
    for name, text in MODELS.items():
        m = means[name]
        slopes = " ".join(cell(slope, 6, 2) for slope in m["slope_between_indices"])
        error = f"{100 * m['one_probe_error']:13.2f} %"
        lines.append(f"{text:<18} {cell(m['slope'], 6, 2)} {cell(m['r2'], 6, 3)} {error} {'':>30} {slopes}")
    return "\n".join(lines)


def plot(studies: list[Study], path: Path) -> None:
    """Scatter and fit of both models, and R(λ) as measured and as predicted from one probe, as a PNG."""
    figure, axes = pyplot.subplots(1, 3, figsize=(16, 5))
    middle = int(np.abs(INDICES - START).argmin())
    for axis, (name, text) in zip(axes, MODELS.items(), strict=False):
        for s in studies:
            x, y = (s.models[name] - s.models[name][middle]) / s.pixels, (s.bits - s.bits[middle]) / s.pixels
            axis.plot(x, y, ".", markersize=4, alpha=0.7)
        low, high = axis.get_xlim()
        axis.plot([low, high], [low, high], "k--", linewidth=1, label="slope 1")
        slopes, fits = np.mean([s.fit(name) for s in studies], 0)
        axis.plot([low, high], [slopes * low, slopes * high], "r-", linewidth=1, label=f"mean slope {slopes:.2f}")
        axis.set(xlabel=f"{text}, bits a pixel, from index {START:g}", ylabel="bits measured, a pixel, from the same")
        axis.set_title(f"{text}: mean R² {fits:.3f}")
        axis.legend()
        axis.grid(alpha=0.3)
    lambdas = [index_to_lambda(float(index), studies[0].metric) for index in INDICES]
    for number, s in enumerate(studies):
        x = s.models["sensitivity"]
        (line,) = axes[2].plot(lambdas, s.bits / s.pixels, "-", linewidth=1, label="measured" if not number else None)
        predicted = (s.bits[middle] + x - x[middle]) / s.pixels
        label = "predicted from one probe" if not number else None
        axes[2].plot(lambdas, predicted, ":", color=line.get_color(), linewidth=1.5, label=label)
    axes[2].set(xscale="log", xlabel="λ", ylabel="bits per pixel", title="R(λ) of every image")
    axes[2].set_xticks(lambdas[::4], [f"{lmbda:g}" for lmbda in lambdas[::4]], rotation=30)
    axes[2].minorticks_off()
    axes[2].legend()
    axes[2].grid(alpha=0.3)
    figure.tight_layout()
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=90)
    pyplot.close(figure)
