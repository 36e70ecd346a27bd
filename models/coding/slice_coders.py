"""What `Codec.run_slices` does with the μ and σ of each slice: estimate its bits, encode it, or decode it.

A slice coder is called once per part of y, in the order of `CodingOrder.split`, with μ and σ, and returns the
quantized part, symbols + μ. A part is a slice `[B, M/S, h, w]`, or some channels and places of the first. All symbols
of one image form one rANS stream (CompressAI's coder), part by part, each in C, H, W order.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from compressai.entropy_models import EntropyBottleneck, GaussianConditional
from torch import Tensor

from models.coding.order import CodingOrder
from models.coding.portable import BELOW, BLOCK, PortableRows, crc_of, scale_factors, table_rows, unpack_scales
from models.coding.side_info import SideInfo
from models.coding.tables import LARGEST_SYMBOL, CodingTables, open_stream, smallest_dtype, to_symbols

# Makes symbols, as floats, of y − μ and σ: `nearest_symbols`, or `Codec.choose_symbols`.
Choice = Callable[[Tensor, Tensor], Tensor]
# What a squared error of one step is worth in bits when a symbol is chosen. For a uniform quantizer at high rates it is
# 6 / ln 2 = 8.7; but here symbols only move towards zero, and their errors add up in the picture. Measured with the
# shipped weights, 40 to 80 differ by less than a thousandth of the loss (docs/method.md).
ERROR_BITS = 40.0
AT_ONCE = 2**22  # positions whose symbols and rows are made at once, a multiple of portable.BLOCK


def ste_round(x: Tensor) -> Tensor:
    """Rounding whose gradient is one.

    Unlike CompressAI's quantize_ste, (round(x) − x) + x, the result is round(x) to the last bit, so
    that the decoder, which has only the symbols, arrives at the same latent.
    """
    return torch.round(x).detach() + (x - x.detach())


def likelihood_of_y(gaussian: GaussianConditional, values: Tensor, sigma: Tensor, mu: Tensor) -> Tensor:
    """Likelihoods of values of y as they are, in the shape that values, σ and μ share: CompressAI's forward would round
    them or add noise."""
    return gaussian.likelihood_lower_bound(gaussian._likelihood(values, sigma, mu))


def likelihood_of_z(bottleneck: EntropyBottleneck, values: Tensor) -> Tensor:
    """Likelihoods of values `[B, C, h, w]` as they are, by the density of each channel."""
    channels = values.transpose(0, 1)
    likelihood, _, _ = bottleneck._likelihood(channels.reshape(len(channels), 1, -1))
    return bottleneck.likelihood_lower_bound(likelihood).view(channels.shape).transpose(0, 1)


def nearest_symbols(residual: Tensor, sigma: Tensor) -> Tensor:
    """Each y − μ rounded, as in training and in the paper."""
    return torch.round(residual)


def choose_symbols(
    residual: Tensor, sigma: Tensor, gaussian: GaussianConditional, tables: CodingTables, error_bits: float
) -> Tensor:
    """Quantization for rate and distortion together (RDOQ): each symbol is the nearest one, or the next towards zero
    where that saves more bits than `error_bits` times what it adds to the squared error.

    Args:
        residual: y − μ, float32 of any shape.
        sigma: in the same shape.
    """
    y = residual.flatten()
    sigma = sigma.flatten()
    chosen = torch.empty_like(y)
    for part, scale, out in zip(y.split(AT_ONCE), sigma.split(AT_ONCE), chosen.split(AT_ONCE), strict=True):
        nearest = torch.round(part)
        row = table_rows(gaussian, scale)
        next_one = nearest - nearest.sign()
        symbols = (values.clamp(-LARGEST_SYMBOL, LARGEST_SYMBOL).int() for values in (nearest, next_one))
        bits, bits_of_next = (tables.code_lengths_within_reach(values, row) for values in symbols)
        added_error = (part - next_one).square_() - (part - nearest).square_()
        out.copy_(torch.where(bits - bits_of_next > error_bits * added_error, next_one, nearest))
    return chosen.view(residual.shape)


@dataclass(frozen=True)
class Quantization:
    """How an estimate of the rate quantizes latents: without arguments as CompressAI does, with random noise in
    training and by rounding in evaluation.

    Attributes:
        noise: added to y and to z for their likelihoods, of their shapes, in place of random noise.
        straight_through: likelihoods of the symbols, with rounding taken for the identity in their gradients; `noise`
            is then not used.
        choose: makes the symbols of y.
        use_scale_table: compute likelihoods with the σ of the table row that the published rule selects, the next
            larger one, as files nearly do. Without it σ is used itself, as papers report.
    """

    noise: tuple[Tensor, Tensor] | None = None
    straight_through: bool = False
    choose: Choice = nearest_symbols
    use_scale_table: bool = False


class SliceEstimator:
    """Collects the likelihoods of y.

    Args:
        parts: y in float32, as `CodingOrder.split` returns it.
        noise: that of `quantization` for y, in the same parts, or None.

    Attributes:
        likelihoods: one tensor per part, of its shape.
    """

    def __init__(
        self, gaussian: GaussianConditional, parts: list[Tensor], noise: list[Tensor] | None, quantization: Quantization
    ) -> None:
        self.gaussian = gaussian
        self.parts = parts
        self.noise = noise
        self.quantization = quantization
        self.likelihoods: list[Tensor] = []

    def __call__(self, mu: Tensor, sigma: Tensor) -> Tensor:
        number = len(self.likelihoods)
        y = self.parts[number]
        if self.quantization.use_scale_table:  # the gradient is that of σ
            level = self.gaussian.scale_table[table_rows(self.gaussian, sigma.detach()).long()]
            sigma = level + (sigma - sigma.detach())
        residual = y - mu
        symbols = self.quantization.choose(residual.detach(), sigma.detach())
        y_hat = symbols + mu.detach() + (y - y.detach())  # as in `ste_round`; to round y − μ has no gradient of μ
        if self.quantization.straight_through:
            likelihood = likelihood_of_y(self.gaussian, y_hat, sigma=sigma, mu=mu)
        elif self.noise is not None:
            likelihood = likelihood_of_y(self.gaussian, y + self.noise[number], sigma=sigma, mu=mu)
        else:
            _, likelihood = self.gaussian(y, sigma, mu)
        self.likelihoods.append(likelihood)
        return y_hat


@dataclass(frozen=True)
class QuantizedLatents:
    """All that is coded of a batch of images, before it is coded. Integers have as few bytes as hold them.

    Attributes:
        y: symbols `[B, M, h, w]`; rows: those of the scale table that code them.
        z: symbols, int32 `[B, C, h/4, w/4]`.
        y_hat: `[B, M, h, w]`, on the model's device; None unless requested.
        side_info: one per image, for decoding on other machines; None where the rows follow the published rule.
    """

    y: Tensor
    rows: Tensor
    z: Tensor
    y_hat: Tensor | None
    side_info: list[SideInfo] | None


class SliceEncoder:
    """Collects the symbols of y, and the table rows that code them, part by part.

    They are made AT_ONCE positions at a time, to avoid waiting for a GPU in every part, and to keep little of a large
    picture's symbols and σ.

    Args:
        parts: y, as `CodingOrder.split` returns it; consumed, to free memory.
        order: that of the parts.
        z: rounded, `[B, C, h/4, w/4]`.
        epsilon: as in `Codec`, for portable rows; None for those of the published rule.
        choose: makes the symbols.
    """

    def __init__(
        self, gaussian: GaussianConditional, tables: CodingTables, parts: list[Tensor], z: Tensor,
        epsilon: float | None, choose: Choice, order: CodingOrder,
    ) -> None:
        self.gaussian = gaussian
        self.tables = tables
        self.epsilon = epsilon
        self.choose = choose
        self.order = order
        self.parts = parts
        self.rounded_z = z
        self.z = None
        self.crcs = []
        self.waiting: list[tuple[Tensor, Tensor]] = []  # symbols as floats, and σ, `[B, n]`
        self.done: list[list[Tensor]] = []  # symbols and rows, `[B, n]`
        self.portable = [PortableRows() for _ in range(len(z))]

    def __call__(self, mu: Tensor, sigma: Tensor) -> Tensor:
        # Contiguous, so that to flatten them in the order of coding copies nothing.
        residual = torch.sub(self.parts.pop(0), mu, out=torch.empty_like(mu, memory_format=torch.contiguous_format))
        sigma = sigma.contiguous()
        symbols = self.choose(residual, sigma)
        del residual
        self.waiting.append((symbols.flatten(1), sigma.flatten(1)))
        if not self.parts or sum(sigma[0].numel() for _, sigma in self.waiting) >= AT_ONCE:
            self._add()
        return symbols + mu

    def _add(self) -> None:
        """Choose the rows of buffered symbols; before the last part whole blocks only."""
        rounded, sigma = self.waiting.pop()
        if self.waiting:
            rounded, sigma = (torch.cat(parts, 1) for parts in zip(*self.waiting, (rounded, sigma), strict=True))
            self.waiting.clear()
        if self.parts and (rest := rounded.shape[1] % BLOCK):
            self.waiting.append((rounded[:, -rest:].clone(), sigma[:, -rest:].clone()))
            rounded = rounded[:, :-rest]
            sigma = sigma[:, :-rest]
        if self.z is None:
            self.z = to_symbols(self.rounded_z)
            self.crcs = [crc_of(symbols) for symbols in self.z]
        for parts in zip(rounded.split(AT_ONCE, 1), sigma.split(AT_ONCE, 1), strict=True):
            self._add_part(*parts)

    def _add_part(self, rounded: Tensor, sigma: Tensor) -> None:
        symbols = to_symbols(rounded)
        if self.epsilon is None:
            rows = table_rows(self.gaussian, sigma)
        else:
            add = dict(lengths=self.tables.code_lengths, epsilon=self.epsilon)
            images = zip(self.portable, rounded.int(), sigma, strict=True)
            found = [one.add(self.gaussian, symbols=its, sigma=part, **add) for one, its, part in images]
            rows = torch.stack(found)
            self.crcs = [crc_of(one, crc) for one, crc in zip(symbols, self.crcs, strict=True)]
        self.done.append([smallest_dtype(values.cpu()) for values in (symbols, rows)])

    def finish(self, y_hat: Tensor | None) -> QuantizedLatents:
        """All that was collected, and ŷ."""
        height, width = (4 * side for side in self.rounded_z.shape[2:])
        flat = (torch.cat(parts, 1) for parts in zip(*self.done, strict=True))
        y, rows = (self.order.unflatten(values, height, width) for values in flat)
        side_info = None
        if self.epsilon is not None:
            pairs = zip(self.portable, self.crcs, strict=True)
            side_info = [SideInfo(portable.pack(), crc) for portable, crc in pairs]
        return QuantizedLatents(y, rows, z=self.z, y_hat=y_hat, side_info=side_info)


class SliceDecoder:
    """Reads the symbols of y from one stream per image.

    Args:
        count: elements of y of one image.
        side_info: one per image; None for streams whose rows follow the published rule.
        crcs: CRC-32 of each image's z; that of y is added part by part.
    """

    def __init__(
        self, gaussian: GaussianConditional, tables: CodingTables, streams: list[bytes], count: int,
        side_info: list[SideInfo] | None, crcs: list[int],
    ) -> None:
        self.gaussian = gaussian
        self.tables = tables
        self.crcs = crcs
        self.position = 0
        self.decoders = [open_stream(stream, count) for stream in streams]
        unpacked = [unpack_scales(info.scales, count) for info in side_info or ()]
        self.shifts = [shifts for shifts, _, _ in unpacked]
        self.listed = [(positions, above) for _, positions, above in unpacked]
        self.bits = [0.0] * len(streams)  # lengths of the codes, where there is no checksum

    def __call__(self, mu: Tensor, sigma: Tensor) -> Tensor:
        flat = sigma.flatten(1)
        symbols = torch.empty(flat.shape, dtype=torch.int32)
        for part, out in zip(flat.split(AT_ONCE, 1), symbols.split(AT_ONCE, 1), strict=True):
            first, end = self.position, self.position + part.shape[1]
            self.position = end
            if self.shifts:
                factors = [scale_factors(self.gaussian, shifts, first=first, end=end) for shifts in self.shifts]
                part = part * torch.stack(factors)
            rows = table_rows(self.gaussian, part).cpu()
            self._correct(first, rows, part)
            for number, decoder in enumerate(self.decoders):
                out[number] = self.tables.from_stream(decoder, rows[number])
                self.crcs[number] = crc_of(out[number], self.crcs[number])
                if not self.listed:
                    self.bits[number] += self.tables.count_bits(out[number], rows[number])
        return symbols.view(sigma.shape).to(mu.device).type_as(mu) + mu

    def _correct(self, first: int, rows: Tensor, sigma: Tensor) -> None:
        """Set the encoder's rows `[B, n]` at the listed positions of this part, in place."""
        for number, (positions, above) in enumerate(self.listed):
            start, end = np.searchsorted(positions, (first, self.position))
            if start == end:
                continue
            here = torch.from_numpy(positions[start:end] - first)
            below = table_rows(self.gaussian, sigma[number, here.to(sigma.device)] * BELOW).cpu()
            corrected = below + torch.from_numpy(above[start:end]).int()
            # A malicious file may name a row beyond the table, and CompressAI's coder does not check.
            rows[number, here] = corrected.clamp(max=len(self.tables.cdfs) - 1)
