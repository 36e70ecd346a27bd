"""What a run holds out to validate on, and how many processes read for it."""

import argparse
import os

import pytest
from PIL import Image

from utils import cli
from utils.cli.training_arguments import default_workers
from utils.cli.training_run import split


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
