"""Switches of floating point: as they must be inside `deterministic`, and as they were after it."""

import contextlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import backends

from models.coding import precision
from models.coding.precision import deterministic

ROOT = Path(__file__).resolve().parents[2]
NEW = hasattr(backends, "fp32_precision")
new_switches = pytest.mark.skipif(not NEW, reason="PyTorch 2.9 brought these switches")
SWITCHES = {
    "all": lambda: backends,
    "cudnn": lambda: backends.cudnn,
    "convolutions": lambda: backends.cudnn.conv,
    "matrix products": lambda: backends.cuda.matmul,
    "convolutions on a CPU": lambda: backends.mkldnn.conv,
    "matrix products on a CPU": lambda: backends.mkldnn.matmul,
}


def precisions() -> dict[str, str]:
    return {name: find().fp32_precision for name, find in SWITCHES.items()}


@pytest.fixture
def restored():
    """Leaves the switches as they were."""
    before = [(find(), find().fp32_precision) for find in SWITCHES.values()] if NEW else []
    names = "enabled", "benchmark", "deterministic"
    flags = [(backends.cudnn, name, getattr(backends.cudnn, name)) for name in names]
    yield
    for owner, value in reversed(before):
        owner.fp32_precision = value
    for owner, name, value in flags:
        setattr(owner, name, value)


@new_switches
@pytest.mark.parametrize("switched", SWITCHES)
def test_a_program_that_uses_tf32_decodes_in_float32(restored, switched):
    SWITCHES[switched]().fp32_precision = "tf32"
    backends.cudnn.benchmark = True
    before = precisions()
    assert before[switched] == "tf32"
    with contextlib.suppress(ZeroDivisionError), deterministic():
        assert set(precisions().values()) == {"ieee"}
        with deterministic():
            assert set(precisions().values()) == {"ieee"}
        assert not backends.cudnn.benchmark and backends.cudnn.deterministic
        _ = 1 / 0  # restored after an error too
    assert precisions() == before
    assert backends.cudnn.benchmark and not backends.cudnn.deterministic


@new_switches
def test_a_thread_that_leaves_keeps_the_switches_of_one_that_stays(restored):
    SWITCHES["convolutions"]().fp32_precision = "tf32"
    before = precisions()
    first, second = deterministic(), deterministic()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert set(precisions().values()) == {"ieee"}
    second.__exit__(None, None, None)
    assert precisions() == before


@new_switches
def test_a_switch_that_follows_another_still_does_afterwards():
    """In a new process: whoever has set a switch once has ended its following another."""
    code = """
from torch import backends
from models.coding.precision import deterministic
with deterministic():
    assert backends.cuda.matmul.fp32_precision == "ieee"
backends.fp32_precision = "tf32"
assert backends.cuda.matmul.fp32_precision == "tf32"
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_older_switches_are_restored_too():
    torch.set_float32_matmul_precision("high")
    try:
        for context in (deterministic, precision._full_float32_before_2_9):
            with context():
                if context is not deterministic or not NEW:
                    assert torch.get_float32_matmul_precision() == "highest" and not backends.cudnn.allow_tf32
            assert torch.get_float32_matmul_precision() == "high" and backends.cudnn.allow_tf32
    finally:
        torch.set_float32_matmul_precision("highest")
