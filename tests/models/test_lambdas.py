import pytest
import torch

from models.lambdas import LADDER, LAST_INDEX, MAX_INDEX, MIN_INDEX, check_index, index_to_lambda, log_gain


def test_whole_indexes_are_the_published_ladder():
    assert LADDER == (0.0025, 0.0035, 0.0067, 0.0130, 0.0250, 0.05)
    assert [index_to_lambda(i) for i in range(6)] == pytest.approx(LADDER)
    assert index_to_lambda(torch.arange(6)).tolist() == pytest.approx(LADDER)


def test_between_them_lambda_is_geometric():
    assert index_to_lambda(1.5) == pytest.approx((0.0035 * 0.0067) ** 0.5)
    values = index_to_lambda(torch.linspace(0, 5, 101))
    assert (values.diff() > 0).all()


@pytest.mark.parametrize("index", [-2.1, 7.01, float("nan"), float("inf"), torch.tensor([0.0, 8.0])])
def test_index_outside(index):
    with pytest.raises(ValueError, match="index must lie"):
        check_index(index, 2)


def test_beyond_the_ladder_the_gain_is_the_root_of_lambda():
    index = torch.linspace(MIN_INDEX, MAX_INDEX, 37)
    wanted = 0.5 * (index_to_lambda(index) / index_to_lambda(index.clamp(0, LAST_INDEX))).log()
    assert torch.allclose(log_gain(index), wanted, atol=1e-6)
    assert (log_gain(index)[(index >= 0) & (index <= LAST_INDEX)] == 0).all()
    assert index_to_lambda(MAX_INDEX) == pytest.approx(0.2)
    assert index_to_lambda(MIN_INDEX) == pytest.approx(0.0025**3 / 0.0035**2)


def test_forms_of_an_index():
    assert check_index(3, 2).tolist() == [3, 3]
    assert check_index(torch.tensor(2.5), 1).tolist() == [2.5]
    assert check_index(torch.tensor([1, 2]), 2).tolist() == [1, 2]
    with pytest.raises(ValueError, match="3 indexes for 2 images"):
        check_index(torch.tensor([1, 2, 3]), 2)


def test_drawn_indexes_fill_the_range(tiny):
    torch.manual_seed(0)
    index = tiny.train().resolve_index(None, 2000)
    assert index.unique().tolist() == [0, 1, 2, 3, 4, 5]  # whole ones, as published; the trainer here passes its own
    assert index.long().bincount().min() > 250
