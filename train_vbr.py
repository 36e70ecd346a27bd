"""Train a variable-rate codec: from photographs alone, or by the paper's stages (TCSVT 2025).

    python train_vbr.py -d photos/train --stage entropy --max-minutes 10 -lr 2e-3 --save_path runs/entropy
    python train_vbr.py -d photos/train --checkpoint runs/entropy/model.pth.tar --transform-lr-factor 0.2 --max-minutes 60
    python train_vbr.py -d photos/train --stage decoder --checkpoint runs/train_vbr/model.pth.tar -bs 4 --max-minutes 45 --save_path runs/decoder  # at the end: smaller files
    python train_vbr.py ... --save_path runs/mine --resume                                  # after an interruption
    torchrun --nproc-per-node 8 train_vbr.py ...                                            # on eight GPUs
    python train_vbr.py -d photos/train --stage base --lambda 0.05 --init random -e 100 --save_path runs/base  # a TCM at one λ
    python train_vbr.py -d photos/train --stage static --checkpoint runs/base/model.pth.tar --teachers six -e 20 --save_path runs/static
    python train_vbr.py -d photos/train --stage lae --checkpoint bmshj2018-hyperprior-3.pth.tar -lr 1e-3 --max-minutes 20  # LAEs for CompressAI's weights
    python train_vbr.py -d photos/train --stage tables --checkpoint vbr_models/tcm_vbr_published.pth.tar --save_path runs/tables  # smaller files

Starts from a transform codec in closed form (utils/training/klt_start/), from random weights, from a fixed-rate codec
(the LAEs at identity), or from a variable-rate one. The learning rate ends with the budget, so choose the budget first. Watch with
`tensorboard --logdir runs`.
"""

import argparse
import math
import os
from pathlib import Path

from models.lambdas import LADDERS
from models.registry import PRESETS
from utils import cli
from utils.cli.training_arguments import add_run_arguments, check_run_arguments
from utils.messages import print_note, print_weights

KEPT_LATENTS = 4096  # patches of 256×256: 400 MB of latents of preset small
OF_TRAINING = (
    "type", "val", "val_size", "synthetic_share", "batch_size", "cache_gb", "num_workers", "epochs", "max_steps", "max_minutes",
    "learning_rate", "balance", "aux_learning_rate", "schedule", "warmup", "clip_max_norm", "ema", "amp", "compile",
    "validate_minutes", "save_minutes",
)
MAP_SHARE = 0.2  # uniform rates lose nothing by it (docs/training.md)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = cli.make_parser(__doc__)
    add = parser.add_argument_group("stage").add_argument
    add("--stage", choices=("base", "entropy", "context", "static", "lae", "joint", "decoder", "tables"), default="joint", help="base: a fixed-rate codec at one λ; entropy: the entropy model alone (of a fixed-rate codec, with --lambda); context: of a DepthConv the context model of the first slice alone, which weights without one get; static: the LAEs alone, towards six teachers; lae: the LAEs alone, which make the codec of --checkpoint variable-rate (with --teachers it is static); joint: everything at all rates; decoder: after it, all that decodes, on symbols chosen as files choose them, with analysis as it is (of a fixed-rate codec, with --lambda); tables: no network, only the coding tables of --checkpoint, which every other stage fits at its end")
    add("--type", choices=sorted(LADDERS), default="mse", help="distortion: 255²·MSE, or 1 − MS-SSIM with a λ ladder of its own")
    add("--lmd", dest="lmbda", type=float, help=argparse.SUPPRESS)  # its name in published scripts
    add("--lambda", dest="lmbda", type=float, metavar="λ", help="λ of --stage base (default: the largest of the ladder, 0.05 or 64), or of a fixed-rate codec in --stage entropy, context or decoder")
    add("--keep-latents", type=int, metavar="K", help=f"patches of --stage entropy and context, of all processes together, whose latents are computed once and kept in memory (default: {KEPT_LATENTS})")
    add("--teachers", metavar="DIR", help="folder of six fixed-rate checkpoints for --stage static; the λ of each is in its training record or in its name")
    add("--checkpoint", metavar="FILE", help="weights to start from: a variable-rate codec, or a fixed-rate one as its base")
    add("--start", dest="init", choices=("klt", "random"), help=argparse.SUPPRESS)  # torchrun takes it for its own
    add("--init", choices=("klt", "random"), help="first weights, when there is no checkpoint: a Karhunen-Loève transform codec fitted to the photographs in seconds (default), or random ones, the published way")
    add("--preset", choices=sorted(PRESETS), help="architecture, when no checkpoint gives one (default: small, and full with --N)")
    add("--map-share", type=float, metavar="P", help=f"share of the patches of --stage joint, decoder and lae whose index differs from place to place, in blocks or smoothly, each place weighed by its λ; for --type mse, where the default is {MAP_SHARE}")
    add("--N", type=int, metavar="N", help="half the width of the transforms of a TCM, a multiple of 32, in place of the preset's; 64, 96 and 128 are the published networks")
    add_run_arguments(parser, save_path="runs/train_vbr")
    args = parser.parse_args(argv)
    if args.stage == "tables":
        idle = [f"--{name.replace('_', '-')}" for name in OF_TRAINING if getattr(args, name) != parser.get_default(name)]
        if idle:
            print_note("--stage tables", f"trains no network, without effect are {', '.join(idle)}")
    return args


def check(args: argparse.Namespace) -> None:
    check_run_arguments(args, budget=args.stage != "tables")
    if args.keep_latents is not None and args.stage not in ("entropy", "context"):
        raise cli.UserError("--keep-latents belongs to --stage entropy and context")
    if args.balance and (args.lmbda is not None or args.stage == "base"):
        raise cli.UserError("--balance weighs rates against each other; a fixed-rate codec has one")
    if not 0 <= (args.map_share or 0) <= 1:
        raise cli.UserError(f"--map-share must lie in [0, 1], not {args.map_share:g}")
    has_maps = args.stage in ("joint", "decoder", "lae") and args.type == "mse" and not (args.teachers or args.lmbda)
    if args.map_share and args.lmbda:
        raise cli.UserError("--map-share draws maps of rates; a fixed-rate codec has one")
    if args.map_share and not has_maps:
        raise cli.UserError("--map-share is for --stage joint, decoder and lae, and --type mse: the others have no error of single places to weigh")
    if args.transform_factor != 1 and args.stage in ("entropy", "context", "static", "lae", "tables"):
        raise cli.UserError(f"--transform-lr-factor: --stage {args.stage} does not train g_a and g_s")
    if args.last_share and args.stage not in ("base", "joint", "decoder"):
        raise cli.UserError(f"--last-part is for --stage base, joint and decoder, not {args.stage}")
    if args.checkpoint and args.N:
        raise cli.UserError("--N belongs to a new model; with --checkpoint the sizes are the checkpoint's")
    if args.checkpoint and args.preset:
        raise cli.UserError("--preset is of a new model; with --checkpoint the network is the checkpoint's")
    if args.init and args.checkpoint:
        raise cli.UserError("--init is for a new model; --checkpoint brings its own weights")
    if args.lmbda is not None and (args.stage not in ("base", "entropy", "context", "decoder") or not 0 < args.lmbda < math.inf):
        raise cli.UserError("--lambda is the λ, a positive number, of --stage base, entropy, context or decoder; the others train all rates")
    if args.stage == "tables" and (not args.checkpoint or args.resume):
        raise cli.UserError("--stage tables needs a --checkpoint, and has nothing to resume")
    if args.stage == "tables" and "WORLD_SIZE" in os.environ:
        raise cli.UserError("--stage tables runs in one process: leave out torchrun")
    if args.keep_latents is not None and args.keep_latents < 1:
        raise cli.UserError("--keep-latents must be at least 1")
    if args.teachers and args.stage not in ("static", "lae") or args.stage == "static" and not args.teachers:
        raise cli.UserError("--stage static and --teachers belong together")
    if args.stage == "lae" and not args.checkpoint and not args.resume:
        raise cli.UserError("--stage lae needs a --checkpoint: the codec that becomes variable-rate")
    if args.stage == "context" and not args.checkpoint and not args.resume:
        raise cli.UserError("--stage context needs a --checkpoint: the codec that gets a context model")
    if args.stage == "decoder" and not args.checkpoint and not args.resume:
        raise cli.UserError("--stage decoder needs a --checkpoint: the codec whose decoder learns")
    if args.lmbda is None and args.stage == "base":
        args.lmbda = LADDERS[args.type][-1]
    if args.keep_latents is None:
        args.keep_latents = KEPT_LATENTS
    if args.map_share is None and not args.resume:  # else it is that of the run
        args.map_share = MAP_SHARE if has_maps else 0.0


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    check(args)
    if args.stage == "tables":
        from utils.checkpoint import write_checkpoint
        from utils.training.fit_tables import refit

        print_weights(args.checkpoint)
        fitted = refit(args.checkpoint, args.dataset, args.patch_size, seed=args.seed, device=args.device)
        file = Path(args.save_path) / "model.pth.tar"
        write_checkpoint(file, fitted)
        print(f"weights with fitted tables: {file}")
        return 0
    from utils.cli.training_run import train
    from utils.cli.training_stages import make_objective
    from utils.training.klt_start import klt_start, sample_patches

    closed_form = not args.checkpoint and args.init != "random"
    start = (lambda model, dataset: klt_start(model, sample_patches(dataset), args.lmbda)) if closed_form else None
    return train(args, make_objective, start)


if __name__ == "__main__":
    cli.run(main)
