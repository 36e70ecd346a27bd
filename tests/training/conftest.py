"""Fixtures of runs: processes, and losses."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.training.runs import ROOT, recorded_losses


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


@pytest.fixture
def losses(monkeypatch) -> list[float]:
    return recorded_losses(monkeypatch)
