"""BD-rate of one codec against another, from the JSON files of eval_vbr.py (or any in CompressAI's format).

    python -m utils.evaluation.bd_rate --anchor tcm_*.json --test vbr.json

Several files make one curve: six fixed-rate models are six files of one point.
"""

import argparse
import math
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import utils.figures  # noqa: F401  # isort: skip  before Matplotlib, which bjontegaard imports
import bjontegaard

from utils import cli
from utils.errors import UserError
from utils.evaluation.results import decibels
from utils.files import read_json
from utils.messages import print_note

MIN_POINTS = 4  # that the interpolation of a curve needs
MIN_OVERLAP = 0.25  # share of the shorter curve's range; below, the figure says little about either codec
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


def read_points(file: str, metric: str) -> tuple[Curve, set[str]]:
    """Points (bpp, quality in dB) of a file, and the names of the pictures that they are of, where it has them.

    Raises:
        UserError: names the file that holds no such curve.
    """
    try:
        codec = read_json(file)
        return points_of(codec, metric), pictures(codec) if "images" in codec else set()
    except (OSError, ValueError, KeyError, TypeError) as error:
        cause = f"no {metric}" if isinstance(error, KeyError) else error
        raise UserError(f"{file}: not a file of rate-distortion results ({cause})") from None


def pictures(codec: dict) -> set[str]:
    """Names of the pictures that a codec was measured on."""
    return {row["image"] for row in codec["images"]}


def points_of(codec: dict, metric: str) -> Curve:
    """Points (bpp, quality in dB) of a codec in CompressAI's format; without perfect copies, which have infinite dB.

    Raises:
        KeyError, ValueError, TypeError: it has no such curve.
    """
    convert = decibels if metric == "ms-ssim" else float  # CompressAI's files have the plain MS-SSIM
    results = codec["results"]
    pairs = zip(results["bpp"], results[key_of(results, metric)], strict=True)
    if (least := min(map(float, results["bpp"]), default=1.0)) <= 0:
        raise ValueError(f"a rate of {least:g} bpp, which is not positive")
    found = ((float(bpp), math.inf if value is None else convert(value)) for bpp, value in pairs)
    return [(bpp, quality) for bpp, quality in found if math.isfinite(quality)]


def key_of(results: dict, metric: str) -> str:
    """The name of a metric in CompressAI's results; the usual one where there is none."""
    return next((name for name in METRICS[metric] if name in results), METRICS[metric][0])


def rising(points: Iterable[tuple[float, float]]) -> tuple[Curve, Curve]:
    """Points by rising rate, and those left out: another one has more quality for no more bits."""
    kept: Curve = []
    beaten: Curve = []
    for point in sorted(points, key=lambda p: (p[0], -p[1])):
        (beaten if kept and point[1] <= kept[-1][1] else kept).append(point)
    return kept, beaten


@dataclass(frozen=True)
class Delta:
    """A Bjøntegaard delta: its value, or why there is none.

    Attributes:
        common: the range in which both curves lie, of quality in dB for the rate, of bpp for the quality.
        overlap: its share of the shorter curve's range.
    """

    value: float | None
    common: tuple[float, float] | None = None
    overlap: float = 0.0
    reason: str = ""


def delta_rate(anchor: Curve, test: Curve, method: str = "akima") -> Delta:
    """BD-rate in percent between rising curves; negative where the tested codec needs fewer bits."""
    return _delta(anchor, test, method, function=bjontegaard.bd_rate, axis=1, what="quality")


def delta_quality(anchor: Curve, test: Curve, method: str = "akima") -> Delta:
    """BD-PSNR, or the same of MS-SSIM, in dB at equal rate, between rising curves."""
    return _delta(anchor, test, method, function=bjontegaard.bd_psnr, axis=0, what="rate")


def _delta(anchor: Curve, test: Curve, method: str, function: Callable, axis: int, what: str) -> Delta:
    if (fewest := min(len(anchor), len(test))) < MIN_POINTS:
        return Delta(None, reason=f"a curve has {fewest} rising points, {MIN_POINTS} are needed")
    low = max(anchor[0][axis], test[0][axis])
    high = min(anchor[-1][axis], test[-1][axis])
    if high <= low:
        return Delta(None, reason=f"no {what} in common")
    overlap = (high - low) / min(curve[-1][axis] - curve[0][axis] for curve in (anchor, test))
    if overlap < MIN_OVERLAP:
        reason = f"only {overlap:.0%} of the shorter curve's {what} is in common"
        return Delta(None, common=(low, high), overlap=overlap, reason=reason)
    columns = [list(values) for curve in (anchor, test) for values in zip(*curve, strict=True)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about overlap, which is told
        value = function(*columns, method=method, require_matching_points=False, min_overlap=0)
    return Delta(float(value), (low, high), overlap)


def summary(anchor: Curve, test: Curve, metric: str = "psnr", method: str = "akima") -> str:
    """Two lines: BD-rate, and BD-quality at equal rate."""
    lines = []
    found = (("rate", delta_rate, "%", "dB"), (metric, delta_quality, "dB", "bpp"))
    for name, function, unit, axis in found:
        delta = function(anchor, test, method)
        if delta.value is None:
            lines.append(f"BD-{name}: none, {delta.reason}")
        else:
            low, high = delta.common
            lines.append(f"BD-{name}: {delta.value:+.2f} {unit}, over {low:.2f} to {high:.2f} {axis}")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    curves = []
    measured = {file: read_points(file, args.metric) for file in (*args.anchor, *args.test)}
    known = [(file, names) for file, (_, names) in measured.items() if names]
    for file, names in known[1:]:
        if names != known[0][1]:
            print_note(file, f"measured on other pictures than {known[0][0]}")
    for name, files in (("anchor", args.anchor), ("test", args.test)):
        curve, beaten = rising(point for file in files for point in measured[file][0])
        curves.append(curve)
        print(f"{name}: " + ", ".join(f"{bpp:.4f} bpp {quality:.2f} dB" for bpp, quality in curve))
        for bpp, quality in beaten:
            print(f"  left out, beaten by a cheaper point: {bpp:.4f} bpp {quality:.2f} dB")
    if (fewest := min(map(len, curves))) < MIN_POINTS:
        raise UserError(f"BD-rate needs {MIN_POINTS} rising points per curve; one has {fewest}")
    print(summary(*curves, metric=args.metric, method=args.method))


if __name__ == "__main__":
    cli.run(main)
