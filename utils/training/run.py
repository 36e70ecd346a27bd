"""A training run from its arguments: photographs, objective, first weights, trainer."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from models import STRIDE, TCM
from utils import cli
from utils.images import center_crop
from utils.pictures import find_images
from utils.training.arguments import MAX_VALIDATION, make_settings
from utils.training.distributed import DistContext
from utils.training.objectives import Objective
from utils.training.patches import PatchDataset, decoded_gigabytes, read_all
from utils.training.schedule import Settings
from utils.training.trainer import Trainer, compile_networks, read_run

MS_SSIM_SIDE = 256  # the first multiple of 128 that holds the five scales of MS-SSIM


def train(
    args: argparse.Namespace,
    context: DistContext,
    make_objective: Callable[[dict | None], tuple[Objective, list[dict]]],
    milestones: tuple[float, ...] = Settings.milestones,
    start: Callable[[TCM, PatchDataset], dict] | None = None,
) -> Trainer:
    """Read the photographs, make the objective, and train it.

    Args:
        make_objective: called with the state of the run to resume, or None; returns the objective and the training
            records of its weights.
        start: writes the first weights of a new run's model, from the photographs; returns a training record.
    """
    folder = Path(args.save_path)
    folder.mkdir(parents=True, exist_ok=True)  # an error here comes before any work
    torch.manual_seed(args.seed)
    torch.backends.cudnn.benchmark = True
    size, quiet = (args.patch_size[0], args.patch_size[-1]), not context.is_main
    paths, held_out = split(args)
    state = read_run(folder) if args.resume else None
    objective, history = make_objective(state)
    if objective.metric == "ms-ssim" and min(*size, args.val_size) < MS_SSIM_SIDE:
        raise cli.UserError(
            f"MS-SSIM has five scales: it needs a --patch-size and a --val-size of at least {MS_SSIM_SIDE}"
        )

    gigabytes, cache = decoded_gigabytes(paths), None
    if gigabytes <= args.cache_gb:
        cache = read_all(paths, size, context.device, quiet=quiet)
    elif context.is_main:
        size_text = f"{len(paths)} photographs take some {gigabytes:.1f} GB"
        print(f"{size_text}, more than --cache-gb: workers read them as needed")
    if start and not state:
        history = [*history, start(objective.model, PatchDataset(paths, size, args.seed, cache=cache))]
    objective.to(context.device, memory_format=torch.channels_last)
    dataset = PatchDataset(paths, size, args.seed, repeat=objective.repeat, cache=cache)
    smallest = STRIDE if objective.metric == "mse" else MS_SSIM_SIDE
    found = read_all(held_out, (smallest, smallest), torch.device("cpu"), "validate on", quiet=quiet)
    validation = [center_crop(image, args.val_size) for image in found.values() if isinstance(image, Tensor)]

    on_one_cpu = context.world_size == 1 and context.device.type == "cpu"
    if on_one_cpu and not state and (cores := torch.get_num_threads()) > 1:
        print(
            f"note: on a CPU one process per core is faster: start with torchrun --nproc-per-node {cores} "
            f"and -bs {max(1, args.batch_size // cores)}",
            file=sys.stderr,
        )
    settings = make_settings(args, len(paths), context.world_size, milestones)
    trainer = Trainer(objective, dataset, args.num_workers, validation, folder, settings, context, history)
    if state:
        trainer.resume(state)
        del state  # as large as the run's weights and optimizers
    if args.compile:
        compile_networks(objective.model)
    trainer.run()
    context.close()
    return trainer


def split(args: argparse.Namespace) -> tuple[list[Path], list[Path]]:
    """Photographs to train on, and photographs to validate on; none is in both."""
    paths = find_images(args.dataset)
    held_out = find_images(args.val) if args.val else paths[:: max(20, -(-len(paths) // MAX_VALIDATION))]
    apart = {path.resolve() for path in held_out}
    paths = [path for path in paths if path.resolve() not in apart]
    if not paths:
        raise cli.UserError("no photograph is left to train on beside those to validate on")
    return paths, held_out
