"""Codecs side by side by the R-D loss, from JSON files of eval_vbr.py and utils.evaluation.anchors.

    python -m utils.evaluation.rd_loss results/*.json rd.json --plot rd.png

For each λ of the ladder, the least over a codec's rates of λ · 255² · MSE + bpp (means over the pictures), and the mean
of that over the λ. Unlike BD-rate it needs no overlap of the curves. The plot shows PSNR against bits per pixel.
"""

import argparse
import json
import math
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

from matplotlib.figure import Figure

from models.lambdas import LADDER
from utils import cli
from utils.files import atomic_write


class Point(NamedTuple):
    """One rate of a codec, means over pictures: MSE on the 0–255 scale, PSNR in dB (infinite with a perfect copy)."""

    bpp: float
    mse: float
    psnr: float


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = cli.make_parser(__doc__)
    add = parser.add_argument
    add("files", nargs="+", metavar="JSON", help="results with a row for every picture")
    add("--plot", metavar="FILE.png", help="draw the curves")
    return parser.parse_args(argv)


def read_points(file: str) -> tuple[str, list[Point]]:
    """A codec's name and its rates, by rising bpp. UserError naming a file that has none."""
    groups = defaultdict(list)
    try:
        content = json.loads(Path(file).read_text())
        for row in content["images"]:
            psnr = math.inf if row["psnr"] is None else row["psnr"]  # JSON has no infinity
            groups[row["index"]].append((float(row["bpp"]), 255**2 / 10 ** (psnr / 10), psnr))
        points = [Point(*(sum(column) / len(column) for column in zip(*rows, strict=True))) for rows in groups.values()]
        if not points:
            raise ValueError("no pictures")
        return str(content["name"]), sorted(points)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise cli.UserError(f"{file}: not a file of results of pictures ({error})") from None


def draw(curves: list[tuple[str, list[Point]]], path: Path) -> None:
    """PSNR against bits per pixel, as a PNG; what codecs do far outside the rates of the TCMs is cut off."""
    # A perfect copy has no place on an axis of decibels.
    curves = [(name, [point for point in points if math.isfinite(point.psnr)]) for name, points in curves]
    curves = [(name, points) for name, points in curves if points]
    if not curves:
        raise cli.UserError("nothing to draw: every copy is perfect")
    figure = Figure(figsize=(7.5, 5))
    axes = figure.subplots()
    for name, points in curves:
        style = "o-" if "tcm" in name.lower() else ".--"
        axes.plot([point.bpp for point in points], [point.psnr for point in points], style, label=name)
    ours = [point for name, points in curves if "tcm" in name.lower() for point in points] or curves[0][1]
    axes.set_xlim(0, 1.4 * max(point.bpp for point in ours))
    axes.set_ylim(min(point.psnr for point in ours) - 2, max(point.psnr for point in ours) + 2)
    axes.set(xlabel="bits per pixel", ylabel="PSNR (dB)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=110)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    curves = [read_points(file) for file in args.files]
    print(f"{'least loss at λ =':<24}" + "".join(f"{lmbda:>8g}" for lmbda in LADDER) + f"{'mean':>8}")
    for name, points in curves:
        values = [min(point.bpp + lmbda * point.mse for point in points) for lmbda in LADDER]
        print(f"{name[:24]:<24}" + "".join(f"{value:8.3f}" for value in [*values, sum(values) / len(values)]))
    if args.plot:
        draw(curves, Path(args.plot))


if __name__ == "__main__":
    cli.run(main)
