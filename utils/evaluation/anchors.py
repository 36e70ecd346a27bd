"""What common codecs make of the same pictures: JPEG, WebP and AVIF by Pillow, at a range of qualities.

    python -m utils.evaluation.anchors -d kodak --out results                   # jpeg.json, webp.json, avif.json
    python -m utils.evaluation.rd_loss results/*.json rd.json --plot rd.png     # beside rd.json of eval_vbr.py --json

Sizes are those of whole files; PSNR is that of the 8-bit pixels that decoding gives. JPEG has 4:2:0 chroma and
optimized Huffman tables, WebP method 4, AVIF speed 8.
"""

import argparse
import io
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image, features
from torch import Tensor
from tqdm import tqdm

from utils import cli
from utils.device import timed
from utils.evaluation.evaluate import for_each
from utils.evaluation.results import Result, report
from utils.files import write_json
from utils.images import to_pixels, to_tensor
from utils.metrics import psnr
from utils.pictures import find_images_or_samples, read_pixels


class Codec(NamedTuple):
    """A format of Pillow, what its `save` is given, and the qualities to measure."""

    format: str
    options: dict
    qualities: tuple[int, ...]


CODECS = {
    "jpeg": Codec("JPEG", {"optimize": True, "subsampling": "4:2:0"}, (5, 10, 15, *range(20, 81, 10), 85, 90, 95)),
    "webp": Codec("WEBP", {"method": 4}, (1, 5, 10, 20, 30, 40, 50, 60, 70, 80, 85, 90, 95)),
    "avif": Codec("AVIF", {"speed": 8}, (10, 20, 30, 40, 45, 50, 55, 60, 65, 70, 75, 80, 85, 90)),
}


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = cli.make_parser(__doc__)
    add = parser.add_argument
    add("-d", "--data", nargs="+", metavar="DIR", help="folders or pictures (default: scikit-image's photographs)")
    add("--codecs", nargs="+", choices=sorted(CODECS), default=list(CODECS), help="codecs to measure")
    add("--out", default="results", metavar="DIR", help="folder for one JSON file per codec, in CompressAI's format")
    return parser.parse_args(argv)


def measure(name: str, image: Tensor, codec: Codec, quality: int) -> Result:
    """One picture, uint8 `[3, H, W]`, by one codec at one quality, which takes the index's place in the result."""
    pixels, file = Image.fromarray(to_pixels(image)), io.BytesIO()
    _, encode_seconds = timed(lambda: pixels.save(file, codec.format, quality=quality, **codec.options), image.device)
    data = file.getvalue()
    decoded, decode_seconds = timed(lambda: read_pixels(data), image.device)
    height, width = image.shape[1:]
    return Result(
        name, width, height, float(quality), 8 * len(data) / (width * height), psnr(image, to_tensor(decoded)),
        encode_seconds=encode_seconds, decode_seconds=decode_seconds,
    )


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    paths = find_images_or_samples(args.data)
    codecs = [codec for codec in dict.fromkeys(args.codecs) if codec == "jpeg" or features.check(codec)]
    for codec in args.codecs:
        if codec not in codecs:
            cli.print_error(codec, "this Pillow cannot write it; left out")
    if not codecs:
        raise cli.UserError("this Pillow can write none of these codecs")

    def work(name: str, image: Tensor, _: None) -> dict[str, list[Result]]:
        return {c: [measure(name, image, CODECS[c], quality) for quality in CODECS[c].qualities] for c in codecs}

    jobs = for_each(paths, [None], torch.device("cpu"), work)
    bar = tqdm(jobs, total=len(paths), desc="coding", unit="image", disable=None)
    pictures = [found for _, _, found in bar if found is not None]
    if not pictures:
        raise cli.UserError("none of the pictures could be measured")
    for name in codecs:
        results = [result for picture in pictures for result in picture[name]]
        groups = [[r for r in results if r.index == quality] for quality in CODECS[name].qualities]
        path = Path(args.out) / f"{name}.json"
        write_json(path, report(groups, name.upper(), "real files by Pillow", results))
        print(path)
    return int(len(pictures) < len(paths))


if __name__ == "__main__":
    cli.run(main)
