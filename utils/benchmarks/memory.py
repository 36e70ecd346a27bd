"""Peak memory and seconds of coding pictures of several sizes, each by codec_vbr.py in a process of its own.

    python -m utils.benchmarks.memory                                    # default weights, 0.4 to 24 megapixels
    python -m utils.benchmarks.memory --sizes 16384x16384 --options --target-bpp 0.5

The picture is a photograph, mirrored at its sides until it fills the size. Peak memory is the largest resident set of
the process, and so on a GPU that of the host.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from utils import cli
from utils.device import RESIDENT_UNIT
from utils.errors import UserError
from utils.files import BUNDLED
from utils.pictures import find_images_or_samples, read_pixels

SIZES = ("768x512", "2048x1365", "3840x2160", "6000x4000")
PROGRAM = Path(__file__).parents[2] / "codec_vbr.py"
# ru_maxrss includes the parent's pages, hence a small launcher.
LAUNCHER = """
import resource, subprocess, sys
status = subprocess.run(sys.argv[1:]).returncode
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
sys.exit(status)
"""


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = cli.make_parser(__doc__)
    add = parser.add_argument
    add("--sizes", nargs="+", default=list(SIZES), metavar="WxH", help="widths and heights in pixels")
    add("-d", "--data", nargs="+", metavar="PICTURE", help="photograph to fill them (default: one of scikit-image's)")
    add("--checkpoint", default=str(BUNDLED), metavar="FILE", help="weights")
    add("--options", nargs=argparse.REMAINDER, default=[], metavar="OPTION", help="for the encoder; the last argument")
    args = parser.parse_args(argv)
    for size in args.sizes:
        if not re.fullmatch(r"[1-9]\d*x[1-9]\d*", size):
            parser.error(f"--sizes: {size} is not WIDTHxHEIGHT in pixels")
    return args


def run(*arguments: str) -> tuple[str, int]:
    """The last line that codec_vbr.py prints, and the peak bytes of its process. UserError where it fails."""
    command = [sys.executable, "-c", LAUNCHER, sys.executable, str(PROGRAM), *arguments]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = process.stderr.strip().splitlines() or [""]
    if process.returncode:
        raise UserError(f"codec_vbr.py {arguments[0]} ended with {process.returncode}: {lines[-1]}")
    return lines[-1], int(process.stdout) * RESIDENT_UNIT


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    photograph = read_pixels(find_images_or_samples(args.data)[0])
    print(f"{'pixels':>12} {'':<8} {'seconds':>8} {'per megapixel':>14} {'peak memory':>12}  file")
    with tempfile.TemporaryDirectory() as folder:
        picture, coded, back = (str(Path(folder) / name) for name in ("picture.png", "coded.tvbr", "back.png"))
        for size in args.sizes:
            width, height = map(int, size.split("x"))
            margins = (0, max(0, height - photograph.shape[0])), (0, max(0, width - photograph.shape[1])), (0, 0)
            pixels = np.pad(photograph, margins, mode="symmetric")[:height, :width]
            Image.fromarray(pixels).save(picture, compress_level=1)
            del pixels
            weights = "--force", "--checkpoint", args.checkpoint
            for command in (("encode", picture, coded, *weights, *args.options), ("decode", coded, back, *weights)):
                line, peak = run(*command)
                seconds = float(re.findall(r"([\d.]+) s\b", line)[0])
                each = seconds / (width * height / 1e6)
                length = os.path.getsize(coded)
                row = f"{size:>12} {command[0]:<8} {seconds:8.2f} {each:14.3f} {peak / 2**20:8.0f} MiB  {length} bytes"
                print(row, flush=True)


if __name__ == "__main__":
    cli.run(main)
