"""Leaving a run and coming back: signals, states, and what differs from the run that is resumed."""

import json
import os
import resource
import shutil
import signal
import time
from pathlib import Path

import pytest
from PIL import Image

import train_vbr
from tests.training.runs import arguments, recorded_losses, same, train, wait_for
from utils import cli
from utils.checkpoint import build_model, load_model, read_checkpoint
from utils.training.signals import answered_signals
from utils.training.trainer import Trainer

STEPS = 24  # enough to be killed among them


@pytest.fixture(scope="module")
def uninterrupted(made_photos, quick, tmp_path_factory) -> tuple[dict, list[float]]:
    """What a run of so many steps ends with, and the loss of every step."""
    with pytest.MonkeyPatch.context() as patch:
        losses = recorded_losses(patch)
        state = train(made_photos, tmp_path_factory.mktemp("run"), "--checkpoint", quick, "--max-steps", STEPS)
    return state, losses


def test_a_resumed_run_is_the_uninterrupted_one(photos, quick, tmp_path, uninterrupted, losses, monkeypatch):
    whole, expected = uninterrupted
    more = ["--checkpoint", shutil.copy(quick, tmp_path / "start"), "--max-steps", STEPS]
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
    assert whole["progress"]["step"] == parts["progress"]["step"] == STEPS


def test_killed_at_any_moment_a_run_goes_on_exactly(photos, quick, tmp_path, uninterrupted, losses, start):
    whole, expected = uninterrupted
    more = ["--checkpoint", quick, "--max-steps", STEPS]
    killed = start(tmp_path / "killed", *arguments(photos, tmp_path / "killed", *more), "--save-minutes", 0)
    last = tmp_path / "killed" / "last.pth.tar"
    wait_for(last.exists, killed)
    time.sleep(0.3)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    done = read_checkpoint(last)["progress"]["step"]
    assert 0 < done < STEPS
    parts = train(photos, tmp_path / "killed", *more, "--resume")
    assert losses == expected[done:]
    assert same(whole["state_dict"], parts["state_dict"]) and same(whole["ema"], parts["ema"])
    steps = [json.loads(line)["step"] for line in (tmp_path / "killed" / "validation.jsonl").read_text().splitlines()]
    assert steps == [STEPS]


def test_a_signal_saves_and_ends_in_peace(photos, quick, tmp_path, start):
    more = ["--checkpoint", quick, "--max-steps", 100000, "--save-minutes", 1000, "--cache-gb", 0, "-n", 1]
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


@pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="there is no SIGUSR1 here")
def test_the_warning_of_a_batch_system_stops_a_run():
    stopped, before = [], signal.getsignal(signal.SIGUSR1)
    with answered_signals(stopped.append, lambda: None):
        os.kill(os.getpid(), signal.SIGUSR1)
    assert stopped == [signal.SIGUSR1] and signal.getsignal(signal.SIGUSR1) == before


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="children are found in /proc")
def test_a_reader_that_is_killed_ends_the_run_in_a_line_and_saves_it(photos, quick, tmp_path, start):
    """Whatever the run is doing: PyTorch raises the death of a reader within a step."""
    run = tmp_path / "run"
    more = ["--max-steps", 100000, "--save-minutes", 1000, "--cache-gb", 0, "-n", 1]
    process = start(run, *arguments(photos, run, "--checkpoint", quick, *more))
    wait_for(lambda: "%, step " in (run / "output").read_text(), process)
    (reader,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(reader), signal.SIGKILL)
    assert process.wait(60) == 1
    output = (run / "output").read_text()
    assert "error: the readers of photographs are stuck or gone (" in output and "--resume" in output
    assert "Traceback" not in output
    assert read_checkpoint(run / "last.pth.tar")["progress"]["step"] >= 1


def test_one_command_begins_a_run_and_goes_on_with_it(photos, quick, tmp_path):
    """As batch systems repeat it when they put a job back into their queue."""
    for steps in (1, 2):
        state = train(photos, tmp_path / "run", "--checkpoint", quick, "--resume", "auto", "--max-steps", steps)
        assert state["progress"]["step"] == steps
    with pytest.raises(cli.UserError, match="nothing to resume"):
        train(photos, tmp_path / "other", "--checkpoint", quick, "--resume", "--max-steps", 1)


@pytest.mark.skipif(not hasattr(signal, "SIGCONT"), reason="there is no SIGSTOP here")
def test_a_suspended_run_does_not_spend_its_budget(photos, quick, tmp_path, start):
    run = tmp_path / "run"
    process = start(run, *arguments(photos, run, "--checkpoint", quick, "--max-steps", 100000))
    wait_for(lambda: "weights: " in (run / "output").read_text(), process)
    begin = time.monotonic()
    wait_for(lambda: "%, step " in (run / "output").read_text(), process)
    os.killpg(process.pid, signal.SIGSTOP)
    trained = time.monotonic() - begin  # at most
    time.sleep(trained + 3)  # longer than saving may take
    os.killpg(process.pid, signal.SIGCONT)
    resumed = time.monotonic()
    time.sleep(1)
    os.killpg(process.pid, signal.SIGTERM)
    assert process.wait(60) == 128 + signal.SIGTERM
    trained += time.monotonic() - resumed
    assert 0 < read_checkpoint(run / "last.pth.tar")["progress"]["seconds"] < trained


def test_the_state_of_a_run_is_weights_too(photos, quick, tmp_path, capsys):
    """With the coding tables of its own weights, and its own record: those it started from are stale."""
    state = train(photos, tmp_path / "run", "--checkpoint", quick, "--max-steps", 2, "-lr", 0.01, "--ema", 0)
    model, expected = load_model(tmp_path / "run" / "last.pth.tar"), build_model(state, "last.pth.tar")
    expected.update(force=True)
    assert model.fingerprint == expected.fingerprint != load_model(quick).fingerprint
    assert [record["step"] for record in state["training"]] == [2]
    again = train(photos, tmp_path / "run", "--checkpoint", quick, "--max-steps", 3, "--resume")
    more = ["--checkpoint", tmp_path / "run" / "last.pth.tar", "--max-steps", 1, "--type", "ms-ssim", "--val-size", 256]
    for path in photos.iterdir():
        Image.open(path).resize((256, 256)).save(path)
    third = train(photos, tmp_path / "more", *more, "--patch-size", 256)
    assert [[record["step"] for record in run["training"]] for run in (again, third)] == [[3], [3, 1]]
    assert "trained for mse, and trained on for ms-ssim" in capsys.readouterr().err


def test_a_run_that_is_stopped_tells_that_its_weights_are_older(photos, quick, tmp_path, monkeypatch, capsys):
    step = Trainer.step

    def stopped(self):
        values = step(self)
        self.all_stop = self.progress.step == 2
        return values

    monkeypatch.setattr(Trainer, "step", stopped)
    more = ["--checkpoint", quick, "--max-steps", 3, "--validate-minutes", 0]
    train(photos, tmp_path / "run", *more)
    assert "model.pth.tar (of the last validation, so older" in capsys.readouterr().out
    train(photos, tmp_path / "run", *more, "--resume")
    assert "model.pth.tar\n" in capsys.readouterr().out


def test_a_full_disk_leaves_the_last_good_checkpoint(photos, quick, tmp_path):
    train(photos, tmp_path / "run", "--checkpoint", quick, "--max-steps", 1)
    before = (tmp_path / "run" / "last.pth.tar").read_bytes()
    more = arguments(photos, tmp_path / "run", "--checkpoint", quick, "--max-steps", 2, "--resume")
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


def test_a_run_of_another_stage_is_not_resumed_and_changes_are_told(photos, quick, tmp_path, capsys):
    more = ["--stage", "base", "--checkpoint", quick]
    train(photos, tmp_path / "run", *more, "--max-steps", 1)
    with pytest.raises(cli.UserError, match="holds another run: lambda 0.05, not 0.0025"):
        train(photos, tmp_path / "run", *more, "--max-steps", 2, "--lambda", 0.0025, "--resume")
    with pytest.raises(cli.UserError, match="another network than --preset"):
        train(photos, tmp_path / "run", "--stage", "base", "--preset", "small", "--max-steps", 2, "--resume")
    train(photos, tmp_path / "run", *more, "--max-steps", 2, "--resume", "-lr", 5e-5)
    assert "learning_rate was 0.0002 in this run and is 5e-05 from here on" in capsys.readouterr().out


def test_resuming_with_another_batch_size_and_a_torn_line(photos, quick, tmp_path, capsys):
    held_out, *others = sorted(photos.iterdir())
    for path in others[3:]:
        path.unlink()
    more = ["--checkpoint", quick, "--val", held_out]
    state = train(photos, tmp_path / "run", *more, "-e", 2, "-bs", 1)
    assert state["progress"]["step"] == 6
    with (tmp_path / "run" / "validation.jsonl").open("a") as file:
        file.write('{"step": 1')
    state = train(photos, tmp_path / "run", *more, "-e", 4, "-bs", 4, "--aux-learning-rate", 0.5, "--resume")
    assert state["progress"]["patches"] == 14 and state["progress"]["step"] == 8
    assert "batch_size was 1 in this run and is 4 from here on" in capsys.readouterr().out
    assert state["optimizers"]["aux"]["param_groups"][0]["lr"] == 0.5
    assert [json.loads(line)["step"] for line in (tmp_path / "run" / "validation.jsonl").open()] == [6, 8]


def test_what_differs_from_the_run_that_is_resumed_is_said(photos, quick, tmp_path, capsys):
    more = ["--checkpoint", quick, "--val", photos / "p0.png"]
    train(photos, tmp_path / "run", *more, "--max-steps", 1)
    train(photos, tmp_path / "run", *more, "--max-steps", 2, "--resume")
    assert "ed_on was" not in capsys.readouterr().out
    with pytest.raises(cli.UserError, match="this run began with .*quick.pth.tar, and --resume goes on from its own"):
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
