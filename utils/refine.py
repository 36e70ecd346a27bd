"""DLM: encoder-side online training of one picture's latents; the decoder stays as it is (TCSVT 2025; SPEC 4).

y and z of one picture are the free variables of its rate-distortion loss. The picture, and the entropy model's μ and
σ, are always those of rounded latents, so that bits and distortion are known at every step; what stands for the
symbols in the rate, so that it has a gradient, is the method's.
"""

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from models.coding import ste_round
from models.tcm import TCM
from utils.images import crop
from utils.losses import bits, rate_distortion
from utils.metrics import MS_SSIM_SMALLEST
from utils.orders import METHODS, Refinement

TOLERANCE = 3e-3  # relative: how far from a target's rate a refined latent may be
# Keeping a rate: growth of ln(weight of the rate) a step for the relative excess of the rate, and for its rise; at most
# so much, and that logarithm at most so large. With less momentum, and shorter steps that do not end at zero: what is
# to be steered has to respond.
GAINS, MOST, HEAVIEST = (20.0, 80.0), 1.0, 6.0
BETAS, HOLD_BETAS = (0.9, 0.99), (0.7, 0.99)
HOLD_STEP, HOLD_LAST = 0.6, 0.25
PAPER_PIXELS = 768 * 512  # of Kodak's pictures, which the paper's learning rate is for
STILL = 1e-6  # relative change of the loss at which the paper's SGD stops
CHECKPOINTING = 2**20  # pixels from which gradients are computed with every layer run twice


def straight_through(x: Tensor, _: float) -> Tensor:
    """round(x), with the gradient of x."""
    return ste_round(x)


def noise(x: Tensor, _: float) -> Tensor:
    """x and uniform noise in ±½, as in training."""
    return x + torch.rand_like(x) - 0.5


def soft_round(x: Tensor, temperature: float) -> Tensor:
    """Rounding made smooth: x itself at a high temperature, round(x) at zero (Agustsson & Theis, NeurIPS 2020)."""
    middle = x.detach().floor() + 0.5
    return middle + torch.tanh((x - middle) / temperature) / (2 * math.tanh(0.5 / temperature))


def gumbel_round(x: Tensor, temperature: float) -> Tensor:
    """A random mixture of floor and ceiling, the nearer one the likelier (Yang, Bamler & Mandt, NeurIPS 2020)."""
    low = x.detach().floor()
    up = (x - low).clamp(1e-4, 1 - 1e-4)
    logits = torch.stack([-torch.atanh(up), -torch.atanh(1 - up)], -1) / temperature
    return low + F.gumbel_softmax(logits, tau=temperature)[..., 1]


# Of rounding, at a temperature, by method.
SURROGATES: dict[str, Callable[[Tensor, float], Tensor]] = {
    "noise": noise,
    "ste": straight_through,
    "soft": soft_round,
    "sga": gumbel_round,
    "sgd": straight_through,
}
HOT, COLD = 0.5, 0.2  # temperatures at the first and the last step


@dataclass(frozen=True)
class Step:
    """What latents would cost as a file: bits a pixel, MSE on the 0–255 scale, D of the loss, bpp + λ · D."""

    number: int
    bpp: float
    mse: float
    distortion: float
    loss: float


@dataclass(frozen=True)
class Hold:
    """A rate to be kept, in bits a pixel; with a limit, one to come near from below, if it is steered at all."""

    bpp: float
    limit: float | None = None
    steered: bool = True

    def rank(self, bpp: float, distortion: float, tolerance: float = TOLERANCE) -> tuple[float, float]:
        """Smaller is better: by how far the rate is off what is allowed, then by distortion."""
        if self.limit is None:
            return max(0.0, abs(bpp / self.bpp - 1) - tolerance), distortion
        return (math.inf, bpp) if bpp > self.limit else (0.0, distortion)

    def correction(self, steps: list[Step]) -> float:
        """By how much the logarithm of the rate's weight has to grow: a PI controller, in the form of differences."""
        if not self.steered:
            return 0.0
        excess = steps[-1].bpp / self.bpp - 1
        rise = (steps[-1].bpp - steps[-2].bpp) / self.bpp if len(steps) > 1 else 0.0
        return max(-MOST, min(MOST, GAINS[0] * excess + GAINS[1] * rise))


@dataclass(frozen=True)
class Start:
    """Where to start from, and what for.

    Attributes:
        x: padded picture `[1, 3, H, W]` in [0, 1].
        size: (height, width) of the original inside it, whose pixels alone count.
        y, z: latents as `h_a` takes and gives them.
        bits: of their file.
    """

    x: Tensor
    size: tuple[int, int]
    index: float | None
    lmbda: float
    y: Tensor
    z: Tensor
    bits: float


@dataclass(frozen=True)
class Refined:
    """The best latents, (y `[1, M, h, w]`, z), and the last; and every step: before the first, …, after the last."""

    latents: tuple[Tensor, Tensor]
    best: Step
    last: tuple[Tensor, Tensor]
    steps: list[Step]


class _PaperSGD(torch.optim.SGD):
    """SGD whose rate falls by 1 % a step, and by half where the loss has risen (SPEC 4)."""

    def anneal(self, steps: list[Step]) -> None:
        if len(steps) > 1:
            for group in self.param_groups:
                group["lr"] *= 0.99 * (0.5 if steps[-1].loss > steps[-2].loss else 1)


def refine(
    model: TCM, start: Start, how: Refinement, hold: Hold | None = None, on_step: Callable[[Step], None] | None = None
) -> Refined:
    """Descend from latents towards less bpp + λ · D; the start is among the candidates.

    Args:
        hold: keep this rate and lower the distortion: the rate's weight is moved until it is met.
        on_step: told of every step.

    Raises:
        ValueError: the model is for MS-SSIM, and the picture too small for it.
    """
    if model.metric == "ms-ssim" and min(start.size) <= MS_SSIM_SMALLEST:
        raise ValueError(f"latents for MS-SSIM cannot be refined on sides of {MS_SSIM_SMALLEST} pixels or less")
    surrogate, original = SURROGATES[how.method], crop(start.x, *start.size)
    y, z = (latent.detach().clone().requires_grad_() for latent in (start.y, start.z))
    pixels, log_weight = math.prod(start.size), 0.0
    step_size = (how.learning_rate or METHODS[how.method].learning_rate) * (HOLD_STEP if hold else 1)
    # Gradients of means over the pixels: a rate of SGD is for pictures of one size.
    paper = _PaperSGD([y, z], step_size * pixels / PAPER_PIXELS) if how.method == "sgd" else None
    optimizer = paper or torch.optim.Adam([y, z], step_size, betas=HOLD_BETAS if hold else BETAS)
    steps: list[Step] = []
    best, kept, overhead = None, (y, z), 0.0
    with _for_latents(model, start.x, how.seed):
        for number in range(how.steps + 1):
            temperature = HOT * (COLD / HOT) ** (number / max(1, how.steps))
            with torch.set_grad_enabled(number < how.steps):
                out = model.forward_fromlatent(
                    y, z, start.index, tabled=True, surrogate=lambda r, t=temperature: surrogate(r, t)
                )
                out["x_hat"] = crop(out["x_hat"], *start.size).clamp(0, 1)
                losses = rate_distortion(out, original, torch.tensor([start.lmbda], device=y.device), model.metric)
            coded = float(sum(bits(likelihoods) for likelihoods in out["coded_likelihoods"].values()))
            overhead = overhead if steps else start.bits - coded  # of the file: header, lists, whole words
            bpp, distortion = (coded + overhead) / pixels, float(losses["distortion"].detach())
            step = Step(number, bpp, float(losses["mse"].detach()), distortion, bpp + start.lmbda * distortion)
            if not math.isfinite(step.loss):
                if not steps:
                    raise ValueError("the loss of this picture is not finite")
                break
            steps.append(step)
            if best is None or _rank(step, hold) < _rank(best, hold):
                best, kept = step, (y.detach().clone(), z.detach().clone())
            if on_step:
                on_step(step)
            if number == how.steps or (paper and _stands_still(steps)):
                break
            if paper:
                paper.anneal(steps)
            else:
                fall = (1 - math.cos(math.pi * number / how.steps)) / 2
                optimizer.param_groups[0]["lr"] = step_size * (1 - (1 - HOLD_LAST if hold else 1) * fall)
            optimizer.zero_grad()
            (losses["loss"] + (math.exp(log_weight) - 1) * losses["bpp"].sum()).backward()
            optimizer.step()
            if hold:
                log_weight = max(-HEAVIEST, min(HEAVIEST, log_weight + hold.correction(steps)))
    return Refined(kept, best, (y.detach(), z.detach()), steps)


def _rank(step: Step, hold: Hold | None) -> tuple[float, float]:
    return hold.rank(step.bpp, step.distortion) if hold else (0.0, step.loss)


def _stands_still(steps: list[Step]) -> bool:
    return len(steps) > 1 and abs(steps[-1].loss - steps[-2].loss) < STILL * steps[-1].loss


@contextlib.contextmanager
def _for_latents(model: TCM, x: Tensor, seed: int) -> Iterator[None]:
    """Gradients of latents alone, in bounded memory; random numbers of a seed."""
    trained = [p for p in model.parameters() if p.requires_grad]
    model.requires_grad_(False)
    before, model.checkpointing = model.checkpointing, x.shape[-2] * x.shape[-1] >= CHECKPOINTING
    try:
        with torch.random.fork_rng(devices=[x.device] if x.is_cuda else []):
            torch.manual_seed(seed)
            yield
    finally:
        model.checkpointing = before
        for p in trained:
            p.requires_grad_(True)
