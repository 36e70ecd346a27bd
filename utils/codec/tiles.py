"""Tiles of a padded picture, whose latents are refined one after the other: gradients need all activations of a tile.

A tile is computed with some of its surroundings, and beyond these as if the picture ended there. So gradients near the
borders of tiles are approximate; files are not, as they are made of whole pictures. Errors of pixels add up over tiles;
MS-SSIM is the mean of that of the tiles, each weighed by its pixels.
"""

import math
from dataclasses import dataclass

from torch import Tensor

from models import STRIDE
from models.large.bands import WHOLE
from utils.images import margins

SIDE = 1024  # at most, without the surroundings
SURROUNDINGS = 128  # pixels on every side

Slices = tuple[slice, ...]


@dataclass(frozen=True)
class Tile:
    """A tile, in pixels of the padded picture; where rows and columns start and stop are multiples of 128.

    Attributes:
        rows, columns: the tile without its surroundings.
        outer_rows, outer_columns: with them.
        margins: pixels of padding above and to the left of the picture.
        size: height and width of the picture, without padding.
    """

    rows: range
    columns: range
    outer_rows: range
    outer_columns: range
    margins: tuple[int, int]
    size: tuple[int, int]

    def outer(self, unit: int) -> Slices:
        """The tile with its surroundings in a tensor `[B, C, …]` of the padded picture, a place for `unit` pixels."""
        return _slices(self.outer_rows, self.outer_columns, unit)

    def core(self, unit: int) -> Slices:
        """The tile itself in a tensor of the tile with its surroundings."""
        return _slices(_relative(self.rows, self.outer_rows), _relative(self.columns, self.outer_columns), unit)

    @property
    def picture(self) -> Slices:
        """The pixels of the tile in the picture `[C, H, W]`."""
        rows, columns = self._inside()
        return _slices(_shifted(rows, -self.margins[0]), _shifted(columns, -self.margins[1]), 1)[1:]

    def inside(self, x: Tensor) -> Tensor:
        """The pixels of the tile that belong to the picture, of a tensor of the tile with its surroundings."""
        rows, columns = self._inside()
        return x[_slices(_relative(rows, self.outer_rows), _relative(columns, self.outer_columns), 1)]

    def _inside(self) -> tuple[range, range]:
        sides = zip((self.rows, self.columns), self.margins, self.size, strict=True)
        rows, columns = (range(max(side[0], at), min(side[-1] + 1, at + length)) for side, at, length in sides)
        return rows, columns

    @property
    def outer_pixels(self) -> int:
        """How many pixels it has with its surroundings."""
        return len(self.outer_rows) * len(self.outer_columns)

    @property
    def pixels(self) -> int:
        """How many pixels of the picture it has."""
        return math.prod(map(len, self._inside()))


def cut_tiles(height: int, width: int) -> list[Tile]:
    """The tiles of a picture: one, if it is computed at once."""
    left, right, top, bottom = margins(height, width)
    padded = height + top + bottom, width + left + right
    whole = padded[0] * padded[1] <= WHOLE
    sides = [[range(length)] if whole else _cut(length) for length in padded]
    outer = [
        [range(max(0, part.start - SURROUNDINGS), min(length, part.stop + SURROUNDINGS)) for part in parts]
        for parts, length in zip(sides, padded, strict=True)
    ]
    return [
        Tile(
            rows, columns, outer_rows=outer_rows, outer_columns=outer_columns,
            margins=(top, left), size=(height, width),
        )
        for rows, outer_rows in zip(sides[0], outer[0], strict=True)
        for columns, outer_columns in zip(sides[1], outer[1], strict=True)
    ]


def _cut(length: int) -> list[range]:
    count = math.ceil(length / SIDE)
    at = [length // STRIDE * number // count * STRIDE for number in range(count + 1)]
    return [range(start, stop) for start, stop in zip(at, at[1:], strict=False)]


def _relative(part: range, whole: range) -> range:
    return _shifted(part, -whole.start)


def _shifted(part: range, by: int) -> range:
    return range(part.start + by, part.stop + by)


def _slices(rows: range, columns: range, unit: int) -> Slices:
    inner = (slice(side.start // unit, side.stop // unit) for side in (rows, columns))
    return slice(None), slice(None), *inner
