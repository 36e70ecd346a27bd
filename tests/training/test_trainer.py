"""Training in one process: stages, budget, resume, and what goes wrong."""

import argparse
import json
import math
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import skimage.data
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import eval_vbr
import train_latent_e2e
import train_vbr
from models import TCM, TCM_VBR
from models.lambdas import LADDERS
from models.latent_map import TCM_Mapped
from models.layers import Float32GDN
from models.state_dict import without_tables
from tests.conftest import TINY, shake
from utils import cli
from utils.checkpoint import CheckpointError, build_model, describe, export_model, load_model, read_checkpoint
from utils.cli.training_arguments import add_run_arguments, check_run_arguments
from utils.cli.training_stages import read_teachers
from utils.codec.encode import encode
from utils.codec.request import EncodeRequest
from utils.evaluation.evaluate import evaluate
from utils.images import read_image, save_image
from utils.pictures import ImageError
from utils.training import trainer
from utils.training.fit_tables import first_batches
from utils.training.objectives import Objective, StaticObjective
from utils.training.patches import batches
from utils.training.schedule import Progress, Settings, in_last_part, learning_rate
from utils.training.trainer import Trainer, compile_networks

ROOT = Path(__file__).resolve().parents[2]
SIZES = ["--patch-size", "128", "--val-size", "128", "-bs", "2", "--warmup", "2", "--device", "cpu"]


def arguments(photos, folder, *more) -> list[str]:
    return ["-d", str(photos), "--save_path", str(folder), *SIZES, *map(str, more)]


def train(photos, folder, *more) -> dict:
    """Train, and read what a resume would start from."""
    train_vbr.main(arguments(photos, folder, *more))
    return read_checkpoint(folder / "last.pth.tar")


def same(a: dict, b: dict) -> bool:
    return all(torch.equal(value, b[name]) for name, value in a.items())


@pytest.fixture(scope="module")
def tcm(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("weights") / "tcm.pth.tar"
    torch.manual_seed(1)
    export_model(path, shake(TCM(**TINY)), [])
    return str(path)


@pytest.fixture
def start():
    """Start train_vbr.py as a process; its output is in the file `output` of the run's folder."""
    started = []

    def launch(folder: Path, *more) -> subprocess.Popen:
        folder.mkdir()
        with (folder / "output").open("w") as file:
            command = [sys.executable, "train_vbr.py", *map(str, more)]
            started.append(subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=file, start_new_session=True))
        return started[-1]

    yield launch
    for process in started:
        process.kill()


def recorded_losses(monkeypatch) -> list[float]:
    """To be filled with the loss of every step, exactly."""
    found: list[float] = []
    step = Trainer.step

    def recorded(self):
        values = step(self)
        found.append(values["loss"])
        return values

    monkeypatch.setattr(Trainer, "step", recorded)
    return found


@pytest.fixture
def losses(monkeypatch) -> list[float]:
    return recorded_losses(monkeypatch)


# Stages --------------------------------------------------------------------------------------


def test_joint_training_learns_and_leaves_weights_to_use(photos, checkpoint, tmp_path):
    before = load_model(checkpoint)
    train(photos, tmp_path / "run", "--checkpoint", checkpoint, "--max-steps", 20, "-lr", 1e-3, "--ema", 0.9)
    rows = [json.loads(line) for line in (tmp_path / "run" / "validation.jsonl").read_text().splitlines()]
    assert rows[-1]["step"] == 20
    assert all(len(rows[-1][name]) == 6 for name in ("bpp", "psnr", "log_m_ga", "log_m_gs"))
    model = load_model(tmp_path / "run" / "model.pth.tar")
    record = read_checkpoint(tmp_path / "run" / "model.pth.tar")["training"][-1]
    assert record["patches"] == 40 and record["loss"] == rows[-1]["loss"] and record["stage"] == "joint"
    assert not torch.equal(model.entropy_bottleneck.quantiles, before.entropy_bottleneck.quantiles)
    assert not torch.equal(model.modnet_gs.mask.alpha, before.modnet_gs.mask.alpha)

    def loss(m):
        pictures = [read_image(path)[:, :128, :128] for path in photos.iterdir()]
        return np.mean([evaluate(m, "", picture, EncodeRequest(3.0), real=False)[0].loss for picture in pictures])

    assert loss(model) < 0.8 * loss(before)
    events = EventAccumulator(str(tmp_path / "run"))
    events.Reload()
    scalars = set(events.Tags()["scalars"])
    assert {"training/loss", "training/learning rate", "training/gradient norm", "training/patches a second"} <= scalars
    assert {"validation/bpp 5", "validation/PSNR 0", "validation/log_m_gs 3", "validation/alpha_ga"} <= scalars
    assert {"validation/original", "validation/index 5"} <= set(events.Tags()["images"])


def test_base_stage_trains_one_rate_and_leaves_the_laes_behind(photos, checkpoint, tmp_path):
    more = ["--stage", "base", "--lambda", 0.0067, "--checkpoint", checkpoint, "--max-steps", 2]
    state = train(photos, tmp_path / "run", *more)
    assert (tmp_path / "run" / "curves.png").exists()
    assert state["model"] == "TCM" and state["objective"]["lambda"] == 0.0067
    row = json.loads((tmp_path / "run" / "validation.jsonl").read_text())
    assert len(row["bpp"]) == 1
    image = read_image(sorted(photos.iterdir())[0])[:, :128, :128]
    model = load_model(tmp_path / "run" / "model.pth.tar")
    assert type(model) is TCM
    result, _ = evaluate(model, "", image, EncodeRequest(), real=False)
    assert result.bpp > 0 and result.loss is None


@pytest.fixture(scope="module")
def six_teachers(tmp_path_factory) -> tuple[Path, list[TCM]]:
    """Models that differ, and their folder: three are named by their record and three by their file."""
    folder, teachers = tmp_path_factory.mktemp("six"), []
    for number, lmbda in enumerate(LADDERS["mse"]):
        torch.manual_seed(number)
        teachers.append(shake(TCM(**TINY), seed=number).eval())
        name = f"tcm_{lmbda}.pth.tar" if number % 2 else f"teacher{'abcdef'[number]}.pth.tar"
        export_model(folder / name, teachers[-1], [] if number % 2 else [{"lambda": lmbda}])
    return folder, teachers


def test_the_stage_of_tables_changes_nothing_else(photos, checkpoint, tcm, tmp_path):
    """Neither of a TCM_VBR nor of a TCM, in float16 or, as published, in float32, nor their metric."""
    published = tmp_path / "float32.pth.tar"
    model = load_model(checkpoint)
    model.metric = "ms-ssim"
    torch.save(describe(model) | {"state_dict": model.state_dict()}, published)
    for number, start in enumerate((checkpoint, tcm, published)):
        train_vbr.main(arguments(photos, tmp_path / str(number), "--stage", "tables", "--checkpoint", start))
        before, after = read_checkpoint(start), read_checkpoint(tmp_path / str(number) / "model.pth.tar")
        tables = "gaussian_conditional._quantized_cdf"
        assert not torch.equal(before["state_dict"].pop(tables), after["state_dict"].pop(tables))
        assert same(before["state_dict"], after["state_dict"]) and same(after["state_dict"], before["state_dict"])
        assert all(before[name] == after[name] for name in ("model", "arguments", "metric"))
        assert after["training"][-1]["stage"] == "tables"


def test_static_stage_moves_the_laes_alone(photos, tcm, tmp_path, six_teachers):
    more = ["--stage", "static", "--checkpoint", tcm, "--teachers", six_teachers[0], "--max-steps", 3, "-lr", 1e-2]
    state = train(photos, tmp_path / "run", *more)["state_dict"]
    assert same(without_tables(load_model(tcm).state_dict()), state)
    others = shutil.copytree(six_teachers[0], tmp_path / "others")
    checkpoint = read_checkpoint(others / "tcm_0.05.pth.tar")
    checkpoint["state_dict"]["g_a.0.conv1.weight"] *= 2
    torch.save(checkpoint, others / "tcm_0.05.pth.tar")
    more[more.index("--teachers") + 1] = others
    with pytest.raises(cli.UserError, match="holds another run: teachers .*, not "):
        train(photos, tmp_path / "run", *more, "--resume")
    moved = [name for name, value in state.items() if name.startswith("modnet_") and value.abs().sum()]
    for lae in ("modnet_ga", "modnet_gs"):
        assert f"{lae}.mask.alpha" in moved and f"{lae}.mask.lmd_map.fc_layers.1.bias" in moved


def test_teachers_whose_tables_were_fitted_or_that_do_not_name_their_metric(six_teachers, tmp_path):
    """As after --stage tables, whose record has no λ; and published weights, here for MS-SSIM."""
    ladder, student = LADDERS["ms-ssim"], TCM(**TINY)
    student.metric = "ms-ssim"
    files = [tmp_path / f"{letter}.pth.tar" for letter in "abcdef"]
    for file, lmbda, teacher in zip(files, ladder, six_teachers[1], strict=True):
        export_model(file, teacher, [{"lambda": lmbda}, {"stage": "tables"}])
    with pytest.raises(cli.UserError, match="a TCM for mse"):
        read_teachers(str(tmp_path), ladder, student)
    for file in files:
        torch.save({key: value for key, value in read_checkpoint(file).items() if key != "metric"}, file)
    assert [teacher.metric for teacher in read_teachers(str(tmp_path), ladder, student)] == ["ms-ssim"] * 6


def test_static_loss_is_the_published_one(six_teachers):
    """Against the formula in docs/training.md, sample by sample."""
    folder, teachers = six_teachers
    torch.manual_seed(0)
    student = shake(TCM_VBR(**TINY))
    found = read_teachers(str(folder), LADDERS["mse"], student)
    assert len(found) == 6
    objective = StaticObjective(student, found).train()
    assert student.modnet_ga.training and not student.g_a.training and not student.g_s.training  # no drop-path
    objective.eval()
    x, rate_uniform = torch.rand(3, 3, 128, 128), torch.tensor([0.99, 0.05, 0.5])  # λ index 5, 0, 3
    noise = tuple(torch.zeros(3, *shape) for shape in student.noise_shapes(128, 128))
    with torch.no_grad():
        out = objective(x, rate_uniform, noise)
        distance = torch.stack(
            [
                (student.modnet_ga(student.g_a(x[i : i + 1]), torch.tensor([float(t)]))[0] - found[t].g_a(x[i : i + 1]))
                .square()
                .mean()
                for i, t in enumerate((5, 0, 3))
            ]
        ).mean()
        norms = sum(p.norm() for lae in (student.modnet_ga, student.modnet_gs) for p in lae.parameters())
    assert float(out["latent MSE"]) == pytest.approx(float(distance), rel=1e-4)
    assert float(out["total"]) == pytest.approx(float(out["loss"] + 0.03 * distance + 1e-4 * norms), rel=1e-5)
    half = found[3].g_a(x[2:])
    assert torch.allclose(half, teachers[3].g_a(x[2:]), rtol=0.05, atol=0.1 * float(half.abs().max()))


def test_teachers_that_do_not_fit_are_named(photos, tcm, tmp_path, six_teachers):
    shutil.copytree(six_teachers[0], tmp_path / "six")
    start = ["--stage", "static", "--checkpoint", tcm, "--max-steps", 1, "--teachers", tmp_path / "six"]

    def fails(text):
        with pytest.raises(cli.UserError, match=text):
            train(photos, tmp_path / "run", *start)

    (tmp_path / "six" / "tcm_0.0035.pth.tar").rename(tmp_path / "six" / "tcm.pth.tar")
    fails("tcm.pth.tar: neither its training record nor its name")
    (tmp_path / "six" / "tcm.pth.tar").rename(tmp_path / "six" / "again 0.05.pth.tar")
    fails("second teacher for λ = 0.05")
    (tmp_path / "six" / "again 0.05.pth.tar").unlink()
    fails("no teacher for λ = 0.0035")
    weights = read_checkpoint(six_teachers[0] / "tcm_0.05.pth.tar")["state_dict"]
    safetensors.torch.save_file(weights, tmp_path / "six" / "x 0.05.safetensors")
    fails("second teacher for λ = 0.05")


def test_ms_ssim_has_its_own_ladder(photos, checkpoint, tmp_path):
    for path in photos.iterdir():
        image = read_image(path)
        save_image(path, image.repeat(1, 2, 2))
    sizes = ["--type", "ms-ssim", "--patch-size", 256, "--val-size", 256, "-bs", 1]
    more = ["--checkpoint", checkpoint, "--max-steps", 1, *sizes]
    train(photos, tmp_path / "run", *more)
    path = tmp_path / "run" / "model.pth.tar"
    saved = read_checkpoint(path)
    assert saved["metric"] == "ms-ssim" and saved["lambdas"] == [3, 5, 8, 16, 36, 64]
    model = load_model(path)
    result, _ = evaluate(model, "", read_image(sorted(photos.iterdir())[0]), EncodeRequest(5.0), real=False)
    assert result.loss == pytest.approx(result.bpp + 64 * (1 - result.ms_ssim))
    with pytest.raises(cli.UserError, match="at least 256"):
        train(photos, tmp_path / "other", "--type", "ms-ssim", "--max-steps", 1)


@pytest.mark.parametrize(("kind", "rate", "gain_db"), [("channel", 0.3, 10), ("contextual", 0.02, 2)])
def test_the_latent_map_is_learnt_and_can_be_evaluated(photos, tmp_path, kind, rate, gain_db):
    """The low codec's latent is half the high one's: a gain of ½ for every channel."""
    torch.manual_seed(0)
    high = shake(TCM(**TINY))
    export_model(tmp_path / "high.pth.tar", high, [])
    high.g_a[-1].weight.data.mul_(0.5)
    high.g_a[-1].bias.data.mul_(0.5)
    export_model(tmp_path / "low.pth.tar", high, [{"lambda": 0.0067}])
    codecs = ["--high", tmp_path / "high.pth.tar", "--low", tmp_path / "low.pth.tar", "--map", kind]
    more = [*codecs, "--max-steps", 40, "-lr", rate, "--ema", 0.5, "--schedule", "cosine"]
    train_latent_e2e.main(arguments(photos, tmp_path / "map", *more))
    with pytest.raises(cli.UserError, match="holds another run: low .*, not "):
        others = ["--high", tmp_path / "high.pth.tar", "--low", tmp_path / "high.pth.tar", "--map", kind]
        others += ["--lambda", 0.0067, "--max-steps", 41]
        train_latent_e2e.main(arguments(photos, tmp_path / "map", *others, "--resume"))
    row = json.loads((tmp_path / "map" / "validation.jsonl").read_text())
    assert row["to_low_db"][0] > row["unmapped_db"][0] + gain_db
    model = load_model(tmp_path / "map" / "model.pth.tar")
    assert isinstance(model, TCM_Mapped) and model.contextual == (kind == "contextual")
    torch.save(model.state_dict(), tmp_path / "bare.pth")
    assert load_model(tmp_path / "bare.pth").fingerprint == model.fingerprint
    gain = torch.nn.functional.softsign(model.map.g_a.lmd_map).exp()
    if kind == "channel":
        assert torch.allclose(gain, torch.tensor(0.5), atol=0.06)
        assert torch.allclose(torch.nn.functional.softsign(model.map.g_s.lmd_map).exp(), torch.tensor(2.0), atol=0.2)
    picture = str(sorted(photos.iterdir())[0])
    assert eval_vbr.main(["-d", picture, "--real", "--checkpoint", str(tmp_path / "map" / "model.pth.tar")]) == 0
    with pytest.raises(Exception, match="two fixed-rate TCMs"):
        codecs[3] = tmp_path / "map" / "model.pth.tar"
        train_latent_e2e.main(arguments(photos, tmp_path / "other", *codecs, "--max-steps", 1))


# Budget --------------------------------------------------------------------------------------


def test_the_learning_rate_ends_with_the_budget():
    settings = Settings(max_minutes=10, max_steps=1000, warmup=10, learning_rate=1.0)
    assert learning_rate(Progress(step=0), settings) == pytest.approx(0.1, rel=1e-3)
    assert learning_rate(Progress(step=500), settings) == pytest.approx(0.5)
    assert learning_rate(Progress(step=500, seconds=600), settings) == 0  # whichever ends first
    assert learning_rate(Progress(step=1000), settings) == 0
    steps = Settings(max_steps=200, warmup=0, learning_rate=1.0, schedule="step")
    assert [learning_rate(Progress(step=s), steps) for s in (0, 49, 50, 100, 150, 199)] == [1, 1, 0.5, 0.1, 0.05, 0.05]


def test_before_a_last_part_the_rate_falls_to_a_quarter_and_in_it_to_zero():
    settings = Settings(max_steps=1000, warmup=0, learning_rate=1.0, last_share=0.2)
    rates = [learning_rate(Progress(step=s), settings) for s in (0, 400, 799, 800, 900, 1000)]
    assert rates == pytest.approx([1, 0.625, 0.25, 0.25, 0.125, 0], abs=1e-5)
    assert [in_last_part(Progress(step=s), settings) for s in (799, 800)] == [False, True]
    assert not in_last_part(Progress(step=1000), Settings(max_steps=1000))


LAST = ["--last-part", 0.5, "--last-patch-size", 256, 128, "--last-batch-size", 1, "--balance", 0.5, "--max-steps", 4]


def test_the_last_part_has_other_patches_and_a_resumed_run_is_the_same(checkpoint, tmp_path, monkeypatch):
    for i, picture in enumerate((skimage.data.astronaut(), skimage.data.coffee(), skimage.data.chelsea())):
        save_image(tmp_path / "large" / f"{i}.png", torch.from_numpy(picture).permute(2, 0, 1))
    seen, forward, step = [], Objective.forward, Trainer.step

    def spy(self, x, *rest):
        seen.append((tuple(x.shape), self.balance, self.map_share))
        return forward(self, x, *rest)

    monkeypatch.setattr(Objective, "forward", spy)
    more = ["--checkpoint", checkpoint, *LAST]
    whole = train(tmp_path / "large", tmp_path / "whole", *more)
    assert seen == [((2, 3, 128, 128), 0.5, 0.0)] * 2 + [((1, 3, 256, 128), 0.0, 0.2)] * 2
    assert whole["progress"]["patches"] == 6
    for last in (2, 3, 4):  # the first of the last part, one within it, and none: only what follows is left
        def interrupted(self, last=last):
            if self.progress.step == last:
                self.save()
                raise KeyboardInterrupt
            return step(self)

        def interrupted_at_the_end(self, last=False):
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(Trainer, "step", interrupted)
            patch.setattr(Trainer, "validate", interrupted_at_the_end)
            with pytest.raises(KeyboardInterrupt):
                train(tmp_path / "large", tmp_path / f"{last}", *more)
        parts = train(tmp_path / "large", tmp_path / f"{last}", *more, "--resume")
        assert same(whole["state_dict"], parts["state_dict"])
        made, again = (read_checkpoint(tmp_path / name / "model.pth.tar") for name in ("whole", f"{last}"))
        assert same(made["state_dict"], again["state_dict"])  # coding tables too


def test_photographs_that_are_too_small_for_the_last_part_are_told_before_the_first(photos, checkpoint, tmp_path):
    for more in ([], ["--cache-gb", 0, "-n", 1]):
        with pytest.raises(ImageError, match=r"for the last part of the run; .*smaller than a patch of 128×256"):
            train(photos, tmp_path / "run", "--checkpoint", checkpoint, *LAST, *more)
    assert not (tmp_path / "run" / "last.pth.tar").exists()


def test_epochs_are_passes_over_the_photographs(photos, checkpoint, tmp_path):
    state = train(photos, tmp_path / "run", "--checkpoint", checkpoint, "-e", 2, "--val", sorted(photos.iterdir())[0])
    assert state["progress"]["step"] == 7  # seven photographs twice, two a step


def test_a_run_is_not_overwritten_and_a_budget_is_needed(photos, checkpoint, tmp_path):
    def fails(text, *more):
        with pytest.raises(cli.UserError, match=text):
            train(photos, tmp_path / "run", "--checkpoint", checkpoint, *more)

    fails("no budget")
    for wrong in (["--max-minutes", "-5"], ["-e", "1", "-bs", "0"]):
        fails("must not be negative", *wrong)
    fails("multiple of 128", "-e", 1, "--patch-size", 100)
    fails("one number or two", "-e", 1, "--patch-size", 128, 128, 128)
    fails("must lie in", "-e", 1, "--last-part", 1)
    fails("--schedule cosine", "-e", 1, "--last-part", 0.1, "--schedule", "step")
    fails("not static", "-e", 1, "--last-part", 0.1, "--stage", "static")
    fails("--last-patch-size must be a multiple of 128", "-e", 1, "--last-part", 0.1, "--last-patch-size", 100)
    fails("--last-batch-size is of --last-part", "-e", 1, "--last-batch-size", 2)
    fails("--preset is of a new model", "-e", 1, "--preset", "full")
    fails("belong together", "-e", 1, "--stage", "static")
    fails("of --stage base", "-e", 1, "--lambda", 0.05)
    fails("nothing to resume", "-e", 1, "--resume")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "last.pth.tar").touch()
    fails("already there", "-e", 1)


# Leaving and coming back ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def uninterrupted(made_photos, checkpoint, tmp_path_factory) -> tuple[dict, list[float]]:
    """What a run of eight steps ends with, and the loss of every step."""
    with pytest.MonkeyPatch.context() as patch:
        losses = recorded_losses(patch)
        state = train(made_photos, tmp_path_factory.mktemp("run"), "--checkpoint", checkpoint, "--max-steps", 8)
    return state, losses


def test_a_resumed_run_is_the_uninterrupted_one(photos, checkpoint, tmp_path, uninterrupted, losses, monkeypatch):
    whole, expected = uninterrupted
    more = ["--checkpoint", shutil.copy(checkpoint, tmp_path / "start"), "--max-steps", 8]
    step = Trainer.step

    def interrupted(self):
        if self.progress.step == 4:  # saved at 3: the step that is lost is made again
            raise KeyboardInterrupt
        if self.progress.step == 3:
            self.save()
        return step(self)

    monkeypatch.setattr(Trainer, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(photos, tmp_path / "parts", *more)
    monkeypatch.setattr(Trainer, "step", step)
    (tmp_path / "start").unlink()  # it may have been moved away since
    parts = train(photos, tmp_path / "parts", *more, "--resume")
    assert losses[:4] == expected[:4] and losses[4:] == expected[3:]
    assert same(whole["state_dict"], parts["state_dict"]) and same(whole["ema"], parts["ema"])
    assert whole["progress"]["step"] == parts["progress"]["step"] == 8


def wait_for(condition, process=None, seconds=120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it took too long"
        assert process is None or process.poll() is None, "the run ended early"
        time.sleep(0.05)


def test_killed_at_any_moment_a_run_goes_on_exactly(photos, checkpoint, tmp_path, uninterrupted, losses, start):
    whole, expected = uninterrupted
    more = ["--checkpoint", checkpoint, "--max-steps", 8]
    killed = start(tmp_path / "killed", *arguments(photos, tmp_path / "killed", *more), "--save-minutes", 0)
    last = tmp_path / "killed" / "last.pth.tar"
    wait_for(last.exists, killed)
    time.sleep(0.3)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    done = read_checkpoint(last)["progress"]["step"]
    assert 0 < done < 8
    parts = train(photos, tmp_path / "killed", *more, "--resume")
    assert losses == expected[done:]
    assert same(whole["state_dict"], parts["state_dict"]) and same(whole["ema"], parts["ema"])
    steps = [json.loads(line)["step"] for line in (tmp_path / "killed" / "validation.jsonl").read_text().splitlines()]
    assert steps == [8]


def test_the_share_of_synthetic_patches_is_for_training_and_not_for_tables(photos, checkpoint, tmp_path, monkeypatch):
    shares = []

    def first(dataset, *more):
        shares.append(dataset.synthetic_share)
        return first_batches(dataset, *more)

    def batches_of(dataset, *args, **kwargs):
        shares.append(dataset.synthetic_share)
        return batches(dataset, *args, **kwargs)

    monkeypatch.setattr(trainer, "first_batches", first)
    monkeypatch.setattr(trainer, "batches", batches_of)
    more = ["--synthetic-share", 0.5, "--max-steps", 2, "--last-part", 0.5, "--last-patch-size", 128]
    train(photos, tmp_path / "run", "--checkpoint", checkpoint, *more)
    assert shares == [0.5, 0.5, 0.0]
    with pytest.raises(cli.UserError, match="--synthetic-share must lie in"):
        train(photos, tmp_path / "other", "--checkpoint", checkpoint, "--max-steps", 2, "--synthetic-share", 1.5)


def test_a_signal_saves_and_ends_in_peace(photos, checkpoint, tmp_path, start):
    more = ["--checkpoint", checkpoint, "--max-steps", 100000, "--save-minutes", 1000, "--cache-gb", 0, "-n", 1]
    numbers = [signal.SIGINT, signal.SIGTERM]
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # by nohup
        numbers.append(signal.SIGHUP)
    folders = {number: tmp_path / number.name for number in numbers}
    processes = {number: start(folder, *arguments(photos, folder, *more)) for number, folder in folders.items()}
    for number, process in processes.items():
        output = folders[number] / "output"
        wait_for(lambda output=output: "%, step " in output.read_text(), process)
        os.killpg(process.pid, number)  # as torchrun and a terminal do: the reading worker is meant too, must not die
        assert process.wait(60) == 128 + number, output.read_text()
        assert "stopped and saved at step" in output.read_text() and "Traceback" not in output.read_text()
        assert read_checkpoint(folders[number] / "last.pth.tar")["progress"]["step"] >= 1


@pytest.mark.skipif(not hasattr(signal, "SIGCONT"), reason="there is no SIGSTOP here")
def test_a_suspended_run_does_not_spend_its_budget(photos, checkpoint, tmp_path, start):
    run = tmp_path / "run"
    process = start(run, *arguments(photos, run, "--checkpoint", checkpoint, "--max-steps", 100000))
    wait_for(lambda: "weights: " in (run / "output").read_text(), process)
    begin = time.monotonic()
    wait_for(lambda: "%, step " in (run / "output").read_text(), process)
    os.killpg(process.pid, signal.SIGSTOP)
    trained = time.monotonic() - begin  # at most
    time.sleep(trained + 6)  # longer than saving may take
    os.killpg(process.pid, signal.SIGCONT)
    resumed = time.monotonic()
    time.sleep(1)
    os.killpg(process.pid, signal.SIGTERM)
    assert process.wait(60) == 128 + signal.SIGTERM
    trained += time.monotonic() - resumed
    assert 0 < read_checkpoint(run / "last.pth.tar")["progress"]["seconds"] < trained


def test_the_state_of_a_run_is_weights_too(photos, checkpoint, tmp_path, capsys):
    """With the coding tables of its own weights, and its own record: those it started from are stale."""
    state = train(photos, tmp_path / "run", "--checkpoint", checkpoint, "--max-steps", 2, "-lr", 0.01, "--ema", 0)
    model, expected = load_model(tmp_path / "run" / "last.pth.tar"), build_model(state, "last.pth.tar")
    expected.update(force=True)
    assert model.fingerprint == expected.fingerprint != load_model(checkpoint).fingerprint
    assert [record["step"] for record in state["training"]] == [2]
    again = train(photos, tmp_path / "run", "--checkpoint", checkpoint, "--max-steps", 3, "--resume")
    more = ["--checkpoint", tmp_path / "run" / "last.pth.tar", "--max-steps", 1, "--type", "ms-ssim", "--val-size", 256]
    for path in photos.iterdir():
        Image.open(path).resize((256, 256)).save(path)
    third = train(photos, tmp_path / "more", *more, "--patch-size", 256)
    assert [[record["step"] for record in run["training"]] for run in (again, third)] == [[3], [3, 1]]
    assert "trained for mse, and trained on for ms-ssim" in capsys.readouterr().err


def test_a_run_that_is_stopped_tells_that_its_weights_are_older(photos, checkpoint, tmp_path, monkeypatch, capsys):
    step = Trainer.step

    def stopped(self):
        values = step(self)
        self.all_stop = self.progress.step == 2
        return values

    monkeypatch.setattr(Trainer, "step", stopped)
    more = ["--checkpoint", checkpoint, "--max-steps", 3, "--validate-minutes", 0]
    train(photos, tmp_path / "run", *more)
    assert "model.pth.tar (of the last validation, so older" in capsys.readouterr().out
    train(photos, tmp_path / "run", *more, "--resume")
    assert "model.pth.tar\n" in capsys.readouterr().out


def test_a_full_disk_leaves_the_last_good_checkpoint(photos, checkpoint, tmp_path):
    train(photos, tmp_path / "run", "--checkpoint", checkpoint, "--max-steps", 1)
    before = (tmp_path / "run" / "last.pth.tar").read_bytes()
    more = arguments(photos, tmp_path / "run", "--checkpoint", checkpoint, "--max-steps", 2, "--resume")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)  # beyond it a write fails: Python ignores the signal
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, limits[1]))
    try:
        with pytest.raises(SystemExit) as leaving:
            cli.run(lambda: train_vbr.main(more))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    error = leaving.value.code  # Python prints a text, and the status is 1
    assert error.startswith("error: ") and "last.pth.tar" in error and "File too large" in error
    assert (tmp_path / "run" / "last.pth.tar").read_bytes() == before
    assert not list((tmp_path / "run").glob(".last*"))


def test_a_run_of_another_stage_is_not_resumed_and_changes_are_told(photos, checkpoint, tmp_path, capsys):
    more = ["--stage", "base", "--checkpoint", checkpoint]
    train(photos, tmp_path / "run", *more, "--max-steps", 1)
    with pytest.raises(cli.UserError, match="holds another run: lambda 0.05, not 0.0025"):
        train(photos, tmp_path / "run", *more, "--max-steps", 2, "--lambda", 0.0025, "--resume")
    with pytest.raises(cli.UserError, match="another network than --preset"):
        train(photos, tmp_path / "run", "--stage", "base", "--preset", "small", "--max-steps", 2, "--resume")
    train(photos, tmp_path / "run", *more, "--max-steps", 2, "--resume", "-lr", 5e-5)
    assert "learning_rate was 0.0002 in this run and is 5e-05 from here on" in capsys.readouterr().out


# What goes wrong -----------------------------------------------------------------------------


def poison(monkeypatch, steps) -> None:
    forward = Objective.forward

    def poisoned(self, x, rate_uniform, noise):
        poisoned.calls += 1
        return forward(self, x * float("nan") if poisoned.calls in steps else x, rate_uniform, noise)

    poisoned.calls = 0
    monkeypatch.setattr(Objective, "forward", poisoned)


def test_a_step_that_is_not_finite_is_skipped(photos, checkpoint, tmp_path, monkeypatch, capsys):
    poison(monkeypatch, {1})
    monkeypatch.setattr(Trainer, "validate", lambda self, last=False: None)
    state = train(photos, tmp_path / "one", "--checkpoint", checkpoint, "--max-steps", 1)
    before = without_tables(load_model(checkpoint).state_dict())
    assert state["progress"]["skipped"] == 1
    assert "step 1: loss or gradient not finite, skipped" in capsys.readouterr().out
    assert same(state["state_dict"], before)
    state = train(photos, tmp_path / "one", "--checkpoint", checkpoint, "--max-steps", 2, "--resume")
    assert state["progress"]["skipped_in_a_row"] == 0
    assert not same({k: v for k, v in before.items() if k == "g_a.0.conv1.weight"}, state["state_dict"])


def test_ten_in_a_row_end_the_run_with_the_last_good_checkpoint(photos, checkpoint, tmp_path, monkeypatch):
    poison(monkeypatch, set(range(3, 100)))
    more = ["--checkpoint", checkpoint, "--max-steps", 100, "--save-minutes", 0, "-bs", 1]
    with pytest.raises(cli.UserError, match="10 steps in a row .* last good checkpoint"):
        train(photos, tmp_path / "run", *more)
    state = read_checkpoint(tmp_path / "run" / "last.pth.tar")
    assert state["progress"]["step"] < 12
    assert all(torch.isfinite(value).all() for value in state["state_dict"].values())
    build_model(state, "last.pth.tar")
    monkeypatch.setattr(torch.amp.GradScaler, "is_enabled", lambda scaler: True)
    monkeypatch.setattr(trainer, "MAX_SKIPPED_STEPS", 2)
    with pytest.raises(cli.UserError, match="2 steps in a row .* --amp bf16, which has a larger range, may help"):
        train(photos, tmp_path / "float16", *more)


def test_autocast_leaves_the_entropy_models_in_float32(photos, tmp_path, losses, monkeypatch):
    squared, forward = [], Float32GDN.forward
    monkeypatch.setattr(Float32GDN, "forward", lambda gdn, x: squared.append(x.shape) or forward(gdn, x))
    torch.manual_seed(0)
    export_model(tmp_path / "fresh.pth.tar", TCM_VBR(**TINY), [])
    more = ["--checkpoint", tmp_path / "fresh.pth.tar", "--max-steps", 1, "-bs", 1]  # fp16 takes long on a CPU
    more += ["--seed", 10]  # a large λ is drawn first: its gradients overflow
    train(photos, tmp_path / "float32", *more)
    for precision in ("bf16", "fp16"):
        train(photos, tmp_path / precision, *more, "--amp", precision)
        assert losses[-1] == pytest.approx(losses[0], rel=0.01) and losses[-1] != losses[0]
        record = read_checkpoint(tmp_path / precision / "model.pth.tar")["training"][-1]
        assert record["settings"]["amp"] == precision
        assert record["skipped_steps"] == (precision == "fp16")  # the scale of its gradients is found by halving
        assert bool(squared) == (precision == "fp16")


def test_the_step_that_compiles_is_not_counted(photos, checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr("utils.cli.training_run.compile_networks", lambda model: None)
    more = ["--checkpoint", checkpoint, "--compile", "--max-steps"]
    one, two = (train(photos, tmp_path / f"{steps}", *more, steps)["progress"]["seconds"] for steps in (1, 2))
    assert one == 0 < two


def test_the_last_part_has_as_many_pixels_a_step_and_no_more_patches(photos, checkpoint, tmp_path):
    parser = argparse.ArgumentParser()
    add_run_arguments(parser, "nowhere")
    for more, expected in (([], 2), (["--last-batch-size", "3"], 3), (["--patch-size", "512"], 8), (["-bs", "2"], 1)):
        args = parser.parse_args(["-d", "photos", "-e", "1", "--last-part", "0.2", "--patch-size", "128", *more])
        check_run_arguments(args)
        assert args.last_batch_size == expected
    more = ["--checkpoint", checkpoint, "--last-part", 0.1, "--last-patch-size", 128]
    train(photos, tmp_path / "run", *more, "--max-steps", 1, "--last-batch-size", 1)
    state = train(photos, tmp_path / "run", *more, "--max-steps", 2, "--resume")
    assert state["settings"]["last_batch_size"] == 1


def test_no_clipping_is_not_no_training(photos, checkpoint, tmp_path):
    state = train(photos, tmp_path / "run", "--checkpoint", checkpoint, "--max-steps", 1, "--clip_max_norm", 0)
    before = load_model(checkpoint).state_dict()
    assert not torch.equal(state["state_dict"]["g_s.0.conv.weight"], before["g_s.0.conv.weight"])


def test_resuming_with_another_batch_size_and_a_torn_line(photos, checkpoint, tmp_path, capsys):
    held_out, *others = sorted(photos.iterdir())
    for path in others[3:]:
        path.unlink()
    more = ["--checkpoint", checkpoint, "--val", held_out]
    state = train(photos, tmp_path / "run", *more, "-e", 2, "-bs", 1)
    assert state["progress"]["step"] == 6
    with (tmp_path / "run" / "validation.jsonl").open("a") as file:
        file.write('{"step": 1')
    state = train(photos, tmp_path / "run", *more, "-e", 4, "-bs", 4, "--aux-learning-rate", 0.5, "--resume")
    assert state["progress"]["patches"] == 14 and state["progress"]["step"] == 8
    assert "batch_size was 1 in this run and is 4 from here on" in capsys.readouterr().out
    assert state["optimizers"]["aux"]["param_groups"][0]["lr"] == 0.5
    assert [json.loads(line)["step"] for line in (tmp_path / "run" / "validation.jsonl").open()] == [6, 8]


def test_what_differs_from_the_run_that_is_resumed_is_said(photos, checkpoint, tmp_path, capsys):
    more = ["--checkpoint", checkpoint, "--val", photos / "p0.png"]
    train(photos, tmp_path / "run", *more, "--max-steps", 1)
    train(photos, tmp_path / "run", *more, "--max-steps", 2, "--resume")
    assert "ed_on was" not in capsys.readouterr().out
    with pytest.raises(cli.UserError, match="this run began with .*tiny.pth.tar, and --resume goes on from its own"):
        train(photos, tmp_path / "run", "--checkpoint", photos / "p0.png", "--max-steps", 3, "--resume")
    (photos / "p7.png").unlink()
    train(photos, tmp_path / "run", "--val", photos / "p0.png", "--max-steps", 3, "--resume")
    told = capsys.readouterr().out
    assert "note: trained_on was 7 photographs (" in told and "and is 6 photographs (" in told
    assert "validated_on was" not in told
    train(photos, tmp_path / "run", "--val", photos / "p0.png", "--max-steps", 4, "--val-size", 256, "--resume")
    told = capsys.readouterr()
    assert ") at 128 in this run and is 1 photographs (" in told.out
    assert "--val-size 256: 1 of 1 photographs to validate on are smaller" in told.err


def test_a_step_without_memory_is_told_in_a_line(photos, checkpoint, tmp_path, monkeypatch):
    def step(trainer):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(Trainer, "step", step)
    with pytest.raises(cli.UserError, match="not enough memory for a step: a smaller --batch-size"):
        train(photos, tmp_path / "run", "--checkpoint", checkpoint, "--max-steps", 1)


def test_options_are_not_abbreviated(photos, tmp_path, capsys):
    """--lr was taken for the published --lr_epoch, which has no meaning, and the run had the default rate."""
    args = train_vbr.parse(arguments(photos, tmp_path, "--lr", 1e-3))
    assert args.learning_rate == 1e-3 and "--lr_epoch" not in capsys.readouterr().err
    with pytest.raises(SystemExit):
        train_vbr.parse(arguments(photos, tmp_path, "--learn", 1e-3))


def test_times_of_validations_are_multiples_whenever_a_run_is_resumed():
    class Resumed:
        progress = Progress(seconds=60 * 44)

    assert Trainer._next_time(Resumed, 15) == 45 and Trainer._next_time(Resumed, 0) == 44


def test_a_file_in_place_of_the_folder_is_told_before_the_work(photos, checkpoint, tmp_path, monkeypatch):
    (tmp_path / "run").write_text("")
    monkeypatch.setattr("utils.pictures.find_images", lambda *_: pytest.fail("the work has begun"))
    for more in (["-e", 1], ["--stage", "tables", "--checkpoint", checkpoint]):
        with pytest.raises(NotADirectoryError, match="is no folder.*run"):
            train_vbr.main(arguments(photos, tmp_path / "run", *more))
    assert (tmp_path / "run").read_text() == ""


def test_a_picture_is_not_worth_a_run(photos, checkpoint, tmp_path, capsys):
    (tmp_path / "run" / "curves.png").mkdir(parents=True)  # cannot be written
    state = train(photos, tmp_path / "run", "--checkpoint", checkpoint, "--max-steps", 1)
    assert state["progress"]["step"] == 1
    assert capsys.readouterr().out.count("note: the curves cannot be drawn") == 1


def test_validations_are_strict_json(photos, checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr("utils.training.objectives.psnr_of_mse", lambda mse: mse * math.inf)
    train(photos, tmp_path / "run", "--checkpoint", checkpoint, "--max-steps", 1)
    text = (tmp_path / "run" / "validation.jsonl").read_text()
    assert json.loads(text, parse_constant=pytest.fail)["psnr"] == [None] * 6


def test_tensorboard_is_not_worth_a_run(photos, checkpoint, tmp_path, monkeypatch, capsys):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("utils.training.trainer.SummaryWriter.add_scalar", full)
    state = train(photos, tmp_path / "run", "--checkpoint", checkpoint, "--max-steps", 1)
    assert state["progress"]["step"] == 1
    assert capsys.readouterr().out.count("TensorBoard's events cannot be written any more") == 1


def test_without_room_to_fit_them_the_tables_are_those_of_gaussians(photos, checkpoint, tmp_path, monkeypatch, capsys):
    def full(*_, **__):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1099511627776 bytes.")

    monkeypatch.setattr("utils.training.trainer.fit_tables", full)
    train(photos, tmp_path / "run", "--checkpoint", checkpoint, "--max-steps", 1)
    assert "note: coding tables were not fitted: too large for the memory of this machine" in capsys.readouterr().out
    model = load_model(tmp_path / "run" / "model.pth.tar")
    assert encode(model, read_image(photos / "p0.png"), EncodeRequest(1.0)).data


def test_what_users_get_wrong_is_one_line(photos, checkpoint, tmp_path, monkeypatch):
    def fails(text, *more):
        with pytest.raises((cli.UserError, CheckpointError), match=text):
            train(photos, tmp_path / "run", *more)

    fails("--learning-rate must be", "-e", 1, "-lr", -1)
    fails("--max-minutes must be", "--max-minutes", "nan")
    fails("--ema must lie", "-e", 1, "--ema", 2)
    fails("nowhere: no such folder", "-e", 1, "--stage", "static", "--checkpoint", checkpoint, "--teachers", "nowhere")
    picture = sorted(photos.iterdir())[0]
    fails("p0.png: refused: not a checkpoint", "-e", 1, "--checkpoint", picture)
    fails("--stage tables needs a --checkpoint", "--stage", "tables")
    with monkeypatch.context() as patch:
        patch.setenv("WORLD_SIZE", "2")
        fails("leave out torchrun", "--stage", "tables", "--checkpoint", checkpoint)
    (tmp_path / "run").mkdir(exist_ok=True)
    (tmp_path / "run" / "last.pth.tar").write_bytes(Path(checkpoint).read_bytes())
    fails("not the state of a run", "-e", 1, "--resume")


def test_what_is_compiled_is_what_runs(tiny, image, monkeypatch):
    """With gradients and without; a network whose layers were called one by one would not be."""
    used = set()

    def compile_(network, dynamic):
        assert dynamic is False

        def call(*args):
            used.add(network)
            return network._call_impl(*args)

        compiled.append(network)
        network._compiled_call_impl = call

    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", compile_)
    compile_networks(tiny)
    tiny.train()(image, 1.0)
    assert used == set(compiled) and len(compiled) == 5 + 5 * tiny.num_slices
    used.clear()
    with torch.no_grad():
        tiny.eval()(image, 1.0)
    assert used == set(compiled)
