"""Arguments that the training scripts share, and the parts of a run that follow from them."""

import argparse
import math
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from models import STRIDE
from models.tcm import TCM
from utils import cli
from utils.distributed import Team
from utils.objectives import Objective
from utils.patches import Photographs, decoded_gigabytes, read_all
from utils.pixels import find_images
from utils.schedule import Settings
from utils.training import PRECISIONS, Trainer, compile_networks, read_run

MOST_VALIDATION = 24  # photographs, where none are named
MS_SSIM_SIDE = 256  # the first multiple of 128 that holds its five scales


def add_run_arguments(parser: argparse.ArgumentParser, save_path: str) -> None:
    data = parser.add_argument_group("photographs")
    add = data.add_argument
    add("-d", "--dataset", nargs="+", required=True, metavar="DIR", help="folders of training photographs, searched recursively")
    add("--val", nargs="+", metavar="DIR", help=f"photographs to validate on (default: every 20th training photograph, at most {MOST_VALIDATION})")
    add("--val-size", type=int, default=256, metavar="N", help="centre crop of the validation photographs; a multiple of 128")
    add("--patch-size", type=int, nargs="+", default=[256, 256], metavar="N", help="height and width of a patch, or its one side; multiples of 128")
    add("-bs", "--batch-size", type=int, default=8, metavar="B", help="patches a step and process")
    add("--cache-gb", type=float, default=4, metavar="G", help="decoded photographs are kept on the device when they all fit in this, and read again and again by workers otherwise")
    add("-n", "--num-workers", type=int, default=4, metavar="W", help="processes that read photographs which are not kept")

    budget = parser.add_argument_group("budget: the learning rate ends with whichever ends first; 0 is none")
    add = budget.add_argument
    add("-e", "--epochs", type=int, default=0, metavar="E", help="passes over the photographs")
    add("--max-steps", type=int, default=0, metavar="S", help="steps")
    add("--max-minutes", type=float, default=0, metavar="T", help="minutes of training steps (validation comes on top)")

    learning = parser.add_argument_group("optimisation")
    add = learning.add_argument
    add("-lr", "--learning-rate", type=float, default=Settings.learning_rate, metavar="LR", help="peak learning rate of Adam")
    add("--transform-lr-factor", type=float, default=Settings.transform_factor, metavar="F", help="learning rate of g_a and g_s, in units of --learning-rate; weights that start in closed form want 0.1 to 0.5")
    add("--balance", type=float, default=Settings.balance, metavar="P", help="weigh each patch's loss by (λ / λ_mid)^−P: with 0.5 the high rates do not own the gradient; 0 is the published loss")
    add("--aux-learning-rate", type=float, default=Settings.aux_learning_rate, metavar="LR", help="learning rate of the bottleneck's quantiles")
    add("--schedule", choices=("cosine", "step"), default=Settings.schedule, help="cosine to zero, or the published steps ×0.5, ×0.1, ×0.05 at their shares of the budget")
    add("--warmup", type=int, default=Settings.warmup, metavar="S", help="steps of linear warm-up")
    add("--clip_max_norm", type=float, default=Settings.clip_max_norm, metavar="G", help="gradient norm to clip at; 0 is no clipping")
    add("--ema", type=float, default=Settings.ema, metavar="D", help="decay of the averaged weights, which are what is saved for use")
    add("--amp", nargs="?", const="bf16", choices=sorted(PRECISIONS), help="autocast (bf16 where nothing is said), entropy models in float32")
    add("--compile", action="store_true", help="torch.compile the networks")
    add("--seed", type=int, default=Settings.seed, help="of weights, order, crops, rates and noise")

    run = parser.add_argument_group("run")
    add = run.add_argument
    add("--save_path", default=save_path, metavar="DIR", help="folder of the run")
    add("--resume", action="store_true", help="go on with the run in --save_path, exactly")
    add("--validate-minutes", type=float, default=Settings.validate_minutes, metavar="T", help="minutes of training between validations")
    add("--save-minutes", type=float, default=Settings.save_minutes, metavar="T", help="minutes of training between saves of what --resume needs")
    add("--device", default="auto", choices=("auto", "cpu", "cuda"), help="where to train")
    add("--cuda", action="store_true", help="accepted for published command lines: a GPU is used where there is one")


def check_run_arguments(args: argparse.Namespace) -> None:
    """UserError naming the flag that is wrong."""
    if min(args.max_minutes, args.max_steps, args.epochs) < 0 or args.batch_size < 1:
        raise cli.UserError("budgets must not be negative, and --batch-size must be at least 1")
    if not (args.max_minutes or args.max_steps or args.epochs):
        raise cli.UserError("no budget: give --max-minutes, --max-steps or -e (the learning rate ends with it)")
    numbers = ("learning_rate", "transform_lr_factor", "balance", "aux_learning_rate", "max_minutes", "clip_max_norm")
    for flag in (*numbers, "validate_minutes"):
        if not 0 <= getattr(args, flag) < math.inf:  # a NaN compares false
            raise cli.UserError(f"--{flag.replace('_', '-')} must be a number that is not negative")
    if not 0 <= args.ema < 1:
        raise cli.UserError(f"--ema must lie in [0, 1), not {args.ema:g}")
    if len(args.patch_size) > 2:
        raise cli.UserError("--patch-size takes one number or two")
    for flag, sides in (("--patch-size", args.patch_size), ("--val-size", [args.val_size])):
        for side in sides:
            if side <= 0 or side % STRIDE:
                raise cli.UserError(f"{flag} must be a multiple of {STRIDE}, not {side}")
    if args.seed < 0 or args.num_workers < 0:
        raise cli.UserError("--seed and --num-workers must not be negative")
    last = Path(args.save_path) / "last.pth.tar"
    if args.resume and not last.is_file():
        raise cli.UserError(f"{last}: nothing to resume")
    if not args.resume and last.exists():
        raise cli.UserError(f"{last}: a run is already there; --resume it or choose another --save_path")


def train(
    args: argparse.Namespace,
    team: Team,
    make_objective: Callable[[dict | None], tuple[Objective, list[dict]]],
    milestones: tuple[float, ...] = Settings.milestones,
    start: Callable[[TCM, Photographs], dict] | None = None,
) -> Trainer:
    """Read the photographs, make the objective, and train it.

    Args:
        make_objective: called with the state of the run to resume, or None; returns the objective and the training
            records of its weights.
        start: gives a new run's model its first weights, from the photographs; returns a training record.
    """
    folder = Path(args.save_path)
    folder.mkdir(parents=True, exist_ok=True)  # found out now if it cannot be
    torch.manual_seed(args.seed)
    torch.backends.cudnn.benchmark = True
    size = (args.patch_size[0], args.patch_size[-1])
    paths, held_out = split(args)
    state = read_run(folder) if args.resume else None
    objective, history = make_objective(state)
    if objective.metric == "ms-ssim" and min(*size, args.val_size) < MS_SSIM_SIDE:
        raise cli.UserError(
            f"MS-SSIM has five scales: it needs a --patch-size and a --val-size of at least {MS_SSIM_SIDE}"
        )

    needed = decoded_gigabytes(paths)
    cache = None
    if needed <= args.cache_gb:
        cache = read_all(paths, size, team.device, quiet=not team.first)
    elif team.first:
        print(f"{len(paths)} photographs take about {needed:.1f} GB: more than --cache-gb, so workers read them as needed")
    if start and not state:
        history = [*history, start(objective.model, Photographs(paths, size, args.seed, cache=cache))]
    objective.to(team.device, memory_format=torch.channels_last)
    photographs = Photographs(paths, size, args.seed, repeat=objective.repeat, cache=cache)
    smallest = STRIDE if objective.metric == "mse" else MS_SSIM_SIDE
    found = read_all(held_out, (smallest, smallest), torch.device("cpu"), "validate on", quiet=not team.first)
    validation = [centre_crop(image, args.val_size) for image in found.values() if isinstance(image, Tensor)]

    batch = args.batch_size * team.size
    settings = Settings(
        max_minutes=args.max_minutes,
        max_steps=args.max_steps,
        max_patches=args.epochs * len(paths),
        batch_size=batch,
        patch_size=size,
        learning_rate=args.learning_rate,
        transform_factor=args.transform_lr_factor,
        balance=args.balance,
        aux_learning_rate=args.aux_learning_rate,
        schedule=args.schedule,
        milestones=milestones,
        warmup=args.warmup,
        clip_max_norm=args.clip_max_norm,
        ema=args.ema,
        validate_minutes=args.validate_minutes,
        save_minutes=args.save_minutes,
        amp=args.amp,
        seed=args.seed,
    )
    if not state and team.size == 1 and team.device.type == "cpu" and (cores := torch.get_num_threads()) > 1:
        print(
            f"note: on a CPU one process for each core is faster: start with torchrun --nproc-per-node {cores} "
            f"and -bs {max(1, args.batch_size // cores)}",
            file=sys.stderr,
        )
    trainer = Trainer(objective, photographs, args.num_workers, validation, folder, settings, team, history)
    if state:
        trainer.resume(state)
        del state  # as large as the run's weights and optimisers
    if args.compile:
        compile_networks(objective.model)
    trainer.run()
    team.leave()
    return trainer


def split(args: argparse.Namespace) -> tuple[list[Path], list[Path]]:
    """Photographs to train on, and to validate on; none is in both."""
    paths = find_images(args.dataset)
    held_out = find_images(args.val) if args.val else paths[:: max(20, -(-len(paths) // MOST_VALIDATION))]
    apart = {path.resolve() for path in held_out}
    paths = [path for path in paths if path.resolve() not in apart]
    if not paths:
        raise cli.UserError("no photograph is left to train on beside those to validate on")
    return paths, held_out


def centre_crop(image: Tensor, size: int) -> Tensor:
    """The middle of uint8 `[3, H, W]`: at most size × size, sides multiples of 128."""
    height, width = (min(size, side // STRIDE * STRIDE) for side in image.shape[1:])
    top, left = (image.shape[1] - height) // 2, (image.shape[2] - width) // 2
    return image[:, top : top + height, left : left + width]
