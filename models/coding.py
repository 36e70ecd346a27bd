"""What the slice walk does with each slice's μ and σ: estimate, encode or decode.

A coder is called once a slice, in order, with μ and σ `[B, M/S, h, w]`, and returns the quantised
slice round(y − μ) + μ. All symbols of one image form one rANS stream (CompressAI's coder), slice by
slice, each in C, H, W order.
"""

import struct
from array import array

import torch
from compressai.ans import BufferedRansEncoder, RansDecoder
from compressai.entropy_models import EntropyBottleneck, EntropyModel, GaussianConditional
from torch import Tensor

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


def open_stream(stream: bytes) -> RansDecoder:
    decoder = RansDecoder()
    decoder.set_stream(stream)
    return decoder


def table_index(gaussian: GaussianConditional, sigma: Tensor) -> Tensor:
    """Row of the scale table for every σ, int32: build_indexes in one search instead of 63 passes."""
    bounded = gaussian.lower_bound_scale(sigma).contiguous()  # the order in which symbols are coded
    return torch.bucketize(bounded, gaussian.scale_table[:-1], out_int32=True)


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

    With tabled, σ is the entry of the scale table that codes it (the next larger one) and the bits are a file's.
    Without, as papers report it; files then cost some percent more where most symbols are nearly certain.
    With noise, of y's shape, that is added instead.
    """

    def __init__(
        self,
        gaussian: GaussianConditional,
        y: Tensor,
        num_slices: int,
        tabled: bool = False,
        noise: Tensor | None = None,
    ) -> None:
        self.gaussian, self.slices, self.tabled = gaussian, y.float().chunk(num_slices, 1), tabled
        self.noise = None if noise is None else noise.chunk(num_slices, 1)
        self._likelihoods: list[Tensor] = []

    def __call__(self, mu: Tensor, sigma: Tensor) -> Tensor:
        number = len(self._likelihoods)
        y = self.slices[number]
        if self.tabled:
            sigma = self.gaussian.scale_table[table_index(self.gaussian, sigma).long()]
        if self.noise is None:
            _, likelihood = self.gaussian(y, sigma, mu)
        else:
            likelihood = likelihood_of_y(self.gaussian, y + self.noise[number], sigma, mu)
        self._likelihoods.append(likelihood)
        return ste_round(y - mu) + mu

    def likelihoods(self) -> Tensor:
        return torch.cat(self._likelihoods, 1)


class Encode:
    """Collects the symbols of y `[B, M, h, w]` and the table row of each."""

    def __init__(self, gaussian: GaussianConditional, y: Tensor, num_slices: int) -> None:
        self.gaussian, self.slices = gaussian, y.float().chunk(num_slices, 1)
        self.symbols: list[Tensor] = []
        self.indexes: list[Tensor] = []

    def __call__(self, mu: Tensor, sigma: Tensor) -> Tensor:
        symbols = torch.round(self.slices[len(self.symbols)] - mu)
        self.symbols.append(to_symbols(symbols))
        self.indexes.append(table_index(self.gaussian, sigma).cpu())
        return symbols + mu

    def streams(self, tables: CodingTables) -> list[bytes]:
        """One stream an image."""
        symbols, indexes = torch.cat(self.symbols, 1), torch.cat(self.indexes, 1)
        return [tables.encode(s, i) for s, i in zip(symbols, indexes, strict=True)]


class Decode:
    """Takes the symbols from one stream an image."""

    def __init__(self, gaussian: GaussianConditional, tables: CodingTables, streams: list[bytes]) -> None:
        self.gaussian, self.tables = gaussian, tables
        self.decoders = [open_stream(stream) for stream in streams]

    def __call__(self, mu: Tensor, sigma: Tensor) -> Tensor:
        indexes = table_index(self.gaussian, sigma).cpu()
        pairs = zip(self.decoders, indexes, strict=True)
        symbols = torch.stack([self.tables.decode(decoder, index) for decoder, index in pairs])
        return symbols.to(mu.device).type_as(mu) + mu
