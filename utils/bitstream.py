"""A coded picture as bytes that need nothing else but the weights: docs/bitstream.md.

The padding and the sizes of z and y follow from width and height. Nothing is allocated before the checks here.
"""

import math
import struct
import zlib
from dataclasses import dataclass

from models import STRIDE
from models.guard import Guard

MAGIC, VERSION = b"TVBR", 3
FIXED_RATE = 1  # flag: made by a fixed-rate TCM, the index means nothing
MAX_PIXELS = 2**28  # a decoder would run out of memory long before 65535²: the caller may allow more

_VERSION_1 = struct.Struct("<4sBHHfI")
_VERSION_2 = struct.Struct("<4sBBHHf8sIII")
_CRC = struct.Struct("<I")
HEADER_BYTES = _VERSION_2.size + _CRC.size


class FileError(ValueError):
    """Not a file that can be decoded: one line that says why."""


@dataclass(frozen=True)
class Coded:
    """What a file says: picture size in pixels, rate index, streams; version 1 had no fingerprint and guard."""

    width: int
    height: int
    index: float | None
    y: bytes
    z: bytes
    fingerprint: bytes | None = None
    guard: Guard | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(h, w) of z, after padding to multiples of 128."""
        return 2 * math.ceil(self.height / STRIDE), 2 * math.ceil(self.width / STRIDE)


def pack(coded: Coded) -> bytes:
    """The file of a coded picture, with its fingerprint and guard. ValueError if a side is over 65535 pixels."""
    if not (0 < coded.width < 2**16 and 0 < coded.height < 2**16):
        raise ValueError(f"sides must lie in 1 … 65535 pixels, not {coded.width}×{coded.height}")
    listed = coded.guard.listed
    head = _VERSION_2.pack(
        MAGIC,
        VERSION if coded.guard.shifted else 2,
        FIXED_RATE if coded.index is None else 0,
        coded.width,
        coded.height,
        coded.index or 0.0,
        coded.fingerprint,
        len(coded.z),
        len(listed),
        coded.guard.crc,
    )
    payload = coded.z + listed + coded.y
    return head + _CRC.pack(zlib.crc32(payload, zlib.crc32(head))) + payload


def unpack(data: bytes, max_pixels: int = MAX_PIXELS) -> Coded:
    """What `pack` was given.

    Raises:
        FileError: not such a file, of a newer version, damaged, or larger than max_pixels.
    """
    if data[:4] != MAGIC or len(data) < 5:
        raise FileError("not a TVBR file")
    readers = {1: _unpack_1, 2: _unpack_2, 3: _unpack_2}
    if data[4] not in readers:
        raise FileError(f"version {data[4]} of the format; this program reads up to version {VERSION}")
    coded = readers[data[4]](data)
    if not coded.width or not coded.height:
        raise FileError("the file is damaged: a picture without pixels")
    if coded.index is not None and not 0 <= coded.index <= 5:
        raise FileError(f"the file is damaged: a rate index of {coded.index:g}")
    if coded.width * coded.height > max_pixels:
        most = f"{max_pixels / 1e6:.0f} megapixels"
        raise FileError(f"{coded.width}×{coded.height} is more than {most}: refused, as it may be an attack")
    return coded


def _unpack_2(data: bytes) -> Coded:
    start = _VERSION_2.size + _CRC.size
    if len(data) < start:
        raise FileError("the file is damaged: it ends within its header")
    head, payload = data[: _VERSION_2.size], data[start:]
    (crc,) = _CRC.unpack_from(data, _VERSION_2.size)
    if zlib.crc32(payload, zlib.crc32(head)) != crc:
        raise FileError("the file is damaged: its checksum does not fit")
    _, version, flags, width, height, index, fingerprint, length, listed, symbols = _VERSION_2.unpack(head)
    if flags & ~FIXED_RATE:
        raise FileError(f"the file uses features (flags {flags:#x}) of a newer program")
    if length + listed > len(payload):
        raise FileError("the file is damaged: its header does not fit its length")
    return Coded(
        width,
        height,
        None if flags & FIXED_RATE else index,
        y=payload[length + listed :],
        z=payload[:length],
        fingerprint=fingerprint,
        guard=Guard(payload[length : length + listed], symbols, shifted=version > 2),
    )


def _unpack_1(data: bytes) -> Coded:
    if len(data) < _VERSION_1.size:
        raise FileError("the file is damaged: it ends within its header")
    _, _, width, height, index, length = _VERSION_1.unpack_from(data)
    streams = data[_VERSION_1.size :]
    if length > len(streams):
        raise FileError("the file is damaged: its header does not fit its length")
    return Coded(width, height, None if math.isnan(index) else index, y=streams[length:], z=streams[:length])
