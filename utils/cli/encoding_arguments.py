"""The arguments that ask for an encode: a rate index or a target, a refinement, a region."""

import argparse
import math
from typing import TYPE_CHECKING

from models.lambdas import INDEX_RANGE, LADDER, LAST_INDEX, in_range
from utils import cli
from utils.codec.request import METHODS, EncodeRequest, RefinementSettings
from utils.messages import print_note

if TYPE_CHECKING:
    from utils.codec.quality_map import QualityMap


def add_index_argument(parser: argparse.ArgumentParser, several: bool, default: str) -> None:
    """Add --index, -l; --lmd, its published name, is taken too."""
    text = f"rate {'indexes' if several else 'index'} in {INDEX_RANGE}, fractions allowed: a larger index is a better picture and a larger file; the weights have learned 0 to {LAST_INDEX:g}, and beyond files are somewhat larger than they might be (default: {default})"
    many = "+" if several else None
    parser.add_argument("-l", "--index", nargs=many, type=rate_index, metavar="INDEX", help=text)
    parser.add_argument("--lmd", "--lmd_index", dest="index", nargs=many, type=rate_index, help=argparse.SUPPRESS)


def rate_index(text: str) -> float:
    """A rate index; says so where it looks like a λ, as some programs take."""
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text} is not a number") from None
    if not in_range(value):
        raise argparse.ArgumentTypeError(f"an index must lie in {INDEX_RANGE}, not {text}")
    if value in LADDER:
        print_note(text, f"is taken as a rate index; the λ of that value has index {LADDER.index(value)}", once=True)
    return value


def add_request_arguments(parser: argparse.ArgumentParser, several: bool, steps: int) -> None:
    """Add what `make_request` reads: an index or several, or a target, and a refinement of so many steps."""
    add_index_argument(parser, several, default="2.5 without a target")
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--target-bpp", type=float, metavar="B", help="bits per pixel of the file, in place of an index")
    group.add_argument("--target-bytes", type=int, metavar="N", help="bytes of the file, in place of an index")
    group.add_argument("--max-bytes", type=int, metavar="N", help="bytes that the file must not exceed, in place of an index")
    parser.add_argument("--trials", type=cli.positive, metavar="N", help=f"with a target: indexes to try before the one to encode at (some more where these are not near enough); 1 is one-pass (default: {EncodeRequest.max_trials})")

    add = parser.add_argument
    methods = "; ".join(f"{name}: {method.text} ({method.learning_rate:g})" for name, method in METHODS.items())
    add("-t", "--steps", type=int, default=steps, metavar="STEPS", help="steps of latent refinement (DLM); 0 is none")
    add("--method", choices=METHODS, help=f"of the refinement, with its learning rate. {methods} (default: {RefinementSettings.method})")
    add("--keep-rate", action="store_true", help="with -l: refine to less distortion in as many bits, and not to the least loss, where the rate may move far")
    add("--step-size", type=float, metavar="LR", help="learning rate of the refinement, with newton up to three times that below ten steps (default: the method's, in brackets)")
    add_nearest_argument(parser)


def add_nearest_argument(parser: argparse.ArgumentParser) -> None:
    """Add --nearest."""
    parser.add_argument("--nearest", action="store_true", help="plain rounding, as in the paper, instead of RDOQ, whose strength was measured with the shipped weights (refinement by newton begins there, and rounds anyway)")


def add_map_arguments(parser: argparse.ArgumentParser) -> None:
    """Add --mask and --roi, of which one may be given, and --mask-index and --mask-weight, likewise."""
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--mask", dest="region", metavar="PICTURE", help="a region with an index of its own: white in a picture of the same size; gray is in between. It is as exact as cells of 64×64 pixels")
    group.add_argument("--roi", metavar="X,Y,W,H", type=parse_box, action="append", help="the same as a rectangle in pixels, from the upper left corner; may be repeated")
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--mask-index", dest="region_index", type=rate_index, metavar="INDEX", help="index of the region, at most 7.9 from that of the file, which the rest has")
    group.add_argument("--mask-weight", dest="region_weight", type=float, metavar="OFFSET", help="instead, how far the region's index lies above that of the rest; a target moves both")


def parse_box(text: str) -> tuple[int, int, int, int]:
    """A rectangle from "X,Y,W,H", in pixels."""
    try:
        x, y, width, height = map(int, text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text} is not X,Y,W,H in whole pixels") from None
    if min(x, y) < 0 or min(width, height) < 1:
        raise argparse.ArgumentTypeError(f"{text} is no rectangle within a picture")
    return x, y, width, height


def check_map_arguments(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Exit with the parser's error where the arguments of `add_map_arguments` do not make a region and its index."""
    region = args.region or args.roi
    rate = (args.region_index, args.region_weight)
    if bool(region) != (rate != (None, None)):
        parser.error("a region needs --mask or --roi, and --mask-index or --mask-weight")
    if args.region_weight is not None and not 0 < abs(args.region_weight) <= LAST_INDEX:
        parser.error(f"--mask-weight: must lie within ±{LAST_INDEX:g} and not be 0, not {args.region_weight:g}")


def map_of_arguments(args: argparse.Namespace, height: int, width: int) -> "QualityMap | None":
    """The map of the region that `add_map_arguments` name in a picture of this size, if they do.

    Raises:
        ImageError, ValueError: the region cannot be read, or does not fit the picture.
    """
    if not (args.region or args.roi):
        return None
    from utils.codec.quality_map import QualityMap, read_region, region_of_boxes

    make = read_region if args.region else region_of_boxes
    return QualityMap.from_region(make(args.region or args.roi, height, width), args.region_index, args.region_weight)


def make_request(parser: argparse.ArgumentParser, args: argparse.Namespace, index: float | None) -> EncodeRequest:
    """The request that arguments make, at index 2.5 where they name neither index nor target.

    Exits with the parser's error where the arguments contradict each other.
    """
    for name in ("target_bpp", "target_bytes", "max_bytes", "step_size"):
        value = getattr(args, name)
        if value is not None and not 0 < value < math.inf:
            parser.error(f"--{name.replace('_', '-')}: must be positive, not {value:g}")
    if args.steps < 0:
        parser.error("-t must be 0 or more")
    for flag, value in (("--step-size", args.step_size), ("--method", args.method)):
        if value is not None and not args.steps:
            parser.error(f"{flag} needs -t: no steps, no refinement")
    targets = dict(bpp=args.target_bpp, bytes=args.target_bytes, max_bytes=args.max_bytes)
    has_target = any(value is not None for value in targets.values())
    if has_target and index is not None:
        parser.error("-l and a target exclude each other: a target is met by the index that it needs")
    if args.trials is not None and not has_target:
        parser.error("--trials needs a target: an index is encoded at once")
    if index is None and not has_target:
        index = 2.5
    if args.keep_rate and (not args.steps or has_target):
        parser.error("--keep-rate needs -t, and no target, which is a rate to keep itself")
    refinement = RefinementSettings(args.steps, args.method or RefinementSettings.method, args.step_size)
    return EncodeRequest(
        index, **targets, max_trials=args.trials or EncodeRequest.max_trials, refinement=refinement,
        keep_rate=args.keep_rate, nearest=args.nearest,
    )
