"""What a file carries so that it decodes on other machines too. Plain data."""

from dataclasses import dataclass


@dataclass(frozen=True)
class SideInfo:
    """Side information of one picture.

    Attributes:
        scales: one byte per block of positions, its shift of the scale table; then the positions whose σ lies close
            to a boundary of that table, coded (models/coding/portable.py).
        crc: CRC-32 of all symbols, z's first.
    """

    scales: bytes
    crc: int


class DecodingError(ValueError):
    """The symbols that were decoded are not those that were encoded."""
