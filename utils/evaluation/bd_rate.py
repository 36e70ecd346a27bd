"""BD-rate of one codec against another, from the JSON files of eval_vbr.py (or any in CompressAI's format).

    python -m utils.evaluation.bd_rate --anchor tcm_*.json --test vbr.json

Several files make one curve: six fixed-rate models are six files of one point.
"""

import argparse
import json
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path

import bjontegaard

from utils import cli
from utils.metrics import decibels

MIN_POINTS = 4  # that the interpolation of a curve needs
METRICS = {"psnr": ("psnr-rgb", "psnr"), "ms-ssim": ("ms-ssim-rgb", "ms-ssim")}  # their keys in the files
Curve = list[tuple[float, float]]


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = cli.make_parser(__doc__)
    add = parser.add_argument
    add("--anchor", nargs="+", required=True, metavar="JSON", help="what is compared with")
    add("--test", nargs="+", required=True, metavar="JSON", help="what is compared")
    add("--metric", choices=sorted(METRICS), default="psnr", help="quality")
    add("--method", choices=("akima", "pchip", "cubic"), default="akima", help="interpolation between the points")
    return parser.parse_args(argv)


def read_curve(files: list[str], metric: str) -> tuple[Curve, Curve]:
    """Points (bpp, quality in dB), as `rising` returns them.

    Raises:
        UserError: names the file that holds no such curve.
    """
    convert = decibels if metric == "ms-ssim" else float  # CompressAI's files have the plain MS-SSIM
    points = []
    for file in files:
        try:
            results = json.loads(Path(file).read_text())["results"]
            quality = next(results[name] for name in METRICS[metric] if name in results)
            pairs = zip(results["bpp"], quality, strict=True)  # None is the infinite PSNR of a perfect copy
            points += [(float(bpp), convert(value)) for bpp, value in pairs if value is not None]
        except (OSError, ValueError, KeyError, TypeError, StopIteration) as error:
            cause = f"no {metric}" if isinstance(error, StopIteration) else error
            raise cli.UserError(f"{file}: not a file of rate-distortion results ({cause})") from None
    return rising(points)


def rising(points: Iterable[tuple[float, float]]) -> tuple[Curve, Curve]:
    """Points by rising rate, and those left out: another one has more quality for no more bits."""
    kept: Curve = []
    beaten: Curve = []
    for point in sorted(points, key=lambda p: (p[0], -p[1])):
        (beaten if kept and point[1] <= kept[-1][1] else kept).append(point)
    return kept, beaten


def summary(anchor: Curve, test: Curve, metric: str = "psnr", method: str = "akima") -> str:
    """Two lines: BD-rate in percent (negative: the tested codec needs fewer bits), and BD-quality in dB at equal rate.

    There is no BD-rate where the curves have no quality in common, no BD-quality where they have no rate in common.

    Raises:
        UserError: a curve has fewer than four points.
    """
    if min(len(anchor), len(test)) < MIN_POINTS:
        raise cli.UserError(f"BD-rate needs four rising points per curve, not {len(anchor)} and {len(test)}")

    def delta(function: Callable, axis: int, common: str, unit: str) -> str:
        if min(anchor[-1][axis], test[-1][axis]) <= max(anchor[0][axis], test[0][axis]):
            return f"none, no {common} in common"
        curves = [list(values) for curve in (anchor, test) for values in zip(*curve, strict=True)]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of little overlap: the ranges are printed
            value = function(*curves, method=method, require_matching_points=False, min_overlap=0)
        return f"{value:+.2f} {unit}"

    rate, quality = delta(bjontegaard.bd_rate, 1, "quality", "%"), delta(bjontegaard.bd_psnr, 0, "rate", "dB")
    return f"BD-rate: {rate}\nBD-{metric}: {quality}"


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    curves = []
    for name, files in (("anchor", args.anchor), ("test", args.test)):
        curve, beaten = read_curve(files, args.metric)
        curves.append(curve)
        print(f"{name}: " + ", ".join(f"{bpp:.4f} bpp {quality:.2f} dB" for bpp, quality in curve))
        for bpp, quality in beaten:
            print(f"  left out, beaten by a cheaper point: {bpp:.4f} bpp {quality:.2f} dB")
    print(summary(*curves, args.metric, args.method))


if __name__ == "__main__":
    cli.run(main)
