"""Measure rate and distortion of checkpoints on photographs, and compare them with other codecs.

    python eval_vbr.py                                   # shipped weights, scikit-image's photographs, six rates
    python eval_vbr.py -d kodak --real                   # from real files: encode, decode, count the bytes
    python eval_vbr.py -d kodak --anchors --json rd.json --report report    # beside JPEG, WebP, AVIF …, as a page to look at
    python eval_vbr.py -d kodak -l 0 2.5 5 --checkpoint vbr_models/tcm_vbr.pth.tar --save out
    python eval_vbr.py --compare a.json b.json --report report              # nothing is measured
    python eval_vbr.py -d kodak --rate-model rate.png    # does R = Σ log2 m + C hold? A plot and a table

Prints a table of means (and of pictures with --per-image). Unreadable pictures are named, left out,
and make the exit status 1. Started by torchrun, processes share the pictures.
"""

import argparse
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from models.lambdas import LADDER, MAX_INDEX
from utils import cli
from utils.codec.request import add_index_argument
from utils.evaluation.results import RESULTS_TABLE, Result, file_stem, mean, stem, to_json
from utils.files import BUNDLED, write_json
from utils.pictures import find_images, find_images_or_samples

if TYPE_CHECKING:  # PyTorch takes seconds to import: --help does without, so the functions below import what needs it
    from models import TCM
    from utils.training.distributed import DistContext

ANCHORS = ("jpeg", "jpeg444", "webp", "avif", "jpegxl", "jpeg2000")
PATIENCE = timedelta(hours=24)  # with which a process waits for the others' pictures


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = cli.make_parser(__doc__)
    add = parser.add_argument
    add("-d", "--data", nargs="+", metavar="DIR", help="folders (searched recursively) or pictures (default: scikit-image's photographs)")
    add_index_argument(parser, several=True, default="all six")
    add("--checkpoint", nargs="+", metavar="FILE", help=f"weights; of several, the first are compared with the others (default: {BUNDLED})")
    add("--real", action="store_true", help="encode, decode and count the bytes of the files, instead of estimating")
    add("--anchors", nargs="*", choices=ANCHORS, metavar="CODEC", help=f"code the pictures with these too (without a name: all of {', '.join(ANCHORS)}); implies --real")
    add("--compare", nargs="+", default=[], metavar="JSON", help="compare with results of earlier runs; without -d, --checkpoint and --anchors nothing is measured")
    add("--per-image", action="store_true", help="a row for every picture too")
    add("--json", metavar="FILE", help="write results in CompressAI's format, with everything that is compared")
    add("--report", metavar="DIR", help="write a page with plots, tables and pictures; implies --real")
    add("--show", nargs="+", metavar="PICTURE", help="pictures of the report (default: six spread over all)")
    add("--save", metavar="DIR", help="write the reconstructions as PNG")
    add("--rate-model", metavar="FILE.png", help="instead, measure bits at 21 indexes against the R-λ model, and draw them")
    cli.add_device_argument(parser, published=True)
    args = parser.parse_args(argv)
    for index in args.lmd or ():
        if not 0 <= index <= MAX_INDEX:
            parser.error(f"-l: index must lie in [0, {MAX_INDEX:g}], not {index:g}")
    if args.rate_model and (args.lmd or args.real or args.per_image or args.save or args.report or args.compare or args.anchors is not None):
        parser.error("--rate-model goes with -d, --json and --checkpoint: it has its own rates, and writes no pictures")
    if args.show and not args.report:
        parser.error("--show names pictures of a --report")
    args.measure = bool(args.data or args.checkpoint or args.anchors is not None or not args.compare)
    args.real |= args.anchors is not None or bool(args.report)
    args.anchors = list(ANCHORS) if args.anchors == [] else args.anchors or []
    args.checkpoint = args.checkpoint or [str(BUNDLED)]
    return args


def measure_checkpoint(
    model: "TCM", file: str, paths: list[Path], args: argparse.Namespace, context: "DistContext"
) -> tuple[dict, int]:
    """A checkpoint as a codec in CompressAI's format, and how many pictures failed. Prints its table."""
    from models import TCM_VBR
    from utils.evaluation.evaluate import evaluate, measure_all
    from utils.images import save_image

    variable = isinstance(model, TCM_VBR)
    if args.lmd and not variable:
        raise cli.UserError(f"{file}: a fixed-rate TCM has no rate index; leave out -l")
    indexes = (args.lmd or [float(i) for i in range(len(LADDER))]) if variable else [None]

    def work(name: str, image, index: float | None) -> Result:
        result, decoded = evaluate(model, name, image, index, args.real)
        if args.save:
            save_image(Path(args.save) / f"{file_stem(result.image, index)}.png", decoded)
        return result

    results, failed = measure_all(paths, indexes, context, model.medians.device, work, "evaluating")
    if not results:
        raise cli.UserError("none of the pictures could be measured")
    groups = [[result for result in results if result.index == index] for index in indexes]
    if context.is_main:
        print(RESULTS_TABLE.header)
        for result in results if args.per_image else ():
            print(RESULTS_TABLE.row(result.image, [result]))
        if args.per_image:
            print(RESULTS_TABLE.rule)
        for group in groups:
            print(RESULTS_TABLE.row(f"mean of {len(group)}", group))
        if variable and not args.lmd and (loss := mean(result.loss for result in results)) is not None:
            print(f"mean R-D loss, λ · D + bpp over pictures and the six rates: {loss:.4f}")
    codec = to_json(groups, stem(file), "real files" if args.real else "estimated from likelihoods", results)
    return codec | {"metric": model.metric, "checkpoint": {"file": Path(file).name, "fingerprint": model.fingerprint.hex()}}, failed


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    from utils.checkpoint import load_model
    from utils.evaluation import anchors, comparison
    from utils.evaluation.provenance import provenance
    from utils.training.distributed import DistContext

    context = DistContext.from_environment(args.device, PATIENCE, "gloo")
    codecs, models, failed, paths = [], [], 0, []
    if args.measure:
        paths = find_images_or_samples(args.data)
    for file in args.checkpoint if args.measure else ():
        model = load_model(file, context.device, variable_rate=bool(args.rate_model))
        if context.is_main:
            cli.print_weights(file)
        model.prepare()
        if args.rate_model:
            from utils.evaluation import rate_study

            return rate_study.run(model, paths, Path(args.rate_model), args.json)
        codec, broken = measure_checkpoint(model, file, paths, args, context)
        comparison.add_codec(codecs, codec, Path(file).parent.name)
        models.append(model)
        failed = max(failed, broken)
    ours, known = len(codecs), anchors.available(args.anchors)
    codecs += anchors.measure_all(known, paths, context)
    context.close()
    if not context.is_main:
        return 0
    for file in args.compare:
        comparison.add_codecs(codecs, file)
    whole = codecs[0] | {"compared": codecs[1:], "summary": comparison.compare(codecs, codecs[0].get("metric", "mse"))}
    whole["made"] = provenance(argv, context)
    if len(codecs) > 1:
        print(comparison.table(whole["summary"]))
    if args.report:
        write_report(args, whole, ours, models, paths, known)
    if args.json:
        write_json(args.json, whole)
    return 1 if failed else 0


def write_report(args, whole, ours, models, paths, known):
    """The page, with pictures and a study of the rate model where something was measured."""
    from models import TCM_VBR
    from utils.evaluation import rate_study, report

    shown = find_images(args.show) if args.show else report.spread(paths)
    viewers = report.make_viewers(models[0], whole, paths, shown, known) if models else []
    studies = rate_study.study_all(models[0], shown) if models and isinstance(models[0], TCM_VBR) else []
    if studies:
        whole["rate_model"] = rate_study.summary(studies)
    print(report.write_report(Path(args.report), whole, max(1, ours), viewers, studies))


if __name__ == "__main__":
    cli.run(main)
