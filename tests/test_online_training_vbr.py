"""online_training_vbr.py, and the targets of codec_vbr.py, as a user runs them."""

import json
import re

import pytest
from PIL import Image

import codec_vbr
import eval_vbr
import online_training_vbr
from models import TCM
from tests.conftest import TINY
from utils import cli
from utils.checkpoint import export_model


@pytest.fixture
def two(photos) -> list[str]:
    return [str(photos / "p0.png"), str(photos / "p1.png")]


def test_refining_at_an_index(quick, two, tmp_path, capsys):
    arguments = ["-l", "3", "-d", *two, "-t", "3", "--checkpoint", quick, "--out", str(tmp_path / "out"), "--cuda"]
    more = ["--save", str(tmp_path / "png"), "--json", str(tmp_path / "r.json"), "--log", str(tmp_path / "log")]
    assert online_training_vbr.main(arguments + more) == 0
    said = capsys.readouterr().out
    assert re.search(r"^image +index +bpp +PSNR", said) and "mean of 2" in said
    found = json.loads((tmp_path / "r.json").read_text())
    assert len(found["images"]) == 2 and len(found["images"][0]["steps"]) == 4
    assert found["results"]["loss"][0] < found["unrefined"]["results"]["loss"][0]
    # The files are what the table says, and decode to what was saved, with the decoder as it was.
    size = (tmp_path / "out" / "p0.png_index3.tvbr").stat().st_size
    assert found["images"][0]["bpp"] == pytest.approx(8 * size / (190 * 170))
    assert codec_vbr.main(["decode", str(tmp_path / "out"), str(tmp_path / "back"), "--checkpoint", quick]) == 0
    for name in ("p0.png_index3.png", "p1.png_index3.png"):
        assert Image.open(tmp_path / "back" / name).tobytes() == Image.open(tmp_path / "png" / name).tobytes()
    assert any((tmp_path / "log").iterdir())


def test_curves_have_a_bd_rate(quick, two, capsys):
    arguments = ["-l", "0", "1.5", "3", "4.5", "-d", two[0], "-t", "1"]
    assert online_training_vbr.main([*arguments, "--checkpoint", quick]) == 0
    assert "BD-" in capsys.readouterr().out


@pytest.mark.parametrize("steps", ["0", "2"])
def test_a_target_rate(quick, two, steps, tmp_path, capsys):
    options = ["-t", steps, "--checkpoint", quick, "--json", str(tmp_path / "r.json")]
    assert online_training_vbr.main(["-d", *two, "--target-bpp", "4.35", *options]) == 0
    said = capsys.readouterr().out
    assert "size against target: mean |error|" in said
    for image in json.loads((tmp_path / "r.json").read_text())["images"]:
        assert image["bpp"] == pytest.approx(4.35 * (1 + image["error"]))


def test_pictures_that_fail_are_named_and_the_others_go_on(quick, two, tmp_path, capsys):
    (tmp_path / "bad.png").write_bytes(b"no")
    arguments = ["-d", str(tmp_path / "bad.png"), *two, "-t", "0", "--checkpoint", quick]
    assert online_training_vbr.main([*arguments, "-l", "1"]) == 1
    said = capsys.readouterr()
    assert "bad.png: cannot be read as a picture" in said.err and "mean of 2" in said.out
    with pytest.raises(cli.UserError, match="none of the pictures"):
        online_training_vbr.main([*arguments, "--max-bytes", "60"])
    assert "p1.png: the smallest file of this picture has" in capsys.readouterr().err


def test_an_interrupted_run_leaves_the_results_of_the_pictures_before(quick, two, tmp_path, monkeypatch):
    real = online_training_vbr.code

    def interrupted(model, image_name, *args, **kwargs):
        if image_name == "p1.png":
            raise KeyboardInterrupt
        return real(model, image_name, *args, **kwargs)

    monkeypatch.setattr(online_training_vbr, "code", interrupted)
    with pytest.raises(KeyboardInterrupt):
        options = ["-t", "0", "--checkpoint", quick, "--json", str(tmp_path / "r.json")]
        online_training_vbr.main(["-d", *two, "-l", "1", "2", *options])
    found = json.loads((tmp_path / "r.json").read_text())
    assert [(row["image"], row["index"]) for row in found["images"]] == [("p0.png", 1), ("p0.png", 2)]


def test_codec_meets_targets(quick, two, tmp_path, capsys):
    file = tmp_path / "a.tvbr"
    options = ["--force", "--checkpoint", quick]
    codec_vbr.main(["encode", two[0], str(file), "-l", "2", *options])
    middle = file.stat().st_size
    bpp = 8 * middle / (190 * 170)
    for name, value in (("--target-bytes", middle), ("--target-bpp", bpp), ("--max-bytes", middle)):
        capsys.readouterr()
        assert codec_vbr.main(["encode", two[0], str(file), name, str(value), "--verify", *options]) == 0
        said = capsys.readouterr().err
        assert "off the target" in said and "verified" in said
        assert abs(file.stat().st_size / middle - 1) < 0.01
        assert name != "--max-bytes" or file.stat().st_size <= middle
    assert codec_vbr.main(["encode", two[0], str(file), "-t", "2", *options]) == 0
    assert "refined: +" in capsys.readouterr().err
    out = tmp_path / "folder"
    assert codec_vbr.main(["encode", *two, str(out), "--target-bytes", str(middle), "-t", "1", *options]) == 0
    assert len(list(out.iterdir())) == 2
    before = file.read_bytes()
    assert codec_vbr.main(["encode", two[0], str(file), "--max-bytes", "60", *options]) == 1
    assert "the smallest file of this picture has" in capsys.readouterr().err
    assert file.read_bytes() == before
    assert codec_vbr.main(["encode", two[0], str(file), "--target-bpp", "90", *options]) == 0
    assert "out of reach" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["-l", "1", "--target-bpp", "1"], "exclude each other"),
        (["--target-bpp", "1", "--max-bytes", "9"], "not allowed with"),
        (["--target-bpp", "-1"], "must be positive"),
        (["--max-bytes", "0"], "must be positive"),
        (["--target-bpp", "nan"], "must be positive"),
        (["-t", "-1"], "must be 0 or more"),
        (["--trials", "0", "--target-bpp", "1"], "at least 1"),
        (["--trials", "2", "-l", "1"], "--trials needs a target"),
        (["--method", "sgd", "-t", "0"], "--method needs -t"),
        (["-l", "7.1"], "index must lie in"),
        (["--step-size", "0"], "must be positive"),
        (["--step-size", "1", "-t", "0"], "needs -t"),
        (["--keep-rate", "--max-bytes", "9", "-t", "1"], "no target"),
    ],
)
@pytest.mark.parametrize("command", ["online", "codec"])
def test_impossible_arguments(command, arguments, text, capsys):
    with pytest.raises(SystemExit) as stopped:
        if command == "online":
            online_training_vbr.main(arguments)
        else:
            codec_vbr.main(["encode", "in", "out", *arguments])
    assert stopped.value.code == 2 and text in capsys.readouterr().err


def test_fixed_rate_weights_are_refused(two, tmp_path):
    export_model(tmp_path / "tcm.pth.tar", TCM(**TINY).eval(), [])
    fixed = ["--checkpoint", str(tmp_path / "tcm.pth.tar")]
    for main, arguments in (
        (online_training_vbr.main, ["-d", *two]),
        (codec_vbr.main, ["encode", two[0], str(tmp_path / "x"), "--target-bpp", "1"]),
        (eval_vbr.main, ["-d", *two, "--rate-model", str(tmp_path / "x.png")]),
    ):
        with pytest.raises(cli.UserError, match="variable-rate weights"):
            main([*arguments, *fixed])
