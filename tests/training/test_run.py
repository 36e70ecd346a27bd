"""What a run holds out to validate on, how many processes read for it, and what it takes over or tells."""

import argparse
import os

import pytest
from PIL import Image

from utils import cli
from utils.cli.training_arguments import default_workers
from utils.cli.training_run import split, take_over, tell_short_budget
from utils.training.schedule import Settings


def test_the_first_usable_photograph_is_held_out(photos):
    """A thumbnail, a broken file or a file of macOS that sorts first does not leave a run without validation."""
    Image.new("RGB", (64, 64)).save(photos / "000_thumb.png")
    (photos / "001_broken.png").write_bytes(b"no picture")
    (photos / "._p0.png").write_bytes(b"\0\5\x16\7")
    paths, held_out = split(argparse.Namespace(dataset=[photos], val=None), 128)
    assert [path.name for path in held_out] == ["p0.png"]
    assert photos / "p0.png" not in paths and photos / "p1.png" in paths
    with pytest.raises(cli.UserError, match="no photograph of 512×512 pixels or more"):
        split(argparse.Namespace(dataset=[photos], val=None), 512)


@pytest.mark.parametrize(("cores", "processes", "expected"), [(2, None, 2), (64, None, 16), (16, 8, 2), (4, 8, 1)])
def test_readers_share_the_cores(monkeypatch, cores, processes, expected):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)), raising=False)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    if processes:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    assert default_workers() == expected


def test_a_run_resumed_by_other_processes_keeps_what_each_has_in_a_step_of_its_last_part():
    state = {"settings": {"last_batch_size": 64}, "training": [{}, {"processes": 8}]}
    args = argparse.Namespace(last_batch_size=None, batch_size=32)
    take_over(args, state, world_size=2)
    assert args.last_batch_size == 8


@pytest.mark.parametrize("budget", [{"max_steps": 100}, {"max_patches": 800}])
def test_a_warm_up_that_fills_the_budget_is_told(capsys, budget):
    tell_short_budget(Settings(learning_rate=1.0, batch_size=8, **budget))
    assert "too long for a budget of 100 steps, in which the learning rate reaches 0.13\n" in capsys.readouterr().err


def test_a_budget_of_less_than_a_step_is_one_step(capsys):
    tell_short_budget(Settings(max_patches=5, batch_size=8))
    assert "a budget of 1 steps" in capsys.readouterr().err


@pytest.mark.parametrize("budget", [{"max_steps": 1000}, {"max_minutes": 1}])
def test_a_warm_up_that_does_not_is_not_told(capsys, budget):
    tell_short_budget(Settings(learning_rate=1.0, batch_size=8, **budget))
    assert capsys.readouterr().err == ""
