"""Train a variable-rate TCM jointly over all rates (SPEC: joint training; TCSVT 2025).

    python train_vbr.py -d photos/train --val photos/val --preset small --max-minutes 30
    python train_vbr.py -d photos/train --val photos/val --checkpoint vbr_models/tcm_vbr_small.pth.tar -lr 1e-4
    python train_vbr.py ... --save_path runs/mine --resume          # go on after an interruption

Starts from random weights, from a TCM (the LAEs at identity), or from a TCM_VBR. The learning rate
reaches zero at the end of the budget, so choose the budget first. Watch with `tensorboard --logdir runs`.
"""

import argparse
from pathlib import Path

import torch

from models.tcm import PRESETS, STRIDE, TCM_VBR
from utils import cli
from utils.checkpoint import build_model, read_checkpoint
from utils.crops import Crops, cache_images
from utils.images import find_images, to_float
from utils.training import Settings, Trainer, compile_networks


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("-d", "--dataset", nargs="+", required=True, metavar="DIR", help="folders of training photographs, searched recursively")
    add("--val", nargs="+", metavar="DIR", help="photographs to validate on (default: every 20th training photograph)")
    add("--val-size", type=int, default=256, metavar="N", help="centre crop of the validation photographs; a multiple of 128")
    add("--preset", choices=sorted(PRESETS), default="small", help="architecture, when no checkpoint gives one")
    add("--N", type=int, metavar="N", help="width of the transforms, in place of the preset's")
    add("--checkpoint", metavar="FILE", help="weights to start from: a TCM_VBR, or a TCM as its base")
    add("--save_path", default="runs/train_vbr", metavar="DIR", help="folder of the run")
    add("--resume", action="store_true", help="go on with the run in --save_path, exactly")
    add("--max-minutes", type=float, default=0, metavar="T", help="budget in minutes of training steps (validation comes on top); 0 is none")
    add("--max-steps", type=int, default=0, metavar="S", help="budget in steps; 0 is none")
    add("-e", "--epochs", type=int, default=0, metavar="E", help="budget in passes (as many patches as photographs); 0 is none")
    add("-bs", "--batch-size", type=int, default=8, metavar="B", help="patches a step")
    add("--patch-size", type=int, default=256, metavar="N", help="side of a patch, a multiple of 128")
    add("-lr", "--learning-rate", type=float, default=Settings.learning_rate, metavar="LR", help="peak learning rate of Adam")
    add("--aux-learning-rate", type=float, default=Settings.aux_learning_rate, metavar="LR", help="learning rate of the bottleneck's quantiles")
    add("--warmup", type=int, default=Settings.warmup, metavar="S", help="steps of linear warm-up")
    add("--clip_max_norm", type=float, default=Settings.clip_max_norm, metavar="G", help="gradient norm to clip at")
    add("--ema", type=float, default=Settings.ema, metavar="D", help="decay of the averaged weights, which are what is saved for use")
    add("--validate-minutes", type=float, default=Settings.validate_minutes, metavar="T", help="minutes of training between validations")
    add("--amp", action="store_true", help="bfloat16 autocast, entropy models in float32")
    add("--compile", action="store_true", help="torch.compile the networks")
    add("--seed", type=int, default=Settings.seed, help="of weights, crops, rates and noise")
    add("--device", default="auto", choices=("auto", "cpu", "cuda"), help="where to train")
    return parser.parse_args(argv)


def check(args: argparse.Namespace) -> None:
    if min(args.max_minutes, args.max_steps, args.epochs) < 0 or args.batch_size < 1:
        raise cli.UserError("budgets must not be negative, and --batch-size must be at least 1")
    if args.checkpoint and args.N:
        raise cli.UserError("--N belongs to a new model; with --checkpoint the sizes are the checkpoint's")
    if not (args.max_minutes or args.max_steps or args.epochs):
        raise cli.UserError("no budget: give --max-minutes, --max-steps or -e (the learning rate ends with it)")
    for flag in ("patch_size", "val_size"):
        value = getattr(args, flag)
        if value <= 0 or value % STRIDE:
            raise cli.UserError(f"--{flag.replace('_', '-')} must be a multiple of {STRIDE}, not {value}")
    last = Path(args.save_path) / "last.pth.tar"
    if args.resume and not last.is_file():
        raise cli.UserError(f"{last}: nothing to resume")
    if not args.resume and last.exists():
        raise cli.UserError(f"{last}: a run is already there; --resume it or choose another --save_path")


def make_model(args: argparse.Namespace) -> tuple[TCM_VBR, list[dict]]:
    """The model to train, and the training records of the weights it starts from."""
    if args.resume:
        return TCM_VBR(**read_checkpoint(Path(args.save_path) / "last.pth.tar")["arguments"]), []
    if args.checkpoint is None:
        arguments = PRESETS[args.preset] | ({"N": args.N} if args.N else {})
        try:
            return TCM_VBR(**arguments), []
        except ValueError as error:
            raise cli.UserError(str(error)) from None
    checkpoint = read_checkpoint(args.checkpoint)
    start = build_model(checkpoint, args.checkpoint)
    model = TCM_VBR(**start.arguments)
    model.load_state_dict(start.state_dict())
    return model, checkpoint.get("training", [])


def centre_crop(x: torch.Tensor, size: int) -> torch.Tensor:
    """The middle of `[1, 3, H, W]`: at most size × size, sides multiples of 128."""
    height, width = (min(size, side // STRIDE * STRIDE) for side in x.shape[-2:])
    top, left = (x.shape[-2] - height) // 2, (x.shape[-1] - width) // 2
    return x[..., top : top + height, left : left + width]


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    check(args)
    torch.manual_seed(args.seed)
    device = cli.pick_device(args.device)
    torch.backends.cudnn.benchmark = True

    model, history = make_model(args)
    model.to(device, memory_format=torch.channels_last)
    paths = find_images(args.dataset)
    held_out = find_images(args.val) if args.val else paths[::20]
    held_out_files = {path.resolve() for path in held_out}
    images = cache_images([p for p in paths if p.resolve() not in held_out_files], args.patch_size, device)
    validation = [centre_crop(to_float(image), args.val_size) for image in cache_images(held_out, STRIDE, device)]

    steps = [s for s in (args.max_steps, args.epochs * -(-len(images) // args.batch_size)) if s]
    settings = Settings(
        max_minutes=args.max_minutes,
        max_steps=min(steps, default=0),
        learning_rate=args.learning_rate,
        aux_learning_rate=args.aux_learning_rate,
        warmup=args.warmup,
        clip_max_norm=args.clip_max_norm,
        ema=args.ema,
        validate_minutes=args.validate_minutes,
        amp=args.amp,
        seed=args.seed,
    )
    crops = Crops(images, args.patch_size, args.batch_size, args.seed)
    trainer = Trainer(model, crops, validation, Path(args.save_path), settings, history)
    if args.resume:
        trainer.resume()
    if args.compile:
        compile_networks(model)
    trainer.run()
    print(f"weights for use: {trainer.folder / 'model.pth.tar'}")


if __name__ == "__main__":
    cli.run(main)
