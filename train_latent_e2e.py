"""The latent toy experiment: are latents of two rates related by a map in the latent domain? (TCSVT 2025)

    python train_latent_e2e.py -d photos/train --high 0.05.pth.tar --low 0.0067.pth.tar --map channel -e 300 --save_path runs/channel
    python train_latent_e2e.py -d photos/train --high 0.05.pth.tar --low 0.0067.pth.tar --map contextual -e 300 --save_path runs/contextual

Two frozen TCMs, the low-rate one best fine-tuned from the high-rate one; a gain for every channel, or one that
also sees the latent, learns to turn the latent of the one into that of the other, and back. Each validation
reports both errors as −10·log10 MSE, and that without a map, and bpp and PSNR of the high-rate codec with the
map around its entropy model. The weights can be measured with eval_vbr.py, as those of any codec here.
"""

import argparse
import math
from typing import TYPE_CHECKING

from utils import cli
from utils.cli.training_arguments import add_run_arguments, check_run_arguments

if TYPE_CHECKING:
    from utils.training.latent_objective import LatentMapObjective
    from utils.training.schedule import Settings

MILESTONES = (1 / 6, 1 / 3, 2 / 3)  # epochs 50, 100 and 200 of 300


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = cli.make_parser(__doc__)
    codecs = parser.add_argument_group("codecs")
    add = codecs.add_argument
    add("--high", required=True, metavar="FILE", help="TCM of the high rate (λ = 0.05)")
    add("--low", required=True, metavar="FILE", help="TCM of the low rate, fine-tuned from the high one")
    add("--map", choices=("channel", "contextual"), default="channel", help="a gain for every channel, or one that sees the latent too")
    add("--lmd", dest="lmbda", type=float, help=argparse.SUPPRESS)  # its name in published scripts
    add("--lambda", dest="lmbda", type=float, metavar="λ", help="λ of the low rate, for the R-D loss that is reported (default: as its training record tells, else 0.0025)")
    add_run_arguments(parser, save_path="runs/latent_e2e")
    cli.accept_published(parser, "--N", "--type")
    parser.set_defaults(learning_rate=1e-4, schedule="step", milestones=MILESTONES)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    check_run_arguments(args)
    if args.lmbda is not None and not 0 < args.lmbda < math.inf:
        raise cli.UserError("--lambda is a λ, a positive number")
    if args.transform_factor != 1 or args.balance or args.last_share:
        raise cli.UserError("--transform-lr-factor, --balance and --last-part are for the codec's weights and rates; only the map learns here")
    from utils.cli.training_run import train
    from utils.training.latent_objective import make_objective

    def make(args: argparse.Namespace, settings: "Settings", **_) -> tuple["LatentMapObjective", list]:
        return make_objective(args.high, args.low, args.map == "contextual", lmbda=args.lmbda, settings=settings), []

    return train(args, make, result="high-rate codec with the map, for eval_vbr.py")


if __name__ == "__main__":
    cli.run(main)
