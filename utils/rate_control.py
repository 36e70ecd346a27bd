"""A file of the size that is asked for: the R-λ model, a few probes, one encode (TCSVT 2025).

A probe is h_a and the slice walk at an index, and the code lengths of its symbols: no analysis, synthesis or coding.
"""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from models.coding import Quantised
from models.tcm import TCM_VBR
from utils.bitstream import HEADER_BYTES
from utils.evaluation import to_file
from utils.images import pad, to_float
from utils.ladder import MAX_INDEX
from utils.lambdas import index_to_lambda
from utils.orders import BELOW, Refinement, Target
from utils.rate_model import RateCurve, RateModel
from utils.refine import TOLERANCE, Hold, Start, Step, refine

START = MAX_INDEX / 2  # where the first probe is
CODER_BITS = 96  # what both streams' final states and whole words add to the code lengths, give or take 32
CLOSE = 1e-3  # a probe that is so near to the target, relatively, is the last
NEAR = 7e-3  # how far off what is aimed at under a cap is good enough, relatively, when the probes are used up
MOST_MORE = 5  # probes beyond those allowed, under a cap that is exceeded or far off
MOST_MOVES = 5  # of refined latents to another index


class Unreachable(ValueError):
    """No file of this picture is as small as the cap; with the smallest, whose bits are its file's."""

    def __init__(self, smallest: "Probe") -> None:
        super().__init__(f"the smallest file of this picture has {smallest.bits / 8:.0f} bytes")
        self.smallest = smallest


@dataclass
class Probe:
    """A picture's symbols at an index, and the bits of their file: nearly, or exactly once it is there."""

    index: float
    quantised: Quantised
    bits: float


class Picture:
    """One picture, analysed once, at any rate.

    Args:
        image: uint8 `[3, H, W]` on the model's device.

    Attributes:
        curve: bits against the index, calibrated by what was measured; None before.
        measured: how often symbols were made to know their bits.
    """

    @torch.no_grad()
    def __init__(self, model: TCM_VBR, image: Tensor) -> None:
        self.model = model
        self.height, self.width = image.shape[1:]
        self.x = pad(to_float(image))
        self.rate_model = RateModel(model, model.features(self.x))
        self.curve: RateCurve | None = None
        self.measured = 0

    @torch.no_grad()
    def quantise(self, index: float) -> Probe:
        """The picture's symbols at an index."""
        y = self.rate_model.scaled(index)
        return self._probe_of_latents(index, y, self.model.h_a(y))

    def measure(self, index: float) -> Probe:
        """`quantise`, and calibrate the curve with it."""
        probe = self.quantise(index)
        self.measured += 1
        if self.curve is None:
            self.curve = self.rate_model.curve(probe.quantised.sigma)
        self.curve.calibrate(index, probe.bits)
        return probe

    def code(self, probe: Probe) -> bytes:
        """The file; `probe.bits` then are its own."""
        size = self.height, self.width
        data = to_file(self.model, size, probe.index, self.model.code(probe.quantised))
        probe.bits = 8.0 * len(data)
        return data

    def seek(self, target: Target, most_probes: int = 3) -> Probe:
        """The symbols whose file is nearest to a target, or to a little below a cap.

        Indices are tried until one is close, or so many have been and one more, the one to encode at; for a cap
        that is exceeded still, or far off, some further ones. What was measured before is made use of.

        Raises:
            Unreachable: the cap is below the smallest file.
        """
        if most_probes < 1:
            raise ValueError(f"rate control needs a probe at least, not {most_probes}")
        best: Probe | None = None
        tried: set[float] = set()
        goal = target.goal
        index = START if self.curve is None else self.curve.solve(goal).index
        while index not in tried:
            tried.add(index)
            probe = self.measure(index)
            if target.fits(probe.bits) and (best is None or target.miss(probe.bits) < target.miss(best.bits)):
                best = probe
            if best and target.miss(best.bits) < CLOSE:
                break
            if len(tried) > most_probes and (not target.cap or (best and target.miss(best.bits) < NEAR)):
                break
            if len(tried) > most_probes + MOST_MORE:
                break
            if best is None and len(tried) > most_probes:
                goal *= 1 - BELOW
            index = self.curve.solve(goal).index
        if best is None:
            best = self.measure(self.curve.solve(0).index)
            self.code(best)
            if not target.fits(best.bits):
                raise Unreachable(best)
        return best

    def steer(self, target: Target, most_probes: int = 3) -> tuple[Probe, bytes]:
        """`seek`, coded: what was found, and its file.

        Raises:
            Unreachable: the cap is below the smallest file.
        """
        probe = self.seek(target, most_probes)
        data = self.code(probe)
        if not target.fits(probe.bits):  # code lengths fell short of the coder by some bytes
            self.curve.calibrate(probe.index, probe.bits)
            return self.steer(replace(target, bits=target.bits - (probe.bits - target.bits)), most_probes)
        return probe, data

    def refine(
        self,
        probe: Probe,
        how: Refinement,
        target: Target | None = None,
        on_step: Callable[[Step], None] | None = None,
    ) -> tuple[list[tuple[Probe, Step]], list[Step]]:
        """DLM from a probe on; with a target, at its rate.

        Returns:
            What may be better than the probe, with the step that it comes from; and every step.
        """
        with torch.no_grad():
            y = self.rate_model.scaled(probe.index)
            z = self.model.h_a(y)
        size, pixels = (self.height, self.width), self.height * self.width
        lmbda = index_to_lambda(probe.index, self.model.metric)
        hold = None if target is None else self._hold(target, probe)
        refined = refine(self.model, Start(self.x, size, probe.index, lmbda, y, z, probe.bits), how, hold, on_step)
        found = []
        with contextlib.suppress(ValueError):  # latents that cannot be coded
            if refined.best.number:
                found.append((self._probe_of_latents(probe.index, *refined.latents), refined.best))
            if hold and hold.steered and abs(refined.steps[-1].bpp / hold.bpp - 1) > TOLERANCE:
                found.append((self._touch_up(probe.index, *refined.last, hold.bpp * pixels), refined.steps[-1]))
        return found, refined.steps

    def _hold(self, target: Target, probe: Probe) -> Hold:
        """A target in bits a pixel. Under a cap the aim is just below it, as files differ from what is counted on the
        way by some bytes; and nothing is steered where the largest file is far below."""
        pixels = self.height * self.width
        if not target.cap:
            return Hold(target.bits / pixels)
        slack = probe.index == MAX_INDEX and probe.bits < target.bits * (1 - 3 * NEAR)
        return Hold(target.bits * (1 - 1.5 * TOLERANCE) / pixels, target.bits / pixels, not slack)

    def _touch_up(self, index: float, y: Tensor, z: Tensor, bits: float) -> Probe:
        """Refined latents of an index, moved to the index nearby where they have so many bits: y takes its m."""
        best = self._probe_of_latents(index, y, z)
        curve = self.rate_model.curve(best.quantised.sigma)
        curve.calibrate(index, best.bits)
        base = self.rate_model.log_m(index)
        for _ in range(MOST_MOVES):
            moved = curve.solve(bits).index
            if moved in curve.probes or abs(best.bits / bits - 1) < CLOSE:
                break
            probe = self._probe_of_latents(moved, y * (self.rate_model.log_m(moved) - base).exp(), z)
            curve.calibrate(moved, probe.bits)
            best = min(best, probe, key=lambda p: abs(p.bits - bits))
        return best

    @torch.no_grad()
    def _probe_of_latents(self, index: float, y: Tensor, z: Tensor) -> Probe:
        quantised = self.model.quantise(y, z)
        return Probe(index, quantised, 8 * HEADER_BYTES + CODER_BITS + self.model.count_bits(quantised)[0])
