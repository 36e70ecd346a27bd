"""What the slice walk does with each slice's μ and σ: estimate, encode or decode.

A coder is called once a slice, in order, with μ and σ `[B, M/S, h, w]`, and returns the quantised
slice round(y − μ) + μ. All symbols of one image form one rANS stream (CompressAI's coder), slice by
slice, each in C, H, W order.
"""

import math
import struct
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from compressai.ans import BufferedRansEncoder, RansDecoder
from compressai.entropy_models import EntropyBottleneck, EntropyModel, GaussianConditional
from torch import Tensor

from models.guard import Guard
from models.sensitive import crc_of, factors, read_listed, row_below, table_index

# What stands for round(x) in a rate that is to have a gradient (utils.refine).
Surrogate = Callable[[Tensor], Tensor]

# Beyond this CompressAI's escape coding shifts by the width of its integers and never ends.
LARGEST_SYMBOL = 2**24


def ste_round(x: Tensor) -> Tensor:
    """Rounding whose gradient is one.

    Unlike CompressAI's quantize_ste, (round(x) − x) + x, the result is round(x) to the last bit, so
    that the decoder, which has only the symbols, arrives at the same latent.
    """
    return torch.round(x).detach() + (x - x.detach())


class CodingTables:
    """The quantised CDFs of an entropy model as the lists that the rANS coder takes, made once.

    Rows are cut to their own length: the Gaussian table is mostly padding, and the coder's
    interface copies every entry on every call.
    """

    def __init__(self, model: EntropyModel) -> None:
        if model.quantized_cdf.numel() == 0:
            raise ValueError("the model has no coding tables: call update() first")
        self.sizes = model.cdf_length.tolist()
        self.offsets = model.offset.tolist()
        self.cdfs = [row[:size] for row, size in zip(model.quantized_cdf.tolist(), self.sizes, strict=True)]
        self._lengths: Tensor | None = None

    def fewest_bits(self, indexes: Tensor) -> float:
        """No stream of symbols with these table rows is shorter: every one the likeliest of its row."""
        likeliest = [max(np.diff(row).tolist()) / 2**16 for row in self.cdfs]
        counts = np.bincount(indexes.flatten().numpy(), minlength=len(likeliest))
        return float(-(counts * np.log2(likeliest)).sum())

    def code_lengths(self, symbols: Tensor, indexes: Tensor) -> Tensor:
        """Bits of int32 symbols with these table rows, `[n]` both: float32 `[n]`."""
        reach = max(max(-offset, offset + size) for offset, size in zip(self.offsets, self.sizes, strict=True))
        if self._lengths is None:
            every = torch.arange(-reach, reach + 1, dtype=torch.int32).repeat(len(self.cdfs))
            rows = torch.arange(len(self.cdfs), dtype=torch.int32).repeat_interleave(2 * reach + 1)
            self._lengths = self._compute_lengths(every, rows)
        bits = self._lengths[indexes * (2 * reach + 1) + reach + symbols.clamp(-reach, reach)]
        far = symbols.abs() > reach
        if far.any():
            bits[far] = self._compute_lengths(symbols[far], indexes[far])
        return bits

    def _compute_lengths(self, symbols: Tensor, indexes: Tensor) -> Tensor:
        offsets, sizes = torch.tensor(self.offsets), torch.tensor(self.sizes)
        table = torch.full((len(self.cdfs), max(self.sizes)), math.inf)
        for row, cdf in enumerate(self.cdfs):
            table[row, : len(cdf) - 1] = 16 - torch.tensor(cdf).diff().log2()
        values, escape = symbols - offsets[indexes], sizes[indexes] - 2  # the last entry is for all that has none
        outside = (values < 0) | (values >= escape)
        bits = table[indexes, torch.where(outside, escape, values)]
        # Then follow, four bits each: how many digits, in fifteens, and the digits.
        beyond = torch.where(values < 0, -2 * values - 1, 2 * (values - escape))
        digits = (beyond.clamp(min=0).double() + 1).log2().div(4).ceil()
        return bits + torch.where(outside, 4 * (1 + (digits / 15).floor() + digits), 0.0).float()

    def count_bits(self, symbols: Tensor, indexes: Tensor) -> float:
        """Length in bits of the stream that `encode` would make, but for the coder's final state."""
        return float(self.code_lengths(symbols.flatten(), indexes.flatten()).double().sum())

    def encode(self, symbols: Tensor, indexes: Tensor) -> bytes:
        """One stream of int symbols, each with the row of the table that codes it; any equal shapes."""
        encoder = BufferedRansEncoder()
        encoder.encode_with_indexes(_ints(symbols), _ints(indexes), self.cdfs, self.sizes, self.offsets)
        return encoder.flush()

    def decode(self, decoder: RansDecoder, indexes: Tensor) -> Tensor:
        """The next symbols of a stream, int32, in the shape of their table rows."""
        symbols = decoder.decode_stream(_ints(indexes), self.cdfs, self.sizes, self.offsets)
        # A list of half a million ints: torch.tensor takes 125 ms for what this does in 12.
        packed = bytearray(struct.pack(f"{len(symbols)}i", *symbols))
        return torch.frombuffer(packed, dtype=torch.int32).view(indexes.shape)


def _ints(values: Tensor) -> array:
    """An int32 tensor as a sequence that the coder reads like a list, without making one."""
    return array("i", values.to(torch.int32).contiguous().numpy().tobytes())


def to_symbols(rounded: Tensor) -> Tensor:
    """Rounded values as int32 on the CPU.

    Raises:
        ValueError: one is not finite (what that becomes as an int depends on the machine) or enormous.
    """
    if not (rounded.abs() <= LARGEST_SYMBOL).all():  # a NaN compares false
        raise ValueError("the latent cannot be coded: it has values that are not finite, or enormous")
    return rounded.int().cpu()


def open_stream(stream: bytes, symbols: int) -> RansDecoder:
    """A stream from which so many symbols will be taken.

    CompressAI's decoder does not know where its stream ends, and a wrong one may end early: zeros follow, more than
    the symbols can use up (2 bytes each, and rarely an escape).
    """
    decoder = RansDecoder()
    decoder.set_stream(stream + bytes(4 * symbols + 1024))
    return decoder


def likelihood_of_y(gaussian: GaussianConditional, values: Tensor, sigma: Tensor, mu: Tensor) -> Tensor:
    """Likelihoods of values as they are: CompressAI's own forward rounds them or adds noise that it draws."""
    return gaussian.likelihood_lower_bound(gaussian._likelihood(values, sigma, mu))


def likelihood_of_z(bottleneck: EntropyBottleneck, values: Tensor) -> Tensor:
    """Likelihoods of values `[B, C, h, w]` as they are, by each channel's density."""
    channels = values.transpose(0, 1)
    likelihood, _, _ = bottleneck._likelihood(channels.reshape(len(channels), 1, -1))
    return bottleneck.likelihood_lower_bound(likelihood).view(channels.shape).transpose(0, 1)


class Estimate:
    """Collects the likelihoods of y `[B, M, h, w]`: additive noise in training, rounding in evaluation.

    With tabled, σ is the entry of the scale table that the published rule codes it by, the next larger one; files take
    the cheapest shift of the table, and a little less. Without, it is σ itself, as papers report it; files then cost
    some percent more where most symbols are nearly certain.
    With noise, of y's shape, that is added instead. With a surrogate, what it makes of y − μ stands for the symbols
    in the likelihoods, and those of the symbols themselves are collected beside them.
    """

    def __init__(
        self,
        gaussian: GaussianConditional,
        y: Tensor,
        num_slices: int,
        tabled: bool = False,
        noise: Tensor | None = None,
        surrogate: Surrogate | None = None,
    ) -> None:
        self.gaussian, self.slices, self.tabled = gaussian, y.float().chunk(num_slices, 1), tabled
        self.surrogate = surrogate
        self.noise = None if noise is None else noise.chunk(num_slices, 1)
        self._likelihoods: list[Tensor] = []
        self._of_symbols: list[Tensor] = []

    def __call__(self, mu: Tensor, sigma: Tensor) -> Tensor:
        number = len(self._likelihoods)
        y = self.slices[number]
        if self.tabled:  # the gradient is that of σ itself
            level = self.gaussian.scale_table[table_index(self.gaussian, sigma.detach()).long()]
            sigma = level + (sigma - sigma.detach())
        y_hat = ste_round(y - mu) + mu
        if self.surrogate is not None:
            likelihood = likelihood_of_y(self.gaussian, self.surrogate(y - mu) + mu, sigma, mu)
            with torch.no_grad():
                self._of_symbols.append(likelihood_of_y(self.gaussian, y_hat, sigma, mu))
        elif self.noise is not None:
            likelihood = likelihood_of_y(self.gaussian, y + self.noise[number], sigma, mu)
        else:
            _, likelihood = self.gaussian(y, sigma, mu)
        self._likelihoods.append(likelihood)
        return y_hat

    def likelihoods(self) -> Tensor:
        return torch.cat(self._likelihoods, 1)

    def likelihoods_of_symbols(self) -> Tensor:
        """Where there was a surrogate: of what would be coded, without gradients."""
        return torch.cat(self._of_symbols, 1)


class Encode:
    """Collects the symbols of y `[B, M, h, w]`, and the σ that selects their table rows."""

    def __init__(self, y: Tensor, num_slices: int) -> None:
        self.slices = y.float().chunk(num_slices, 1)
        self._symbols: list[Tensor] = []
        self._sigma: list[Tensor] = []

    def __call__(self, mu: Tensor, sigma: Tensor) -> Tensor:
        symbols = torch.round(self.slices[len(self._symbols)] - mu)
        self._symbols.append(to_symbols(symbols))
        self._sigma.append(sigma)
        return symbols + mu

    @property
    def symbols(self) -> Tensor:
        """int32 `[B, M, h, w]`, on the CPU."""
        return torch.cat(self._symbols, 1)

    @property
    def sigma(self) -> Tensor:
        """`[B, M, h, w]`, on the model's device."""
        return torch.cat(self._sigma, 1)


@dataclass(frozen=True)
class Quantised:
    """Images as the encoder knows them before it codes.

    Attributes:
        symbols: of y, int32 `[B, M, h, w]`; rows: of the scale table, by which they are coded, int32 `[B, M, h, w]`.
        z: symbols of z, int32 `[B, C, h/4, w/4]`.
        sigma, y_hat: `[B, M, h, w]`, on the model's device.
        guards: one an image, for decoding elsewhere; None where rows are those of the published rule.
    """

    symbols: Tensor
    rows: Tensor
    z: Tensor
    sigma: Tensor
    y_hat: Tensor
    guards: list[Guard] | None


class Decode:
    """Takes the symbols from one stream an image.

    Args:
        shape: of y of one image, (M, h, w).
        guards: the listed positions of each image, and nothing of the sort where it is None.
        crcs: of each image's z; its y is added slice by slice.
    """

    def __init__(
        self,
        gaussian: GaussianConditional,
        tables: CodingTables,
        streams: list[bytes],
        shape: Sequence[int],
        guards: list[Guard] | None,
        crcs: list[int],
    ) -> None:
        self.gaussian, self.tables, self.crcs = gaussian, tables, list(crcs)
        count = math.prod(shape)
        self.decoders = [open_stream(stream, count) for stream in streams]
        found = [read_listed(guard.listed, guard.shifted, count) for guard in guards or ()]
        self.factors = torch.stack([factors(gaussian, shifts, count) for shifts, _, _ in found]) if found else None
        self.listed = [(positions, above) for _, positions, above in found]
        self.done = 0

    def __call__(self, mu: Tensor, sigma: Tensor) -> Tensor:
        first, self.done = self.done, self.done + sigma[0].numel()
        if self.factors is not None:
            sigma = sigma * self.factors[:, first : self.done].view(sigma.shape)
        indexes = table_index(self.gaussian, sigma).cpu()
        if self.listed:
            self._correct(first, indexes.flatten(1), row_below(self.gaussian, sigma).cpu().flatten(1))
        decoded = []
        for number, (decoder, index) in enumerate(zip(self.decoders, indexes, strict=True)):
            decoded.append(self.tables.decode(decoder, index))
            self.crcs[number] = crc_of(decoded[-1], self.crcs[number])
        return torch.stack(decoded).to(mu.device).type_as(mu) + mu

    def _correct(self, first: int, indexes: Tensor, below: Tensor) -> None:
        """The encoder's rows at the listed positions of this slice, in place."""
        for number, (positions, above) in enumerate(self.listed):
            start, end = np.searchsorted(positions, (first, self.done))
            here = torch.from_numpy(positions[start:end] - first)
            corrected = below[number, here] + torch.from_numpy(above[start:end]).int()
            # A file made to do harm may name a row that is not there, and the coder does not look.
            indexes[number, here] = corrected.clamp(max=len(self.tables.cdfs) - 1)
