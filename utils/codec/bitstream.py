"""The file format: a coded picture as bytes that need nothing but the weights (docs/bitstream.md).

The padding and the sizes of z and y follow from width and height. Nothing is allocated before the checks here.
"""

import math
import struct
import zlib
from dataclasses import dataclass, replace

from models import STRIDE
from models.coding.side_info import SideInfo
from models.lambdas import in_range
from utils.files import MAX_PIXELS, MAX_SIDE

MAGIC = b"TVBR"
VERSION = 3
# Flags: made by a fixed-rate codec, whose index means nothing; with a map of rate indexes; of a picture without colors.
FIXED_RATE, MAP, GRAY = 1, 2, 4
STEPS = 16  # per index: offsets are multiples of 1/16

# Magic, version, flags, width, height, index, fingerprint, lengths of z and of the side information, CRC of symbols.
_HEADER = struct.Struct("<4sBBHHf8sIII")
_CRC = _MAP_LENGTH = struct.Struct("<I")
HEADER_BYTES = _HEADER.size + _CRC.size


class BitstreamError(ValueError):
    """The file cannot be decoded: one line that says why."""


@dataclass(frozen=True)
class CodedImage:
    """Contents of a file: size in pixels, rate index (None for a fixed rate), streams, weights, side information.

    Where the index differs from place to place there are `offsets`, int8 steps of 1/16 for each element of z's grid,
    row by row: the index there is index + offset / 16. `gray` says that the three channels of the picture were equal.
    """

    width: int
    height: int
    index: float | None
    y: bytes
    z: bytes
    fingerprint: bytes
    side_info: SideInfo
    offsets: bytes = b""
    gray: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        """(h, w) of z, after padding to multiples of 128."""
        return 2 * math.ceil(self.height / STRIDE), 2 * math.ceil(self.width / STRIDE)


def pack(coded: CodedImage) -> bytes:
    """The file of a coded picture. ValueError if a side is over MAX_SIDE."""
    if not (0 < coded.width <= MAX_SIDE and 0 < coded.height <= MAX_SIDE):
        raise ValueError(f"sides must lie in 1 … {MAX_SIDE} pixels, not {coded.width}×{coded.height}")
    scales = coded.side_info.scales
    flags = (FIXED_RATE if coded.index is None else MAP if coded.offsets else 0) | (GRAY if coded.gray else 0)
    header = _HEADER.pack(
        MAGIC, VERSION, flags, coded.width, coded.height, coded.index or 0.0, coded.fingerprint,
        len(coded.z), len(scales), coded.side_info.crc,
    )
    payload = pack_offsets(coded.offsets) + coded.z + scales + coded.y
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
    header = data[: _HEADER.size]
    payload = data[HEADER_BYTES:]
    (crc,) = _CRC.unpack_from(data, _HEADER.size)
    if zlib.crc32(payload, zlib.crc32(header)) != crc:
        raise BitstreamError("the file is damaged: its checksum does not fit")
    _, _, flags, width, height, index, fingerprint, z_length, scales_length, symbols_crc = _HEADER.unpack(header)
    if flags & ~GRAY not in (0, FIXED_RATE, MAP):
        raise BitstreamError(f"the file uses features (flags {flags:#x}) of a newer program")
    map_length = 0
    if flags & MAP and len(payload) >= _MAP_LENGTH.size:
        map_length = _MAP_LENGTH.size + _MAP_LENGTH.unpack_from(payload)[0]
    start = map_length + z_length + scales_length
    if start > len(payload) or (flags & MAP and not map_length):
        raise BitstreamError("the file is damaged: its header does not fit its length")
    if not width or not height:
        raise BitstreamError("the file is damaged: a picture without pixels")
    if not flags & FIXED_RATE and not in_range(index):
        raise BitstreamError(f"the file is damaged: a rate index of {index:g}")
    if width * height > max_pixels:
        most = f"{max_pixels / 1e6:.0f} megapixels"
        raise BitstreamError(f"{width}×{height} is more than {most}: refused, as it may be an attack")
    index = None if flags & FIXED_RATE else index
    z = payload[map_length : map_length + z_length]
    scales = payload[map_length + z_length : start]
    y = payload[start:]
    side_info = SideInfo(scales, symbols_crc)
    gray = bool(flags & GRAY)
    coded = CodedImage(width, height, index, y=y, z=z, fingerprint=fingerprint, side_info=side_info, gray=gray)
    if flags & MAP:
        coded = replace(coded, offsets=_unpack_offsets(payload[_MAP_LENGTH.size : map_length], coded))
    return coded


def pack_offsets(offsets: bytes) -> bytes:
    """A map as it stands in a file; nothing without a map."""
    if not offsets:
        return b""
    packed = zlib.compress(offsets, 9)
    return _MAP_LENGTH.pack(len(packed)) + packed


def _unpack_offsets(packed: bytes, coded: CodedImage) -> bytes:
    count = math.prod(coded.shape)
    decompressor = zlib.decompressobj()
    try:
        offsets = decompressor.decompress(packed, count + 1)
    except zlib.error:
        offsets = b""
    if len(offsets) != count or not decompressor.eof or decompressor.unused_data:
        raise BitstreamError("the file is damaged: its map of rate indexes does not fit the picture")
    for extreme in extremes(coded.index, offsets):
        if not in_range(extreme):
            raise BitstreamError(f"the file is damaged: a rate index of {extreme:g} in its map")
    return offsets


def extremes(index: float, offsets: bytes) -> tuple[float, float]:
    """The smallest and the largest index of a map."""
    signed = memoryview(offsets).cast("b")
    return index + min(signed) / STEPS, index + max(signed) / STEPS
