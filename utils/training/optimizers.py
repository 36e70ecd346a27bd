"""Optimizers of a codec: learning rates by part."""

import torch

from models import Codec
from utils.training.schedule import Settings


def make_optimizers(model: Codec, settings: Settings) -> dict[str, torch.optim.Adam]:
    """Adam "net" for the networks and Adam "aux" for the bottleneck's quantiles, of parameters that are trained.

    CompressAI's net_aux_optimizer does not fit, as it has no groups: the density of z starts 10 wide, and Adam moves
    a weight by the learning rate per step, so that at the networks' rate z would cost 3 bits per symbol for long.
    """
    networks = []
    transforms = []
    density = []
    quantiles = []
    slow = set(model.transform_parameters())
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        if name.startswith("entropy_bottleneck."):
            (quantiles if name.endswith(".quantiles") else density).append(p)
        else:
            (transforms if p in slow else networks).append(p)
    factors = (1.0, settings.transform_factor, settings.density_factor)
    groups = [{"params": p, "factor": f} for p, f in zip((networks, transforms, density), factors, strict=True) if p]
    optimizers = {"net": torch.optim.Adam(groups, settings.learning_rate, fused=True)}
    if quantiles:
        optimizers["aux"] = torch.optim.Adam(quantiles, settings.aux_learning_rate, fused=True)
    return optimizers
