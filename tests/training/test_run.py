"""What a run holds out to validate on."""

import argparse

import pytest
from PIL import Image

from utils import cli
from utils.training.run import split


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
