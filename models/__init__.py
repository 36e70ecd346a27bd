"""The networks: `from models import TCM_VBR, DepthConv_VBR, LAE`. They are imported at their first use."""

import importlib
import warnings

from models import lazy
from models.registry import MODULES

lazy.install()

STRIDE = 128  # sides of pictures, padded, are multiples of this: 16 of analysis × the 8 of TCM's attention windows

_PUBLISHED = (  # what else the published models/tcm.py has
    "SCALES_LEVELS", "SCALES_MAX", "SCALES_MIN", "WMSA", "Block", "ConvTransBlock", "SWAtten", "SwinBlock", "conv",
    "conv1x1", "fcn", "find_named_buffer", "find_named_module", "get_scale_table", "mask", "ste_round",
    "update_registered_buffers",
)  # fmt: skip
_HOMES = MODULES | dict.fromkeys(_PUBLISHED, "models.tcm") | {
    "LAE": "models.lae",
    "VariableRate": "models.lae",
    "Codec": "models.codec",
    "TCMConfig": "models.tcm",
    "DepthConvConfig": "models.depthconv",
}
__all__ = ["STRIDE", *sorted(_HOMES)]

warnings.filterwarnings("ignore", message="`torch.jit.script` is deprecated", category=FutureWarning)  # of a package


def __getattr__(name: str) -> object:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
