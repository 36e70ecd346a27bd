"""Measure rate and distortion of a checkpoint on photographs.

    python eval_vbr.py                                   # shipped weights, scikit-image's photographs, six rates
    python eval_vbr.py -d kodak --real                   # from real files: encode, decode, count the bytes
    python eval_vbr.py -d kodak -l 0 2.5 5 --checkpoint vbr_models/tcm_vbr.pth.tar --json rd.json --save out
    python eval_vbr.py -d kodak --rate-model rate.png    # does R = Σ log2 m + C hold? A plot and a table

Prints a table of means (and of pictures with --per-image). Unreadable pictures are named, left out,
and make the exit status 1.
"""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from models.lambdas import LADDER, MAX_INDEX
from utils import cli
from utils.codec.request import add_index_argument
from utils.evaluation.results import RESULTS_TABLE, Result, file_stem, mean, report, stem
from utils.files import BUNDLED, write_json
from utils.pictures import find_images_or_samples

if TYPE_CHECKING:  # PyTorch takes seconds to import: --help does without, so the functions below import what needs it
    from models import TCM


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = cli.make_parser(__doc__)
    add = parser.add_argument
    add("-d", "--data", nargs="+", metavar="DIR", help="folders (searched recursively) or pictures (default: scikit-image's photographs)")
    add_index_argument(parser, several=True, default="all six")
    add("--checkpoint", default=str(BUNDLED), metavar="FILE", help="weights")
    add("--real", action="store_true", help="encode, decode and count the bytes of the files, instead of estimating")
    add("--per-image", action="store_true", help="a row for every picture too")
    add("--json", metavar="FILE", help="write results in CompressAI's format")
    add("--save", metavar="DIR", help="write the reconstructions as PNG")
    add("--rate-model", metavar="FILE.png", help="instead, measure bits at 21 indexes against the R-λ model, and draw them")
    cli.add_device_argument(parser, published=True)
    args = parser.parse_args(argv)
    for index in args.lmd or ():
        if not 0 <= index <= MAX_INDEX:
            parser.error(f"-l: index must lie in [0, {MAX_INDEX:g}], not {index:g}")
    if args.rate_model and (args.lmd or args.real or args.per_image or args.save):
        parser.error("--rate-model goes with -d, --json and --checkpoint: it has its own rates, and writes no pictures")
    return args


def measure(
    model: "TCM", paths: list[Path], indexes: list[float | None], args: argparse.Namespace
) -> tuple[list[Result], int]:
    """Every picture at every index; returns the results and how many pictures failed."""
    from utils.evaluation.evaluate import evaluate, for_each
    from utils.images import save_image

    results, failed = [], set()
    jobs = for_each(paths, indexes, model.medians.device, lambda *job: evaluate(model, *job, args.real))
    bar = tqdm(jobs, total=len(paths) * len(indexes), desc="evaluating", unit="image", disable=None)
    for path, index, found in bar:
        if found is None:
            failed.add(path)
            continue
        result, decoded = found
        results.append(result)
        if args.save:
            save_image(Path(args.save) / f"{file_stem(result.image, index)}.png", decoded)
    return results, len(failed)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    from models import TCM_VBR
    from utils.checkpoint import load_model

    device, paths = cli.pick_device(args.device), find_images_or_samples(args.data)
    model = load_model(args.checkpoint, device, variable_rate=bool(args.rate_model))
    cli.print_weights(args.checkpoint)
    model.prepare()
    variable = isinstance(model, TCM_VBR)
    if args.lmd and not variable:
        raise cli.UserError(f"{args.checkpoint}: a fixed-rate TCM has no rate index; leave out -l")
    if args.rate_model:
        from utils.evaluation import rate_study

        return rate_study.run(model, paths, Path(args.rate_model), args.json)
    indexes = (args.lmd or [float(i) for i in range(len(LADDER))]) if variable else [None]
    results, failed = measure(model, paths, indexes, args)
    if not results:
        raise cli.UserError("none of the pictures could be measured")
    groups = [[result for result in results if result.index == index] for index in indexes]
    if args.json:
        how = "real files" if args.real else "estimated from likelihoods"
        write_json(args.json, report(groups, stem(args.checkpoint), how, results))
    print(RESULTS_TABLE.header)
    if args.per_image:
        for result in results:
            print(RESULTS_TABLE.row(result.image, [result]))
        print(RESULTS_TABLE.rule)
    for group in groups:
        print(RESULTS_TABLE.row(f"mean of {len(group)}", group))
    if variable and not args.lmd and (loss := mean(result.loss for result in results)) is not None:
        print(f"mean R-D loss, λ · D + bpp over pictures and the six rates: {loss:.4f}")
    return 1 if failed else 0


if __name__ == "__main__":
    cli.run(main)
