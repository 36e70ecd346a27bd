"""A file of the size that is asked for: the R-λ model, a few trial encodes, one file (TCSVT 2025).

A trial encode is `h_a`, the slices, and the code lengths of the symbols: no analysis, synthesis or entropy coding.
"""

from dataclasses import replace

from models.lambdas import MAX_INDEX
from utils.codec.analyzed import AnalyzedImage, TrialEncode
from utils.codec.rate_model import RateCurve
from utils.codec.request import CAP_MARGIN, Target

FIRST_INDEX = MAX_INDEX / 2  # of the first trial
CLOSE = 1e-3  # a trial this near to the target, relatively, is the last
CLOSE_TO_CAP = 7e-3  # how near to the aim under a cap is good enough, relatively, when the trials are used up
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
    """

    def __init__(self, image: AnalyzedImage) -> None:
        self.image = image
        self.curve: RateCurve | None = None
        self.trials = 0

    def encode(self, target: Target, max_trials: int = 3) -> tuple[TrialEncode, bytes]:
        """The trial whose file is nearest to a target, or to a little below a cap, and that file.

        Raises:
            UnreachableError: the cap is below the smallest file.
        """
        trial = self.search(target, max_trials)
        data = self.image.write(trial)
        if not target.allows(trial.bits):  # the code lengths were some bytes too few
            self.curve.calibrate(trial.index, trial.bits)
            return self.encode(replace(target, bits=target.bits - (trial.bits - target.bits)), max_trials)
        return trial, data

    def search(self, target: Target, max_trials: int = 3) -> TrialEncode:
        """As `encode`, by code lengths alone.

        Indexes are tried until one is close, or max_trials have been tried and one more, the one to encode at; for a
        cap that is still exceeded, or far off, a few further ones. Earlier calls' measurements are used.
        """
        if max_trials < 1:
            raise ValueError(f"rate control needs at least one trial, not {max_trials}")
        best: TrialEncode | None = None
        tried: set[float] = set()
        aim = target.aim
        index = FIRST_INDEX if self.curve is None else self.curve.solve(aim).index
        while index not in tried:
            tried.add(index)
            trial = self.try_index(index)
            if target.allows(trial.bits) and (best is None or target.distance(trial.bits) < target.distance(best.bits)):
                best = trial
            if best and target.distance(best.bits) < CLOSE:
                break
            if len(tried) > max_trials and (not target.cap or (best and target.distance(best.bits) < CLOSE_TO_CAP)):
                break
            if len(tried) > max_trials + EXTRA_TRIALS:
                break
            if best is None and len(tried) > max_trials:
                aim *= 1 - CAP_MARGIN
            index = self.curve.solve(aim).index
        if best is None:
            best = self.try_index(self.curve.solve(0).index)
            self.image.write(best)
            if not target.allows(best.bits):
                raise UnreachableError(best)
        return best

    def try_index(self, index: float) -> TrialEncode:
        """A trial encode at an index, which calibrates the curve."""
        trial = self.image.quantize(index)
        self.trials += 1
        if self.curve is None:
            self.curve = self.image.rate_model.curve(trial.quantized.sigma)
        self.curve.calibrate(index, trial.bits)
        return trial
