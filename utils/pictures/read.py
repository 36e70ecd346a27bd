"""Reading a picture: any raster format of the installed Pillow to 8-bit sRGB, upright, on an opaque background."""

import contextlib
import io
import os
import warnings
from collections.abc import Collection, Mapping
from pathlib import Path

import numpy as np
from PIL import Image, ImageColor, PngImagePlugin, TiffImagePlugin

from utils.errors import UserError
from utils.files import MAX_PIXELS, MAX_SIDE
from utils.pictures.color import Note, png_chunks, to_srgb

# Raster formats, of which those are used that the installed Pillow has; HEIF and JXL where a program has registered
# their plugins. Without this list Pillow tries all it knows, and hands what claims to be a document to other programs
# (EPS to Ghostscript).
FORMATS = (
    *("PNG", "JPEG", "WEBP", "AVIF", "HEIF", "TIFF", "BMP", "DIB", "PPM", "GIF", "JPEG2000", "JXL"),
    *("TGA", "PCX", "SGI", "QOI", "SUN", "PSD", "DDS", "XBM"),
)

_ORIENTATION = 0x0112  # EXIF
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_PHOTOMETRIC = 262  # TIFF
_BITS = 258  # TIFF
_SAMPLE_FORMAT = 339  # TIFF
_PNG_KEPT = {b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND", b"gAMA", b"cHRM", b"sRGB", b"cICP", b"iCCP"}


class ImageError(UserError):
    """A picture that cannot be read."""


def read_pixels(
    source: str | Path | bytes, background: str = "white", max_pixels: int = MAX_PIXELS, note: Note | None = None
) -> np.ndarray:
    """A picture as 8-bit sRGB, uint8 `[H, W, 3]`, upright by its EXIF tag.

    Color profiles and PNG's color chunks are converted to sRGB, transparent pixels are put on the background, gray is
    repeated, 16-bit samples are scaled to 8, floating-point ones taken as [0, 1]. The first of several frames is read.

    Args:
        source: a path (also of a pipe), or the bytes of a file.
        background: a color that Pillow knows, by name or as #rrggbb.
        max_pixels: most that are decoded. Beyond 179 million Pillow's own guard must be lifted too, as the scripts do:
            `PIL.Image.MAX_IMAGE_PIXELS = None`.
        note: called with one line about each thing that was ignored or may surprise, also warnings of libraries. None
            catches no warnings, as that is not safe in several threads.

    Raises:
        ImageError: unreadable, truncated, not a picture, with samples of unknown range, or too large.
    """
    try:
        data = source if isinstance(source, bytes) else Path(source).read_bytes()
        if not data:
            raise ImageError("is empty")
        if note is None:
            return _read(data, background, max_pixels, note=lambda text, once=False: None)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            pixels = _read(data, background, max_pixels, note=note)
        for text in dict.fromkeys(str(warning.message) for warning in caught):
            note(text)
        return pixels
    except Exception as error:  # Pillow's decoders raise anything from SyntaxError to struct.error
        cause = error.strerror if isinstance(error, OSError) and error.strerror else error
        cause = "not a picture of a known format" if isinstance(error, Image.UnidentifiedImageError) else cause
        cause = "too large for the memory of this machine" if isinstance(error, MemoryError) else cause
        name = f"{source}: " if isinstance(source, (str, os.PathLike)) else ""
        raise ImageError(f"{name}cannot be read as a picture ({cause})") from None


def sides_of(path: Path) -> tuple[int, int] | None:
    """Width and height of a picture by its header, before it is turned upright; None where that does not tell."""
    with contextlib.suppress(Exception):
        Image.init()
        if path.is_file():  # and no pipe, whose bytes would be gone
            with Image.open(path, formats=_formats()) as image:
                return image.size
    return None


def _formats() -> list[str]:
    return [name for name in FORMATS if name in Image.OPEN]


def _read(data: bytes, background: str, max_pixels: int, note: Note) -> np.ndarray:
    try:
        return _decode(data, background, max_pixels, note=note)
    except (ImageError, MemoryError):
        raise
    except Exception as error:
        # Kept at first, as pixels mean something else without.
        colors = {b"gAMA", b"cHRM", b"sRGB", b"cICP", b"iCCP", b"tRNS"}
        for what, bare in (
            ("metadata are", without_metadata(data)),
            ("metadata and color profile are", without_metadata(data, colors)),
        ):
            if bare != data:
                with contextlib.suppress(Exception):  # then these are not the cause
                    pixels = _decode(bare, background, max_pixels, note=note)
                    known = not isinstance(error, Image.UnidentifiedImageError)  # whose text names an object of Python
                    note(f"its {what} damaged and ignored{f' ({error})' if known else ''}")
                    return pixels
        raise


def _decode(data: bytes, background: str, max_pixels: int, note: Note) -> np.ndarray:
    Image.init()
    with Image.open(io.BytesIO(data), formats=_formats()) as image:
        width, height = image.size
        if not 0 < width <= MAX_SIDE or not 0 < height <= MAX_SIDE:
            raise ImageError(f"sides must lie in 1 … {MAX_SIDE} pixels, not {width}×{height}")
        if width * height > max_pixels:
            raise ImageError(f"{width}×{height} is more than {max_pixels / 1e6:.0f} megapixels")
        if image.format == "TIFF":
            _refuse_planes(image)
        image.load()
        frames = _frames(image)
        orientation = _orientation(image, note)
        opaque = _blend(image, data, background, note=note)
    if frames > 1:
        note(f"the first of {frames} frames is used")
    if orientation in _UPRIGHT:
        opaque = opaque.transpose(_UPRIGHT[orientation])
    return np.array(opaque)


def _refuse_planes(image: Image.Image) -> None:
    """ImageError for 16-bit samples in a plane for each color, which Pillow reads as noise if they are not packed."""
    tags = image.tag_v2
    planes = tags.get(TiffImagePlugin.PLANAR_CONFIGURATION) == 2
    plain = tags.get(TiffImagePlugin.COMPRESSION, 1) == 1
    several = tags.get(TiffImagePlugin.SAMPLESPERPIXEL, 1) > 1
    if planes and plain and several and max(tags.get(TiffImagePlugin.BITSPERSAMPLE, (8,))) > 8:
        raise ImageError("16-bit colors in planes of their own cannot be read: save them pixel by pixel, or as PNG")


def _blend(image: Image.Image, data: bytes, background: str, note: Note) -> Image.Image:
    """The picture in sRGB, its transparent pixels on the background."""
    color = to_srgb(_eight_bits(image), data, note)
    if not (image.mode.endswith(("A", "a")) or "transparency" in image.info):
        return color
    if image.mode.startswith("I"):  # 16 bits, which Pillow cannot convert
        alpha = Image.fromarray(np.where(np.asarray(image) == image.info["transparency"], 0, 255).astype(np.uint8))
    else:
        if image.format == "PNG" and image.mode == "L" and (bits := data[24]) in (2, 4):  # Pillow scales the samples
            levels = 2**bits - 1  # and not this one of them, of which the low bits count
            image.info["transparency"] = (image.info["transparency"] & levels) * 255 // levels
        alpha = image.convert("RGBA").getchannel("A")
    if alpha.getextrema()[0] == 255:
        return color
    note(f"its transparent pixels are put on {background}; said once", once=True)
    below = Image.new("RGB", image.size, ImageColor.getrgb(background)[:3])
    return Image.composite(color, below, alpha)


def _eight_bits(image: Image.Image) -> Image.Image:
    """The picture with 8-bit samples. ImageError where the range of its samples is not known."""
    tags = getattr(image, "tag_v2", {})
    if tags.get(_SAMPLE_FORMAT, (1,))[0] == 2:
        raise ImageError("it has signed samples, whose range is not known")
    if not (image.mode.startswith("I") or image.mode == "F"):
        return image
    samples = np.asarray(image)
    lowest = samples.min()
    highest = samples.max()
    if not np.isfinite([lowest, highest]).all():  # a NaN anywhere makes both NaN
        raise ImageError("it has samples that are not numbers")
    bits = tags.get(_BITS, (16,))[0]
    largest = 1 if image.mode == "F" else 2 ** min(bits, 16) - 1
    told = bits <= 16 or image.mode == "F"
    if not told or lowest < 0 or highest > largest:
        kind = "floating-point" if image.mode == "F" else "integer"
        extent = f"from {lowest:g} to {highest:g}"
        raise ImageError(f"it has {kind} samples {extent}, whose range is not known: 0 to {largest} would be")
    scaled = np.empty(samples.shape, np.uint8)
    parts = max(1, samples.size // 2**22)  # which bounds the memory of a large picture
    for rows, out in zip(np.array_split(samples, parts), np.array_split(scaled, parts), strict=True):
        out[:] = np.rint(255 / largest * rows.astype(np.float64))
    if tags.get(_PHOTOMETRIC) == 0:  # white is zero: Pillow inverts 8-bit samples only
        np.subtract(255, scaled, out=scaled)
    gray = Image.fromarray(scaled)
    gray.info = image.info
    gray.format = image.format
    return gray


def _frames(image: Image.Image) -> int:
    try:
        return 1 if image.format == "MPO" else getattr(image, "n_frames", 1)  # a camera's second one is a preview
    except Exception:  # it is truncated after the first
        return 2


def _orientation(image: Image.Image, note: Note) -> int:
    try:
        return image.getexif().get(_ORIENTATION, 1)
    except Exception as error:
        note(f"its EXIF data are damaged and ignored ({error})")
        return 1


def without_metadata(data: bytes, dropped: Collection[bytes] = ()) -> bytes:
    """A PNG or JPEG file without text, EXIF and the like, which may be damaged although the picture is intact.

    Args:
        dropped: chunks of a PNG that are left out too.
    """
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        kept = _PNG_KEPT - set(dropped)
        return data[:8] + b"".join(data[start:end] for kind, start, end in png_chunks(data) if kind in kept)
    if data.startswith(b"\xff\xd8"):
        kept = [data[:2]]
        at = 2
        while at + 4 <= len(data) and data[at] == 0xFF and data[at + 1] != 0xDA:  # up to the scan
            end = at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")
            marker = data[at + 1]
            profile = data[at + 4 : at + 15] == b"ICC_PROFILE"
            if not (0xE1 <= marker <= 0xEF and marker != 0xEE or marker == 0xFE) or profile:  # 0xEE is Adobe's color
                kept.append(data[at:end])
            at = end
        return b"".join([*kept, data[at:]])
    return data


def is_color(name: str) -> bool:
    """Whether Pillow knows a color by this name."""
    try:
        return bool(ImageColor.getrgb(name))
    except ValueError:
        return False


def png_bytes(pixels: np.ndarray, texts: Mapping[str, str] | None = None) -> bytes:
    """uint8 `[H, W, 3]`, or gray `[H, W]`, as a PNG file, with texts by their keywords."""
    info = PngImagePlugin.PngInfo()
    for keyword, text in (texts or {}).items():
        info.add_text(keyword, text)
    png = io.BytesIO()
    Image.fromarray(pixels).save(png, format="PNG", pnginfo=info)
    return png.getvalue()


def text_of_png(path: Path, keyword: str) -> str | None:
    """A text of a PNG file; None where there is none."""
    with contextlib.suppress(Exception), Image.open(path, formats=["PNG"]) as image:
        return image.info.get(keyword)
    return None
