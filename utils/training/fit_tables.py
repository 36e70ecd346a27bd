"""Coding tables of y from the symbols that really occur.

Training minimizes the likelihoods of Gaussians, and CompressAI tabulates the Gaussian of every level of the scale
table. But σ is an estimate: of the symbols that are coded with a level, more are zero and more lie far out than the
Gaussian of that level has. They follow a mixture of zero-mean Gaussians closely. Here its components are those of all
levels, and its weights are fitted by expectation maximization to the symbols of training patches. Only the tables
change, which every checkpoint has: networks, latents, decoder and file format stay, and files become smaller
(docs/method.md).
"""

from collections.abc import Iterable, Sequence

import torch
from compressai.entropy_models import GaussianConditional
from torch import Tensor
from tqdm import tqdm

from models import Codec, VariableRate
from models.coding.tables import rounded_gaussians
from utils.checkpoint import describe, find_state_dict, model_to_code_with, read_checkpoint
from utils.device import pick_device
from utils.errors import UserError
from utils.pictures import find_images, part_of_data_set
from utils.training.objectives import RATES
from utils.training.patches import PatchDataset

PATCHES = 32  # at 256×256 and six rates they have nine million symbols with preset small
BATCH = 8  # patches at once
PRIOR = 100.0  # symbols' worth of trust in the level's own Gaussian, which a level that never occurs keeps
SPREAD = 0.05  # first weight of the other components against that of the level itself
ITERATIONS = 200  # three times as many save nothing more


@torch.no_grad()
def fit_tables(model: Codec, patches: Iterable[Tensor], indexes: Sequence[float | None]) -> None:
    """Replace the coding tables of y by those of the mixtures that fit the symbols of patches.

    Args:
        model: in evaluation mode, with the tables of `update()`.
        patches: uint8 `[B, 3, H, W]`, sides multiples of 128.
        indexes: rate indexes to code every patch at; (None,) for a fixed-rate codec.

    Raises:
        ValueError: the symbols cannot be coded (latents that are not finite, or enormous).
    """
    gaussian = model.gaussian_conditional
    reach = -int(gaussian.offset.min())
    counts = torch.zeros(len(gaussian.scale_table), 2 * reach + 1, dtype=torch.float64)
    for batch in tqdm(patches, desc="fitting coding tables", unit="batch", leave=False, disable=None):
        features = model.features(batch.to(model.medians.device).float() / 255)
        for index in indexes:
            y, _ = model.modulate(features, model.resolve_index(index, len(batch)))
            coded = model.quantize(y, model.h_a(y), choose=model.choose_symbols)  # as for a file
            symbols = coded.y.int().clamp(-reach, reach) + reach
            places = coded.rows.int() * counts.shape[1] + symbols
            counts += torch.bincount(places.flatten(), minlength=counts.numel()).view(counts.shape)
    model.set_tables_of_y(quantized_cdf(gaussian, fit_mixtures(counts, gaussian.scale_table)))


def fit_mixtures(counts: Tensor, scale_table: Tensor) -> Tensor:
    """The mixture of Gaussians that fits the symbols of every level best: probabilities, float64 `[levels, 2K + 1]`.

    Args:
        counts: how often each symbol −K … K occurred with each level, float64 `[levels, 2K + 1]`.
        scale_table: σ of the levels, which are those of the components.
    """
    gaussians = rounded_gaussians(scale_table, counts.shape[1] // 2)
    counts = _fold(counts)
    folded = _fold(gaussians)
    own = torch.eye(len(scale_table), dtype=torch.float64)
    weights = own + SPREAD  # each mixture a row, each component a column
    weights /= weights.sum(1, keepdim=True)
    for _ in range(ITERATIONS):
        expected = counts / (weights @ folded).clamp(min=1e-300)
        weights = weights * (expected @ folded.T) + PRIOR * own
        weights /= weights.sum(1, keepdim=True)
    return weights @ gaussians


def _fold(values: Tensor) -> Tensor:
    """Sums over each symbol 0 … K and its negative: the Gaussians are symmetric."""
    middle = values.shape[1] // 2
    folded = values[:, middle:].clone()
    folded[:, 1:] += values[:, :middle].flip(1)
    return folded


def quantized_cdf(gaussian: GaussianConditional, probabilities: Tensor) -> Tensor:
    """Coding tables of these probabilities `[levels, 2K + 1]`, as long as the present ones; others are escaped."""
    middle = probabilities.shape[1] // 2
    halves = -gaussian.offset.cpu()
    longest = 2 * int(halves.max()) + 1
    rows = torch.zeros(len(halves), longest, dtype=torch.float64)
    for row, source, half in zip(rows, probabilities, halves.tolist(), strict=True):
        row[: 2 * half + 1] = source[middle - half : middle + half + 1]
    beyond = (1 - rows.sum(1, keepdim=True)).clamp(min=0)
    return gaussian._pmf_to_cdf(rows.float(), beyond.float(), pmf_length=2 * halves + 1, max_length=longest)


def first_batches(dataset: PatchDataset, trained_on: int = 0) -> list[Tensor]:
    """The first patches of a run, at most PATCHES; after a short run no more than it has used."""
    count = min(PATCHES, trained_on or PATCHES)
    starts = range(0, count, BATCH)
    return [torch.cat([dataset[i].patches for i in range(start, min(start + BATCH, count))]) for start in starts]


def refit(weights: str, folders: list[str], size: tuple[int, int], seed: int, device: str) -> dict:
    """The checkpoint of a file of weights with tables fitted to photographs: what `train_vbr.py --stage tables` writes.

    Args:
        size: height and width of the patches.

    Raises:
        UserError: the weights or the photographs cannot be used.
    """
    checkpoint = read_checkpoint(weights)
    model = model_to_code_with(checkpoint, weights, pick_device(device))
    paths = find_images(part_of_data_set(folders, "train"))
    indexes = RATES if isinstance(model, VariableRate) else (None,)
    try:
        fit_tables(model, first_batches(PatchDataset(paths, size, seed)), indexes)
    except ValueError as error:
        raise UserError(f"{weights}: {error}") from None
    stored = [value for value in find_state_dict(checkpoint).values() if isinstance(value, Tensor)]
    half = any(value.dtype == torch.float16 for value in stored)
    halved = {name for name, _ in model.named_parameters()} if half else set()
    state = {name: (t.half() if name in halved else t).cpu().contiguous() for name, t in model.state_dict().items()}
    record = {"stage": "tables", "photographs": len(paths), "patches": PATCHES, "patch_size": size}
    return describe(model) | {"state_dict": state, "training": [*checkpoint.get("training", []), record]}
