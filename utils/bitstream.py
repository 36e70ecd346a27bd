"""A coded picture as bytes that need nothing else but the weights.

    magic "TVBR", version   4 + 1 bytes
    width, height           2 × uint16, of the picture before padding
    index                   float32, the rate index; NaN for a fixed-rate model
    length of z             uint32
    z stream, y stream      the rest

Little-endian. The padding and the size of z follow from width and height.
"""

import math
import struct
from typing import NamedTuple

from models.tcm import STRIDE

MAGIC, VERSION = b"TVBR", 1
_HEADER = struct.Struct("<4sBHHfI")


class Coded(NamedTuple):
    """What a file says: picture size in pixels, rate index, streams."""

    width: int
    height: int
    index: float | None
    y: bytes
    z: bytes

    @property
    def shape(self) -> tuple[int, int]:
        """(h, w) of z, after padding to multiples of 128."""
        return 2 * math.ceil(self.height / STRIDE), 2 * math.ceil(self.width / STRIDE)


def pack(coded: Coded) -> bytes:
    """The file of a coded picture. ValueError if a side is over 65535 pixels."""
    if not (0 < coded.width < 2**16 and 0 < coded.height < 2**16):
        raise ValueError(f"sides must lie in 1 … 65535 pixels, not {coded.width}×{coded.height}")
    index = math.nan if coded.index is None else coded.index
    return _HEADER.pack(MAGIC, VERSION, coded.width, coded.height, index, len(coded.z)) + coded.z + coded.y


def unpack(data: bytes) -> Coded:
    """What `pack` was given. ValueError for anything else than a file of this version."""
    if len(data) < _HEADER.size or data[:4] != MAGIC:
        raise ValueError("not a TCM_VBR file")
    _, version, width, height, index, length = _HEADER.unpack_from(data)
    if version != VERSION:
        raise ValueError(f"version {version} of the format; this program reads version {VERSION}")
    streams = data[_HEADER.size :]
    if not width or not height or length > len(streams):
        raise ValueError("the file is damaged: its header does not fit its length")
    return Coded(width, height, None if math.isnan(index) else index, y=streams[length:], z=streams[:length])
