"""The R-λ model and its solver, on curves whose answer is known, and against bits that were counted."""

import math

import numpy as np
import pytest
import torch

from models.tcm import TCM_VBR
from tests.conftest import TINY
from utils.images import to_uint8
from utils.orders import Target
from utils.rate_control import MOST_MORE, START, Picture, Probe, Unreachable
from utils.rate_model import GRID, RateCurve, RateModel, entropy, sensitivity


def curve_of(shape, *probes) -> RateCurve:
    curve = RateCurve(shape)
    for index, bits in probes:
        curve.calibrate(index, bits)
    return curve


def test_one_probe_is_exact_where_the_slope_is_one():
    shape = 300 * np.sqrt(GRID)
    curve = curve_of(shape, (2.5, 5000.0))
    truth = 5000 + shape - np.interp(2.5, GRID, shape)
    assert np.allclose(curve.predict(GRID), truth)
    for index in (0.0, 0.1, 1.3, 4.9, 5.0):
        solution = curve.solve(float(np.interp(index, GRID, truth)))
        assert solution.index == pytest.approx(index, abs=1e-9) and solution.reachable


@pytest.mark.parametrize("slope", [0.4, 1.7])
def test_two_probes_find_a_slope_that_is_not_one(slope):
    shape = 300 * GRID**1.5
    truth = slope * shape + 900
    curve = curve_of(shape, (2.5, truth[25]), (4.0, truth[40]))
    assert np.allclose(curve.predict(GRID), truth)
    assert curve.solve(truth[7]).index == pytest.approx(0.7)


def test_probes_are_met_whatever_the_shape():
    truth = 1000 + 40 * GRID**3
    curve = curve_of(100 * GRID, *((i, float(np.interp(i, GRID, truth))) for i in (0.0, 2.5, 3.7, 5.0)))
    for index in (0.0, 2.5, 3.7, 5.0):
        assert curve.predict(index)[0] == pytest.approx(np.interp(index, GRID, truth))
        assert curve.solve(float(np.interp(index, GRID, truth))).index == pytest.approx(index)


def test_secant_steps_converge_on_a_curve_that_the_shape_does_not_have():
    def truth(index):
        return 1000 + 30 * index + 25 * index**2

    curve = curve_of(80 * GRID, (2.5, truth(2.5)))
    for _ in range(4):
        index = curve.solve(1200.0).index
        curve.calibrate(index, truth(index))
    assert truth(curve.solve(1200.0).index) == pytest.approx(1200, rel=1e-3)


def test_a_curve_that_is_not_monotone_says_so_and_gives_the_highest_index():
    shape = 100 * np.cos(GRID * 2 * math.pi / 5)  # falls, and rises again
    curve = curve_of(shape, (0.0, 1100.0))
    solution = curve.solve(1000.0)
    assert not curve.rises and solution.reachable
    assert solution.index == pytest.approx(3.75, abs=0.05)
    # Probes that contradict the shape are believed: along the index then.
    curve = curve_of(-100 * GRID, (1.0, 1000.0), (3.0, 1400.0))
    assert curve.solve(1200.0).index == pytest.approx(2.0)
    assert curve.solve(1600.0).index == pytest.approx(4.0)


@pytest.mark.parametrize(("bits", "index"), [(10.0, 0.0), (1e9, 5.0)])
def test_targets_out_of_reach_give_the_nearest_end(bits, index):
    solution = curve_of(100 * GRID, (2.5, 5000.0)).solve(bits)
    assert solution.index == index and not solution.reachable
    assert solution.bits == pytest.approx(5000 + 100 * (index - 2.5))


def test_a_level_curve_has_an_answer():
    curve = curve_of(np.zeros(51), (2.5, 700.0))
    assert curve.solve(700.0).index == 5.0 and not curve.rises
    curve.calibrate(4.0, 700.0)
    assert curve.predict(GRID).tolist() == [700.0] * 51
    assert not curve.solve(701.0).reachable


def test_a_curve_without_a_probe_is_refused():
    with pytest.raises(ValueError, match="calibrate the curve"):
        RateCurve(GRID).predict(1.0)


def test_entropy_and_its_sensitivity(tiny):
    assert entropy(50.0) == pytest.approx(math.log2(50 * math.sqrt(2 * math.pi * math.e)), abs=1e-3)
    assert entropy(0.11) < 1e-3
    slopes = sensitivity(tiny.gaussian_conditional)
    assert slopes.shape == (64,) and slopes.min() >= 0 and slopes.max() <= 1
    assert slopes[0] < 0.01 and slopes[-1] > 0.999  # dead latents have none; wide ones the paper's slope of one


def test_the_shape_is_the_sum_over_what_is_sensitive(tiny, image):
    with torch.no_grad():
        y = tiny.features(image)
        model = RateModel(tiny, y)
        scaled, log_m = tiny.analyze(image, torch.tensor([3.3]))
        assert torch.equal(model.scaled(3.3), scaled) and torch.equal(model.log_m(3.3), log_m)
        assert model.log2_m(3.3) == pytest.approx(float(log_m.double().sum()) / math.log(2))
        wide = torch.full(y.shape, 256.0)  # steps: the paper's formula
        curve = model.curve(wide)
        paper = [model.log2_m(index) for index in (0.0, 2.5, 5.0)]
        assert np.allclose(np.diff(curve.shape[[0, 25, 50]]), np.diff(paper), rtol=1e-3)
        assert not model.curve(torch.zeros_like(wide)).shape.any()  # nothing there: nothing to scale


@pytest.fixture(scope="module")
def picture(varied) -> Picture:
    """A tiny codec whose rates lie far apart, and a picture."""
    small = torch.rand(1, 3, 9, 15, generator=torch.Generator().manual_seed(4))
    image = torch.nn.functional.interpolate(small, (150, 260), mode="bicubic").clamp(0, 1)
    return Picture(varied, to_uint8(image[0]))


def test_bits_are_counted_as_they_are_coded(picture):
    for index in (0.0, 1.7, 5.0):
        probe = picture.quantise(index)
        predicted = probe.bits
        data = picture.code(probe)
        assert probe.bits == 8 * len(data)
        assert abs(predicted - probe.bits) <= 64


def test_escapes_are_counted(tiny, image):
    with torch.no_grad():
        y, _ = tiny.analyze(image, torch.tensor([2.0]))
        y[0, 3, 2:4] *= 300
        y[0, 40, 1] -= 7000
        quantised = tiny.quantise(y, tiny.h_a(y))
        coded = tiny.code(quantised)
    real = 8 * (len(coded["strings"][0][0]) + len(coded["strings"][1][0]) + len(coded["guards"][0].listed))
    assert abs(tiny.count_bits(quantised)[0] + 96 - real) <= 64


def reach(picture: Picture) -> tuple[int, int]:
    return tuple(8 * len(picture.code(picture.quantise(index))) for index in (0.0, 5.0))


def fresh(picture: Picture) -> Picture:
    """As if nothing had been measured."""
    picture.curve, picture.measured = None, 0
    return picture


def test_three_probes_meet_a_target(picture):
    low, high = reach(picture)
    assert high > 1.05 * low  # or there would be nothing to steer
    errors = []
    for share in (0.05, 0.3, 0.6, 0.95):
        target = Target(low + share * (high - low))
        _, data = fresh(picture).steer(target)
        errors.append(abs(8 * len(data) / target.bits - 1))
        assert picture.measured <= 4
        # A second time, what is known is made use of: the first index is as good as the best.
        _, again = picture.steer(target)
        assert abs(8 * len(again) / target.bits - 1) < 0.005
    assert sum(errors) / len(errors) < 0.005 and max(errors) < 0.01


@pytest.mark.parametrize("probes", [1, 3])
def test_a_cap_is_never_broken_and_nearly_used_up(picture, probes):
    low, high = reach(picture)
    for cap in range(low // 8, high // 8, 150):
        _, data = fresh(picture).steer(Target(8 * cap, cap=True), probes)
        assert 0 <= 1 - len(data) / cap < 0.01
        assert picture.measured <= probes + 1 + MOST_MORE + 1


def test_the_smallest_file_is_a_cap_that_can_be_met(picture):
    low, _ = reach(picture)
    probe, data = fresh(picture).steer(Target(low, cap=True))
    assert 8 * len(data) == low and probe.index == 0
    with pytest.raises(Unreachable, match=f"smallest file of this picture has {low // 8} bytes"):
        fresh(picture).steer(Target(low - 8, cap=True))


def test_targets_impossible_both_ways(picture):
    low, high = reach(picture)
    for target, nearest, index in (
        (Target(low / 2), low, 0.0),
        (Target(2 * high), high, 5.0),
        (Target(2 * high, cap=True), high, 5.0),
    ):
        for probes in (1, 3):
            probe, data = fresh(picture).steer(target, probes)
            assert probe.index == index and 8 * len(data) == nearest


class Bumpy(Picture):
    """A picture whose bits are those of a formula."""

    def __init__(self, bits) -> None:
        self.bits, self.measured, self.curve = bits, 0, None

    def measure(self, index):
        self.measured += 1
        self.curve = self.curve or RateCurve(2000 * GRID)
        self.curve.calibrate(index, self.bits(index))
        return Probe(index, None, self.bits(index))


@pytest.mark.parametrize("cap", [False, True])
def test_a_curve_with_bumps(cap):
    def bits(index):
        return 14000 + 3000 * index + 300 * index**2 + 60 * math.sin(40 * index)

    for goal in (15000, 19000, 25000, 35000):
        picture = Bumpy(bits)
        probe = picture.seek(Target(goal, cap))
        assert abs(probe.bits / goal - 1) < 0.01 and (not cap or probe.bits <= goal)
        assert picture.measured <= 4 + MOST_MORE * cap


def test_at_least_one_probe(picture):
    with pytest.raises(ValueError, match="a probe at least"):
        picture.seek(Target(1e4), 0)


def test_the_start_is_where_the_first_probe_is(picture):
    probe, _ = fresh(picture).steer(Target(picture.quantise(START).bits))
    assert probe.index == START and picture.measured == 1


def test_one_pixel():
    torch.manual_seed(0)
    model = TCM_VBR(**TINY).eval()
    model.update(force=True)
    picture = Picture(model, torch.full((3, 1, 1), 200, dtype=torch.uint8))
    _, data = picture.steer(Target(8.0))
    assert len(data) > 38
    assert len(picture.steer(Target(8.0 * len(data), cap=True))[1]) <= len(data)


def test_latents_are_moved_to_a_rate_by_the_index(varied, picture):
    """As refinement under a target ends: y of one index takes the m of another."""
    low, high = reach(picture)
    y = picture.rate_model.scaled(2.0) + 0.2  # some latents that no index gives
    z = varied.h_a(y).detach()
    bits = low + 0.7 * (high - low)
    start = picture._probe_of_latents(2.0, y, z)
    moved = picture._touch_up(2.0, y, z, bits)
    assert abs(moved.bits / bits - 1) < 2e-3 < abs(start.bits / bits - 1)
    assert moved.index != 2.0
