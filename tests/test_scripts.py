"""The scripts as a user runs them."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from compressai.utils.plot.__main__ import parse_json_file
from PIL import Image

import eval_vbr
import train_vbr
from models.tcm import TCM
from tests.conftest import TINY, shake
from utils import benchmark, cli
from utils.checkpoint import export_model, load_model, read_checkpoint
from utils.crops import Crops
from utils.evaluation import estimate, evaluate
from utils.images import read_image
from utils.training import Progress, Settings, learning_rate

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def checkpoint(tiny, tmp_path) -> str:
    export_model(tmp_path / "tiny.pth.tar", tiny, [])
    return str(tmp_path / "tiny.pth.tar")


@pytest.fixture
def photos(tmp_path) -> Path:
    """Eight smooth pictures of odd sizes."""
    random = np.random.default_rng(0)
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(8):
        small = Image.fromarray(random.integers(0, 255, (6, 7, 3), dtype=np.uint8))
        small.resize((190 + i, 170 + i), Image.Resampling.BICUBIC).save(folder / f"p{i}.png")
    return folder


# eval_vbr.py ---------------------------------------------------------------------------------


def test_eval_measures_real_files(checkpoint, photos, tmp_path, capsys):
    json_file, out = tmp_path / "rd.json", tmp_path / "out"
    arguments = ["-d", str(photos / "p0.png"), str(photos / "p1.png"), "-l", "0", "2.5", "--checkpoint", checkpoint]
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
    real, decoded = evaluate(tiny, "p0", image, 2.5, real=True)
    estimated, expected = evaluate(tiny, "p0", image, 2.5, real=False)
    assert torch.equal(decoded, expected)
    assert real.bpp == pytest.approx(estimated.bpp, rel=0.05)  # tiny streams: header and last words weigh
    assert real.psnr == estimated.psnr


@pytest.mark.parametrize("size", [(1, 1), (3, 130), (128, 128)])
def test_small_pictures_are_coded(tiny, size):
    image = torch.randint(0, 255, (3, *size), dtype=torch.uint8)
    result, decoded = evaluate(tiny, "small", image, 0.5, real=True)
    assert decoded.shape == image.shape
    assert result.ms_ssim is None
    assert torch.equal(decoded, estimate(tiny, image, 0.5)[1])


def test_unreadable_pictures_are_named_and_the_status_tells(checkpoint, photos, capsys):
    (photos / "p3.png").write_bytes(b"broken")
    assert eval_vbr.main(["-d", str(photos), "-l", "1", "--checkpoint", checkpoint]) == 1
    output = capsys.readouterr()
    assert "p3.png" in output.err
    assert "mean of 7" in output.out


def test_a_fixed_rate_model_is_measured_once(photos, tmp_path, capsys):
    model = shake(TCM(**TINY))
    export_model(tmp_path / "tcm.pth.tar", model, [])
    arguments = ["-d", str(photos / "p0.png"), "--checkpoint", str(tmp_path / "tcm.pth.tar"), "--real"]
    assert eval_vbr.main(arguments) == 0
    assert capsys.readouterr().out.count("mean of 1") == 1
    with pytest.raises(cli.UserError, match="fixed-rate"):
        eval_vbr.main([*arguments, "-l", "1"])


def run(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=300)


def test_a_wrong_path_is_one_line_and_a_status():
    result = run("eval_vbr.py", "-d", "nowhere")
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1] == "error: nowhere: no such file or folder"
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("main", [eval_vbr.main, train_vbr.main, benchmark.main])
def test_help_tells_the_defaults(main, capsys):
    with pytest.raises(SystemExit) as leaving:
        main(["--help"])
    assert leaving.value.code == 0
    assert "(default: auto)" in re.sub(r"\s+", " ", capsys.readouterr().out)


def test_index_outside_is_refused(capsys):
    with pytest.raises(SystemExit):
        eval_vbr.main(["-l", "5.5"])
    assert "index must lie in [0, 5]" in capsys.readouterr().err


def test_benchmark_prints_every_part(capsys):
    benchmark.main(["--width", "128", "--height", "128", "--runs", "1"])
    output = capsys.readouterr().out
    for part in ("analysis + synthesis", "slice walk", "to bytes", "from bytes", "peak memory", "matrix product"):
        assert part in output


# train_vbr.py --------------------------------------------------------------------------------


def train(photos, folder, checkpoint, *more):
    arguments = ["-d", str(photos), "--checkpoint", checkpoint, "--save_path", str(folder), "--device", "cpu"]
    sizes = ["--patch-size", "128", "--val-size", "128", "-bs", "2", "--warmup", "2"]
    train_vbr.main([*arguments, *sizes, *more])


def test_training_learns_and_leaves_weights_to_use(photos, checkpoint, tmp_path):
    before = load_model(checkpoint)
    train(photos, tmp_path / "run", checkpoint, "--max-steps", "30", "-lr", "1e-3", "--ema", "0.9")
    rows = [json.loads(line) for line in (tmp_path / "run" / "validation.jsonl").read_text().splitlines()]
    assert rows[-1]["step"] == 30 and len(rows[-1]["bpp"]) == 6
    model = load_model(tmp_path / "run" / "model.pth.tar")
    record = read_checkpoint(tmp_path / "run" / "model.pth.tar")["training"]
    assert record[-1]["patches"] == 60 and record[-1]["loss"] == rows[-1]["loss"]
    assert not torch.equal(model.entropy_bottleneck.quantiles, before.entropy_bottleneck.quantiles)
    assert not torch.equal(model.modnet_gs.mask.alpha, before.modnet_gs.mask.alpha)

    def loss(m):
        return np.mean([evaluate(m, path.name, read_image(path), 3.0, real=False)[0].loss for path in photos.iterdir()])

    assert loss(model) < 0.8 * loss(before)
    assert list((tmp_path / "run").glob("events.*"))


def test_a_resumed_run_is_the_uninterrupted_one(photos, checkpoint, tmp_path, monkeypatch):
    train(photos, tmp_path / "whole", checkpoint, "--max-steps", "6")
    step = train_vbr.Trainer.step

    def interrupted(self):
        if self.progress.step == 3:
            self.validate_and_save()
            raise KeyboardInterrupt
        return step(self)

    monkeypatch.setattr(train_vbr.Trainer, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(photos, tmp_path / "parts", checkpoint, "--max-steps", "6")
    monkeypatch.undo()
    train(photos, tmp_path / "parts", "moved away since", "--max-steps", "6", "--resume")
    whole, parts = (read_checkpoint(tmp_path / run / "last.pth.tar") for run in ("whole", "parts"))
    for key in ("state_dict", "ema"):
        assert all(torch.equal(value, parts[key][name]) for name, value in whole[key].items())
    assert whole["progress"]["step"] == parts["progress"]["step"] == 6


def test_a_run_is_not_overwritten_and_a_budget_is_needed(photos, checkpoint, tmp_path):
    with pytest.raises(cli.UserError, match="no budget"):
        train(photos, tmp_path / "run", checkpoint)
    for wrong in (["--max-minutes", "-5"], ["-e", "1", "-bs", "0"]):
        with pytest.raises(cli.UserError, match="must not be negative"):
            train(photos, tmp_path / "run", checkpoint, *wrong)
    with pytest.raises(cli.UserError, match="nothing to resume"):
        train(photos, tmp_path / "run", checkpoint, "-e", "1", "--resume")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "last.pth.tar").touch()
    with pytest.raises(cli.UserError, match="already there"):
        train(photos, tmp_path / "run", checkpoint, "-e", "1")
    with pytest.raises(cli.UserError, match="multiple of 128"):
        train(photos, tmp_path / "other", checkpoint, "-e", "1", "--patch-size", "100")


def test_a_step_that_is_not_finite_changes_nothing(photos, checkpoint, tmp_path, monkeypatch):
    def poisoned(self):
        batch = crops(self)
        return batch * float("nan")

    crops = Crops.__call__
    monkeypatch.setattr(Crops, "__call__", poisoned)
    monkeypatch.setattr(train_vbr.Trainer, "validate_and_save", lambda self: self.save())
    train(photos, tmp_path / "run", checkpoint, "--max-steps", "2")
    saved, before = read_checkpoint(tmp_path / "run" / "last.pth.tar"), load_model(checkpoint).state_dict()
    assert saved["progress"]["skipped"] == 2
    assert all(torch.equal(value, before[name]) for name, value in saved["state_dict"].items() if "_cdf" not in name)


def test_the_learning_rate_ends_with_the_budget():
    settings = Settings(max_minutes=10, max_steps=1000, warmup=10, learning_rate=1.0)
    assert learning_rate(Progress(step=0), settings) == pytest.approx(0.1, rel=1e-3)
    assert learning_rate(Progress(step=500), settings) == pytest.approx(0.5)
    assert learning_rate(Progress(step=500, seconds=600), settings) == 0  # whichever ends first
    assert learning_rate(Progress(step=1000), settings) == 0


def test_crops_are_repeatable_patches_of_the_photographs():
    image = torch.arange(3 * 200 * 220).view(3, 200, 220).remainder(251).to(torch.uint8)
    first, second = (Crops([image], 128, 16, seed=3, scaled=0.0)() for _ in range(2))
    assert torch.equal(first, second)
    values = {tuple(v) for v in (image.flatten(1).T).tolist()}
    patch = (first[5] * 255).round().long().flatten(1).T.tolist()
    assert all(tuple(v) in values for v in patch)
    scaled = Crops([image], 128, 16, seed=3, scaled=1.0)()
    assert scaled.shape == (16, 3, 128, 128) and scaled.min() >= 0 and scaled.max() <= 1
