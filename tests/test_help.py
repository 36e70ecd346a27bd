"""--help of the scripts: it answers at once, as it does without PyTorch, whose import takes seconds."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ["codec_vbr", "eval_vbr", "online_training_vbr", "train_vbr", "train_latent_e2e", "utils.download.__main__"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_does_without_pytorch(script):
    program = f"""
import sys
from {script} import main
try:
    main(["--help"])
except SystemExit as leaving:
    sys.exit(leaving.code or "torch" in sys.modules)
"""
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stderr) == (0, "")
    assert "usage:" in result.stdout
