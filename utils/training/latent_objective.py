"""The models and the loss of the latent toy experiment (TCSVT 2025)."""

import torch
from torch import Tensor

from models import TCM, Codec
from models.lambdas import LADDER
from models.latent_map import TCM_Mapped
from models.state_dict import digest
from utils.checkpoint import CheckpointError, build_model, read_checkpoint, trained_lambda
from utils.errors import UserError
from utils.training.objectives import FixedRateObjective, Noise
from utils.training.schedule import Settings


class LatentMapObjective(FixedRateObjective):
    """MSE(g_s(g_a(y_high)), y_high) + MSE(g_a(y_high), y_low): a map from a high rate's latent to a low one's.

    Only the map learns. Besides what every objective measures (here of the high-rate codec with the map around its
    entropy model, at the λ of the low rate) it measures both terms as −10·log10 MSE in dB, `back_db` and
    `to_low_db`, and for comparison `unmapped_db`, that of y_high against y_low.

    Args:
        model: the high-rate codec with the map.
        low: the low-rate codec, for its analysis.
        lmbda: λ of the low rate.
    """

    stage = "latent map"

    def __init__(self, model: TCM_Mapped, low: TCM, lmbda: float, settings: Settings | None = None) -> None:
        super().__init__(model.requires_grad_(False), settings, lmbda)
        model.map.requires_grad_(True)
        self.low = low.requires_grad_(False)
        self.frozen = [model.g_a, low.g_a]
        high = {name: value for name, value in model.state_dict().items() if not name.startswith("map.")}
        self._codecs = {"high": digest(high).hex(), "low": digest(low.state_dict()).hex()}

    def forward(self, x: Tensor, rate_uniform: Tensor, noise: Noise) -> dict[str, Tensor]:
        with self.autocasting(x):
            back, there, _ = self._errors(self.model, x)
        return {"total": back + there, "loss": (back + there).detach(), "MSE back": back, "MSE to low": there}

    def _errors(self, model: TCM_Mapped, x: Tensor) -> list[Tensor]:
        """MSE of the round trip against y_high, of the map against y_low, and of y_high against y_low."""
        with torch.no_grad():
            y_high = model.g_a(x)
            y_low = self.low.g_a(x)
        mapped, _ = model.map.g_a(y_high)
        back, _ = model.map.g_s(mapped)
        pairs = ((back, y_high), (mapped, y_low), (y_high, y_low))
        return [(a.float() - b.float()).square().mean() for a, b in pairs]

    @torch.no_grad()
    def measure(self, model: TCM_Mapped, x: Tensor, index: None) -> tuple[dict[str, float], Tensor]:
        values, x_hat = super().measure(model, x, index)
        decibels = (float(-10 * error.log10()) for error in self._errors(model, x))
        return values | dict(zip(("back_db", "to_low_db", "unmapped_db"), decibels, strict=True)), x_hat

    def describe(self) -> dict:
        return super().describe() | self._codecs | {"contextual": self.model.contextual}


def make_objective(
    high_file: str, low_file: str, contextual: bool, lmbda: float | None, settings: Settings
) -> LatentMapObjective:
    """The objective of the map between the codecs of two files; λ of the low rate as given, or as its file has it."""
    high, _ = _read_tcm(high_file)
    low, recorded = _read_tcm(low_file)
    if "ms-ssim" in (high.metric, low.metric):
        raise UserError("the experiment is between TCMs for MSE; one of these was trained for MS-SSIM")
    if high.M != low.M:
        raise UserError(f"latents of {high.M} and {low.M} channels cannot be mapped: {high_file}, {low_file}")
    mapped = TCM_Mapped(**high.arguments, contextual=contextual)
    mapped.load_state_dict(mapped.state_dict() | high.state_dict())
    return LatentMapObjective(mapped, low, lmbda=lmbda or recorded or LADDER[0], settings=settings)


def _read_tcm(path: str) -> tuple[Codec, float | None]:
    """A fixed-rate codec, and its λ where its file has it."""
    checkpoint = read_checkpoint(path)
    model = build_model(checkpoint, path)
    if type(model) is not TCM:
        raise CheckpointError(f"{path}: holds a {type(model).__name__}; the experiment is between two fixed-rate TCMs")
    return model, trained_lambda(checkpoint)
