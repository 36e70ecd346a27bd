"""--help of the scripts: it answers at once, as it does without PyTorch, whose import takes seconds."""

import re
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


def test_help_does_without_docstrings():
    command = [sys.executable, "-OO", "codec_vbr.py", "--help"]
    assert "usage:" in subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout


def test_torchrun_hands_every_option_on(capsys):
    """It looks for its own options in ours too, and takes an ambiguous beginning of them for an error."""
    from torch.distributed.run import get_args_parser

    for script in ("train_vbr.py", "eval_vbr.py", "online_training_vbr.py", "train_latent_e2e.py"):
        text = subprocess.run([sys.executable, script, "--help"], cwd=ROOT, capture_output=True, text=True, check=True)
        options = sorted(set(re.findall(r"(?<!\S)--?[a-z][\w-]*", text.stdout)))
        assert len(options) > 10
        for option in options:
            args = get_args_parser().parse_args(["--nproc-per-node", "2", script, option, "x"])
            assert args.training_script_args == [option, "x"], option
