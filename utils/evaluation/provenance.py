"""The origin of results."""

import datetime
import platform
import shlex
import sys
from importlib.metadata import version
from pathlib import Path

from models import Codec
from utils.device import processor
from utils.distributed import DistContext

PACKAGES = ("torch", "numpy", "compressai", "pillow", "pytorch-msssim")


def origin(checkpoint: str, model: Codec) -> dict:
    """Which weights results are of, in plain values."""
    return {"file": Path(checkpoint).name, "fingerprint": model.fingerprint.hex()}


def provenance(argv: list[str] | None, context: DistContext) -> dict:
    """The command, the date, the versions and the machine that results come from, in plain values.

    Args:
        argv: what a script's `main` got; None where it was started from the command line.
    """
    command = [Path(sys.argv[0]).name, *(sys.argv[1:] if argv is None else argv)]
    return {
        "command": f"python {shlex.join(command)}",
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
        "machine": processor(context.device),
        "processes": context.world_size,
    }
