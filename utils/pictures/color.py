"""Colors to sRGB: by the ICC profile of a picture (Pillow's ImageCms), or by what PNG and AVIF files have beside it.

ImageCms cannot make a profile of the primaries and the transfer function that these name, so these few lines do.
"""

import io
import itertools
import struct
from collections.abc import Callable, Iterator

import numpy as np
from PIL import Image, ImageCms

Note = Callable[..., object]  # note(text, once=False): once is for what need not be said of every picture of a run
Transfer = Callable[[np.ndarray], np.ndarray]

# x and y of white, red, green, blue. The order is that of PNG's cHRM chunk.
SRGB = (0.3127, 0.3290, 0.64, 0.33, 0.30, 0.60, 0.15, 0.06)
PRIMARIES = {  # by their number in ITU-T H.273, as in the cICP chunk
    1: SRGB,
    5: (0.3127, 0.3290, 0.64, 0.33, 0.29, 0.60, 0.15, 0.06),
    6: (0.3127, 0.3290, 0.630, 0.340, 0.310, 0.595, 0.155, 0.070),
    9: (0.3127, 0.3290, 0.708, 0.292, 0.170, 0.797, 0.131, 0.046),
    11: (0.314, 0.351, 0.680, 0.320, 0.265, 0.690, 0.150, 0.060),
    12: (0.3127, 0.3290, 0.680, 0.320, 0.265, 0.690, 0.150, 0.060),
}
UNNOTICEABLE = 2  # levels: a profile that moves no sample further is sRGB's, and the samples stay as they are
_BRADFORD = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])


def _power(exponent: float) -> Transfer:
    return lambda x: x**exponent


def _rec709(x: np.ndarray) -> np.ndarray:
    return np.where(x < 0.081, x / 4.5, ((x + 0.099) / 1.099) ** (1 / 0.45))


def _srgb(x: np.ndarray) -> np.ndarray:
    return np.where(x <= 0.04045, x / 12.92, ((x + 0.055) / 1.055) ** 2.4)


# Samples in [0, 1] to linear light, by the number of the transfer function in ITU-T H.273.
TRANSFERS: dict[int, Transfer] = {4: _power(2.2), 5: _power(2.8), 8: _power(1.0), 13: _srgb}
TRANSFERS |= dict.fromkeys((1, 6, 14, 15), _rec709)


def to_srgb(image: Image.Image, data: bytes, note: Note) -> Image.Image:
    """A picture with 8-bit samples of any mode as RGB in sRGB; transparency is left aside.

    Args:
        data: the bytes of its file.
        note: called with a line where a profile cannot be used.
    """
    cicp = _png_cicp(data) if image.format == "PNG" else _avif_nclx(image, data)
    if cicp is not None and len(cicp) != 4:
        note("its chunk cICP is broken and was ignored")
    elif cicp:
        numbers = _usual_of_avif(*cicp[:2]) if image.format == "AVIF" else tuple(cicp[:2])
        primaries = PRIMARIES.get(numbers[0])
        transfer = TRANSFERS.get(numbers[1])
        if primaries is not None and transfer is not None:
            rgb = _plain(image)
            return rgb if numbers == (1, 13) else _convert(rgb, primaries, transfer)
        if not image.info.get("icc_profile"):  # which is meant for readers that do not know the others
            note(f"its colors (H.273: {cicp[0]}, {cicp[1]}) are not of a kind that is converted: taken as sRGB")
            return _plain(image)
    if profile := image.info.get("icc_profile"):
        try:
            return _by_profile(image, profile)
        except Exception as error:  # damaged, or of another kind of picture
            note(f"its color profile cannot be used, and its samples are taken as sRGB ({error})")
    elif "icc_profile" in image.info:  # of a PNG, and Pillow could not unpack it
        note("its color profile is damaged and ignored")
    rgb = _plain(image)
    gamma = image.info.get("gamma")
    chromaticity = image.info.get("chromaticity")
    if image.format != "PNG" or profile or "srgb" in image.info or gamma is chromaticity is None:
        return rgb
    primaries = tuple(chromaticity) if chromaticity else SRGB
    usual = gamma is None or abs(gamma - 0.45455) < 0.005  # the value that programs write for sRGB
    if usual and np.allclose(primaries, SRGB, atol=2e-3):
        return rgb
    try:
        if not (usual or 0.05 <= gamma <= 20) or max(primaries) > 1:
            raise FloatingPointError
        with np.errstate(divide="raise", invalid="raise"):
            return _convert(rgb, primaries, _srgb if usual else _power(1 / gamma))
    except (np.linalg.LinAlgError, FloatingPointError):
        note("its color chunks make no sense: its samples are taken as sRGB")
        return rgb


def _plain(image: Image.Image) -> Image.Image:
    """The samples as RGB."""
    transparent = image.mode == "P" and "transparency" in image.info  # Pillow warns about these otherwise
    return (image.convert("RGBA") if transparent else image).convert("RGB")


def _by_profile(image: Image.Image, data: bytes) -> Image.Image:
    profile = ImageCms.ImageCmsProfile(io.BytesIO(data))
    space = profile.profile.xcolor_space.strip()
    mode = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK", "Lab": "LAB"}[space]
    source, plain = image.convert(mode), _plain(image)
    colors = mode == "L" and _largest_difference(source.convert("RGB"), plain) > UNNOTICEABLE
    if (mode in ("CMYK", "LAB")) != (image.mode in ("CMYK", "LAB")) or colors:
        raise ValueError(f"it is of {space}, the picture of {image.mode}")
    converted = ImageCms.profileToProfile(source, profile, ImageCms.createProfile("sRGB"), outputMode="RGB")
    if mode in ("RGB", "L"):
        return plain if _largest_difference(converted, plain) <= UNNOTICEABLE else converted
    return converted


def _largest_difference(a: Image.Image, b: Image.Image) -> int:
    """The largest difference of two samples; computed in parts, which bounds the memory."""
    rows = max(1, 2**22 // a.width)
    boxes = [(0, top, a.width, min(top + rows, a.height)) for top in range(0, a.height, rows)]
    pairs = ((np.asarray(image.crop(box), np.int16) for image in (a, b)) for box in boxes)
    return max(int(np.abs(one - other).max()) for one, other in pairs)


def _png_cicp(data: bytes) -> bytes | None:
    """The content of a PNG file's cICP chunk, which stands before the pixels; None where there is none."""
    before = itertools.takewhile(lambda chunk: chunk[0] != b"IDAT", png_chunks(data))
    return next((data[start + 8 : end - 4] for kind, start, end in before if kind == b"cICP"), None)


def _avif_nclx(image: Image.Image, data: bytes) -> bytes | None:
    """The same of an AVIF file, from its first box of these; None where there is none, or a profile takes its place."""
    at = data.find(b"colrnclx")
    if image.format != "AVIF" or at < 0 or image.info.get("icc_profile"):
        return None
    return bytes(min(value, 255) for value in struct.unpack_from(">3H", data, at + 8)) + b"\1"


def _usual_of_avif(primaries: int, transfer: int) -> tuple[int, int]:
    """What is not said is sRGB's, and browsers show the curves of television like it."""
    return 1 if primaries == 2 else primaries, 13 if transfer in (1, 2, 6, 14, 15) else transfer


def png_chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """The chunks of a PNG file: the kind, and where each starts (8 bytes before its content) and ends (4 after it)."""
    start = 8
    while start + 8 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, start)
        yield kind, start, (end := start + 12 + length)
        start = end


def _to_xyz(primaries: tuple[float, ...]) -> tuple[np.ndarray, np.ndarray]:
    """The matrix from linear RGB to XYZ, and white in XYZ."""
    x, y = np.array(primaries[::2]), np.array(primaries[1::2])
    xyz = np.stack([x / y, np.ones(4), (1 - x - y) / y])
    return xyz[:, 1:] * np.linalg.solve(xyz[:, 1:], xyz[:, 0]), xyz[:, 0]


def _convert(image: Image.Image, primaries: tuple[float, ...], transfer: Transfer) -> Image.Image:
    """RGB of these primaries and this transfer function to sRGB, white to white (Bradford)."""
    theirs, white = _to_xyz(primaries)
    ours, our_white = _to_xyz(SRGB)
    adapt = np.linalg.solve(_BRADFORD, np.diag(_BRADFORD @ our_white / (_BRADFORD @ white)) @ _BRADFORD)
    matrix = np.linalg.solve(ours, adapt @ theirs).T
    linear = transfer(np.arange(256) / 255)
    pixels = np.array(image)
    for rows in np.array_split(pixels, max(1, pixels.size // 2**22)):  # in parts, which bounds the memory
        light = (linear[rows] @ matrix).clip(0, 1)
        rows[:] = np.rint(255 * np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055))
    return Image.fromarray(pixels)
