"""The scripts as a user runs them."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from compressai.utils.plot.__main__ import parse_json_file

import eval_vbr
import train_latent_e2e
import train_vbr
from models import TCM, DepthConv
from models.lambdas import LADDER
from tests.conftest import TINY, shake
from tests.depthconv import tiny as depthconv
from utils import cli
from utils.checkpoint import export_model
from utils.codec.request import EncodeRequest
from utils.evaluation import comparison
from utils.evaluation.evaluate import estimate, evaluate
from utils.evaluation.results import checkpoint_name
from utils.images import read_image

ROOT = Path(__file__).resolve().parent.parent


# eval_vbr.py ---------------------------------------------------------------------------------


def test_eval_measures_real_files(quick, photos, tmp_path, capsys):
    json_file, out = tmp_path / "rd.json", tmp_path / "out"
    arguments = ["-d", str(photos / "p0.png"), str(photos / "p1.png"), "-l", "0", "2.5", "--checkpoint", quick]
    assert eval_vbr.main([*arguments, "--real", "--per-image", "--json", str(json_file), "--save", str(out)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 100
    assert [line.split()[0] for line in lines[1:5]] == ["p0.png", "p0.png", "p1.png", "p1.png"]
    report = json.loads(json_file.read_text())
    assert set(report["results"]) == {
        *("bpp", "psnr-rgb", "ms-ssim-rgb", "encoding_time", "decoding_time", "index", "loss")
    }
    assert report["results"]["index"] == [0, 2.5]
    assert len(report["images"]) == 4
    assert parse_json_file(json_file, "psnr")["xs"] == report["results"]["bpp"]  # CompressAI's plots read it
    assert np.isfinite(parse_json_file(json_file, "ms-ssim")["ys"]).all()
    for position, index in enumerate((0, 2.5)):
        rows = [r for r in report["images"] if r["index"] == index]
        assert report["results"]["bpp"][position] == pytest.approx(np.mean([r["bpp"] for r in rows]))
    decoded = read_image(out / "p0.png_index2.5.png")
    mse = (decoded.double() - read_image(photos / "p0.png").double()).square().mean()
    assert 10 * np.log10(255**2 / float(mse)) == pytest.approx(report["images"][1]["psnr"])


def test_real_and_estimated_agree(tiny, photos):
    image = read_image(photos / "p0.png")
    real, decoded = evaluate(tiny, "p0", image, EncodeRequest(2.5), real=True)
    estimated, expected = evaluate(tiny, "p0", image, EncodeRequest(2.5), real=False)
    assert torch.equal(decoded, expected)
    assert real.bpp == pytest.approx(estimated.bpp, abs=16 * 8 / image[0].numel())  # the coder writes whole words
    assert real.psnr == estimated.psnr


@pytest.mark.parametrize("size", [(1, 1), (3, 130), (128, 128)])
def test_small_pictures_are_coded(tiny, size):
    image = torch.randint(0, 255, (3, *size), dtype=torch.uint8)
    result, decoded = evaluate(tiny, "small", image, EncodeRequest(0.5), real=True)
    assert decoded.shape == image.shape
    assert result.ms_ssim is None
    assert torch.equal(decoded, estimate(tiny, image, 0.5)[1])


def test_unreadable_pictures_are_named_and_the_status_tells(quick, photos, capsys):
    (photos / "p3.png").write_bytes(b"broken")
    assert eval_vbr.main(["-d", str(photos), "-l", "1", "--checkpoint", quick]) == 1
    output = capsys.readouterr()
    assert "p3.png" in output.err
    assert "mean of 7" in output.out


def test_a_picture_that_is_named_twice_is_measured_once(quick, photos, capsys):
    again = ["-d", str(photos), str(photos / "p1.png"), f"{photos}/../{photos.name}/p1.png"]
    assert eval_vbr.main([*again, "-l", "1", "--checkpoint", quick]) == 0
    assert "mean of 8" in capsys.readouterr().out


def test_what_was_measured_is_told_though_the_rest_is_not_waited_for(quick, photos, tmp_path, monkeypatch, capsys):
    both = ["--checkpoint", quick, str(shutil.copy(quick, tmp_path / "other.pth.tar"))]
    pictures = [str(photos / f"p{i}.png") for i in range(2)]
    measured = []

    def measure(model, name, *more, **options):
        measured.append(name)
        if len(measured) == 4:
            raise KeyboardInterrupt
        return evaluate(model, name, *more, **options)

    monkeypatch.setattr("utils.evaluation.evaluate.evaluate", measure)
    with pytest.raises(KeyboardInterrupt):
        eval_vbr.main(["-d", *pictures, "-l", "1", "--per-image", *both, "--json", str(tmp_path / "rd.json")])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "quick:" and [line.split()[0] for line in lines[2:4]] == ["p0.png", "p1.png"]
    assert any(line.startswith("mean of 2") for line in lines)
    assert lines[lines.index("other:") + 2].startswith("p0.png")  # by the second weights, before the interruption
    assert [row["image"] for row in json.loads((tmp_path / "rd.json").read_text())["images"]] == ["p0.png", "p1.png"]


def test_mean_loss_is_that_of_all_rates(quick, photos, tmp_path, capsys):
    arguments = ["-d", str(photos / "p0.png"), str(photos / "p1.png"), "--checkpoint", quick]
    assert eval_vbr.main([*arguments, "--json", str(tmp_path / "rd.json")]) == 0
    images = json.loads((tmp_path / "rd.json").read_text())["images"]
    losses = [
        LADDER[int(image["index"])] * 255**2 / 10 ** (image["psnr"] / 10) + image["bpp"] for image in images
    ]
    assert len(losses) == 12
    told = float(capsys.readouterr().out.split("mean R-D loss")[1].split(":")[1].split()[0])
    assert told == pytest.approx(sum(losses) / 12, rel=1e-3)
    eval_vbr.main([*arguments, "-l", "1"])
    assert "mean R-D loss" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("path", "name"),
    [("weights/tcm.pth.tar", "tcm"), ("0.05.pth.tar", "0.05"), ("a.safetensors", "a"), ("runs/b/model.pth.tar", "b")],
)
def test_curves_are_called_by_what_tells_weights_apart(path, name):
    assert checkpoint_name(path) == name


def test_a_fixed_rate_model_is_measured_once(photos, tmp_path, capsys):
    model = shake(TCM(**TINY))
    export_model(tmp_path / "tcm.pth.tar", model, [])
    arguments = ["-d", str(photos / "p0.png"), "--checkpoint", str(tmp_path / "tcm.pth.tar"), "--real"]
    assert eval_vbr.main(arguments) == 0
    assert capsys.readouterr().out.count("mean of 1") == 1
    with pytest.raises(cli.UserError, match="fixed-rate"):
        eval_vbr.main([*arguments, "-l", "1"])


def test_fixed_rate_models_are_one_curve_beside_a_variable_rate_one(quick, quick_model, photos, tmp_path, capsys):
    gains = 8, 1, 4, 2
    files = [str(tmp_path / f"{gain}.pth.tar") for gain in gains]
    weights = {name: value for name, value in quick_model.state_dict().items() if not name.startswith("modnet_")}
    for gain, file in zip(gains, files, strict=True):
        model = DepthConv(**depthconv.TINY)
        model.load_state_dict(weights)
        with torch.no_grad():
            model.g_a[3].weight *= gain  # the strided convolution
        export_model(file, model, [])
    arguments = ["-d", str(photos / "p0.png"), str(photos / "p1.png"), "--json", str(tmp_path / "rd.json")]
    assert eval_vbr.main([*arguments, "--checkpoint", quick, *files]) == 0
    whole = json.loads((tmp_path / "rd.json").read_text())
    (fixed,) = whole["compared"]
    assert [one["file"] for one in fixed["checkpoints"]] == [f"{gain}.pth.tar" for gain in sorted(gains)]
    assert whole["results"]["index"] == [0, 1, 2, 3, 4, 5] and "index" not in fixed["results"]
    bpp = fixed["results"]["bpp"]
    assert bpp == sorted(bpp) and [point.bpp for point in comparison.points(fixed)] == pytest.approx(bpp)
    assert "4 fixed-rate DepthConvs" in capsys.readouterr().out
    report = ["--report", str(tmp_path / "page"), "--checkpoint", *files, quick]
    assert eval_vbr.main(["-d", str(photos / "p0.png"), *report]) == 0
    page = (tmp_path / "page" / "index.html").read_text()
    assert "4 fixed-rate DepthConvs" in page and "; 8.pth.tar, fingerprint" in page and 'class="viewer"' not in page


def run(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=300)


def test_a_wrong_path_is_one_line_and_a_status():
    result = run("eval_vbr.py", "-d", "nowhere")
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1] == "error: nowhere: no such file or folder"
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("main", [eval_vbr.main, train_vbr.main, train_latent_e2e.main])
def test_help_tells_the_defaults(main, capsys):
    with pytest.raises(SystemExit) as leaving:
        main(["--help"])
    assert leaving.value.code == 0
    assert "(default: auto)" in re.sub(r"\s+", " ", capsys.readouterr().out)


def test_index_outside_is_refused(capsys):
    with pytest.raises(SystemExit):
        eval_vbr.main(["-l", "7.5"])
    assert "index must lie in [-2, 7]" in capsys.readouterr().err
