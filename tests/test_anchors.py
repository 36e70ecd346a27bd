"""Classical codecs beside ours: their sizes, and the loss that all are compared by."""

import io
import json

import numpy as np
import pytest
from PIL import Image

from utils import anchors, cli, rd_loss
from utils.ladder import LADDER


@pytest.fixture
def picture(tmp_path):
    random = np.random.default_rng(0)
    small = Image.fromarray(random.integers(0, 255, (12, 9, 3), dtype=np.uint8))
    small.resize((90, 120), Image.Resampling.BICUBIC).save(tmp_path / "picture.png")
    return tmp_path / "picture.png"


def test_sizes_and_errors_are_those_of_pillows_files(picture, tmp_path, capsys):
    assert anchors.main(["-d", str(picture), "--codecs", "jpeg", "--out", str(tmp_path / "out")]) == 0
    rows = json.loads((tmp_path / "out" / "jpeg.json").read_text())["images"]
    image = Image.open(picture)
    for row in rows:
        file = io.BytesIO()
        image.save(file, "JPEG", quality=int(row["index"]), optimize=True, subsampling="4:2:0")
        assert row["bpp"] == pytest.approx(8 * len(file.getvalue()) / (90 * 120))
        error = np.square(np.asarray(Image.open(file), float) - np.asarray(image, float)).mean()
        assert row["psnr"] == pytest.approx(10 * np.log10(255**2 / error))
    assert len(rows) == len({row["bpp"] for row in rows}) > 8


def test_a_codec_that_pillow_lacks_is_named_and_left_out(picture, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(anchors.features, "check", lambda name: False)
    anchors.main(["-d", str(picture), "--out", str(tmp_path / "out")])
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["jpeg.json"]
    assert "avif" in capsys.readouterr().err


def test_a_broken_picture_is_named_and_the_status_tells(picture, tmp_path, capsys):
    (tmp_path / "broken.png").write_bytes(b"no picture")
    assert anchors.main(["-d", str(tmp_path), "--codecs", "jpeg", "--out", str(tmp_path / "out")]) == 1
    assert "broken.png" in capsys.readouterr().err


def test_least_loss_takes_the_best_rate_for_each_lambda(tmp_path, capsys):
    # Two rates of two pictures: 1 bit at MSE 10 and 30, 2 bits at MSE 2 and a perfect copy.
    def psnr(error):
        return 10 * np.log10(255**2 / error)

    rows = [(0, 1.0, psnr(10)), (0, 1.0, psnr(30)), (5, 2.0, psnr(2)), (5, 2.0, None)]
    images = [{"index": index, "bpp": bpp, "psnr": value} for index, bpp, value in rows]
    file = tmp_path / "r.json"
    file.write_text(json.dumps({"name": "tcm", "images": images}))
    rd_loss.main([str(file), "--plot", str(tmp_path / "plot.png")])
    expected = [min(1 + 20 * lmbda, 2 + lmbda) for lmbda in LADDER]
    told = capsys.readouterr().out.splitlines()[-1].split()[1:]
    assert [float(value) for value in told] == pytest.approx([*expected, np.mean(expected)], abs=6e-4)
    assert Image.open(tmp_path / "plot.png").width > 300


@pytest.mark.parametrize("content", ["", "{}", '{"name": "x", "images": []}', '{"name": "x", "images": [{"bpp": 1}]}'])
def test_what_is_no_result_is_named(tmp_path, content):
    (tmp_path / "r.json").write_text(content)
    with pytest.raises(cli.UserError, match="r.json"):
        rd_loss.main([str(tmp_path / "r.json")])
