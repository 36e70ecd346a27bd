"""The choice of symbols for rate and distortion together."""

import pytest
import torch

from models import codec
from models.coding.portable import table_rows
from models.coding.slice_coders import ERROR_BITS, choose_symbols
from utils.checkpoint import load_model
from utils.codec.analyzed import AnalyzedImage
from utils.codec.decode import decode
from utils.codec.request import EncodeRequest
from utils.evaluation.evaluate import evaluate
from utils.files import BUNDLED
from utils.images import read_image
from utils.pictures import find_images_or_samples


@pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last])
def test_each_symbol_is_the_cheaper_of_two(tiny, format):
    torch.manual_seed(0)
    gaussian, tables = tiny.gaussian_conditional, tiny.coding_tables[0]
    sigma = (torch.rand(2, 4, 12, 12) * 3 - 2).exp()
    residual = (torch.randn(2, 4, 12, 12) * sigma * 1.5).contiguous(memory_format=format)
    chosen = choose_symbols(residual, sigma, gaussian, tables, ERROR_BITS)
    moved = 0
    for y, s, symbol in zip(residual.flatten(), sigma.flatten(), chosen.flatten(), strict=True):
        nearest = round(float(y))
        candidates = [nearest, nearest - (nearest > 0) + (nearest < 0)]
        index = table_rows(gaussian, s.view(1)).expand(2).contiguous()
        bits = tables.code_lengths(torch.tensor(candidates, dtype=torch.int32), index)
        costs = [float(b) + ERROR_BITS * (float(y) - n) ** 2 for n, b in zip(candidates, bits, strict=True)]
        assert costs[candidates.index(int(symbol))] <= min(costs) + 1e-3
        moved += int(symbol) != nearest
    assert moved > 5


def test_symbols_are_chosen_four_million_at_a_time(tiny, monkeypatch):
    """Whatever the size of the picture: the bits of both candidates are as large again."""
    seen = []

    def code_lengths(symbols, rows):
        seen.append(len(symbols))
        return torch.zeros(()).expand(len(symbols))

    monkeypatch.setattr(tiny.coding_tables[0], "code_lengths_within_reach", code_lengths)
    y = torch.zeros(2**22 + 1)
    choose_symbols(y, y, tiny.gaussian_conditional, tiny.coding_tables[0], ERROR_BITS)
    assert sum(seen) == 2 * len(y) and 2**21 < max(seen) <= 2**22


def test_symbols_that_are_not_numbers_are_refused_later(tiny):
    """As without the choice: `to_symbols` names them."""
    y = torch.full((1, 1, 4, 4), float("nan"))
    chosen = choose_symbols(y, torch.ones_like(y), tiny.gaussian_conditional, tiny.coding_tables[0], ERROR_BITS)
    assert chosen.isnan().all()


def test_the_strength_of_the_choice_is_the_best_of_its_half_and_four_times_it(monkeypatch):
    """With the shipped weights, on the middles of scikit-image's photographs; docs/method.md has it on more."""
    model = load_model(BUNDLED)
    photos = [read_image(path)[:, 20:276, 80:336] for path in find_images_or_samples(None)]

    def loss(strength: float) -> float:
        monkeypatch.setattr(codec, "ERROR_BITS", strength)
        return sum(evaluate(model, "", photo, EncodeRequest(2.0), real=False)[0].loss for photo in photos)

    best = loss(ERROR_BITS)
    assert best < 0.999 * loss(ERROR_BITS / 2) and best < 0.9995 * loss(4 * ERROR_BITS)


def test_a_lower_loss_than_that_of_the_nearest_symbols():
    """With the shipped weights, on a photograph, by real files."""
    model = load_model(BUNDLED)
    photo = read_image(find_images_or_samples(None)[1])[:, 20:276, 80:336]
    chosen, _ = evaluate(model, "cat", photo, EncodeRequest(1.0), real=True)
    nearest, _ = evaluate(model, "cat", photo, EncodeRequest(1.0, nearest=True), real=True)
    assert chosen.loss < nearest.loss and chosen.bpp < 0.97 * nearest.bpp
    analyzed = AnalyzedImage(model, photo)
    assert decode(model, analyzed.write(analyzed.quantize(1.0)).data).shape == photo.shape
