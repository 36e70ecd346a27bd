"""Plots as SVG and PNG, light and dark, and what they show in words. Drawn from the values that the JSON has."""

import io
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from utils.figures import own_style  # isort: skip  before Matplotlib
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from utils.evaluation.comparison import ms_ssim_decibels, points
from utils.files import atomic_write

# Text stays text, for people who search or have it read aloud; ids do not change from run to run.
_SVG = {"svg.fonttype": "none", "svg.hashsalt": "tcm-vbr"}
_DARK = {"savefig.facecolor": "none", "figure.facecolor": "none", "axes.facecolor": "none"}
PUBLISHED_COLOR = "0.55"


@dataclass(frozen=True)
class Plot:
    """A plot: what it is called as a file, what it shows in words, and its SVG on light and on dark ground.

    A wide one is scrolled on a narrow screen; others shrink.
    """

    name: str
    alt: str
    light: bytes
    dark: bytes
    wide: bool


def render(draw: Callable[[], Figure], name: str, alt: str, folder: Path) -> Plot:
    """Draw twice, for light and dark; write NAME.svg and NAME.png of the light one into a folder."""
    with own_style(_SVG):
        figure = draw()
        light = _svg(figure)
        with atomic_write(folder / f"{name}.svg") as file:
            file.write(light)
        with atomic_write(folder / f"{name}.png") as file:
            figure.savefig(file, format="png", dpi=110)
    with own_style(["dark_background", _SVG, _DARK]):
        width, height = figure.get_size_inches()
        return Plot(name, alt, light=light, dark=_svg(draw()), wide=bool(width > 2 * height))


def _svg(figure: Figure) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="svg", metadata={"Date": None})
    return file.getvalue()


def axes_of(figure: Figure, xlabel: str, ylabel: str, **options) -> Axes:
    """The only axes of a figure, with labels and a grid."""
    axes = figure.subplots()
    axes.set(xlabel=xlabel, ylabel=ylabel, **options)
    axes.grid(alpha=0.3)
    return axes


def rd_figure(ours: list[dict], others: list[dict], published: list[dict], metric: str) -> Figure:
    """Quality against bits per pixel. What other codecs do far outside the rates of the first ones is cut off.

    Args:
        ours: checkpoints, drawn as lines through dots.
        others: codecs measured on the same pictures, drawn as broken lines.
        published: drawn as dotted gray lines.
        metric: "psnr" or "ms-ssim".
    """
    figure = Figure(figsize=(6.4, 5.8), layout="constrained")
    axes = axes_of(figure, "bits per pixel", "PSNR (dB)" if metric == "psnr" else "MS-SSIM (dB)")
    colors = [color for color in colormaps["tab10"].colors if len(set(color)) > 1]  # none is gray
    axes.set_prop_cycle(color=[*colors, "tan"])  # as many as there are codecs in the table of the first page

    def draw(codec: dict, style: str, **options) -> None:
        axes.plot(*_columns(curve_of(codec, metric)), style, label=label(codec["name"]), **options)

    for codec in ours:
        draw(codec, "o-", linewidth=2, markersize=5, zorder=3)
    for codec in others:
        draw(codec, ".--", linewidth=1.2, markersize=4)
    if inside := [point for codec in ours for point in curve_of(codec, metric)]:
        limits = [1.25 * max(bpp for bpp, _ in inside), *(f(q for _, q in inside) for f in (min, max))]
        axes.set(xlim=(0, limits[0]), ylim=(limits[1] - 2.5, limits[2] + 2.5))
    for marker, codec in zip(itertools.cycle("ovs^DPX*<>"), published, strict=False):
        draw(codec, f"{marker}:", color=PUBLISHED_COLOR, linewidth=1, markersize=3.5, zorder=1)
    _add_legend(figure)
    return figure


def _add_legend(figure: Figure) -> None:
    """Name the curves below the axes, where they cover none, in as many columns as fit."""
    for columns in (3, 2, 1):
        legend = figure.legend(fontsize="small", loc="outside lower center", ncols=columns)
        if columns == 1 or legend.get_window_extent().width <= figure.bbox.width:
            return
        legend.remove()


def curve_of(codec: dict, metric: str) -> list[tuple[float, float]]:
    """Points (bpp, quality in dB); a perfect copy has no place on an axis of decibels."""
    pairs = ((p.bpp, p.psnr if metric == "psnr" else ms_ssim_decibels(p)) for p in points(codec))
    return [(bpp, quality) for bpp, quality in pairs if quality is not None]


def steps_figure(images: list[dict]) -> Figure:
    """Change from step 0 of loss, bpp and PSNR of each picture while it was refined, from `image["steps"]`."""
    figure = Figure(figsize=(12, 3.8), layout="constrained")
    titles = ("loss, change in %", "bits per pixel, change in %", "PSNR, change in dB")
    for number, (axes, title) in enumerate(zip(figure.subplots(1, 3), titles, strict=True)):
        for image in images:
            bpp, mse, loss = _columns(image["steps"])
            values = (_percent(loss), _percent(bpp), _gain(mse))[number]
            text = image["image"] + ("" if image["index"] is None else f", index {image['index']:.2f}")
            (line,) = axes.plot(values, linewidth=1.3, label=label(text))
            chosen = image["chosen_step"]
            axes.plot(chosen, values[chosen], "o", color=line.get_color(), markersize=4)
        axes.set(xlabel="step", title=title)
        axes.grid(alpha=0.3)
    if len(images) <= 8:
        figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize="small")
    return figure


def targets_figure(errors: Sequence[float]) -> Figure:
    """How far each file's size is from its target, in percent."""
    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axes = axes_of(figure, "file, in the order of the table", "size against target (%)")
    axes.axhline(0, color=PUBLISHED_COLOR, linewidth=1)
    axes.plot(range(1, len(errors) + 1), errors, "o", markersize=5)
    axes.xaxis.get_major_locator().set_params(integer=True)
    return figure


def label(name: str) -> str:
    """A name as matplotlib shows it as it is: it would hide a leading underscore, and read dollars as formulas."""
    text = name.encode(errors="backslashreplace").decode().replace("$", r"\$")
    return f"\u200b{text}" if text.startswith("_") else text


def _columns(rows: Iterable[Iterable[float]]) -> list[list[float]]:
    return [list(column) for column in zip(*rows, strict=True)] or [[], []]


def _percent(values: list[float]) -> list[float]:
    return [100 * (value / values[0] - 1) for value in values]


def _gain(mse: list[float]) -> list[float]:
    return [10 * math.log10(mse[0] / value) if value and mse[0] else math.nan for value in mse]
