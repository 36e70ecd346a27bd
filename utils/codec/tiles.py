"""Tiles of a padded picture, whose latents are refined one after the other: gradients need all activations of a tile.

A tile is computed with some of its surroundings, and beyond these as if the picture ended there. So gradients near the
borders of tiles are approximate; files are not, as they are made of whole pictures. Errors of pixels add up over tiles;
MS-SSIM is the mean of that of the tiles, each weighed by its pixels.
"""

import itertools
import math
from dataclasses import dataclass

from torch import Tensor

from models import STRIDE
from models.large.bands import WHOLE
from utils.images import margins

SIDE = 1024  # at most, without the surroundings
SURROUNDINGS = 128  # pixels on every side

Sides = tuple[range, range]  # rows and columns
Slices = tuple[slice, ...]


@dataclass(frozen=True)
class Tile:
    """A tile, in pixels of the padded picture; where rows and columns start and stop are multiples of 128.

    Attributes:
        sides: the rows and the columns of the tile without its surroundings.
        outer_sides: with them.
        margins: pixels of padding above and to the left of the picture.
        size: height and width of the picture, without padding.
    """

    sides: Sides
    outer_sides: Sides
    margins: tuple[int, int]
    size: tuple[int, int]

    def outer(self, unit: int) -> Slices:
        """The tile with its surroundings in a tensor `[B, C, …]` of the padded picture, a place for `unit` pixels."""
        return _slices(self.outer_sides, unit)

    def core(self, unit: int) -> Slices:
        """The tile itself in a tensor of the tile with its surroundings."""
        return _slices(_after(self.sides, self._outer_start), unit)

    @property
    def picture(self) -> Slices:
        """The pixels of the tile in the picture `[C, H, W]`."""
        return _slices(_after(self._inside(), self.margins), unit=1)[1:]

    def inside(self, x: Tensor) -> Tensor:
        """The pixels of the tile that belong to the picture, of a tensor of the tile with its surroundings."""
        return x[_slices(_after(self._inside(), self._outer_start), unit=1)]

    @property
    def _outer_start(self) -> tuple[int, int]:
        rows, columns = self.outer_sides
        return rows.start, columns.start

    def _inside(self) -> Sides:
        sides = zip(self.sides, self.margins, self.size, strict=True)
        rows, columns = (range(max(side[0], at), min(side[-1] + 1, at + length)) for side, at, length in sides)
        return rows, columns

    @property
    def outer_pixels(self) -> int:
        """How many pixels it has with its surroundings."""
        return math.prod(map(len, self.outer_sides))

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
    tiles = []
    for tile in itertools.product(*sides):
        pairs = zip(tile, padded, strict=True)
        outer = [range(max(0, at.start - SURROUNDINGS), min(end, at.stop + SURROUNDINGS)) for at, end in pairs]
        tiles.append(Tile(tile, tuple(outer), margins=(top, left), size=(height, width)))
    return tiles


def _cut(length: int) -> list[range]:
    count = math.ceil(length / SIDE)
    at = [length // STRIDE * number // count * STRIDE for number in range(count + 1)]
    return [range(start, stop) for start, stop in zip(at, at[1:], strict=False)]


def _after(sides: Sides, start: tuple[int, int]) -> Sides:
    """Rows and columns as they are counted from another start."""
    rows, columns = (range(side.start - at, side.stop - at) for side, at in zip(sides, start, strict=True))
    return rows, columns


def _slices(sides: Sides, unit: int) -> Slices:
    inner = (slice(side.start // unit, side.stop // unit) for side in sides)
    return slice(None), slice(None), *inner
