"""Runs of train_vbr.py on small photographs, for tests."""

import time
from pathlib import Path

import torch

import train_vbr
from utils.checkpoint import read_checkpoint
from utils.training.trainer import Trainer

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


def wait_for(condition, process=None, seconds=120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it took too long"
        assert process is None or process.poll() is None, "the run ended early"
        time.sleep(0.05)
