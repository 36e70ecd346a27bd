"""Refine each picture's latents before they are coded (DLM), and meet a target rate.

    python online_training_vbr.py -l 2 -d photos -t 20                       # less loss at an index (DLM)
    python online_training_vbr.py -d photos -t 0 --target-bpp 0.2            # the rate you ask for, nothing refined
    python online_training_vbr.py -d photos -t 100 --max-bytes 20000 --out coded
    python online_training_vbr.py -l 0 1 2 3 4 5 -d photos -t 200 --json dlm.json    # curves, and their BD-rate

Every figure is of a real file, encoded and decoded. The decoder does not change: codec_vbr.py decodes the files.
Started by torchrun, processes share the pictures.
"""

import argparse
import itertools
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from utils import cli
from utils.cli.encoding_arguments import add_request_arguments, make_request
from utils.codec.request import EncodeRequest
from utils.evaluation.results import (
    Result,
    TextColumn,
    TextTable,
    check_stems,
    checkpoint_name,
    decibels,
    file_stem,
    mean,
    short_names,
    to_json,
)
from utils.files import BUNDLED, atomic_write, check_output_folder, json_output
from utils.messages import print_weights
from utils.pictures import find_images_or_samples

if TYPE_CHECKING:
    from torch import Tensor

    from models import VariableRate
    from utils.codec.encode import EncodeResult
    from utils.codec.refinement import Step
    from utils.distributed import DistContext


def parse(argv: list[str] | None) -> tuple[argparse.Namespace, list[EncodeRequest]]:
    parser = cli.make_parser(__doc__)
    add = parser.add_argument
    add("-d", "--data", nargs="+", metavar="DIR", help="folders (searched recursively) or pictures (default: scikit-image's photographs)")
    add_request_arguments(parser, several=True, steps=20)
    add("--checkpoint", default=str(BUNDLED), metavar="FILE", help="variable-rate weights")
    add("--out", metavar="DIR", help="write the files, for codec_vbr.py decode, over older ones")
    add("--save", metavar="DIR", help="write the decoded pictures as PNG")
    add("--json", metavar="FILE", help="write results in CompressAI's format, those without refinement and every step beside them (-: to standard output, and the tables to standard error)")
    add("--report", metavar="DIR", help="write a page: loss, bpp and PSNR over the steps, sizes against targets, every picture")
    add("--log", dest="logdir", help=argparse.SUPPRESS)  # torchrun takes it for its own
    add("--logdir", metavar="DIR", help="write every step for TensorBoard")
    cli.add_device_argument(parser, published=True)
    parser.add_argument("--total_steps", dest="steps", type=int, help=argparse.SUPPRESS, default=argparse.SUPPRESS)
    cli.accept_published(parser, "--clip_max_norm", "--real")
    args = parser.parse_args(argv)
    return args, [make_request(parser, args, index) for index in dict.fromkeys(args.index or [None])]


@dataclass(frozen=True)
class Row:
    """A picture by one request: its file, what it measures, and the same without refinement."""

    name: str  # what its files are called, without a suffix
    encoded: "EncodeResult"
    result: Result
    plain: Result
    error: float | None  # size against target, in percent

    def refined(self, name: str) -> float:
        """An attribute of the `Refinement`; 0 without one."""
        return getattr(self.encoded.refinement, name, 0.0)


TABLE = TextTable(
    "image", 22,
    TextColumn("index", "5.2f", lambda row: row.result.index),
    TextColumn("bpp", "7.4f", lambda row: row.result.bpp),
    TextColumn("PSNR dB", "8.2f", lambda row: row.result.psnr),
    TextColumn("MS-SSIM dB", "11.2f", lambda row: row.result.ms_ssim, unit=decibels),
    TextColumn("Δbpp %", "7.2f", lambda row: 100 * (row.result.bpp / row.plain.bpp - 1)),
    TextColumn("ΔPSNR", "6.3f", lambda row: row.refined("gain")),
    TextColumn("Δloss %", "7.2f", lambda row: 100 * row.refined("loss_change")),
    TextColumn("error %", "8.3f", lambda row: row.error),
    TextColumn("trials", "6.1f", lambda row: row.encoded.trials),
    TextColumn("encode s", "8.2f", lambda row: row.encoded.seconds),
    TextColumn("refine s", "8.2f", lambda row: row.refined("seconds")),
)


def code(model: "VariableRate", image_name: str, image: "Tensor", request: EncodeRequest, bar: tqdm, writer) -> tuple[Row, "Tensor"]:
    """Encode one picture, uint8 `[3, H, W]`, measure its file, and return the decoded picture too."""
    from utils.codec.encode import encode
    from utils.evaluation.evaluate import evaluate_file

    name = file_stem(image_name, request.index)
    encoded = encode(model, image, request, on_step=watch(bar, writer, name))
    refinement = encoded.refinement
    seconds = encoded.seconds + (refinement.seconds if refinement else 0)
    result, decoded = evaluate_file(model, image_name, image, file=encoded, encode_seconds=seconds)
    plain = replace(result, encode_seconds=encoded.seconds)
    if refinement and refinement.chosen:
        plain, _ = evaluate_file(model, image_name, image, file=refinement.before, encode_seconds=encoded.seconds)
    error = None if encoded.error is None else 100 * encoded.error
    return Row(name, encoded, result, plain=plain, error=error), decoded


def watch(bar: tqdm, writer, name: str) -> Callable[["Step"], None]:
    """A callback that shows the steps of a picture on the progress bar, and logs them."""
    from utils.metrics import psnr_of_mse

    def on_step(step: "Step") -> None:
        psnr = float(psnr_of_mse(step.mse))
        bar.set_postfix_str(f"{name} loss {step.loss:.4f} bpp {step.bpp:.4f} PSNR {psnr:.2f}")
        bar.update(step.number > 0)
        if writer:
            for tag, value in (("loss", step.loss), ("bpp", step.bpp), ("PSNR", psnr)):
                writer.add_scalar(f"{name}/{tag}", value, step.number)

    return on_step


def encode_all(
    model: "VariableRate", paths: list[Path], requests: list[EncodeRequest], args: argparse.Namespace, context: "DistContext",
    keep: Callable[[list[list[Row]]], object],
) -> tuple[list[list[Row]], int]:
    """Every picture by every request; returns the rows of each request, and how many pictures failed.

    Processes share the pictures; all of them get all rows. A line is printed as soon as the main process has a row; one
    that is alone has `keep` called with the rows after each picture, as the next ones may take hours.
    """
    from utils.evaluation.evaluate import for_each
    from utils.images import save_image

    writer = None
    steps = max(1, args.steps)
    mine = context.share(paths)
    found_rows: list[list[Row | None]] = []  # by picture and request
    if args.logdir:
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(args.logdir)
    title = "refining" if args.steps else "encoding"
    hidden = None if context.is_main else True
    bar = tqdm(total=len(mine) * len(requests) * steps, desc=title, unit="step", disable=hidden)

    def work(name: str, image: "Tensor", number: int) -> tuple[Row, "Tensor"]:
        return code(model, name, image, request=requests[number], bar=bar, writer=writer)

    tell(context, TABLE.header)
    jobs = for_each(mine, range(len(requests)), device=model.medians.device, work=work, names=short_names(paths))
    for count, (path, number, found) in enumerate(jobs, 1):
        if not number:
            found_rows.append([])
        found_rows[-1].append(found and found[0])
        if found:
            row, decoded = found
            tell(context, TABLE.row(row.result.image, [row]))
            if row.encoded.note:
                tqdm.write(f"{path}: the target is {row.encoded.note}", file=sys.stderr)
            if args.out:
                with atomic_write(Path(args.out) / f"{row.name}.tvbr") as file:
                    file.write(row.encoded.data)
            if args.save:
                save_image(Path(args.save) / f"{row.name}.png", decoded)
        bar.update(count * steps - bar.n)  # steps that the method did not need
        if args.json and context.world_size == 1 and len(found_rows[-1]) == len(requests):
            keep(by_request(found_rows))
    bar.close()
    if writer:
        writer.close()
    pictures = context.join(found_rows)
    rows = by_request(pictures)
    tell(context, TABLE.rule)
    for group in filter(None, rows):
        sizes = [replace(row, error=None if row.error is None else abs(row.error)) for row in group]
        tell(context, TABLE.row(f"mean of {len(group)}", sizes))
    return rows, sum(None in picture for picture in pictures)


def by_request(pictures: list[list[Row | None]]) -> list[list[Row]]:
    """The rows of each request, from those of each picture, without the failed ones."""
    return [[row for row in group if row] for group in zip(*pictures, strict=True)]


def tell(context: "DistContext", text: str) -> None:
    """Print by the main process, above its progress bar."""
    if context.is_main:
        tqdm.write(text)


def results_of(rows: list[list[Row]], kind: str) -> list[list[Result]]:
    """The results with refinement ("result") or without ("plain"), of each request that has any."""
    return [[getattr(row, kind) for row in group] for group in rows if group]


def bd_rate_of_refinement(whole: dict) -> str:
    """BD-rate of refinement, by the metric of the loss: the curve with it against the one without it."""
    from utils.evaluation.bd_rate import MIN_POINTS, points_of, rising, summary

    metric = "psnr" if whole["metric"] == "mse" else "ms-ssim"
    curves = [rising(points_of(codec, metric))[0] for codec in (whole["unrefined"], whole)]
    if min(map(len, curves)) < MIN_POINTS:
        return f"BD-rate: none, a curve has fewer than {MIN_POINTS} rising points"
    return summary(*curves, metric=metric)


def json_of(rows: list[list[Row]], args: argparse.Namespace, method: str) -> dict:
    """Results of the files, those without refinement, and how each file came about."""
    name = checkpoint_name(args.checkpoint)
    how = "real files"
    how += f", {args.steps} steps of {method}" if args.steps else ""
    whole = to_json(results_of(rows, "result"), name, how)
    for image, row in zip(whole["images"], itertools.chain(*rows), strict=True):
        encoded = row.encoded
        image |= {"error": encoded.error, "trials": encoded.trials, "note": encoded.note}
        image |= {"chosen_step": row.refined("chosen") or 0, "loss_change": row.refined("loss_change")}
        image |= {"control_seconds": encoded.seconds, "refine_seconds": row.refined("seconds")}
        image["steps"] = [[step.bpp, step.mse, step.loss] for step in row.refined("steps") or ()]
    if args.steps:
        whole["unrefined"] = to_json(results_of(rows, "plain"), f"{name}, unrefined", "real files")
    return whole


def write_report(folder: Path, whole: dict) -> Path:
    """A page of what `json_of` returned; returns its path."""
    from utils.evaluation import page, plots, report

    sections = [report.targets(folder, [whole]), report.per_picture([whole])]
    if refined := [image for image in whole["images"] if image["steps"]]:
        alt = "Change of loss, bits per pixel and PSNR over the steps, a line for each picture; dots are the steps taken"
        plot = plots.render(lambda: plots.steps_figure(refined), "steps", alt=alt, folder=folder)
        text = "Change from the file before refinement. A dot marks the step whose latents were coded."
        sections.insert(0, page.Section("Refinement", text, [plot]))
    title = f"Online training of latents: {whole['name']}"
    return page.write_page(folder, title, f"{whole['description']}.", sections=sections, facts=report.facts(whole))


def run(
    args: argparse.Namespace, requests: list[EncodeRequest], argv: list[str] | None, write_json: Callable[[dict], None]
) -> int:
    """Encode and measure what `parse` made of argv; returns the exit status."""
    from utils.checkpoint import load_model
    from utils.distributed import DistContext
    from utils.evaluation.bd_rate import MIN_POINTS
    from utils.evaluation.provenance import origin, provenance

    for folder in (args.report, args.out, args.save, args.logdir):
        check_output_folder(folder)
    context = DistContext.from_environment(args.device, sharing=True)
    paths = find_images_or_samples(args.data)
    if args.out or args.save:
        check_stems(paths)
    model = load_model(args.checkpoint, context.device, variable_rate=True)
    if context.is_main:
        print_weights(args.checkpoint)
    model.prepare()
    facts = {"metric": model.metric, "checkpoint": origin(args.checkpoint, model), "made": provenance(argv, context)}

    def keep(rows: list[list[Row]]) -> dict | None:
        if not any(rows):
            return None
        whole = json_of(rows, args, requests[0].refinement.method) | facts
        write_json(whole)
        return whole

    rows, failed = encode_all(model, paths, requests, args=args, context=context, keep=keep)
    context.close()
    if not any(rows):
        raise cli.UserError("none of the pictures could be coded")
    if not context.is_main:
        return 0
    whole = keep(rows)
    errors = [abs(row.error) for row in rows[0] if row.error is not None]
    if errors and requests[0].has_target:
        print(f"size against target: mean |error| {mean(errors):.3f} %, worst {max(errors):.3f} %")
    if args.steps and len(requests) >= MIN_POINTS:
        print(bd_rate_of_refinement(whole))
    if args.report:
        print(write_report(Path(args.report), whole))
    return 1 if failed else 0


def main(argv: list[str] | None = None) -> int:
    args, requests = parse(argv)
    with json_output(args.json) as write_json:
        return run(args, requests, argv, write_json=write_json)


if __name__ == "__main__":
    cli.run(main)
