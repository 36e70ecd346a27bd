"""A file of the size that is asked for: the R-λ model, a few trial encodes, one file (TCSVT 2025).

A trial encode is `h_a`, the slices, and the code lengths of the symbols: no analysis, synthesis or entropy coding.
"""

import math
from dataclasses import replace

import numpy as np

from models.lambdas import MAX_INDEX
from utils.codec.analyzed import AnalyzedImage, TrialEncode
from utils.codec.rate_model import RateCurve
from utils.codec.request import CAP_MARGIN, Target

FIRST_INDEX = MAX_INDEX / 2  # of the first trial
CLOSE = 1e-3  # a trial this near to the target, relatively, is the last
CLOSE_TO_CAP = 7e-3  # how near to the aim under a cap is good enough, relatively, when the trials are used up
TARGET_TOLERANCE = 5e-3  # relative: a file this near to its target is as good as one that meets it
CLEARLY_APART = 0.2  # relative: bits at an end of the range that differ so much from all others are the extreme
SEARCHED = 21  # indexes all over the range
EXTRA_TRIALS = 5  # beyond those allowed, under a cap that is exceeded or far off


class UnreachableError(ValueError):
    """No file of this picture is as small as the cap. Carries the trial of the smallest, with the bits of its file."""

    def __init__(self, smallest: TrialEncode) -> None:
        super().__init__(f"the smallest file of this picture has {smallest.bits / 8:.0f} bytes")
        self.smallest = smallest


class RateController:
    """Finds the rate index at which the file of a picture has a target size.

    Attributes:
        curve: bits against the index, calibrated by every trial; None before the first.
        trials: number of trial encodes so far.
        reach: bits of the smallest and the largest file, where all of the range was searched for them; else None.
    """

    def __init__(self, image: AnalyzedImage) -> None:
        self.image = image
        self.curve: RateCurve | None = None
        self.trials = 0
        self.reach: tuple[float, float] | None = None

    def encode(self, target: Target, max_trials: int = 3) -> tuple[TrialEncode, bytes]:
        """The trial whose file is nearest to a target, or to a little below a cap, and that file.

        Raises:
            UnreachableError: the cap is below the smallest file.
        """
        aimed = target
        while True:
            trial = self.search(aimed, max_trials)
            data = self.image.write(trial)
            if self._may_have_missed(target, trial):
                return self._search_everywhere(target, trial, data)
            if target.allows(trial.bits):
                return trial, data
            if trial.index == 0:
                raise UnreachableError(trial)
            self.curve.calibrate(trial.index, trial.bits)  # the code lengths were some bytes too few
            aimed = replace(aimed, bits=aimed.bits - (trial.bits - target.bits))

    def _may_have_missed(self, target: Target, trial: TrialEncode) -> bool:
        """Whether a better file may exist than the best of the search, which missed the target.

        On flat and tiny pictures R(index) is not monotone: then, or where the bits hardly differ, the ends of the range
        need not have the smallest and the largest file.
        """
        if target.allows(trial.bits) and target.distance(trial.bits) < TARGET_TOLERANCE:
            return False
        bits = [bits for _, bits in sorted(self.curve.measured.items())]
        others = [value for index, value in self.curve.measured.items() if index != trial.index]
        at_an_end = trial.index in (0, MAX_INDEX)
        apart = all(abs(value / trial.bits - 1) > CLEARLY_APART for value in others)
        return sorted(bits) != bits or (at_an_end and not apart)

    def _search_everywhere(self, target: Target, trial: TrialEncode, data: bytes) -> tuple[TrialEncode, bytes]:
        """The best of a file and those at indexes all over the range. Raises UnreachableError as `encode`."""

        def rank(found: tuple[TrialEncode, bytes]) -> tuple[bool, float]:
            trial, _ = found
            allowed = target.allows(trial.bits)
            return not allowed, target.distance(trial.bits) if allowed else trial.bits

        best = (trial, data)
        sizes = [trial.bits]
        for index in np.linspace(0, MAX_INDEX, SEARCHED).tolist():
            trial = self.try_index(index)
            data = self.image.write(trial)  # which makes its bits exact
            sizes.append(trial.bits)
            best = min(best, (trial, data), key=rank)
        self.reach = min(sizes), max(sizes)
        if not target.allows(best[0].bits):
            raise UnreachableError(best[0])
        return best

    def search(self, target: Target, max_trials: int = 3) -> TrialEncode:
        """As `encode`, by code lengths alone; the smallest that was found where all exceed a cap.

        Stops when a trial is closer than CLOSE. Otherwise it tries max_trials + 1 indexes and keeps the nearest; under
        a cap that is still exceeded or missed by far, up to EXTRA_TRIALS more. Earlier measurements are used.
        """
        if max_trials < 1:
            raise ValueError(f"rate control needs at least one trial, not {max_trials}")
        best: TrialEncode | None = None
        tried: set[float] = set()
        aim = target.aim
        index = FIRST_INDEX if self.curve is None else self.curve.solve(aim)
        while index not in tried:
            tried.add(index)
            trial = self.try_index(index)
            if target.allows(trial.bits) and (best is None or target.distance(trial.bits) < target.distance(best.bits)):
                best = trial
            distance = math.inf if best is None else target.distance(best.bits)
            used_up = len(tried) > max_trials
            if distance < CLOSE or (used_up and (not target.cap or distance < CLOSE_TO_CAP)):
                break
            if len(tried) > max_trials + EXTRA_TRIALS:
                break
            if best is None and used_up:
                aim *= 1 - CAP_MARGIN
            index = self.curve.solve(aim)
        return best or self.try_index(self.curve.solve(0))

    def try_index(self, index: float) -> TrialEncode:
        """A trial encode at an index, which calibrates the curve."""
        trial = self.image.quantize(index)
        self.trials += 1
        if self.curve is None:
            self.curve = self.image.rate_model.curve(index, trial.quantized.rows)
        self.curve.calibrate(index, trial.bits)
        return trial
