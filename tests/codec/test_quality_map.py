"""Several qualities in one picture: the map, its place in the file, rate control and refinement with it."""

import argparse
import json
import math
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image

import codec_vbr
import eval_vbr
from models.coding.side_info import SideInfo
from models.lambdas import index_to_lambda
from utils.checkpoint import load_model
from utils.cli.encoding_arguments import map_of_arguments
from utils.codec.analyzed import AnalyzedImage
from utils.codec.bitstream import BitstreamError, CodedImage, pack, unpack
from utils.codec.decode import decode
from utils.codec.encode import encode
from utils.codec.quality_map import QualityMap, index_of_places, psnr_by_region, read_region, region_of_boxes
from utils.codec.rate_control import RateController
from utils.codec.request import EncodeRequest, RefinementSettings, Target
from utils.images import crop, to_uint8
from utils.metrics import mse
from utils.pictures import ImageError

HEIGHT, WIDTH = 300, 400  # padded to 384×512: 42 above, 56 to the left


@pytest.fixture(scope="module")
def picture() -> torch.Tensor:
    small = torch.rand(1, 3, 20, 30, generator=torch.Generator().manual_seed(4))
    return to_uint8(torch.nn.functional.interpolate(small, (HEIGHT, WIDTH), mode="bicubic")[0].clamp(0, 1))


@pytest.fixture
def mask() -> np.ndarray:
    mask = np.zeros((HEIGHT, WIDTH), np.float32)
    mask[22:150, 8:136] = 1  # cells 1 and 2 in both directions, exactly
    return mask


def test_cells_have_the_index_of_the_largest_share_of_their_pixels(mask):
    mask[299, 399] = 0.5  # gray: half way between, in the last cell that the picture reaches
    found = QualityMap.from_region(mask, index=4.0)
    offsets = np.frombuffer(found.cell_offsets(1.0), np.int8).reshape(6, 8)
    expected = np.zeros((6, 8))
    expected[1:3, 1:3], expected[5, 7] = 48, 24
    assert (offsets == expected).all()
    index = index_of_places(1.0, offsets.tobytes(), (6, 8))
    assert index.shape == (1, 1, 24, 32) and index[0, 0, 4:12, 4:12].unique().tolist() == [4]
    assert index[0, 0, :4].unique().tolist() == [1]


@pytest.mark.parametrize("rate", [{"index": 7.0}, {"index": -2.0}, {"index": 3.0}, {"above": 4.0}, {"above": -3.0}])
def test_no_index_leaves_its_range(mask, rate):
    found = QualityMap.from_region(mask, **rate)
    for base in np.linspace(-2, 7, 301):
        indexes = np.float64(np.float32(base)) + found.offsets(base) / 16
        assert (indexes >= -2).all() and (indexes <= 7).all()
        wanted = rate.get("index", np.clip(base + rate.get("above", 0), -2, 7))
        wanted = np.clip(wanted, base - 127 / 16, base + 127 / 16)  # as far as a byte reaches
        assert abs(indexes[found.weights == 1] - wanted).max() <= 1 / 16


def test_a_mask_of_255_is_not_taken_for_one_of_1(mask):
    with pytest.raises(ValueError, match=r"in \[0, 1\], not 0 to 255"):
        QualityMap.from_region(255 * mask, index=3.0)


def test_a_gray_mask_has_a_region_too(mask):
    found = QualityMap.from_region(0.4 * mask, index=5.0)
    assert (found.region == (mask > 0)).all() and found.indexes(0.0).tolist() == [0, 2]


def test_a_map_belongs_to_one_size_and_has_one_index(varied, picture, mask):
    with pytest.raises(ValueError, match="another size"):
        encode(varied, picture[:, :200], EncodeRequest(1.0, quality_map=QualityMap.from_region(mask, index=4.0)))
    for rate in ({}, {"index": 4.0, "above": 1.0}):
        with pytest.raises(ValueError, match="exactly one of them"):
            QualityMap.from_region(mask, **rate)
    for rate in ({"index": 7.5}, {"index": -3.0}, {"above": math.inf}):
        with pytest.raises(ValueError, match="a region's index must lie in|above must be a finite"):
            QualityMap.from_region(mask, **rate)


def test_a_box_lies_in_its_picture():
    assert region_of_boxes([(1, 0, 2, 1)], 2, 3).tolist() == [[0, 1, 1], [0, 0, 0]]
    for box in ((-1, 0, 2, 1), (0, 0, 0, 1), (2, 0, 2, 1), (0, 1, 1, 2)):
        with pytest.raises(ValueError, match="does not lie within the picture, 3×2"):
            region_of_boxes([box], 2, 3)


def test_a_mask_may_be_as_large_as_its_picture(mask, tmp_path, monkeypatch):
    monkeypatch.setattr("utils.codec.quality_map.MAX_PIXELS", 100)
    Image.fromarray((255 * mask).astype(np.uint8)).save(tmp_path / "mask.png")
    args = argparse.Namespace(region=tmp_path / "mask.png", roi=None, region_index=4.0, region_weight=None)
    assert map_of_arguments(args, HEIGHT, WIDTH).region.shape == (HEIGHT, WIDTH)
    with pytest.raises(ImageError, match="is more than"):
        map_of_arguments(args, 10, 10)


@pytest.mark.parametrize("value", [0.0, 1.0, 0.4])
def test_a_mask_of_one_value_tells_nothing_apart(value):
    with pytest.raises(ValueError, match=r"the mask (is empty|has one value)"):
        QualityMap.from_region(np.full((HEIGHT, WIDTH), value), index=4.0)


@pytest.mark.parametrize("mode", ["L", "I;16", "I"])
def test_labels_are_stretched_and_said(mode, tmp_path, capsys):
    """Masks of segmentation programs have the numbers 0 and 1, which look black."""
    labels = np.zeros((64, 96), {"L": np.uint8, "I;16": np.uint16, "I": np.int32}[mode])
    labels[10:30, 20:50] = 1
    file = str(tmp_path / ("mask.tif" if mode == "I" else "mask.png"))
    Image.fromarray(labels).save(file)
    if mode == "I":  # integers of 32 bits have no known range
        with pytest.raises(ImageError, match="range is not known"):
            read_region(file, 64, 96)
        return
    assert np.array_equal(read_region(file, 64, 96), labels.astype(np.float32))
    assert "brightest value is 1, a label rather than white" in capsys.readouterr().err


def test_small_and_large_labels_of_16_bits_both_count(tmp_path, capsys):
    """In 8 bits 100 is black and 300 is one."""
    labels = np.zeros((64, 96), np.uint16)
    labels[:20], labels[40:] = 100, 300
    Image.fromarray(labels).save(tmp_path / "mask.png")
    assert read_region(str(tmp_path / "mask.png"), 64, 96) == pytest.approx(labels / 300)
    assert "brightest value is 300, a label" in capsys.readouterr().err
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    Image.fromarray(20 * labels).save(tmp_path / "turned.png", exif=exif)
    found = read_region(str(tmp_path / "turned.png"), 96, 64)
    assert found == pytest.approx(np.rot90(labels / 300, -1), abs=0.03)  # as its 8 bits say, upright


def test_masks_that_may_mean_something_else_are_noted(tmp_path, capsys):
    pixels = np.zeros((64, 96, 4), np.uint8)
    pixels[10:30, 20:50] = 200, 100, 0, 255
    Image.fromarray(pixels).save(tmp_path / "cutout.png")
    mask = read_region(str(tmp_path / "cutout.png"), 64, 96)
    assert mask.max() == pytest.approx(100 / 255) and mask[0, 0] == 0
    told = capsys.readouterr().err
    assert "has colors" in told and "transparent pixels are put on black" in told and "100 of 255" in told
    Image.fromarray(pixels[..., 3]).save(tmp_path / "plain.png")
    assert read_region(str(tmp_path / "plain.png"), 64, 96).max() == 1 and not capsys.readouterr().err


def test_a_map_of_one_index_is_that_index(varied, picture):
    x = torch.rand(1, 3, 128, 256, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected, found = varied(x, 1.5), varied(x, torch.full((1, 1, 8, 16), 1.5))
    assert torch.allclose(found["x_hat"], expected["x_hat"], atol=1e-5)
    assert torch.allclose(found["latent"], expected["latent"], rtol=1e-5)
    places = torch.full((1, 1, 8, 16), 1.5)
    coded = varied.compress(x, places)
    decoded = varied.decompress(coded["strings"], coded["shape"], places)["x_hat"]
    assert torch.allclose(decoded, expected["x_hat"].clamp(0, 1), atol=1e-5)


def test_places_have_the_scale_of_their_index(varied):
    y = torch.randn(1, varied.M, 8, 8)
    places = torch.full((1, 1, 8, 8), 1.0)
    places[..., 4:] = 4.0
    with torch.no_grad():
        indexes = places, torch.tensor([1.0]), torch.tensor([4.0])
        mixed, low, high = (varied.modulate(y, index)[1] for index in indexes)
    assert torch.allclose(mixed[..., :4], low[..., :4], atol=1e-6)
    assert torch.allclose(mixed[..., 4:], high[..., 4:], atol=1e-6)


@pytest.mark.parametrize("index", [[[[8.0]]], [[[float("nan")]]], torch.zeros(1, 2, 8, 8), torch.zeros(3, 1, 8, 8)])
def test_wrong_maps_are_refused_by_the_model(varied, index):
    with pytest.raises(ValueError):
        varied(torch.zeros(1, 3, 128, 128), torch.as_tensor(index))


def test_a_file_with_a_map_decodes_to_what_the_encoder_saw(varied, picture, mask):
    """And a picture without one costs no byte."""
    request = EncodeRequest(1.0, quality_map=QualityMap.from_region(mask, index=4.0))
    result = encode(varied, picture, request)
    analyzed = AnalyzedImage(varied, picture, request.quality_map)
    with torch.no_grad():
        y_hat = analyzed.quantize(1.0, complete=True).quantized.y_hat
        x_hat = varied.synthesize(y_hat, analyzed.rate_model.index_of_places(1.0))
    seen = to_uint8(crop(x_hat.clamp(0, 1), HEIGHT, WIDTH)[0])
    decoded = decode(varied, result.data)
    assert (decoded.int() - seen.int()).abs().max() <= 1
    coded = unpack(result.data)
    assert len(coded.offsets) == 48 and coded.index == 1
    plain = unpack(encode(varied, picture, EncodeRequest(1.0)).data)
    assert plain.offsets == b"" and len(pack(plain)) == 38 + len(plain.z) + len(plain.y) + len(plain.side_info.scales)
    low, high = (decode(varied, encode(varied, picture, EncodeRequest(index)).data) for index in (1.0, 4.0))
    for other, cells in ((high, np.s_[:, 60:120, 40:100]), (low, np.s_[:, 250:, 300:])):
        assert (decoded[cells].int() - other[cells].int()).abs().float().mean() < 3


def mapped(offsets: bytes, index: float = 1.0) -> CodedImage:
    coded = {"y": b"yyyy", "z": b"zz", "fingerprint": b"weights!"}
    return CodedImage(WIDTH, HEIGHT, index, **coded, side_info=SideInfo(b"list", 7), offsets=offsets)


def test_bad_maps_are_one_line_each():
    fine = bytes([0] * 47 + [64])
    assert unpack(pack(mapped(fine))).offsets == fine
    for wrong in (fine[:-1], fine + b"\0", bytes(100_000)):  # too few, too many, a bomb
        with pytest.raises(BitstreamError, match="does not fit the picture"):
            unpack(pack(mapped(wrong)))
    for value, told in ((97, "7.0625"), (-49, "-2.0625"), (-128, "-7")):
        with pytest.raises(BitstreamError, match=f"a rate index of {told} in its map"):
            unpack(pack(mapped(bytes([0] * 47 + [value % 256]))))


def test_damaged_maps_are_refused_whatever_their_bytes():
    random = np.random.default_rng(0)
    data = pack(mapped(bytes(random.integers(0, 48, 48, dtype=np.uint8))))
    refused = 0
    for _ in range(300):
        damaged = bytearray(data)
        for position in random.integers(38, len(data) - 10, 2):
            damaged[position] = random.integers(256)
        damaged[34:38] = struct.pack("<I", zlib.crc32(bytes(damaged[38:]), zlib.crc32(bytes(damaged[:34]))))
        try:
            found = unpack(bytes(damaged))
            assert len(found.offsets) == 48
        except BitstreamError:
            refused += 1
    assert refused > 250


@pytest.mark.parametrize("rate", [{"index": 4.5}, {"above": 2.0}])
def test_targets_are_met_with_a_map(varied, picture, mask, rate):
    analyzed = AnalyzedImage(varied, picture, QualityMap.from_region(mask, **rate))
    low, high = (analyzed.write(analyzed.quantize(index)).bits for index in (0.0, 5.0))
    for share in (0.2, 0.5, 0.8):
        target = Target(low + share * (high - low))
        found = RateController(analyzed).meet(target)
        assert found.bits == pytest.approx(target.bits, rel=0.01)
        region = found.index + analyzed.quality_map.offsets(found.index)[-1] / 16
        assert region == pytest.approx(rate.get("index", min(7, found.index + 2)), abs=1 / 16)


def test_the_rate_model_follows_a_map(varied, picture, mask):
    """Its shape is the sum of the entropies at all places, as without a map where both regions have one index."""
    same = AnalyzedImage(varied, picture, QualityMap.from_region(mask, above=1e-9)).rate_model
    plain = AnalyzedImage(varied, picture).rate_model
    rows = torch.randint(40, plain.y.shape, generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    assert np.allclose(same.curve(2.0, rows).shape, plain.curve(2.0, rows).shape, rtol=1e-4)
    kept = AnalyzedImage(varied, picture, QualityMap.from_region(mask, index=2.5)).rate_model
    rise, less = (np.ptp(model.curve(2.0, rows).shape) for model in (plain, kept))
    assert 0.8 * rise < less < 0.97 * rise  # of 48 cells four are kept


def test_refinement_weighs_errors_by_the_map(varied, picture, mask):
    quality_map = QualityMap.from_region(mask, index=4.0)
    analyzed = AnalyzedImage(varied, picture, quality_map)
    weights = analyzed.distortion_weights(1.0)
    assert weights.shape == (1, 1, HEIGHT, WIDTH)
    assert weights[0, 0, 100, 60] == pytest.approx(index_to_lambda(4.0) / index_to_lambda(1.0))
    assert weights[0, 0, 0, 0] == pytest.approx(1)
    result = encode(varied, picture, EncodeRequest(1.0, refinement=RefinementSettings(3), quality_map=quality_map))
    refinement = result.refinement
    decoded = decode(varied, refinement.before.data)
    assert refinement.before.distortion == pytest.approx(mse(picture, decoded, weights[0]))
    assert refinement.chosen and refinement.loss_change < 0
    assert unpack(result.data).offsets


def test_quality_inside_and_outside():
    region = np.zeros((4, 4), bool)
    region[:2] = True
    image = torch.zeros(3, 4, 4, dtype=torch.uint8)
    decoded = image.clone()
    decoded[:, :2], decoded[:, 2:] = 1, 10
    for mask in (region, region.astype(np.uint8), region.astype(np.int64), region.astype(np.float32), 255 * region):
        assert psnr_by_region(image, decoded, mask) == pytest.approx((48.13, 28.13), abs=0.01)


def test_a_region_of_any_kind_is_the_same_map():
    region = np.zeros((128, 128), bool)
    region[:64] = True
    first, *others = (QualityMap.from_region(kind, index=4) for kind in (
        region, region.astype(np.uint8), region.astype(np.float64), torch.from_numpy(region),
    ))  # fmt: skip
    for other in others:
        assert np.array_equal(first.weights, other.weights) and np.array_equal(first.cells, other.cells)


@pytest.mark.parametrize(("base", "above", "missed"), [
    (2.0, 3, None), (5.5, 3, (8.5, 7.0)), (7.0, 1, (8.0, 7.0)), (-1.0, -3, (-4.0, -2.0)),
])  # fmt: skip
def test_a_region_beyond_the_range_is_told(base, above, missed):
    region = np.zeros((128, 128), bool)
    region[:64] = True
    assert QualityMap.from_region(region, above=above).missed(base) == missed
    assert QualityMap.from_region(region, index=4).missed(base) is None
    assert QualityMap.from_region(region / 2, index=6).missed(-2.0) is None  # the mask asks for half of the way
    assert QualityMap.from_region(region, index=7).missed(-2.0) == (7, -2 + 127 / 16)


# codec_vbr.py ---------------------------------------------------------------------------------


@pytest.fixture
def call(quick, picture, tmp_path):
    """Encode the picture with arguments; returns the status and the file."""
    Image.fromarray(picture.permute(1, 2, 0).numpy()).save(tmp_path / "p.png")

    def encode(*more) -> tuple[int, bytes]:
        file = tmp_path / "p.tvbr"
        arguments = ["encode", tmp_path / "p.png", file, "--checkpoint", quick, "--force", *more]
        status = codec_vbr.main(list(map(str, arguments)))
        return status, file.read_bytes() if file.exists() else b""

    return encode


def test_masks_and_boxes_on_the_command_line(call, mask, tmp_path, capsys):
    Image.fromarray((255 * mask).astype(np.uint8)).save(tmp_path / "mask.png")
    rates = ("-l", 1, "--mask-index", 4, "--verify")
    status, by_mask = call("--mask", tmp_path / "mask.png", *rates)
    assert status == 0 and "dB inside" in capsys.readouterr().err
    call("--roi", "8,22,128,128", "-l", 6.5, "--mask-weight", 2)
    assert "the region was to have index 8.5; the nearest that this file can hold is 7" in capsys.readouterr().err
    assert call("--roi", "8,22,128,128", *rates) == (0, by_mask)
    (tmp_path / "p.tvbr").write_bytes(by_mask)
    assert codec_vbr.main(["info", str(tmp_path / "p.tvbr")]) == 0
    assert "a map of 1 to 4 that differs from it in 8% of the picture" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["--roi", "8,22,128,128"], "needs --mask or --roi, and --mask-index or --mask-weight"),
        (["--mask-index", "4"], "needs --mask or --roi, and --mask-index or --mask-weight"),
        (["--roi", "8,22,128,128", "--mask-index", "8"], "must lie in"),
        (["--roi", "8,22,128", "--mask-index", "4"], "--roi"),
        (["--roi", "8,22,128,0", "--mask-index", "4"], "--roi"),
        (["--roi", "8,22,8,8", "--mask-index", "4", "--mask-weight", "1"], "not allowed"),
    ],
)
def test_wrong_arguments_are_refused(call, more, told, capsys):
    with pytest.raises(SystemExit):
        call("-l", 1, *more)
    assert told in capsys.readouterr().err


def test_masks_that_do_not_fit_are_one_line_each(call, tmp_path, capsys):
    size = HEIGHT, WIDTH
    for name, pixels in (("small", np.eye(100)), ("empty", np.zeros(size)), ("full", np.ones(size))):
        Image.fromarray((255 * pixels).astype(np.uint8)).save(tmp_path / f"{name}.png")
    told = {"small": "100×100 pixels, the picture 400×300", "empty": "empty", "full": "one value", "none": "none.png"}
    for name, text in told.items():
        assert call("-l", 1, "--mask", tmp_path / f"{name}.png", "--mask-index", 4) == (1, b"")
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
        assert len(lines) == 1 and text in lines[0]
    assert call("-l", 1, "--roi", "350,0,100,100", "--mask-index", 4) == (1, b"")
    assert "does not lie within the picture" in capsys.readouterr().err


def test_evaluation_tells_the_quality_of_the_region(quick, picture, tmp_path, capsys):
    Image.fromarray(picture.permute(1, 2, 0).numpy()).save(tmp_path / "p.png")
    arguments = ["-d", str(tmp_path / "p.png"), "--checkpoint", quick, "-l", "1", "--json"]
    eval_vbr.main([*arguments, str(tmp_path / "r.json"), "--roi", "8,22,128,128", "--mask-index", "4"])
    assert "inside dB" in capsys.readouterr().out
    (row,) = json.loads((tmp_path / "r.json").read_text())["images"]
    mask = np.zeros((HEIGHT, WIDTH), np.float32)
    mask[22:150, 8:136] = 1
    quality_map = QualityMap.from_region(mask, index=4.0)
    model = load_model(quick)
    decoded = decode(model, encode(model, picture, EncodeRequest(1.0, quality_map=quality_map)).data)
    expected = psnr_by_region(picture, decoded, quality_map.region)
    assert (row["psnr_inside"], row["psnr_outside"]) == pytest.approx(expected) and row["loss"] is None
