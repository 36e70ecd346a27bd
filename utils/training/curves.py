"""A run's validations as a picture: its rate-distortion points over time, and its loss."""

import json
import math
from pathlib import Path

import numpy as np

from utils.figures import own_style  # isort: skip  before Matplotlib
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from utils.files import atomic_write

STEP_TICKS = 5  # validations whose steps are named on the upper axis


def draw_curves(validations: Path, picture: Path) -> None:
    """Draw the lines of a validation.jsonl, as a PNG: PSNR against bits per pixel, and the loss over time.

    Values that are missing or not finite are left out, as are lines that a full disk or a power cut has torn.
    """
    rows = [row for row in map(_row, validations.read_text().splitlines()) if row]
    if not rows:
        return
    with own_style([]), atomic_write(picture) as file:
        figure = Figure(figsize=(12, 4.5), layout="constrained")
        points, losses = figure.subplots(1, 2)
        _draw_points(figure, points, rows)
        _draw_losses(losses, [row for row in rows if _is_finite(row.get("loss"))])
        for axes in (points, losses):
            axes.grid(alpha=0.3)
        figure.savefig(file, format="png", dpi=90)


def _row(line: str) -> dict | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and _is_finite(row.get("minutes")) else None


def _is_finite(value: object) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _draw_points(figure: Figure, axes: Axes, rows: list[dict]) -> None:
    """A curve for each validation, from light to dark."""
    longest = max(row["minutes"] for row in rows)
    colors = ScalarMappable(Normalize(0, max(longest, 0.01)), colormaps["viridis_r"])  # 0.01 is how minutes are rounded
    for row in rows:
        pairs = zip(row.get("bpp") or [], row.get("psnr") or [], strict=False)
        points = [pair for pair in pairs if all(map(_is_finite, pair))]
        width, size = (1.8, 6) if row is rows[-1] else (0.9, 3.5)
        style = dict(linewidth=width, markersize=size, color=colors.to_rgba(row["minutes"]))
        axes.plot([bpp for bpp, _ in points], [psnr for _, psnr in points], "o-", **style)
    axes.set(xlabel="bits per pixel", ylabel="PSNR (dB)")
    figure.colorbar(colors, ax=axes, label="minutes of training")


def _draw_losses(axes: Axes, rows: list[dict]) -> None:
    """The loss against minutes, with steps on an upper axis."""
    minutes = np.array([row["minutes"] for row in rows])
    axes.plot(minutes, [row["loss"] for row in rows], "o-", markersize=4)
    axes.set(xlabel="minutes of training", ylabel="validation loss")
    if rows:
        even = np.linspace(minutes.min(), minutes.max(), STEP_TICKS)
        named = sorted({int(np.abs(minutes - time).argmin()) for time in even})
        steps = axes.secondary_xaxis("top")
        steps.set_xticks(minutes[named], [str(rows[place].get("step", "")) for place in named])
        steps.set_xlabel("step")
