"""Pictures as arrays: finding them, reading them as 8-bit RGB, writing PNG. Needs no PyTorch, which takes seconds."""

import io
import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from utils.cli import UserError
from utils.files import find_files

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".gif", ".jp2", ".avif"}
SAMPLES = ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg")  # photographs in every scikit-image wheel


class ImageError(UserError):
    """A picture that cannot be read."""


def find_images(paths: Iterable[str | Path]) -> list[Path]:
    """Pictures among files and folders, as `find_files`. ImageError where there is none."""
    return find_files(paths, SUFFIXES, "pictures", ImageError)


def find_images_or_samples(paths: list[str] | None) -> list[Path]:
    """`find_images`, or the photographs of the installed scikit-image where no paths are given."""
    if paths:
        return find_images(paths)
    try:
        import skimage
    except ImportError:
        raise UserError("no -d given, and scikit-image, whose photographs are the default, is missing") from None
    folder = Path(skimage.__file__).parent / "data"
    return find_images(folder / name for name in SAMPLES)


def read_pixels(path: str | Path | io.BytesIO) -> np.ndarray:
    """A picture as 8-bit RGB, uint8 `[H, W, 3]`, upright by its EXIF tag.

    Gray is repeated, palettes are resolved, alpha is dropped, 16-bit samples are scaled to 8,
    floating-point ones are taken as [0, 1].

    Raises:
        ImageError: unreadable, truncated, not a picture, or so large that it may be an attack.
    """
    try:
        with Image.open(path) as image:
            return np.array(_to_rgb(ImageOps.exif_transpose(image)))
    except Exception as error:  # Pillow's decoders raise anything from SyntaxError to struct.error
        named = not isinstance(path, io.BytesIO)
        cause = "is empty" if named and Path(path).is_file() and not os.path.getsize(path) else error
        raise ImageError(f"{path if named else 'standard input'}: cannot be read as a picture ({cause})") from None


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        samples = np.asarray(image).astype(np.float64)
        scaled = samples * 255 if image.mode == "F" else samples / 257
        image = Image.fromarray(np.rint(scaled).clip(0, 255).astype(np.uint8))
    return image.convert("RGB")


def png_bytes(pixels: np.ndarray) -> bytes:
    """uint8 `[H, W, 3]` as a PNG file."""
    png = io.BytesIO()
    Image.fromarray(pixels).save(png, format="PNG")
    return png.getvalue()
