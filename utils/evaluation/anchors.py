"""Common codecs on the same pictures: JPEG, JPEG 2000, WebP and AVIF by Pillow, JPEG XL by pillow-jxl-plugin.

Sizes are those of whole files; quality is that of the 8-bit pixels that decoding gives.
"""

import contextlib
import importlib
import io
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import PIL
import torch
from PIL import Image, features
from torch import Tensor

from utils.device import timed
from utils.distributed import DistContext
from utils.evaluation import evaluate
from utils.evaluation.results import Result, to_json
from utils.images import to_pixels, to_tensor
from utils.messages import print_note
from utils.pictures import read_pixels


class Codec(NamedTuple):
    """A format of Pillow.

    Attributes:
        title: for people, with the settings that matter.
        options: arguments of Pillow's `save`, for a quality.
        qualities: from few bits to many. Those of JPEG 2000 are ratios of compression.
        feature: what Pillow must have been built with; "" where it always has the format.
    """

    title: str
    format: str
    options: Callable[[float], dict[str, Any]]
    qualities: tuple[float, ...]
    feature: str = ""


def _jpeg(chroma: str) -> Codec:
    qualities = (5, 10, 15, *range(20, 81, 10), 85, 90, 95)
    options = {"optimize": True, "subsampling": chroma}
    return Codec(f"JPEG {chroma}", "JPEG", options=lambda q: {"quality": q, **options}, qualities=qualities)


def _avif(title: str, speed: int, **options: Any) -> Codec:
    """Pillow's `speed` is that of libavif, 0 to 10; between 8 and 4 lie some 15 % of the bits. Of itself Pillow takes
    chroma of 4:2:0, and libavif what it tunes for, which is not PSNR."""
    return Codec(
        f"AVIF {title}, speed {speed}", "AVIF", feature="avif", qualities=(10, 20, 30, *range(40, 86, 5), 90),
        options=lambda q: {"quality": q, "speed": speed, "max_threads": torch.get_num_threads(), **options},
    )  # fmt: skip


CODECS = {
    "jpeg": _jpeg("4:2:0"),
    "jpeg444": _jpeg("4:4:4"),
    "webp": Codec(
        "WebP", "WEBP", feature="webp",
        options=lambda q: {"quality": q, "method": 4}, qualities=(1, 5, *range(10, 81, 10), 85, 90, 95),
    ),
    "avif": _avif("4:2:0", speed=4),
    "avif-fast": _avif("4:2:0", speed=8),
    "avif-psnr": _avif("4:4:4 for PSNR", speed=4, subsampling="4:4:4", advanced={"tune": "psnr"}),
    "jpegxl": Codec(
        "JPEG XL", "JXL", qualities=(5, *range(10, 81, 10), 85, 90, 93),
        options=lambda q: {"quality": q, "num_threads": torch.get_num_threads()},
    ),
    "jpeg2000": Codec(
        "JPEG 2000", "JPEG2000", feature="jpg_2000",
        options=lambda ratio: {"quality_mode": "rates", "quality_layers": [ratio], "irreversible": True, "mct": 1},
        qualities=(240, 160, 120, 80, 60, 48, 40, 32, 24, 20, 16, 12),
    ),
}  # fmt: skip


def available(names: Iterable[str]) -> list[str]:
    """The codecs, each once, that this Pillow can write; the others are named on stderr."""
    with contextlib.suppress(ImportError):
        importlib.import_module("pillow_jxl")  # registers its format with Pillow
    Image.init()
    found = []
    for name in dict.fromkeys(names):
        codec = CODECS[name]
        if codec.format in Image.SAVE and (not codec.feature or features.check(codec.feature)):
            found.append(name)
        else:
            how = "; it needs the package pillow-jxl-plugin" if name == "jpegxl" else ""
            print_note(codec.title, f"this Pillow cannot write it, left out{how}")
    return found


def file_of(image: Tensor, codec: Codec, quality: float) -> bytes:
    """The file of a picture, uint8 `[3, H, W]`. ValueError where the codec cannot make one."""
    file = io.BytesIO()
    try:
        Image.fromarray(to_pixels(image)).save(file, codec.format, **codec.options(quality))
    except (OSError, RuntimeError) as error:  # by which Pillow's encoders fail, and those of plugins
        raise ValueError(f"{codec.title}: {error}") from None
    return file.getvalue()


def measure(name: str, image: Tensor, codec: Codec, quality: float) -> tuple[Result, Tensor]:
    """One picture by one codec at one quality, which takes the index's place in the result; and the decoded picture."""
    data, encode_seconds = timed(lambda: file_of(image, codec, quality), image.device)
    decoded, decode_seconds = timed(lambda: to_tensor(read_pixels(data)), image.device)
    seconds = {"encode_seconds": encode_seconds, "decode_seconds": decode_seconds}
    return evaluate.result_of(name, image, decoded, count=8.0 * len(data), index=quality, **seconds), decoded


def measure_all(keys: list[str], names: dict[Path, str], context: DistContext) -> tuple[list[dict], int]:
    """Codecs on pictures, at all their qualities, in CompressAI's format; and with how many pictures one failed.

    Args:
        keys: of CODECS.
        names: the pictures, and what they are called.
    """
    codecs = []
    most = 0
    cpu = torch.device("cpu")
    for codec in (CODECS[key] for key in keys):
        results, failed = evaluate.measure_all(
            list(names), codec.qualities, context, device=cpu, title=codec.title, names=names, quiet=True,
            work=lambda name, image, quality, codec=codec: measure(name, image, codec, quality)[0],
        )
        most = max(most, failed)
        if not results:
            continue
        groups = [[result for result in results if result.index == quality] for quality in codec.qualities]
        library = codec.feature
        by = f"Pillow {PIL.__version__}" + (f" with {library} {features.version(library)}" if library else "")
        codecs.append(to_json(groups, codec.title, description=f"real files by {by}", results=results))
    return codecs, most
