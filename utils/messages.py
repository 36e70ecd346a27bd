"""Lines on stderr, which do not break a progress bar."""

import sys
from pathlib import Path

from tqdm import tqdm

_said_once: set[str] = set()


def print_error(path: str | Path, error: Exception | str) -> None:
    """Print one line on stderr that names the file and the cause."""
    text = str(error)
    named = text.startswith(f"{path}:") or repr(str(path)) in text  # as our errors do, and those of Python
    tqdm.write(f"error: {text}" if named else f"error: {path}: {text}", file=sys.stderr)


def print_note(path: str | Path, text: str, once: bool = False) -> None:
    """Print one line on stderr about a file that is used all the same; with once, the same text is printed once."""
    if not (once and text in _said_once):
        tqdm.write(f"note: {path}: {text}", file=sys.stderr)
    if once:
        _said_once.add(text)


def print_weights(checkpoint: str | Path) -> None:
    """Say on stderr which weights a script uses, so that a user sees whether a file put into `vbr_models/` is used."""
    print(f"weights: {checkpoint}", file=sys.stderr)
