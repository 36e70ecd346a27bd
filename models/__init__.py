"""The networks: `from models import TCM, TCM_VBR, LAE`. They are imported when they are first asked for."""

import importlib
import warnings

STRIDE = 128  # sides of pictures, padded, are multiples of this: 16 of analysis × the 8 of its attention windows

__all__ = ["LAE", "STRIDE", "TCM", "TCM_VBR", "TCMConfig"]

warnings.filterwarnings("ignore", message="`torch.jit.script` is deprecated", category=FutureWarning)  # of a package


def __getattr__(name: str) -> object:
    """PyTorch takes seconds to import, and reading a file's header (`codec_vbr.py info`) does without it."""
    if name in ("LAE", "TCM", "TCM_VBR", "TCMConfig"):
        return getattr(importlib.import_module("models.tcm"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
