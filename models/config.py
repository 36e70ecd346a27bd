"""Sizes of a TCM: the arguments of its published constructor, checked, and the presets."""

from collections.abc import Sequence
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class TCMConfig:
    """Architecture of a TCM or TCM_VBR, in the order of the published constructor's arguments.

    Attributes:
        config: blocks in the three stages of `g_a`, then of `g_s`.
        head_dim: attention head width in those six stages; each divides N.
        drop_path_rate: stochastic depth, rising linearly to this over the blocks of `g_a` and `g_s`.
        N: half the width of the transforms, a multiple of 32.
        M: latent channels; M/2 is a multiple of 32, and num_slices divides M.
        num_slices: slices S of the channel-wise autoregression.
        max_support_slices: decoded slices that a slice may look at, 0 … S.
        hyper_channels: channels of z.
        inter_dim: width of the slices' SWAtten; None for the full width of its input.
        slice_widths: the two inner widths of the slice transforms.

    Raises:
        ValueError: naming the constraint that does not hold.
    """

    config: Sequence[int] = (2, 2, 2, 2, 2, 2)
    head_dim: Sequence[int] = (8, 16, 32, 32, 16, 8)
    drop_path_rate: float = 0.0
    N: int = 64
    M: int = 320
    num_slices: int = 5
    max_support_slices: int = 5
    hyper_channels: int = 192
    inter_dim: int | None = 128
    slice_widths: Sequence[int] = (224, 128)

    def __post_init__(self) -> None:
        for name in ("config", "head_dim", "slice_widths"):
            object.__setattr__(self, name, list(getattr(self, name)))
        object.__setattr__(self, "drop_path_rate", float(self.drop_path_rate))
        N, M, S, supports = self.N, self.M, self.num_slices, self.max_support_slices
        _need(len(self.config) == 6 and min(self.config) >= 0, f"config must be six counts >= 0, not {self.config}")
        heads, widths, inter = self.head_dim, self.slice_widths, self.inter_dim
        _need(len(heads) == 6 and min(heads) > 0, f"head_dim must be six widths > 0, not {heads}")
        _need(0 <= self.drop_path_rate < 1, f"drop_path_rate must lie in [0, 1), not {self.drop_path_rate}")
        _need(N > 0 and N % 32 == 0, f"N must be a positive multiple of 32, not {N}")
        _need(M > 0 and M % 64 == 0, f"M/2 must be a positive multiple of 32, not {M}/2")
        _need(all(N % d == 0 for d in heads), f"every head_dim must divide N = {N}, not {heads}")
        _need(S > 0 and M % S == 0, f"num_slices must divide M = {M}, not {S}")
        _need(0 <= supports <= S, f"max_support_slices must lie in [0, num_slices = {S}], not {supports}")
        _need(self.hyper_channels > 0, f"hyper_channels must be positive, not {self.hyper_channels}")
        _need(len(widths) == 2 and min(widths) > 0, f"slice_widths must be two widths > 0, not {widths}")
        if inter is None:
            step = M // S if supports and S > 1 else 0
            _need(step % 16 == 0, f"without inter_dim, M/num_slices must be a multiple of 16, not {step}")
        else:
            _need(inter > 0 and inter % 16 == 0, f"inter_dim must be a positive multiple of 16, not {inter}")

    def canonical(self) -> "TCMConfig":
        """The same network, with one value for what leaves no trace in it."""
        supports = self.num_slices if self.max_support_slices >= self.num_slices - 1 else self.max_support_slices
        heads = [width if blocks else self.N for width, blocks in zip(self.head_dim, self.config, strict=True)]
        return replace(self, head_dim=heads, drop_path_rate=0.0, max_support_slices=supports)


def _need(condition: bool, text: str) -> None:
    if not condition:
        raise ValueError(text)


PRESETS = {
    "full": TCMConfig(),  # the published models with N = 64
    "small": TCMConfig(  # the shipped weights
        head_dim=(8, 16, 16, 16, 16, 8),
        N=32,
        M=192,
        num_slices=4,
        max_support_slices=4,
        hyper_channels=128,
        inter_dim=64,
        slice_widths=(128, 96),
    ),
}
