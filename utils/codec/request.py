"""What is asked of the encoder, a rate index or a target size, and a refinement; and the arguments that say so.

Plain data: reading the arguments needs no PyTorch, whose import takes seconds.
"""

import argparse
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from models.lambdas import LADDER, MAX_INDEX
from utils import cli
from utils.codec.tolerances import CAP_MARGIN

if TYPE_CHECKING:
    from utils.codec.quality_map import QualityMap


@dataclass(frozen=True)
class Method:
    """A way to refine latents (utils/codec/refinement.py): the learning rate of its first step, and a description."""

    learning_rate: float
    text: str


METHODS = {
    "sgd": Method(800.0, "the paper's SGD, straight-through rounding; scaled with the pixels"),
    "noise": Method(0.005, "Adam, noise in the rate"),
    "sga": Method(0.03, "Adam, stochastic Gumbel annealing in the rate"),
}


@dataclass(frozen=True)
class RefinementSettings:
    """Steps of one of METHODS, at the learning rate of the method where none is given."""

    steps: int = 20
    method: str = "sgd"
    learning_rate: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.steps < 0:
            raise ValueError(f"refinement has 0 steps or more, not {self.steps}")


@dataclass(frozen=True)
class Target:
    """Bits of a file, header counted. With cap, the file must not have more."""

    bits: float
    cap: bool = False

    @property
    def aim(self) -> float:
        """Bits to aim at: a little below a cap."""
        return self.bits * (1 - CAP_MARGIN) if self.cap else self.bits

    def allows(self, bits: float) -> bool:
        """Whether a file may have this many bits."""
        return not self.cap or bits <= self.bits

    def distance(self, bits: float) -> float:
        """Distance of a file's bits from the aim, relatively."""
        return abs(bits / self.aim - 1)


@dataclass(frozen=True)
class EncodeRequest:
    """A rate index, or one of the three targets; and a refinement. ValueError where these do not go together.

    Attributes:
        index: rate index; None with a target, and for a fixed-rate model.
        bpp, bytes, max_bytes: the target, in bits per pixel or bytes of the file, header counted.
        max_trials: with a target, indexes to try before the one to encode at.
        refinement: of the latents (DLM); zero steps for none.
        keep_rate: refine towards less distortion at the size of the index's file, not towards the least loss.
        quality_map: where the index differs from that of the file, which a target then solves for.
        nearest: round latents to the nearest symbol, as the paper does, not for rate and distortion together.
    """

    index: float | None = None
    bpp: float | None = None
    bytes: int | None = None
    max_bytes: int | None = None
    max_trials: int = 3
    refinement: RefinementSettings = field(default_factory=lambda: RefinementSettings(0))
    keep_rate: bool = False
    quality_map: "QualityMap | None" = None
    nearest: bool = False

    def __post_init__(self) -> None:
        targets = [value for value in (self.bpp, self.bytes, self.max_bytes) if value is not None]
        if len(targets) + (self.index is not None) > 1:
            raise ValueError("one rate index or one target, not several of them")
        if targets and not 0 < targets[0] < math.inf:
            raise ValueError(f"a target must be positive, not {targets[0]:g}")
        if self.index is not None and not 0 <= self.index <= MAX_INDEX:
            raise ValueError(f"the rate index must lie in [0, {MAX_INDEX:g}], not {self.index:g}")
        if self.keep_rate and targets:
            raise ValueError("a target is a rate to keep itself: not keep_rate beside it")

    def target(self, pixels: int) -> Target | None:
        """The target for a picture of this many pixels."""
        if self.bpp is not None:
            return Target(self.bpp * pixels)
        if self.bytes is not None:
            return Target(8.0 * self.bytes)
        return None if self.max_bytes is None else Target(8.0 * self.max_bytes, cap=True)

    @property
    def has_target(self) -> bool:
        return self.target(1) is not None

    @property
    def needs_variable_rate(self) -> bool:
        return self.has_target or self.refinement.steps > 0 or self.quality_map is not None


# The arguments that make a request ------------------------------------------------------------


def add_index_argument(parser: argparse.ArgumentParser, several: bool, default: str) -> None:
    """Add --index, -l; --lmd, its published name, is taken too."""
    text = f"rate {'indexes' if several else 'index'} in [0, {MAX_INDEX:g}], fractions allowed: a larger index is a better picture and a larger file (default: {default})"
    many = "+" if several else None
    parser.add_argument("-l", "--index", nargs=many, type=rate_index, metavar="INDEX", help=text)
    parser.add_argument("--lmd", "--lmd_index", dest="index", nargs=many, type=rate_index, help=argparse.SUPPRESS)


def rate_index(text: str) -> float:
    """A rate index; says so where it looks like a λ, as some programs take."""
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text} is not a number") from None
    if value in LADDER:
        cli.print_note(f"-l {text}", f"is a rate index; the λ of that value has index {LADDER.index(value)}", once=True)
    return value


def add_target_arguments(parser: argparse.ArgumentParser) -> None:
    """Add --target-bpp, --target-bytes, --max-bytes, of which one may be given, and --trials."""
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--target-bpp", type=float, metavar="B", help="bits per pixel of the file, in place of an index")
    group.add_argument("--target-bytes", type=int, metavar="N", help="bytes of the file, in place of an index")
    group.add_argument("--max-bytes", type=int, metavar="N", help="bytes that the file must not exceed, in place of an index")
    parser.add_argument("--trials", type=int, default=3, metavar="N", help="with a target: indexes to try at most before the one to encode at (some more under a cap); 1 is one-pass")


def add_refinement_arguments(parser: argparse.ArgumentParser, steps: int) -> None:
    """Add -t, --method, --keep-rate and --step-size, and --nearest."""
    add = parser.add_argument
    methods = "; ".join(f"{name}: {method.text} ({method.learning_rate:g})" for name, method in METHODS.items())
    add("-t", "--steps", type=int, default=steps, metavar="STEPS", help="steps of latent refinement (DLM); 0 is none")
    add("--method", choices=METHODS, default=RefinementSettings.method, help=methods)
    add("--keep-rate", action="store_true", help="with -l: refine to less distortion in as many bits, and not to the least loss, where the rate may move far")
    add("--step-size", type=float, metavar="LR", help="learning rate of the refinement, × 0.6 with a target (default: the method's, in brackets)")
    add_nearest_argument(parser)


def add_nearest_argument(parser: argparse.ArgumentParser) -> None:
    """Add --nearest."""
    parser.add_argument("--nearest", action="store_true", help="plain rounding, as in the paper, instead of RDOQ, whose strength was measured with the shipped weights")


def add_map_arguments(parser: argparse.ArgumentParser) -> None:
    """Add --mask and --roi, of which one may be given, and --mask-index and --mask-weight, likewise."""
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--mask", metavar="PICTURE", help="a region with an index of its own: white in a picture of the same size; gray is in between. It is as exact as cells of 64×64 pixels")
    group.add_argument("--roi", metavar="X,Y,W,H", type=parse_box, action="append", help="the same as a rectangle in pixels, from the upper left corner; may be repeated")
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--mask-index", type=float, metavar="INDEX", help="index of the region; -l is that of the rest, and a target is met by the rest")
    group.add_argument("--mask-weight", type=float, metavar="STEPS", help="instead, how far the region's index lies above that of the rest; a target moves both")


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
    region = args.mask or args.roi
    rate = (args.mask_index, args.mask_weight)
    if bool(region) != (rate != (None, None)):
        parser.error("a region needs --mask or --roi, and --mask-index or --mask-weight")
    if args.mask_index is not None and not 0 <= args.mask_index <= MAX_INDEX:
        parser.error(f"--mask-index: must lie in [0, {MAX_INDEX:g}], not {args.mask_index:g}")
    if args.mask_weight is not None and not 0 < abs(args.mask_weight) <= MAX_INDEX:
        parser.error(f"--mask-weight: must lie within ±{MAX_INDEX:g} and not be 0, not {args.mask_weight:g}")


def make_request(parser: argparse.ArgumentParser, args: argparse.Namespace, index: float | None) -> EncodeRequest:
    """The request that arguments make, at index 2.5 where they name neither index nor target.

    Exits with the parser's error where the arguments contradict each other.
    """
    for name in ("target_bpp", "target_bytes", "max_bytes", "step_size"):
        value = getattr(args, name)
        if value is not None and not 0 < value < math.inf:
            parser.error(f"--{name.replace('_', '-')}: must be positive, not {value:g}")
    if args.steps < 0 or args.trials < 1:
        parser.error("-t must be 0 or more, --trials 1 or more")
    if args.step_size is not None and not args.steps:
        parser.error("--step-size needs -t: no steps, no refinement")
    targets = args.target_bpp, args.target_bytes, args.max_bytes
    has_target = targets != (None, None, None)
    if has_target and index is not None:
        parser.error("-l and a target exclude each other: a target is met by the index that it needs")
    if index is None and not has_target:
        index = 2.5
    if args.keep_rate and (not args.steps or has_target):
        parser.error("--keep-rate needs -t, and no target, which is a rate to keep itself")
    if index is not None and not 0 <= index <= MAX_INDEX:
        parser.error(f"-l: index must lie in [0, {MAX_INDEX:g}], not {index:g}")
    refinement = RefinementSettings(args.steps, args.method, args.step_size)
    return EncodeRequest(index, *targets, args.trials, refinement, args.keep_rate, nearest=args.nearest)
