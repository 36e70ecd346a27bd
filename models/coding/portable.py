"""Scale-table rows that stay equal across machines whose σ differ a little.

Only these rows steer the entropy decoder. Floating point differs in its last bits between processors, thread
counts and kernels, and one wrong row turns all that follows into garbage. So a file

- divides the σ of each block of positions, before the search, by a factor: its shift, in 128ths of the distance
  between two rows. The encoder takes the one that costs fewest bits, those of the list included, so few σ stay near a
  boundary; and as it corrects σ too, files are smaller than by the published rule, which rounds every σ up to the next
  level of the table;
- lists the positions whose σ still lies within ε of a boundary, with the side that the encoder took.

The decoder computes the rest. As long as the σ of both machines differ by less than ε, relatively, decoding is exact.
"""

import math
import zlib
from collections.abc import Callable

import numpy as np
import torch
from compressai.entropy_models import GaussianConditional
from torch import Tensor

# Relative. σ was seen to differ by at most 2.3e-5 with weights of DepthConv, and by 4.6e-5 with TCM small, which is
# near, between one thread and several, memory formats, attention kernels, with and without oneDNN, and against float64
# (docs/performance.md). Twice as much costs half a percent to one of the bits.
EPSILON = 5e-5
BLOCK = 2**14  # positions that share a shift
SHIFTS_PER_ROW = 128  # shifts from one boundary of the table to the next; a byte holds two rows of them
BLOCKS_AT_ONCE = 64  # blocks whose shifts are chosen together, which bounds the memory
_BITS_PER_LISTED = 16  # what a listed position costs, about
BELOW = 0.95  # a listed σ × BELOW falls in the row under its boundary; boundaries are 13 % apart

# Bits of int32 symbols `[n]` with int32 rows `[n]`.
CodeLengths = Callable[[Tensor, Tensor], Tensor]


def count_blocks(count: int) -> int:
    """Number of shifts for this many positions."""
    return math.ceil(count / BLOCK)


def scale_factors(gaussian: GaussianConditional, shifts: np.ndarray, first: int, end: int) -> Tensor:
    """The factors on the σ of the positions first … end: float32 `[end − first]`, on the table's device.

    Args:
        shifts: those of all blocks, uint8.
    """
    powers = np.exp(-_log_step(gaussian) / SHIFTS_PER_ROW * np.arange(256)).astype(np.float32)
    start = first // BLOCK * BLOCK
    blocks = shifts[first // BLOCK : count_blocks(end)]
    factors = np.repeat(powers[blocks], BLOCK)[first - start : end - start]
    return torch.from_numpy(factors).to(gaussian.scale_table.device)


def choose_shifts(
    gaussian: GaussianConditional, lengths: CodeLengths, symbols: Tensor, sigma: Tensor, epsilon: float
) -> np.ndarray:
    """The shift of every block, uint8 `[blocks]`, that costs fewest bits, with those of its listed positions.

    Args:
        symbols, sigma: `[n]`, on the device of the table.
    """
    levels = gaussian.scale_table
    step = _log_step(gaussian)
    if len(levels) < 2:
        return np.zeros(count_blocks(len(sigma)), np.uint8)
    if count_blocks(len(sigma)) > BLOCKS_AT_ONCE:
        size = BLOCKS_AT_ONCE * BLOCK
        pairs = zip(symbols.split(size), sigma.split(size), strict=True)
        parts = (choose_shifts(gaussian, lengths, symbols=s, sigma=part, epsilon=epsilon) for s, part in pairs)
        return np.concatenate(list(parts))
    # A larger shift makes σ smaller, until it passes a boundary of the table and is coded by the row below. So the bits
    # of a block at each of its 256 shifts are a running sum of the changes at the shifts where one of its σ passes a
    # boundary; and a position is listed at the shift that brings its σ within epsilon of one.
    live = (sigma > levels[0]).nonzero().flatten()  # the others are coded by row 0 whatever their shift
    position = (sigma[live].clamp(max=9 * levels[-1]) / levels[0]).log() / step  # in rows: boundaries are whole numbers
    row = position.ceil().int().clamp(max=len(levels) - 1)  # without a shift
    block = live // BLOCK * 256
    count = count_blocks(len(sigma)) * 256
    change, listed = torch.zeros(2, count, dtype=torch.float64, device=sigma.device)  # by block and shift
    bits = lengths(symbols[live], row)
    for passed in range(256 // SHIFTS_PER_ROW):  # how many boundaries a σ has passed before the one looked at
        boundary = row - 1 - passed
        shift = (position - boundary) * SHIFTS_PER_ROW  # at which σ lies on the boundary
        first_beyond = shift.ceil().long()
        nearest = shift.round().long()
        bits_below = lengths(symbols[live], boundary.clamp(min=0))
        exists = boundary >= 0
        reached = exists & (first_beyond < 256)
        change += torch.bincount((block + first_beyond)[reached], (bits_below - bits)[reached].double(), count)
        close = exists & (nearest < 256) & ((shift.double() - nearest).abs() < epsilon / step * SHIFTS_PER_ROW)
        listed += torch.bincount((block + nearest)[close], minlength=count)
        bits = bits_below
    total = change.view(-1, 256).cumsum(1) + _BITS_PER_LISTED * listed.view(-1, 256)
    return total.argmin(1).byte().cpu().numpy()


def _log_step(gaussian: GaussianConditional) -> float:
    """ln of the ratio of neighboring levels of the table, which are spaced evenly in ln σ."""
    levels = gaussian.scale_table.double()
    return float((levels[-1] / levels[0]).log()) / max(1, len(levels) - 1)


class PortableRows:
    """The rows of one picture's positions, and what its file says of them: shifts and list."""

    def __init__(self) -> None:
        self.count = 0
        self.shifts = []
        self.positions = []
        self.sides = []

    def add(
        self, gaussian: GaussianConditional, lengths: CodeLengths, symbols: Tensor, sigma: Tensor, epsilon: float
    ) -> Tensor:
        """The rows of the positions that follow, int32 `[n]`, where n is a multiple of BLOCK until the last ones.

        Args:
            symbols: int32 `[n]`, on the model's device as sigma `[n]`.
        """
        shifts = choose_shifts(gaussian, lengths, symbols=symbols, sigma=sigma, epsilon=epsilon)
        sigma = sigma * scale_factors(gaussian, shifts, first=0, end=len(sigma))
        below, above = (table_rows(gaussian, sigma * factor) for factor in (1 - epsilon, 1 + epsilon))
        rows = table_rows(gaussian, sigma)
        positions = (below != above).nonzero().flatten()
        self.sides.append((rows[positions] != below[positions]).cpu().numpy())
        self.positions.append(self.count + positions.cpu().numpy())
        self.shifts.append(shifts)
        self.count += len(sigma)
        return rows

    def pack(self) -> bytes:
        """The bytes of `SideInfo.scales`: a shift for each block, then the listed positions."""
        listed = pack_positions(np.concatenate(self.positions), np.concatenate(self.sides))
        return np.concatenate(self.shifts).tobytes() + listed


def unpack_scales(scales: bytes, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Shifts, listed positions and their sides, from `SideInfo.scales`. ValueError where it is damaged."""
    length = count_blocks(count)
    if len(scales) < length:
        raise ValueError("the list of sensitive positions is damaged")
    return np.frombuffer(scales[:length], np.uint8), *unpack_positions(scales[length:], count)


def table_rows(gaussian: GaussianConditional, sigma: Tensor) -> Tensor:
    """The row of the scale table for every σ, int32 in its shape: CompressAI's build_indexes in one search, not 63."""
    bounded = gaussian.lower_bound_scale(sigma).contiguous()  # in the order in which symbols are coded
    return torch.bucketize(bounded, gaussian.scale_table[:-1], out_int32=True)


def pack_positions(positions: np.ndarray, above: np.ndarray) -> bytes:
    """Rising positions, each with the side that was taken: Rice codes of the gaps, each followed by one bit.

    The first byte is the number of low bits; the end is filled with ones, which end no code.
    """
    if not len(positions):
        return b""
    gaps = np.diff(positions, prepend=-1) - 1
    low = max(0, int(np.log2(gaps.mean() * np.log(2) + 1e-9)))
    bits = "".join(
        "1" * (gap >> low) + "0" + (f"{gap & ((1 << low) - 1):0{low}b}" if low else "") + str(side)
        for gap, side in zip(gaps.tolist(), above.astype(int).tolist(), strict=True)
    )
    bits += "1" * (-len(bits) % 8)
    return bytes([low]) + int(bits, 2).to_bytes(len(bits) // 8, "big")


def unpack_positions(data: bytes, count: int) -> tuple[np.ndarray, np.ndarray]:
    """What `pack_positions` was given, of `count` positions in all. ValueError where it is damaged."""
    low = data[0] if data else 0
    positions = []
    above = []
    bits = f"{int.from_bytes(data[1:], 'big'):0{8 * (len(data) - 1)}b}" if data else ""
    at = 0
    position = -1
    while (end := bits.find("0", at)) >= 0:
        high = end - at
        at = end + 2 + low
        position += 1 + (high << low) + int(bits[end + 1 : at - 1] or "0", 2)
        if at > len(bits) or position >= count:
            raise ValueError("the list of sensitive positions is damaged")
        positions.append(position)
        above.append(bits[at - 1] == "1")
    return np.array(positions, np.int64), np.array(above, bool)


def crc_of(symbols: Tensor, crc: int = 0) -> int:
    """CRC-32 of int32 symbols, continuing from another one."""
    return zlib.crc32(symbols.contiguous().numpy(), crc)
