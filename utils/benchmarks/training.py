"""What a training step costs on this machine: patches per second, against its forward pass, and in memory.

    python -m utils.benchmarks.training                                   # TCM small, float32
    python -m utils.benchmarks.training --preset full --amp --compile -bs 16

Random weights and random photographs: the arithmetic does not depend on them. GMAC are counted by PyTorch's FLOP
counter, forward and backward; the rate to compare with is that of a matrix product in the precision of the convolutions
(TF32 on a GPU, without --amp).
"""

import argparse
import tempfile
from pathlib import Path

import torch

from models import STRIDE
from models.registry import PRESETS, from_preset
from utils import cli
from utils.benchmarks.common import convolutions_use_tf32, count_macs, matrix_product, median_seconds, peak_of, waits
from utils.device import choose_kernels_for_training, pick_device
from utils.distributed import DistContext
from utils.errors import UserError
from utils.training.compiled import compile_networks
from utils.training.objectives import PRECISIONS, Objective
from utils.training.patches import PatchDataset
from utils.training.schedule import Settings
from utils.training.trainer import Trainer

PHOTOGRAPHS = 16


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = cli.make_parser(__doc__)
    add = parser.add_argument
    add("--preset", choices=sorted(PRESETS), default="small", help="architecture")
    add("-bs", "--batch-size", type=cli.positive, default=8, metavar="B", help="patches per step")
    add("--patch-size", type=cli.positive, default=256, metavar="N", help="side of a patch, a multiple of 128")
    add("--amp", nargs="?", const="bf16", choices=("bf16", "fp16"), help="autocast (bf16 without a value)")
    add("--compile", action="store_true", help="torch.compile the networks")
    add("--runs", type=cli.positive, default=5, metavar="R", help="timed runs; the median is printed")
    cli.add_device_argument(parser)
    return parser.parse_args(argv)


def make_trainer(args: argparse.Namespace, folder: Path) -> Trainer:
    """A trainer of random weights on random photographs."""
    context = DistContext(pick_device(args.device))
    size = (args.patch_size, args.patch_size)
    settings = Settings(max_steps=10**6, batch_size=args.batch_size, patch_size=size, amp=args.amp, map_share=0.2)
    objective = Objective(from_preset(args.preset), settings=settings)
    objective.to(context.device, memory_format=torch.channels_last)
    sides = (3, 2 * args.patch_size, 2 * args.patch_size)
    cache = {i: torch.randint(256, sides, dtype=torch.uint8, device=context.device) for i in range(PHOTOGRAPHS)}
    dataset = PatchDataset([Path(str(i)) for i in cache], size, settings.seed, cache=cache)
    trainer = Trainer(objective, dataset, folder, context=context, validation=())
    if args.compile:
        compile_networks(objective.model)
    return trainer


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    if args.patch_size % STRIDE:
        raise UserError(f"--patch-size must be a multiple of {STRIDE}, not {args.patch_size}")
    torch.manual_seed(0)
    choose_kernels_for_training()
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(args, Path(folder))
        batch = trainer.next_batch()
        device = trainer.device
        x = batch.patches.float() / 255
        noise = trainer.noise(batch.seeds, x.shape[2:])

        def forward() -> dict[str, torch.Tensor]:
            return trainer.objective(x, batch.rate_uniform, noise)

        macs = count_macs(lambda: forward()["total"].backward())
        peak = peak_of((trainer.step, trainer.step), device)
        waiting = waits(trainer.step, device)
        tf32 = args.amp is None and convolutions_use_tf32(device)
        product = matrix_product(device, PRECISIONS.get(args.amp, torch.float32), tf32)
        product_macs = count_macs(product)
        works = (product, forward, trainer.step, trainer.next_batch)
        product_seconds, forward_seconds, step, data = median_seconds(works, device, args.runs)
    rate = product_macs / product_seconds
    precision = "TF32" if tf32 else args.amp or "float32"
    print(f"{device}, {torch.get_num_threads()} threads, torch {torch.__version__}, {precision}")
    print(f"{args.preset}, {args.batch_size} patches of {args.patch_size}×{args.patch_size}")
    print(f"{'patches per second':<36} {args.batch_size / step:9.2f}")
    print(f"{'step (s)':<36} {step:9.3f}")
    print(f"{'step against its forward pass':<36} {step / forward_seconds:9.2f}")
    print(f"{'data preparation, of the step':<36} {data / step:9.1%}")
    print(f"{'GMAC per step, forward and backward':<36} {macs / 1e9:9.0f}")
    print(f"{'of the ' + precision + ' matrix rate':<36} {macs / step / rate:9.0%}   ({rate / 1e12:.3f} TMAC/s)")
    if device.type == "cuda":
        print(f"{'waits for the GPU in a step':<36} {len(waiting):9d}   {' '.join(waiting)}")
    print(f"{'peak memory per sample (MiB)':<36} {peak / args.batch_size / 2**20:9.0f}")


if __name__ == "__main__":
    cli.run(main)
