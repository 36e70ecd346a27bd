"""The order in which y is coded: slice by slice, and of the first slice, where a backbone has a context model for it,
group by group of its channels, each at some of the places after the others.

Every part sees those before it. The groups grow, as in "ELIC: Efficient Learned Image Compression with Unevenly Grouped
Space-Channel Contextual Adaptive Coding" (CVPR 2022, https://arxiv.org/abs/2203.10886). The places of a group are taken
from squares of 2×2, as in "Multistage Spatial Context Models for Learned Image Compression" (ICASSP 2023,
https://arxiv.org/abs/2302.09263): the black ones of a checkerboard, one by one where the group has many bits, then the
white ones, all of whose direct neighbors are known.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

BLACK_ONE, BLACK_OTHER = ((0, 0),), ((1, 1),)  # (row, column) in each square of 2×2
BLACK = BLACK_ONE + BLACK_OTHER
WHITE = ((0, 1), (1, 0))
# First and last channels of a part of the first slice, in quarters of its channels, and its places. Files depend on
# it, and no fingerprint covers it.
QUARTERS = 4
FIRST_SLICE = ((0, 1, BLACK_ONE), (0, 1, BLACK_OTHER), (0, 1, WHITE), (1, 4, BLACK), (1, 4, WHITE))


@dataclass(frozen=True)
class Part:
    """A part of the first slice, or of a tensor of its shape `[B, M/S, h, w]`.

    Attributes:
        first, end: the channels, `end` not included.
        places: (row, column) in each square of 2×2.
    """

    first: int
    end: int
    places: tuple[tuple[int, int], ...]

    def shape(self, height: int, width: int) -> tuple[int, int, int]:
        """Channels and sides of the part of a tensor of these sides."""
        return self.end - self.first, len(self.places) * height // 2, width // 2

    def of(self, y: Tensor) -> Tensor:
        """The part of a tensor: the places of each kind, h/2 × w/2, one kind below the other."""
        y = y[:, self.first : self.end]
        return torch.cat([y[:, :, row::2, column::2] for row, column in self.places], 2)

    def put(self, y: Tensor, values: Tensor) -> None:
        """Set the part of a tensor, in place."""
        y = y[:, self.first : self.end]
        for (row, column), kind in zip(self.places, values.chunk(len(self.places), 2), strict=True):
            y[:, :, row::2, column::2] = kind


@dataclass(frozen=True)
class CodingOrder:
    """Takes tensors of the shape of y `[B, M, h, w]` apart, and puts them together.

    Attributes:
        M: channels.
        num_slices: slices S of equally many channels.
        context_model: whether the first slice is coded in parts, those of `FIRST_SLICE`.

    Raises:
        ValueError: a context model wants slices of a multiple of 4 channels, and a second one, as `run_slices` may end
            before the latent residual of the last.
    """

    M: int
    num_slices: int
    context_model: bool = False

    def __post_init__(self) -> None:
        if self.context_model and (self.num_slices < 2 or self.M % (QUARTERS * self.num_slices)):
            sizes = f"not M = {self.M} and num_slices = {self.num_slices}"
            raise ValueError(f"a context_model wants two slices or more, of a multiple of {QUARTERS} channels, {sizes}")

    @functools.cached_property
    def first_slice(self) -> tuple[Part, ...]:
        """The parts of the first slice; none where it is coded at once."""
        quarter = self.M // self.num_slices // QUARTERS
        parts = FIRST_SLICE if self.context_model else ()
        return tuple(Part(quarter * first, quarter * end, places) for first, end, places in parts)

    def split(self, y: Tensor) -> list[Tensor]:
        """The parts of y in the order of coding: those of the first slice, if any, and slices."""
        slices = list(y.chunk(self.num_slices, 1))
        return [part.of(slices[0]) for part in self.first_slice] + slices[1:] if self.first_slice else slices

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """What `split` takes apart."""
        slices = list(parts[len(self.first_slice) :])
        if self.first_slice:
            first = torch.empty_like(slices[0])
            for part, values in zip(self.first_slice, parts, strict=False):
                part.put(first, values)
            slices.insert(0, first)
        return torch.cat(slices, 1)

    def flatten(self, y: Tensor) -> Tensor:
        """The values of y in the order of coding, each part in C, H, W order: `[B, n]`."""
        return torch.cat([part.flatten(1) for part in self.split(y)], 1) if self.first_slice else y.flatten(1)

    def unflatten(self, values: Tensor, height: int, width: int) -> Tensor:
        """What `flatten` makes flat, of these sides."""
        if not self.first_slice:
            return values.unflatten(1, (-1, height, width))
        slices = [(self.M // self.num_slices, height, width)] * (self.num_slices - 1)
        shapes = [part.shape(height, width) for part in self.first_slice] + slices
        flat = values.split([channels * rows * columns for channels, rows, columns in shapes], 1)
        return self.join([part.unflatten(1, shape) for part, shape in zip(flat, shapes, strict=True)])
