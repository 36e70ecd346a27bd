"""Results as a table, and as JSON in CompressAI's format."""

import math
from collections import Counter
from pathlib import Path

from utils.evaluation import Result, mean

HEAD = f"{'image':<30} {'index':>5} {'bpp':>8} {'PSNR dB':>8} {'MS-SSIM dB':>10} {'encode s':>9} {'decode s':>9}"


def cell(value: float | None, width: int, digits: int) -> str:
    """A number of a table; a dash for none."""
    return f"{'–' if value is None else f'{value:.{digits}f}':>{width}}"


def row(name: str, results: list[Result]) -> str:
    """One line of the table, at most 100 characters: the means of some results."""

    def of(field: str, width: int, digits: int) -> str:
        return cell(mean(results, field), width, digits)

    name = name if len(name) <= 30 else "…" + name[-29:]
    cells = [of("bpp", 8, 4), of("psnr", 8, 2), of("ms_ssim_db", 10, 2)]
    cells += [of("encode_seconds", 9, 2), of("decode_seconds", 9, 2)]
    return " ".join([f"{name:<30}", of("index", 5, 2), *cells])


def short_names(paths: list[Path]) -> dict[Path, str]:
    """File names; whole paths where two files share one."""
    counts = Counter(path.name for path in paths)
    return {path: path.name if counts[path.name] == 1 else path.as_posix() for path in paths}


def report(groups: list[list[Result]], results: list[Result], name: str, description: str) -> dict:
    """CompressAI's results format, with the index, the loss, and a row an image under `images`.

    Args:
        groups: whose means are the points of the curve.
        results: the same in the order of the rows.
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
    """None for what JSON does not have: infinity, which is the PSNR of a perfect copy, and NaN."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
