"""Train a variable-rate TCM: from photographs alone, or by the paper's stages (TCSVT 2025).

    python train_vbr.py -d photos/train --stage entropy --max-minutes 10 -lr 2e-3 --save_path runs/entropy
    python train_vbr.py -d photos/train --checkpoint runs/entropy/model.pth.tar --transform-lr-factor 0.2 --max-minutes 60
    python train_vbr.py -d photos/train --stage base --lmd 0.05 --start random -e 100       # a TCM at one λ
    python train_vbr.py -d photos/train --stage static --checkpoint base.pth.tar --teachers six -e 20
    python train_vbr.py -d photos/train --stage joint --checkpoint static.pth.tar -e 100    # all λ, all weights
    python train_vbr.py ... --save_path runs/mine --resume                                  # after an interruption
    torchrun --nproc-per-node 8 train_vbr.py ...                                            # on eight GPUs

Starts from a transform codec in closed form (utils/klt_start.py), from random weights, from a TCM (the LAEs at
identity), or from a TCM_VBR. The learning rate ends with the budget, so choose the budget first. Watch with
`tensorboard --logdir runs`.
"""

import argparse
import math
import re
from pathlib import Path

from models.tcm import PRESETS, TCM, TCM_VBR
from utils import cli
from utils.checkpoint import build_model, read_checkpoint
from utils.distributed import Team
from utils.klt_start import klt_start, sample_patches
from utils.ladder import LADDERS
from utils.objectives import EntropyStage, FixedRate, Objective, Static
from utils.patches import Photographs
from utils.run_arguments import add_run_arguments, check_run_arguments, train


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=cli.Formatter
    )
    stage = parser.add_argument_group("stage")
    add = stage.add_argument
    add("--stage", choices=("base", "entropy", "static", "joint"), default="joint", help="a plain TCM at one λ; the entropy model alone (of a TCM, with --lmd); the LAEs alone, towards six teachers; everything at all rates")
    add("--type", choices=sorted(LADDERS), default="mse", help="distortion: 255²·MSE, or 1 − MS-SSIM with a λ ladder of its own")
    add("--lmd", type=float, metavar="λ", help="λ of --stage base (default: the largest of the ladder, 0.05 or 64), or of a TCM in --stage entropy")
    add("--keep-latents", type=int, default=4096, metavar="K", help="patches of --stage entropy, of all processes together: their latents are computed once and kept in memory")
    add("--teachers", metavar="DIR", help="folder of six TCM checkpoints for --stage static; the λ of each is in its training record or in its name")
    add("--checkpoint", metavar="FILE", help="weights to start from: a TCM_VBR, or a TCM as its base")
    add("--start", choices=("klt", "random"), help="first weights, when there is no checkpoint: a Karhunen-Loève transform codec fitted to the photographs in seconds (default), or random ones, the published way")
    add("--preset", choices=sorted(PRESETS), default="small", help="architecture, when no checkpoint gives one")
    add("--N", type=int, metavar="N", help="width of the transforms, in place of the preset's")
    add_run_arguments(parser, save_path="runs/train_vbr")
    return parser.parse_args(argv)


def check(args: argparse.Namespace) -> None:
    check_run_arguments(args)
    if args.checkpoint and args.N:
        raise cli.UserError("--N belongs to a new model; with --checkpoint the sizes are the checkpoint's")
    if args.start and args.checkpoint:
        raise cli.UserError("--start is for a new model; --checkpoint brings its own weights")
    if args.lmd is not None and (args.stage not in ("base", "entropy") or not 0 < args.lmd < math.inf):
        raise cli.UserError("--lmd is the λ, a positive number, of --stage base or entropy; the others train all rates")
    if args.keep_latents < 1:
        raise cli.UserError("--keep-latents must be at least 1")
    if (args.stage == "static") != bool(args.teachers):
        raise cli.UserError("--stage static and --teachers belong together")
    if args.lmd is None and args.stage == "base":
        args.lmd = LADDERS[args.type][-1]


def make_model(args: argparse.Namespace, state: dict | None) -> tuple[TCM, list[dict]]:
    """The model to train (shaped like that of the run to resume, where there is its state), and the training records
    of the weights it starts from."""
    cls = TCM if args.lmd else TCM_VBR
    if state:
        if state["model"] != cls.__name__:
            wanted = f"--stage {args.stage}"
            if args.stage == "entropy":
                wanted += " with --lmd" if args.lmd else " without --lmd"
            raise cli.UserError(f"{args.save_path}: holds a run of a {state['model']}; {wanted} is of a {cls.__name__}")
        model, history = cls(**state["arguments"]), []
    elif args.checkpoint is None:
        arguments = PRESETS[args.preset] | ({"N": args.N} if args.N else {})
        try:
            model, history = cls(**arguments), []
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


def read_teachers(folder: str, ladder: tuple[float, ...], student: TCM) -> list[TCM]:
    """The TCM of every λ of the ladder, from checkpoints whose record or name tells their λ.

    Raises:
        UserError: one is missing, or there twice, or has another latent than the student.
    """
    if not Path(folder).is_dir():
        raise cli.UserError(f"{folder}: no such folder")
    found: dict[float, tuple[Path, TCM]] = {}
    paths = sorted(path for path in Path(folder).rglob("*") if path.name.endswith((".pth", ".pt", ".tar")))
    for path in (p for p in paths if p.name != "last.pth.tar"):
        checkpoint = read_checkpoint(path)
        record = (checkpoint.get("training") or [{}])[-1]
        names = {float(number) for part in path.parts[-2:] for number in re.findall(r"\d+(?:\.\d+)?", part)}
        told = {record["lmd"]} if "lmd" in record else names & set(ladder)
        if len(told) != 1 or not told <= set(ladder):
            raise cli.UserError(f"{path}: neither its training record nor its name tells which λ of {ladder} it is for")
        lmbda = told.pop()
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


def make_objective(args: argparse.Namespace, team: Team, state: dict | None) -> tuple[Objective, list[dict]]:
    model, history = make_model(args, state)
    rates = FixedRate(model, args.lmd, args.type) if args.lmd else Objective(model, args.type)
    if args.stage == "entropy":
        return EntropyStage(rates, args.keep_latents, args.batch_size * team.size), history
    if args.stage == "static":
        return Static(model, read_teachers(args.teachers, LADDERS[args.type], model), args.type), history
    return rates, history


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    check(args)
    team = Team.join(args.device)

    def start(model: TCM, photographs: Photographs) -> dict:
        return klt_start(model, sample_patches(photographs), args.lmd)

    closed_form = not args.checkpoint and args.start != "random"
    trainer = train(
        args, team, lambda state: make_objective(args, team, state), start=start if closed_form else None
    )
    if team.first and (weights := trainer.folder / "model.pth.tar").exists():
        print(f"weights for use: {weights}")


if __name__ == "__main__":
    cli.run(main)
