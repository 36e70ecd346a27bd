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
import functools
import io
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

import numpy as np
from tqdm import tqdm

from models.guard import DecodingError
from utils import cli
from utils.bitstream import MAX_PIXELS, unpack
from utils.errors import ImageError
from utils.files import BUNDLED, atomic_write, find_files
from utils.orders import add_refinement_arguments, add_target_arguments, order_of
from utils.pixels import find_images, read_pixels

if TYPE_CHECKING:
    from utils.codec import Codec

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
    if args.command != "info" and args.threads is not None and args.threads < 1:
        parser.error("--threads must be 1 or more")
    if args.command == "decode" and not 0 < args.max_megapixels < 2**32:
        parser.error("--max-megapixels must be positive, and not without bounds")
    return args


def _add_common(add: Callable) -> None:
    add("--force", action="store_true", help="overwrite")
    add("--checkpoint", default=str(BUNDLED), metavar="FILE", help="weights, the same for encoding and decoding")
    add("--device", default="auto", choices=("auto", "cpu", "cuda"), help="where to compute")
    add("--threads", type=int, metavar="T", help="CPU threads (default: as many as PyTorch chooses)")


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


def read_picture(path: Path) -> np.ndarray:
    """A picture, uint8 `[H, W, 3]`. ImageError where it is none."""
    return read_pixels(io.BytesIO(read_bytes(path)) if str(path) == "-" else path)


def read_coded(path: Path, max_pixels: int) -> bytes:
    """A file. FileError where its header or checksum is wrong: found out before weights are loaded."""
    data = read_bytes(path)
    unpack(data, max_pixels)
    return data


def info_one(source: Path) -> str:
    """A file's header in words."""
    data = read_bytes(source)
    coded = unpack(data, max_pixels=2**32)
    said = f"version {data[4]}, {coded.width}×{coded.height}, {len(data)} bytes, "
    said += f"{8 * len(data) / (coded.width * coded.height):.4f} bpp, "
    said += "fixed rate" if coded.index is None else f"index {coded.index:g}"
    said += f", z {len(coded.z)} bytes, y {len(coded.y)} bytes"
    if coded.guard:
        said += f", table rows {len(coded.guard.listed)} bytes, weights {coded.fingerprint.hex()}"
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


def code(source: Path, target: Path, args: argparse.Namespace, codec: Callable[[], "Codec"]) -> str:
    """Encode or decode one; returns what there is to say."""
    if str(source) == "-":
        codec()  # first, while what is piped in is being made
    if args.command == "encode":
        picture = read_picture(source)
        data, said = codec().encode(source.name, picture, args.order, args.verify)
    else:
        most = int(args.max_megapixels * 1e6)
        coded = read_coded(source, most)
        data, said = codec().decode(coded, most)
    write_bytes(target, data)
    return said


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    if args.command == "info":
        jobs = [(source, lambda s=source: info_one(s)) for source in find_coded(args.inputs)]
        return 0 if all(list(attempts(jobs, sys.stdout))) else 1
    work = pairs(args, SUFFIX if args.command == "encode" else ".png")
    done = [target for _, target in work if target.exists() and str(target) != "-" and not args.force]
    if done and len(work) == 1:
        raise cli.UserError(f"{done[0]}: exists; --force overwrites it")
    if done:
        print(f"{len(done)} of {len(work)} are finished and left alone; --force makes them again", file=sys.stderr)
        work = [(source, target) for source, target in work if target not in done]

    @functools.cache
    def codec() -> "Codec":
        from utils.codec import Codec  # PyTorch takes seconds to import: help, info and bad input do without

        try:
            return Codec(args.checkpoint, args.device, args.threads)
        except (OSError, ValueError) as error:  # not of the picture that is waiting for it
            raise cli.UserError(f"{args.checkpoint}: {error}") from None

    jobs = [(source, lambda s=source, t=target: code(s, t, args, codec)) for source, target in work]
    bar = tqdm(attempts(jobs, sys.stderr), total=len(jobs), desc=args.command, unit="picture", disable=len(jobs) < 2)
    return 0 if all(list(bar)) else 1


if __name__ == "__main__":
    cli.run(main)
