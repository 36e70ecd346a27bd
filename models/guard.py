"""What a file needs so that it decodes on other machines too: plain data, for readers that need no network."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Guard:
    """The list of sensitive positions, coded (models/sensitive.py), and the CRC-32 of all symbols, z's first."""

    listed: bytes
    crc: int


class DecodingError(ValueError):
    """The symbols are not those that were encoded."""
