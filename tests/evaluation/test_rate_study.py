"""eval_vbr.py --rate-model, as a user runs it."""

import json

import pytest
from PIL import Image

import eval_vbr
from models import TCM_VBR
from tests.conftest import TINY
from utils.checkpoint import export_model


def test_the_rate_model_is_measured_and_drawn(quick, photos, tmp_path, capsys):
    picture, file = tmp_path / "rate.png", tmp_path / "rate.json"
    arguments = ["-d", str(photos / "p0.png"), str(photos / "p1.png"), "--checkpoint", quick]
    assert eval_vbr.main([*arguments, "--rate-model", str(picture), "--json", str(file)]) == 0
    output = capsys.readouterr().out
    assert "slope 4–5" in output and max(map(len, output.splitlines())) <= 100
    assert min(Image.open(picture).size) > 400
    found = json.loads(file.read_text())
    assert [len(image["bits"]) for image in found["images"]] == [21, 21]
    assert found["means"]["entropy"]["r2"] > 0.9  # m alone changes with the index of these weights


def test_a_rate_model_that_says_nothing(photos, tmp_path, capsys):
    """As at the start of training: m is one at every rate."""
    model = TCM_VBR(**TINY).eval()
    export_model(tmp_path / "new.pth.tar", model, [])
    picture, file = tmp_path / "rate.png", tmp_path / "rate.json"
    arguments = ["-d", str(photos / "p0.png"), "--checkpoint", str(tmp_path / "new.pth.tar")]
    arguments += ["--rate-model", str(picture), "--json", str(file)]
    assert eval_vbr.main(arguments) == 0
    assert "–" in capsys.readouterr().out
    assert json.loads(file.read_text())["means"]["paper"]["slope"] is None
    with pytest.raises(SystemExit):
        eval_vbr.main(["-d", str(photos / "p0.png"), "--rate-model", str(tmp_path / "rate.svg")])
    assert "rate.svg has another ending" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        eval_vbr.main([*arguments, "-l", "1"])
