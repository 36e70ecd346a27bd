"""What every script does the same way: errors in one line, and the choice of a device."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from utils.errors import UserError
from utils.memory import keep_freed_memory
from utils.pixels import find_images

if TYPE_CHECKING:
    import torch

# Photographs in every scikit-image wheel; nothing is downloaded.
SAMPLES = ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg")


class Formatter(argparse.ArgumentDefaultsHelpFormatter):
    """Help with defaults, where there are any and the text does not tell them itself."""

    def _get_help_string(self, action: argparse.Action) -> str:
        told = action.default is None or action.default is False or "default" in (action.help or "")
        return action.help if told else super()._get_help_string(action)


def run(main: Callable[[], int | None]) -> None:
    """Run a script's main and leave with its status: 1 after a user's error, 130 after Ctrl-C."""
    keep_freed_memory()
    try:
        sys.exit(main())
    except (UserError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def complain(path: str | Path, error: Exception | str) -> None:
    """One line on stderr, beside progress bars, that names the file and the cause."""
    text = str(error)
    tqdm.write(f"error: {text}" if str(path) in text else f"error: {path}: {text}", file=sys.stderr)


def pick_device(name: str) -> "torch.device":
    """"auto" is CUDA where there is one. UserError if "cuda" is asked for and absent."""
    import torch  # here: it takes seconds, and not all that a script does needs it

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: this machine has no CUDA device that PyTorch can use")
    return torch.device(name)


def pictures(data: list[str] | None) -> list[Path]:
    """Pictures among files and folders; scikit-image's photographs, as installed, where none are given."""
    if data:
        return find_images(data)
    try:
        import skimage
    except ImportError:
        raise UserError("no -d given, and scikit-image, whose photographs are the default, is missing") from None
    folder = Path(skimage.__file__).parent / "data"
    return find_images(folder / name for name in SAMPLES)


def stem(path: str) -> str:
    """A file's name without its suffixes: tcm_vbr_small of tcm_vbr_small.pth.tar."""
    return Path(path).name.split(".")[0]
