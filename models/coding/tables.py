"""Entropy coding with CompressAI's tables: symbols to an rANS stream and back, and the stream's length without it."""

import math
import struct
from array import array

import numpy as np
import torch
from compressai.ans import BufferedRansEncoder, RansDecoder
from compressai.entropy_models import EntropyModel
from torch import Tensor

# Beyond this CompressAI's escape coding shifts by the width of its integers and never ends.
LARGEST_SYMBOL = 2**24
SHORTEST_STREAM = 4  # bytes: the coder writes whole words, and its state at the end
LONGEST_CODE = 6  # bytes of an escaped LARGEST_SYMBOL: 16 bits and eight digits
CODER_STATE = 16  # bytes at the end of a stream
PART = 2**22  # symbols that the encoder is handed at once; SliceDecoder asks for no more either


class CodingTables:
    """The quantized CDFs of an entropy model as the lists that the rANS coder takes, made once.

    Each row is cut to its length: the Gaussian table is mostly padding, and the coder's interface copies every
    entry on every call. `rows` below are those of the table, one per symbol; CompressAI calls them indexes.
    """

    def __init__(self, model: EntropyModel) -> None:
        if model.quantized_cdf.numel() == 0:
            raise ValueError("the model has no coding tables: call update() first")
        self.sizes = model.cdf_length.tolist()
        self.offsets = model.offset.tolist()
        self.cdfs = [row[:size] for row, size in zip(model.quantized_cdf.tolist(), self.sizes, strict=True)]
        self._lengths: dict[torch.device, Tensor] = {}  # all symbols within reach in all rows
        self._reach = max(max(-offset, offset + size) for offset, size in zip(self.offsets, self.sizes, strict=True))

    def fewest_bits(self, rows: Tensor) -> float:
        """A lower bound on the length of a stream: every symbol is the likeliest of its row."""
        likeliest = [max(np.diff(row).tolist()) / 2**16 for row in self.cdfs]
        counts = np.bincount(rows.flatten().numpy(), minlength=len(likeliest))
        return float(-(counts * np.log2(likeliest)).sum())

    def code_lengths(self, symbols: Tensor, rows: Tensor) -> Tensor:
        """Bits of each int32 symbol `[n]` with int32 rows `[n]`, on any device: float32 `[n]`."""
        bits = self.code_lengths_within_reach(symbols, rows)
        far = symbols.abs() > self._reach
        if far.any():
            bits[far] = self._compute_lengths(symbols[far].cpu(), rows[far].cpu()).to(bits.device)
        return bits

    def code_lengths_within_reach(self, symbols: Tensor, rows: Tensor) -> Tensor:
        """As `code_lengths`, with symbols far beyond the tables clamped: without a wait for a GPU."""
        reach = self._reach
        if not self._lengths:
            every = torch.arange(-reach, reach + 1, dtype=torch.int32).repeat(len(self.cdfs))
            every_row = torch.arange(len(self.cdfs), dtype=torch.int32).repeat_interleave(2 * reach + 1)
            self._lengths[every.device] = self._compute_lengths(every, every_row)
        if symbols.device not in self._lengths:
            self._lengths[symbols.device] = next(iter(self._lengths.values())).to(symbols.device)
        return self._lengths[symbols.device][rows * (2 * reach + 1) + reach + symbols.clamp(-reach, reach)]

    def _compute_lengths(self, symbols: Tensor, rows: Tensor) -> Tensor:
        offsets = torch.tensor(self.offsets)
        sizes = torch.tensor(self.sizes)
        table = torch.full((len(self.cdfs), max(self.sizes)), math.inf)
        for row, cdf in enumerate(self.cdfs):
            table[row, : len(cdf) - 1] = 16 - torch.tensor(cdf).diff().log2()
        values = symbols - offsets[rows]
        escape = sizes[rows] - 2  # the last entry codes all values outside
        outside = (values < 0) | (values >= escape)
        bits = table[rows, torch.where(outside, escape, values)]
        # CompressAI's escape code then writes, four bits each, how many digits (in fifteens) and the digits.
        beyond = torch.where(values < 0, -2 * values - 1, 2 * (values - escape))
        digits = (beyond.clamp(min=0).double() + 1).log2().div(4).ceil()
        return bits + torch.where(outside, 4 * (1 + (digits / 15).floor() + digits), 0.0).float()

    def count_bits(self, symbols: Tensor, rows: Tensor) -> float:
        """Bits of the stream that `to_stream` would write, without the coder's final state."""
        parts = zip(_parts(symbols), _parts(rows), strict=True)
        return sum(float(self.code_lengths(some.int(), theirs.int()).double().sum()) for some, theirs in parts)

    def to_stream(self, symbols: Tensor, rows: Tensor) -> bytes:
        """One stream of integers and their rows, of equal shapes."""
        encoder = BufferedRansEncoder()
        for some, theirs in zip(_parts(symbols), _parts(rows), strict=True):
            encoder.encode_with_indexes(_ints(some), _ints(theirs), self.cdfs, self.sizes, self.offsets)
        return encoder.flush()

    def from_stream(self, decoder: RansDecoder, rows: Tensor) -> Tensor:
        """The next symbols of a stream, int32, in the shape of their rows."""
        symbols = decoder.decode_stream(_ints(rows), self.cdfs, self.sizes, self.offsets)
        # A list of half a million ints: torch.tensor takes 125 ms for what this does in 12.
        packed = bytearray(struct.pack(f"{len(symbols)}i", *symbols))
        return torch.frombuffer(packed, dtype=torch.int32).view(rows.shape)


def rounded_gaussians(scales: Tensor, reach: int) -> Tensor:
    """Probabilities of the symbols −reach … reach of a rounded zero-mean Gaussian of each σ, in quantization steps:
    float64 `[n, 2·reach + 1]` on the CPU. CompressAI's own, in float32, cancel in the tails."""
    distance = torch.arange(-reach, reach + 1, dtype=torch.float64).abs()  # the lower tail, where nothing cancels
    sigma = scales.double().cpu().unsqueeze(1)
    return torch.special.ndtr((0.5 - distance) / sigma) - torch.special.ndtr((-0.5 - distance) / sigma)


def _parts(values: Tensor) -> tuple[Tensor, ...]:
    """All values in their order, PART at a time. The coder copies what it is handed more than once."""
    return values.flatten().split(PART)


def _ints(values: Tensor) -> array:
    """Integers as a sequence that the coder reads like a list, without building a list."""
    return array("i", values.to(torch.int32).contiguous().numpy().tobytes())


def smallest_dtype(values: Tensor) -> Tensor:
    """Integers in the smallest type that holds them all."""
    lowest, highest = (int(extreme) for extreme in torch.aminmax(values)) if values.numel() else (0, 0)
    for dtype in (torch.uint8, torch.int8, torch.int16):
        if torch.iinfo(dtype).min <= lowest and highest <= torch.iinfo(dtype).max:
            return values.to(dtype)
    return values


def to_symbols(rounded: Tensor) -> Tensor:
    """Rounded values as int32 on the CPU.

    Raises:
        ValueError: one is not finite (its conversion to an int depends on the machine) or beyond LARGEST_SYMBOL.
    """
    rounded = rounded.cpu()  # first: from a GPU a second answer would be another wait
    if not (rounded.abs() <= LARGEST_SYMBOL).all():  # a NaN compares false
        raise ValueError("the latent cannot be coded: it has values that are not finite, or enormous")
    return rounded.int()


def open_stream(stream: bytes, symbols: int) -> RansDecoder:
    """A decoder of a stream from which at most this many symbols will be read.

    CompressAI's decoder reads past the end of bad input, so the stream is padded with zeros for the worst case: every
    four ones of an escape code announce fifteen digits of four bits; past the end a symbol takes 2 bytes, and an escape
    half a byte.

    Raises:
        ValueError: the stream is longer than the codes of so many symbols can be.
    """
    if len(stream) > LONGEST_CODE * symbols + CODER_STATE:
        raise ValueError(f"a stream of {len(stream)} bytes is too long for its {symbols} symbols: the file is damaged")
    decoder = RansDecoder()
    decoder.set_stream(stream + bytes(15 * len(stream) + 5 * symbols // 2 + 1024))
    return decoder
