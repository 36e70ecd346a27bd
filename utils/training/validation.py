"""Validation of a run: all rates on held-out photographs, which the processes share."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from models import TCM
from utils.images import to_float
from utils.training.distributed import DistContext
from utils.training.objectives import Objective

TAGS = {"psnr": "PSNR"}


@torch.no_grad()
def validate(
    objective: Objective,
    model: TCM,
    photographs: Sequence[Tensor],
    context: DistContext,
    canceled: Callable[[], bool] | None = None,
) -> tuple[dict, dict[str, Tensor]] | None:
    """Means over photographs of what an objective measures, with rounded latents.

    Args:
        photographs: uint8 `[3, H, W]`, sides multiples of 128.
        canceled: called before each photograph; the result is None once it returns True.

    Returns:
        Lists of means, one element per rate, but `loss` is the mean over the rates, and `alpha_ga` and `alpha_gs` are
        those of a TCM_VBR. And the first photograph with its reconstructions, in the main process.
    """
    training = model.training
    model.eval()
    rows: dict[tuple[int, int], dict[str, float]] = {}
    pictures: dict[str, Tensor] = {}
    for number in range(context.rank, len(photographs), context.world_size):
        if canceled and canceled():
            return None
        x = to_float(photographs[number]).to(context.device)
        for rate, index in enumerate(objective.indexes):
            rows[number, rate], x_hat = objective.measure(model, x, index)
            if number == 0:
                pictures["original"] = x[0]
                pictures["reconstruction" if index is None else f"index {index:g}"] = x_hat[0]
    model.train(training)
    # A process without photographs still has to know the names that the others measured.
    names = max(context.gather(list(next(iter(rows.values()))) if rows else []), key=len)
    table = torch.zeros(len(photographs), len(objective.indexes), len(names), dtype=torch.float64)
    for place, values in rows.items():
        table[place] = torch.tensor([values[name] for name in names], dtype=torch.float64)
    means = context.sum(table.to(context.device)).mean(0).T.tolist()
    result = {name: [round(v, 5) for v in values] for name, values in zip(names, means, strict=True)}
    result["loss"] = round(sum(result["loss"]) / len(result["loss"]), 5)
    for lae in ("ga", "gs"):
        if hasattr(model, f"modnet_{lae}"):
            result[f"alpha_{lae}"] = float(getattr(model, f"modnet_{lae}").mask.alpha)
    return result, pictures


def log_validation(writer: SummaryWriter, result: dict, pictures: dict[str, Tensor], step: int) -> None:
    """Write a result of `validate` to TensorBoard: a curve per rate."""
    for name, values in result.items():
        tag = f"validation/{TAGS.get(name, name)}"
        if not isinstance(values, list):
            writer.add_scalar(tag, values, step)
        elif len(values) == 1:
            writer.add_scalar(tag, values[0], step)
        else:
            for index, value in enumerate(values):
                writer.add_scalar(f"{tag} {index}", value, step)
    for name, picture in pictures.items():
        writer.add_image(f"validation/{name}", picture, step)
    writer.flush()
