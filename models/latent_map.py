"""The latent toy experiment (TCSVT 2025): can a map in the latent domain turn the latent of a high rate into that of a
low rate? The map is a pair of gains, `g_a` towards the low rate and `g_s` back.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.layers import ConvTransBlock
from models.state_dict import normalize
from models.tcm import TCM


class Gain(nn.Module):
    """x · exp(softsign(lmd_map)) on `[B, M, h, w]`; contextual: lmd_map + alpha · latent_attn(x) instead.

    The logits start at one, as published, so the gain starts at exp(½).
    """

    def __init__(self, M: int, contextual: bool) -> None:
        super().__init__()
        self.lmd_map = nn.Parameter(torch.ones(1, M, 1, 1))
        self.contextual = contextual
        if contextual:
            self.latent_attn = ConvTransBlock(M // 2, M // 2, head_dim=32, window_size=4, drop_path=0, type="SW")
            self.alpha = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The scaled latent, and the logarithm of the gain, `[B, M, h, w]` both."""
        logits = self.lmd_map + self.alpha * self.latent_attn(x) if self.contextual else self.lmd_map
        log_gain = F.softsign(logits)
        return x * log_gain.exp(), log_gain.expand_as(x)


class TCM_Mapped(TCM):
    """A TCM with the map around its entropy model: the high-rate codec run at the low rate.

    Arguments as TCM, and contextual: whether the gains see the latent.
    """

    def __init__(self, *args, contextual: bool = False, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.contextual = contextual
        self.map = nn.ModuleDict({name: Gain(self.M, contextual) for name in ("g_a", "g_s")})

    @classmethod
    def from_state_dict(cls, state_dict: dict[str, Tensor]) -> "TCM_Mapped":
        """As of every codec; whether the gains see the latent is in the names."""
        state_dict = normalize(state_dict)
        model = cls(cls.Config.infer(state_dict), contextual="map.g_a.alpha" in state_dict)
        model.load_state_dict(state_dict)
        return model.eval()

    @property
    def arguments(self) -> dict:
        """As TCM, with contextual."""
        return super().arguments | {"contextual": self.contextual}

    def modulate(self, y: Tensor, index: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """y mapped, and the logarithm of the gain."""
        return self.map.g_a(y)

    def demodulate(self, y_hat: Tensor, index: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """ŷ mapped back, and the logarithm of the gain."""
        return self.map.g_s(y_hat)

    def demodulate_bands(self, y_hat: Tensor, index: Tensor | None, height: int) -> Iterator[Tensor]:
        return super().demodulate_bands(self.demodulate(y_hat)[0], index, height)
