"""Training crops cut on the device from photographs kept in its memory: no loader on the critical path."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from utils.images import ImageError, read_images


def cache_images(paths: Sequence[Path], smallest: int, device: torch.device) -> list[Tensor]:
    """Photographs as uint8 `[3, H, W]` on a device; unreadable or too small ones are named and left out.

    Raises:
        ImageError: none is left.
    """
    images = []
    for path, image in tqdm(read_images(paths), total=len(paths), desc="reading photographs", unit="file"):
        if isinstance(image, ImageError):
            tqdm.write(f"skipped: {image}")
        elif min(image.shape[1:]) < smallest:
            tqdm.write(f"skipped: {path}: {image.shape[2]}×{image.shape[1]} is smaller than a patch of {smallest}")
        else:
            images.append(image.to(device))
    if not images:
        raise ImageError("no photograph is left to train on")
    return images


class Crops:
    """Random square patches: flipped, transposed, and some of them scaled down by 0.5 … 1.

    All draws come from one generator, so that its state makes a run resumable.

    Args:
        images: uint8 `[3, H, W]` on the device that the patches are wanted on.
        size: side of a patch, in pixels.
        batch: patches at a time.
        scaled: share of the patches cut larger (up to twice) and scaled down.
    """

    def __init__(self, images: list[Tensor], size: int, batch: int, seed: int, scaled: float = 0.25) -> None:
        self.images, self.size, self.batch, self.scaled = images, size, batch, scaled
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self) -> Tensor:
        """One batch: float `[B, 3, size, size]` in [0, 1]."""
        return torch.stack([self._patch() for _ in range(self.batch)]).float() / 255

    def _draw(self, end: int) -> int:
        return int(torch.randint(end, (), generator=self.generator))

    def _patch(self) -> Tensor:
        image = self.images[self._draw(len(self.images))]
        height, width = image.shape[1:]
        side = self.size
        if torch.rand((), generator=self.generator) < self.scaled:
            largest = min(2 * self.size, height, width)
            side += self._draw(largest - self.size + 1)
        top, left = self._draw(height - side + 1), self._draw(width - side + 1)
        patch = image[:, top : top + side, left : left + side]
        if side != self.size:
            patch = F.interpolate(patch[None].float(), (self.size, self.size), mode="bilinear", antialias=True)
            patch = patch[0].round().to(torch.uint8)
        turn = self._draw(8)
        if turn & 1:
            patch = patch.flip(1)
        if turn & 2:
            patch = patch.flip(2)
        return patch.transpose(1, 2) if turn & 4 else patch
