"""Measure rate and distortion of a checkpoint on photographs.

    python eval_vbr.py                                   # bundled weights, scikit-image's photographs, six rates
    python eval_vbr.py -d kodak --real                   # from real files: encode, decode, count the bytes
    python eval_vbr.py -d kodak -l 0 2.5 5 --checkpoint vbr_models/tcm_vbr.pth.tar --json rd.json --save out
    python eval_vbr.py -d kodak --rate-model rate.png    # does R = Σ log2 m + C hold? A plot and a table

Prints a table of means (and of pictures with --per-image). Unreadable pictures are named, left out,
and make the exit status 1.
"""

import argparse
from pathlib import Path

import torch
from tqdm import tqdm

from models.tcm import TCM, TCM_VBR
from utils import cli
from utils.checkpoint import BUNDLED, load_model
from utils.errors import ImageError
from utils.evaluation import Result, evaluate, mean
from utils.files import write_json
from utils.images import read_images, save_image
from utils.ladder import LADDER, MAX_INDEX
from utils.online import need_variable_rate
from utils.report import HEAD, report, row, short_names


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=cli.Formatter
    )
    add = parser.add_argument
    add("-d", "--data", nargs="+", metavar="DIR", help="folders (searched recursively) or pictures (default: scikit-image's photographs)")
    add("-l", "--lmd", nargs="+", type=float, metavar="INDEX", help="rate indices in [0, 5], fractions allowed (default: all six)")
    add("--checkpoint", default=str(BUNDLED), metavar="FILE", help="weights")
    add("--real", action="store_true", help="encode, decode and count the bytes of the files, instead of estimating")
    add("--per-image", action="store_true", help="a row for every picture too")
    add("--json", metavar="FILE", help="write results in CompressAI's format")
    add("--save", metavar="DIR", help="write the reconstructions as PNG")
    add("--rate-model", metavar="FILE.png", help="instead, measure bits at 21 indices against the R-λ model, and draw them")
    add("--device", default="auto", choices=("auto", "cpu", "cuda"), help="where to compute")
    add("--cuda", action="store_true", help="accepted for published command lines: a GPU is used where there is one")
    args = parser.parse_args(argv)
    for index in args.lmd or ():
        if not 0 <= index <= MAX_INDEX:
            parser.error(f"-l: index must lie in [0, {MAX_INDEX:g}], not {index:g}")
    if args.rate_model and (args.lmd or args.real or args.per_image or args.save):
        parser.error("--rate-model goes with -d, --json and --checkpoint: it has its own rates, and writes no pictures")
    return args


def measure(
    model: TCM, paths: list[Path], indices: list[float | None], args: argparse.Namespace, device: torch.device
) -> tuple[list[Result], int]:
    """Every picture at every index; returns the results and how many pictures failed."""
    results, failed = [], set()
    names = short_names(paths)
    if args.real:
        model.prepare()
    bar = tqdm(total=len(paths) * len(indices), desc="evaluating", unit="image", disable=None)
    for path, image in read_images(paths):
        if isinstance(image, ImageError):
            cli.complain(path, image)
            failed.add(path)
            bar.update(len(indices))
            continue
        for index in indices:
            try:
                result, decoded = evaluate(model, names[path], image.to(device), index, args.real)
            except ValueError as error:  # sides or latents that the format cannot hold
                cli.complain(path, error)
                failed.add(path)
                bar.update()
                continue
            results.append(result)
            if args.save:
                suffix = "" if index is None else f"_index{index:g}"
                save_image(Path(args.save) / f"{names[path].strip('/').replace('/', '_')}{suffix}.png", decoded)
            bar.update()
    bar.close()
    return results, len(failed)


def study_rate_model(model: TCM_VBR, paths: list[Path], args: argparse.Namespace, device: torch.device) -> int:
    """--rate-model: plot, table and JSON; the exit status."""
    from utils import rate_study  # matplotlib takes a second to import

    studies, names = [], short_names(paths)
    for path, image in tqdm(read_images(paths), total=len(paths), desc="21 rates of each", unit="image", disable=None):
        try:
            if isinstance(image, ImageError):
                raise image
            studies.append(rate_study.study(model, names[path], image.to(device)))
        except (ImageError, ValueError) as error:
            cli.complain(path, error)
    if not studies:
        raise cli.UserError("none of the pictures could be measured")
    found = rate_study.summary(studies)
    print(rate_study.table(found["means"]))
    rate_study.plot(studies, Path(args.rate_model))
    if args.json:
        write_json(args.json, found)
    return 0 if len(studies) == len(paths) else 1


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    device = cli.pick_device(args.device)
    paths = cli.pictures(args.data)
    model = load_model(args.checkpoint, device)
    variable = isinstance(model, TCM_VBR)
    if args.lmd and not variable:
        raise cli.UserError(f"{args.checkpoint}: a fixed-rate TCM has no rate index; leave out -l")
    if args.rate_model:
        need_variable_rate(model, args.checkpoint)
        model.prepare()
        return study_rate_model(model, paths, args, device)
    indices = (args.lmd or [float(i) for i in range(len(LADDER))]) if variable else [None]

    results, failed = measure(model, paths, indices, args, device)
    if not results:
        raise cli.UserError("none of the pictures could be measured")
    print(HEAD)
    if args.per_image:
        for result in results:
            print(row(result.image, [result]))
        print("-" * len(HEAD))
    count = len(paths) - failed
    for index in indices:
        print(row(f"mean of {count}", [result for result in results if result.index == index]))
    if variable and not args.lmd and (loss := mean(results, "loss")) is not None:
        print(f"mean R-D loss, λ · D + bpp over pictures and the six rates: {loss:.4f}")
    if args.json:
        how = "real files" if args.real else "estimated from likelihoods"
        groups = [[result for result in results if result.index == index] for index in indices]
        write_json(args.json, report(groups, results, cli.stem(args.checkpoint), how))
    return 1 if failed else 0


if __name__ == "__main__":
    cli.run(main)
