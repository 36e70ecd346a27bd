"""Measure rate and distortion of a checkpoint on photographs.

    python eval_vbr.py                                   # bundled weights, scikit-image's photographs, six rates
    python eval_vbr.py -d kodak --real                   # from real files: encode, decode, count the bytes
    python eval_vbr.py -d kodak -l 0 2.5 5 --checkpoint vbr_models/tcm_vbr.pth.tar --json rd.json --save out

Prints a table of means (and of pictures with --per-image). Unreadable pictures are named, left out,
and make the exit status 1.
"""

import argparse
import json
import math
import sys
from collections import Counter
from pathlib import Path

import torch
from tqdm import tqdm

from models.tcm import TCM, TCM_VBR
from utils import cli
from utils.checkpoint import BUNDLED, load_model
from utils.evaluation import Result, evaluate, mean
from utils.files import atomic_write
from utils.images import ImageError, find_images, read_images, save_image
from utils.lambdas import LADDER, MAX_INDEX

# Photographs in every scikit-image wheel; nothing is downloaded.
SAMPLES = ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg")


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("-d", "--data", nargs="+", metavar="DIR", help="folders (searched recursively) or pictures (default: scikit-image's photographs)")
    add("-l", "--lmd", nargs="+", type=float, metavar="INDEX", help="rate indices in [0, 5], fractions allowed (default: all six)")
    add("--checkpoint", default=str(BUNDLED), metavar="FILE", help="weights")
    add("--real", action="store_true", help="encode, decode and count the bytes of the files, instead of estimating")
    add("--per-image", action="store_true", help="a row for every picture too")
    add("--json", metavar="FILE", help="write results in CompressAI's format")
    add("--save", metavar="DIR", help="write the reconstructions as PNG")
    add("--device", default="auto", choices=("auto", "cpu", "cuda"), help="where to compute")
    add("--cuda", action="store_true", help="accepted for published command lines: a GPU is used where there is one")
    args = parser.parse_args(argv)
    for index in args.lmd or ():
        if not 0 <= index <= MAX_INDEX:
            parser.error(f"-l: index must lie in [0, {MAX_INDEX:g}], not {index:g}")
    return args


def sample_images() -> list[Path]:
    """scikit-image's photographs, as installed."""
    try:
        import skimage
    except ImportError:
        raise cli.UserError("no -d given, and scikit-image, whose photographs are the default, is missing") from None
    folder = Path(skimage.__file__).parent / "data"
    return find_images(folder / name for name in SAMPLES)


HEAD = f"{'image':<30} {'index':>5} {'bpp':>8} {'PSNR dB':>8} {'MS-SSIM dB':>10} {'encode s':>9} {'decode s':>9}"


def row(name: str, results: list[Result]) -> str:
    """One line of the table, at most 100 characters: the means of some results."""

    def cell(field: str, width: int, digits: int) -> str:
        value = mean(results, field)
        return f"{'–' if value is None else f'{value:.{digits}f}':>{width}}"

    name = name if len(name) <= 30 else "…" + name[-29:]
    cells = [cell("bpp", 8, 4), cell("psnr", 8, 2), cell("ms_ssim_db", 10, 2)]
    cells += [cell("encode_seconds", 9, 2), cell("decode_seconds", 9, 2)]
    return " ".join([f"{name:<30}", cell("index", 5, 2), *cells])


def measure(
    model: TCM, paths: list[Path], indices: list[float | None], args: argparse.Namespace, device: torch.device
) -> tuple[list[Result], int]:
    """Every picture at every index; returns the results and how many pictures failed."""
    results, failed = [], set()
    names = _short_names(paths)
    if args.real:
        model.prepare()
    bar = tqdm(total=len(paths) * len(indices), desc="evaluating", unit="image", disable=None)
    for path, image in read_images(paths):
        if isinstance(image, ImageError):
            tqdm.write(f"error: {image}", file=sys.stderr)
            failed.add(path)
            bar.update(len(indices))
            continue
        for index in indices:
            try:
                result, decoded = evaluate(model, names[path], image.to(device), index, args.real)
            except ValueError as error:  # sides or latents that the format cannot hold
                tqdm.write(f"error: {path}: {error}", file=sys.stderr)
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


def _short_names(paths: list[Path]) -> dict[Path, str]:
    """File names; whole paths where two files share one."""
    counts = Counter(path.name for path in paths)
    return {path: path.name if counts[path.name] == 1 else path.as_posix() for path in paths}


def report(results: list[Result], indices: list[float | None], args: argparse.Namespace) -> dict:
    """CompressAI's results format, with the index, the loss, and a row an image under `images`."""
    groups = [[result for result in results if result.index == index] for index in indices]
    fields = {
        "bpp": "bpp",
        "psnr-rgb": "psnr",
        "ms-ssim-rgb": "ms_ssim",
        "encoding_time": "encode_seconds",
        "decoding_time": "decode_seconds",
        "index": "index",
        "loss": "loss",
    }
    means = {name: [_finite(mean(group, field)) for group in groups] for name, field in fields.items()}
    return {
        "name": Path(args.checkpoint).name.split(".")[0],
        "description": f"{'real files' if args.real else 'estimated from likelihoods'}, means over pictures",
        "results": {name: values for name, values in means.items() if any(v is not None for v in values)},
        "images": [{k: _finite(v) for k, v in result.as_dict().items()} for result in results],
    }


def _finite(value):
    """JSON has no infinity, which is the PSNR of a perfect copy."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    device = cli.pick_device(args.device)
    paths = find_images(args.data) if args.data else sample_images()
    model = load_model(args.checkpoint, device)
    variable = isinstance(model, TCM_VBR)
    if args.lmd and not variable:
        raise cli.UserError(f"{args.checkpoint}: a fixed-rate TCM has no rate index; leave out -l")
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
    if args.json:
        with atomic_write(args.json) as file:
            file.write(json.dumps(report(results, indices, args), indent=1).encode())
    return 1 if failed else 0


if __name__ == "__main__":
    cli.run(main)
