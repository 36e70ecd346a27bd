"""Pictures to TVBR files and back (docs/bitstream.md).

    python codec_vbr.py encode photo.png photo.tvbr -l 2.5
    python codec_vbr.py encode photo.png photo.tvbr --max-bytes 20000       # or --target-bytes, --target-bpp
    python codec_vbr.py encode photo.png photo.tvbr --target-bpp 0.2 -t 50  # the best picture of that rate (DLM)
    python codec_vbr.py decode photo.tvbr back.png
    python codec_vbr.py encode photos more/extra.jpg coded          # every picture to coded/NAME.tvbr
    python codec_vbr.py decode coded pictures                       # and back, to pictures/NAME.png
    python codec_vbr.py info coded/*.tvbr                           # the headers, without weights
    cat photo.png | python codec_vbr.py encode - - | python codec_vbr.py decode - - > back.png

Several inputs, or a folder, go to a folder; where photo.png is beside photo.jpg, to photo.png.tvbr and photo.jpg.tvbr. A
rerun leaves what is finished alone, and names what has another index, region or size than asked for, or was not made of its
source. Files are written whole or not at all. What cannot be coded is named, the others go on, and the exit status is 1.
"""

import argparse
import contextlib
import functools
import os
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from tqdm import tqdm

from models.coding.side_info import DecodingError
from utils import cli
from utils.cli.encoding_arguments import (
    add_map_arguments,
    add_request_arguments,
    check_map_arguments,
    make_request,
    map_of_arguments,
)
from utils.codec.bitstream import extremes, unpack
from utils.codec.tolerances import CLOSE_ENOUGH
from utils.device import out_of_memory_as_value_error, pick_device
from utils.files import (
    BUNDLED,
    MAX_PIXELS,
    atomic_write,
    check_name_of_png,
    check_output_file,
    check_output_folder,
    check_standard_output,
    find_files,
)
from utils.messages import print_error, print_note, print_weights
from utils.pictures import ImageError, find_images, is_color, png_bytes, read_pixels, sides_of, suffixes, text_of_png

if TYPE_CHECKING:
    from torch import Tensor

    from models import Codec
    from utils.codec.encode import EncodeResult

SUFFIX = ".tvbr"
DECODED = "TVBR"  # keyword of a text in the PNG that a file is decoded to: the checksum of the file
HINT = (
    "this machine's arithmetic differs from the encoder's by more than the file allows for: "
    "try --device cpu, another --threads, or the version of PyTorch that encoded it"
)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = cli.make_parser(__doc__)
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name: str, text: str, inputs: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text, formatter_class=cli.HelpFormatter)
        sub.add_argument("inputs", nargs="+", metavar="IN", help=inputs)
        return sub

    encoder = command("encode", "Encode pictures.", "pictures, folders of them (searched recursively), or - for standard input")
    add = encoder.add_argument
    add_request_arguments(encoder, several=False, steps=0)
    add_map_arguments(encoder)
    add("--background", default="white", metavar="COLOR", help="color under transparent pixels, by name or as #rrggbb")
    add("--checkpoint", type=Path, default=BUNDLED, metavar="FILE", help="weights")
    add("--verify", action="store_true", help="decode every file again and compare it with what the encoder saw")
    _add_common(encoder)
    decoder = command("decode", "Decode files to PNG.", f"files, folders of {SUFFIX} files (searched recursively), or -")
    decoder.add_argument("--checkpoint", type=Path, metavar="FILE", help=f"weights (default: of those in {BUNDLED.parent.name}/ the ones that made the file)")
    _add_common(decoder)
    command("info", "Show what the headers say; needs no weights.", "files, folders, or -")
    args = parser.parse_args(argv)
    if args.command == "encode":
        args.request = make_request(encoder, args, args.index)
        check_map_arguments(encoder, args)
    if args.command != "info" and not 0 < args.max_megapixels < 2**32:
        parser.error("--max-megapixels must be positive, and not without bounds")
    if args.command == "encode" and not is_color(args.background):
        parser.error(f"--background: {args.background} is no color that Pillow knows")
    return args


def _add_common(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("output", metavar="OUT", help="file, - for standard output, or folder")
    add("--force", action="store_true", help="overwrite")
    cli.add_device_argument(parser)
    add("--max-megapixels", type=float, default=MAX_PIXELS / 1e6, metavar="MP", help="refuse larger pictures, as they may be an attack")
    add("--threads", type=cli.positive, metavar="T", help="CPU threads (default: as many as PyTorch chooses)")


def find(args: argparse.Namespace) -> Iterator[tuple[Path, Path]]:
    """The files to read, each with its folder below the input that holds it."""
    for path in args.inputs:
        if path == "-":
            found = [Path("-")]
        elif args.command == "encode":
            found = find_images([path])
        else:
            found = find_files([path], {SUFFIX}, what=f"{SUFFIX} files", error=cli.UserError)
        yield from ((file, file.relative_to(path).parent if Path(path).is_dir() else Path()) for file in found)


def pairs(args: argparse.Namespace, suffix: str) -> tuple[list[tuple[Path, Path]], bool]:
    """The files to read, each with the file to write, and whether these go to a folder, which mirrors subfolders.

    Raises:
        UserError: two would be written to one file, or several to standard output, or a picture not as PNG.
    """
    once: dict[str, tuple[Path, Path]] = {}
    for file, folder in find(args):
        once.setdefault(os.path.abspath(file), (file, folder))
    sources = list(once.values())
    output = Path(args.output)
    to_folder = len(args.inputs) > 1 or Path(args.inputs[0]).is_dir() or output.is_dir() or args.output.endswith("/")
    if not to_folder:
        if args.command == "encode" and output.suffix.lower() in suffixes():
            raise cli.UserError(f"{output}: the name of a picture; what is written is a {SUFFIX} file")
        if args.command == "decode":
            check_name_of_png(output)
        return [(sources[0][0], output)], False
    if args.output == "-":
        raise cli.UserError("standard output takes one picture")
    if output.exists() and not output.is_dir():
        raise cli.UserError(f"{output}: is a file; several pictures need a folder")
    stems = Counter(folder / source.stem for source, folder in sources)
    found: dict[Path, Path] = {}
    for source, folder in sources:
        name = source.stem if stems[folder / source.stem] == 1 else source.name
        target = output / folder / f"{'stdin' if name == '-' else name}{suffix}"
        if target in found:
            raise cli.UserError(f"{source} and {found[target]} would both become {target}")
        found[target] = source
    return [(source, target) for target, source in found.items()], True


def check_finished(file: Path, args: argparse.Namespace, fingerprint: bytes) -> bool:
    """Whether a finished file may be what is asked for, as far as its header and size tell; prints why it is not.

    They do not tell how its latents were refined, or its symbols chosen, nor pictures of equal sides apart.

    fingerprint: of the weights that are asked for.
    """
    request = args.request
    try:
        data = file.read_bytes()
        coded = unpack(data, max_pixels=2**32)
    except (OSError, ValueError) as error:
        print_error(file, f"{error}; --force makes it again")
        return False
    try:
        quality_map = map_of_arguments(args, coded.height, coded.width)
    except (ImageError, ValueError) as error:
        print_error(file, error)
        return False
    target = request.target(coded.width * coded.height)
    indexes = coded.index, request.index
    difference = ""
    if coded.fingerprint != fingerprint:
        difference = f"was made with other weights ({coded.fingerprint.hex()}) than {args.checkpoint}"
    elif None not in indexes and not request.keep_rate and abs(coded.index - request.index) > 1e-4:
        difference = f"was made at index {coded.index:g}, not {request.index:g}"
    elif bool(coded.offsets) != bool(quality_map):
        difference = "was made with a region" if coded.offsets else "was made without a region"
    elif quality_map and coded.offsets != quality_map.cell_offsets(coded.index):
        difference = "was made with another region, or another index for it"
    elif target and not target.allows(8 * len(data)):
        difference = f"has {len(data)} bytes, more than {request.max_bytes}"
    elif target and target.distance(8 * len(data)) > 3 * CLOSE_ENOUGH:  # which may be out of reach
        print_note(file, f"has {len(data)} bytes, and {target.bits / 8:.0f} are asked for; --force makes it again")
    if difference:
        print_error(file, f"{difference}; --force makes it again")
    return not difference


def made_of_another(source: Path, target: Path, command: str) -> str:
    """Why a file that is there is not what a command makes of its source; empty where it may be."""
    if not source.is_file():
        return ""
    if command == "decode":  # where originals and files lie together, it may be the picture that was encoded
        return "" if text_of_png(target, DECODED) == checksum(source.read_bytes()) else f"was not decoded from {source}"
    with contextlib.suppress(OSError, ValueError):  # damaged files are told later
        coded = unpack(target.read_bytes(), max_pixels=2**32)
        sides = sides_of(source)
        if sides and sorted(sides) != sorted((coded.width, coded.height)):  # it may have been turned upright
            return f"has {coded.width}×{coded.height} pixels, and {source} has {sides[0]}×{sides[1]}"
    return ""


def checksum(data: bytes) -> str:
    return f"{zlib.crc32(data):08x}"


def read_bytes(path: Path) -> bytes:
    if str(path) != "-":
        return path.read_bytes()
    if sys.stdin is None:
        raise OSError("standard input is closed")
    return sys.stdin.buffer.read()


def write_bytes(path: Path, data: bytes) -> None:
    if str(path) == "-":
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()
    else:
        with atomic_write(path) as file:
            file.write(data)


def info(source: Path) -> str:
    """A file's header in words."""
    data = read_bytes(source)
    coded = unpack(data, max_pixels=2**32)
    rate = "fixed rate" if coded.index is None else f"index {coded.index:g}"
    if coded.offsets:
        lowest, highest = extremes(coded.index, coded.offsets)
        share = 1 - coded.offsets.count(0) / len(coded.offsets)
        rate += f" and a map of {lowest:g} to {highest:g} that differs from it in {share:.0%} of the picture"
    return (
        f"version {data[4]}, {coded.width}×{coded.height}{', gray' if coded.gray else ''}, {len(data)} bytes, "
        f"{8 * len(data) / (coded.width * coded.height):.4f} bpp, {rate}, z {len(coded.z)} bytes, y {len(coded.y)} bytes, "
        f"side information {len(coded.side_info.scales)} bytes, weights {coded.fingerprint.hex()}"
    )


def encode_picture(source: Path, target: Path, args: argparse.Namespace, load: Callable[[], "Codec"]) -> str:
    """Encode one picture; returns a line about its file. ImageError and ValueError where it cannot be."""
    pixels = read_pixels(  # which `image` below shares
        read_bytes(source) if str(source) == "-" else source,
        args.background,
        int(args.max_megapixels * 1e6),
        note=functools.partial(print_note, source),
    )
    model = load()
    from utils.codec.decode import decode
    from utils.codec.encode import encode
    from utils.codec.quality_map import psnr_by_region
    from utils.images import to_tensor
    from utils.metrics import psnr

    image = to_tensor(pixels).to(model.medians.device)
    steps = args.steps
    request = replace(args.request, quality_map=map_of_arguments(args, *pixels.shape[:2]))
    with tqdm(total=steps, desc=source.name, unit="step", leave=False, disable=None if steps else True) as bar:
        watch = functools.partial(watch_bands, source)
        result = encode(model, image, request, on_step=lambda step: bar.update(step.number > 0), watch=watch)
    message = describe(result, request.has_target, width=pixels.shape[1], height=pixels.shape[0])
    if args.verify:
        decoded = decode(model, result.data)
        message += f", verified: {psnr(image, decoded):.2f} dB"
        if request.quality_map:
            regions = psnr_by_region(image, decoded, request.quality_map.region)
            message += ", {:.2f} dB inside and {:.2f} dB outside the region".format(*regions)
    if request.quality_map and (indexes := request.quality_map.missed(result.index)):
        print_note(source, "the region was to have index {:.4g}; the nearest that this file can hold is {:.4g}".format(*indexes))
    write_bytes(target, result.data)
    return message


def watch_bands(source: Path, bands: Iterator["Tensor"], rows: int) -> Iterator["Tensor"]:
    """The bands of a picture under a progress bar, where they take more than a second."""
    with tqdm(desc=source.name, total=rows, unit="row", leave=False, disable=None, delay=1) as bar:
        for band in bands:
            yield band
            bar.update(band.shape[2])


def describe(result: "EncodeResult", has_target: bool, width: int, height: int) -> str:
    """A file in words: size, rate, time, target and refinement."""
    refinement = result.refinement
    seconds = result.seconds + (refinement.seconds if refinement else 0)
    parts = [f"{len(result.data)} bytes", f"{8 * len(result.data) / (height * width):.4f} bpp"]
    parts += [] if result.index is None else [f"index {result.index:.4g}"]
    parts += [f"{width}×{height}", f"{seconds:.2f} s"]
    goal = "target" if has_target else "size before refinement"
    parts += [] if result.error is None else [f"{100 * result.error:+.2f} % off the {goal}"]
    parts += [f"the target is {result.note}"] if result.note else []
    parts += [f"{result.trials} trial{'' if result.trials == 1 else 's'}"] if has_target else []
    if refinement and refinement.chosen:
        before, after = refinement.before, refinement.after
        change = 100 * (after.bpp / before.bpp - 1)
        parts += [f"refined: {refinement.gain:+.2f} dB", f"{change:+.2f} % bits"]
    elif refinement:
        parts += ["refined: nothing better found"]
    return ", ".join(parts)


def decode_file(source: Path, target: Path, args: argparse.Namespace, load: Callable[..., "Codec"]) -> str:
    """Decode one file to PNG; returns a line about its picture. ValueError where it cannot be."""
    if str(source) == "-":
        load()  # first, while what is piped in is being made
    data = read_bytes(source)
    coded = unpack(data, int(args.max_megapixels * 1e6))
    model = load(coded.fingerprint)
    from utils.codec.decode import decode
    from utils.device import timed
    from utils.images import to_pixels

    watch = functools.partial(watch_bands, source)
    pixels, seconds = timed(lambda: to_pixels(decode(model, coded, watch=watch)), model.medians.device)
    write_bytes(target, png_bytes(pixels[..., 0] if coded.gray else pixels, {DECODED: checksum(data)}))
    return f"{pixels.shape[1]}×{pixels.shape[0]}, {seconds:.2f} s"


def attempts(jobs: list[tuple[Path, Callable[[], str]]], file: TextIO) -> Iterator[bool]:
    """Do one job after the other, print what each returns, and yield whether it succeeded."""
    for source, job in jobs:
        try:
            with out_of_memory_as_value_error():
                told = job()
            tqdm.write(f"{source}: {told}", file=file)
            yield True
        except BrokenPipeError:  # nobody reads on: no fault of this file
            raise
        except (ImageError, OSError, ValueError) as error:
            print_error(source, f"{error} ({HINT})" if isinstance(error, DecodingError) else error)
            yield False


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    if args.command == "info":
        jobs = [(source, functools.partial(info, source)) for source, _ in find(args)]
        return 0 if all(list(attempts(jobs, sys.stdout))) else 1
    code, suffix = (encode_picture, SUFFIX) if args.command == "encode" else (decode_file, ".png")
    work, to_folder = pairs(args, suffix)
    for source, target in work:
        if os.path.isfile(source) and os.path.isfile(target) and os.path.samefile(source, target):
            raise cli.UserError(f"{target}: is what is read; another name is needed for what is written")
    done = {t: s for s, t in work if os.path.isfile(t) and str(t) != "-" and not args.force}  # sources by their targets
    if done and not to_folder:
        raise cli.UserError(f"{work[0][1]}: exists; --force overwrites it")
    fitting = []
    for target, source in list(done.items()):
        if told := made_of_another(source, target, args.command):
            print_error(target, f"{told}; choose another folder, or overwrite it with --force")
            fitting.append(False)
            work.remove((done.pop(target), target))
    if done:
        hidden = ", refined or not" if args.command == "encode" and args.steps else ""
        hidden += ", not verified" if args.command == "encode" and args.verify else ""
        print(f"{len(done)} of {len(work)} are finished and left alone{hidden}; --force makes them again", file=sys.stderr)
        for target, source in done.items() if args.command == "encode" else ():
            if source.is_file() and source.stat().st_mtime > target.stat().st_mtime:
                print_note(target, f"is older than {source}; --force makes it again")
        work = [(source, target) for source, target in work if target not in done]
    if work and to_folder:
        check_output_folder(args.output)
    elif work and args.output != "-":
        check_output_file(args.output)
    elif work:
        check_standard_output()

    @functools.cache
    def load_from(path: Path) -> "Codec":
        import torch

        from models import VariableRate
        from utils.checkpoint import load_model

        if args.threads:
            torch.set_num_threads(args.threads)
        variable_rate = args.command == "encode" and args.request.needs_variable_rate
        try:
            model = load_model(path, pick_device(args.device), variable_rate)
        except (OSError, ValueError) as error:  # not of the picture that is waiting for it
            raise cli.UserError(f"{path}: {error}") from None
        if args.command == "encode" and args.index is not None and not isinstance(model, VariableRate):
            raise cli.UserError(f"{path}: a fixed-rate model has no rate index; leave out -l")
        return model

    @functools.cache
    def use(path: Path) -> "Codec":
        model = load_from(path)
        print_weights(path)
        model.prepare()
        return model

    def load(fingerprint: bytes | None = None) -> "Codec":
        """The weights of --checkpoint, or those that made a file; the first ones while that is not known yet."""
        if args.checkpoint:
            return use(args.checkpoint)
        pick_device(args.device)  # first: what it refuses is no fault of the weights
        for path in (BUNDLED, *sorted(set(BUNDLED.parent.iterdir()) - {BUNDLED})):
            with contextlib.suppress(cli.UserError):  # whatever else lies there
                model = load_from(path)
                if fingerprint is None:
                    model.prepare()
                    return model
                if fingerprint == model.fingerprint:
                    return use(path)
        weights = f"weights that are not in {BUNDLED.parent.name}/" + (f" ({fingerprint.hex()})" if fingerprint else "")
        raise ValueError(f"encoded with {weights}: name them with --checkpoint")

    if done and args.command == "encode":
        fingerprint = use(args.checkpoint).fingerprint
        fitting += [check_finished(target, args, fingerprint) for target in sorted(done)]
    jobs = [(source, functools.partial(code, source, target, args=args, load=load)) for source, target in work]
    bar = tqdm(attempts(jobs, sys.stderr), total=len(jobs), desc=args.command, unit="picture", disable=None if len(jobs) > 1 else True)
    return 0 if all([*fitting, *bar]) else 1


if __name__ == "__main__":
    cli.run(main)
