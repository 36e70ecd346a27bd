"""What is asked of an encoder: an index or a target, and a refinement; and the arguments that say so.

Plain data: reading the arguments needs no PyTorch, whose import takes seconds.
"""

import argparse
import math
from dataclasses import dataclass, field

from utils.ladder import MAX_INDEX

BELOW = 3e-3  # how far under a cap is aimed, relatively


@dataclass(frozen=True)
class Method:
    """How to refine (utils/refine.py): the learning rate of the first step, and a description."""

    learning_rate: float
    text: str


METHODS = {
    "noise": Method(0.005, "Adam, noise in the rate"),
    "ste": Method(0.02, "Adam, straight-through rounding"),
    "soft": Method(0.03, "Adam, annealed soft rounding in the rate"),
    "sga": Method(0.03, "Adam, stochastic Gumbel annealing in the rate"),
    "sgd": Method(800.0, "the paper's SGD, straight-through rounding; scaled with the pixels"),
}


@dataclass(frozen=True)
class Refinement:
    """Steps of a method of METHODS, at its own learning rate where none is given."""

    steps: int = 20
    method: str = "noise"
    learning_rate: float | None = None
    seed: int = 0


@dataclass(frozen=True)
class Target:
    """Bits of a file, header counted; with cap, it must not have more."""

    bits: float
    cap: bool = False

    @property
    def goal(self) -> float:
        """What is aimed at."""
        return self.bits * (1 - BELOW) if self.cap else self.bits

    def fits(self, bits: float) -> bool:
        """Whether a file may have so many bits."""
        return not self.cap or bits <= self.bits

    def miss(self, bits: float) -> float:
        """How far off what is aimed at, relatively."""
        return abs(bits / self.goal - 1)


@dataclass(frozen=True)
class Order:
    """What is asked for: an index, or one of the targets; and a refinement, of no steps where there is to be none.

    With keep_rate, refinement has the size of the index's file as its target.
    """

    index: float | None = None
    bpp: float | None = None
    bytes: int | None = None
    max_bytes: int | None = None
    most_probes: int = 3
    refinement: Refinement = field(default_factory=lambda: Refinement(0))
    keep_rate: bool = False

    def target(self, pixels: int) -> Target | None:
        """Bits for a picture of so many pixels."""
        if self.bpp is not None:
            return Target(self.bpp * pixels)
        if self.bytes is not None:
            return Target(8.0 * self.bytes)
        return None if self.max_bytes is None else Target(8.0 * self.max_bytes, cap=True)

    @property
    def steered(self) -> bool:
        """Whether there is a target."""
        return self.target(1) is not None


# The arguments that make an order -------------------------------------------------------------


def add_target_arguments(parser: argparse.ArgumentParser) -> None:
    """--target-bpp, --target-bytes, --max-bytes, of which one may be given, and --probes."""
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--target-bpp", type=float, metavar="B", help="bits per pixel of the file, in place of an index")
    group.add_argument("--target-bytes", type=int, metavar="N", help="bytes of the file, in place of an index")
    group.add_argument("--max-bytes", type=int, metavar="N", help="bytes that the file must not exceed, in place of an index")
    parser.add_argument("--probes", type=int, default=3, metavar="P", help="with a target: rates tried at most before the one to encode at (some more under a cap); 1 is one-pass")


def add_refinement_arguments(parser: argparse.ArgumentParser, steps: int) -> None:
    """-t, --method, --step-size."""
    add = parser.add_argument
    methods = "; ".join(f"{name}: {method.text} ({method.learning_rate:g})" for name, method in METHODS.items())
    add("-t", "--steps", type=int, default=steps, metavar="STEPS", help="steps of latent refinement (DLM); 0 is none")
    add("--method", choices=METHODS, default=Refinement.method, help=methods)
    add("--keep-rate", action="store_true", help="with -l: refine to less distortion in as many bits, and not to the least loss, where the rate may move far")
    add("--step-size", type=float, metavar="LR", help="learning rate of the refinement, × 0.6 with a target (default: the method's, in brackets)")


def order_of(parser: argparse.ArgumentParser, args: argparse.Namespace, index: float | None) -> Order:
    """The order that arguments make, at index 2.5 where they name neither index nor target.

    Ends with the parser's error where one is impossible.
    """
    for name in ("target_bpp", "target_bytes", "max_bytes", "step_size"):
        value = getattr(args, name)
        if value is not None and not 0 < value < math.inf:
            parser.error(f"--{name.replace('_', '-')}: must be positive, not {value:g}")
    if args.steps < 0 or args.probes < 1:
        parser.error("-t must be 0 or more, --probes 1 or more")
    if args.step_size is not None and not args.steps:
        parser.error("--step-size needs -t: no steps, no refinement")
    targets = args.target_bpp, args.target_bytes, args.max_bytes
    steered = any(target is not None for target in targets)
    if steered and index is not None:
        parser.error("-l and a target exclude each other: a target is met by the index that it needs")
    if index is None and not steered:
        index = 2.5
    if args.keep_rate and (not args.steps or steered):
        parser.error("--keep-rate needs -t, and no target, which is a rate to keep itself")
    if index is not None and not 0 <= index <= MAX_INDEX:
        parser.error(f"-l: index must lie in [0, {MAX_INDEX:g}], not {index:g}")
    refinement = Refinement(args.steps, args.method, args.step_size)
    return Order(index, *targets, args.probes, refinement, args.keep_rate)
