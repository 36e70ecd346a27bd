"""Budget, progress, and the learning rate as a function of both."""

import math
from dataclasses import dataclass

FACTORS = (0.5, 0.1, 0.05)  # the published steps of the learning rate, one for each milestone
LAST_PART_RATE = 0.25  # share of the peak learning rate where the last part of a run begins


@dataclass
class Settings:
    """How to train. The checkpoint's training record holds all of it."""

    max_minutes: float = 0  # the budget is whichever of the three ends first; 0 is none
    max_steps: int = 0
    max_patches: int = 0
    batch_size: int = 8  # patches per step, of all processes together
    patch_size: tuple[int, int] = (256, 256)
    learning_rate: float = 2e-4
    aux_learning_rate: float = 1e-3
    density_factor: float = 10.0  # learning rate of z's density, in units of the networks'
    transform_factor: float = 1.0  # that of `Codec.transform_parameters`, in the same units
    balance: float = 0.0  # the loss of each sample is weighted by (λ / λ_mid)^−balance; 0 is the published loss
    map_share: float = 0.0  # share of patches with an index that differs from place to place; with a last part, of its
    synthetic_share: float = 0.0  # share of patches with a part that no photograph has
    last_share: float = 0.0  # share of the budget: the last part, on other patches and without balance
    last_patch_size: tuple[int, int] = (256, 256)
    last_batch_size: int = 8  # as batch_size
    schedule: str = "cosine"
    milestones: tuple[float, ...] = (0.25, 0.5, 0.75)  # for "step", as shares of the budget: epochs 50, 100, 150 of 200
    warmup: int = 200  # steps
    clip_max_norm: float = 1.0
    ema: float = 0.999
    validate_minutes: float = 15
    save_minutes: float = 5
    amp: str | None = None  # "bf16" or "fp16" autocast; likelihoods stay in float32
    seed: int = 0
    checkpoint: str | None = ""  # whose weights the run began with; None: new ones; empty: not recorded
    trained_on: str = ""  # photographs, in words
    validated_on: str = ""


@dataclass
class Progress:
    """How far a run is. `--resume` restores it."""

    step: int = 0
    patches: int = 0
    seconds: float = 0  # spent on training steps, without validation and saving
    waiting: float = 0  # seconds of these spent waiting for patches
    skipped: int = 0  # steps with a loss or gradient that was not finite
    skipped_in_a_row: int = 0


def budget_used(progress: Progress, settings: Settings) -> float:
    """Share of the budget that is spent, from 0 to 1 and beyond."""
    spent = (progress.seconds / 60, progress.step, progress.patches)
    budgets = (settings.max_minutes, settings.max_steps, settings.max_patches)
    return max((used / most for used, most in zip(spent, budgets, strict=True) if most), default=0.0)


def in_last_part(progress: Progress, settings: Settings) -> bool:
    """Whether the part of the budget has begun that `Settings.last_share` sets apart."""
    return settings.last_share > 0 and budget_used(progress, settings) >= 1 - settings.last_share


def learning_rate(progress: Progress, settings: Settings) -> float:
    """Linear warm-up in steps, times the schedule, which ends with the budget in minutes, steps or patches.

    "cosine" falls to zero, "step" by the published factors. Before a last part "cosine" falls to LAST_PART_RATE of the
    peak, and in it from there to zero. PyTorch's schedulers do not fit: they count steps, and a
    run with a time limit does not know how many it will make.
    """
    used = min(1.0, budget_used(progress, settings))
    warm = min(1.0, (progress.step + 1) / max(1, settings.warmup))
    if settings.schedule == "cosine":
        begin = 0.0
        high = 1.0
        low = LAST_PART_RATE if settings.last_share else 0.0
        end = 1 - settings.last_share
        if settings.last_share and used >= end:
            begin = end
            end = 1.0
            high = low
            low = 0.0
        fall = 0.5 * (1 - math.cos(math.pi * (used - begin) / (end - begin)))
        return settings.learning_rate * warm * (high + (low - high) * fall)
    passed = sum(used >= milestone for milestone in settings.milestones)
    return settings.learning_rate * warm * (1.0, *FACTORS)[passed]
