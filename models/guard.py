"""What a file needs so that it decodes on other machines too: plain data, for readers that need no network."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Guard:
    """Of one picture.

    Attributes:
        listed: the shift of each block of positions, a byte each, where there are any; then the sensitive positions,
            coded (models/sensitive.py).
        crc: CRC-32 of all symbols, z's first.
        shifted: whether there are shifts. Files of version 2 have none.
    """

    listed: bytes
    crc: int
    shifted: bool = True


class DecodingError(ValueError):
    """The symbols are not those that were encoded."""
