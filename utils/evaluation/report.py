"""The report of eval_vbr.py: plots, tables and pictures of its JSON, as one page."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

from models import Codec
from models.lambdas import index_to_lambda
from utils.codec.encode import encode
from utils.codec.quality_map import QualityMap, psnr_by_region
from utils.codec.request import EncodeRequest
from utils.errors import UserError
from utils.evaluation import anchors, rate_study
from utils.evaluation.comparison import Point, is_kodak, ms_ssim_decibels, points, published, weights_of
from utils.evaluation.evaluate import evaluate, evaluate_file
from utils.evaluation.page import Column, Section, Table, Version, Viewer, write_page
from utils.evaluation.plots import rd_figure, render, targets_figure
from utils.evaluation.results import Result, decibels, short_names
from utils.images import read_image, to_pixels

PICTURES = 6  # that are shown, unless others are named
CROP = 480, 360  # pixels, width and height, from the middle of a picture
SHOWN_INDEX = 1.0  # the rate at which pictures are shown: low enough for differences to be seen
QUALITIES = {"psnr": "PSNR", "ms-ssim": "MS-SSIM"}


def spread(paths: Sequence[Path]) -> list[Path]:
    """Some of the pictures, spread evenly over all of them."""
    count = min(PICTURES, len(paths))
    return [paths[(2 * i + 1) * len(paths) // (2 * count)] for i in range(count)]


def named(shown: Sequence[Path], paths: Sequence[Path]) -> list[Path]:
    """Pictures that a user names, as they are among `paths`. UserError where one is not."""
    known = {path.resolve(): path for path in paths}
    for path in shown:
        if path.resolve() not in known:
            raise UserError(f"--show {path}: not one of the pictures that are measured (-d)")
    return [known[path.resolve()] for path in shown]


# Pictures ------------------------------------------------------------------------------------


def make_viewers(
    model: Codec, whole: dict, paths: list[Path], shown: list[Path], codecs: list[str],
    map_of: Callable[[int, int], QualityMap | None],
) -> list[Viewer]:
    """A viewer for each picture that was measured: the original, the model's at a low rate, and each codec's of
    the size nearest to that. With a region also the model's of that size without one.

    Args:
        whole: the JSON, whose first codec is the model.
        paths: all pictures, by which their short names were made.
        codecs: those of anchors.CODECS that were measured.
        map_of: the map of a picture of a height and width.
    """
    names = short_names(paths)
    found = []
    indexes = {row["index"] for row in whole["images"]}
    index = None if None in indexes else min(indexes, key=lambda i: abs(i - SHOWN_INDEX))
    rows = {codec["name"]: codec["images"] for codec in whole["compared"] if "images" in codec}
    for path in shown:
        name = names[path]
        if not any(row["image"] == name for row in whole["images"]):
            continue  # it could not be measured
        image = read_image(path).to(model.medians.device)
        quality_map = map_of(*image.shape[1:])
        middle = _middle(image, quality_map)
        result, decoded = evaluate(model, name, image, request=EncodeRequest(index, quality_map=quality_map), real=True)
        title = f"{whole['name']}, with a region" if quality_map else whole["name"]
        versions = [Version("original", "8 bits a sample", _crop(image, middle))]
        versions.append(_version(title, result, decoded, middle=middle))
        if quality_map:
            size = round(result.bpp * image.shape[1] * image.shape[2] / 8)
            plain = encode(model, image, EncodeRequest(bytes=size))
            result, decoded = evaluate_file(model, name, image, file=plain, encode_seconds=plain.seconds)
            result.psnr_inside, result.psnr_outside = psnr_by_region(image, decoded, quality_map.region)
            versions.append(_version(f"{whole['name']}, one quality", result, decoded, middle=middle))
        for codec in (anchors.CODECS[key] for key in codecs):
            own = [row for row in rows[codec.title] if row["image"] == name]
            if not own:
                continue  # too large for its format
            quality = min(own, key=lambda row: abs(row["bpp"] - result.bpp))["index"]
            theirs, decoded = anchors.measure(name, image.cpu(), codec, quality=quality)
            versions.append(_version(codec.title, theirs, decoded, middle=middle))
        left = 2 if len(versions) > 2 else 0
        found.append(Viewer(f"{name}, {result.width}×{result.height}", versions, left=left, right=1))
    return found


def _middle(image: Tensor, quality_map: QualityMap | None) -> tuple[int, int]:
    """Row and column of the middle of a picture, or of its region."""
    if quality_map is None:
        return image.shape[1] // 2, image.shape[2] // 2
    rows, columns = quality_map.region.nonzero()
    return int(rows.min() + rows.max() + 1) // 2, int(columns.min() + columns.max() + 1) // 2


def _crop(image: Tensor, middle: tuple[int, int]) -> np.ndarray:
    sides = []
    for at, size, side in zip(middle, reversed(CROP), image.shape[1:], strict=True):
        start = max(0, min(at - size // 2, side - size))
        sides.append(slice(start, start + size))
    return to_pixels(image[:, sides[0], sides[1]])


def _version(codec: str, result: Result, decoded: Tensor, middle: tuple[int, int]) -> Version:
    note = f"{round(result.bpp * result.width * result.height / 8):,} bytes, {result.bpp:.3f} bpp, {result.psnr:.2f} dB"
    if result.ms_ssim is not None:
        note += f", MS-SSIM {decibels(result.ms_ssim):.2f} dB"
    if result.psnr_inside is not None:
        note += f", {result.psnr_inside:.2f} dB inside the region and {result.psnr_outside:.2f} dB outside"
    return Version(codec, note, _crop(decoded, middle))


# Sections ------------------------------------------------------------------------------------


def write_report(folder: Path, whole: dict, viewers: list[Viewer], studies: list[rate_study.Study]) -> Path:
    """Write the page and its plots, and return the page's path.

    Args:
        whole: the JSON: a codec, with others under "compared", checkpoints first, and their "summary".
    """
    codecs = [whole, *whole["compared"]]
    ours = 1 + sum(bool(weights_of(codec)) for codec in whole["compared"])
    from_papers = published() if is_kodak(whole) else []
    sections = [
        _curves(folder, codecs, ours, from_papers=from_papers),
        _side_by_side(whole["summary"]),
        Section("Pictures", _PICTURES_TEXT, viewers=viewers) if viewers else None,
        _speed(whole["summary"]),
        _rate_model(folder, studies),
        targets(folder, codecs),
        per_picture(codecs[:ours]),
    ]
    pictures = len({row["image"] for row in whole.get("images", ())})
    lead = f"{whole['name']}, {whole['description']}. {pictures} pictures.{_in_short(whole['summary'])}"
    told = facts(whole) + [(f"curve of {codec['name']}", f"published: {codec['source']}") for codec in from_papers]
    title = f"Rate and distortion of {whole['name']}"
    return write_page(folder, title, lead, sections=sections, facts=told)


def _in_short(summary: dict) -> str:
    """A sentence of BD-rates, by the metric of the loss; nothing where there are none."""
    key, quality = ("bd_psnr", "PSNR") if summary["metric"] == "mse" else ("bd_ms-ssim", "MS-SSIM")
    measured = [codec for codec in summary["codecs"][1:] if not codec["published"]]
    rates = [(codec["name"], codec[key]["rate"]["value"]) for codec in measured]
    told = [f"{value:+.1f}".replace("-", "−") + f" % against {name}" for name, value in rates if value is not None]
    return f" Bits at equal {quality} (BD-rate): {', '.join(told)}." if told else ""


_PICTURES_TEXT = (
    "Crops around the middle of a picture, or of its region, one pixel of the picture to one of the page. Choose what "
    "lies left and right, and drag the divider, or move it with the arrow keys. Every codec has the quality whose file "
    "is nearest in size to ours, which may be off by a fifth. Sizes and decibels are of the whole picture."
)


def facts(whole: dict) -> list[tuple[str, str]]:
    """Names and values at the end of the page, from the JSON of a run."""
    made = whole.get("made", {})
    found = [(name, str(made[name])) for name in ("command", "date", "machine") if name in made]
    versions = made.get("versions", {}).items()
    found.append(("versions", ", ".join(f"{name} {version}" for name, version in versions)))
    for codec in (whole, *whole.get("compared", ())):
        weights = ["{file}, fingerprint {fingerprint}".format(**one) for one in weights_of(codec)]
        found.append((f"weights of {codec['name']}", "; ".join(weights)))
    return [(name, value) for name, value in found if value]


def _curves(folder: Path, codecs: list[dict], ours: int, from_papers: list[dict]) -> Section:
    plots = []
    for metric, title in QUALITIES.items():
        if metric == "ms-ssim" and not any(p.ms_ssim for p in points(codecs[0])):
            continue
        shown = [codec for codec in from_papers if metric == "psnr" or "ms-ssim-rgb" in codec["results"]]
        names = ", ".join(codec["name"] for codec in codecs + shown)
        alt = f"{title} against bits per pixel of {names}; the tables below have losses and BD-rates"
        curves = codecs[:ours], codecs[ours:], shown
        name = f"rd_{metric.replace('-', '_')}"
        plots.append(render(lambda c=curves, m=metric: rd_figure(*c, metric=m), name, alt=alt, folder=folder))
    rows = [
        [codec["name"], point.quality, _lambda(codec, point), point.bpp, point.psnr, ms_ssim_decibels(point)]
        for codec in codecs[:ours]
        for point in points(codec)
    ]
    columns = [Column("codec"), Column("index", 2), Column("λ", 4), *_QUALITY_COLUMNS]
    text = "Higher and further left is better. MS-SSIM is averaged first, and then turned into decibels."
    if from_papers:
        text += " Dotted gray curves are published, not measured; their sources are at the end of the page."
    return Section("Rate and distortion", text, plots=plots, tables=[Table("Means over the pictures", columns, rows)])


def _lambda(codec: dict, point: Point) -> float | None:
    """λ of a point of ours. Files of a target have an index each, and a quality from elsewhere need be no index."""
    known = "checkpoint" in codec and point.quality is not None
    return index_to_lambda(point.quality, codec["metric"]) if known else None


def _side_by_side(summary: dict) -> Section:
    codecs = summary["codecs"]
    lambdas = summary["lambdas"]
    columns = [Column("codec"), *(Column(f"λ = {value:g}", 3) for value in lambdas), Column("mean", 4)]
    known = [codec for codec in codecs if not codec["published"]]
    rows = [[codec["name"], *(codec["least_loss"] or [None] * len(lambdas)), codec["mean_loss"]] for codec in known]
    loss = Table("Least R-D loss λ · D + bpp over the rates of each codec, at each λ, and its mean", columns, rows)
    columns = [Column("against"), Column("quality"), Column("BD-rate (%)", 2, True), Column("BD-quality (dB)", 3, True)]
    columns += [Column("from (dB)", 2), Column("to (dB)", 2), Column("overlap (%)", 0), Column("why there is none")]
    rows = []
    for codec in codecs[1:]:
        for metric, title in QUALITIES.items():
            rate = codec[f"bd_{metric}"]["rate"]
            quality = codec[f"bd_{metric}"]["quality"]
            low, high = rate.get("common") or (None, None)
            overlap = 100 * rate["overlap"] if rate.get("overlap") else None
            rows.append([codec["name"], title, rate["value"], quality["value"], low, high, overlap, rate["reason"]])
    first = codecs[0]["name"]
    if not any(row[-1] for row in rows):
        columns = columns[:-1]
        rows = [row[:-1] for row in rows]
    caption = f"Bjøntegaard deltas (Akima) of {first}; a negative rate: fewer bits than the other at equal quality"
    bd = Table(caption, columns, rows)
    text = "D is the mean squared error on the 0–255 scale" if summary["metric"] == "mse" else "D is 1 − MS-SSIM"
    text += (
        ". The R-D loss needs no overlap of the curves; smaller is better. It averages D, where BD-rate averages "
        "decibels; published curves have these alone."
    )
    if any(codec["name"] == anchors.CODECS["jpeg2000"].title for codec in codecs):
        text += " JPEG 2000 spends equal bits on all pictures here, which raises its mean PSNR: the two may disagree."
    return Section("Side by side", text, tables=[loss, bd][: len(codecs)])


def _speed(summary: dict) -> Section | None:
    keys = ("encode_seconds", "decode_seconds", "encode_seconds_per_megapixel", "decode_seconds_per_megapixel")
    rows = [[codec["name"], *(codec[key] for key in keys)] for codec in summary["codecs"] if codec["encode_seconds"]]
    columns = [Column("codec"), Column("encode (s)", 3), Column("decode (s)", 3)]
    columns += [Column("encode (s per megapixel)", 3), Column("decode (s per megapixel)", 3)]
    return Section("Speed", tables=[Table("Means over pictures and rates", columns, rows)]) if rows else None


def _rate_model(folder: Path, studies: list[rate_study.Study]) -> Section | None:
    if not studies:
        return None
    means = rate_study.summary(studies)["means"]
    columns = [Column("R = … + C"), Column("slope", 3), Column("R²", 4), Column("error of one trial (%)", 2)]
    columns += [Column(f"slope {i}–{i + 1}", 2) for i in range(5)]
    rows = [
        [text, *(means[name][key] for key in ("slope", "r2")), 100 * means[name]["one_trial_error"]]
        + means[name]["slope_between_indexes"]
        for name, text in rate_study.MODELS.items()
    ]
    alt = "Bits measured against bits predicted by both models, and bits per pixel over λ; the fits are in the table"
    text = f"Bits of {len(studies)} pictures at {len(rate_study.INDEXES)} rates, measured and predicted from one trial."
    text += (
        " R is the size in bits, m the scale that the network gives a latent for a rate index, C a constant of the"
        " picture, H(σ · m) the entropy of a rounded Gaussian of scale σ that m scales. The first model is the"
        " paper's, the second is what rate control uses. A model holds where its slope is near one between all"
        " indexes (medians), not only in the mean."
    )
    plot = render(lambda: rate_study.draw(studies), "rate_model", alt=alt, folder=folder)
    return Section("The R-λ model", text, plots=[plot], tables=[Table("Means over these pictures", columns, rows)])


def targets(folder: Path, codecs: list[dict]) -> Section | None:
    """How far files are from the sizes that were asked for, where there were such."""
    rows = [
        [codec["name"], row["image"], row["bpp"], 100 * row["error"], row["trials"]]
        for codec in codecs
        for row in codec.get("images", ())
        if row.get("error") is not None
    ]
    columns = [Column("codec"), Column("picture"), Column("bpp", 4), Column("error (%)", 3, True), Column("trials")]
    if not rows:
        return None
    alt = "Difference between the size of each file and its target in percent; the values are in the table"
    plot = render(lambda: targets_figure([row[3] for row in rows]), "targets", alt=alt, folder=folder)
    table = Table("Size of each file against its target", columns, rows)
    return Section("Rate control", plots=[plot], tables=[table])


def per_picture(codecs: list[dict]) -> Section | None:
    """The results of every picture."""
    columns = [Column("codec"), Column("picture"), Column("width"), Column("height"), Column("index", 2)]
    columns += [*_QUALITY_COLUMNS, Column("loss", 4), Column("encode (s)", 2), Column("decode (s)", 2)]
    keys = ("image", "width", "height", "index", "bpp", "psnr", "ms_ssim_db", "loss")
    keys += ("encode_seconds", "decode_seconds")
    rows = [[codec["name"], *(row[key] for key in keys)] for codec in codecs for row in codec.get("images", ())]
    table = Table("Every picture at every rate", columns, rows)
    return Section("Every picture", "Press a title to sort by it.", tables=[table]) if rows else None


_QUALITY_COLUMNS = Column("bpp", 4), Column("PSNR (dB)", 2), Column("MS-SSIM (dB)", 2)
