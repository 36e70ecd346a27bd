"""The losses of the training stages: of everything, of a fixed-rate codec, of the decoder, entropy model, or LAEs."""

from collections.abc import Sequence

import torch
from compressai.entropy_models import GaussianConditional
from compressai.models.base import get_scale_table
from torch import Tensor, nn

from models import Codec, VariableRate
from models.coding.slice_coders import ERROR_BITS, Quantization, choose_symbols
from models.coding.tables import CodingTables
from models.lambdas import LADDERS, LAST_INDEX, index_to_lambda, middle_lambda
from models.large.bands import multiple
from models.large.memory import send
from models.state_dict import digest
from utils.codec.quality_map import pixel_weights
from utils.metrics import bits, psnr_of_mse, rate_distortion
from utils.training.maps import draw_maps
from utils.training.schedule import Settings

Noise = tuple[Tensor, Tensor]
RATES = tuple(float(i) for i in range(len(LADDERS["mse"])))  # rate indexes of the ladder
PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16}  # the names are choices of --amp


class Objective(nn.Module):
    """The joint stage: a model and its rate-distortion loss, at all rates or at one. Base class of the other stages.

    Model and loss are one module, as DistributedDataParallel needs. Parameters that a stage does not train have
    `requires_grad` off.

    Args:
        model: to be trained, in place, for its `metric`.
        settings: those of the run.
        lmbda: λ of a fixed-rate codec; None for a variable-rate one.

    Attributes:
        indexes: rates to validate at.
        in_validation: how latents are quantized there; by default rounded.
        balance, map_share: as in the settings; those of the last part once that has begun.

    Raises:
        ValueError: maps for another metric than MSE.
    """

    stage = "joint"
    repeat = 0  # number of patches to train on again and again; 0 for always new ones

    def __init__(self, model: Codec, settings: Settings | None = None, lmbda: float | None = None) -> None:
        super().__init__()
        self.model = model
        self.lmbda = lmbda
        self.indexes: tuple[float | None, ...] = RATES if lmbda is None else (None,)
        self.metric = model.metric
        self.settings = settings = settings or Settings()
        if settings.map_share and self.metric != "mse":
            raise ValueError(f"maps weigh places by their λ, and the loss of {self.metric} has none: map_share is 0")
        self.autocast = PRECISIONS.get(settings.amp)
        self.balance = settings.balance
        self.map_share = 0.0 if settings.last_share else settings.map_share
        self.in_validation = Quantization()
        self.frozen: list[nn.Module] = []  # these stay in evaluation mode, without drop-path in their latents

    def forward(self, x: Tensor, rate_uniform: Tensor, noise: Noise) -> dict[str, Tensor]:
        """Losses of a batch.

        Args:
            x: patches `[B, 3, H, W]` in [0, 1].
            rate_uniform: a number in [0, 1) per sample, `[B]`, which `index` turns into its rate.
            noise: uniform in ±½, for y and for z.

        Returns:
            `total`, which has the gradients, and scalars to log: `loss` and others.
        """
        index = places = self.index(rate_uniform)
        lmbda = self.lambdas(index, x)
        weights = None
        if self.map_share:
            places = draw_maps(index, rate_uniform, *x.shape[2:], share=self.map_share)
            weights = pixel_weights(places, lmbda, self.metric)
        with self.autocasting(x):
            out = self.model(x, places, self.in_training(noise))
        losses = rate_distortion(out, x, lmbda, metric=self.metric, weights=weights)
        aux = self.model.aux_loss()  # for the quantiles, on which no other term depends
        return {"total": self.weighted(losses["loss"], lmbda) + aux, "aux": aux, **_means(losses)}

    def in_training(self, noise: Noise) -> Quantization:
        """How latents are quantized in the loss of a batch."""
        return Quantization(noise)

    def begin_last_part(self) -> None:
        """Go on with maps, and with the published loss."""
        self.balance = 0.0
        self.map_share = self.settings.map_share

    def weighted(self, loss: Tensor, lmbda: Tensor) -> Tensor:
        """The loss to minimize, of the loss and the λ of each sample, `[B]`: the mean of each times
        (λ / λ_mid)^−balance, with λ_mid = √(λ_first · λ_last)."""
        weights = (lmbda / middle_lambda(self.metric)) ** -self.balance
        return (weights * loss).mean()

    def autocasting(self, x: Tensor) -> torch.autocast:
        """A context of the run's precision, on the device of x."""
        return torch.autocast(x.device.type, self.autocast, enabled=self.autocast is not None)

    def index(self, rate_uniform: Tensor) -> Tensor | None:
        """Rate index of each sample, `[B]`: uniform over [0, 5]. None of a fixed-rate codec."""
        return rate_uniform * LAST_INDEX if self.lmbda is None else None

    def lambdas(self, index: Tensor | float | None, x: Tensor) -> Tensor:
        """λ of each sample of x, `[B]`, on its device."""
        if self.lmbda is not None:
            return torch.full((len(x),), self.lmbda, device=x.device)
        index = torch.as_tensor(index, dtype=torch.float32).expand(len(x))
        return send(index_to_lambda(index, self.metric), x.device)

    @torch.no_grad()
    def measure(self, model: Codec, x: Tensor, index: float | None) -> tuple[dict[str, float], Tensor]:
        """A photograph `[1, 3, H, W]` at a rate, quantized as `in_validation` says: numbers to average, and x̂ in 8-bit
        steps."""
        out = model(x, index, self.in_validation)
        out["x_hat"] = (out["x_hat"].clamp(0, 1) * 255).round() / 255
        losses = rate_distortion(out, x, self.lambdas(index, x), metric=self.metric)
        values = {"bpp": losses["bpp"], "psnr": psnr_of_mse(losses["mse"]), "loss": losses["loss"]}
        if isinstance(model, VariableRate):
            values |= {name: out[name].mean() for name in ("log_m_ga", "log_m_gs")}
        return {name: float(value) for name, value in values.items()}, out["x_hat"]

    def train(self, mode: bool = True) -> "Objective":
        super().train(mode)
        for module in self.frozen:
            module.eval()
        return self

    def describe(self) -> dict:
        """Entries of the training record, which a run that is resumed must have too."""
        described = {"stage": self.stage, "metric": self.metric}
        return described if self.lmbda is None else described | {"lambda": self.lmbda}


class FixedRateObjective(Objective):
    """A fixed-rate codec at one λ: the base of the variable-rate model, and the teachers of the static stage."""

    stage = "base"


class DecoderObjective(Objective):
    """All that a decoder computes learns, on symbols chosen as files choose them; analysis and z are frozen.

    In a joint stage noise stands for rounding in the rate, and symbols are the nearest ones, as g_a needs gradients.
    Here it learns nothing: the rate is the likelihood of the symbols themselves, chosen for rate and distortion
    together (RDOQ; by tables of Gaussians, as fitted ones come last), and the picture is made of them. Training the
    decoder once more on rounded latents, after the encoder, is the second half of "Soft then Hard: Rethinking the
    Quantization in Neural Image Compression" (ICML 2021, https://arxiv.org/abs/2104.05168).

    ŷ has the gradients of y, as everywhere, so that μ learns from the rate alone; to give it those of the distortion
    changed nothing in a trial (0.03 ± 0.06 % of the loss after 77 steps). The arguments are those of `Objective`.
    """

    stage = "decoder"

    def __init__(self, model: Codec, settings: Settings | None = None, lmbda: float | None = None) -> None:
        super().__init__(model, settings, lmbda)
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(not name.startswith(("g_a.", "h_a.", "modnet_ga.", "entropy_bottleneck.")))
        self.frozen = [self.model.g_a, self.model.h_a]
        self._gaussian = GaussianConditional(get_scale_table().tolist())
        self._gaussian.update()
        self._tables = CodingTables(self._gaussian)
        self.in_validation = Quantization(straight_through=True, choose=self._choose)

    def in_training(self, noise: Noise) -> Quantization:
        return self.in_validation

    def _choose(self, residual: Tensor, sigma: Tensor) -> Tensor:
        how = dict(gaussian=self._gaussian, tables=self._tables, error_bits=ERROR_BITS)
        return choose_symbols(residual, sigma, **how)


class EntropyObjective(Objective):
    """The entropy model alone learns to spend fewer bits on latents that do not change.

    Analysis, LAEs and synthesis are frozen, and so are the `lrp_transforms`: without distortion in the loss they would
    change ŷ only to save bits. (After a joint stage ŷ drifts all the same, as what goes into them is trained: a small
    learning rate, and another joint stage, are then in place.) The latents are computed once and kept, in float16: a
    step costs a third of a joint one.

    Args:
        model, settings, lmbda: as of `Objective`.
        kept: number of patches whose latents are kept, of all processes together, at least. `repeat` is a multiple of
            the batch, so that each process meets the patches again whose latents it has kept.
    """

    stage = "entropy"

    def __init__(self, model: Codec, kept: int, settings: Settings | None = None, lmbda: float | None = None) -> None:
        super().__init__(model, settings, lmbda)
        self.kept = kept
        self.repeat = multiple(kept, self.settings.batch_size)
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(not name.startswith(("g_a.", "g_s.", "modnet_", "lrp_transforms.")))
        self.frozen = [self.model.g_a]
        self._kept: dict[int, Tensor] = {}

    def forward(self, x: Tensor, rate_uniform: Tensor, noise: Noise, keys: Sequence[int]) -> dict[str, Tensor]:
        """As `Objective.forward`; equal keys are equal patches."""
        index = self.index(rate_uniform)
        with torch.no_grad():  # in float32, which costs little, as analysis is done once
            y, _ = self.model.modulate(self._latents(x, keys), index)
        with self.autocasting(x):
            _, out = self.model.estimate_rate(y, self.model.h_a(y), Quantization(noise))
        pixels = x.shape[-2] * x.shape[-1]
        bpp_z = bits(out["likelihoods"]["z"]) / pixels
        bpp = bits(out["likelihoods"]["y"]) / pixels + bpp_z
        total = self.weighted(bpp, self.lambdas(index, x))
        aux = self.model.aux_loss()
        return {"total": total + aux, "aux": aux, "bpp": bpp.detach().mean(), "bpp of z": bpp_z.detach().mean()}

    def _latents(self, x: Tensor, keys: Sequence[int]) -> Tensor:
        """The output of `g_a`, computed for patches whose latents are not kept yet."""
        if new := [i for i, key in enumerate(keys) if key not in self._kept]:
            patches = x[send(torch.tensor(new), x.device)]
            for i, latent in zip(new, self.model.features(patches).half(), strict=True):
                self._kept[keys[i]] = latent
        return torch.stack([self._kept[key] for key in keys]).float()

    def describe(self) -> dict:
        return super().describe() | {"patches kept": self.kept}


class ContextObjective(EntropyObjective):
    """The context model alone (`DepthConvConfig.context_model`) learns to spend fewer bits: what a codec without one
    gains is had in minutes. The arguments are those of `EntropyObjective`."""

    stage = "context"

    def __init__(self, model: Codec, kept: int, settings: Settings | None = None, lmbda: float | None = None) -> None:
        super().__init__(model, kept, settings=settings, lmbda=lmbda)
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(name.startswith("context_model."))


class LAEObjective(Objective):
    """The LAEs alone learn, by the joint loss: any fixed-rate codec becomes variable-rate; its weights stay."""

    stage = "lae"

    def __init__(self, model: VariableRate, settings: Settings | None = None) -> None:
        super().__init__(model, settings)
        model.requires_grad_(False)
        self.frozen = [model.g_a, model.g_s]
        self.laes = [model.modnet_ga.requires_grad_(True), model.modnet_gs.requires_grad_(True)]


class StaticObjective(LAEObjective):
    """The static stage (TCSVT 2025): the LAEs alone learn, towards the latents of six fixed-rate teachers.

    loss = R-D loss + 0.03 · MSE(LAE(g_a(x)), g_a of the teacher of the sample's λ(x)) + 1e-4 · Σ‖p‖₂ over the
    parameters of both LAEs. The rates are the six that have a teacher.
    """

    stage = "static"
    latent_weight = 0.03
    norm_weight = 1e-4

    def __init__(self, model: VariableRate, teachers: Sequence[Codec], settings: Settings | None = None) -> None:
        super().__init__(model, settings)
        self.teachers = nn.ModuleList(teacher.g_a for teacher in teachers).requires_grad_(False)
        self.frozen += [self.teachers]
        self._taught_by = digest(self.teachers.state_dict()).hex()

    def index(self, rate_uniform: Tensor) -> Tensor:
        return (rate_uniform * len(self.teachers)).floor()

    def forward(self, x: Tensor, rate_uniform: Tensor, noise: Noise) -> dict[str, Tensor]:
        index = self.index(rate_uniform)
        with self.autocasting(x):
            out = self.model(x, index, Quantization(noise))
            target = self._teacher_latents(x, index)
        lmbda = self.lambdas(index, x)
        losses = rate_distortion(out, x, lmbda, metric=self.metric)
        latent = (out["latent"] - target).square().mean()
        norms = sum(torch.linalg.vector_norm(p) for lae in self.laes for p in lae.parameters())
        total = self.weighted(losses["loss"], lmbda) + self.latent_weight * latent + self.norm_weight * norms
        return {"total": total, "latent MSE": latent, "norms": norms, **_means(losses)}

    def describe(self) -> dict:
        return super().describe() | {"teachers": self._taught_by}

    def _teacher_latents(self, x: Tensor, index: Tensor) -> Tensor:
        """The latent of each sample by the teacher of its λ."""
        shape, _ = self.model.noise_shapes(*x.shape[2:])
        latents = x.new_empty(len(x), *shape)
        for number in index.unique().long().tolist():
            chosen = send((index == number).nonzero().flatten(), x.device)
            latents[chosen] = self.teachers[number](x[chosen])
        return latents


def _means(losses: dict[str, Tensor]) -> dict[str, Tensor]:
    values = {"loss": losses["loss"], "bpp": losses["bpp"], "bpp of z": losses["bpp_z"]}
    return {name: value.detach().mean() for name, value in (values | {"psnr": psnr_of_mse(losses["mse"])}).items()}
