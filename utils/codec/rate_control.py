"""A file of the size that is asked for: the R-λ model in our form for rounded latents (`RateModel.curve`), a few trial
encodes, and mostly one file.

A trial encode is `h_a`, the slices, and the code lengths of the symbols: no analysis, synthesis or entropy coding.
"""

import math
from dataclasses import replace

from models.lambdas import LAST_INDEX, MAX_INDEX, MIN_INDEX
from utils.codec.analyzed import AnalyzedImage, CodedTrial, TrialEncode
from utils.codec.rate_model import GRID, RateCurve
from utils.codec.request import Target
from utils.codec.tolerances import CAP_MARGIN, CLEARLY_APART, CLOSE, CLOSE_ENOUGH, FAR_OFF, TARGET_TOLERANCE

FIRST_TRIAL = LAST_INDEX / 2  # its index
EXTRA_TRIALS = 5  # beyond those allowed, where these are not close enough
NEAR_AN_END = 4  # indexes of GRID: are the bits monotone there?


class UnreachableError(ValueError):
    """No file of this picture is as small as the cap. Carries the smallest, of so many steps of refinement."""

    def __init__(self, smallest: CodedTrial, steps: int = 0) -> None:
        refined = f", refined in {steps} steps," if steps else ""
        super().__init__(f"the smallest file of this picture{refined} has {len(smallest.data)} bytes")
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

    def meet(self, target: Target, max_trials: int = 3) -> CodedTrial:
        """The file nearest to a target, or to a little below a cap.

        Where it is missed by far, or missed and the bits are not monotone in the index or hardly differ at an end of
        the range, files at all indexes of GRID are made, and some more.

        Args:
            max_trials: as in `search`.

        Raises:
            UnreachableError: the cap is below the smallest file.
        """
        aimed = target
        while True:
            found = self.image.write(self.search(aimed, max_trials))
            if self._may_have_missed(target, found, max_trials):
                return self._search_everywhere(target, found)
            if target.allows(found.bits):
                return found
            if found.index == MIN_INDEX:
                raise UnreachableError(found)
            self.curve.calibrate(found.index, found.bits)  # the code lengths were some bytes too few
            aimed = replace(aimed, bits=aimed.bits - (found.bits - target.bits))

    def _may_have_missed(self, target: Target, found: CodedTrial, max_trials: int) -> bool:
        """Whether a better file may exist than the best of the search, which missed the target.

        On flat and tiny pictures R(index) is not monotone, and has leaps: then, or where the bits hardly differ, the
        ends of the range need not have the smallest and the largest file, as trials near the end may show.
        """
        if target.allows(found.bits) and target.distance(found.bits) < TARGET_TOLERANCE:
            return False
        measured = self.curve.measured
        if found.index in (MIN_INDEX, MAX_INDEX):
            others = [value for index, value in measured.items() if index != found.index]
            if any(abs(value / found.bits - 1) <= CLEARLY_APART for value in others):
                return True
            if max_trials > 1 or target.cap:
                for index in sorted(GRID.tolist(), key=lambda index: abs(index - found.index))[1:NEAR_AN_END]:
                    self.try_index(index)
        elif max_trials > 1 and target.distance(found.bits) > FAR_OFF:
            return True
        bits = [bits for _, bits in sorted(measured.items())]
        return sorted(bits) != bits

    def _search_everywhere(self, target: Target, best: CodedTrial) -> CodedTrial:
        """The best of a file and those at indexes all over the range. Raises UnreachableError as `meet`."""

        def rank(found: CodedTrial) -> tuple[bool, float]:
            allowed = target.allows(found.bits)
            return not allowed, target.distance(found.bits) if allowed else found.bits

        sizes = [best.bits]

        def try_file(index: float) -> None:
            nonlocal best
            found = self.image.write(self.try_index(index))
            sizes.append(found.bits)
            best = min(best, found, key=rank)

        for index in reversed(GRID.tolist()):  # of files of one size the best picture comes first
            try_file(index)
        for _ in range(EXTRA_TRIALS):  # between two of them, where the bits leap
            between = self.curve.solve(target.aim)
            if target.distance(best.bits) <= CLOSE or between in self.curve.measured:
                break
            try_file(between)
        self.reach = min(sizes), max(sizes)
        if not target.allows(best.bits):
            raise UnreachableError(best)
        return best

    def search(self, target: Target, max_trials: int = 3) -> TrialEncode:
        """As `meet`, by code lengths alone. Where every trial exceeds a cap, one more: at the index for which the curve
        predicts the fewest bits.

        Stops when a trial is closer than CLOSE. Earlier measurements are used.

        Args:
            max_trials: trials before the last one, the nearest of all being taken; where they are not CLOSE_ENOUGH
                there are up to EXTRA_TRIALS more, but with one trial only under a cap.
        """
        if max_trials < 1:
            raise ValueError(f"rate control needs at least one trial, not {max_trials}")
        best: TrialEncode | None = None
        tried: set[float] = set()
        aim = target.aim
        index = FIRST_TRIAL if self.curve is None else self.curve.solve(aim)
        while index not in tried:
            tried.add(index)
            trial = self.try_index(index)
            if target.allows(trial.bits) and (best is None or target.distance(trial.bits) < target.distance(best.bits)):
                best = trial
            distance = math.inf if best is None else target.distance(best.bits)
            used_up = len(tried) > max_trials
            one_pass = max_trials == 1 and not target.cap
            if distance < CLOSE or (used_up and (one_pass or distance < CLOSE_ENOUGH)):
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
