"""The models and the objectives of the stages of train_vbr.py."""

import argparse
import re
from pathlib import Path

from models import Codec, VariableRate
from models.lambdas import LADDERS
from models.registry import fixed_rate, from_preset, is_backbone, model_class, variable_rate
from utils.checkpoint import build_model, new_of, read_checkpoint, trained_lambda
from utils.distributed import DistContext
from utils.errors import UserError
from utils.messages import print_note, print_weights
from utils.training.objectives import (
    ContextObjective,
    DecoderObjective,
    EntropyObjective,
    FixedRateObjective,
    LAEObjective,
    Objective,
    StaticObjective,
)
from utils.training.schedule import Settings

OF_LATENTS = {each.stage: each for each in (EntropyObjective, ContextObjective)}  # stages whose latents are kept
OF_FROZEN_ANALYSIS = (*OF_LATENTS, DecoderObjective.stage)


def make_model(args: argparse.Namespace, state: dict | None, quiet: bool = False) -> tuple[Codec, list[dict]]:
    """The model to train, and the training records of its weights. With the state of a run, a model of that shape."""
    of_kind = fixed_rate if args.lmbda else variable_rate
    history = []
    if state:
        cls = model_class(state["model"])
        if not is_backbone(cls):
            raise UserError(f"{args.save_path}: holds a run of a {cls.__name__}, of train_latent_e2e.py")
        if cls is not of_kind(cls):
            wanted = f"--stage {args.stage}"
            if args.stage in OF_FROZEN_ANALYSIS:
                wanted += " with --lambda" if args.lmbda else " without --lambda"
            other = of_kind(cls).__name__
            raise UserError(f"{args.save_path}: holds a run of a {cls.__name__}; {wanted} is of a {other}")
        model = new_of(cls, state["arguments"], args.save_path)
        if args.stage == "context" and not model.order.context_model:
            raise UserError(f"{args.save_path}: holds a run of another stage, of a network without a context model")
        asked = new_model(args) if args.preset or args.N else model
        if type(asked) is not cls or asked.arguments != model.arguments:
            raise UserError(f"{args.save_path}: holds a run of another network than --preset and --N ask for")
    elif args.checkpoint is None:
        model = new_model(args)
    else:
        checkpoint = read_checkpoint(args.checkpoint)
        start = build_model(checkpoint, args.checkpoint)
        kind = type(start)
        if not is_backbone(kind):
            raise UserError(f"{args.checkpoint}: holds a {kind.__name__}; training does not start from a map")
        if args.stage == "decoder" and not (args.lmbda or issubclass(kind, VariableRate)):
            told = "a fixed-rate codec: give its λ with --lambda, as this stage does not train the LAE after analysis"
            raise UserError(f"{args.checkpoint}: {told}")
        weights = start.state_dict()
        if args.lmbda and issubclass(kind, VariableRate):
            tell_lost_scale(args, quiet)
            weights = {name: value for name, value in weights.items() if not name.startswith("modnet_")}
        arguments = start.arguments
        if args.stage == "context":
            if "context_model" not in arguments:
                raise UserError(f"{args.checkpoint}: a {kind.__name__} can have no context model")
            arguments = arguments | {"context_model": 1}
        try:
            model = of_kind(kind)(**arguments)
        except ValueError as error:
            raise UserError(f"{args.checkpoint}: {error}") from None
        history = checkpoint.get("training", [])
        new = {name: value for name, value in model.state_dict().items() if name.startswith("context_model.")}
        model.load_state_dict(new | weights)
        if "metric" in checkpoint and start.metric != args.type and not quiet:
            print_note(args.checkpoint, f"trained for {start.metric}, and trained on for {args.type} (--type)")
    model.metric = args.type
    return model, history


def tell_lost_scale(args: argparse.Namespace, quiet: bool) -> None:
    """Without its LAEs a variable-rate codec is scaled for no rate. UserError where g_a and g_s do not learn."""
    if args.stage in OF_FROZEN_ANALYSIS:
        told = "a variable-rate codec has no scale of its own for one λ, and this stage learns none"
        raise UserError(f"{args.checkpoint}: {told}: leave out --lambda, or begin with --stage base")
    if not quiet:
        told = "its LAEs stay behind, and with them its scale for every rate: g_a and g_s have to learn another"
        print_note(args.checkpoint, told)


def new_model(args: argparse.Namespace) -> Codec:
    """A model of --preset and --N, with random weights. UserError where they do not fit together."""
    preset = args.preset or ("full" if args.N else "small")
    try:
        return from_preset(preset, variable=not args.lmbda, **({"N": args.N} if args.N else {}))
    except (ValueError, TypeError) as error:
        raise UserError(f"--preset {preset}: {error}") from None


def read_teachers(folder: str, ladder: tuple[float, ...], student: Codec) -> list[Codec]:
    """The fixed-rate codec of every λ of the ladder, from checkpoints whose training record or name has their λ.

    Raises:
        UserError: one is missing, exists twice, or has another latent than the student.
    """
    if not Path(folder).is_dir():
        raise UserError(f"{folder}: no such folder")
    found: dict[float, tuple[Path, Codec]] = {}
    for path in sorted(Path(folder).rglob("*")):
        if not path.name.endswith((".pth", ".pt", ".tar", ".safetensors")) or path.name == "last.pth.tar":
            continue
        checkpoint = read_checkpoint(path)
        recorded = trained_lambda(checkpoint)
        names = {float(number) for part in path.parts[-2:] for number in re.findall(r"\d+(?:\.\d+)?", part)}
        lambdas = {recorded} if recorded is not None else names & set(ladder)
        if len(lambdas) != 1 or not lambdas <= set(ladder):
            raise UserError(f"{path}: neither its training record nor its name has a λ of {ladder}")
        lmbda = lambdas.pop()
        if lmbda in found:
            raise UserError(f"{path}: a second teacher for λ = {lmbda:g}, beside {found[lmbda][0]}")
        teacher = build_model(checkpoint, path)
        if "metric" not in checkpoint:  # published weights do not say
            teacher.metric = student.metric
        if isinstance(teacher, VariableRate) or teacher.metric != student.metric:
            kind = f"a {type(teacher).__name__} for {teacher.metric}"
            raise UserError(f"{path}: {kind}; teachers are fixed-rate codecs for {student.metric}")
        if teacher.M != student.M:
            raise UserError(f"{path}: a latent of {teacher.M} channels cannot teach one of {student.M}")
        found[lmbda] = path, teacher
    if missing := [f"{lmbda:g}" for lmbda in ladder if lmbda not in found]:
        raise UserError(f"{folder}: no teacher for λ = {', '.join(missing)}")
    return [found[lmbda][1] for lmbda in ladder]


def make_objective(
    args: argparse.Namespace, settings: Settings, context: DistContext, state: dict | None
) -> tuple[Objective, list[dict]]:
    """The objective of the stage, and the training records of its model's weights."""
    if args.checkpoint and not state and context.is_main:
        print_weights(args.checkpoint)
    model, history = make_model(args, state, quiet=not context.is_main)
    if args.teachers:
        return StaticObjective(model, read_teachers(args.teachers, LADDERS[args.type], model), settings), history
    if args.stage == "lae":
        return LAEObjective(model, settings), history
    if args.stage in OF_LATENTS:
        return OF_LATENTS[args.stage](model, args.keep_latents, settings=settings, lmbda=args.lmbda), history
    cls = {each.stage: each for each in (Objective, FixedRateObjective, DecoderObjective)}[args.stage]
    return cls(model, settings, args.lmbda), history
