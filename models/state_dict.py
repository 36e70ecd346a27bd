"""State dicts of published and own checkpoints: bring them to one form, explain a mismatch, infer the sizes."""

import re

import torch
from compressai.entropy_models import EntropyModel
from compressai.models.utils import remap_old_keys
from torch import Tensor, nn

from models.config import TCMConfig

# Constants of the layers. A model keeps those it was made with: a float16 file has them rounded, some to zero.
_CONSTANTS = (".pedestal", ".bound", ".target", ".scale_bound")
_TABLES = ("._offset", "._quantized_cdf", "._cdf_length", ".scale_table")


_KNOWN = "g_a.0.conv1.weight"  # a name that every TCM has


def find_state_dict(checkpoint: dict) -> dict:
    """The state dict in a checkpoint: itself, or under one of the names that training scripts use."""
    for name in ("ema", "state_dict", "model_state_dict", "model", "network", "net"):
        found = checkpoint.get(name)
        if isinstance(found, dict) and any(str(key).endswith(_KNOWN) for key in found):
            return found
    return checkpoint


def normalize(state_dict: dict, model: nn.Module | None = None) -> dict[str, Tensor]:
    """A state dict with the names that the models here have.

    Prefixes (`module.` of DataParallel, `_orig_mod.` of torch.compile, `model.` of Lightning, …) are removed with all
    that has none, and CompressAI's old bottleneck names (`_matrix0`) are replaced.
    With a model, its constants are filled in, and a set of coding tables that is incomplete, or was rounded to
    float16, becomes empty, to be computed by `update()`.

    Raises:
        ValueError: it is not a state dict at all.
    """
    tensors = {name: value for name, value in dict(state_dict).items() if isinstance(value, Tensor)}
    if not tensors:
        raise ValueError("not a state dict: a non-empty mapping of names to tensors is expected")
    prefix = next((name.removesuffix(_KNOWN) for name in tensors if name.endswith(_KNOWN)), "")
    state_dict = {name.removeprefix(prefix): tensors[name] for name in tensors if name.startswith(prefix)}
    state_dict = dict(remap_old_keys("entropy_bottleneck", state_dict))
    if model is None:
        return state_dict
    own = model.state_dict()
    state_dict |= {name: value for name, value in own.items() if name.endswith(_CONSTANTS)}
    for name, module in model.named_modules():
        if isinstance(module, EntropyModel):
            tables = [name + table for table in _TABLES if name + table in own]
            found = [state_dict[table] for table in tables if table in state_dict]
            if len(found) < len(tables) or any(t.numel() == 0 or t.dtype == torch.float16 for t in found):
                state_dict |= {table: own[table].new_empty(0) for table in tables}
    return state_dict


def without_tables(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dict with empty coding tables, to be computed by `update()`: those of weights that change are stale."""
    return {name: value.new_empty(0) if name.endswith(_TABLES) else value for name, value in state_dict.items()}


def empty_tables(model: nn.Module) -> None:
    """Empty the coding tables of a model, so that those of a file fit whatever their sizes."""
    for name, buffer in list(model.named_buffers()):
        if name.endswith(_TABLES):
            module, _, table = name.rpartition(".")
            setattr(model.get_submodule(module), table, buffer.new_empty(0))


def explain_mismatch(state_dict: dict[str, Tensor], model: nn.Module) -> str:
    """One line that names what does not fit the model; empty where everything does."""
    own = {name: value.shape for name, value in model.state_dict().items() if not name.endswith(_TABLES)}
    given = {name: value.shape for name, value in state_dict.items() if not name.endswith(_TABLES)}
    shapes = [
        f"{name} is {list(given[name])}, not {list(own[name])}"
        for name in own.keys() & given.keys()
        if given[name] != own[name]
    ]
    found = {"missing": own.keys() - given.keys(), "unknown": given.keys() - own.keys(), "shape": shapes}
    return "; ".join(
        f"{len(names)} {what}: {', '.join(sorted(names)[:3])}{', …' if len(names) > 3 else ''}"
        for what, names in found.items()
        if names
    )


def infer_config(state_dict: dict[str, Tensor]) -> TCMConfig:
    """Architecture of the TCM or TCM_VBR that a (normalized) state dict belongs to.

    Two values leave no trace in the weights and get their defaults: the drop-path rate, and the head width of a
    stage without blocks. max_support_slices = num_slices is found as num_slices − 1, which is the same network.

    Raises:
        ValueError: names that every TCM has are missing.
    """
    try:
        N = state_dict["g_a.0.conv1.weight"].shape[0] // 2
        M = state_dict["h_a.0.conv1.weight"].shape[1]
        num_slices = 1 + max(_numbers(state_dict, r"cc_mean_transforms\.(\d+)\."))
        first, last = (state_dict[f"cc_mean_transforms.{i}.0.weight"] for i in (0, num_slices - 1))
        supports = (last.shape[1] - M) // (M // num_slices)
        inter = state_dict.get("atten_mean.0.0.in_conv.weight")
        stages = _stages(state_dict, "g_a") + _stages(state_dict, "g_s")
        return TCMConfig(
            config=[count for count, _ in stages],
            head_dim=[N // heads for _, heads in stages],
            N=N,
            M=M,
            num_slices=num_slices,
            max_support_slices=supports,
            hyper_channels=state_dict["entropy_bottleneck.quantiles"].shape[0],
            inter_dim=None if inter is None else inter.shape[0],
            slice_widths=[first.shape[0], state_dict["cc_mean_transforms.0.2.weight"].shape[0]],
        )
    except (KeyError, ValueError, IndexError, ZeroDivisionError) as error:
        cause = f"no {error.args[0]}" if isinstance(error, KeyError) else error
        raise ValueError(f"these are not the weights of a TCM ({cause})") from None


def _numbers(state_dict: dict[str, Tensor], pattern: str) -> list[int]:
    found = {int(match[1]) for name in state_dict if (match := re.match(pattern, name))}
    if not found:
        raise KeyError(pattern.split("\\")[0])
    return sorted(found)


def _stages(state_dict: dict[str, Tensor], network: str) -> list[tuple[int, int]]:
    """Blocks and attention heads of the three stages between the strided layers of `g_a` or `g_s`."""
    stages: list[tuple[int, int]] = []
    for i in _numbers(state_dict, rf"{network}\.(\d+)\.")[:-1]:  # the last one is the outer convolution
        bias = state_dict.get(f"{network}.{i}.trans_block.msa.relative_position_params")
        if bias is None:
            stages.append((0, 1))
        else:
            stages[-1] = (stages[-1][0] + 1, len(bias))
    if len(stages) != 3:
        raise KeyError(f"{network} of three stages")
    return stages
