"""State dicts of published and own checkpoints: bring them to one form, explain a mismatch."""

import hashlib

import torch
from compressai.entropy_models import EntropyModel
from compressai.models.utils import remap_old_keys
from compressai.zoo.pretrained import load_pretrained
from torch import Tensor, nn

# Constants of the layers. A model keeps those it was made with: a float16 file has them rounded, some to zero.
_CONSTANTS = (".pedestal", ".bound", ".target", ".scale_bound")
_TABLES = ("._offset", "._quantized_cdf", "._cdf_length", ".scale_table")
_HALVES = (torch.float16, torch.bfloat16)
_KNOWN = "entropy_bottleneck.quantiles"  # a name that every codec has


class WeightsError(ValueError, RuntimeError):
    """Weights that do not fit a model; a RuntimeError too, as PyTorch's load_state_dict raises."""


def find_state_dict(checkpoint: dict) -> dict:
    """The state dict in a checkpoint: itself, or under one of the names that training scripts use."""
    names = ("ema", "state_dict", "model_state_dict", "model", "network", "net")
    inside = [found for name in names if isinstance(found := checkpoint.get(name), dict)]
    known = [found for found in inside if any(str(key).endswith(_KNOWN) for key in found)]
    of_others = [found for found in inside if any(isinstance(value, Tensor) for value in found.values())]
    return next(iter(known + of_others), checkpoint)


def normalize(state_dict: dict, model: nn.Module | None = None) -> dict[str, Tensor]:
    """A state dict with the names that the models here have.

    Prefixes (`module.` of DataParallel, `_orig_mod.` of torch.compile, `model.` of Lightning, …) are removed with all
    that has none, and CompressAI's old bottleneck names (`_matrix0`) are replaced.
    With a model, its constants are filled in, and a set of coding tables that is incomplete, or was rounded to float16
    or bfloat16, becomes empty, to be computed by `update()`.

    Raises:
        ValueError: it is not a state dict at all.
    """
    tensors = {name: value for name, value in dict(state_dict).items() if isinstance(value, Tensor)}
    if not tensors:
        raise ValueError("not a state dict: a non-empty mapping of names to tensors is expected")
    prefix = next((name.removesuffix(_KNOWN) for name in tensors if name.endswith(_KNOWN)), "")
    state_dict = {name.removeprefix(prefix): tensors[name] for name in tensors if name.startswith(prefix)}
    state_dict = dict(remap_old_keys("entropy_bottleneck", load_pretrained(state_dict)))
    if model is None:
        return state_dict
    own = model.state_dict()
    state_dict |= {name: value for name, value in own.items() if name.endswith(_CONSTANTS)}
    for name, module in model.named_modules():
        if isinstance(module, EntropyModel):
            tables = [name + table for table in _TABLES if name + table in own]
            found = [state_dict[table] for table in tables if table in state_dict]
            if len(found) < len(tables) or any(t.numel() == 0 or t.dtype in _HALVES for t in found):
                state_dict |= {table: own[table].new_empty(0) for table in tables}
    return state_dict


def without_tables(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dict with empty coding tables, to be computed by `update()`: those of weights that change are stale."""
    return {name: value.new_empty(0) if name.endswith(_TABLES) else value for name, value in state_dict.items()}


def resize_tables(model: nn.Module, state_dict: dict[str, Tensor]) -> None:
    """Give the coding tables of a model the sizes of those in a state dict; without one they are empty."""
    for name, buffer in list(model.named_buffers()):
        if name.endswith(_TABLES):
            module, _, table = name.rpartition(".")
            shape = state_dict[name].shape if name in state_dict else 0
            setattr(model.get_submodule(module), table, buffer.new_empty(shape))


def digest(state_dict: dict[str, Tensor], start: bytes = b"") -> bytes:
    """Eight bytes that identify weights, in their precision, and what is put before them."""
    found = hashlib.blake2b(start, digest_size=8)
    for name, tensor in sorted(state_dict.items()):
        found.update(name.encode())
        values = tensor.detach().cpu().contiguous().view(-1)
        found.update(values.view(torch.uint8).numpy())  # NumPy has no bfloat16
    return found.digest()


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
