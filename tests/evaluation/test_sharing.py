"""Measurements in several processes, as torchrun starts them."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import eval_vbr
import online_training_vbr
from tests.training.runs import ROOT, wait_for

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]


def without_times(file):
    def strip(value):
        if isinstance(value, dict):
            return {k: strip(v) for k, v in value.items() if not re.search("seconds|_time$|^made$", k)}
        return [strip(item) for item in value] if isinstance(value, list) else value

    return strip(json.loads(file.read_text()))


@pytest.mark.parametrize(
    ("script", "options"),
    [(eval_vbr, ["--anchors", "jpeg", "-l", "0", "5"]), (online_training_vbr, ["-t", "2", "-l", "1", "4"])],
    ids=["eval_vbr", "online_training_vbr"],
)
def test_two_processes_find_what_one_does(script, options, photos, quick, tmp_path, capsys):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as torchrun does: sums over threads round differently
    (photos / "p1.png").write_bytes(b"broken")  # shares are of all pictures, and results of those that can be read
    pictures = [str(photos / f"p{i}.png") for i in range(4)]
    common = ["-d", *pictures, "--checkpoint", quick, *options, "--json"]
    command = [*TORCHRUN, f"{script.__name__}.py", *common, str(tmp_path / "two.json")]
    two = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        assert script.main([*common, str(tmp_path / "one.json")]) == 1  # here, while the processes start
    finally:
        torch.set_num_threads(threads)
        told = two.communicate(timeout=300)[1]
    assert two.returncode == 1 and "p1.png" in told and "p1.png" in capsys.readouterr().err, told
    one, two = (without_times(tmp_path / f"{key}.json") for key in ("one", "two"))
    assert len(one["images"]) == 6
    assert one == two


def test_a_dead_process_ends_the_run_with_a_message(photos, quick, tmp_path):
    pictures = [str(photos / f"p{i}.png") for i in range(4)] * 40
    command = [*TORCHRUN, "eval_vbr.py", "-d", *pictures, "--checkpoint", quick, "--real", "--json"]
    with (tmp_path / "output").open("w") as output:
        run = subprocess.Popen(
            [*command, str(tmp_path / "rd.json")], cwd=ROOT, stdout=output, stderr=output, start_new_session=True
        )
    try:
        wait_for(lambda: (tmp_path / "output").read_text().count("weights:"), run)  # the first process has its model
        os.kill(children(run.pid)[-1], signal.SIGKILL)
        assert run.wait(120) != 0
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(run.pid, signal.SIGKILL)
    output = (tmp_path / "output").read_text()
    assert not (tmp_path / "rd.json").exists()
    assert "SIGKILL" in output or "another process of this run has ended" in output


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
