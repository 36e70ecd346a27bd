"""Checkpoints that rebuild their model, read without running any code that they may hold."""

import importlib.metadata
import inspect
import io
import pickle
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import safetensors.torch
import torch

from models import Codec, VariableRate
from models.lambdas import LADDERS
from models.registry import model_class, recognize
from models.state_dict import find_state_dict, without_tables
from utils.errors import UserError
from utils.files import atomic_write, is_special

# What training scripts save beside tensors: classes that only hold values.
_HARMLESS = [(SimpleNamespace, "argparse.Namespace"), np.dtype]
# A scalar's function has another name in NumPy 2 than in NumPy 1, and a file has that of the NumPy that wrote it.
_HARMLESS += [(np.float64(0).__reduce__()[0], f"numpy.{core}.multiarray.scalar") for core in ("_core", "core")]
_HARMLESS += [kind for kind in vars(np.dtypes).values() if isinstance(kind, type)]


class CheckpointError(UserError):
    """A file that is no checkpoint of ours or of the published models."""


def describe(model: Codec) -> dict:
    """The entries of a checkpoint about its model, besides the weights."""
    return {
        "model": type(model).__name__,
        "arguments": model.arguments,
        "metric": model.metric,
        "lambdas": list(LADDERS[model.metric]),
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "compressai")},
    }


def export_model(
    path: str | Path, model: Codec, training: list[dict], fit: Callable[[Codec], None] | None = None
) -> None:
    """Write a model for use: float16 weights, and the coding tables of exactly those weights.

    Buffers keep their precision (GDN's constants would vanish in float16).

    Args:
        training: one plain dict for each training run.
        fit: called with the model of the rounded weights, to fit its coding tables to photographs.
    """
    weights = {name for name, _ in model.named_parameters()}
    halves = {name: t.cpu().half() if name in weights else t.cpu() for name, t in model.state_dict().items()}
    with torch.random.fork_rng(devices=[]):  # a run that saves draws the same random numbers as one that does not
        rounded = type(model)(**model.arguments)
    rounded.load_state_dict(without_tables(halves))
    rounded.update()
    if fit:
        fit(rounded.eval())
    state = {name: t.cpu().half() if name in weights else t.cpu() for name, t in rounded.state_dict().items()}
    write_checkpoint(path, describe(model) | {"state_dict": state, "training": training})


def write_checkpoint(path: str | Path, checkpoint: dict) -> None:
    """Write whole or not at all; OSError with the file's name where that fails."""
    with atomic_write(path) as file:
        try:
            torch.save(checkpoint, file)
        except RuntimeError as error:  # PyTorch's, which hides what the disk said
            raise (error.__context__ if isinstance(error.__context__, OSError) else error) from None


def read_checkpoint(path: str | Path) -> dict:
    """A checkpoint as it was saved, on the CPU; a bare state dict is wrapped as {"state_dict": …}.

    Files of torch.save are read without running code: numbers of NumPy and argparse's Namespace may stand beside the
    tensors. Files of safetensors are read too.

    Raises:
        CheckpointError: missing, something else, truncated, or holding objects that would run code.
    """
    start = b""
    try:
        file = io.BytesIO(Path(path).read_bytes()) if is_special(Path(path)) else open(path, "rb")  # noqa: SIM115
        with file:
            start = file.read(512)
            file.seek(0)
            if start[8:10] == b'{"':
                checkpoint = safetensors.torch.load(file.read())
            else:
                with torch.serialization.safe_globals(_HARMLESS):
                    checkpoint = torch.load(file, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except Exception as error:
        if isinstance(error, OSError) and error.strerror:
            raise CheckpointError(f"{path}: {error.strerror}") from None
        cause = _what_it_is(start)
        if not cause:
            would_run = isinstance(error, pickle.UnpicklingError)
            cause = "not a checkpoint, or one that would run code" if would_run else "truncated or damaged"
        raise CheckpointError(f"{path}: refused: {cause}") from None
    if not isinstance(checkpoint, dict):
        raise CheckpointError(f"{path}: holds a {type(checkpoint).__name__}, not a checkpoint")
    return checkpoint if "state_dict" in checkpoint else {"state_dict": find_state_dict(checkpoint)}


def _what_it_is(start: bytes) -> str:
    """What a file is that is no checkpoint, where its first 512 bytes tell."""
    if start.startswith(b"\x1f\x8b"):
        return "a gzip file: unpack it first"
    first_member = start[30 : 30 + int.from_bytes(start[26:28], "little")]  # of a zip file: its name
    if start.startswith(b"PK") and not first_member.endswith(b".pkl"):
        return "a zip archive, or a file of torch.save that is cut off: unpack it first"
    if not start:
        return "the file is empty"
    if start.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer, not the file itself: fetch it with git lfs pull"
    if start.lstrip()[:1] == b"<":
        return "an HTML page, perhaps of a download that asks for a confirmation"
    if start[257:262] == b"ustar":
        return "a tar archive: unpack it first"
    return ""


def trained_lambda(checkpoint: dict) -> float | None:
    """λ of a fixed-rate codec by its file; None where that does not say. The last record is not of its training where
    only its tables were fitted since."""
    records = [*checkpoint.get("training", ()), checkpoint.get("objective", {})]
    return next((record["lambda"] for record in reversed(records) if "lambda" in record), None)


def new_of(cls: type[Codec], arguments: dict, path: str | Path) -> Codec:
    """A new model of the class and the sizes that a file names. CheckpointError where there are no such sizes."""
    if not isinstance(arguments, dict):
        raise CheckpointError(f"{path}: not of this version of the project (its arguments are no dict)")
    known = {field.name for field in fields(cls.Config)} | inspect.signature(cls).parameters.keys()
    if unknown := sorted(map(str, arguments.keys() - known)):  # which a TCM ignores, as the published one does
        cause = f"a {cls.__name__} has no {', '.join(unknown)}"
        raise CheckpointError(f"{path}: not of this version of the project ({cause})")
    try:
        return cls(**arguments)
    except TypeError as error:
        raise CheckpointError(f"{path}: not of this version of the project ({error})") from None


def build_model(checkpoint: dict, path: str | Path) -> Codec:
    """The codec that a checkpoint holds, in float32 and evaluation mode, on the CPU.

    From the state of a run (`last.pth.tar`) it takes the averaged weights, whose coding tables are not fitted.

    Raises:
        CheckpointError: names what does not fit.
    """
    state = find_state_dict(checkpoint)
    metric = checkpoint.get("metric", "mse")
    if metric not in LADDERS:
        raise CheckpointError(f"{path}: trained for {metric!r}, which is not one of {', '.join(LADDERS)}")
    if list(checkpoint.get("lambdas", LADDERS[metric])) != list(LADDERS[metric]):
        raise CheckpointError(f"{path}: made for another ladder of lambdas, {checkpoint['lambdas']}")
    try:
        with torch.random.fork_rng(devices=[]):  # a new model's weights are random, and the caller's numbers its own
            if "arguments" not in checkpoint:  # a published file: class and sizes are in its names and shapes
                model = recognize(state).from_state_dict(state)
            else:
                cls = model_class(checkpoint["model"]) if "model" in checkpoint else recognize(state)
                model = new_of(cls, checkpoint["arguments"], path)
                model.load_state_dict(state)
                model.metric = metric
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from None
    for name, weights in model.named_parameters():
        if not weights.isfinite().all():
            raise CheckpointError(f"{path}: its weights are not finite ({name})")
    if (dtype := model.medians.dtype) != torch.float32:  # PyTorch's default here: what has half of it has lost the rest
        if dtype != torch.float64:
            raise CheckpointError(f"{path}: cannot be loaded while torch.get_default_dtype() is {dtype}")
        model.float()
    return model.eval()


def load_model(path: str | Path, device: torch.device | str = "cpu", variable_rate: bool = False) -> Codec:
    """A model ready to code: weights, coding tables (computed where the file has none), channels last.

    Raises:
        CheckpointError: names what does not fit, also a fixed-rate model where variable_rate is required.
    """
    model = model_to_code_with(read_checkpoint(path), path, device)
    if variable_rate and not isinstance(model, VariableRate):
        kind = f"a fixed-rate {type(model).__name__}"
        raise CheckpointError(f"{path}: {kind}; rate targets and refinement need variable-rate weights")
    return model


def model_to_code_with(checkpoint: dict, path: str | Path, device: torch.device | str) -> Codec:
    """`load_model` for a checkpoint that was read already."""
    model = build_model(checkpoint, path)
    model.update()
    return model.to(device, memory_format=torch.channels_last)
