"""The networks by name, and the presets: a new backbone is a line in each.

A variable-rate codec has the name of its fixed-rate one and _VBR.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from models.codec import Codec

BACKBONES = {  # a fixed-rate class and its module
    "TCM": "models.tcm",
    "DepthConv": "models.depthconv",
    "Hyperprior": "models.hyperprior",
}
MODULES = {name + form: module for name, module in BACKBONES.items() for form in ("", "_VBR")}
MODULES["TCM_Mapped"] = "models.latent_map"
PRESETS: dict[str, tuple[str, dict]] = {  # a fixed-rate class and the arguments that are not its defaults
    "depthconv": ("DepthConv", {"context_model": 1}),
    "full": ("TCM", {"N": 64}),  # the smallest of the published models
    "hyperprior": ("Hyperprior", {}),  # CompressAI's mbt2018-mean, qualities 1 to 4
    "small": ("TCM", dict(
        head_dim=(8, 16, 16, 16, 16, 8), N=32, M=192, num_slices=4, max_support_slices=4, hyper_channels=128,
        inter_dim=64, slice_widths=(128, 96),
    )),
}


def model_class(name: str) -> "type[Codec]":
    """The class of a name. ValueError for a name that no backbone has."""
    if name not in MODULES:
        raise ValueError(f"a model {name!r} is not known here; known are {', '.join(MODULES)}")
    return getattr(importlib.import_module(MODULES[name]), name)


def recognize(state_dict: dict) -> "type[Codec]":
    """The class that a state dict belongs to, by its names, whatever their prefix.

    Raises:
        ValueError: none is known that has them.
    """
    from models.state_dict import normalize

    names = normalize(state_dict)
    if any(name.startswith("map.") for name in names):
        return model_class("TCM_Mapped")
    causes = []
    for name in BACKBONES:
        cls = model_class(name)
        try:
            cls.Config.infer(names)
        except (ValueError, KeyError) as error:
            causes.append(str(error))
        else:
            return variable_rate(cls) if any(name.startswith("modnet_") for name in names) else cls
    raise ValueError("; ".join(causes))


def is_backbone(cls: "type[Codec]") -> bool:
    """Whether a class has a fixed-rate and a variable-rate form."""
    return cls.__name__.removesuffix("_VBR") in BACKBONES


def fixed_rate(cls: "type[Codec]") -> "type[Codec]":
    """The fixed-rate codec of a class of either kind."""
    return model_class(cls.__name__.removesuffix("_VBR"))


def variable_rate(cls: "type[Codec]") -> "type[Codec]":
    """The variable-rate codec of a class of either kind."""
    return model_class(cls.__name__.removesuffix("_VBR") + "_VBR")


def from_preset(preset: str, variable: bool = True, **changes) -> "Codec":
    """A new model of a preset, with some arguments changed. ValueError where they do not fit together."""
    name, arguments = PRESETS[preset]
    cls = model_class(name)
    return (variable_rate(cls) if variable else cls)(**{**arguments, **changes})
