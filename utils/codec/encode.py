"""From a picture to its file: at a rate index or of a target size, with latents refined or not (DLM; TCSVT 2025)."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from models import Codec, VariableRate
from models.coding.precision import without_autocast
from models.lambdas import MAX_INDEX, MIN_INDEX, index_to_lambda
from models.weights import check_codec
from utils.codec.analyzed import AnalyzedImage, CodedTrial
from utils.codec.decode import decode
from utils.codec.rate_control import RateController, UnreachableError
from utils.codec.refinement import RateConstraint, Step, refine
from utils.codec.request import EncodeRequest, RefinementSettings, Target
from utils.codec.tolerances import TARGET_TOLERANCE
from utils.device import clock, out_of_memory_as_value_error
from utils.errors import UserError
from utils.images import Watch, as_picture
from utils.metrics import MS_SSIM_SMALLEST, distortion, psnr


@dataclass(frozen=True)
class MeasuredFile(CodedTrial):
    """A file with the D of the loss (not λ · D) and the PSNR in dB of its decoded picture."""

    bpp: float
    distortion: float
    psnr: float


@dataclass(frozen=True)
class Refinement:
    """What refinement did.

    Attributes:
        before: the file without refinement.
        after: the file that was taken, which is `before` where none was better.
        steps: the descent; steps[0] is the start.
        chosen: the step kept, 0 if none.
        loss_change: relative change of the loss, at the λ of the file before.
        seconds: time of the descent and of measuring the candidates.
    """

    before: MeasuredFile
    after: MeasuredFile
    steps: list[Step]
    chosen: int
    loss_change: float
    seconds: float

    @property
    def gain(self) -> float:
        """Gain in PSNR, dB."""
        before = self.before.psnr
        after = self.after.psnr
        return 0.0 if before == after else after - before  # both may be infinite


@dataclass(frozen=True)
class EncodeResult:
    """A picture's file, and how it came about.

    Attributes:
        data, index: the file, and its rate index (None for a fixed-rate model).
        trials: indexes tried besides that of the file.
        error: relative distance of the size from the target, or with `keep_rate` from the size before refinement; None
            without either, and for a cap above every file.
        note: why the target was not met; empty where it was.
        refinement: None unless requested.
        seconds: analysis, rate control and coding, without refinement.
    """

    data: bytes
    index: float | None
    trials: int
    error: float | None
    note: str
    refinement: Refinement | None
    seconds: float


@out_of_memory_as_value_error()
@torch.inference_mode(False)  # refinement needs gradients
@without_autocast()
def encode(
    model: Codec, image: Tensor | np.ndarray, request: EncodeRequest, on_step: Callable[[Step], None] | None = None,
    watch: Watch | None = None,
) -> EncodeResult:
    """Encode one picture, a uint8 tensor `[3, H, W]` or NumPy array `[H, W, 3]`, as requested.

    A refined file is taken only where, really decoded, it is better than the one before: by loss, or with a target by
    rate first and then by distortion.

    Args:
        request: a fixed-rate codec ignores its index.
        on_step: called with every step of the refinement.
        watch: gets the bands of the picture while they are analyzed, which is half of the time.

    Raises:
        UserError: the request needs a variable-rate codec.
        UnreachableError: the cap is below the smallest file.
        ValueError: the picture cannot be coded, is of another form, or has no room in memory.
    """
    check_codec(model, "encode")
    if not isinstance(request, EncodeRequest):
        raise ValueError(f"encode takes an EncodeRequest, as EncodeRequest(index=2.5), not {request!r:.60}")
    image = as_picture(image).to(model.medians.device)
    model.check_precision()
    variable = isinstance(model, VariableRate)
    if request.needs_variable_rate and not variable:
        raise UserError("fixed-rate weights: targets, refinement and maps need variable-rate weights")
    if request.refinement.steps and model.entropy_bottleneck.quantiles.is_inference():
        raise ValueError("refinement needs gradients, and weights loaded inside torch.inference_mode() have none")
    if variable and request.index is None and not request.has_target:
        raise ValueError("variable-rate weights need a rate index or a target")
    start = clock(image.device)
    analyzed = AnalyzedImage(model, image, quality_map=request.quality_map, nearest=request.nearest, watch=watch)
    target = request.target(analyzed.pixels)
    controller = RateController(analyzed)
    if target is None:
        index = request.index if variable else None
        first = analyzed.write(analyzed.quantize(index, last=not request.refinement.steps))
    else:
        try:
            first = controller.meet(target, request.max_trials)
        except UnreachableError as error:
            if not request.refinement.steps:
                raise
            first = error.smallest  # refined, it may be smaller
    seconds = clock(image.device) - start
    refinement = None
    found = first
    if request.refinement.steps:
        target = Target(first.bits) if request.keep_rate else target
        refinement = _refine(analyzed, first, request.refinement, target=target, on_step=on_step)
        found = refinement.after
    error = None
    note = ""
    if target is not None:
        if not target.allows(found.bits):
            raise UnreachableError(found, request.refinement.steps)
        error, note = _target_error(target, found, unrefined=first.bits, pixels=analyzed.pixels, reach=controller.reach)
    return EncodeResult(
        data=found.data, index=found.index, trials=max(0, controller.trials - 1),
        error=error, note=note, refinement=refinement, seconds=seconds,
    )


def _refine(
    analyzed: AnalyzedImage, first: CodedTrial, settings: RefinementSettings,
    target: Target | None, on_step: Callable[[Step], None] | None,
) -> Refinement:
    """Refine the latents of a file and keep the best one, each candidate really decoded and measured."""
    model = analyzed.model
    image = analyzed.image
    pixels = analyzed.pixels
    start = clock(image.device)
    weights = analyzed.distortion_weights(first.index)

    def measure(file: CodedTrial) -> MeasuredFile:
        decoded = decode(model, file.data)
        found = distortion(image, decoded, model.metric, weights=None if weights is None else weights[0])
        if found is None:
            raise ValueError(f"latents for MS-SSIM cannot be refined on sides of {MS_SSIM_SMALLEST} pixels or less")
        return MeasuredFile(file.index, file.data, file.bits / pixels, distortion=found, psnr=psnr(image, decoded))

    def loss(file: MeasuredFile) -> float:
        return file.bpp + index_to_lambda(before.index, model.metric) * file.distortion

    def rank(file: MeasuredFile) -> tuple[float, float]:
        if target is None:
            return 0.0, loss(file)
        limit = target.bits / pixels if target.cap else None
        return RateConstraint(target.bits / pixels, limit).rank(file.bpp, file.distortion, TARGET_TOLERANCE)

    before = best = measure(first)
    candidates, steps = refine(analyzed, first, settings, target=target, on_step=on_step)
    chosen = 0
    for candidate, step in candidates:
        found = measure(analyzed.write(candidate))
        if rank(found) < rank(best):
            best = found
            chosen = step.number
    return Refinement(
        before, best, steps=steps, chosen=chosen,
        loss_change=loss(best) / loss(before) - 1, seconds=clock(image.device) - start,
    )


def _target_error(
    target: Target, found: CodedTrial, unrefined: float, pixels: int, reach: tuple[float, float] | None
) -> tuple[float | None, str]:
    """Relative error of a size against its target, and why it was not met.

    Args:
        unrefined: bits of the file before refinement.
        reach: as in `RateController`, without refinement.
    """
    error = found.bits / target.bits - 1
    size = f"{len(found.data)} bytes, {found.bits / pixels:.4f} bpp"
    largest = unrefined >= reach[1] if reach else found.index == MAX_INDEX
    smallest = unrefined <= reach[0] if reach else found.index == MIN_INDEX
    if error < -TARGET_TOLERANCE and largest:
        if target.cap:
            return None, f"above the largest file ({size})"
        return error, f"out of reach: the largest has {size}"
    if error > TARGET_TOLERANCE and smallest:
        return error, f"out of reach: the smallest has {size}"
    if abs(error) > TARGET_TOLERANCE and reach and not target.cap:
        return error, f"between two files: the nearest has {size}"
    return error, ""
