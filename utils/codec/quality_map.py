"""Several qualities in one picture: where, and by how much, the rate index differs from that of the file.

The rate enters the network through m alone, by f_λ(index), channel by channel, and m scales every place of the latent
by itself. So an index for each place is as good as one for all, and R = Σ log m + C holds as it stands.
"""

import io
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from models.lambdas import INDEX_RANGE, MAX_INDEX, MIN_INDEX, in_range, index_to_lambda
from models.large.memory import send
from utils.codec.bitstream import STEPS
from utils.codec.request import check_number
from utils.files import MAX_PIXELS
from utils.images import pad
from utils.messages import print_note
from utils.metrics import psnr
from utils.pictures import ImageError, read_pixels

CELL = 64  # pixels: the grid of a map is that of z
LATENTS_PER_CELL, PIXELS_PER_LATENT = 4, 16
LARGEST_OFFSET = 127  # a signed byte
LARGEST_LABEL = 31  # the brightest value of a mask of 8 bits that is taken for a label


@dataclass(frozen=True)
class QualityMap:
    """A region of a picture, and its index.

    Attributes:
        weights: distinct mask values, in [0, 1], `[K]`; those between 0 and 1 interpolate the index.
        cells: position in `weights` of each cell's value, `[h, w]` of z.
        region: pixels whose mask value is above the middle of all, bool `[H, W]`.
        index: the region's index, whatever that of the file, but at most LARGEST_OFFSET / STEPS from it; or
        above: how far the region's index lies above that of the file.
    """

    weights: np.ndarray
    cells: np.ndarray
    region: np.ndarray
    index: float | None = None
    above: float | None = None

    def __post_init__(self) -> None:
        if (self.index is None) == (self.above is None):
            raise ValueError("a region needs either index or above, exactly one of them")
        check_number(self.index, "index")
        check_number(self.above, "above")
        if self.index is not None and not in_range(self.index):
            raise ValueError(f"a region's index must lie in {INDEX_RANGE}, not {self.index:g}")
        if self.above is not None and not math.isfinite(self.above):
            raise ValueError(f"above must be a finite number of indexes, not {self.above}")

    @classmethod
    def from_region(cls, region: np.ndarray, index: float | None = None, above: float | None = None) -> "QualityMap":
        """The map of a region as a mask `[H, W]` in [0, 1], as large as the picture: a cell has its pixels' maximum.

        Args:
            index: the region's index; or
            above: how far it lies above that of the file.

        Raises:
            ValueError: the mask is empty, or has one value everywhere; or not exactly one of both is given.
        """
        region = np.array(region, np.float32)  # a bool mask too; a copy, as PyTorch wants to be able to write
        if region.ndim != 2 or not region.size:
            raise ValueError(f"a mask has the shape [H, W] of its picture, not {list(region.shape)}")
        if not (region.min() >= 0 and region.max() <= 1):
            raise ValueError(f"a mask has values in [0, 1], not {region.min():g} to {region.max():g}")
        if not region.any():
            raise ValueError("the mask is empty: it is black everywhere")
        if np.ptp(region) == 0:
            raise ValueError("the mask has one value everywhere: it tells no region from the rest")
        padded = pad(torch.from_numpy(region)[None, None])
        shares = (F.max_pool2d(padded, CELL)[0, 0] * 255).round().numpy() / 255
        weights, cells = np.unique(shares, return_inverse=True)
        if len(weights) == 1:
            raise ValueError("the mask has one value in every cell of 64×64 pixels: it tells no region from the rest")
        inside = region > (region.min() + region.max()) / 2
        return cls(weights, cells.reshape(shares.shape), region=inside, index=index, above=above)

    def offsets(self, base: float | np.ndarray) -> np.ndarray:
        """Offsets in steps of 1/16 from the index of the file, such that all lie within [−2, 7]: int8 `[…, K]`, so that
        no index is more than 127/16 away."""
        base = np.asarray(base, np.float32).astype(np.float64)[..., None]  # the file holds float32
        top = base + self.above if self.index is None else self.index
        wanted = np.round(STEPS * self.weights * (np.clip(top, MIN_INDEX, MAX_INDEX) - base))
        lowest = np.ceil(STEPS * (MIN_INDEX - base)).clip(-LARGEST_OFFSET)
        highest = np.floor(STEPS * (MAX_INDEX - base)).clip(max=LARGEST_OFFSET)
        return np.clip(wanted, lowest, highest).astype(np.int8)

    def indexes(self, base: float | np.ndarray) -> np.ndarray:
        """The index of each of `weights`, `[…, K]`."""
        return np.asarray(base, np.float64)[..., None] + self.offsets(base) / STEPS

    def missed(self, base: float) -> tuple[float, float] | None:
        """The region's index as it was asked for and as it is, in a file of index `base`, where these differ by a step
        or more: the range of indexes ends, or of offsets."""
        wanted = base + self.above if self.index is None else self.index
        found = float(self.indexes(base)[self.weights.argmax()])
        wanted = base + self.weights.max() * (wanted - base)
        return None if abs(found - wanted) < 1 / STEPS else (wanted, found)

    def cell_offsets(self, base: float) -> bytes:
        """The offsets of every cell, as the file holds them."""
        return self.offsets(base)[self.cells].tobytes()


def region_of_boxes(boxes: Iterable[tuple[int, int, int, int]], height: int, width: int) -> np.ndarray:
    """A region of rectangles (x, y, width, height), float32 `[height, width]`. ValueError where one leaves it."""
    region = np.zeros((height, width), np.float32)
    for x, y, box_width, box_height in boxes:
        if min(x, y) < 0 or min(box_width, box_height) < 1 or x + box_width > width or y + box_height > height:
            box = f"{x},{y},{box_width},{box_height}"
            raise ValueError(f"--roi {box} does not lie within the picture, {width}×{height}")
        region[y : y + box_height, x : x + box_width] = 1
    return region


def read_region(path: str, height: int, width: int) -> np.ndarray:
    """A region from a picture of this size, float32 `[height, width]` in [0, 1], white 1.

    Masks of segmentation programs have labels, small numbers that look black: their range is stretched. What may be
    meant otherwise is said on stderr.

    Raises:
        ImageError, ValueError: it cannot be read, or has another size.
    """
    def note(text: str, once: bool = False) -> None:
        print_note("mask", f"{path}: {text}", once=True)

    try:
        data = Path(path).read_bytes()  # once, as it may be a pipe
        pixels = read_pixels(data, background="black", max_pixels=max(MAX_PIXELS, height * width), note=note)
    except (OSError, ImageError) as error:
        cause = error.strerror if isinstance(error, OSError) else error
        raise ImageError(f"{path}: {cause}") from None
    if pixels.shape[:2] != (height, width):
        found = f"{pixels.shape[1]}×{pixels.shape[0]}"
        raise ValueError(f"the mask {path} has {found} pixels, the picture {width}×{height}")
    gray = pixels.mean(2, dtype=np.float32) / 255
    if np.ptp(pixels, axis=2).any():
        note("has colors; how bright they are counts, the mean of red, green and blue")
    brightest = float(gray.max())
    if brightest <= LARGEST_LABEL / 255:
        labels = _sixteen_bits(data, gray)
        if labels.any():
            note(f"its brightest value is {labels.max():.0f}, a label rather than white: its range is stretched")
            return (labels / labels.max()).astype(np.float32)
    elif brightest < 0.99:
        note(f"its brightest value is {255 * brightest:.0f} of 255, and so much of the region's index counts")
    return gray


def _sixteen_bits(data: bytes, gray: np.ndarray) -> np.ndarray:
    """The values of a picture of 16 bits, all or some of which may be black in the 8 bits of `gray`, float32 `[H, W]`
    in [0, 1]; those of `gray`, 0 … 255, where it has no more, or they mean something else (turned, white is zero)."""
    with Image.open(io.BytesIO(data)) as image:
        values = np.asarray(image, np.float32) if image.mode.startswith("I") else np.zeros(1, np.float32)
    same = values.shape == gray.shape and np.abs(values / 65535 - gray).max() <= 1 / 255
    return values if same else 255 * gray


def enlarge(x: Tensor, factor: int) -> Tensor:
    """x `[…, h, w]` with every element factor × factor times."""
    return x.repeat_interleave(factor, -2).repeat_interleave(factor, -1)


def index_of_places(base: float, offsets: bytes, shape: tuple[int, int]) -> Tensor:
    """The index of every place of the latent, `[1, 1, 4h, 4w]`, from the offsets of z's cells, of a shape (h, w)."""
    index = base + torch.frombuffer(bytearray(offsets), dtype=torch.int8).view(shape) / STEPS
    return enlarge(index, LATENTS_PER_CELL)[None, None]


def pixel_weights(places: Tensor, lmbda: Tensor, metric: str) -> Tensor:
    """λ of every pixel in units of that of its image, `[B, 1, 16h, 16w]` on the device of `lmbda`.

    Args:
        places: index of every place of the latents, `[B, 1, h, w]`.
        lmbda: λ of each image, `[B]`.
    """
    return enlarge(send(index_to_lambda(places, metric), lmbda.device) / lmbda.view(-1, 1, 1, 1), PIXELS_PER_LATENT)


def psnr_by_region(image: Tensor, decoded: Tensor, region: np.ndarray) -> tuple[float, float]:
    """PSNR in dB of uint8 images `[3, H, W]` inside and outside a region `[H, W]`, bool or a mask that is above ½
    inside."""
    inside = torch.from_numpy(np.asarray(region) > 0.5).to(image.device)
    return psnr(image[:, inside], decoded[:, inside]), psnr(image[:, ~inside], decoded[:, ~inside])
