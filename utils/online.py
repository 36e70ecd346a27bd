"""The best file of one picture, online: its rate steered to a target, its latents refined (DLM; TCSVT 2025)."""

import argparse
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from models.tcm import TCM_VBR
from utils import cli
from utils.evaluation import Result, evaluate_file
from utils.lambdas import MAX_INDEX, index_to_lambda
from utils.rate_control import Picture, Probe, Target, Unreachable
from utils.refine import METHODS, Hold, Refinement, Step

ACCEPTED = 5e-3  # relative: a file that is so near to its target is as good as one that meets it


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


@dataclass
class Outcome:
    """A picture's file, and how it came about.

    Attributes:
        data, index: the file.
        plain, result: rate and quality without refinement, and of the file; decoded: its picture, uint8 `[3, H, W]`.
            None where they were not asked for.
        error: relative, of the size against the target; None without one, and for a cap that every file is below.
        note: what is wrong with the target; empty where nothing is.
        probes: how many rates were tried beside the one of the file.
        steps: of the refinement, as it went; chosen: the one that was coded, 0 where none was better.
        loss_change: relative, at the λ of the unrefined file.
        control_seconds: analysis, steering and coding.
    """

    data: bytes
    index: float
    note: str
    probes: int
    control_seconds: float
    error: float | None = None
    plain: Result | None = None
    result: Result | None = None
    decoded: Tensor | None = None
    steps: list[Step] = field(default_factory=list)
    chosen: int = 0
    loss_change: float = 0.0
    refine_seconds: float = 0.0


def produce(
    model: TCM_VBR,
    name: str,
    image: Tensor,
    order: Order,
    on_step: Callable[[Step], None] | None = None,
    judge: bool = True,
) -> Outcome:
    """Encode one picture, uint8 `[3, H, W]` on the model's device, as ordered.

    A refined file is taken only where, really decoded, it is better than the plain one: by loss, or with a target by
    rate first and then distortion.

    Args:
        judge: decode the file and measure it; a refinement needs that anyway.

    Raises:
        Unreachable: the cap is below the smallest file.
        ValueError: the picture cannot be coded.
    """
    clock = time.perf_counter()
    picture = Picture(model, image)
    target = order.target(picture.height * picture.width)
    if target is None:
        probe = picture.quantise(order.index)
        data = picture.code(probe)
        target = Target(probe.bits) if order.keep_rate else None
    else:
        try:
            probe, data = picture.steer(target, order.most_probes)
        except Unreachable as error:
            if not order.refinement.steps:
                raise
            probe = error.smallest  # refined, it may be smaller
            data = picture.code(probe)
    outcome = Outcome(data, probe.index, "", max(0, picture.measured - 1), _seconds(clock, image))
    if judge or order.refinement.steps:
        _judge(model, name, image, outcome)
        outcome.plain = outcome.result
    if order.refinement.steps:
        _refine(picture, probe, image, order.refinement, target, outcome, on_step)
    if target is not None:
        if not target.fits(8 * len(outcome.data)):
            raise Unreachable(probe)
        outcome.error, outcome.note = _miss(target, outcome, picture)
    return outcome


def _judge(model: TCM_VBR, name: str, image: Tensor, outcome: Outcome) -> None:
    seconds = outcome.control_seconds + outcome.refine_seconds
    outcome.result, outcome.decoded = evaluate_file(model, name, image, outcome.index, outcome.data, seconds)


def _refine(
    picture: Picture,
    probe: Probe,
    image: Tensor,
    how: Refinement,
    target: Target | None,
    outcome: Outcome,
    on_step: Callable[[Step], None] | None,
) -> None:
    """Put what refinement finds in the outcome, if it is better."""
    clock, model, plain = time.perf_counter(), picture.model, outcome.plain
    candidates, outcome.steps = picture.refine(probe, how, target, on_step)
    outcome.refine_seconds = _seconds(clock, image)
    pixels, lmbda = picture.height * picture.width, index_to_lambda(plain.index, model.metric)

    def distortion(result: Result) -> float:  # of the loss: D, whatever the λ of its index
        if result.loss is None:  # MS-SSIM of a picture that is too small for it, which `refine` refuses
            raise ValueError("the picture is too small to be refined")
        return (result.loss - result.bpp) / index_to_lambda(result.index, model.metric)

    def rank(result: Result) -> tuple[float, float]:
        if target is None:
            return 0.0, result.bpp + lmbda * distortion(result)
        limit = target.bits / pixels if target.cap else None
        return Hold(target.bits / pixels, limit).rank(result.bpp, distortion(result), ACCEPTED)

    for better, step in candidates:
        found = replace(outcome, data=picture.code(better), index=better.index, chosen=step.number)
        _judge(model, plain.image, image, found)
        if rank(found.result) < rank(outcome.result):
            outcome.data, outcome.index, outcome.chosen = found.data, found.index, found.chosen
            outcome.result, outcome.decoded = found.result, found.decoded
    outcome.loss_change = (outcome.result.bpp + lmbda * distortion(outcome.result)) / plain.loss - 1


def _miss(target: Target, outcome: Outcome, picture: Picture) -> tuple[float | None, str]:
    """Error of a size against its target, and what is wrong with the target."""
    count = 8 * len(outcome.data)
    error = count / target.bits - 1
    size = f"{len(outcome.data)} bytes, {count / (picture.height * picture.width):.4f} bpp"
    if abs(error) > ACCEPTED and outcome.index == MAX_INDEX and error < 0:
        return (None, f"above the largest file ({size})") if target.cap else (error, f"out of reach: the largest has {size}")
    if abs(error) > ACCEPTED and outcome.index == 0 and error > 0:
        return error, f"out of reach: the smallest has {size}"
    return error, ""


def _seconds(start: float, image: Tensor) -> float:
    if image.is_cuda:
        torch.cuda.synchronize(image.device)
    return time.perf_counter() - start


# The arguments that two scripts have -----------------------------------------------------------


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


def need_variable_rate(model: object, checkpoint: str) -> None:
    """UserError for weights without a rate to choose."""
    if not isinstance(model, TCM_VBR):
        raise cli.UserError(f"{checkpoint}: a fixed-rate TCM; rate targets and refinement need variable-rate weights")
