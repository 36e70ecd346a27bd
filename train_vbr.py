"""Train a variable-rate TCM: from photographs alone, or by the paper's stages (TCSVT 2025).

    python train_vbr.py -d photos/train --stage entropy --max-minutes 10 -lr 2e-3 --save_path runs/entropy
    python train_vbr.py -d photos/train --checkpoint runs/entropy/model.pth.tar --transform-lr-factor 0.2 --max-minutes 60
    python train_vbr.py -d photos/train --stage base --lmd 0.05 --start random -e 100       # a TCM at one λ
    python train_vbr.py -d photos/train --stage static --checkpoint base.pth.tar --teachers six -e 20
    python train_vbr.py -d photos/train --stage joint --checkpoint static.pth.tar -e 100    # all λ, all weights
    python train_vbr.py ... --save_path runs/mine --resume                                  # after an interruption
    torchrun --nproc-per-node 8 train_vbr.py ...                                            # on eight GPUs

Starts from a transform codec in closed form (utils/training/klt_start.py), from random weights, from a TCM (the LAEs at
identity), or from a TCM_VBR. The learning rate ends with the budget, so choose the budget first. Watch with
`tensorboard --logdir runs`.
"""

import argparse
import dataclasses
import math
import re
from pathlib import Path
from typing import TYPE_CHECKING

from models.config import PRESETS
from models.lambdas import LADDERS
from utils import cli
from utils.training.arguments import add_run_arguments, check_run_arguments

KEPT_LATENTS = 4096  # patches of 256×256: 400 MB of latents of preset small

if TYPE_CHECKING:  # PyTorch takes seconds to import: --help does without, so the functions below import what needs it
    from models import TCM
    from utils.training.distributed import DistContext
    from utils.training.objectives import Objective
    from utils.training.patches import PatchDataset


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = cli.make_parser(__doc__)
    stage = parser.add_argument_group("stage")
    add = stage.add_argument
    add("--stage", choices=("base", "entropy", "static", "joint"), default="joint", help="base: a plain TCM at one λ; entropy: the entropy model alone (of a TCM, with --lmd); static: the LAEs alone, towards six teachers; joint: everything at all rates")
    add("--type", choices=sorted(LADDERS), default="mse", help="distortion: 255²·MSE, or 1 − MS-SSIM with a λ ladder of its own")
    add("--lmd", type=float, metavar="λ", help="λ of --stage base (default: the largest of the ladder, 0.05 or 64), or of a TCM in --stage entropy")
    add("--keep-latents", type=int, metavar="K", help=f"patches of --stage entropy, of all processes together, whose latents are computed once and kept in memory (default: {KEPT_LATENTS})")
    add("--teachers", metavar="DIR", help="folder of six TCM checkpoints for --stage static; the λ of each is in its training record or in its name")
    add("--checkpoint", metavar="FILE", help="weights to start from: a TCM_VBR, or a TCM as its base")
    add("--start", choices=("klt", "random"), help="first weights, when there is no checkpoint: a Karhunen-Loève transform codec fitted to the photographs in seconds (default), or random ones, the published way")
    add("--preset", choices=sorted(PRESETS), default="small", help="architecture, when no checkpoint gives one")
    add("--N", type=int, metavar="N", help="width of the transforms, in place of the preset's")
    add_run_arguments(parser, save_path="runs/train_vbr")
    return parser.parse_args(argv)


def check(args: argparse.Namespace) -> None:
    check_run_arguments(args)
    if args.keep_latents is not None and args.stage != "entropy":
        raise cli.UserError("--keep-latents belongs to --stage entropy")
    if args.balance and args.stage == "base":
        raise cli.UserError("--balance weighs rates against each other; --stage base has one")
    if args.transform_factor != 1 and args.stage in ("entropy", "static"):
        raise cli.UserError(f"--transform-lr-factor: --stage {args.stage} does not train g_a and g_s")
    if args.checkpoint and args.N:
        raise cli.UserError("--N belongs to a new model; with --checkpoint the sizes are the checkpoint's")
    if args.start and args.checkpoint:
        raise cli.UserError("--start is for a new model; --checkpoint brings its own weights")
    if args.lmd is not None and (args.stage not in ("base", "entropy") or not 0 < args.lmd < math.inf):
        raise cli.UserError("--lmd is the λ, a positive number, of --stage base or entropy; the others train all rates")
    if args.keep_latents is not None and args.keep_latents < 1:
        raise cli.UserError("--keep-latents must be at least 1")
    if (args.stage == "static") != bool(args.teachers):
        raise cli.UserError("--stage static and --teachers belong together")
    if args.lmd is None and args.stage == "base":
        args.lmd = LADDERS[args.type][-1]


def make_model(args: argparse.Namespace, state: dict | None) -> tuple["TCM", list[dict]]:
    """The model to train, and the training records of its weights. With the state of a run, a model of that shape."""
    from models import TCM, TCM_VBR
    from utils.checkpoint import build_model, read_checkpoint

    cls = TCM if args.lmd else TCM_VBR
    if state:
        if state["model"] != cls.__name__:
            wanted = f"--stage {args.stage}"
            if args.stage == "entropy":
                wanted += " with --lmd" if args.lmd else " without --lmd"
            raise cli.UserError(f"{args.save_path}: holds a run of a {state['model']}; {wanted} is of a {cls.__name__}")
        model, history = cls(**state["arguments"]), []
    elif args.checkpoint is None:
        preset = PRESETS[args.preset]
        try:
            model, history = cls(dataclasses.replace(preset, N=args.N or preset.N)), []
        except ValueError as error:
            raise cli.UserError(str(error)) from None
    else:
        checkpoint = read_checkpoint(args.checkpoint)
        start = build_model(checkpoint, args.checkpoint)
        if type(start) not in (TCM, TCM_VBR):
            raise cli.UserError(f"{args.checkpoint}: holds a {type(start).__name__}; training starts from a TCM or TCM_VBR")
        weights = start.state_dict()
        if cls is TCM:  # the LAEs of a TCM_VBR stay behind
            weights = {name: value for name, value in weights.items() if not name.startswith("modnet_")}
        model, history = cls(**start.arguments), checkpoint.get("training", [])
        model.load_state_dict(weights)
    model.metric = args.type
    return model, history


def read_teachers(folder: str, ladder: tuple[float, ...], student: "TCM") -> list["TCM"]:
    """The TCM of every λ of the ladder, from checkpoints whose training record or name has their λ.

    Raises:
        UserError: one is missing, exists twice, or has another latent than the student.
    """
    from models import TCM
    from utils.checkpoint import build_model, read_checkpoint

    if not Path(folder).is_dir():
        raise cli.UserError(f"{folder}: no such folder")
    found: dict[float, tuple[Path, TCM]] = {}
    paths = sorted(path for path in Path(folder).rglob("*") if path.name.endswith((".pth", ".pt", ".tar")))
    for path in (p for p in paths if p.name != "last.pth.tar"):
        checkpoint = read_checkpoint(path)
        record = (checkpoint.get("training") or [{}])[-1]
        names = {float(number) for part in path.parts[-2:] for number in re.findall(r"\d+(?:\.\d+)?", part)}
        lambdas = {record["lmd"]} if "lmd" in record else names & set(ladder)
        if len(lambdas) != 1 or not lambdas <= set(ladder):
            raise cli.UserError(f"{path}: neither its training record nor its name has a λ of {ladder}")
        lmbda = lambdas.pop()
        if lmbda in found:
            raise cli.UserError(f"{path}: a second teacher for λ = {lmbda:g}, beside {found[lmbda][0]}")
        teacher = build_model(checkpoint, path)
        if type(teacher) is not TCM or teacher.metric != student.metric:
            raise cli.UserError(f"{path}: a {type(teacher).__name__} for {teacher.metric}; teachers are TCMs for {student.metric}")
        if teacher.M != student.M:
            raise cli.UserError(f"{path}: a latent of {teacher.M} channels cannot teach one of {student.M}")
        found[lmbda] = path, teacher
    if missing := [f"{lmbda:g}" for lmbda in ladder if lmbda not in found]:
        raise cli.UserError(f"{folder}: no teacher for λ = {', '.join(missing)}")
    return [found[lmbda][1] for lmbda in ladder]


def make_objective(
    args: argparse.Namespace, context: "DistContext", state: dict | None
) -> tuple["Objective", list[dict]]:
    """The objective of the stage, and the training records of its model's weights."""
    from utils.training.objectives import EntropyObjective, FixedRateObjective, Objective, StaticObjective

    model, history = make_model(args, state)
    rates = FixedRateObjective(model, args.lmd, args.type) if args.lmd else Objective(model, args.type)
    if args.stage == "entropy":
        return EntropyObjective(rates, args.keep_latents or KEPT_LATENTS, args.batch_size * context.world_size), history
    if args.stage == "static":
        return StaticObjective(model, read_teachers(args.teachers, LADDERS[args.type], model), args.type), history
    return rates, history


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    check(args)
    from utils.training.distributed import DistContext
    from utils.training.klt_start import klt_start, sample_patches
    from utils.training.run import train

    context = DistContext.from_environment(args.device)

    def start(model: "TCM", dataset: "PatchDataset") -> dict:
        return klt_start(model, sample_patches(dataset), args.lmd)

    closed_form = not args.checkpoint and args.start != "random"
    if args.checkpoint and context.is_main:
        cli.print_weights(args.checkpoint)
    trainer = train(
        args, context, lambda state: make_objective(args, context, state), start=start if closed_form else None
    )
    if context.is_main and (weights := trainer.folder / "model.pth.tar").exists():
        print(f"weights for use: {weights}")


if __name__ == "__main__":
    cli.run(main)
