"""Pictures of what no photograph has, one of each kind that training knows, to look at and to evaluate.

    python -m utils.benchmarks.synthetic made
    python eval_vbr.py -d made -l 0 2.5 5 --checkpoint vbr_models/*.pth.tar --anchors jpeg --per-image
"""

import argparse
from pathlib import Path

import numpy as np
import torch

from utils import cli
from utils.images import read_image, save_image, to_pixels
from utils.pictures import find_images_or_samples
from utils.training.synthetic import KINDS


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = cli.make_parser(__doc__)
    add = parser.add_argument
    add("out", metavar="DIR", help="folder for the pictures")
    add("-d", "--data", nargs="+", metavar="PICTURE", help="photograph to change (default: one of scikit-image's)")
    add("--seed", type=cli.whole_number, default=0, help="seed of what is drawn")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    photograph = to_pixels(read_image(find_images_or_samples(args.data)[0]))
    folder = Path(args.out)
    folder.mkdir(parents=True, exist_ok=True)
    for kind in KINDS:
        made = kind(photograph, np.random.default_rng(args.seed))
        save_image(folder / f"{kind.__name__}.png", torch.from_numpy(np.array(made)).permute(2, 0, 1))
    print(f"{len(KINDS)} pictures: {folder}")


if __name__ == "__main__":
    cli.run(main)
