"""A training run from its arguments: photographs, objective, first weights, trainer."""

import argparse
import hashlib
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from models import STRIDE, Codec
from utils.cli.training_arguments import CACHE_GB, CACHE_SHARE, MAX_VALIDATION, make_settings
from utils.device import choose_kernels_for_training, local_processes
from utils.distributed import DistContext
from utils.errors import UserError
from utils.images import center_crop
from utils.messages import print_note
from utils.pictures import ImageError, find_images, part_of_data_set
from utils.training.compiled import compile_networks
from utils.training.objectives import Objective
from utils.training.patches import PatchDataset, check_shared_memory, decoded_gigabytes, read_all, usable
from utils.training.schedule import Progress, Settings, learning_rate
from utils.training.trainer import Trainer, read_run

LOW_PEAK = 0.8  # share of --learning-rate; that a run reaches less is told
MS_SSIM_SIDE = 256  # the first multiple of 128 that holds the five scales of MS-SSIM


def train(
    args: argparse.Namespace,
    make_objective: Callable[[argparse.Namespace, Settings, DistContext, dict | None], tuple[Objective, list[dict]]],
    start: Callable[[Codec, PatchDataset], dict] | None = None,
    result: str = "weights for use",
) -> int:
    """Read the photographs, make the objective, train it, and print the path of the weights.

    Returns the exit status: that of the signal which ended the run before its budget; else, and under torchrun, 0.

    Args:
        args: as `check_run_arguments` left them.
        make_objective: called with args, settings, the context and the state of the run to resume, or None; returns the
            objective and the training records of its weights.
        start: writes the first weights of a new run's model, from the photographs; returns a training record.
        result: what the weights are, in words.
    """
    context = DistContext.from_environment(args.device)
    if args.amp == "bf16" and context.device.type == "cuda" and not torch.cuda.is_bf16_supported(False):
        raise UserError(f"--amp bf16: {torch.cuda.get_device_name(context.device)} has no bfloat16; try --amp fp16")
    folder = Path(args.save_path)
    torch.manual_seed(args.seed)
    choose_kernels_for_training()
    size = args.patch_size
    quiet = not context.is_main
    state = read_run(folder) if args.resume else None
    if state:
        take_over(args, state, context.world_size)
    settings = make_settings(args, context.world_size)
    objective, history = make_objective(args, settings, context=context, state=state)
    sides = [*size, args.val_size, *(args.last_patch_size if args.last_share else ())]
    if objective.metric == "ms-ssim" and min(sides) < MS_SSIM_SIDE:
        needed = f"a --patch-size and a --val-size of at least {MS_SSIM_SIDE}"
        raise UserError(f"MS-SSIM has five scales: it needs {needed}")

    smallest = STRIDE if objective.metric == "mse" else MS_SSIM_SIDE
    paths, held_out = split(args, smallest)
    settings.max_patches = args.epochs * len(paths)
    if context.is_main:
        tell_short_budget(settings)
    gigabytes = decoded_gigabytes(paths)
    cache = None
    copies = local_processes() if context.device.type == "cpu" else 1  # each process has its own
    if args.cache_gb is None:
        args.cache_gb = CACHE_GB
        if context.device.type == "cuda":
            args.cache_gb = CACHE_SHARE * torch.cuda.get_device_properties(context.device).total_memory / 1e9
    if copies * gigabytes <= args.cache_gb:
        cache = read_all(paths, size, context.device, quiet=quiet)
    elif context.is_main:
        memory = f"{gigabytes:.2g} GB{f' in each of {copies} processes' if copies > 1 else ''}, more than --cache-gb"
        print(f"{len(paths)} photographs take some {memory}: workers read them as needed")
    if cache is None:
        check_shared_memory(local_processes() * args.num_workers, args.batch_size, size)
    if args.last_share:
        check_last_part(paths, cache or {}, args)
    if start and not state and context.is_main:  # whose weights all processes get
        history = [*history, start(objective.model, PatchDataset(paths, size, args.seed, cache=cache))]
    objective.to(context.device, memory_format=torch.channels_last)
    dataset = PatchDataset(
        paths, size, args.seed, objective.repeat, cache=cache, synthetic_share=settings.synthetic_share
    )
    found = read_all(held_out, (smallest, smallest), torch.device("cpu"), purpose="validate on", quiet=quiet)
    found = [usable(path, (smallest, smallest), image) for path, image in zip(held_out, found.values(), strict=True)]
    validation = [center_crop(image, args.val_size) for image in found if isinstance(image, Tensor)]
    del found  # whole photographs
    if context.is_main and (small := sum(min(image.shape[1:]) < args.val_size for image in validation)):
        text = f"{small} of {len(validation)} photographs to validate on are smaller, and are cropped to what they have"
        print_note(f"--val-size {args.val_size}", text)

    settings.trained_on = describe(paths)
    settings.validated_on = f"{describe(held_out)} at {args.val_size}"
    trainer = Trainer(
        objective, dataset, folder, context=context,
        validation=validation, workers=args.num_workers, history=history,
    )
    if state:
        trainer.resume(state)
        del state  # as large as the run's weights and optimizers
    if args.compile:
        compile_networks(objective.model)
        trainer.compiled = True
    trainer.run()
    context.close()
    if context.is_main and (weights := folder / "model.pth.tar").exists():
        older = "" if trainer.finished else " (of the last validation, so older than what --resume goes on from)"
        print(f"{result}: {weights}{older}")
    # torchrun takes another status than 0 for a fault.
    return 128 + trainer.signal if trainer.signal and not trainer.finished and "WORLD_SIZE" not in os.environ else 0


def tell_short_budget(settings: Settings) -> None:
    """Say so where the learning rate never comes near its peak. A budget in minutes is of unknown steps."""
    budgets = [settings.max_steps, -(-settings.max_patches // settings.batch_size)]
    steps = min((budget for budget in budgets if budget), default=math.inf)
    if settings.warmup > 1 and steps < 10 * settings.warmup:  # beyond, the peak is reached
        highest = max(learning_rate(Progress(step, step * settings.batch_size), settings) for step in range(steps))
        if highest < LOW_PEAK * settings.learning_rate:
            text = f"too long for a budget of {steps} steps, in which the learning rate reaches {highest:.2g}"
            print_note(f"--warmup {settings.warmup}", text)


def take_over(args: argparse.Namespace, state: dict, world_size: int) -> None:
    """Give the arguments of a resumed run what is decided at its beginning: the share of maps, the patches of a step in
    its last part, and its checkpoint.

    Runs of earlier versions record not all of them, or the checkpoint beside their settings.

    Raises:
        UserError: another checkpoint was asked for.
    """
    settings = state["settings"]
    if getattr(args, "map_share", 0.0) is None:
        args.map_share = settings.get("map_share", 0.0)
    if args.last_batch_size is None:
        # Per process, as --batch-size is, and as a GPU's memory holds.
        processes = state["training"][-1].get("processes", world_size)
        args.last_batch_size = max(1, settings.get("last_batch_size", args.batch_size * processes) // processes)
    if hasattr(args, "checkpoint"):
        asked = args.checkpoint
        began_with = settings.get("checkpoint", state.get("checkpoint", ""))
        recorded = began_with != ""
        if asked and recorded and (began_with is None or Path(asked).resolve() != Path(began_with).resolve()):
            told = f"this run began with {began_with or 'new weights'}, and --resume goes on from its own"
            raise UserError(f"--checkpoint {asked}: {told}: leave it out")
        args.checkpoint = began_with


def describe(paths: Sequence[Path]) -> str:
    """Photographs by their number, and a hash of their names and sizes."""
    files = "".join(f"{path.name} {path.lstat().st_size}\n" for path in paths)
    return f"{len(paths)} photographs ({hashlib.blake2b(files.encode(errors='replace'), digest_size=4).hexdigest()})"


def check_last_part(paths: list[Path], cache: dict, args: argparse.Namespace) -> None:
    """ImageError or UserError where the last part of a run could not begin: that would be hours later."""
    size = args.last_patch_size
    for number, path in enumerate(paths):
        found = usable(path, size, cache.get(number))
        if isinstance(found, Tensor):
            break
    else:
        raise ImageError(f"no photograph is left for the last part of the run; the last one tried: {found}")
    if not cache:
        check_shared_memory(local_processes() * args.num_workers, args.last_batch_size, size)


def split(args: argparse.Namespace, smallest: int) -> tuple[list[Path], list[Path]]:
    """Photographs to train on, and photographs to validate on; none is in both.

    Without --val one of every 20 or more is held out: the first that can be read and has sides of `smallest` or more.
    """
    paths = find_images(part_of_data_set(args.dataset, "train"))
    if args.val:
        held_out = find_images(part_of_data_set(args.val, "test"))
    else:
        step = max(20, -(-len(paths) // MAX_VALIDATION))
        groups = (paths[first : first + step] for first in range(0, len(paths), step))
        size = smallest, smallest
        firsts = (next((p for p in group if isinstance(usable(p, size), Tensor)), None) for group in groups)
        held_out = [path for path in firsts if path]
        if not held_out:
            raise UserError(f"no photograph of {smallest}×{smallest} pixels or more is left to validate on")
    apart = {path.resolve() for path in held_out}
    paths = [path for path in paths if path.resolve() not in apart]
    if not paths:
        raise UserError("no photograph is left to train on beside those to validate on")
    return paths, held_out
