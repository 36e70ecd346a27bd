"""Results, as a table in the terminal, and as JSON in CompressAI's format."""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from utils.errors import UserError
from utils.files import finite


@dataclass
class Result:
    """One picture at one rate.

    Attributes:
        bpp: bits per original pixel.
        ms_ssim, ms_ssim_db: None for pictures that are too small.
        loss: bpp + λ · D, with D = MSE on the 0–255 scale or 1 − MS-SSIM; None without an index.
        encode_seconds, decode_seconds: None for estimates.
        psnr_inside, psnr_outside: PSNR in and around a region with an index of its own; None without one.
    """

    image: str
    width: int
    height: int
    index: float | None
    bpp: float
    psnr: float
    ms_ssim: float | None = None
    ms_ssim_db: float | None = None
    loss: float | None = None
    encode_seconds: float | None = None
    decode_seconds: float | None = None
    psnr_inside: float | None = None
    psnr_outside: float | None = None


def distortion_of(metric: str, mse: float | None, ms_ssim: float | None) -> float | None:
    """D of the loss: MSE on the 0–255 scale for "mse", else 1 − MS-SSIM; None where that is not known."""
    if metric == "mse":
        return mse
    return None if ms_ssim is None else 1 - ms_ssim


def mse_of_psnr(psnr: float) -> float:
    """Mean squared error on the 0–255 scale of a PSNR in dB."""
    return 255**2 / 10 ** (psnr / 10)


def mean(values: Iterable[float | None]) -> float | None:
    """Mean of the values that are not None; None where there is none."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def mean_of_all(values: Iterable[float | None]) -> float | None:
    """Mean of values; None where one is missing, as it would be of other pictures than the means beside it."""
    values = list(values)
    return None if None in values else mean(values)


@dataclass(frozen=True)
class TextColumn:
    """A column of numbers: its title and format ("7.4f"), and the value of an item (None for a dash).

    `unit` converts what is shown, after the mean over items: MS-SSIM is averaged first and then turned into decibels,
    as CompressAI and the published curves do.
    """

    title: str
    format: str
    value: Callable[[Any], float | None]
    unit: Callable[[float], float] = float

    @property
    def width(self) -> int:
        return int(self.format.split(".")[0])


class TextTable:
    """Lines of a name and columns of numbers; a line of several items has their means.

    Args:
        title, width: the first column, which has the names.
    """

    def __init__(self, title: str, width: int, *columns: TextColumn) -> None:
        self.width = width
        self.columns = columns
        self.header = f"{title:<{width}} " + " ".join(f"{column.title:>{column.width}}" for column in columns)
        self.rule = "-" * len(self.header)

    def row(self, name: str, items: Sequence[Any]) -> str:
        name = name if len(name) <= self.width else "…" + name[1 - self.width :]
        cells = []
        for column in self.columns:
            value = mean(map(column.value, items))
            cells.append(f"{'–':>{column.width}}" if value is None else f"{column.unit(value):{column.format}}")
        return " ".join([f"{name:<{self.width}}", *cells])


def decibels(ms_ssim: float) -> float:
    """MS-SSIM as −10 · log10(1 − MS-SSIM) dB."""
    return -10 * math.log10(1 - ms_ssim) if ms_ssim < 1 else math.inf


_COLUMNS = (
    TextColumn("index", "5.2f", lambda result: result.index),
    TextColumn("bpp", "8.4f", lambda result: result.bpp),
    TextColumn("PSNR dB", "8.2f", lambda result: result.psnr),
    TextColumn("MS-SSIM dB", "10.2f", lambda result: result.ms_ssim, unit=decibels),
    TextColumn("encode s", "9.2f", lambda result: result.encode_seconds),
    TextColumn("decode s", "9.2f", lambda result: result.decode_seconds),
)
_REGION_COLUMNS = (
    TextColumn("inside dB", "9.2f", lambda result: result.psnr_inside),
    TextColumn("outside dB", "10.2f", lambda result: result.psnr_outside),
)


def results_table(region: bool) -> TextTable:
    """The table of results, with or without the PSNR inside and outside of a region."""
    return TextTable("image", 30, *_COLUMNS, *(_REGION_COLUMNS if region else ()))


def short_names(paths: list[Path]) -> dict[Path, str]:
    """File names; whole paths where two files share one."""
    counts = Counter(path.name for path in paths)
    return {path: path.name if counts[path.name] == 1 else path.as_posix() for path in paths}


def file_stem(image: str, index: float | None) -> str:
    """The name, without a suffix, of a file that is written for a picture, by its short name, at an index."""
    return image.strip("/").replace("/", "_") + ("" if index is None else f"_index{index:g}")


def check_stems(paths: list[Path]) -> None:
    """UserError where files that are written for two pictures would have one name, as those of a/b.png and a_b.png."""
    first: dict[str, Path] = {}
    for path, name in short_names(paths).items():
        other = first.setdefault(file_stem(name, None), path)
        if other != path:
            raise UserError(f"{path}: what is written for it would have the name of what is written for {other}")


# Fields of a result by CompressAI's names, and two that it does not know.
FIELDS = {"bpp": "bpp", "psnr-rgb": "psnr", "ms-ssim-rgb": "ms_ssim"}
FIELDS |= {"encoding_time": "encode_seconds", "decoding_time": "decode_seconds", "index": "index", "loss": "loss"}


def to_json(groups: list[list[Result]], name: str, description: str, results: list[Result] | None = None) -> dict:
    """A codec in CompressAI's results format, with the index and the loss, and every result under `images`: there
    "point" is the position of its group.

    Args:
        groups: results whose means are the points of the curve. A group without any, where all failed, is left out.
        results: the same results, in the order in which `images` has them (default: that of the groups).
    """
    groups = [group for group in groups if group]
    point = {id(result): number for number, group in enumerate(groups) for result in group}
    means = {
        key: finite([mean_of_all(getattr(result, field) for result in group) for group in groups])
        for key, field in FIELDS.items()
    }
    results = results or [result for group in groups for result in group]
    return {
        "name": name,
        "description": f"{description}, means over pictures",
        "results": {key: values for key, values in means.items() if any(value is not None for value in values)},
        "images": finite([asdict(result) | {"point": point[id(result)]} for result in results]),
    }


def checkpoint_name(path: str) -> str:
    """What weights are called by their file: 0.05 of 0.05.pth.tar, and mine of runs/mine/model.pth.tar."""
    name = Path(path).name
    for suffix in (".tar", ".pth", ".pt", ".safetensors"):
        name = name.removesuffix(suffix)
    parent = Path(path).absolute().parent.name
    return parent if name == "model" and parent else name
