"""Training in several processes, as torchrun starts them (gloo on the CPU)."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from models import DepthConv_VBR
from tests.depthconv.tiny import TINY
from tests.training.runs import ROOT, arguments, recorded_losses, train, wait_for
from utils.checkpoint import export_model, read_checkpoint
from utils.cli import UserError
from utils.distributed import DistContext
from utils.training.objectives import Objective
from utils.training.patches import PatchDataset
from utils.training.schedule import Settings
from utils.training.trainer import Trainer

# train_vbr.py, with the loss of every step printed in full by the first process.
DRIVER = """
import sys
sys.path.insert(0, {root!r})
import train_vbr
from utils import cli
from utils.training.trainer import Trainer
step = Trainer.step
def printed(self):
    values = step(self)
    if self.context.is_main:
        print("loss", values["loss"].hex(), flush=True)
    return values
Trainer.step = printed
cli.run(train_vbr.main)
"""


@pytest.fixture
def start(tmp_path):
    """Start a run in two processes; its output is in the file `output` of the run's folder."""
    (tmp_path / "driver.py").write_text(DRIVER.format(root=str(ROOT)))
    started = []

    def launch(folder: Path, *more) -> subprocess.Popen:
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
        command = [*torchrun, str(tmp_path / "driver.py"), *map(str, more)]
        folder.mkdir()
        with (folder / "output").open("w") as file:
            started.append(subprocess.Popen(command, cwd=tmp_path, stdout=file, stderr=file, start_new_session=True))
        return started[-1]

    yield launch
    for process in started:  # torchrun's own children too, which would go on without it
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def losses(folder: Path) -> list[float]:
    found = re.findall(r"loss (0x[0-9a-f.]+p[+-]\d+)", (folder / "output").read_text())
    return [float.fromhex(number) for number in found]


def test_two_processes_do_what_one_does(photos, tmp_path, start, monkeypatch):
    torch.manual_seed(0)
    export_model(tmp_path / "fresh.pth.tar", DepthConv_VBR(**TINY), [])
    (tmp_path / "held out").mkdir()
    for path in sorted(photos.iterdir())[:3]:  # the first process measures two, the second one
        shutil.copy(path, tmp_path / "held out")
    common = ["--checkpoint", tmp_path / "fresh.pth.tar", "--max-steps", 6, "--val", tmp_path / "held out"]
    # Of these no latent is so near a half that the order of a sum decides how it is rounded.
    common += ["--seed", 2, "--map-share", 0]
    folders = tmp_path / "by1", tmp_path / "by2"
    process = start(folders[1], *arguments(photos, folders[1], *common), "-bs", 2)
    one = recorded_losses(monkeypatch)
    train(photos, folders[0], *common, "-bs", 4)  # here, while the processes start
    assert process.wait(300) == 0, (folders[1] / "output").read_text()[-3000:]
    two = losses(folders[1])
    rows = [json.loads((folder / "validation.jsonl").read_text()) for folder in folders]
    assert all(len(list(folder.glob("events.*"))) == 1 for folder in folders)  # only the first process writes
    assert len(one) == len(two) == 6
    assert two == pytest.approx(one, rel=1e-5)
    assert rows[0]["patches"] == rows[1]["patches"] == 24
    for name in ("bpp", "psnr", "loss"):
        assert rows[1][name] == pytest.approx(rows[0][name], rel=1e-3)
    record = read_checkpoint(folders[1] / "model.pth.tar")["training"][-1]
    assert record["processes"] == 2 and record["settings"]["batch_size"] == 4


def test_a_dead_process_ends_the_run_with_a_message(photos, quick, tmp_path, start):
    folder = tmp_path / "run"
    more = arguments(photos, folder, "--checkpoint", quick, "--max-steps", 100000, "--save-minutes", 0)
    process = start(folder, *more)
    wait_for(lambda: len(losses(folder)) > 2, process)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    assert len(children) == 2
    os.kill(int(children[1]), signal.SIGKILL)
    assert process.wait(60) != 0
    output = (folder / "output").read_text()
    assert "error: another process of this run has ended, or cannot be reached" in output, output[-3000:]
    assert read_checkpoint(folder / "last.pth.tar")["progress"]["step"] > 0


def test_a_signal_reaches_all_processes_at_one_step(photos, quick, tmp_path, start):
    folder = tmp_path / "run"
    more = arguments(photos, folder, "--checkpoint", quick, "--max-steps", 100000, "--save-minutes", 1000)
    process = start(folder, *more)
    wait_for(lambda: len(losses(folder)) > 2, process)
    process.send_signal(signal.SIGTERM)
    process.wait(60)
    step = read_checkpoint(folder / "last.pth.tar")["progress"]["step"]
    assert f"stopped and saved at step {step}" in (folder / "output").read_text()
    assert step == len(losses(folder))


def test_tasks_of_srun_do_not_become_so_many_runs_in_one_folder(monkeypatch):
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "1")
    assert DistContext.from_environment("cpu").world_size == 1
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "8")
    with pytest.raises(UserError, match="srun has started 8 tasks, which do not know of each other: .* torchrun"):
        DistContext.from_environment("cpu")


def test_a_number_of_processes_without_torchrun_is_one_line(monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="WORLD_SIZE is 2, but RANK, .* are not set: start several .* with torchrun"):
        DistContext.from_environment("cpu")
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert DistContext.from_environment("cpu").world_size == 1


@pytest.fixture
def trainer(photos, tmp_path) -> Trainer:
    """Of a tiny network, in one process."""
    dataset = PatchDataset(sorted(photos.iterdir()), (128, 128), seed=0)
    objective = Objective(DepthConv_VBR(**TINY), Settings(batch_size=1, patch_size=(128, 128), max_steps=1))
    return Trainer(objective, dataset, tmp_path / "run", context=DistContext(torch.device("cpu")), validation=())


@pytest.mark.parametrize("other", [{"step": 3}, {"trained_on": "40 photographs"}, {"weights": "00"}])
def test_processes_that_would_train_different_runs_say_so_before_they_begin(trainer, monkeypatch, other):
    """As two machines do whose --save_path or photographs are not the same."""
    monkeypatch.setattr(trainer.context, "world_size", 2)
    monkeypatch.setattr(DistContext, "gather", lambda self, value: [value, value | other])
    (name,) = other
    with pytest.raises(UserError, match=rf"process 1 would train another run than process 0: {name} \(") as told:
        trainer.run()
    assert len(str(told.value).splitlines()) == 1


def test_parameters_that_no_loss_depends_on_are_named_where_processes_would_wait_for_them(trainer, monkeypatch):
    trainer.model.left_over = torch.nn.Linear(1, 1)
    trainer.step()  # alone nothing waits
    trainer.sizes.clear()
    monkeypatch.setattr(trainer.context, "world_size", 2)
    with pytest.raises(UserError, match=r"no loss depends on left_over\.weight, left_over\.bias"):
        trainer.step()


def test_running_statistics_are_refused(trainer, tmp_path):
    trainer.model.g_a.append(torch.nn.BatchNorm2d(trainer.model.M))
    with pytest.raises(ValueError, match=r"running statistics are not averaged: g_a\.\d+"):
        Trainer(trainer.objective, trainer.dataset, tmp_path, context=trainer.context, validation=())


def test_a_layer_without_a_footprint_is_told_before_it_is_trained(trainer, tmp_path):
    trainer.model.g_s.append(torch.nn.Softmax2d())
    with pytest.raises(TypeError, match="no footprint is known of Softmax2d"):
        Trainer(trainer.objective, trainer.dataset, tmp_path, context=trainer.context, validation=())
