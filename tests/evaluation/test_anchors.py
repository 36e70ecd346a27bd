import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import eval_vbr
from utils.distributed import DistContext
from utils.evaluation import anchors
from utils.images import to_pixels, to_tensor

ALONE = DistContext(torch.device("cpu"))


def measure(paths: list[Path]) -> tuple[list[dict], int]:
    return anchors.measure_all(["jpeg"], {path: path.name for path in paths}, ALONE)


@pytest.fixture
def picture(tmp_path):
    random = np.random.default_rng(0)
    small = Image.fromarray(random.integers(0, 255, (12, 9, 3), dtype=np.uint8))
    small.resize((90, 120), Image.Resampling.BICUBIC).save(tmp_path / "picture.png")
    return tmp_path / "picture.png"


def test_sizes_and_errors_are_those_of_pillows_files(picture):
    (codec,), failed = measure([picture])
    assert not failed
    image = Image.open(picture)
    for row in codec["images"]:
        file = io.BytesIO()
        image.save(file, "JPEG", quality=int(row["index"]), optimize=True, subsampling="4:2:0")
        assert row["bpp"] == pytest.approx(8 * len(file.getvalue()) / (90 * 120))
        error = np.square(np.asarray(Image.open(file), float) - np.asarray(image, float)).mean()
        assert row["psnr"] == pytest.approx(10 * np.log10(255**2 / error))
    assert len(codec["images"]) == len(codec["results"]["bpp"]) == len({row["bpp"] for row in codec["images"]}) > 8


@pytest.mark.parametrize("name", anchors.CODECS)
def test_qualities_go_from_few_bits_to_many(name, picture):
    if not anchors.available([name]):
        pytest.skip(f"this Pillow has no {name}")
    image = to_tensor(np.array(Image.open(picture).resize((360, 480))))
    codec = anchors.CODECS[name]
    low, _ = anchors.measure("picture", image, codec, codec.qualities[0])
    high, decoded = anchors.measure("picture", image, codec, codec.qualities[-1])
    assert low.bpp < high.bpp and low.psnr < high.psnr > 35 and low.ms_ssim < high.ms_ssim
    assert np.abs(to_pixels(decoded).astype(float) - to_pixels(image)).mean() < 4
    assert min(low.encode_seconds, low.decode_seconds) > 0


def test_a_picture_that_a_codec_cannot_code_is_named_and_the_others_measured(picture, tmp_path, capsys, monkeypatch):
    """A side of a JPEG has at most 65,500 pixels. And a curve leaves out a rate at which every picture failed."""
    Image.new("RGB", (2, 65501)).save(tmp_path / "long.png")
    (codec,), failed = measure([picture, tmp_path / "long.png"])
    assert failed == 1
    assert {row["image"] for row in codec["images"]} == {"picture.png"}
    assert "long.png: JPEG 4:2:0: " in capsys.readouterr().err
    assert measure([tmp_path / "long.png"]) == ([], 1) and "left out of all" not in capsys.readouterr().err
    real = anchors.file_of

    def fails(image, codec, quality):
        if quality == 10:
            raise ValueError("no room")
        return real(image, codec, quality)

    monkeypatch.setattr(anchors, "file_of", fails)
    (codec,), failed = measure([picture])
    assert failed == 1
    rates = codec["results"]["bpp"]
    assert "left out of all" not in capsys.readouterr().err
    assert len(rates) == len(anchors.CODECS["jpeg"].qualities) - 1 and None not in rates


def test_a_picture_that_fails_at_one_rate_is_in_no_mean(picture, tmp_path, capsys, monkeypatch):
    """Or the points of a curve would be of different pictures."""
    real = anchors.file_of

    def fails(image, codec, quality):
        if quality == 10 and image.shape[1] == 90:
            raise ValueError("no room")
        return real(image, codec, quality)

    monkeypatch.setattr(anchors, "file_of", fails)
    Image.open(picture).transpose(Image.Transpose.ROTATE_90).save(tmp_path / "other.png")
    (codec,), failed = measure([picture, tmp_path / "other.png"])
    told = capsys.readouterr().err
    assert failed == 1 and {row["image"] for row in codec["images"]} == {"picture.png"}
    assert "other.png: no room" in told and "JPEG 4:2:0: 1 of 2 pictures failed at some of the rates" in told
    assert len(codec["results"]["bpp"]) == len(anchors.CODECS["jpeg"].qualities)


def test_a_picture_that_the_first_codec_cannot_read_is_named_once(quick, picture, tmp_path, capsys):
    """And is no picture of the others."""
    (tmp_path / "broken.png").write_bytes(b"")
    pictures = [str(picture), str(tmp_path / "broken.png")]
    assert eval_vbr.main(["-d", *pictures, "-l", "1", "--checkpoint", quick, "--anchors", "jpeg"]) == 1
    told = capsys.readouterr()
    assert told.err.count("broken.png") == 1 and "other pictures" not in told.err + told.out


def test_the_scripts_choices_are_the_codecs():
    assert tuple(anchors.CODECS) == eval_vbr.ANCHORS


def test_a_codec_that_pillow_lacks_is_named_and_left_out(monkeypatch, capsys):
    monkeypatch.setattr(anchors.features, "check", lambda name: False)
    monkeypatch.delitem(anchors.Image.SAVE, "JXL", raising=False)
    monkeypatch.setattr(anchors.importlib, "import_module", lambda name: None)
    assert anchors.available(["avif", "jpeg", "jpegxl", "jpeg"]) == ["jpeg"]
    told = capsys.readouterr().err
    assert "AVIF" in told and "pillow-jxl-plugin" in told
