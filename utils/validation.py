"""Validation of a run: the six rates (or the one) on held-out photographs, shared out between processes."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from models.tcm import TCM
from utils.distributed import Team
from utils.images import to_float
from utils.objectives import Objective

TAGS = {"psnr": "PSNR"}


@torch.no_grad()
def validate(
    objective: Objective,
    model: TCM,
    photographs: Sequence[Tensor],
    team: Team,
    cancelled: Callable[[], bool] | None = None,
) -> tuple[dict, dict[str, Tensor]] | None:
    """Means over photographs of what an objective measures, with real rounding.

    Args:
        photographs: uint8 `[3, H, W]`, sides multiples of 128.
        cancelled: asked before each photograph; where it says so the result is None.

    Returns:
        The means, a list over the rates each, but `loss`, the mean over the rates; `alpha_ga` and `alpha_gs`
        of a TCM_VBR. And the first photograph with its reconstructions (of the first process).
    """
    training = model.training
    model.eval()
    rows: dict[tuple[int, int], dict[str, float]] = {}
    pictures: dict[str, Tensor] = {}
    for number in range(team.rank, len(photographs), team.size):
        if cancelled and cancelled():
            return None
        x = to_float(photographs[number]).to(team.device)
        for rate, index in enumerate(objective.indices):
            rows[number, rate], x_hat = objective.measure(model, x, index)
            if number == 0:
                pictures["original"] = x[0]
                pictures["reconstruction" if index is None else f"index {index:g}"] = x_hat[0]
    model.train(training)
    # A process with nothing to measure still has to know what the others did.
    names = max(team.gather(list(next(iter(rows.values()))) if rows else []), key=len)
    table = torch.zeros(len(photographs), len(objective.indices), len(names), dtype=torch.float64)
    for place, values in rows.items():
        table[place] = torch.tensor([values[name] for name in names], dtype=torch.float64)
    means = team.sum(table.to(team.device)).mean(0).T.tolist()
    result = {name: [round(v, 5) for v in values] for name, values in zip(names, means, strict=True)}
    result["loss"] = round(sum(result["loss"]) / len(result["loss"]), 5)
    for lae in ("ga", "gs"):
        if hasattr(model, f"modnet_{lae}"):
            result[f"alpha_{lae}"] = float(getattr(model, f"modnet_{lae}").mask.alpha)
    return result, pictures


def log_validation(writer: SummaryWriter, result: dict, pictures: dict[str, Tensor], step: int) -> None:
    """A result of `validate` to TensorBoard: a curve for every rate."""
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
