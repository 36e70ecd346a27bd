"""DLM, the paper's encoder-side online training of one picture's latents (TCSVT 2025). The decoder stays as it is.

y and z of one picture are the free variables of its rate-distortion loss. The picture, and the entropy model's μ and
σ, are always those of the symbols that a file would have, to rounding errors, so its distortion is known at every step.
Its bits are estimated: Gaussian likelihoods of the symbols, and a constant with which the first step has the size of
the real file. It is measured anew in every fourth step and in the last, of Newton's steps and wherever a rate is kept.
Rounding is taken for the identity in gradients (straight-through).

So a gradient is measured at the symbols. Where rounding moved a latent by e, the loss's curvature adds curvature · e to
it, which sends the latent over to the next symbol, and back in the next step. The method "newton" takes that part away
again and divides by the curvature, which a quantizer's latents share: that says where each latent would best lie among
the symbols of all others. As all move at once, each goes a fifth of the way. The method "sgd" is the paper's.
"""

import contextlib
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from models import Codec
from models.coding.slice_coders import Quantization
from models.lambdas import MAX_INDEX, index_to_lambda
from utils.codec.analyzed import AnalyzedImage, CodedTrial, TrialEncode
from utils.codec.quality_map import pixel_weights
from utils.codec.request import METHODS, RefinementSettings, Target
from utils.codec.tiles import Tile, cut_tiles
from utils.codec.tolerances import CLOSE, FAR_BELOW_CAP, REFINED_CAP_MARGIN, REFINED_TOLERANCE
from utils.images import to_float
from utils.metrics import bits, rate_distortion

# A PI controller keeps the rate. In each step ln of the rate's weight grows by the first gain times the relative excess
# of the rate, and by the second times the growth of that excess, at most by MAX_CHANGE in all; it stays within
# ±MAX_LOG_WEIGHT.
GAINS = (4.0, 10.0)
MAX_CHANGE = 1.0
MAX_LOG_WEIGHT = 2.5
COUNTED_STEPS = 4  # in every fourth step and the last the bits are counted, and in others estimated from there
PAPER_PIXELS = 768 * 512  # Kodak's pictures, for which the paper chose its learning rate
MIN_CHANGE = 1e-6  # relative change of the loss at which the paper's SGD stops
# Second derivatives of the loss, in bits, of y and of z. An error e of a uniform quantizer that suits λ costs
# 6 / ln 2 · e² bits (Gish & Pierce, 1968), whatever the network. By random perturbations DepthConv had 19 to 25 for y,
# of which the smaller value below gains no less, and 255 for z, without its context model; TCM small has 175 for z.
CURVATURES = 2 * 6 / math.log(2), 250.0
STIFF = 3.0  # from this weight of the rate on, the curvature is taken for proportional to it
FEW_STEPS = 10  # fewer of Newton's steps are longer, as the first begins at symbols, of which it changes few
LONGEST = 3.0  # in units of the learning rate
TOO_FAR = 1.1  # where the loss is so many times the first one, steps have overshot; the next are half as long
CHECKPOINTING_PIXELS = 2**20  # larger pictures get their gradients with every layer run twice, in less memory
MAX_MOVES = 5  # how often refined latents are moved to another index
UNITS = 16, 64  # pixels per place of y and of z

Latents = tuple[Tensor, Tensor]  # y `[1, M, h, w]` and z


@dataclass(frozen=True)
class Step:
    """What the latents would cost as a file: bits per pixel, MSE (0–255 scale), D of the loss, and bpp + λ · D."""

    number: int
    bpp: float
    mse: float
    distortion: float
    loss: float


@dataclass(frozen=True)
class RateConstraint:
    """A rate to keep, in bits per pixel.

    Attributes:
        bpp: the rate.
        limit: bits per pixel that must not be exceeded; None where the rate may be missed on both sides.
        controlled: whether the weight of the rate is adjusted; it is not where every file is far below the limit.
    """

    bpp: float
    limit: float | None = None
    controlled: bool = True

    @classmethod
    def of_target(cls, target: Target, start: CodedTrial, pixels: int) -> "RateConstraint":
        """The constraint of a target. Under a cap the rate is just below it, as files differ from estimates by some
        bytes.

        Args:
            start: the file before refinement.
            pixels: number of them in the picture.
        """
        if not target.cap:
            return cls(target.bits / pixels)
        far_below = start.index == MAX_INDEX and start.bits < target.bits * (1 - FAR_BELOW_CAP)
        return cls(target.bits * (1 - REFINED_CAP_MARGIN) / pixels, target.bits / pixels, not far_below)

    def rank(self, bpp: float, distortion: float, tolerance: float = REFINED_TOLERANCE) -> tuple[float, float]:
        """Smaller is better: first the distance of the rate from what is allowed, then the distortion."""
        if self.limit is None:
            return max(0.0, abs(bpp / self.bpp - 1) - tolerance), distortion
        return (math.inf, bpp) if bpp > self.limit else (0.0, distortion)

    def correction(self, steps: list[Step]) -> float:
        """The change of ln of the rate's weight, by an incremental PI controller."""
        if not self.controlled:
            return 0.0
        excess = steps[-1].bpp / self.bpp - 1
        rise = (steps[-1].bpp - steps[-2].bpp) / self.bpp if len(steps) > 1 else 0.0
        return _clip(GAINS[0] * excess + GAINS[1] * rise, -MAX_CHANGE, MAX_CHANGE)


def _clip(value: float, lowest: float, highest: float) -> float:
    return max(lowest, min(highest, value))


def refine(
    image: AnalyzedImage, start: CodedTrial, settings: RefinementSettings,
    target: Target | None = None, on_step: Callable[[Step], None] | None = None,
) -> tuple[list[tuple[TrialEncode, Step]], list[Step]]:
    """Refine the latents of a file; with a target, at its rate.

    Args:
        start: the file, of this picture.
        on_step: called with every step.

    Returns:
        Candidates that may be better than `start`, each with the step it comes from; and every step.
    """
    constraint = None if target is None else RateConstraint.of_target(target, start, image.pixels)
    latents = image.latents(start.index)
    if settings.method == "newton":
        # The descent weighs rate and distortion itself, so its symbols are the nearest ones. It begins at ŷ of the
        # file. Rounding makes the same symbols of it, as what `correct` added to them is less than half a step.
        y_hat = image.quantize_latents(start.index, *latents, complete=True).quantized.y_hat
        latents = y_hat, latents[1]
        image = image.rounded()
    steps, best, best_latents, last_latents = descend(
        image, start, latents, settings, constraint=constraint, on_step=on_step
    )
    wanted = constraint.bpp * image.pixels if constraint and constraint.controlled else None
    candidates = []
    last = steps[-1]
    with contextlib.suppress(ValueError):  # latents that cannot be coded
        if best.number:
            trial = image.quantize_latents(start.index, *best_latents)
            candidates.append((trial, best))
            if wanted and abs(trial.bits / wanted - 1) > REFINED_TOLERANCE:  # a step's bits are an estimate
                candidates.append((_move_to_rate(image, start.index, best_latents, bits=wanted), best))
        if wanted and last is not best and abs(last.bpp / constraint.bpp - 1) > REFINED_TOLERANCE:
            candidates.append((_move_to_rate(image, start.index, last_latents, bits=wanted), last))
    return candidates, steps


def descend(
    image: AnalyzedImage, start: CodedTrial, latents: Latents, settings: RefinementSettings,
    constraint: RateConstraint | None = None, on_step: Callable[[Step], None] | None = None,
) -> tuple[list[Step], Step, Latents, Latents]:
    """Steps from the latents of a file towards less bpp + λ · D.

    The latents of the start take part in the comparison: where no step is better, they are the best.

    Args:
        latents: those of `start`, whose symbols `image.choose` makes of them. They are changed.
        constraint: keep this rate and lower the distortion: the weight of the rate is adjusted until it is met.
        on_step: called with every step.

    Returns:
        Every step, the first before any change; the best one; its latents; and the last ones.

    Raises:
        ValueError: the loss is not finite.
    """
    model = image.model
    tiles = cut_tiles(image.height, image.width)
    lmbda = index_to_lambda(start.index, model.metric)
    y, z = latents
    newton = settings.method == "newton"
    learning_rate = settings.learning_rate or METHODS[settings.method].learning_rate
    if newton:
        learning_rate *= _clip(FEW_STEPS / max(1, settings.steps), 1, LONGEST)
    # The loss is per pixel. The curvatures are in bits, and the paper's learning rate fits pictures of one size.
    units = [image.pixels / curvature for curvature in CURVATURES] if newton else [image.pixels / PAPER_PIXELS] * 2
    groups = [{"params": [part], "lr": learning_rate * unit} for part, unit in zip(latents, units, strict=True)]
    optimizer = torch.optim.SGD(groups)
    first_rates = [group["lr"] for group in optimizer.param_groups]
    steps: list[Step] = []
    best = None
    best_latents = (y, z)
    rate_offset = 0.0
    log_weight = 0.0
    shortened = 1.0

    def rank(step: Step) -> tuple[float, float]:
        return constraint.rank(step.bpp, step.distortion) if constraint else (0.0, step.loss)

    with _training_latents(model, max(tile.outer_pixels for tile in tiles)):
        for number in range(settings.steps + 1):
            y.grad, z.grad = torch.zeros_like(y), torch.zeros_like(z)
            weight = math.exp(log_weight)
            stiffness = max(1, weight / STIFF) if newton else 1
            curvatures = [stiffness * curvature for curvature in CURVATURES] if newton else None
            sums = [0.0, 0.0, 0.0]  # coded bits, and MSE and distortion, weighed by the tiles' pixels
            with torch.set_grad_enabled(number < settings.steps):
                for tile in tiles:
                    found = _differentiate(image, tile, start.index, (y, z), rate_weight=weight, curvatures=curvatures)
                    sums = [total + value for total, value in zip(sums, found, strict=True)]
            coded, mse, distortion = sums
            if not steps:  # what likelihoods leave out: header, side information, whole words, and fitted tables' gain
                rate_offset = start.bits - coded
            elif (newton or constraint) and (number % COUNTED_STEPS == 0 or number == settings.steps):
                with contextlib.suppress(ValueError):  # latents that cannot be coded
                    rate_offset = image.quantize_latents(start.index, y.detach(), z.detach()).bits - coded
            bpp = (coded + rate_offset) / image.pixels
            step = Step(number, bpp, mse, distortion=distortion, loss=bpp + lmbda * distortion)
            if not math.isfinite(step.loss):
                if not steps:
                    raise ValueError("the loss of this picture is not finite")
                break
            steps.append(step)
            if best is None or rank(step) < rank(best):
                best = step
                best_latents = (y.clone(), z.clone())
            if on_step:
                on_step(step)
            rise = step.loss - steps[-2].loss if number else math.inf
            if number == settings.steps or (not newton and abs(rise) < MIN_CHANGE * step.loss):
                break
            if newton:
                shortened *= 0.5 if step.loss > TOO_FAR * steps[0].loss and not constraint else 1
                factor = shortened / stiffness * (1 + math.cos(math.pi * number / settings.steps)) / 2
            else:  # 1 % less each step, and half where bpp + λ · D has risen (TCSVT 2025)
                shortened *= 0.99 * (0.5 if rise > 0 else 1) if number else 1
                factor = shortened
            for group, rate in zip(optimizer.param_groups, first_rates, strict=True):
                group["lr"] = rate * factor
            optimizer.step()
            if constraint:
                log_weight = _clip(log_weight + constraint.correction(steps), -MAX_LOG_WEIGHT, MAX_LOG_WEIGHT)
    return steps, best, best_latents, (y, z)


def _differentiate(
    image: AnalyzedImage, tile: Tile, index: float, latents: Latents, rate_weight: float,
    curvatures: Sequence[float] | None = None,
) -> tuple[float, float, float]:
    """Add a tile's share of the gradient of λ · D + rate_weight · bpp to that of the latents, where gradients are on.

    Args:
        curvatures: of y and z, in bits: the gradient, which is that at the symbols, gets curvature · (latent − its
            quantized value) added, which makes it that of the latents.

    Returns:
        The bits of the tile's symbols by their likelihoods, and its share of the picture's MSE and D.
    """
    model = image.model
    device = image.image.device
    pairs = tuple(zip(latents, UNITS, strict=True))
    parts = [latent[tile.outer(unit)].detach().requires_grad_() for latent, unit in pairs]
    lmbda = torch.tensor([index_to_lambda(index, model.metric)], device=device)
    places = image.rate_model.index_of_places(index)
    weights = None
    if image.quality_map is not None:
        places = places[tile.outer(UNITS[0])]
        weights = tile.inside(pixel_weights(places, lmbda, model.metric))
    quantization = Quantization(straight_through=True, choose=image.choose, use_scale_table=True)
    out = model.forward_fromlatent(*parts, index=places, quantization=quantization)
    out["x_hat"] = tile.inside(out["x_hat"]).clamp(0, 1)
    if image.gray:  # as its file is decoded
        out["x_hat"] = out["x_hat"].mean(1, keepdim=True).expand(-1, 3, -1, -1)
    cores = [tile.core(unit) for unit in UNITS]
    out["likelihoods"] = {name: out["likelihoods"][name][core] for name, core in zip("yz", cores, strict=True)}
    losses = rate_distortion(out, to_float(image.image[tile.picture]), lmbda, metric=model.metric, weights=weights)
    share = tile.pixels / image.pixels
    if torch.is_grad_enabled():
        loss = share * (losses["loss"] + (rate_weight - 1) * losses["bpp"]).sum()
        gradients = torch.autograd.grad(loss, parts)
        for (latent, unit), gradient in zip(pairs, gradients, strict=True):
            latent.grad[tile.outer(unit)] += gradient
        if curvatures:
            quantized = out["y_hat"], torch.round(parts[1] - model.medians) + model.medians
            for i, core in enumerate(cores):
                error = (parts[i] - quantized[i]).detach()[core]
                latents[i].grad[tile.outer(UNITS[i])][core] += curvatures[i] / image.pixels * error
    coded = sum(float(bits(likelihoods).detach()) for likelihoods in out["likelihoods"].values())
    return coded, *(share * float(losses[name].detach()) for name in ("mse", "distortion"))


def _move_to_rate(image: AnalyzedImage, index: float, latents: Latents, bits: float) -> TrialEncode:
    """Move refined latents to a nearby index at which they have this many bits: y is scaled by the change of m."""
    y, z = latents
    best = image.quantize_latents(index, y, z)
    curve = image.rate_model.curve(index, best.quantized.rows)
    curve.calibrate(index, best.bits)
    for _ in range(MAX_MOVES):
        moved = curve.solve(bits)
        if moved in curve.measured or abs(best.bits / bits - 1) < CLOSE:
            break
        trial = image.quantize_latents(moved, image.rate_model.moved(y, index, moved), z)
        curve.calibrate(moved, trial.bits)
        best = min(best, trial, key=lambda trial: abs(trial.bits - bits))
    return best


_refining = threading.Lock()


@contextlib.contextmanager
def _training_latents(model: Codec, pixels: int) -> Iterator[None]:
    """Gradients of latents alone, in bounded memory. In one thread at a time, as the model is told so."""
    with _refining:
        trained = [p for p in model.parameters() if p.requires_grad]
        model.requires_grad_(False)
        before = model.checkpointing
        model.checkpointing = pixels >= CHECKPOINTING_PIXELS
        try:
            yield
        finally:
            model.checkpointing = before
            for p in trained:
                p.requires_grad_(True)
