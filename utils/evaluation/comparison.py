"""Codecs side by side: the least R-D loss at each λ, Bjøntegaard deltas, seconds.

A codec is a dict in CompressAI's results format, as `to_json` makes it: means over the pictures under "results", and,
except for curves from elsewhere, the pictures under "images". The first of several codecs is compared with the others.
"""

import json
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

from models.lambdas import LADDERS
from utils.errors import UserError
from utils.evaluation.bd_rate import MIN_POINTS, delta_quality, delta_rate, key_of, pictures, points_of, rising
from utils.evaluation.results import TextColumn, TextTable, decibels, distortion_of, mean, mean_of_all, mse_of_psnr
from utils.files import finite, read_json
from utils.messages import print_note

PUBLISHED = Path(__file__).with_name("kodak_published.json")
_OF_A_RUN = ("compared", "summary", "rate_model", "made")  # keys of a file that are not of its first codec


class Point(NamedTuple):
    """A codec at one quality, means over pictures: PSNR in dB, MSE on the 0–255 scale, MS-SSIM in [0, 1].

    The quality is an index of ours (the mean, where a target gave each picture its own), or what the codec calls it;
    None where a codec has one rate, or it is not known.
    """

    quality: float | None
    bpp: float
    psnr: float | None  # None: infinite
    mse: float | None  # None: not known, as a mean of decibels does not tell it
    ms_ssim: float | None


def points(codec: dict) -> list[Point]:
    """The rates of a codec by rising bpp."""
    groups = defaultdict(list)  # rows of index, bpp, PSNR and MS-SSIM by rate
    if "images" in codec:
        for row in codec["images"]:
            groups[row["point"]].append((row["index"], row["bpp"], row["psnr"], row["ms_ssim"]))
    else:
        results = codec["results"]
        ms_ssim = results.get(key_of(results, "ms-ssim"), [None] * len(results["bpp"]))
        for bpp, psnr, value in zip(results["bpp"], results[key_of(results, "psnr")], ms_ssim, strict=True):
            groups[bpp].append((None, bpp, psnr, value))
    found = []
    for rows in groups.values():
        index, bpp, psnr, ms_ssim = zip(*rows, strict=True)
        squares = [0.0 if value is None else mse_of_psnr(value) for value in psnr]  # JSON has no infinity
        mse = mean(squares) if "images" in codec else None
        means = dict(psnr=mean_of_all(psnr), ms_ssim=mean_of_all(ms_ssim))
        found.append(Point(quality=mean(index), bpp=mean(bpp), mse=mse, **means))
    return sorted(found, key=lambda point: point.bpp)


def join_fixed_rates(codecs: list[dict]) -> list[dict]:
    """Join fixed-rate models (same network, metric and pictures, at least four) to a curve, in the place of the first.

    Their checkpoints are a list, in the order of the points. N and M may differ, as between the qualities of
    CompressAI's zoo.
    """
    groups = defaultdict(list)
    for number, codec in enumerate(codecs):
        fixed = "index" not in codec["results"]
        sizes = {key: value for key, value in codec.get("arguments", {}).items() if key not in ("N", "M")}
        network = codec.get("model"), json.dumps(sizes, sort_keys=True)
        kind = "fixed", *network, codec["metric"], frozenset(pictures(codec))
        groups[kind if fixed else number].append(codec)
    curves = [group for group in groups.values() if len(group) >= MIN_POINTS]
    joined = {id(group[0]): _one_curve(group) for group in curves}
    absorbed = {id(codec) for group in curves for codec in group[1:]}
    return [joined.get(id(codec), codec) for codec in codecs if id(codec) not in absorbed]


def _one_curve(codecs: list[dict]) -> dict:
    codecs = sorted(codecs, key=lambda codec: codec["results"]["bpp"][0])
    keys = [key for key in codecs[0]["results"] if all(key in codec["results"] for codec in codecs)]
    metric = codecs[0]["metric"]
    network = codecs[0].get("model", "TCM")
    return {
        "name": f"{len(codecs)} fixed-rate {network}s" + (" for MS-SSIM" if metric == "ms-ssim" else ""),
        "description": codecs[0]["description"],
        "results": {key: [codec["results"][key][0] for codec in codecs] for key in keys},
        "images": [row | {"point": number} for number, codec in enumerate(codecs) for row in codec["images"]],
        "metric": metric,
        "checkpoints": [codec["checkpoint"] for codec in codecs],
    }


def read_codecs(file: str) -> list[dict]:
    """The codecs of a file that eval_vbr.py or online_training_vbr.py wrote, or of one in CompressAI's format.

    Raises:
        UserError: names the file that holds none.
    """
    try:
        whole = read_json(file)
        codecs = [whole, *whole.get("compared", [])]
        for codec in codecs:
            if not (points(codec) and isinstance(codec["name"], str)):
                raise ValueError("no results")
            if codec.get("metric", "mse") not in LADDERS:
                raise ValueError(f"an unknown metric, {codec['metric']}")
            points_of(codec, "psnr")
            for row in codec.get("images", ()):
                _ = row["image"], row["width"], row["height"], row["encode_seconds"], row["decode_seconds"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        cause = f"no {error}" if isinstance(error, KeyError) else error
        raise UserError(f"{file}: not a file of rate-distortion results ({cause})") from None
    return codecs


def add_codec(codecs: list[dict], codec: dict, source: str) -> None:
    """Add a codec, and the name of where it comes from where its own is taken. Says so where it has other pictures."""
    taken = {other["name"] for other in codecs}
    number = 1
    name = codec["name"]
    while name in taken:
        name = f"{codec['name']} ({source}{f', {number}' if number > 1 else ''})"
        number += 1
    codec = codec | {"name": name}
    if codecs and "images" in codec and "images" in codecs[0] and pictures(codec) != pictures(codecs[0]):
        print_note(source, f"{codec['name']} was measured on other pictures than {codecs[0]['name']}", once=True)
    codecs.append(codec)


def weights_of(codec: dict) -> list[dict]:
    """Where the weights of a codec come from; of a classical codec nothing."""
    return codec.get("checkpoints", [codec["checkpoint"]] if "checkpoint" in codec else [])


def _identity(codec: dict) -> tuple:
    """What tells codecs apart: classical ones their names and pictures, weights where they come from and how they were
    measured."""
    weights = weights_of(codec)
    return (weights, codec["description"]) if weights else (codec["name"], pictures(codec) if "images" in codec else ())


def together(codecs: list[dict], files: list[tuple[str, list[dict]]]) -> dict:
    """The first of codecs, with the others and those of files under "compared", and their "summary", which has the
    published curves too where the pictures are Kodak's.

    Args:
        files: names, and what `read_codecs` returned.
    """
    found: list[dict] = []
    for codec in codecs:
        add_codec(found, codec, codec.get("checkpoint", {}).get("fingerprint", "other weights"))
    for file, codecs in files:
        known = [_identity(codec) for codec in found]
        for number, codec in enumerate(codecs):
            if not number or _identity(codec) not in known:  # what it was compared with may be there already
                add_codec(found, {key: codec[key] for key in codec if key not in _OF_A_RUN}, Path(file).stem)
    found[1:] = sorted(found[1:], key=lambda codec: not weights_of(codec))  # classical codecs come last
    metric = found[0].get("metric", "mse")
    comparable = is_kodak(found[0]) and metric == "mse" and len(points(found[0])) >= MIN_POINTS
    beside = published() if comparable and least_losses(found[0], metric) else []  # of regions there is no loss
    return found[0] | {"compared": found[1:], "summary": compare(found + beside, metric)}


def is_kodak(codec: dict) -> bool:
    """Whether the pictures are the 24 of Kodak, by their names and sizes."""
    rows = {(Path(row["image"]).stem, *sorted((row["width"], row["height"]))) for row in codec.get("images", ())}
    return len(rows) == 24 and all(re.fullmatch(r"kodim\d\d", name) and size == [512, 768] for name, *size in rows)


def published() -> list[dict]:
    """Curves of Kodak from papers and from CompressAI, each with its source, to stand beside what is measured."""
    curves = json.loads(PUBLISHED.read_text())
    return [curve | {"name": f"{curve['name']} (published)", "description": "not measured here"} for curve in curves]


def least_losses(codec: dict, metric: str) -> list[float] | None:
    """The least λ · D + bpp over a codec's rates, for each λ of the ladder; bpp and D are means over the pictures.

    None where D is not known, or where regions have another λ than the rest.
    """
    if any(row.get("psnr_inside") is not None for row in codec.get("images", ())):
        return None
    found = [(point.bpp, distortion_of(metric, point.mse, point.ms_ssim)) for point in points(codec)]
    known = [(bpp, d) for bpp, d in found if d is not None]
    return [min(bpp + lmbda * d for bpp, d in known) for lmbda in LADDERS[metric]] if known else None


def compare(codecs: list[dict], metric: str = "mse") -> dict:
    """What the tables show, in plain values: rates, least losses and seconds of every codec, and the first against it.

    Args:
        metric: the loss is for "mse" or "ms-ssim".
    """
    found = []
    for codec in codecs:
        losses = least_losses(codec, metric)
        row = {"name": codec["name"], "published": "source" in codec, "rates": len(points(codec))}
        row |= {"least_loss": losses, "mean_loss": mean(losses or [])}
        rows = codec.get("images", ())
        megapixels = mean(row["width"] * row["height"] / 1e6 for row in rows)
        for key in ("encode_seconds", "decode_seconds"):
            seconds = mean(row[key] for row in rows)
            row[key] = seconds
            row[f"{key}_per_megapixel"] = None if seconds is None else seconds / megapixels
        if codec is not codecs[0]:
            for name in ("psnr", "ms-ssim"):
                row[f"bd_{name}"] = _deltas(codec, codecs[0], name)
        found.append(row)
    return finite({"metric": metric, "lambdas": list(LADDERS[metric]), "codecs": found})


def _deltas(anchor: dict, test: dict, metric: str) -> dict:
    """Deltas of rate and quality, and how many points of the anchor and of the tested codec they leave out."""
    try:
        found = [rising(points_of(codec, metric)) for codec in (anchor, test)]
    except KeyError:
        return {kind: {"value": None, "reason": f"no {metric} of one of the codecs"} for kind in ("rate", "quality")}
    curves = [kept for kept, _ in found]
    left_out = [len(beaten) for _, beaten in found]
    return {"rate": asdict(delta_rate(*curves)), "quality": asdict(delta_quality(*curves)), "left_out": left_out}


def table(summary: dict) -> str:
    """A summary by `compare` in lines."""

    def delta(name: str, kind: str):
        return lambda row: row.get(f"bd_{name}", {}).get(kind, {}).get("value")

    def common(end: int):
        return lambda row: (row.get("bd_psnr", {}).get("rate", {}).get("common") or (None, None))[end]

    lines = TextTable(
        "least λ·D + bpp at λ =", 31,
        *(
            TextColumn(f"{lmbda:g}", "6.3f", lambda row, i=i: row["least_loss"] and row["least_loss"][i])
            for i, lmbda in enumerate(summary["lambdas"])
        ),
        TextColumn("mean", "6.3f", lambda row: row["mean_loss"]),
        TextColumn("rates", "5.0f", lambda row: row["rates"]),
        TextColumn("BD-rate %", "9.1f", delta("psnr", "rate")),
        TextColumn("from dB", "7.1f", common(0)),
        TextColumn("to dB", "5.1f", common(1)),
        TextColumn("BD-PSNR", "7.2f", delta("psnr", "quality")),
        TextColumn("MS-SSIM %", "9.1f", delta("ms-ssim", "rate")),
        TextColumn("encode s", "8.2f", lambda row: row["encode_seconds"]),
        TextColumn("decode s", "8.2f", lambda row: row["decode_seconds"]),
    )  # fmt: skip
    first = summary["codecs"][0]["name"]
    notes = [f"BD (Akima): of {first} against each; a negative rate is fewer bits of {first} at equal quality"]
    notes += dict.fromkeys(note for row in summary["codecs"][1:] for note in _notes(first, row))
    return "\n".join([lines.header, *(lines.row(row["name"], [row]) for row in summary["codecs"]), *notes])


def _notes(first: str, row: dict) -> Iterator[str]:
    """Why a codec has no BD-rate, and which rates have no part in one."""
    if row["bd_psnr"]["rate"]["value"] is None:
        yield f"no BD-rate against {row['name']}: {row['bd_psnr']['rate']['reason']}"
    for metric in ("psnr", "ms-ssim"):
        for name, count in zip((row["name"], first), row[f"bd_{metric}"].get("left_out", ()), strict=False):
            if count:
                rates = "1 rate" if count == 1 else f"{count} rates"
                yield f"BD ({metric}): without {rates} of {name}, as others have more quality for no more bits"


def ms_ssim_decibels(point: Point) -> float | None:
    """MS-SSIM of a point in dB; None where it is not known, or infinite."""
    return None if point.ms_ssim is None or point.ms_ssim >= 1 else decibels(point.ms_ssim)
