"""Validation of a run: all rates on held-out photographs, which the processes share."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from models import Codec, VariableRate
from utils.distributed import DistContext
from utils.images import to_float
from utils.training.objectives import Objective


@torch.no_grad()
def validate(
    objective: Objective, model: Codec, photographs: Sequence[Tensor], context: DistContext,
    canceled: Callable[[], bool] = lambda: False,
) -> tuple[dict, dict[str, Tensor]] | None:
    """Means over photographs of what an objective measures of a model, which is set to evaluation.

    Args:
        photographs: uint8 `[3, H, W]`, sides multiples of 128.
        canceled: called before each photograph; the result is None once it returns True.

    Returns:
        means: metric → value per rate; `loss` is one mean, and `alpha_ga` and `alpha_gs` are of a variable-rate codec.
        pictures: the first photograph and its reconstructions, in the main process.
    """
    model.eval()
    rows: dict[tuple[int, int], dict[str, float]] = {}  # by photograph and rate
    pictures: dict[str, Tensor] = {}
    numbers = range(context.rank, len(photographs), context.world_size)
    hidden = None if context.is_main else True
    for number in tqdm(numbers, desc="validating", unit="picture", leave=False, disable=hidden):
        if canceled():
            return None
        x = to_float(photographs[number]).to(context.device)
        for rate, index in enumerate(objective.indexes):
            rows[number, rate], x_hat = objective.measure(model, x, index)
            if number == 0:
                pictures["original"] = x[0]
                pictures["reconstruction" if index is None else f"index {index:g}"] = x_hat[0]
    rows = {place: values for part in context.gather(rows) for place, values in part.items()}
    rates = range(len(objective.indexes))
    table = [[list(rows[number, rate].values()) for rate in rates] for number in range(len(photographs))]
    means = torch.tensor(table, dtype=torch.float64).mean(0).T.tolist()
    result = {name: [round(v, 5) for v in values] for name, values in zip(rows[0, 0], means, strict=True)}
    result["loss"] = round(sum(result["loss"]) / len(result["loss"]), 5)
    if isinstance(model, VariableRate):
        result |= {"alpha_ga": float(model.modnet_ga.mask.alpha), "alpha_gs": float(model.modnet_gs.mask.alpha)}
    return result, pictures


def log_validation(writer: SummaryWriter, result: dict, pictures: dict[str, Tensor], step: int) -> None:
    """Write a result of `validate` to TensorBoard: a curve per rate."""
    for name, found in result.items():
        values = found if isinstance(found, list) else [found]
        for index, value in enumerate(values):
            tag = f"validation/{'PSNR' if name == 'psnr' else name}"
            writer.add_scalar(f"{tag} {index}" if len(values) > 1 else tag, value, step)
    for name, picture in pictures.items():
        writer.add_image(f"validation/{name}", picture, step)
    writer.flush()
