"""Weights of a codec, and what is made of them: its sizes, coding tables, and a fingerprint."""

import itertools
import warnings
from collections.abc import Callable, Iterable
from dataclasses import asdict
from typing import Any, ClassVar

import torch
from compressai.models.base import CompressionModel
from torch import Tensor, nn

from models.coding.tables import CodingTables
from models.state_dict import WeightsError, digest, explain_mismatch, normalize, resize_tables


class CodecConfig:
    """Base of the dataclasses of sizes: M, num_slices, max_support_slices (slices that a slice may look at) and
    hyper_channels (of z) are fields, or properties, of each.

    Attributes:
        context_model: whether the first slice is coded in parts, 0 or 1; a class with `predict_again` may have it as a
            field.
    """

    context_model = 0

    def canonical(self) -> "CodecConfig":
        """Equal networks have equal canonical configurations: one value for each field that changes nothing."""
        return self

    @classmethod
    def infer(cls, state_dict: dict[str, Tensor]) -> "CodecConfig":
        """Sizes of the network of a (normalized) state dict. ValueError or KeyError where it is of another class."""
        raise NotImplementedError


def check_codec(model: object, taker: str) -> None:
    """ValueError where a function was given something else than a codec."""
    if not isinstance(model, CodecWeights):
        wrapped = isinstance(getattr(model, "_orig_mod", getattr(model, "module", None)), CodecWeights)
        way = ": pass the model that it wraps" if wrapped else ", as models.TCM_VBR or what load_model returns"
        raise ValueError(f"{taker} takes a codec{way}, not {type(model).__name__}")


class CodecWeights(CompressionModel):
    """A model of CompressAI that knows its sizes and is rebuilt from them, and that notices when its weights change.

    Args: a `Config` of the class, or its fields by position or name.
    """

    Config: ClassVar[type[CodecConfig]]

    def __init__(self, *args, **kwargs) -> None:
        super().__init__()
        self.config = args[0] if args and isinstance(args[0], self.Config) else self.Config(*args, **kwargs)
        self._tables: tuple[Any, tuple[CodingTables, CodingTables]] | None = None  # and the state they were made of
        self._fingerprint: tuple[Any, bytes] | None = None
        self._rounded_to: torch.dtype | None = None  # the half precision that the weights once had

    @property
    def arguments(self) -> dict:
        """Plain values that rebuild the model, `type(model)(**model.arguments)`; a checkpoint stores them."""
        return asdict(self.config)

    def load_state_dict(self, state_dict: dict, strict: bool = True):
        """Load published or own weights, in any of the forms that `models.state_dict` understands.

        Raises:
            WeightsError: one line that names what is missing, unknown or of another shape.
        """
        state_dict = normalize(state_dict, self)
        if strict and (problem := explain_mismatch(state_dict, self)):
            raise WeightsError(f"these weights do not fit {type(self).__name__}: {problem}")
        self._tables = self._fingerprint = None
        resize_tables(self, state_dict)
        # Not CompressionModel's, which looks for the tables by comparing every module's name with every tensor's:
        # with TCM that takes a fifth of a second.
        return nn.Module.load_state_dict(self, state_dict, strict=strict)

    @classmethod
    def from_state_dict(cls, state_dict: dict) -> "CodecWeights":
        """The model that a state dict belongs to, whatever its size, with its weights, in evaluation mode."""
        state_dict = normalize(state_dict)
        model = cls(cls.Config.infer(state_dict))
        model.load_state_dict(state_dict)
        return model.eval()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "CodecWeights":
        model = super()._apply(fn, recurse)
        if self.medians.dtype in (torch.float16, torch.bfloat16):
            self._rounded_to = self.medians.dtype  # the scale table too; float() brings nothing back
        return model

    def check_precision(self) -> None:
        """ValueError for weights that are not float32, or were not always: codecs of half the precision would not
        decode each other's files, and those of rounded weights no others'."""
        if self._rounded_to:
            raise ValueError(f"the weights were {self._rounded_to}; a codec computes in float32: use load_model again")
        if (dtype := self.medians.dtype) != torch.float32:
            raise ValueError(f"the weights are {dtype}; a codec computes in float32: call model.float()")

    @property
    def medians(self) -> Tensor:
        """Medians of z, `[1, C, 1, 1]`."""
        return self.entropy_bottleneck.quantiles[:, 0, 1].detach().view(1, -1, 1, 1)

    @property
    def coding_tables(self) -> tuple[CodingTables, CodingTables]:
        """Coding tables of y and of z, made at the first use and anew when the buffers that they are made of change."""
        models = self.gaussian_conditional, self.entropy_bottleneck
        state = _state_of(buffer for model in models for buffer in model.buffers())
        if self._tables is None or self._tables[0] != state:
            self._tables = state, tuple(map(CodingTables, models))
        return self._tables[1]

    @property
    def fingerprint(self) -> bytes:
        """Eight bytes that identify the weights and coding tables, computed at the first use and after a change.

        Changes through `.data` leave no trace: call `train()` or `update()` after them.
        """
        state = _state_of(itertools.chain(self.parameters(), self.buffers()))
        if self._fingerprint is None or self._fingerprint[0] != state:
            # Networks without a context model had no such field once, and their files decode.
            sizes = {n: value for n, value in asdict(self.config.canonical()).items() if n != "context_model" or value}
            self._fingerprint = state, digest(self.state_dict(), repr(sizes).encode())
        return self._fingerprint[1]

    def train(self, mode: bool = True) -> "CodecWeights":
        """As in every module; forgets tables and fingerprint, as training may change weights without a trace."""
        if mode:
            self._tables = self._fingerprint = None
        return super().train(mode)

    def prepare(self) -> None:
        """Make the coding tables and the fingerprint now, so that the first picture is not timed with them."""
        _ = self.coding_tables, self.fingerprint

    def update(self, *args, **kwargs) -> bool:
        """Compute the coding tables (CompressAI) where there are none. With force also in place of fitted ones, which a
        warning says."""
        self._tables = self._fingerprint = None
        gaussian = self.gaussian_conditional
        scales, cdf = gaussian.scale_table, gaussian.quantized_cdf
        updated = super().update(*args, **kwargs)
        if cdf.numel() and torch.equal(gaussian.scale_table, scales) and not torch.equal(gaussian.quantized_cdf, cdf):
            text = "tables of y that were fitted to photographs are replaced, and files made with them do not decode"
            warnings.warn(f"update(force=True): {text}; without force they are kept", stacklevel=2)
        return updated

    def set_tables_of_y(self, cdf: Tensor) -> None:
        """Code y with these tables, int32 `[levels, longest]`, of the lengths and offsets that `update()` gave them."""
        self.gaussian_conditional._quantized_cdf = cdf.to(self.medians.device)
        self._tables = self._fingerprint = None


def _state_of(tensors: Iterable[Tensor]) -> list[tuple[int, int, int]]:
    """A value that changes when one of the tensors is replaced, or changed in place (but not through `.data`)."""
    return [(id(t), t.data_ptr(), 0 if t.is_inference() else t._version) for t in tensors]
