"""What is asked of the encoder: a rate index or a target size, and a refinement. Plain data."""

import math
import numbers
from dataclasses import dataclass, field
from types import UnionType
from typing import TYPE_CHECKING

from models.lambdas import INDEX_RANGE, in_range
from utils.codec.tolerances import CAP_MARGIN

if TYPE_CHECKING:
    from utils.codec.quality_map import QualityMap


@dataclass(frozen=True)
class Method:
    """A way to refine latents (utils/codec/refinement.py): the learning rate of its first step, and a description."""

    learning_rate: float
    text: str


METHODS = {
    "newton": Method(0.2, "Newton's steps with the curvature of a uniform quantizer; the rate is the part taken"),
    "sgd": Method(800.0, "the paper's gradient descent, meant for --nearest; its rate grows with the number of pixels"),
}


def check_number(value: object, name: str, kind: type | UnionType = numbers.Real | None) -> None:
    """ValueError where a value is not of a kind of numbers."""
    if isinstance(value, bool) or not isinstance(value, kind):
        raise ValueError(f"{name} must be a {'whole ' if kind is numbers.Integral else ''}number, not {value!r}")


@dataclass(frozen=True)
class RefinementSettings:
    """How latents are refined. ValueError where a value cannot be.

    Attributes:
        steps: of the descent; 0 is none.
        method: one of METHODS.
        learning_rate: of the first step, with fewer than ten of Newton's up to three times that; None for the method's.
    """

    steps: int = 20
    method: str = "newton"
    learning_rate: float | None = None

    def __post_init__(self) -> None:
        check_number(self.steps, "steps", numbers.Integral)
        check_number(self.learning_rate, "learning_rate")
        if self.steps < 0:
            raise ValueError(f"refinement has 0 steps or more, not {self.steps}")
        if self.method not in METHODS:
            raise ValueError(f"refinement has the methods {', '.join(METHODS)}, not {self.method!r}")
        if self.learning_rate is not None and not 0 < self.learning_rate < math.inf:
            raise ValueError(f"a learning rate must be positive, not {self.learning_rate:g}")


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
        refinement: how latents are refined (DLM); zero steps for none.
        keep_rate: refine towards less distortion at the size of the index's file, not towards the least loss.
        quality_map: where the index differs from that of the file; a target then solves for the latter.
        nearest: round latents to the nearest symbol, as the paper does, not for rate and distortion together; of
            Newton's refinement that is where it begins, as its symbols are the nearest ones anyway.
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
        for name in ("index", "bpp", "bytes", "max_bytes"):
            check_number(getattr(self, name), name)
        check_number(self.max_trials, "max_trials", numbers.Integral)
        targets = [value for value in (self.bpp, self.bytes, self.max_bytes) if value is not None]
        if len(targets) + (self.index is not None) > 1:
            raise ValueError("one rate index or one target, not several of them")
        if targets and not 0 < targets[0] < math.inf:
            raise ValueError(f"a target must be positive, not {targets[0]:g}")
        if self.index is not None and not in_range(self.index):
            raise ValueError(f"the rate index must lie in {INDEX_RANGE}, not {self.index:g}")
        if self.max_trials < 1:
            raise ValueError(f"a target is searched for in one trial or more, not {self.max_trials}")
        if not isinstance(self.refinement, RefinementSettings):
            raise ValueError(f"refinement takes RefinementSettings(steps), not {self.refinement!r}")
        if self.quality_map is not None and not hasattr(self.quality_map, "cell_offsets"):  # importing it takes PyTorch
            kind = type(self.quality_map).__name__
            raise ValueError(f"quality_map takes a QualityMap, as QualityMap.from_region makes it, not {kind}")
        if self.keep_rate and not self.refinement.steps:
            raise ValueError("keep_rate needs a refinement with steps")
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
