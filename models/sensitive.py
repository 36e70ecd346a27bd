"""Decoding elsewhere: rows of the scale table that another machine selects too, although its σ differ a little.

Only the table rows steer the entropy decoder. Floating point differs in its last bits between processors, thread
counts and kernels, and one row taken differently makes garbage of all that follows. So a file

- divides the σ of each block of positions, before the search, by a factor that keeps them off the boundaries: its
  shift, in 128ths of the distance of two rows. Of those that do, it is the one that costs fewest bits: the published
  rule, without shifts, takes the next larger level of the table for every σ, and not the nearest or the best;
- lists the positions whose σ is within ε of a boundary all the same, with the side that the encoder took.

The decoder computes the rest. As long as both machines' σ differ by less than ε, relatively, decoding is exact.
"""

import math
import zlib
from collections.abc import Callable

import numpy as np
import torch
from compressai.entropy_models import GaussianConditional
from torch import Tensor

# Relative. Differences of σ measured between one thread and two, memory formats, attention kernels, with and without
# oneDNN, compiled, and against float64: 7.1e-6 at most, 3.3e-6 for 99.9 % of the positions (README); GPUs choose among
# more kernels, so there is room.
EPSILON = 5e-5
BLOCK = 2**14  # positions that share a shift
PER_ROW = 128  # shifts from one boundary of the table to the next; there are 256, two rows
AT_ONCE = 64  # blocks for which shifts are chosen together: bounds the memory
_LISTED = 16  # bits that a listed position costs, about
_BELOW = 0.95  # neighbouring boundaries are 13 % apart: a little below one is surely above the one before

# Bits of symbols under rows of the table, both int32 `[n]`.
CodeLengths = Callable[[Tensor, Tensor], Tensor]


def blocks(count: int) -> int:
    """How many shifts so many positions have."""
    return math.ceil(count / BLOCK)


def factors(gaussian: GaussianConditional, shifts: np.ndarray, count: int) -> Tensor:
    """What each of so many positions' σ is multiplied by: float32 `[count]`, on the table's device."""
    powers = np.exp(-_row(gaussian) / PER_ROW * np.arange(256)).astype(np.float32)
    return torch.from_numpy(np.repeat(powers[shifts], BLOCK)[:count]).to(gaussian.scale_table.device)


def choose_shifts(
    gaussian: GaussianConditional, lengths: CodeLengths, symbols: Tensor, sigma: Tensor, epsilon: float
) -> np.ndarray:
    """The shift of every block, uint8 `[blocks]`: fewest bits, those of the positions to be listed counted.

    Args:
        symbols, sigma: `[n]`, on the CPU.
    """
    levels, row = gaussian.scale_table.cpu(), _row(gaussian)
    if len(levels) < 2:
        return np.zeros(blocks(len(sigma)), np.uint8)
    if blocks(len(sigma)) > AT_ONCE:
        parts = zip(symbols.split(AT_ONCE * BLOCK), sigma.split(AT_ONCE * BLOCK), strict=True)
        return np.concatenate([choose_shifts(gaussian, lengths, *part, epsilon) for part in parts])
    live = (sigma > levels[0]).nonzero().flatten()  # the others are in row 0 whatever their shift
    at = (sigma[live].clamp(max=9 * levels[-1]) / levels[0]).log() / row  # in rows: boundaries are whole
    above = at.ceil().int().clamp(max=len(levels) - 1)
    first = live.numpy() // BLOCK * 256
    count = blocks(len(sigma)) * 256
    cost = np.zeros(count)  # of each block at each shift, against that at the one before; summed up below
    listed = np.zeros(count)
    before = lengths(symbols[live], above)
    for passed in range(256 // PER_ROW):  # boundaries that a shift moves past this σ, one after the other
        until = (at - (above - 1 - passed)) * PER_ROW
        crossed, nearest = until.ceil().numpy().astype(int), until.round().numpy().astype(int)
        after = lengths(symbols[live], (above - 1 - passed).clamp(min=0))
        real = (above > passed).numpy()  # there is such a boundary
        inside = real & (crossed < 256)
        cost += np.bincount(first[inside] + crossed[inside], (after - before).numpy()[inside], count)
        close = real & (nearest < 256) & (np.abs(until.numpy() - nearest) < epsilon / row * PER_ROW)
        listed += np.bincount(first[close] + nearest[close], minlength=count)
        before = after
    return (cost.reshape(-1, 256).cumsum(1) + _LISTED * listed.reshape(-1, 256)).argmin(1).astype(np.uint8)


def _row(gaussian: GaussianConditional) -> float:
    """ln of the ratio of neighbouring levels of the table, which are spaced evenly in ln σ."""
    levels = gaussian.scale_table.double()
    return float((levels[-1] / levels[0]).log()) / max(1, len(levels) - 1)


def guard_rows(
    gaussian: GaussianConditional, lengths: CodeLengths, symbols: Tensor, sigma: Tensor, epsilon: float
) -> tuple[Tensor, bytes]:
    """Rows of one picture's positions, int32 `[n]` on the CPU, and what its file says of them: shifts and list.

    Args:
        symbols: int32 `[n]`, on the CPU.
        sigma: `[n]`, on the model's device.
    """
    shifts = choose_shifts(gaussian, lengths, symbols, sigma.cpu(), epsilon)
    moved = sigma * factors(gaussian, shifts, len(sigma))
    rows, near, below = (part.cpu() for part in _table_index_and_sides(gaussian, moved, epsilon))
    positions = near.nonzero().flatten()
    above = rows[positions] != below[positions]
    return rows, shifts.tobytes() + pack_positions(positions.numpy(), above.numpy())


def read_listed(listed: bytes, shifted: bool, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Shifts (zero where a file has none), listed positions and their sides. ValueError where they cannot be."""
    length = blocks(count) if shifted else 0
    if len(listed) < length:
        raise ValueError("the list of sensitive positions is damaged")
    shifts = np.frombuffer(listed[:length], np.uint8) if shifted else np.zeros(blocks(count), np.uint8)
    return shifts, *unpack_positions(listed[length:], count)


def table_index(gaussian: GaussianConditional, sigma: Tensor) -> Tensor:
    """Row of the scale table for every σ, int32: build_indexes in one search instead of 63 passes."""
    bounded = gaussian.lower_bound_scale(sigma).contiguous()  # the order in which symbols are coded
    return torch.bucketize(bounded, gaussian.scale_table[:-1], out_int32=True)


def _table_index_and_sides(
    gaussian: GaussianConditional, sigma: Tensor, epsilon: float
) -> tuple[Tensor, Tensor, Tensor]:
    """For every σ its `table_index`, whether a boundary lies within relative ε of it, and the row below that one.

    The last is `row_below` where there is such a boundary, and of no use elsewhere.
    """
    below = table_index(gaussian, sigma * (1 - epsilon))
    return table_index(gaussian, sigma), below != table_index(gaussian, sigma * (1 + epsilon)), below


def row_below(gaussian: GaussianConditional, sigma: Tensor) -> Tensor:
    """For σ close to a boundary, on whichever side: the row below it."""
    return table_index(gaussian, sigma * _BELOW)


def pack_positions(positions: np.ndarray, above: np.ndarray) -> bytes:
    """Rising positions, each with the side that was taken: Rice codes of the gaps, and a bit.

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
    """What `pack_positions` was given, of `count` positions in all. ValueError if it cannot be."""
    positions, above = [], []
    if data:
        low = data[0]
        bits = f"{int.from_bytes(data[1:], 'big'):0{8 * (len(data) - 1)}b}"
        at, position = 0, -1
        while (end := bits.find("0", at)) >= 0:
            high, at = end - at, end + 2 + low
            if at > len(bits):
                raise ValueError("the list of sensitive positions is damaged")
            position += 1 + (high << low) + int(bits[end + 1 : at - 1] or "0", 2)
            if position >= count:
                raise ValueError("the list of sensitive positions is damaged")
            positions.append(position)
            above.append(bits[at - 1] == "1")
    return np.array(positions, np.int64), np.array(above, bool)


def crc_of(symbols: Tensor, crc: int = 0) -> int:
    """CRC-32 of int32 symbols, going on from another one."""
    return zlib.crc32(symbols.contiguous().numpy(), crc)
