"""Results as a table in the terminal, and as JSON in CompressAI's format."""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from utils.evaluation.evaluate import Result, mean


@dataclass(frozen=True)
class Column:
    """A column of numbers: its title, width and digits, and the value of an item (None for a dash)."""

    title: str
    width: int
    digits: int
    value: Callable[[Any], float | None]


class Table:
    """Lines of a name and columns of numbers; a line of several items has their means.

    Args:
        title, width: of the first column, which has the names.
    """

    def __init__(self, title: str, width: int, columns: Sequence[Column]) -> None:
        self.width, self.columns = width, columns
        self.header = f"{title:<{width}} " + " ".join(f"{column.title:>{column.width}}" for column in columns)
        self.rule = "-" * len(self.header)

    def row(self, name: str, items: Sequence[Any]) -> str:
        name = name if len(name) <= self.width else "…" + name[1 - self.width :]
        cells = []
        for column in self.columns:
            values = [value for item in items if (value := column.value(item)) is not None]
            cells.append(cell(sum(values) / len(values) if values else None, column.width, column.digits))
        return " ".join([f"{name:<{self.width}}", *cells])


def cell(value: float | None, width: int, digits: int) -> str:
    """A number of a table; a dash for None."""
    return f"{'–' if value is None else f'{value:.{digits}f}':>{width}}"


RESULTS_TABLE = Table(
    "image",
    30,
    [
        Column("index", 5, 2, lambda result: result.index),
        Column("bpp", 8, 4, lambda result: result.bpp),
        Column("PSNR dB", 8, 2, lambda result: result.psnr),
        Column("MS-SSIM dB", 10, 2, lambda result: result.ms_ssim_db),
        Column("encode s", 9, 2, lambda result: result.encode_seconds),
        Column("decode s", 9, 2, lambda result: result.decode_seconds),
    ],
)


def short_names(paths: list[Path]) -> dict[Path, str]:
    """File names; whole paths where two files share one."""
    counts = Counter(path.name for path in paths)
    return {path: path.name if counts[path.name] == 1 else path.as_posix() for path in paths}


def report(groups: list[list[Result]], results: list[Result], name: str, description: str) -> dict:
    """CompressAI's results format, with the index and the loss, and every result under `images`.

    Args:
        groups: results whose means are the points of the curve.
        results: the same results, in the order in which `images` has them.
    """
    fields = {
        "bpp": "bpp",
        "psnr-rgb": "psnr",
        "ms-ssim-rgb": "ms_ssim",
        "encoding_time": "encode_seconds",
        "decoding_time": "decode_seconds",
        "index": "index",
        "loss": "loss",
    }
    means = {name: [finite(mean(group, field)) for group in groups] for name, field in fields.items()}
    return {
        "name": name,
        "description": f"{description}, means over pictures",
        "results": {name: values for name, values in means.items() if any(v is not None for v in values)},
        "images": [{k: finite(v) for k, v in result.as_dict().items()} for result in results],
    }


def finite(value):
    """None for what JSON does not have: infinity, the PSNR of a perfect copy, and NaN."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def stem(path: str) -> str:
    """A file's name without its suffixes: tcm_vbr_small of tcm_vbr_small.pth.tar."""
    return Path(path).name.split(".")[0]
