"""Arguments that the training scripts share."""

import argparse
import math
import os
from dataclasses import fields
from pathlib import Path

from models import STRIDE
from utils import cli
from utils.device import local_processes
from utils.errors import UserError
from utils.files import check_output_folder
from utils.training.schedule import Settings

MAX_VALIDATION = 24  # photographs, where none are named
MAX_WORKERS = 16  # processes that read photographs, where no number is given
CACHE_GB = 4  # decoded photographs that are kept, where no number is given
CACHE_SHARE = 0.2  # of a GPU's memory, likewise


def add_run_arguments(parser: argparse.ArgumentParser, save_path: str) -> None:
    """Add the arguments of a run; those of `Settings` have its names and defaults."""
    add = parser.add_argument_group("photographs").add_argument
    add("-d", "--dataset", nargs="+", required=True, metavar="DIR", help="folders of training photographs, searched recursively")
    add("--val", nargs="+", metavar="DIR", help=f"photographs to validate on (default: every 20th training photograph, at most {MAX_VALIDATION})")
    add("--val-size", type=int, default=256, metavar="N", help="center crop of the validation photographs; a multiple of 128")
    add("--patch-size", type=int, nargs="+", default=[256, 256], metavar="N", help="height and width of a patch, or its one side; multiples of 128")
    add("--synthetic-share", type=float, default=Settings.synthetic_share, metavar="P", help="share of the patches with a part that no photograph has: text, halftones, line art, noise, mosaics, stripes; so that screens and scans are coded too")
    add("-bs", "--batch-size", type=int, default=8, metavar="B", help="patches per step and process; on a GPU try 32 and more, with --amp --compile, as far as its memory goes")
    add("--cache-gb", type=float, metavar="G", help=f"decoded photographs are kept on the device when they all fit in this (on a CPU with one copy for each process of torchrun), and read again and again by workers otherwise (default: {CACHE_GB}, and on a GPU {CACHE_SHARE:.0%} of its memory)".replace("%", "%%"))
    add("-n", "--num-workers", type=int, metavar="W", help=f"processes that read photographs which are not kept (default: one for each core, at most {MAX_WORKERS}; cores are shared with the other processes of torchrun)")

    add = parser.add_argument_group("budget: the learning rate ends with whichever ends first; 0 is none").add_argument
    add("-e", "--epochs", type=int, default=0, metavar="E", help="passes over the photographs")
    add("--max-steps", type=int, default=0, metavar="S", help="steps")
    add("--max-minutes", type=float, default=0, metavar="T", help="minutes of training steps (validation comes on top)")

    add("--last-part", dest="last_share", type=float, default=Settings.last_share, metavar="P", help="share of the budget, at its end, for other patches: with a quarter of the peak learning rate, which then falls to zero, without --balance; the maps of --map-share are drawn in this part alone")
    add("--last-patch-size", type=int, nargs="+", metavar="N", help="their height and width, or one side (default: {})".format(" ".join(map(str, Settings.last_patch_size))))
    add("--last-batch-size", type=int, metavar="B", help="of them per step and process (default: as many pixels as before, but at most --batch-size patches)")

    add = parser.add_argument_group("optimization").add_argument
    add("-lr", "--learning-rate", "--lr", dest="learning_rate", type=float, default=Settings.learning_rate, metavar="LR", help="peak learning rate of Adam")
    add("--transform-lr-factor", dest="transform_factor", type=float, default=Settings.transform_factor, metavar="F", help="learning rate of g_a and g_s (of a DepthConv: of what the start in closed form writes, not of the blocks), in units of --learning-rate; weights that start in closed form want 0.1 to 0.5")
    add("--balance", type=float, default=Settings.balance, metavar="P", help="multiply each patch's loss by (λ / λ_mid)^−P: with 0.5 the high rates do not dominate the gradient; 0 is the published loss")
    add("--aux-learning-rate", type=float, default=Settings.aux_learning_rate, metavar="LR", help="learning rate of the bottleneck's quantiles")
    add("--schedule", choices=("cosine", "step"), default=Settings.schedule, help="cosine to zero, or the published steps ×0.5, ×0.1, ×0.05 at their shares of the budget")
    add("--warmup", type=cli.whole_number, default=Settings.warmup, metavar="S", help="steps of linear warm-up")
    add("--clip_max_norm", type=float, default=Settings.clip_max_norm, metavar="G", help="gradient norm to clip at; 0 is no clipping")
    add("--ema", type=float, default=Settings.ema, metavar="D", help="decay of the averaged weights, which are what is saved for use")
    add("--amp", nargs="?", const="bf16", choices=("bf16", "fp16"), help="autocast (bf16 without a value); likelihoods stay in float32")
    add("--compile", action="store_true", help="torch.compile the networks")
    add("--seed", type=cli.whole_number, default=Settings.seed, help="seed of weights, order, crops, rates and noise")

    run = parser.add_argument_group("run")
    add = run.add_argument
    add("--save_path", default=save_path, metavar="DIR", help="folder of the run")
    add("--resume", nargs="?", const=True, default=False, choices=("auto",), help="continue the run in --save_path, on a CPU bit for bit; with auto, begin it if there is none: for jobs that a batch system puts back into its queue")
    add("--validate-minutes", type=float, default=Settings.validate_minutes, metavar="T", help="minutes of training between validations")
    add("--save-minutes", type=float, default=Settings.save_minutes, metavar="T", help="minutes of training between saves of what --resume needs")
    cli.add_device_argument(run, published=True)
    # Names of published scripts.
    parser.add_argument("--batch_size", dest="batch_size", type=int, help=argparse.SUPPRESS, default=argparse.SUPPRESS)
    cli.accept_published(parser, "--save", "--test-batch-size", "--test_batch_size", "--skip_epoch", "--continue_train", "--lr_epoch", "-m", "--model")


def check_run_arguments(args: argparse.Namespace, budget: bool = True) -> None:
    """UserError naming the flag that is wrong, or that there is no budget. The patch size becomes height and width, and
    `--resume auto` whether there is a run."""
    last = Path(args.save_path) / "last.pth.tar"
    if args.resume == "auto":
        args.resume = last.is_file()
    if min(args.max_minutes, args.max_steps, args.epochs) < 0 or args.batch_size < 1:
        raise UserError("budgets must not be negative, and --batch-size must be at least 1")
    if budget and not (args.max_minutes or args.max_steps or args.epochs):
        raise UserError("no budget: give --max-minutes, --max-steps or -e (the learning rate ends with it)")
    numbers = ("learning_rate", "transform_factor", "balance", "aux_learning_rate", "clip_max_norm", "validate_minutes")
    for name in (*numbers, "max_minutes", "save_minutes"):
        if not 0 <= getattr(args, name) < math.inf:  # written so that a NaN is refused too
            flag = {"transform_factor": "transform-lr-factor", "clip_max_norm": "clip_max_norm"}.get(name, name.replace("_", "-"))
            raise UserError(f"--{flag} must be a number that is not negative")
    if not 0 <= args.ema < 1:
        raise UserError(f"--ema must lie in [0, 1), not {args.ema:g}")
    whole = [path for path in args.dataset if not os.path.isdir(os.path.join(path, "test"))]  # else DIR/train is meant
    if whole and args.val and {*map(os.path.realpath, whole)} <= {*map(os.path.realpath, args.val)}:
        raise UserError("--val names the folders of -d: no photograph would be left to train on")
    if not 0 <= args.synthetic_share <= 1:
        raise UserError(f"--synthetic-share must lie in [0, 1], not {args.synthetic_share:g}")
    if not 0 <= args.last_share < 1:
        raise UserError(f"--last-part must lie in [0, 1), not {args.last_share:g}")
    if args.last_share and args.schedule != "cosine":
        raise UserError("--last-part needs --schedule cosine")
    for name in ("last_patch_size", "last_batch_size"):
        if getattr(args, name) is not None and not args.last_share:
            raise UserError(f"--{name.replace('_', '-')} is of --last-part, which is 0")
    args.last_patch_size = args.last_patch_size or [*Settings.last_patch_size]
    for name in ("patch_size", "last_patch_size"):
        sides = getattr(args, name)
        if len(sides) > 2:
            raise UserError(f"--{name.replace('_', '-')} takes one number or two")
        setattr(args, name, (sides[0], sides[-1]))
    for name in ("patch_size", "last_patch_size", "val_size"):
        sides = getattr(args, name)
        flag = "--" + name.replace("_", "-")
        for side in sides if isinstance(sides, tuple) else [sides]:
            if side <= 0 or side % STRIDE:
                raise UserError(f"{flag} must be a multiple of {STRIDE}, not {side}")
    if args.last_batch_size is None and not args.resume:  # what fits in a GPU's memory now must fit in the last part
        pixels, last_pixels = math.prod(args.patch_size), math.prod(args.last_patch_size)
        args.last_batch_size = min(args.batch_size, max(1, args.batch_size * pixels // last_pixels))
    if (args.last_batch_size or 1) < 1:
        raise UserError("--last-batch-size must be at least 1")
    if args.num_workers is None:
        args.num_workers = default_workers()
    if args.seed < 0 or args.num_workers < 0:
        raise UserError("--seed and --num-workers must not be negative")
    check_output_folder(args.save_path)
    if args.resume and not last.is_file():
        raise UserError(f"{last}: nothing to resume")
    if not args.resume and last.exists():
        way = "--resume it or choose" if budget else "choose"
        raise UserError(f"{last}: a run is already there; {way} another --save_path")


def default_workers() -> int:
    """Readers of one process: its share of the cores that this program may use."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(MAX_WORKERS, cores // local_processes()))


def make_settings(args: argparse.Namespace, world_size: int) -> Settings:
    """The settings of a run in this many processes. How many patches --epochs are is known with the photographs."""
    known = {field.name: getattr(args, field.name) for field in fields(Settings) if hasattr(args, field.name)}
    known["batch_size"] *= world_size
    known["last_batch_size"] *= world_size
    return Settings(**known)
