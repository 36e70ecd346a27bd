"""What the codecs of today make of the same pictures: JPEG, WebP and AVIF by Pillow, at a ladder of qualities.

    python -m utils.anchors -d kodak --out results                   # results/jpeg.json, webp.json, avif.json
    python -m utils.rd_loss results/*.json rd.json --plot rd.png     # beside a checkpoint's, of eval_vbr.py --json

Sizes are those of whole files; PSNR is that of the 8-bit pixels that decoding gives. JPEG has 4:2:0 chroma and
optimised Huffman tables, WebP method 4, AVIF speed 8.
"""

import argparse
import io
from pathlib import Path

import numpy as np
from PIL import Image, features
from torch import Tensor
from tqdm import tqdm

from utils import cli
from utils.errors import ImageError
from utils.evaluation import Result, timed
from utils.files import write_json
from utils.images import read_images, to_pixels, to_tensor
from utils.metrics import psnr
from utils.report import report, short_names

CODECS = {
    "jpeg": ("JPEG", dict(optimize=True, subsampling="4:2:0"), (5, 10, 15, 20, 30, 40, 50, 60, 70, 80, 85, 90, 95)),
    "webp": ("WEBP", dict(method=4), (1, 5, 10, 20, 30, 40, 50, 60, 70, 80, 85, 90, 95)),
    "avif": ("AVIF", dict(speed=8), (10, 20, 30, 40, 45, 50, 55, 60, 65, 70, 75, 80, 85, 90)),
}


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], formatter_class=cli.Formatter)
    add = parser.add_argument
    add("-d", "--data", nargs="+", metavar="DIR", help="folders or pictures (default: scikit-image's photographs)")
    add("--codecs", nargs="+", choices=sorted(CODECS), default=list(CODECS), help="codecs to measure")
    add("--out", default="results", metavar="DIR", help="folder for one JSON file a codec, in CompressAI's format")
    return parser.parse_args(argv)


def available(codec: str) -> bool:
    """Whether the installed Pillow can write this format."""
    return codec == "jpeg" or features.check(codec)


def measure(name: str, image: Tensor, codec: str, quality: int) -> Result:
    """One picture, uint8 `[3, H, W]`, by one codec at one quality, which takes the index's place in the result."""
    kind, options, _ = CODECS[codec]
    pixels = Image.fromarray(to_pixels(image))
    file = io.BytesIO()
    _, encode_seconds = timed(lambda: pixels.save(file, kind, quality=quality, **options), image.device)
    decoded, decode_seconds = timed(lambda: Image.open(io.BytesIO(file.getvalue())).convert("RGB"), image.device)
    height, width = image.shape[1:]
    return Result(
        image=name,
        width=width,
        height=height,
        index=float(quality),
        bpp=8 * len(file.getvalue()) / (width * height),
        psnr=psnr(image, to_tensor(np.array(decoded))),
        ms_ssim=None,
        ms_ssim_db=None,
        loss=None,
        encode_seconds=encode_seconds,
        decode_seconds=decode_seconds,
    )


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    paths = cli.pictures(args.data)
    for codec in [codec for codec in args.codecs if not available(codec)]:
        cli.complain(codec, "this Pillow cannot write it; left out")
    codecs = [codec for codec in dict.fromkeys(args.codecs) if available(codec)]
    if not codecs:
        raise cli.UserError("this Pillow can write none of these codecs")
    results: dict[str, list[Result]] = {codec: [] for codec in codecs}
    names, failed = short_names(paths), False
    for path, image in tqdm(read_images(paths), total=len(paths), desc="coding", unit="image", disable=None):
        if isinstance(image, ImageError):
            cli.complain(path, image)
            failed = True
            continue
        for codec in codecs:
            results[codec] += [measure(names[path], image, codec, quality) for quality in CODECS[codec][2]]
    for codec in codecs:
        if not results[codec]:
            raise cli.UserError("none of the pictures could be measured")
        groups = [[r for r in results[codec] if r.index == quality] for quality in CODECS[codec][2]]
        path = Path(args.out) / f"{codec}.json"
        write_json(path, report(groups, results[codec], codec.upper(), "real files by Pillow"))
        print(path)
    return int(failed)


if __name__ == "__main__":
    cli.run(main)
