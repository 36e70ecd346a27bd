"""The R-λ model and its solver, on curves whose answer is known, and against bits that were counted."""

import math

import numpy as np
import pytest
import torch

from utils.codec.rate_model import GRID, EntropyTable, RateCurve, RateModel, entropy


def curve_of(shape, *measured) -> RateCurve:
    curve = RateCurve(shape)
    for index, bits in measured:
        curve.calibrate(index, bits)
    return curve


def test_one_measurement_is_exact_where_the_slope_is_one():
    shape = 300 * np.sqrt(GRID - GRID[0])
    curve = curve_of(shape, (2.5, 5000.0))
    truth = 5000 + shape - np.interp(2.5, GRID, shape)
    assert np.allclose(curve.predict(GRID), truth)
    for index in (0.0, 0.1, 1.3, 4.9, 5.0):
        assert curve.solve(float(np.interp(index, GRID, truth))) == pytest.approx(index, abs=1e-9)


@pytest.mark.parametrize("slope", [0.4, 1.7])
def test_two_measurements_find_a_slope_that_is_not_one(slope):
    shape = 300 * (GRID - GRID[0]) ** 1.5
    truth = slope * shape + 900
    curve = curve_of(shape, (2.5, truth[GRID == 2.5][0]), (4.0, truth[GRID == 4][0]))
    assert np.allclose(curve.predict(GRID), truth)
    assert curve.solve(truth[GRID == 0.75][0]) == pytest.approx(0.75)


def test_beyond_the_measurements_slopes_are_bounded_and_of_near_ones_not_believed():
    steep = curve_of(100 * GRID, (2.0, 1000.0), (3.0, 3000.0))  # twenty times as steep as the shape
    assert 3000 + 2 * 200 < steep.predict(5.0)[0] < 3000 + 4 * 200  # three times at most
    level = curve_of(100 * GRID, (2.0, 1000.0), (3.0, 1001.0))
    assert 1000 - 200 / 2 < level.predict(0.0)[0] < 1000 - 200 / 4  # a third at least: TCM small has 0.50
    near = curve_of(100 * GRID, (2.0, 1000.0), (2.06, 1100.0))
    assert near.predict([0.0, 5.0]).tolist() == pytest.approx([1000 - 200, 1100 + 294])
    apart = curve_of(100 * GRID, (2.0, 1000.0), (2.15, 1030.0))  # twice as steep
    assert apart.predict([0.0, 5.0]).tolist() == pytest.approx([1000 - 400, 1030 + 570])


def test_measurements_are_met_whatever_the_shape():
    truth = 1000 + 40 * GRID**3
    curve = curve_of(100 * GRID, *((i, float(np.interp(i, GRID, truth))) for i in (0.0, 2.5, 3.7, 5.0)))
    for index in (0.0, 2.5, 3.7, 5.0):
        assert curve.predict(index)[0] == pytest.approx(np.interp(index, GRID, truth))
        assert curve.solve(float(np.interp(index, GRID, truth))) == pytest.approx(index)


def test_secant_steps_converge_on_a_curve_that_the_shape_does_not_have():
    def truth(index):
        return 1000 + 30 * index + 25 * index**2

    curve = curve_of(80 * GRID, (2.5, truth(2.5)))
    for _ in range(4):
        index = curve.solve(1200.0)
        curve.calibrate(index, truth(index))
    assert truth(curve.solve(1200.0)) == pytest.approx(1200, rel=1e-3)


def test_a_curve_that_is_not_monotone_gives_the_highest_index():
    shape = 100 * np.cos((GRID + 2) * 2 * math.pi / 9)  # falls, and rises again
    curve = curve_of(shape, (-2.0, 1100.0))
    assert curve.solve(1000.0) == pytest.approx(4.75, abs=0.05)
    # Measurements that contradict the shape are believed: the curve is then linear in the index.
    curve = curve_of(-100 * GRID, (1.0, 1000.0), (3.0, 1400.0))
    assert curve.solve(1200.0) == pytest.approx(2.0)
    assert curve.solve(1600.0) == pytest.approx(4.0)


@pytest.mark.parametrize(("bits", "index"), [(10.0, -2.0), (1e9, 7.0)])
def test_targets_out_of_reach_give_the_nearest_end(bits, index):
    curve = curve_of(100 * GRID, (2.5, 5000.0))
    assert curve.solve(bits) == index
    assert curve.predict(index)[0] == pytest.approx(5000 + 100 * (index - 2.5))


def test_a_level_curve_has_an_answer():
    curve = curve_of(np.zeros(len(GRID)), (2.5, 700.0))
    assert curve.solve(700.0) == 7.0
    curve.calibrate(4.0, 700.0)
    assert curve.predict(GRID).tolist() == [700.0] * len(GRID)
    assert curve.solve(701.0) == -2.0  # all are equally near


def test_a_curve_without_a_measurement_is_refused():
    with pytest.raises(ValueError, match="calibrate the curve"):
        RateCurve(GRID).predict(1.0)


def test_entropies(tiny):
    assert entropy(50.0) == pytest.approx(math.log2(50 * math.sqrt(2 * math.pi * math.e)), abs=1e-3)
    assert entropy(0.11) < 1e-3
    sigma = tiny.gaussian_conditional.scale_table
    wide = torch.cat((sigma * math.exp(-3.03), sigma, sigma * math.exp(3.03)))
    expected = [entropy(s) for s in wide.tolist()]
    assert EntropyTable(sigma)(wide.log()).tolist() == pytest.approx(expected, abs=5e-3)


def test_the_shape_is_the_sum_of_the_entropies(tiny, image):
    with torch.no_grad():
        y = tiny.features(image)
        model = RateModel(tiny, y)
        scaled, log_m = tiny.analyze(image, torch.tensor([3.3]))
        ((rows, found),) = model.log_m(3.3)
        assert torch.equal(model.scaled(3.3), scaled) and torch.equal(found, log_m) and rows == slice(0, y.shape[2])
        assert model.log2_m(3.3) == pytest.approx(float(log_m.double().sum()) / math.log(2))
        wide = torch.full(y.shape, 63, dtype=torch.uint8)  # σ of 256 steps: the paper's formula
        curve = model.curve(2.0, wide)
        ends = [float(GRID[0]), 0.0, 2.5, 5.0, float(GRID[-1])]
        paper = [model.log2_m(index) for index in ends]
        assert np.allclose(np.diff(curve.shape_at(ends)), np.diff(paper), atol=0.2)
        assert not model.curve(2.0, torch.zeros_like(wide)).shape.any()  # nothing there: nothing to scale
        rows = torch.randint(64, wide.shape, generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
        curve, sigma = model.curve(2.0, rows), tiny.gaussian_conditional.scale_table[rows.int()]
        ((_, before),), ((_, after),) = model.log_m(2.0), model.log_m(5.0)
        scaled = (sigma * (after - before).exp())[rows > 0]
        assert curve.shape_at(5.0) == pytest.approx(sum(map(entropy, scaled.tolist())), rel=1e-3)
