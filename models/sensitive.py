"""Decoding elsewhere: which σ lie so near a boundary of the scale table that another machine may see them across it.

Only the table rows steer the entropy decoder. Floating point differs in its last bits between processors, thread
counts and kernels, and one row taken differently makes garbage of all that follows. So the encoder lists the
positions whose σ is within ε of a boundary, and the side that it took; the decoder computes the rest.
"""

import zlib

import numpy as np
import torch
from compressai.entropy_models import GaussianConditional
from torch import Tensor

# Relative. Differences of σ measured between one thread and two, memory formats, attention kernels, with and
# without oneDNN, and against float64: 6.1e-6 at most, 3.2e-6 for 99.9 % of the positions (README).
EPSILON = 7e-6
_BELOW = 0.95  # neighbouring boundaries are 13 % apart: a little below one is surely above the one before


def table_index(gaussian: GaussianConditional, sigma: Tensor) -> Tensor:
    """Row of the scale table for every σ, int32: build_indexes in one search instead of 63 passes."""
    bounded = gaussian.lower_bound_scale(sigma).contiguous()  # the order in which symbols are coded
    return torch.bucketize(bounded, gaussian.scale_table[:-1], out_int32=True)


def table_index_and_sides(
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
