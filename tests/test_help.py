"""--help of the modules that are run with `python -m`."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MODULES = ["evaluation.bd_rate", "evaluation.rd_loss", "evaluation.anchors"]
MODULES += [f"benchmarks.{name}" for name in ("speed", "rate_control", "decoding", "training")]


@pytest.mark.parametrize("module", MODULES)
def test_help_does_without_pytorch(module):
    program = f"""
import sys
from utils.{module} import main
try:
    main(["--help"])
except SystemExit as leaving:
    sys.exit(leaving.code or "torch" in sys.modules)
"""
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stderr) == (0, "")
    assert "usage:" in result.stdout
