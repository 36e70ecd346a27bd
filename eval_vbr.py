"""Measure rate and distortion of checkpoints on photographs, and compare them with other codecs.

    python eval_vbr.py                                   # default weights, scikit-image's photographs, six rates
    python eval_vbr.py -d kodak --real                   # from real files: encode, decode, count the bytes
    python eval_vbr.py -d kodak --anchors --json rd.json --report report    # beside JPEG, WebP, AVIF …, as a page to look at
    python eval_vbr.py -d kodak -l 0 2.5 5 --checkpoint vbr_models/tcm_vbr_published.pth.tar --save out
    python eval_vbr.py -d kodak --checkpoint vbr.pth.tar tcm/*/model.pth.tar   # one variable-rate model against those of one rate
    python eval_vbr.py --compare a.json b.json --report report              # nothing is measured
    python eval_vbr.py -d kodak --rate-model rate.png    # does R = Σ log2 m + C hold? A plot and a table

Prints a table of means (and of pictures with --per-image). Unreadable pictures are named, left out,
and make the exit status 1. Started by torchrun, processes share the pictures.
"""

import argparse
import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from models.lambdas import LADDER
from utils import cli
from utils.cli.encoding_arguments import (
    add_index_argument,
    add_map_arguments,
    add_nearest_argument,
    check_map_arguments,
    map_of_arguments,
)
from utils.codec.request import EncodeRequest
from utils.evaluation.results import (
    Result,
    check_stems,
    checkpoint_name,
    file_stem,
    mean,
    results_table,
    short_names,
    to_json,
)
from utils.files import BUNDLED, check_output_file, check_output_folder, json_output
from utils.messages import print_note, print_weights
from utils.pictures import find_images, find_images_or_samples

if TYPE_CHECKING:
    from torch import Tensor

    from models import Codec
    from utils.codec.quality_map import QualityMap
    from utils.distributed import DistContext

ANCHORS = ("jpeg", "jpeg444", "webp", "avif", "avif-fast", "avif-psnr", "jpegxl", "jpeg2000")  # keys of utils.evaluation.anchors.CODECS


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = cli.make_parser(__doc__)
    add = parser.add_argument
    add("-d", "--data", nargs="+", metavar="DIR", help="folders (searched recursively) or pictures (default: scikit-image's photographs)")
    add_index_argument(parser, several=True, default="all six")
    add("--checkpoint", nargs="+", metavar="FILE", help=f"weights; the first is compared with the rest. Four or more fixed-rate models are one curve (default: vbr_models/{BUNDLED.name})")
    add_map_arguments(parser)
    add("--real", action="store_true", help="encode, decode and count the bytes of the files, instead of summing up code lengths")
    add_nearest_argument(parser)
    add("--anchors", nargs="*", choices=ANCHORS, metavar="CODEC", help=f"compare with these codecs on the same pictures (no name: all of {', '.join(ANCHORS)}); implies --real")
    add("--compare", nargs="+", default=[], metavar="JSON", help="compare with results of earlier runs; without -d, --checkpoint and --anchors nothing is measured")
    add("--per-image", action="store_true", help="a row for every picture too")
    add("--json", metavar="FILE", help="write results in CompressAI's format, and all that is compared (-: to standard output, and the tables to standard error)")
    add("--report", metavar="DIR", help="write a page with plots, tables and pictures; implies --real")
    add("--show", nargs="+", metavar="PICTURE", help="pictures for the page (default: six spread over all)")
    add("--save", metavar="DIR", help="write the reconstructions as PNG")
    add("--rate-model", metavar="FILE.png", help="instead, measure bits at 21 indexes against the R-λ model, and draw them")
    cli.add_device_argument(parser, published=True)
    cli.accept_published(parser, "--clip_max_norm")
    args = parser.parse_args(argv)
    region = args.region or args.roi
    several = len(args.checkpoint or ()) > 1
    others = (args.index, args.real, args.per_image, args.save, args.report, args.compare, args.anchors is not None, region)
    if args.rate_model and (any(others) or several):
        parser.error("--rate-model goes with -d, --json and one --checkpoint: it has its own rates, and compares nothing")
    check_map_arguments(parser, args)
    if args.nearest and (args.report or args.rate_model):
        parser.error("--nearest: the page and the R-λ study are of files as they are usually made")
    if args.show and not args.report:
        parser.error("--show names pictures for the page of --report")
    if args.rate_model and not args.rate_model.lower().endswith(".png"):
        parser.error(f"--rate-model writes a PNG, and {args.rate_model} has another ending")
    if args.rate_model and "WORLD_SIZE" in os.environ:
        parser.error("--rate-model runs in one process: leave out torchrun")
    if args.save and several:
        parser.error("--save takes the reconstructions of one --checkpoint")
    args.measure = bool(args.data or args.checkpoint or args.anchors is not None or not args.compare)
    if not args.measure and (args.index or region or args.save or args.per_image or args.real or args.nearest):
        parser.error("--compare alone measures nothing: name pictures with -d")
    args.real |= args.anchors is not None or args.report is not None or bool(region)
    args.index = list(dict.fromkeys(args.index or ())) or None
    args.anchors = list(ANCHORS) if args.anchors == [] else args.anchors or []
    args.checkpoint = args.checkpoint or [str(BUNDLED)]
    return args


def measure(
    model: "Codec", file: str, paths: list[Path], args: argparse.Namespace, context: "DistContext",
    map_of: Callable[[int, int], "QualityMap | None"],
) -> tuple[dict, int]:
    """The weights of a file as a codec in CompressAI's format, and how many pictures failed. Prints their table.

    map_of: the map of a picture of a height and width.
    """
    from models import VariableRate
    from utils.evaluation.evaluate import evaluate, measure_all
    from utils.evaluation.provenance import origin
    from utils.images import save_image

    variable = isinstance(model, VariableRate)
    indexes = (args.index or [float(i) for i in range(len(LADDER))]) if variable else [None]

    def work(name: str, image: "Tensor", index: float | None) -> Result:
        request = EncodeRequest(index, quality_map=map_of(*image.shape[1:]), nearest=args.nearest)
        result, decoded = evaluate(model, name, image, request=request, real=args.real)
        if args.save:
            save_image(Path(args.save) / f"{file_stem(name, index)}.png", decoded)
        return result

    table = results_table(bool(args.region or args.roi))
    alone = context.world_size == 1  # then a row is printed as soon as it is there
    if context.is_main:
        if len(args.checkpoint) > 1:
            print(f"{checkpoint_name(file)}:")
        print(table.header)
    results, failed = measure_all(
        paths, indexes, context, device=model.medians.device, work=work, title="evaluating",
        tell=(lambda result: tqdm.write(table.row(result.image, [result]))) if args.per_image and alone else None,
    )
    if not results:
        raise cli.UserError("none of the pictures could be measured")
    groups = [[result for result in results if result.index == index] for index in indexes]
    if context.is_main:
        if args.per_image:
            for result in () if alone else results:
                print(table.row(result.image, [result]))
            print(table.rule)
        for group in filter(None, groups):
            print(table.row(f"mean of {len(group)}", group))
        if variable and not args.index and (loss := mean(result.loss for result in results)) is not None:
            print(f"mean R-D loss, λ · D + bpp over pictures and the six rates: {loss:.4f}")
        small = {result.image for result in results if result.ms_ssim is None}
        if 0 < len(small) < len({result.image for result in results}):
            print_note("MS-SSIM", f"{len(small)} of the pictures are too small for it: its means leave them out, and it has no curve")
    kind = ("real files" if args.real else "code lengths") + (", nearest symbols" if args.nearest else "")
    codec = to_json(groups, checkpoint_name(file), description=kind, results=results)
    network = {"model": type(model).__name__, "arguments": model.arguments}
    return codec | network | {"metric": model.metric, "checkpoint": origin(file, model)}, failed


def run(args: argparse.Namespace, argv: list[str] | None, write_json: Callable[[dict], None]) -> int:
    """Measure and compare what `parse` made of argv; returns the exit status."""
    from models import VariableRate
    from utils.checkpoint import load_model
    from utils.distributed import DistContext
    from utils.evaluation import anchors, comparison, rate_study, report
    from utils.evaluation.provenance import provenance

    context = DistContext.from_environment(args.device, sharing=True)
    # What may be wrong is found before hours of measuring.
    check_output_file(args.rate_model)
    for folder in (args.report, args.save):
        check_output_folder(folder)
    paths = find_images_or_samples(args.data) if args.measure else []
    shown = report.named(find_images(args.show), paths) if args.show else report.spread(paths)
    if args.save:
        check_stems(paths)
    earlier = [(file, comparison.read_codecs(file)) for file in args.compare]
    known = anchors.available(args.anchors)
    files = args.checkpoint if args.measure else []
    models = [load_model(file, context.device, variable_rate=bool(args.rate_model)) for file in files]
    for file, model in zip(files, models, strict=True):
        variable = isinstance(model, VariableRate)
        if args.index and not variable:
            raise cli.UserError(f"{file}: a fixed-rate model has no rate index; leave out -l")
        if (args.region or args.roi) and not variable:
            raise cli.UserError(f"{file}: a fixed-rate model knows no regions; leave out --mask and --roi")
        if context.is_main:
            print_weights(file)
        model.prepare()
    if args.rate_model:
        return rate_study.run(models[0], paths, Path(args.rate_model), write_json=write_json)
    map_of = functools.cache(functools.partial(map_of_arguments, args))  # a mask is read once a size
    codecs = []
    failed = 0
    for file, model in zip(files, models, strict=True):
        codec, broken = measure(model, file, paths, args=args, context=context, map_of=map_of)
        codecs.append(codec)
        failed = max(failed, broken)
        if context.is_main and args.json and (len(files) > 1 or known):  # what follows may be interrupted
            write_json(comparison.together(codecs, []) | {"made": provenance(argv, context)})
    measured = {row["image"] for codec in codecs for row in codec["images"]}
    names = {path: name for path, name in short_names(paths).items() if name in measured or not codecs}
    others, broken = anchors.measure_all(known, names, context)
    failed = max(failed, broken)
    codecs = comparison.join_fixed_rates(codecs) + others
    context.close()
    if not context.is_main:
        return 0
    whole = comparison.together(codecs, earlier) | {"made": provenance(argv, context)}
    if len(whole["summary"]["codecs"]) > 1:
        print(comparison.table(whole["summary"]))
    write_json(whole)
    if args.report:
        model = models[0] if "checkpoint" in whole and models else None  # several of one rate each make one curve
        viewers = report.make_viewers(model, whole, paths, shown=shown, codecs=known, map_of=map_of) if model else []
        studies = rate_study.study_all(model, shown) if isinstance(model, VariableRate) else []
        if studies:
            whole["rate_model"] = rate_study.summary(studies)
        print(report.write_report(Path(args.report), whole, viewers=viewers, studies=studies))
        write_json(whole)
    return 1 if failed else 0


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    with json_output(args.json) as write_json:
        return run(args, argv, write_json)


if __name__ == "__main__":
    cli.run(main)
