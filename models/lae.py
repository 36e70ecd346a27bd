"""Latent-domain auto-encoders (TCSVT 2025): one after analysis and one before synthesis make any codec variable-rate.

    y → y · m,    m = exp(softsign(f_λ(λ) + α · attn(y)))

f_λ (`fcn`) sees the rate, attn(y) the content; `mask` is ln m, `LAE` the scaling. The LAE before synthesis learns to
scale back. The paper's rate model follows: R(λ) = Σ log2 m(λ) + C bits (utils/codec/rate_model.py). Published names.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.codec import RateIndex
from models.lambdas import LAST_INDEX, check_index, log_gain
from models.large.bands import scaled_bands
from models.large.memory import send
from models.layers import ConvTransBlock
from models.state_dict import normalize


class fcn(nn.Module):
    """f_λ: n linear layers, from the rate index (not λ) `[…, 1]` to M logits `[…, M]`. The last is zero at first."""

    def __init__(self, n: int, M: int) -> None:
        super().__init__()
        self.fc_layers = nn.ModuleList(nn.Linear(1 if i == 0 else M, M) for i in range(n))
        nn.init.zeros_(self.fc_layers[-1].weight)
        nn.init.zeros_(self.fc_layers[-1].bias)

    def forward(self, index: Tensor) -> Tensor:
        for layer in self.fc_layers[:-1]:
            index = F.relu(layer(index))
        return self.fc_layers[-1](index)


class mask(nn.Module):
    """ln m = softsign(f_λ(λ) + α · attn(y)), in (−1, 1) on the ladder, for a latent y; arguments as of `LAE`."""

    def __init__(self, n: int, M: int, sign: int = 1) -> None:
        super().__init__()
        self.sign = sign
        self.lmd_map = fcn(n, M)
        self.latent_attn = ConvTransBlock(M // 2, M // 2, head_dim=32, window_size=4, drop_path=0, type="SW")
        self.alpha = nn.Parameter(torch.zeros(1))

    def forward(self, y: Tensor, index: Tensor) -> Tensor:
        return self.log_m(*self.rate(index), self.content(y))

    @staticmethod
    def log_m(logits: Tensor, gain: Tensor, content: Tensor) -> Tensor:
        """ln m from what `rate` returns and `content`, which broadcast."""
        return F.softsign(logits + content) + gain

    def content(self, y: Tensor) -> Tensor:
        """α · attn(y), the part of the logits that depends on no rate."""
        return self.alpha * self.latent_attn(y)

    def rate(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """f_λ, of `[B]`: `[B, M, 1, 1]`, of maps `[B, 1, h, w]`: `[B, M, h, w]`; and ln of the gain beyond the ladder.
        f_λ is in float32 under autocast too: in bfloat16 m is off by 0.4 %, half a step where the latent is 128."""
        index = send(index, self.alpha.device)
        gain = self.sign * log_gain(index if index.dim() == 4 else index.view(-1, 1, 1, 1)).to(self.alpha)
        index = index.clamp(0.0, LAST_INDEX).to(self.alpha)  # 0.0: PyTorch's export to ONNX wants bounds of one type
        with torch.autocast(self.alpha.device.type, enabled=False):
            if index.dim() == 4:
                return self.lmd_map(index.movedim(1, -1)).movedim(-1, 1), gain
            return self.lmd_map(index.view(-1, 1))[:, :, None, None], gain


class LAE(nn.Module):
    """y `[B, M, h, w]` and rate indexes, `[B]` or maps `[B, 1, h, w]`, to y · m and ln m, `[B, M, h, w]` both. f_λ has
    n layers; sign is 1 before the entropy model, −1 before synthesis. It is the identity at the start."""

    def __init__(self, n: int, M: int, sign: int = 1) -> None:
        super().__init__()
        self.mask = mask(n, M, sign)

    def forward(self, y: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        log_m = self.mask(y, index)
        return y * log_m.exp(), log_m


class VariableRate:
    """Put before a fixed-rate codec among the bases of a class: the same codec at every rate. Everything between the
    two LAEs sees the scaled latent. The weights of the fixed-rate codec can be loaded: the LAEs are then the identity,
    and the output in [0, 5] is that of the fixed-rate codec. Arguments are its arguments."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.modnet_ga, self.modnet_gs = LAE(2, self.M), LAE(2, self.M, sign=-1)

    def resolve_index(self, index: RateIndex, batch: int) -> Tensor:
        """The checked index; None draws a whole one per sample in training, as published, and is a ValueError else."""
        if index is None:
            if not self.training:
                raise ValueError("a variable-rate model needs a rate index in evaluation: forward(x, index)")
            index = torch.randint(int(LAST_INDEX) + 1, (batch,))
        return send(check_index(index, batch), self.medians.device)  # checked before, as reading a GPU waits for it

    def modulate(self, y: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        """y · m and ln m of the first LAE, `[B, M, H/16, W/16]` both."""
        return self.modnet_ga(y, index)

    def demodulate(self, y_hat: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        """ŷ · m and ln m of the second LAE, `[B, M, h, w]` both."""
        return self.modnet_gs(y_hat, index)

    def demodulate_bands(self, y_hat: Tensor, index: Tensor, height: int) -> Iterator[Tensor]:
        return scaled_bands(self.modnet_gs, y_hat, index, height=height)

    def load_state_dict(self, state_dict: dict, strict: bool = True):
        """As the fixed-rate codec, whose weights are taken too."""
        if not any("modnet_ga." in name for name in state_dict):
            identity = LAE(2, self.M).state_dict()
            laes = {f"{lae}.{name}": identity[name] for lae in ("modnet_ga", "modnet_gs") for name in identity}
            state_dict = normalize(state_dict) | laes
        return super().load_state_dict(state_dict, strict)
