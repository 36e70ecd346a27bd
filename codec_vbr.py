"""Pictures to TVBR files and back (docs/bitstream.md).

    python codec_vbr.py encode photo.png photo.tvbr -l 2.5
    python codec_vbr.py encode photo.png photo.tvbr --max-bytes 20000       # or --target-bytes, --target-bpp
    python codec_vbr.py encode photo.png photo.tvbr --target-bpp 0.2 -t 50  # the best picture of that rate (DLM)
    python codec_vbr.py decode photo.tvbr back.png
    python codec_vbr.py encode photos more/extra.jpg coded          # every picture to coded/NAME.tvbr
    python codec_vbr.py decode coded pictures                       # and back, to pictures/NAME.png
    python codec_vbr.py info coded/*.tvbr                           # the headers, without weights
    cat photo.png | python codec_vbr.py encode - - | python codec_vbr.py decode - - > back.png

Several inputs, or a folder, go to a folder; a rerun leaves what is finished alone. Files are written whole
or not at all. What cannot be coded is named, the others go on, and the exit status is 1.
"""

import argparse
import io
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TextIO

import torch
from tqdm import tqdm

from models.sensitive import DecodingError
from models.tcm import TCM, TCM_VBR
from utils import cli
from utils.bitstream import MAX_PIXELS, unpack
from utils.checkpoint import BUNDLED, load_model
from utils.evaluation import decode, encode
from utils.files import atomic_write, find_files
from utils.images import ImageError, find_images, png_bytes, read_image
from utils.metrics import psnr
from utils.online import (
    Outcome,
    add_refinement_arguments,
    add_target_arguments,
    need_variable_rate,
    order_of,
    produce,
)
from utils.refine import Step

SUFFIX = ".tvbr"
HINT = (
    "this machine's arithmetic differs from the encoder's by more than the file allows for: "
    "try --device cpu, another --threads, or the version of PyTorch that encoded it"
)


def parse(argv: list[str] | None) -> argparse.Namespace:
    formatter = cli.Formatter
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], formatter_class=formatter)
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name: str, text: str, inputs: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text, formatter_class=formatter)
        sub.add_argument("inputs", nargs="+", metavar="IN", help=inputs)
        return sub

    encoder = command("encode", "Encode pictures.", "pictures, folders of them (searched recursively), or - for standard input")
    add = encoder.add_argument
    add("output", metavar="OUT", help="file, - for standard output, or folder")
    add("-l", "--lmd", type=float, metavar="INDEX", help="rate index in [0, 5]: larger is better and larger (default without a target: 2.5)")
    add_target_arguments(encoder)
    add_refinement_arguments(encoder, steps=0)
    add("--verify", action="store_true", help="decode every file again and compare it with what the encoder saw")
    _add_common(add)
    add = command("decode", "Decode files to PNG.", f"files, folders of {SUFFIX} files (searched recursively), or -").add_argument
    add("output", metavar="OUT", help="file, - for standard output, or folder")
    add("--max-megapixels", type=float, default=MAX_PIXELS / 1e6, metavar="MP", help="refuse files that claim more")
    _add_common(add)
    command("info", "Show what the headers say; needs no weights.", "files, folders, or -")
    args = parser.parse_args(argv)
    if args.command == "encode":
        args.order = order_of(encoder, args, args.lmd)
    return args


def _add_common(add: Callable) -> None:
    add("--force", action="store_true", help="overwrite")
    add("--checkpoint", default=str(BUNDLED), metavar="FILE", help="weights, the same for encoding and decoding")
    add("--device", default="auto", choices=("auto", "cpu", "cuda"), help="where to compute")
    add("--threads", type=int, default=torch.get_num_threads(), metavar="T", help="CPU threads")


def find_coded(inputs: list[str]) -> list[Path]:
    """TVBR files among files and folders, and - as it is. UserError as `find_files` raises it."""
    found: list[Path] = []
    for path in inputs:
        found += [Path(path)] if path == "-" else find_files([path], {SUFFIX}, f"{SUFFIX} files", cli.UserError)
    return found


def pairs(args: argparse.Namespace, suffix: str) -> list[tuple[Path, Path]]:
    """What is to be read, and where it goes.

    Raises:
        UserError: two would go to one file, or several to standard output.
    """
    if args.inputs == ["-"]:
        sources = [Path("-")]
    else:
        sources = find_images(args.inputs) if args.command == "encode" else find_coded(args.inputs)
    output = Path(args.output)
    single = len(args.inputs) == 1 and not Path(args.inputs[0]).is_dir()
    if single and not output.is_dir() and not args.output.endswith("/"):
        return [(sources[0], output)]
    if args.output == "-":
        raise cli.UserError("standard output takes one picture")
    if output.exists() and not output.is_dir():
        raise cli.UserError(f"{output}: is a file; several pictures need a folder")
    found: dict[Path, Path] = {}
    for source in sources:
        target = output / f"{'stdin' if str(source) == '-' else source.stem}{suffix}"
        if target in found:
            raise cli.UserError(f"{source} and {found[target]} would both become {target}")
        found[target] = source
    return [(source, target) for target, source in found.items()]


def read_bytes(path: Path) -> bytes:
    return sys.stdin.buffer.read() if str(path) == "-" else path.read_bytes()


def write_bytes(path: Path, data: bytes) -> None:
    if str(path) == "-":
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()
    else:
        with atomic_write(path) as file:
            file.write(data)


def encode_one(model: TCM, source: Path, target: Path, args: argparse.Namespace) -> str:
    """Encode a picture; returns what there is to say."""
    image = read_image(io.BytesIO(read_bytes(source)) if str(source) == "-" else source)
    steps = args.order.refinement.steps
    outcome, decoded = None, None
    if args.order.steered or steps:
        with tqdm(total=steps, desc=source.name, unit="step", leave=False, disable=None if steps else True) as bar:

            def on_step(step: Step) -> None:
                bar.update(step.number > 0)

            outcome = produce(model, str(source), image.to(args.device), args.order, on_step, judge=False)
        data, index, decoded = outcome.data, outcome.index, outcome.decoded
        seconds = outcome.control_seconds + outcome.refine_seconds
    else:
        start = time.perf_counter()
        index = args.order.index if isinstance(model, TCM_VBR) else None
        data = encode(model, image.to(args.device), index)
        seconds = time.perf_counter() - start
    height, width = image.shape[1:]
    said = f"{len(data)} bytes, {8 * len(data) / (height * width):.4f} bpp"
    said += "" if index is None else f", index {index:.4g}"
    said += f", {width}×{height}, {seconds:.2f} s"
    said += _said_of(outcome) if outcome else ""
    if args.verify:
        decoded = decode(model, data) if decoded is None else decoded
        said += f", verified: {psnr(image, decoded.cpu()):.2f} dB"
    write_bytes(target, data)
    return said


def _said_of(outcome: Outcome) -> str:
    """What there is to say of a target and a refinement."""
    said = "" if outcome.error is None else f", {100 * outcome.error:+.2f} % off the target"
    said += f", the target is {outcome.note}" if outcome.note else ""
    said += f", {outcome.probes} probe{'' if outcome.probes == 1 else 's'}" if outcome.error is not None else ""
    if outcome.chosen:
        better, plain = outcome.result, outcome.plain
        return f"{said}, refined: {better.psnr - plain.psnr:+.2f} dB, {100 * (better.bpp / plain.bpp - 1):+.2f} % bits"
    return f"{said}, refined: nothing better found" if outcome.steps else said


def decode_one(model: TCM, source: Path, target: Path, args: argparse.Namespace) -> str:
    """Decode a file; returns what there is to say."""
    data = read_bytes(source)
    start = time.perf_counter()
    picture = decode(model, data, int(args.max_megapixels * 1e6)).cpu()  # which waits for a GPU
    seconds = time.perf_counter() - start
    write_bytes(target, png_bytes(picture))
    return f"{picture.shape[2]}×{picture.shape[1]}, {seconds:.2f} s"


def info_one(source: Path) -> str:
    """A file's header in words."""
    data = read_bytes(source)
    coded = unpack(data, max_pixels=2**32)
    said = f"version {data[4]}, {coded.width}×{coded.height}, {len(data)} bytes, "
    said += f"{8 * len(data) / (coded.width * coded.height):.4f} bpp, "
    said += "fixed rate" if coded.index is None else f"index {coded.index:g}"
    said += f", z {len(coded.z)} bytes, y {len(coded.y)} bytes"
    if coded.guard:
        said += f", sensitive positions {len(coded.guard.listed)} bytes, weights {coded.fingerprint.hex()}"
    return said


def attempts(work: list[tuple[Path, Callable[[], str]]], file: TextIO) -> Iterator[bool]:
    """Do one after the other; say how it went; yield whether it did."""
    for source, do in work:
        try:
            tqdm.write(f"{source}: {do()}", file=file)
            yield True
        except (ImageError, OSError, ValueError) as error:
            cli.complain(source, f"{error} ({HINT})" if isinstance(error, DecodingError) else error)
            yield False


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    if args.command == "info":
        jobs = [(source, lambda s=source: info_one(s)) for source in find_coded(args.inputs)]
        return 0 if all(list(attempts(jobs, sys.stdout))) else 1
    one, suffix = (encode_one, SUFFIX) if args.command == "encode" else (decode_one, ".png")
    work = pairs(args, suffix)
    done = [target for _, target in work if target.exists() and str(target) != "-" and not args.force]
    if done and len(work) == 1:
        raise cli.UserError(f"{done[0]}: exists; --force overwrites it")
    if done:
        print(f"{len(done)} of {len(work)} are finished and left alone; --force makes them again", file=sys.stderr)
        work = [(source, target) for source, target in work if target not in done]
    torch.set_num_threads(args.threads)
    args.device = cli.pick_device(args.device)
    model = load_model(args.checkpoint, args.device)
    if args.command == "encode" and (args.order.steered or args.order.refinement.steps):
        need_variable_rate(model, args.checkpoint)
    model.prepare()
    jobs = [(source, lambda s=source, t=target: one(model, s, t, args)) for source, target in work]
    bar = tqdm(attempts(jobs, sys.stderr), total=len(jobs), desc=args.command, unit="picture", disable=len(jobs) < 2)
    return 0 if all(list(bar)) else 1


if __name__ == "__main__":
    cli.run(main)
