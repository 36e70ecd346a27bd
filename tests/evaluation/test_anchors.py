import io
import json

import numpy as np
import pytest
from PIL import Image

from utils.evaluation import anchors


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
