"""Refine each picture's latents before they are coded (DLM), and meet a target rate.

    python online_training_vbr.py -l 2 -d photos -t 20                       # less loss at an index: the paper's DLM
    python online_training_vbr.py -d photos -t 0 --target-bpp 0.2            # the rate you ask for, nothing refined
    python online_training_vbr.py -d photos -t 100 --max-bytes 20000 --out coded
    python online_training_vbr.py -l 0 1 2 3 4 5 -d photos -t 200 --json dlm.json    # curves, and their BD-rate

Every figure is of a real file, encoded and decoded. The decoder does not change: codec_vbr.py decodes the files.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from tqdm import tqdm

from models.tcm import TCM_VBR
from utils import cli
from utils.bd_rate import MIN_POINTS, rising, summary
from utils.checkpoint import BUNDLED, load_model
from utils.errors import ImageError
from utils.evaluation import mean
from utils.files import atomic_write, write_json
from utils.images import read_images, save_image
from utils.losses import psnr_of_mse
from utils.online import Outcome, need_variable_rate, produce
from utils.orders import Order, add_refinement_arguments, add_target_arguments, order_of
from utils.refine import Step
from utils.report import cell, report, short_names

HEAD = (
    f"{'image':<22} {'index':>5} {'bpp':>7} {'PSNR dB':>8} {'MS-SSIM':>8} {'Δbpp %':>7} {'ΔPSNR':>6} "
    f"{'Δloss %':>7} {'error %':>8} {'probes':>6} {'encode s':>8} {'refine s':>8}"
)


def parse(argv: list[str] | None) -> tuple[argparse.Namespace, list[Order]]:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=cli.Formatter
    )
    add = parser.add_argument
    add("-d", "--data", nargs="+", metavar="DIR", help="folders (searched recursively) or pictures (default: scikit-image's photographs)")
    add("-l", "--lmd", nargs="+", type=float, metavar="INDEX", help="rate indices in [0, 5], in place of a target (default without one: 2.5)")
    add_target_arguments(parser)
    add_refinement_arguments(parser, steps=20)
    add("--checkpoint", default=str(BUNDLED), metavar="FILE", help="variable-rate weights")
    add("--out", metavar="DIR", help="write the files, for codec_vbr.py decode, over older ones")
    add("--save", metavar="DIR", help="write the decoded pictures as PNG")
    add("--json", metavar="FILE", help="write results in CompressAI's format, those without refinement and every step beside them")
    add("--log", metavar="DIR", help="write every step for TensorBoard")
    add("--device", default="auto", choices=("auto", "cpu", "cuda"), help="where to compute")
    add("--cuda", action="store_true", help="accepted for published command lines: a GPU is used where there is one")
    args = parser.parse_args(argv)
    return args, [order_of(parser, args, index) for index in args.lmd or [None]]


def row(name: str, outcomes: list[Outcome]) -> str:
    """One line of the table: the means of some outcomes; of their errors, the mean magnitude."""

    def of(value: Callable[[Outcome], float | None], width: int, digits: int) -> str:
        values = [v for outcome in outcomes if (v := value(outcome)) is not None]
        return cell(sum(values) / len(values) if values else None, width, digits)

    def error(outcome: Outcome) -> float | None:
        return None if outcome.error is None else 100 * (outcome.error if len(outcomes) == 1 else abs(outcome.error))

    cells = [
        of(lambda o: o.index, 5, 2),
        of(lambda o: o.result.bpp, 7, 4),
        of(lambda o: o.result.psnr, 8, 2),
        of(lambda o: o.result.ms_ssim_db, 8, 2),
        of(lambda o: 100 * (o.result.bpp / o.plain.bpp - 1), 7, 2),
        of(lambda o: o.result.psnr - o.plain.psnr, 6, 3),
        of(lambda o: 100 * o.loss_change, 7, 2),
        of(error, 8, 3),
        of(lambda o: o.probes, 6, 1),
        of(lambda o: o.control_seconds, 8, 2),
        of(lambda o: o.refine_seconds, 8, 2),
    ]
    return " ".join([f"{name if len(name) <= 22 else '…' + name[-21:]:<22}", *cells])


def watch(bar: tqdm, writer, name: str) -> Callable[[Step], None]:
    """Shows a picture's steps, and logs them."""

    def on_step(step: Step) -> None:
        psnr = float(psnr_of_mse(torch.tensor(step.mse)))
        bar.set_postfix_str(f"{name} loss {step.loss:.4f} bpp {step.bpp:.4f} PSNR {psnr:.2f}")
        bar.update(step.number > 0)
        if writer:
            for tag, value in (("loss", step.loss), ("bpp", step.bpp), ("PSNR", psnr)):
                writer.add_scalar(f"{name}/{tag}", value, step.number)

    return on_step


def work(
    model: TCM_VBR, paths: list[Path], orders: list[Order], args: argparse.Namespace, device: torch.device
) -> tuple[list[list[Outcome]], int]:
    """Every picture by every order; the outcomes of each order, and how many pictures failed."""
    outcomes: list[list[Outcome]] = [[] for _ in orders]
    names, failed = short_names(paths), set()
    writer = None
    if args.log:
        from torch.utils.tensorboard import SummaryWriter  # which takes a second to import

        writer = SummaryWriter(args.log)
    bar = tqdm(total=len(paths) * len(orders) * max(1, args.steps), desc="refining" if args.steps else "encoding", unit="step", disable=None)
    print(HEAD)
    for path, image in read_images(paths):
        for number, order in enumerate(orders):
            before = bar.n
            mark = f"{names[path].strip('/').replace('/', '_')}" + ("" if order.index is None else f"_index{order.index:g}")
            try:
                if isinstance(image, ImageError):
                    raise image
                outcome = produce(model, names[path], image.to(device), order, watch(bar, writer, mark))
            except (ImageError, ValueError) as error:
                cli.complain(path, error)
                failed.add(path)
            else:
                outcomes[number].append(outcome)
                tqdm.write(row(names[path], [outcome]))
                if outcome.note:
                    tqdm.write(f"{path}: the target is {outcome.note}", file=sys.stderr)
                if args.out:
                    with atomic_write(Path(args.out) / f"{mark}.tvbr") as file:
                        file.write(outcome.data)
                if args.save:
                    save_image(Path(args.save) / f"{mark}.png", outcome.decoded)
            bar.update(max(1, args.steps) - (bar.n - before))  # what a method left undone
            if isinstance(image, ImageError):
                break
    bar.close()
    if writer:
        writer.close()
    return outcomes, len(failed)


def gain(outcomes: list[list[Outcome]]) -> str:
    """What refinement gains over the curve of mean rates and qualities without it."""
    plain = [[outcome.plain for outcome in group] for group in outcomes]
    refined = [[outcome.result for outcome in group] for group in outcomes]
    curves = [rising((mean(group, "bpp"), mean(group, "psnr")) for group in groups)[0] for groups in (plain, refined)]
    if min(map(len, curves)) < MIN_POINTS:
        return f"BD-rate: none, a curve has fewer than {MIN_POINTS} rising points"
    return summary(*curves)


def results_of(outcomes: list[list[Outcome]], args: argparse.Namespace) -> dict:
    """For JSON: curves of what was refined and what was not, and how each picture came about."""
    name = cli.stem(args.checkpoint)
    how = f"real files, {args.steps} steps of {args.method}" if args.steps else "real files"
    flat = [outcome for group in outcomes for outcome in group]
    refined = [[outcome.result for outcome in group] for group in outcomes]
    whole = report(refined, [outcome.result for outcome in flat], name, how)
    for image, outcome in zip(whole["images"], flat, strict=True):
        image |= {"error": outcome.error, "probes": outcome.probes, "chosen_step": outcome.chosen, "note": outcome.note}
        image |= {"loss_change": outcome.loss_change}
        image |= {"control_seconds": outcome.control_seconds, "refine_seconds": outcome.refine_seconds}
        image["steps"] = [[step.bpp, step.mse, step.loss] for step in outcome.steps]
    if args.steps:
        plain = [[outcome.plain for outcome in group] for group in outcomes]
        whole["unrefined"] = report(plain, [outcome.plain for outcome in flat], f"{name}, unrefined", "real files")
    return whole


def main(argv: list[str] | None = None) -> int:
    args, orders = parse(argv)
    device = cli.pick_device(args.device)
    paths = cli.pictures(args.data)
    model = load_model(args.checkpoint, device)
    need_variable_rate(model, args.checkpoint)
    model.prepare()
    outcomes, failed = work(model, paths, orders, args, device)
    if not any(outcomes):
        raise cli.UserError("none of the pictures could be coded")
    print("-" * len(HEAD))
    for group in outcomes:
        if group:
            print(row(f"mean of {len(group)}", group))
    if orders[0].steered:
        errors = [abs(outcome.error) for outcome in outcomes[0] if outcome.error is not None]
        if errors:
            average, worst = sum(errors) / len(errors), max(errors)
            print(f"size against target: mean |error| {100 * average:.3f} %, worst {100 * worst:.3f} %")
    if args.steps and len(orders) >= MIN_POINTS:
        print(gain(outcomes))
    if args.json:
        write_json(args.json, results_of(outcomes, args))
    return 1 if failed else 0


if __name__ == "__main__":
    cli.run(main)
