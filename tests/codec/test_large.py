"""Pictures that are computed in bands and tiles; here small ones, with the limits moved."""

import numpy as np
import pytest
import torch
from pytorch_msssim import ms_ssim

from models import codec
from models.coding import slice_coders, tables
from models.large import bands
from utils import metrics
from utils.codec import tiles
from utils.codec.analyzed import AnalyzedImage
from utils.codec.decode import decode
from utils.codec.encode import encode
from utils.codec.quality_map import QualityMap
from utils.codec.refinement import CURVATURES, UNITS, _differentiate, _training_latents
from utils.codec.request import EncodeRequest, RefinementSettings
from utils.codec.tiles import cut_tiles
from utils.evaluation.evaluate import evaluate
from utils.images import crop, join_bands, pad, padded_bands, to_float, to_uint8
from utils.metrics import ms_ssim_value, mse


@pytest.fixture(scope="module")
def tall() -> torch.Tensor:
    """A smooth picture of odd sides, 768×256 after padding."""
    small = torch.rand(1, 3, 20, 6, generator=torch.Generator().manual_seed(3))
    x = torch.nn.functional.interpolate(small, (701, 187), mode="bicubic").clamp(0, 1)
    return to_uint8(x[0])


@pytest.fixture
def in_parts(monkeypatch):
    """Everything that is done in parts of large pictures is done so here."""

    def move() -> None:
        for module, name, value in (
            (bands, "WHOLE", 256 * 256), (bands, "BAND", 128 * 256), (bands, "MIN_HEIGHT", 128),
            (bands, "LATENTS", 256), (codec, "KEPT", 256), (tables, "PART", 1000), (slice_coders, "AT_ONCE", 2**14),
            (metrics, "AT_ONCE", 10000),
        ):
            monkeypatch.setattr(module, name, value)

    return move


def test_padding_in_bands(tall):
    for rows in (128, 256, 768):
        parts = list(padded_bands(tall, rows))
        assert torch.equal(torch.cat(parts, 2), pad(to_float(tall)))
        extended = torch.cat(list(padded_bands(tall, rows, extend=True)), 2)
        assert torch.equal(extended, torch.cat(list(padded_bands(tall, 10**6, extend=True)), 2))
        assert torch.equal(join_bands(parts, 701, 187), tall)
        assert torch.equal(join_bands((part for whole in parts for part in whole.split(5, 2)), 701, 187), tall)
    small = tall[:, :1, :1]
    for extend in (False, True):
        assert torch.equal(join_bands(padded_bands(small, 128, extend), 1, 1), small)
    assert torch.equal(crop(pad(to_float(small)), 1, 1), to_float(small))


@pytest.mark.parametrize("request_", [EncodeRequest(2.0), EncodeRequest(bytes=1500)], ids=["index", "target"])
def test_a_picture_in_parts_is_the_same_picture(varied, tall, in_parts, request_):
    whole = encode(varied, tall, request_)
    at_once = decode(varied, whole.data)
    in_parts()
    assert len(list(padded_bands(tall, varied.band_height(256, 768)))) == 6
    assert ((decode(varied, whole.data).int() - at_once.int()).abs() <= 1).all()  # x̂ to a rounding
    parts = encode(varied, tall, request_)
    assert len(parts.data) == pytest.approx(len(whole.data), abs=8)
    assert parts.index == pytest.approx(whole.index, abs=1e-3)
    assert mse(tall, decode(varied, parts.data)) == pytest.approx(mse(tall, at_once), rel=1e-3)
    estimated, real = (evaluate(varied, "tall", tall, EncodeRequest(2.0), real)[0] for real in (False, True))
    assert estimated.psnr == pytest.approx(real.psnr, abs=0.01)


def test_the_bands_of_a_picture_are_watched(quick_model, tall, in_parts):
    """As a progress bar does."""
    seen = []

    def watch(bands, rows):
        passed = list(bands)
        seen.append((rows, sum(band.shape[2] for band in passed), len(passed) > 4))
        return iter(passed)

    in_parts()
    data = encode(quick_model, tall, EncodeRequest(2.0), watch=watch).data
    assert torch.equal(decode(quick_model, data, watch=watch), decode(quick_model, data))
    assert seen == [(768, 768, True)] * 2


def test_a_map_in_parts(varied, tall, in_parts):
    mask = np.zeros(tall.shape[1:], np.float32)
    mask[200:500, 60:] = 1
    request = EncodeRequest(1.0, quality_map=QualityMap.from_region(mask, index=4.0))
    whole, target = encode(varied, tall, request), EncodeRequest(bytes=1800, quality_map=request.quality_map)
    expected, solved = decode(varied, whole.data), encode(varied, tall, target)
    in_parts()
    assert mse(decode(varied, encode(varied, tall, request).data), expected) < 0.05
    assert encode(varied, tall, target).index == pytest.approx(solved.index, abs=2e-3)


def test_symbols_in_parts_make_the_same_file(tiny, tall, monkeypatch):
    """Networks at once, symbols in parts: to the byte."""
    analyzed = AnalyzedImage(tiny, tall)
    whole = analyzed.quantize(2.0)
    data = analyzed.write(whole).data
    expected = decode(tiny, data)
    monkeypatch.setattr(tables, "PART", 777)
    monkeypatch.setattr(slice_coders, "AT_ONCE", 2**14)
    assert whole.quantized.y[0].numel() > 2**14 and whole.quantized.y.dtype.itemsize < 4
    parts = analyzed.quantize(2.0)
    assert analyzed.write(parts).data == data and parts.bits == whole.bits
    assert torch.equal(parts.quantized.rows, whole.quantized.rows)
    assert torch.equal(decode(tiny, data), expected)


def test_metrics_in_parts(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    for height, width in ((163, 175), (200, 161), (257, 190)):
        a = torch.randint(256, (3, height, width), generator=generator, dtype=torch.uint8)
        b = (a.int() + torch.randint(-20, 20, a.shape, generator=generator)).clamp(0, 255).byte()
        weights = torch.rand(1, height, width, generator=generator)
        expected = mse(a, b), mse(a, b, weights), float(ms_ssim(a[None].float(), b[None].float(), data_range=255))
        assert expected[0] == float((a.double() - b.double()).square().mean())
        for at_once in (1, 3000, 40000):
            monkeypatch.setattr(metrics, "AT_ONCE", at_once)
            assert mse(a, b) == expected[0] and mse(a, b, weights) == pytest.approx(expected[1], rel=1e-6)
            assert ms_ssim_value(a, b) == pytest.approx(expected[2], abs=2e-6)
        monkeypatch.undo()


def test_tiles_are_the_picture(monkeypatch):
    for height, width in ((701, 187), (1, 1), (130, 900)):
        assert len(cut_tiles(height, width)) == 1
        monkeypatch.setattr(tiles, "WHOLE", 0)
        monkeypatch.setattr(tiles, "SIDE", 256)
        found = cut_tiles(height, width)
        picture = torch.arange(height * width).view(1, height, width)
        padded = torch.stack([pad(picture[None].float() + 1)[0, 0]])[None]
        seen = torch.zeros_like(picture)
        for tile in found:
            seen[tile.picture] += 1
            assert torch.equal(tile.inside(padded[tile.outer(1)])[0], picture[tile.picture] + 1.0)
            assert tile.pixels == picture[tile.picture].numel()
        assert (seen == 1).all() and sum(tile.pixels for tile in found) == height * width
        for unit in UNITS:  # and the latents are shared out
            places = torch.zeros_like(padded[..., ::unit, ::unit])
            for tile in found:
                places[tile.outer(unit)][tile.core(unit)] += 1
            assert (places == 1).all()
        monkeypatch.undo()


@pytest.mark.parametrize("height, width", [(1365, 2048), (4000, 6000), (1025, 16000), (2300, 2300)])
def test_tiles_are_as_large_as_two_megapixels_allow(height, width):
    """docs/rate_control.md: up to 1024×1024 pixels, and 128 more on every side that is not one of the picture."""
    found = cut_tiles(height, width)
    padded = [len(range(0, side, 128)) * 128 for side in (height, width)]
    assert max(len(side) for tile in found for side in tile.sides) <= 1024
    assert max(tile.outer_pixels for tile in found) <= 2**21
    assert sum(tile.outer_pixels for tile in found) < 2 * height * width  # no more than once again
    for tile in found:
        for part, outer, length in zip(tile.sides, tile.outer_sides, padded, strict=True):
            assert outer.start % 128 == outer.stop % 128 == 0
            assert outer.start < part.start or part.start == 0
            assert outer.stop > part.stop or part.stop == length


@pytest.fixture
def in_tiles(monkeypatch):
    monkeypatch.setattr(tiles, "WHOLE", 0)
    monkeypatch.setattr(tiles, "SIDE", 256)


def gradients(
    model, picture: torch.Tensor, quality_map: QualityMap | None, curvatures: tuple[float, float] | None
) -> tuple[list[torch.Tensor], list[float]]:
    """Gradients of y and z, and bits, MSE and D."""
    image = AnalyzedImage(model, picture, quality_map)
    latents = image.latents(2.0)
    for latent in latents:
        latent.grad = torch.zeros_like(latent)
    sums = [0.0, 0.0, 0.0]
    with _training_latents(model, 0):
        for tile in cut_tiles(image.height, image.width):
            found = _differentiate(image, tile, 2.0, latents, rate_weight=1.0, curvatures=curvatures)
            sums = [total + value for total, value in zip(sums, found, strict=True)]
    return [latent.grad for latent in latents], sums


@pytest.mark.parametrize("curvatures", [None, CURVATURES])
@pytest.mark.parametrize("metric, with_map", [("mse", False), ("mse", True), ("ms-ssim", False)])
def test_the_gradient_of_tiles_is_that_of_the_picture(
    varied, tall, in_tiles, monkeypatch, metric, with_map, curvatures
):
    picture = torch.cat((tall[:, 100:460], tall[:, 340:].flip(2)[:, :360]), 2)  # two columns of tiles, and two rows
    if metric == "ms-ssim":  # needs larger tiles
        picture = tall
        monkeypatch.setattr(tiles, "SIDE", 384)
    mask = np.zeros(picture.shape[1:], np.float32)
    mask[100:200, 150:260] = 1
    quality_map = QualityMap.from_region(mask, index=4.0) if with_map else None
    monkeypatch.setattr(varied, "metric", metric)
    assert len(cut_tiles(*picture.shape[1:])) == (4 if metric == "mse" else 2)
    in_parts = gradients(varied, picture, quality_map, curvatures)
    monkeypatch.setattr(tiles, "WHOLE", 2**21)
    whole = gradients(varied, picture, quality_map, curvatures)
    alike = 0.98 if metric == "mse" else 0.85  # MS-SSIM of tiles is another one
    for one, other in zip(in_parts[0], whole[0], strict=True):
        assert torch.nn.functional.cosine_similarity(one.flatten(), other.flatten(), 0) > alike
    assert in_parts[1] == pytest.approx(whole[1], rel=0.02 if metric == "mse" else 0.2)


def test_tiles_are_refined(varied, tall, in_tiles):
    """At the rate of the file before: to less distortion, and what the steps say is what files have."""
    result = encode(varied, tall, EncodeRequest(2.0, refinement=RefinementSettings(3), keep_rate=True))
    before, after, steps = result.refinement.before, result.refinement.after, result.refinement.steps
    assert result.refinement.chosen and after.distortion < before.distortion
    assert after.bpp == pytest.approx(before.bpp, rel=6e-3)
    assert steps[0].mse == pytest.approx(before.distortion, rel=0.03) and steps[0].bpp == pytest.approx(before.bpp)
