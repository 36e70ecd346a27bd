"""What goes wrong in a run: values, disks, memory, and commands."""

import json
import math
from pathlib import Path

import pytest
import torch

import train_vbr
from models.state_dict import without_tables
from tests.training.runs import arguments, same, train
from utils import cli
from utils.checkpoint import CheckpointError, build_model, load_model, read_checkpoint
from utils.codec.encode import encode
from utils.codec.request import EncodeRequest
from utils.images import read_image
from utils.training import trainer
from utils.training.objectives import Objective
from utils.training.trainer import Trainer


def poison(monkeypatch, steps) -> None:
    forward = Objective.forward

    def poisoned(self, x, rate_uniform, noise):
        poisoned.calls += 1
        return forward(self, x * float("nan") if poisoned.calls in steps else x, rate_uniform, noise)

    poisoned.calls = 0
    monkeypatch.setattr(Objective, "forward", poisoned)


def test_a_step_that_is_not_finite_is_skipped(photos, quick, tmp_path, monkeypatch, capsys):
    poison(monkeypatch, {1})
    monkeypatch.setattr(Trainer, "validate", lambda self, last=False: None)
    state = train(photos, tmp_path / "one", "--checkpoint", quick, "--max-steps", 1)
    before = without_tables(load_model(quick).state_dict())
    assert state["progress"]["skipped"] == 1
    assert "step 1: loss or gradient not finite, skipped" in capsys.readouterr().out
    assert same(state["state_dict"], before)
    state = train(photos, tmp_path / "one", "--checkpoint", quick, "--max-steps", 2, "--resume")
    assert state["progress"]["skipped_in_a_row"] == 0
    assert not same({k: v for k, v in before.items() if k == "g_a.1.weight"}, state["state_dict"])


def test_ten_in_a_row_end_the_run_with_the_last_good_checkpoint(photos, quick, tmp_path, monkeypatch):
    poison(monkeypatch, set(range(3, 100)))
    more = ["--checkpoint", quick, "--max-steps", 100, "--save-minutes", 0, "-bs", 1]
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


def test_no_clipping_is_not_no_training(photos, quick, tmp_path):
    state = train(photos, tmp_path / "run", "--checkpoint", quick, "--max-steps", 1, "--clip_max_norm", 0)
    before = load_model(quick).state_dict()
    assert not torch.equal(state["state_dict"]["g_s.1.weight"], before["g_s.1.weight"])


def test_a_step_without_memory_is_told_in_a_line(photos, quick, tmp_path, monkeypatch):
    def step(trainer):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(Trainer, "step", step)
    with pytest.raises(cli.UserError, match="not enough memory for a step: a smaller --batch-size"):
        train(photos, tmp_path / "run", "--checkpoint", quick, "--max-steps", 1)


def test_options_are_not_abbreviated(photos, tmp_path, capsys):
    """--lr was taken for the published --lr_epoch, which has no meaning, and the run had the default rate."""
    args = train_vbr.parse(arguments(photos, tmp_path, "--lr", 1e-3))
    assert args.learning_rate == 1e-3 and "--lr_epoch" not in capsys.readouterr().err
    with pytest.raises(SystemExit):
        train_vbr.parse(arguments(photos, tmp_path, "--learn", 1e-3))


def test_a_file_in_place_of_the_folder_is_told_before_the_work(photos, quick, tmp_path, monkeypatch):
    (tmp_path / "run").write_text("")
    monkeypatch.setattr("utils.pictures.find_images", lambda *_: pytest.fail("the work has begun"))
    for more in (["-e", 1], ["--stage", "tables", "--checkpoint", quick]):
        with pytest.raises(NotADirectoryError, match="is no folder.*run"):
            train_vbr.main(arguments(photos, tmp_path / "run", *more))
    assert (tmp_path / "run").read_text() == ""


def test_a_picture_is_not_worth_a_run(photos, quick, tmp_path, capsys):
    (tmp_path / "run" / "curves.png").mkdir(parents=True)  # cannot be written
    state = train(photos, tmp_path / "run", "--checkpoint", quick, "--max-steps", 1)
    assert state["progress"]["step"] == 1
    assert capsys.readouterr().out.count("note: the curves cannot be drawn") == 1


def test_validations_are_strict_json(photos, quick, tmp_path, monkeypatch):
    monkeypatch.setattr("utils.training.objectives.psnr_of_mse", lambda mse: mse * math.inf)
    train(photos, tmp_path / "run", "--checkpoint", quick, "--max-steps", 1)
    text = (tmp_path / "run" / "validation.jsonl").read_text()
    assert json.loads(text, parse_constant=pytest.fail)["psnr"] == [None] * 6


def test_tensorboard_is_not_worth_a_run(photos, quick, tmp_path, monkeypatch, capsys):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("utils.training.log.SummaryWriter.add_scalar", full)
    state = train(photos, tmp_path / "run", "--checkpoint", quick, "--max-steps", 1)
    assert state["progress"]["step"] == 1
    assert capsys.readouterr().out.count("TensorBoard's events cannot be written any more") == 1


def test_without_room_to_fit_them_the_tables_are_those_of_gaussians(photos, quick, tmp_path, monkeypatch, capsys):
    def full(*_, **__):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1099511627776 bytes.")

    monkeypatch.setattr("utils.training.trainer.fit_tables", full)
    train(photos, tmp_path / "run", "--checkpoint", quick, "--max-steps", 1)
    assert "note: coding tables were not fitted: too large for the memory of this machine" in capsys.readouterr().out
    model = load_model(tmp_path / "run" / "model.pth.tar")
    assert encode(model, read_image(photos / "p0.png"), EncodeRequest(1.0)).data


def test_what_users_get_wrong_is_one_line(photos, quick, tmp_path, monkeypatch):
    def fails(text, *more):
        with pytest.raises((cli.UserError, CheckpointError), match=text):
            train(photos, tmp_path / "run", *more)

    fails("--learning-rate must be", "-e", 1, "-lr", -1)
    fails("--max-minutes must be", "--max-minutes", "nan")
    fails("--ema must lie", "-e", 1, "--ema", 2)
    fails("nowhere: no such folder", "-e", 1, "--stage", "static", "--checkpoint", quick, "--teachers", "nowhere")
    picture = sorted(photos.iterdir())[0]
    fails("p0.png: refused: not a checkpoint", "-e", 1, "--checkpoint", picture)
    fails("--stage tables needs a --checkpoint", "--stage", "tables")
    with monkeypatch.context() as patch:
        patch.setenv("WORLD_SIZE", "2")
        fails("leave out torchrun", "--stage", "tables", "--checkpoint", quick)
    (tmp_path / "run").mkdir(exist_ok=True)
    (tmp_path / "run" / "last.pth.tar").write_bytes(Path(quick).read_bytes())
    fails("not the state of a run", "-e", 1, "--resume")
