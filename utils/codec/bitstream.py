"""The file format: a coded picture as bytes that need nothing but the weights (docs/bitstream.md).

The padding and the sizes of z and y follow from width and height. Nothing is allocated before the checks here.
"""

import math
import struct
import zlib
from dataclasses import dataclass

from models import STRIDE
from models.lambdas import MAX_INDEX
from models.side_info import SideInfo
from utils.files import MAX_PIXELS, MAX_SIDE

MAGIC, VERSION = b"TVBR", 3
FIXED_RATE = 1  # flag: made by a fixed-rate TCM, the index means nothing

# Magic, version, flags, width, height, index, fingerprint, lengths of z and of the side information, CRC of symbols.
_HEADER = struct.Struct("<4sBBHHf8sIII")
_CRC = struct.Struct("<I")
HEADER_BYTES = _HEADER.size + _CRC.size


class BitstreamError(ValueError):
    """The file cannot be decoded: one line that says why."""


@dataclass(frozen=True)
class CodedImage:
    """Contents of a file: size in pixels, rate index (None for a fixed rate), streams, weights, side information."""

    width: int
    height: int
    index: float | None
    y: bytes
    z: bytes
    fingerprint: bytes
    side_info: SideInfo

    @property
    def shape(self) -> tuple[int, int]:
        """(h, w) of z, after padding to multiples of 128."""
        return 2 * math.ceil(self.height / STRIDE), 2 * math.ceil(self.width / STRIDE)


def pack(coded: CodedImage) -> bytes:
    """The file of a coded picture. ValueError if a side is over MAX_SIDE."""
    if not (0 < coded.width <= MAX_SIDE and 0 < coded.height <= MAX_SIDE):
        raise ValueError(f"sides must lie in 1 … {MAX_SIDE} pixels, not {coded.width}×{coded.height}")
    scales, flags = coded.side_info.scales, FIXED_RATE if coded.index is None else 0
    header = _HEADER.pack(
        MAGIC, VERSION, flags, coded.width, coded.height, coded.index or 0.0, coded.fingerprint,
        len(coded.z), len(scales), coded.side_info.crc,
    )
    payload = coded.z + scales + coded.y
    return header + _CRC.pack(zlib.crc32(payload, zlib.crc32(header))) + payload


def unpack(data: bytes, max_pixels: int = MAX_PIXELS) -> CodedImage:
    """What `pack` was given.

    Raises:
        BitstreamError: not such a file, of another version, damaged, or of more than max_pixels.
    """
    if data[:4] != MAGIC or len(data) < 5:
        raise BitstreamError("not a TVBR file")
    if data[4] != VERSION:
        raise BitstreamError(f"version {data[4]} of the format; this program reads version {VERSION}")
    if len(data) < HEADER_BYTES:
        raise BitstreamError("the file is damaged: it ends within its header")
    header, payload = data[: _HEADER.size], data[HEADER_BYTES:]
    (crc,) = _CRC.unpack_from(data, _HEADER.size)
    if zlib.crc32(payload, zlib.crc32(header)) != crc:
        raise BitstreamError("the file is damaged: its checksum does not fit")
    _, _, flags, width, height, index, fingerprint, z_length, scales_length, symbols_crc = _HEADER.unpack(header)
    if flags & ~FIXED_RATE:
        raise BitstreamError(f"the file uses features (flags {flags:#x}) of a newer program")
    start = z_length + scales_length
    if start > len(payload):
        raise BitstreamError("the file is damaged: its header does not fit its length")
    if not width or not height:
        raise BitstreamError("the file is damaged: a picture without pixels")
    if not flags & FIXED_RATE and not 0 <= index <= MAX_INDEX:
        raise BitstreamError(f"the file is damaged: a rate index of {index:g}")
    if width * height > max_pixels:
        most = f"{max_pixels / 1e6:.0f} megapixels"
        raise BitstreamError(f"{width}×{height} is more than {most}: refused, as it may be an attack")
    index = None if flags & FIXED_RATE else index
    side_info = SideInfo(payload[z_length:start], symbols_crc)
    return CodedImage(width, height, index, payload[start:], payload[:z_length], fingerprint, side_info)
