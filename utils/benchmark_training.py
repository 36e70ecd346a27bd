"""What a training step costs on this machine: patches a second, against its forward pass, and in memory.

    python -m utils.benchmark_training                                   # bundled architecture, float32
    python -m utils.benchmark_training --preset full --amp --compile -bs 16

Random weights and random photographs: the arithmetic does not depend on them. GMAC are counted by PyTorch's FLOP
counter, forward and backward; the rate to compare with is that of a matrix product of the same precision.
"""

import argparse
import tempfile
from pathlib import Path

import torch

from models.tcm import PRESETS, TCM_VBR
from utils import cli
from utils.benchmark import MatrixProduct, Timer, macs, peak_memory
from utils.distributed import Team
from utils.objectives import Objective
from utils.patches import Photographs
from utils.schedule import Settings
from utils.training import PRECISIONS, Trainer, compile_networks


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=cli.Formatter
    )
    add = parser.add_argument
    add("--preset", choices=sorted(PRESETS), default="small", help="architecture")
    add("-bs", "--batch-size", type=int, default=8, metavar="B", help="patches a step")
    add("--patch-size", type=int, default=256, metavar="N", help="side of a patch, a multiple of 128")
    add("--amp", nargs="?", const="bf16", choices=sorted(PRECISIONS), help="autocast (bf16 where nothing is said)")
    add("--compile", action="store_true", help="torch.compile the networks")
    add("--runs", type=int, default=5, metavar="R", help="timed runs, after two to warm up; the median is printed")
    add("--device", default="auto", choices=("auto", "cpu", "cuda"), help="where to compute")
    return parser.parse_args(argv)


def make_trainer(args: argparse.Namespace, team: Team, folder: Path) -> Trainer:
    """A trainer of random weights on 16 random photographs."""
    objective = Objective(TCM_VBR(**PRESETS[args.preset]))
    objective.to(team.device, memory_format=torch.channels_last)
    sides = (2 * args.patch_size, 2 * args.patch_size)
    cache = {i: torch.randint(256, (3, *sides), dtype=torch.uint8, device=team.device) for i in range(16)}
    size = (args.patch_size, args.patch_size)
    settings = Settings(max_steps=10**6, batch_size=args.batch_size, patch_size=size, amp=args.amp)
    photographs = Photographs([Path(str(i)) for i in cache], size, settings.seed, cache=cache)
    trainer = Trainer(objective, photographs, 0, [], folder, settings, team)
    trainer.open_batches()
    if args.compile:
        compile_networks(objective.model)
    return trainer


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    if min(args.runs, args.batch_size) < 1 or args.patch_size < 128 or args.patch_size % 128:
        raise cli.UserError("--runs and --batch-size must be at least 1, and --patch-size a multiple of 128")
    torch.manual_seed(0)
    torch.backends.cudnn.benchmark = True
    team = Team(cli.pick_device(args.device))
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(args, team, Path(folder))
        batch = trainer.next_batch()
        x = batch.patches.float() / 255
        noise = trainer.noise(batch.seeds, x.shape[2:])
        count = macs(lambda: trainer.objective(x, batch.draws, noise)["total"].backward())
        product = MatrixProduct(team.device, PRECISIONS.get(args.amp, torch.float32))
        works = (product, lambda: trainer.objective(x, batch.draws, noise), trainer.step, trainer.next_batch)
        product_seconds, forward, step, data = Timer(team.device, args.runs)(*works)
    rate = product.macs / product_seconds
    precision = args.amp or "float32"
    print(f"{team.device}, {torch.get_num_threads()} threads, torch {torch.__version__}, {precision}")
    print(f"{args.preset}, {args.batch_size} patches of {args.patch_size}×{args.patch_size}")
    print(f"{'patches a second':<34} {args.batch_size / step:9.2f}")
    print(f"{'step (s)':<34} {step:9.3f}")
    print(f"{'step against its forward pass':<34} {step / forward:9.2f}")
    print(f"{'data preparation, of the step':<34} {data / step:9.1%}")
    print(f"{'GMAC a step, forward and backward':<34} {count / 1e9:9.0f}")
    print(f"{'of the ' + precision + ' matrix rate':<34} {count / step / rate:9.0%}   ({rate / 1e12:.3f} TMAC/s)")
    print(f"{'peak memory a sample (MiB)':<34} {peak_memory(team.device) / args.batch_size / 2**20:9.0f}")


if __name__ == "__main__":
    cli.run(main)
