import re

import pytest

from utils.benchmarks import memory
from utils.cli import UserError


def test_sizes_are_coded_each_in_a_process(quick, photos, capsys):
    memory.main(["--sizes", "130x40", "--checkpoint", quick, "-d", str(photos / "p0.png"), "--options", "-l", "1"])
    lines = capsys.readouterr().out.splitlines()
    peaks = [int(re.search(r"(\d+) MiB", line)[1]) for line in lines[1:]]
    assert [line.split()[1] for line in lines[1:]] == ["encode", "decode"] and all(100 < peak < 4000 for peak in peaks)


def test_what_fails_is_said(quick, tmp_path, capsys):
    with pytest.raises(UserError, match=r"encode ended with 2.*--target-bpp"):
        memory.main(["--sizes", "8x8", "--checkpoint", quick, "--options", "--target-bpp", "-1"])
    with pytest.raises(SystemExit):
        memory.main(["--sizes", "8by8"])
