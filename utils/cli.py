"""What every script does the same way: errors in one line, and the choice of a device."""

import sys
from collections.abc import Callable

import torch

from utils.checkpoint import CheckpointError
from utils.images import ImageError
from utils.memory import keep_freed_memory


class UserError(Exception):
    """Something the user can put right: printed as one line, without a traceback."""


def run(main: Callable[[], int | None]) -> None:
    """Run a script's main and leave with its status: 1 after a user's error, 130 after Ctrl-C."""
    keep_freed_memory()
    try:
        sys.exit(main())
    except (UserError, ImageError, CheckpointError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def pick_device(name: str) -> torch.device:
    """"auto" is CUDA where there is one. UserError if "cuda" is asked for and absent."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: this machine has no CUDA device that PyTorch can use")
    return torch.device(name)
