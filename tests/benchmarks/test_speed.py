import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from models.registry import from_preset
from utils.benchmarks import decoding, rate_control, speed, training
from utils.benchmarks.common import count_macs


def test_every_part_is_printed(capsys):
    speed.main(["--width", "128", "--height", "128", "--runs", "1"])
    output = capsys.readouterr().out
    for part in ("analysis + synthesis", "slices", "to bytes", "from bytes", "peak memory", "matrix product"):
        assert part in output


@pytest.mark.parametrize(
    ("main", "arguments"),
    [
        (speed.main, ["--width", "0"]),
        (speed.main, ["--threads", "-1"]),
        (rate_control.main, ["--targets", "0"]),
        (decoding.main, ["-l", "8"]),
        (training.main, ["-bs", "1.5"]),
        (speed.main, ["--runs", "inf"]),
    ],
)
def test_numbers_that_cannot_be_are_refused_in_a_line(main, arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2 and f"argument {arguments[0]}" in capsys.readouterr().err


def test_usage_is_as_the_module_is_run():
    command = [sys.executable, "-m", "utils.benchmarks.speed", "--help"]
    told = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=True).stdout
    assert told.startswith("usage: python -m utils.benchmarks.speed [")


def test_operations_are_those_of_the_layers(capsys):
    """A convolution's by hand, the matrix product's 2048³, and in the table those of the network."""
    conv = torch.nn.Conv2d(3, 8, 5, padding=2)
    assert count_macs(lambda: conv(torch.zeros(1, 3, 10, 12))) == 10 * 12 * 8 * 3 * 25
    for layer in (conv, torch.nn.Conv2d(3, 6, 3, stride=2, groups=3), torch.nn.ConvTranspose2d(3, 6, 3, groups=3)):
        for gradient in (False, True):
            x = torch.zeros(1, 3, 11, 13, requires_grad=gradient)
            forward = count_macs(lambda layer=layer, x=x: layer(x))
            both = count_macs(lambda layer=layer, x=x: layer(x).sum().backward())
            assert both == (3 if gradient else 2) * forward
    speed.main(["--preset", "depthconv", "--width", "256", "--height", "128", "--runs", "1"])
    printed = dict(re.findall(r"^(\S.*?)  +[\d.]+ +([\d.]+) +[\d.]+ +\d+%", capsys.readouterr().out, re.M))
    assert float(printed["float32 matrix product"]) == 8.6
    C, hidden, M = 192, 384, 320
    blocks = 5 * (2 * C * C + 9 * C + 3 * C * hidden) * 32 * 16 + (2 * M * M + 9 * M + 3 * M * 2 * M) * 16 * 8
    lae = count_macs(lambda: from_preset("depthconv").modnet_ga(torch.zeros(1, M, 8, 16), torch.zeros(1)))
    analysis = blocks + 192 * C * 32 * 16 + 9 * C * M * 16 * 8 + lae
    assert abs(float(printed["analysis"]) - analysis / 1e9) < 0.06
