"""The best file of one picture, online: its rate steered to a target, its latents refined (DLM; TCSVT 2025)."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from models.tcm import TCM_VBR
from utils import cli
from utils.evaluation import Result, evaluate_file
from utils.ladder import MAX_INDEX
from utils.lambdas import index_to_lambda
from utils.memory import room_for_a_picture
from utils.orders import Order, Refinement, Target
from utils.rate_control import Picture, Probe, Unreachable
from utils.refine import Hold, Step

ACCEPTED = 5e-3  # relative: a file that is so near to its target is as good as one that meets it


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


@room_for_a_picture()
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
        ValueError: the picture cannot be coded, or has no room.
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
        if target.cap:
            return None, f"above the largest file ({size})"
        return error, f"out of reach: the largest has {size}"
    if abs(error) > ACCEPTED and outcome.index == 0 and error > 0:
        return error, f"out of reach: the smallest has {size}"
    return error, ""


def _seconds(start: float, image: Tensor) -> float:
    if image.is_cuda:
        torch.cuda.synchronize(image.device)
    return time.perf_counter() - start


def need_variable_rate(model: object, checkpoint: str) -> None:
    """UserError for weights without a rate to choose."""
    if not isinstance(model, TCM_VBR):
        raise cli.UserError(f"{checkpoint}: a fixed-rate TCM; rate targets and refinement need variable-rate weights")
