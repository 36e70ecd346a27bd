"""Pictures in and out: finding, reading as 8-bit RGB, padding, saving."""

import io
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from compressai.ops import compute_padding
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn import functional as F

from models.tcm import STRIDE
from utils.files import atomic_write, find_files

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".gif", ".jp2", ".avif"}


class ImageError(Exception):
    """A picture that cannot be read: one line, with the file's name."""


def find_images(paths: Iterable[str | Path]) -> list[Path]:
    """Pictures among files and folders, as `find_files`. ImageError where there is none."""
    return find_files(paths, SUFFIXES, "pictures", ImageError)


def read_image(path: str | Path) -> Tensor:
    """A picture as 8-bit RGB, uint8 `[3, H, W]`, upright by its EXIF tag.

    Grey is repeated, palettes are resolved, alpha is dropped, 16-bit samples are scaled to 8,
    floating-point ones are taken as [0, 1].

    Raises:
        ImageError: unreadable, truncated, not a picture, or so large that it may be an attack.
    """
    try:
        with Image.open(path) as image:
            pixels = np.asarray(_to_rgb(ImageOps.exif_transpose(image)))
    except Exception as error:  # Pillow's decoders raise anything from SyntaxError to struct.error
        cause = "is empty" if Path(path).is_file() and not os.path.getsize(path) else error
        raise ImageError(f"{path}: cannot be read as a picture ({cause})") from None
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1).contiguous()


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        samples = np.asarray(image).astype(np.float64)
        scaled = samples * 255 if image.mode == "F" else samples / 257
        image = Image.fromarray(np.rint(scaled).clip(0, 255).astype(np.uint8))
    return image.convert("RGB")


def read_images(paths: Iterable[Path]) -> Iterator[tuple[Path, Tensor | ImageError]]:
    """Each path with its picture, or with the error that reading it gave."""
    for path in paths:
        try:
            yield path, read_image(path)
        except ImageError as error:
            yield path, error


def to_float(image: Tensor) -> Tensor:
    """uint8 `[3, H, W]` to float `[1, 3, H, W]` in [0, 1]."""
    return image[None].float() / 255


def to_uint8(x: Tensor) -> Tensor:
    """Float image in [0, 1], any shape, to the 8-bit values that a file would hold."""
    return (x * 255).round().clamp(0, 255).to(torch.uint8)


def png_bytes(image: Tensor) -> bytes:
    """uint8 `[3, H, W]`, on any device, as a PNG file."""
    png = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).contiguous().cpu().numpy()).save(png, format="PNG")
    return png.getvalue()


def save_image(path: str | Path, image: Tensor) -> None:
    """Write uint8 `[3, H, W]` as PNG, whole or not at all."""
    with atomic_write(path) as file:
        file.write(png_bytes(image))


def pad(x: Tensor, multiple: int = STRIDE) -> Tensor:
    """Zeros around `[B, 3, H, W]` up to multiples of `multiple`; top and left get the smaller half."""
    padding, _ = compute_padding(x.shape[-2], x.shape[-1], min_div=multiple)
    return F.pad(x, padding)


def crop(x: Tensor, height: int, width: int, multiple: int = STRIDE) -> Tensor:
    """Undo `pad`: the `[B, 3, height, width]` inside."""
    _, cut = compute_padding(height, width, min_div=multiple)
    return F.pad(x, cut)
