"""Does R = Σ log2 m + C hold? Bits at 21 indexes against the R-λ model (TCSVT 2025), image by image."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from utils.figures import own_style  # isort: skip  before Matplotlib
from matplotlib.figure import Figure
from torch import Tensor
from tqdm import tqdm

from models import VariableRate
from models.lambdas import LAST_INDEX, index_to_lambda
from utils.codec.analyzed import AnalyzedImage
from utils.codec.rate_control import FIRST_TRIAL
from utils.errors import UserError
from utils.evaluation.evaluate import for_each
from utils.evaluation.results import TextColumn, TextTable
from utils.files import atomic_write, finite

INDEXES = np.linspace(0, LAST_INDEX, 21)
FIRST = int(np.abs(INDEXES - FIRST_TRIAL).argmin())  # position of the index that rate control tries first
MODELS = {"paper": "Σ log2 m", "entropy": "Σ H(σ · m)"}


@dataclass
class Study:
    """One image: bits of its file at INDEXES, and what each of MODELS predicts, up to a constant."""

    image: str
    metric: str
    pixels: int
    bits: np.ndarray
    models: dict[str, np.ndarray]

    def fit(self, name: str) -> tuple[float, float]:
        """Least squares of bits against a model: slope (one, if it holds) and R²; NaN where either is constant."""
        x = self.models[name]
        y = self.bits
        if np.ptp(x) < 1 or np.ptp(y) < 1:  # bits
            return math.nan, math.nan
        slope, offset = np.polyfit(x, y, 1)
        return float(slope), float(1 - ((y - slope * x - offset) ** 2).sum() / ((y - y.mean()) ** 2).sum())

    def predict(self, name: str) -> np.ndarray:
        """Bits at INDEXES by slope one from one trial, at FIRST."""
        x = self.models[name]
        return self.bits[FIRST] + x - x[FIRST]

    def local_slopes(self, name: str) -> np.ndarray:
        """Bits measured per bit predicted between whole indexes, `[5]`."""
        rise = np.diff(self.bits[::4])
        run = np.diff(self.models[name][::4])
        return np.divide(rise, run, out=np.full(len(run), math.nan), where=np.abs(run) >= 1)


def study(model: VariableRate, name: str, image: Tensor) -> Study:
    """Measure one picture, uint8 `[3, H, W]` on the model's device."""
    analyzed = AnalyzedImage(model, image)
    curve = analyzed.rate_model.curve(FIRST_TRIAL, analyzed.quantize(FIRST_TRIAL).quantized.rows)
    models = {
        "paper": np.array([analyzed.rate_model.log2_m(index) for index in INDEXES]),
        "entropy": curve.shape_at(INDEXES),
    }
    bits = np.array([analyzed.quantize(index).bits for index in INDEXES])
    return Study(name, model.metric, analyzed.pixels, bits=bits, models=models)


def summary(studies: list[Study]) -> dict:
    """For JSON: fits of every image, their means, and the median slope between whole indexes."""
    images = [
        {
            "image": s.image,
            "pixels": s.pixels,
            "index": INDEXES.tolist(),
            "bits": s.bits.round().tolist(),
            "models": {name: values.round(1).tolist() for name, values in s.models.items()},
            "monotone": bool((np.diff(s.bits) > 0).all()),
            "fits": {name: dict(zip(("slope", "r2"), s.fit(name), strict=True)) for name in MODELS},
            "one_trial_error": {name: float(np.abs(s.predict(name) / s.bits - 1).mean()) for name in MODELS},
        }
        for s in studies
    ]
    means = {
        name: {
            "slope": np.mean([image["fits"][name]["slope"] for image in images]),
            "r2": np.mean([image["fits"][name]["r2"] for image in images]),
            "one_trial_error": np.mean([image["one_trial_error"][name] for image in images]),
            "slope_between_indexes": np.median([s.local_slopes(name) for s in studies], 0).tolist(),
        }
        for name in MODELS
    }
    return finite({"models": MODELS, "means": means, "images": images})


def table(means: dict) -> str:
    """The means of `summary` in lines."""
    between = [(f"slope {i}–{i + 1}", lambda mean, i=i: mean["slope_between_indexes"][i]) for i in range(5)]
    lines = TextTable(
        "R = … + C", 18,
        TextColumn("slope", "6.2f", lambda mean: mean["slope"]),
        TextColumn("R²", "6.3f", lambda mean: mean["r2"]),
        TextColumn("one-trial error %", "17.2f", lambda mean: 100 * mean["one_trial_error"]),
        *(TextColumn(title, "9.2f", value) for title, value in between),
    )
    rows = [lines.row(text, [means[name]]) for name, text in MODELS.items()]
    return "\n".join([lines.header, *rows, "slope i–j: median slope between indexes i and j; the others are means"])


def draw(studies: list[Study]) -> Figure:
    """Scatter and fit of both models, and R(λ) as measured and as predicted from one trial."""
    figure = Figure(figsize=(16, 5))
    *scatters, curves = figure.subplots(1, 3)
    for axes, (name, text) in zip(scatters, MODELS.items(), strict=True):
        for s in studies:
            x = s.predict(name) - s.bits[FIRST]
            y = s.bits - s.bits[FIRST]
            axes.plot(x / s.pixels, y / s.pixels, ".", markersize=4, alpha=0.7)
        low, high = axes.get_xlim()
        axes.plot([low, high], [low, high], "--", color="0.5", linewidth=1, label="slope 1")
        slope, r2 = np.mean([s.fit(name) for s in studies], 0)
        axes.plot([low, high], [slope * low, slope * high], "r-", linewidth=1, label=f"mean slope {slope:.2f}")
        axes.set(xlabel=f"{text}, bits per pixel, from index {FIRST_TRIAL:g}", ylabel="bits per pixel, from the same")
        axes.set_title(f"{text}: mean R² {r2:.3f}")
    lambdas = [index_to_lambda(float(index), studies[0].metric) for index in INDEXES]
    for number, s in enumerate(studies):
        labels = (None, None) if number else ("measured", "predicted from one trial")
        (line,) = curves.plot(lambdas, s.bits / s.pixels, "-", linewidth=1, label=labels[0])
        predicted = s.predict("entropy") / s.pixels
        curves.plot(lambdas, predicted, ":", color=line.get_color(), linewidth=1.5, label=labels[1])
    curves.set(xscale="log", xlabel="λ", ylabel="bits per pixel", title="R(λ) of every image")
    curves.set_xticks(lambdas[::4], [f"{lmbda:g}" for lmbda in lambdas[::4]], rotation=30)
    curves.minorticks_off()
    for axes in (*scatters, curves):
        axes.legend()
        axes.grid(alpha=0.3)
    figure.tight_layout()
    return figure


def run(model: VariableRate, paths: list[Path], picture: Path, write_json: Callable[[dict], None]) -> int:
    """Study pictures; print the table, and write the plot and the figures. Returns the exit status.

    Raises:
        UserError: none of the pictures could be measured.
    """
    studies = study_all(model, paths)
    if not studies:
        raise UserError("none of the pictures could be measured")
    found = summary(studies)
    print(table(found["means"]))
    with own_style([]), atomic_write(picture) as file:
        draw(studies).savefig(file, format="png", dpi=90)
    write_json(found)
    return 0 if len(studies) == len(paths) else 1


def study_all(model: VariableRate, paths: list[Path]) -> list[Study]:
    """Study those of the pictures that can be measured."""
    jobs = for_each(paths, [None], device=model.medians.device, work=lambda name, image, _: study(model, name, image))
    bar = tqdm(jobs, total=len(paths), desc="21 rates of each", unit="image", disable=None)
    return [found for _, _, found in bar if found is not None]
