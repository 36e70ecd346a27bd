"""A page of plots, tables and pictures in one HTML file, which needs no network and no other file.

Its style and its script are named by their hashes in a Content-Security-Policy, which allows nothing else to run or to
be loaded; names of files and other texts are escaped by the template.
"""

import base64
import hashlib
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2
import numpy as np
from PIL import Image

from utils.evaluation.plots import Plot
from utils.files import atomic_write

_HERE = Path(__file__).parent
Cell = str | float | None


@dataclass(frozen=True)
class Column:
    """A column: its title, and digits after the point of its numbers (None: as they are)."""

    title: str
    digits: int | None = None
    signed: bool = False


@dataclass(frozen=True)
class Table:
    """A table that can be sorted by any column. A cell is a text, a number, or None for a dash."""

    caption: str
    columns: Sequence[Column]
    rows: Sequence[Sequence[Cell]]


@dataclass(frozen=True)
class Version:
    """A picture as one codec makes it: uint8 `[H, W, 3]`, and what to say about it."""

    name: str
    note: str
    pixels: np.ndarray


@dataclass(frozen=True)
class Viewer:
    """Two versions of a picture under a slider: at first those of these positions."""

    title: str
    versions: Sequence[Version]
    left: int
    right: int


@dataclass(frozen=True)
class Section:
    """A heading with what stands under it; all may be empty."""

    title: str
    text: str = ""
    plots: Sequence[Plot] = ()
    tables: Sequence[Table] = ()
    viewers: Sequence[Viewer] = ()


def write_page(
    folder: Path, title: str, lead: str, sections: Sequence[Section | None], facts: Sequence[tuple[str, str]]
) -> Path:
    """Write a page as `index.html` into a folder, whole or not at all; returns its path.

    Args:
        sections: those that are None are left out.
        facts: pairs of a name and a value, at the end of the page.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_HERE), autoescape=True, trim_blocks=True, lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )  # fmt: skip
    environment.filters |= {"cell": _cell, "number": _number, "svg": _svg, "picture": _picture}
    style, script = ((_HERE / name).read_text() for name in ("page.css", "page.js"))
    text = environment.get_template("page.html").render(
        title=title, lead=lead, sections=[section for section in sections if section], facts=facts,
        style=style, script=script, style_hash=_hash(style), script_hash=_hash(script),
    )
    path = folder / "index.html"
    with atomic_write(path) as file:
        file.write(text.encode(errors="backslashreplace"))  # names may be no UTF-8
    return path


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _uri(kind: str, data: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def _svg(data: bytes) -> str:
    return _uri("svg+xml", data)


def _picture(pixels: np.ndarray) -> str:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "WEBP", lossless=True)
    return _uri("webp", file.getvalue())


def _number(value: Cell) -> bool:
    return isinstance(value, (int, float))


def _cell(value: Cell, column: Column) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "–"
    if not _number(value) or column.digits is None:
        return f"{value:g}" if _number(value) else value
    return f"{value:{'+' if column.signed else ''}.{column.digits}f}"
