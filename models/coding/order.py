"""The order in which y is coded: slice by slice, and of some slices the black places of a checkerboard, then the white.

"Checkerboard Context Model for Efficient Learned Image Compression" (CVPR 2021, https://arxiv.org/abs/2103.15306): the
second half of a slice has four neighbors that are known.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


def halves(y: Tensor) -> tuple[Tensor, Tensor]:
    """A tensor `[B, C, h, w]` of even sides as two `[B, C, h, w/2]`; the first has the place 0, 0."""
    pairs = y.unflatten(3, (-1, 2)).unflatten(2, (-1, 2))  # [B, C, h/2, 2, w/2, 2]
    first = pairs[:, :, :, 0, :, 0], pairs[:, :, :, 1, :, 1]  # of even and of odd rows
    second = pairs[:, :, :, 0, :, 1], pairs[:, :, :, 1, :, 0]
    return torch.stack(first, 3).flatten(2, 3), torch.stack(second, 3).flatten(2, 3)


def whole(first: Tensor, second: Tensor) -> Tensor:
    """The tensor whose `halves` these are."""
    first_rows = first.unflatten(2, (-1, 2))
    second_rows = second.unflatten(2, (-1, 2))
    even = torch.stack((first_rows[:, :, :, 0], second_rows[:, :, :, 0]), -1).flatten(-2)
    odd = torch.stack((second_rows[:, :, :, 1], first_rows[:, :, :, 1]), -1).flatten(-2)
    return torch.stack((even, odd), 3).flatten(2, 3)


@dataclass(frozen=True)
class CodingOrder:
    """Takes tensors of the shape of y `[B, M, h, w]` apart, and puts them together.

    Attributes:
        num_slices: slices S of equally many channels.
        checkerboard: how many of them, from the first on, are coded in two halves.

    Raises:
        ValueError: there are not more slices than are coded in halves.
    """

    num_slices: int
    checkerboard: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.checkerboard < self.num_slices:
            raise ValueError(f"checkerboard = {self.checkerboard} must lie in [0, num_slices = {self.num_slices})")

    def split(self, y: Tensor) -> list[Tensor]:
        """The parts of y in the order of coding: `[B, M/S, h, w]`, or `[B, M/S, h, w/2]` for each half of a slice."""
        slices = y.chunk(self.num_slices, 1)
        pairs = [half for part in slices[: self.checkerboard] for half in halves(part)]
        return [*pairs, *slices[self.checkerboard :]]

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """What `split` takes apart."""
        pairs = [whole(*parts[2 * i : 2 * i + 2]) for i in range(self.checkerboard)]
        return torch.cat([*pairs, *parts[2 * self.checkerboard :]], 1)

    def flatten(self, y: Tensor) -> Tensor:
        """The values of y in the order of coding, each part in C, H, W order: `[B, n]`."""
        return torch.cat([part.flatten(1) for part in self.split(y)], 1) if self.checkerboard else y.flatten(1)

    def unflatten(self, values: Tensor, height: int, width: int) -> Tensor:
        """What `flatten` makes flat, of these sides."""
        if not self.checkerboard:
            return values.unflatten(1, (-1, height, width))
        channels = values.shape[1] // (self.num_slices * height * width)
        columns = [width // 2] * (2 * self.checkerboard) + [width] * (self.num_slices - self.checkerboard)
        parts = values.split([channels * height * count for count in columns], 1)
        return self.join([part.unflatten(1, (channels, height, -1)) for part in parts])
