"""Codecs side by side by the loss that they are chosen for, from JSON files of eval_vbr.py and utils.anchors.

    python -m utils.rd_loss results/*.json rd.json --plot rd.png

For each λ of the ladder, the least over a codec's rates of λ · 255² · MSE + bpp (means over the pictures), and the mean
of that over the λ. Unlike BD-rate it needs no overlap of the curves. The plot shows PSNR against bits per pixel.
"""

import argparse
import json
import math
from collections import defaultdict
from pathlib import Path

from utils import cli
from utils.files import atomic_write
from utils.ladder import LADDER
from utils.report import cell


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], formatter_class=cli.Formatter)
    add = parser.add_argument
    add("files", nargs="+", metavar="JSON", help="results with a row for every picture")
    add("--plot", metavar="FILE.png", help="draw the curves")
    return parser.parse_args(argv)


def read_points(file: str) -> tuple[str, list[tuple[float, float, float]]]:
    """Name, and (bpp, MSE, PSNR) of every rate: means over pictures. UserError naming a file that has none."""
    groups = defaultdict(list)
    try:
        content = json.loads(Path(file).read_text())
        for row in content["images"]:
            error = 0.0 if row["psnr"] is None else 255**2 / 10 ** (row["psnr"] / 10)  # None: a perfect copy
            groups[row["index"]].append((float(row["bpp"]), error, row["psnr"] or math.inf))
        points = [tuple(sum(column) / len(column) for column in zip(*rows, strict=True)) for rows in groups.values()]
        if not points:
            raise ValueError("no pictures")
        return str(content["name"]), sorted(points)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise cli.UserError(f"{file}: not a file of results of pictures ({error})") from None


def losses(points: list[tuple[float, float, float]]) -> list[float]:
    """At each λ of the ladder, the loss at the best of a codec's rates."""
    return [min(bpp + lmbda * error for bpp, error, _ in points) for lmbda in LADDER]


def draw(curves: list[tuple[str, list]], path: Path) -> None:
    from matplotlib import pyplot  # takes a second to import

    # A perfect copy has no place on an axis of decibels.
    curves = [(name, [point for point in points if math.isfinite(point[2])]) for name, points in curves]
    curves = [(name, points) for name, points in curves if points]
    if not curves:
        raise cli.UserError("nothing to draw: every copy is perfect")
    figure, axes = pyplot.subplots(figsize=(7.5, 5))
    for name, points in curves:
        bpp, _, psnr = zip(*points, strict=True)
        axes.plot(bpp, psnr, "o-" if "tcm" in name.lower() else ".--", label=name)
    ours = [point for name, points in curves if "tcm" in name.lower() for point in points] or curves[0][1]
    axes.set_xlim(0, 1.4 * max(point[0] for point in ours))
    axes.set_ylim(min(point[2] for point in ours) - 2, max(point[2] for point in ours) + 2)
    axes.set(xlabel="bits per pixel", ylabel="PSNR (dB)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=110)
    pyplot.close(figure)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    curves = [read_points(file) for file in args.files]
    print(f"{'least loss at λ =':<24}" + "".join(f"{lmbda:>8g}" for lmbda in LADDER) + f"{'mean':>8}")
    for name, points in curves:
        values = losses(points)
        print(f"{name[:24]:<24}" + "".join(cell(v, 8, 3) for v in [*values, sum(values) / len(values)]))
    if args.plot:
        draw(curves, Path(args.plot))


if __name__ == "__main__":
    cli.run(main)
