"""Pictures as tensors: reading, padding, cropping, saving."""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from compressai.ops import compute_padding
from torch import Tensor
from torch.nn import functional as F

from models import STRIDE
from utils.files import atomic_write, check_name_of_png
from utils.pictures import png_bytes, read_pixels

SMOOTHED = 16  # neighbors on either side that an edge is averaged with before it goes on around the picture


def read_image(path: str | Path, **options) -> Tensor:
    """A picture as `read_pixels` reads it, with its options: uint8 `[3, H, W]`. ImageError where it cannot be read."""
    return to_tensor(read_pixels(path, **options))


def to_tensor(pixels: np.ndarray) -> Tensor:
    """uint8 `[H, W, 3]` to uint8 `[3, H, W]`, a view of the same memory."""
    return torch.from_numpy(pixels).permute(2, 0, 1)


def to_pixels(image: Tensor) -> np.ndarray:
    """uint8 `[3, H, W]`, on any device, to uint8 `[H, W, 3]`, which may be the same memory."""
    return image.permute(1, 2, 0).contiguous().cpu().numpy()


def to_float(image: Tensor) -> Tensor:
    """uint8 `[3, H, W]` to float `[1, 3, H, W]` in [0, 1]."""
    return image[None].float() / 255


def to_uint8(x: Tensor) -> Tensor:
    """Float image in [0, 1], any shape, to the 8-bit values that a file would hold."""
    return (x * 255).round_().clamp_(0, 255).to(torch.uint8)


def as_picture(image: Tensor | np.ndarray) -> Tensor:
    """A picture as uint8 `[3, H, W]`, from that or from a NumPy array uint8 `[H, W, 3]`.

    Raises:
        ValueError: it is something else.
    """
    if isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3:
        image = to_tensor(np.require(image, requirements="CW"))  # a copy of what cannot be written, as PyTorch wants
    if isinstance(image, Tensor) and image.dtype == torch.uint8 and image.dim() == 3 and image.shape[0] == 3:
        if image.numel():
            return image
        raise ValueError("the picture is empty")
    found = type(image).__name__
    if isinstance(image, (Tensor, np.ndarray)):
        found = f"{image.dtype} {list(image.shape)}"
    raise ValueError(f"a picture is a uint8 tensor [3, H, W] or a uint8 NumPy array [H, W, 3], not {found}")


def save_image(path: str | Path, image: Tensor | np.ndarray) -> None:
    """Write a picture, as `as_picture` takes it, as PNG, whole or not at all. UserError for another suffix."""
    check_name_of_png(path)
    data = png_bytes(to_pixels(as_picture(image)))
    with atomic_write(path) as file:
        file.write(data)


def pad(x: Tensor) -> Tensor:
    """Zeros around `[B, 3, H, W]` up to multiples of 128; top and left get the smaller half."""
    return F.pad(x, margins(*x.shape[2:]))


def crop(x: Tensor, height: int, width: int) -> Tensor:
    """The `[B, 3, height, width]` inside a picture that `pad` made."""
    _, cut = compute_padding(height, width, min_div=STRIDE)
    return F.pad(x, cut)


def margins(height: int, width: int) -> tuple[int, int, int, int]:
    """Pixels that `pad` adds on the left, on the right, above and below."""
    padding, _ = compute_padding(height, width, min_div=STRIDE)
    return padding


# Takes the bands of a picture and their rows in all, and passes them on: a progress bar.
Watch = Callable[[Iterator[Tensor], int], Iterator[Tensor]]


def padded_bands(image: Tensor, height: int, extend: bool = False) -> Iterator[Tensor]:
    """uint8 `[3, H, W]` as float in [0, 1] with sides that are multiples of 128, in bands of this height.

    Args:
        extend: put the colors of its edges around the picture, smoothed along the edge; else as `pad(to_float(image))`.
    """
    whole, width = image.shape[1:]
    left, right, top, bottom = margins(whole, width)
    if extend:
        edges = image[:, 0], image[:, -1], image[:, :, 0], image[:, :, -1]
        first, last, west, east = (_smoothed(edge.float() / 255) for edge in edges)
        first, last = (F.pad(edge, (left, right), mode="replicate") for edge in (first, last))
    for start in range(-top, whole + bottom, height):
        end = min(start + height, whole + bottom)
        above = max(0, -start)
        below = max(0, end - whole)
        inside = slice(start + above, end - below)
        band = F.pad(to_float(image[:, inside]), (left, right, above, below))
        if extend:
            band[0, :, above : end - below - start, :left] = west[:, inside, None]
            band[0, :, above : end - below - start, left + width :] = east[:, inside, None]
            band[0, :, :above] = first[:, None]
            band[0, :, end - below - start :] = last[:, None]
        yield band


def _smoothed(edge: Tensor) -> Tensor:
    """An edge `[3, n]`, each pixel averaged with SMOOTHED on either side; the last one repeats."""
    return F.avg_pool1d(F.pad(edge, (SMOOTHED, SMOOTHED), mode="replicate"), 2 * SMOOTHED + 1, stride=1)


def join_bands(bands: Iterable[Tensor], height: int, width: int) -> Tensor:
    """`to_uint8(crop(x, height, width)[0])` of a picture x `[1, 3, H, W]` that comes in bands."""
    left, _, top, _ = margins(height, width)
    out = None
    start = -top
    for band in bands:
        if out is None:  # in the order of files
            out = torch.empty(height, width, 3, dtype=torch.uint8, device=band.device).permute(2, 0, 1)
        first = max(0, start)
        end = min(height, start + band.shape[2])
        if first < end:
            out[:, first:end] = to_uint8(band[0, :, first - start : end - start, left : left + width])
        start += band.shape[2]
    return out


def center_crop(image: Tensor, size: int) -> Tensor:
    """A copy of the middle of uint8 `[3, H, W]`: at most size × size, sides multiples of 128."""
    height, width = (min(size, side // STRIDE * STRIDE) for side in image.shape[1:])
    top = (image.shape[1] - height) // 2
    left = (image.shape[2] - width) // 2
    return image[:, top : top + height, left : left + width].clone()
