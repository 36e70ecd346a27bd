"""The picture of a run's validations."""

import json
from pathlib import Path

import numpy as np
import pytest
from matplotlib.axes import Axes

from utils.pictures import read_pixels
from utils.training.curves import draw_curves


def rows(number: int, rates: int) -> list[dict]:
    """Validations that get better, as lines of validation.jsonl have them."""
    return [
        {"step": 100 * i, "minutes": 15.0 * i, "bpp": [0.3 * (r + 1) for r in range(rates)],
         "psnr": [30.0 + r + 0.1 * i for r in range(rates)], "loss": 1.6 - 0.01 * i}
        for i in range(1, number + 1)
    ]  # fmt: skip


@pytest.fixture
def drawn(tmp_path, monkeypatch):
    """Draws lines, and returns the x and y of what was plotted."""
    found: list[tuple[list, list]] = []
    plot = Axes.plot

    def recorded(axes, x, y, *more, **style):
        found.append((list(x), list(y)))
        return plot(axes, x, y, *more, **style)

    monkeypatch.setattr(Axes, "plot", recorded)

    def draw(lines: list[dict | str]) -> list[tuple[list, list]]:
        path = tmp_path / "validation.jsonl"
        path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
        draw_curves(path, picture_of(tmp_path))
        return found

    return draw


def picture_of(folder: Path) -> Path:
    return folder / "curves.png"


@pytest.mark.parametrize(("number", "rates"), [(1, 6), (4, 6), (3, 1)])
def test_every_validation_is_drawn(drawn, tmp_path, number, rates):
    made = rows(number, rates)
    *points, losses = drawn(made)
    assert points == [(row["bpp"], row["psnr"]) for row in made]
    assert losses == ([row["minutes"] for row in made], [row["loss"] for row in made])
    pixels = read_pixels(picture_of(tmp_path))
    assert pixels.shape[1] > 1000 and np.ptp(pixels) == 255


def test_what_is_not_finite_or_missing_is_left_out(drawn):
    """The toy experiment's lines may lack bpp and PSNR; lines of before have Infinity, and now null."""
    made = rows(4, 2)
    made[0]["psnr"][0], made[1]["psnr"][1], made[1]["loss"] = float("inf"), None, float("nan")
    del made[2]["psnr"], made[2]["bpp"]
    *points, losses = drawn([*made, '{"step": 500, "minut', "[]", '{"step": 600}'])
    assert points == [([0.6], [31.1]), ([0.3], [30.2]), ([], []), ([0.3, 0.6], [30.4, 31.4])]
    assert losses == ([15, 45, 60], [made[0]["loss"], made[2]["loss"], made[3]["loss"]])


def test_validations_without_numbers_make_a_picture_and_none_make_none(drawn, tmp_path):
    drawn(["torn"])
    assert not picture_of(tmp_path).exists()
    drawn([{"step": 1, "minutes": 0.0}])
    assert picture_of(tmp_path).exists()
