"""TCM (CVPR 2023, https://arxiv.org/abs/2303.14978) and its variable-rate form TCM_VBR (TCSVT 2025).

The networks of the paper, by the names of its published checkpoints. What is done with them is in models/codec.py.
"""

import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
from compressai.entropy_models import EntropyBottleneck, GaussianConditional
from compressai.layers import ResidualBlockUpsample, ResidualBlockWithStride, conv1x1, conv3x3, subpel_conv3x3
from compressai.models.base import SCALES_LEVELS, SCALES_MAX, SCALES_MIN, get_scale_table
from compressai.models.utils import conv, find_named_buffer, find_named_module, update_registered_buffers
from torch import Tensor, nn

from models.codec import Codec
from models.coding.slice_coders import ste_round
from models.lae import LAE, VariableRate, fcn, mask
from models.large.bands import Recomputed
from models.layers import WMSA, Block, ConvTransBlock, Float32Conv, SubsampledConv, SWAtten, SwinBlock
from models.weights import CodecConfig

__all__ = [
    "LAE", "SCALES_LEVELS", "SCALES_MAX", "SCALES_MIN", "TCM", "TCM_VBR", "WMSA", "Block", "ConvTransBlock", "SWAtten",
    "SwinBlock", "TCMConfig", "conv", "conv1x1", "fcn", "find_named_buffer", "find_named_module", "get_scale_table",
    "mask", "ste_round", "update_registered_buffers",
]  # fmt: skip


@dataclass(frozen=True)
class TCMConfig(CodecConfig):
    """Architecture of a TCM or TCM_VBR, in the order of the published constructor's arguments.

    Attributes:
        config: blocks in the three stages of `g_a`, then of `g_s`; the first number is also that of `h_a`, the fourth
            that of the hyper-synthesis (with heads of 32 channels, windows of 4×4 and no drop-path).
        head_dim: attention head width in those six stages; each divides N.
        drop_path_rate: stochastic depth, rising linearly to this over the blocks of `g_a` and `g_s`.
        N: half the width of the transforms, a multiple of 32. The published models have 64, 96 or 128.
        M: latent channels; M/2 is a multiple of 32, and num_slices divides M.
        num_slices: slices S of the channel-wise autoregression.
        max_support_slices: decoded slices that a slice may look at, 0 … S; negative: all.
        hyper_channels: channels of z.
        inter_dim: width of the slices' SWAtten; None for the full width of its input.
        slice_widths: the two inner widths of the slice transforms.

    Raises:
        ValueError: naming the constraint that does not hold.
    """

    config: Sequence[int] = (2, 2, 2, 2, 2, 2)
    head_dim: Sequence[int] = (8, 16, 32, 32, 16, 8)
    drop_path_rate: float = 0.0
    N: int = 128
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
        if self.max_support_slices < 0:
            object.__setattr__(self, "max_support_slices", self.num_slices)
        N = self.N
        M = self.M
        S = self.num_slices
        supports = self.max_support_slices
        _need(len(self.config) == 6 and min(self.config) >= 0, f"config must be six counts >= 0, not {self.config}")
        heads = self.head_dim
        widths = self.slice_widths
        inter = self.inter_dim
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
        supports = self.num_slices if self.max_support_slices >= self.num_slices - 1 else self.max_support_slices
        heads = [width if blocks else self.N for width, blocks in zip(self.head_dim, self.config, strict=True)]
        return replace(self, head_dim=heads, drop_path_rate=0.0, max_support_slices=supports)

    @classmethod
    def infer(cls, state_dict: dict[str, Tensor]) -> "TCMConfig":
        """Architecture of the TCM or TCM_VBR in a (normalized) state dict.

        Two values leave no trace in the weights and get their defaults: the drop-path rate, and the head width of a
        stage without blocks. max_support_slices = num_slices is found as num_slices − 1, which is the same network.

        Raises:
            ValueError: names that every TCM has are missing.
        """
        try:
            N = state_dict["g_a.0.conv1.weight"].shape[0] // 2
            M = state_dict["h_a.0.conv1.weight"].shape[1]
            num_slices = 1 + max(_numbers(state_dict, r"cc_mean_transforms\.(\d+)\."))
            first, last = (state_dict[f"cc_mean_transforms.{i}.0.weight"] for i in (0, num_slices - 1))
            supports = (last.shape[1] - M) // (M // num_slices)
            inter = state_dict.get("atten_mean.0.0.in_conv.weight")
            stages = _stages(state_dict, "g_a") + _stages(state_dict, "g_s")
            return cls(
                config=[count for count, _ in stages],
                head_dim=[N // heads for _, heads in stages],
                N=N,
                M=M,
                num_slices=num_slices,
                max_support_slices=supports,
                hyper_channels=state_dict["entropy_bottleneck.quantiles"].shape[0],
                inter_dim=None if inter is None else inter.shape[0],
                slice_widths=[first.shape[0], state_dict["cc_mean_transforms.0.2.weight"].shape[0]],
            )
        except (KeyError, ValueError, IndexError, ZeroDivisionError) as error:
            cause = f"no {error.args[0]}" if isinstance(error, KeyError) else error
            raise ValueError(f"these are not the weights of a TCM ({cause})") from None


def _need(condition: bool, text: str) -> None:
    if not condition:
        raise ValueError(text)


def _numbers(state_dict: dict[str, Tensor], pattern: str) -> list[int]:
    found = {int(match[1]) for name in state_dict if (match := re.match(pattern, name))}
    if not found:
        raise KeyError(pattern.split("\\")[0])
    return sorted(found)


def _stages(state_dict: dict[str, Tensor], network: str) -> list[tuple[int, int]]:
    """Blocks and attention heads of the three stages between the strided layers of `g_a` or `g_s`."""
    stages: list[tuple[int, int]] = []
    for i in _numbers(state_dict, rf"{network}\.(\d+)\.")[:-1]:  # the last one is the outer convolution
        bias = state_dict.get(f"{network}.{i}.trans_block.msa.relative_position_params")
        if bias is None:
            stages.append((0, 1))
        else:
            stages[-1] = (stages[-1][0] + 1, len(bias))
    if len(stages) != 3:
        raise KeyError(f"{network} of three stages")
    return stages


def _slice_transforms(in_ch: int, widths: Sequence[int], out_ch: int) -> nn.Sequential:
    """The 3×3 convolutions that predict μ, σ or the residual of a slice: in → widths[0] → widths[1] → out."""
    first, second = widths
    return nn.Sequential(conv3x3(in_ch, first), nn.GELU(), conv3x3(first, second), nn.GELU(), conv3x3(second, out_ch))


class TCM(Codec):
    """Mixed transformer-CNN image codec with channel-wise autoregression, at one fixed rate.

    Args: a `TCMConfig`, or its fields by position or name, which is the published form of the call. Other names are
    ignored with a warning, as the published constructor takes any.
    """

    Config = TCMConfig

    def __init__(self, *args, window_size: int = 8, **kwargs) -> None:
        _need(window_size == 8, f"window_size is 8 in every TCM, not {window_size}")
        if unknown := kwargs.keys() - {field.name for field in fields(TCMConfig)}:
            warnings.warn(f"ignored, as a TCM has no such argument: {', '.join(sorted(unknown))}", stacklevel=2)
        super().__init__(*args, **{name: value for name, value in kwargs.items() if name not in unknown})
        c = self.config
        M = c.M
        self.N = N = c.N
        rates = torch.linspace(0, c.drop_path_rate, sum(c.config)).tolist()
        drops = [[rates.pop(0) for _ in range(count)] for count in c.config]

        def stage(i: int, hyper: bool = False) -> list[nn.Module]:
            d, p, drop = (32, 4, [0.0] * c.config[i]) if hyper else (c.head_dim[i], 8, drops[i])
            sizes = dict(head_dim=d, window_size=p)
            return [ConvTransBlock(N, N, **sizes, drop_path=r, type=("W", "SW")[n % 2]) for n, r in enumerate(drop)]

        def make_hyper_synthesis() -> nn.Sequential:
            up = ResidualBlockUpsample(c.hyper_channels, 2 * N, 2)
            return nn.Sequential(up, *stage(3, hyper=True), subpel_conv3x3(2 * N, M, 2))

        self.g_a = nn.Sequential(
            ResidualBlockWithStride(3, 2 * N, 2), *stage(0),
            ResidualBlockWithStride(2 * N, 2 * N, 2), *stage(1),
            ResidualBlockWithStride(2 * N, 2 * N, 2), *stage(2),
            Float32Conv(2 * N, M, kernel_size=3, stride=2, padding=1),
        )
        self.g_a[0].skip = SubsampledConv(3, 2 * N, kernel_size=1)
        self.g_s = nn.Sequential(
            ResidualBlockUpsample(M, 2 * N, 2), *stage(3),
            ResidualBlockUpsample(2 * N, 2 * N, 2), *stage(4),
            ResidualBlockUpsample(2 * N, 2 * N, 2), *stage(5),
            subpel_conv3x3(2 * N, 3, 2),
        )
        self.h_a = nn.Sequential(
            ResidualBlockWithStride(M, 2 * N, 2), *stage(0, hyper=True), conv3x3(2 * N, c.hyper_channels, stride=2)
        )
        self.h_mean_s, self.h_scale_s = make_hyper_synthesis(), make_hyper_synthesis()

        step = M // c.num_slices
        widths = [M + step * min(i, c.max_support_slices) for i in range(c.num_slices)]

        def attention() -> nn.ModuleList:
            sizes = dict(head_dim=16, window_size=8, drop_path=0, inter_dim=c.inter_dim)
            return nn.ModuleList(nn.Sequential(SWAtten(w, w, **sizes)) for w in widths)

        def transforms(extra: int = 0) -> nn.ModuleList:
            return nn.ModuleList(_slice_transforms(w + extra, c.slice_widths, step) for w in widths)

        self.atten_mean, self.atten_scale = attention(), attention()
        self.cc_mean_transforms, self.cc_scale_transforms = transforms(), transforms()
        self.lrp_transforms = transforms(extra=step)
        self.entropy_bottleneck = EntropyBottleneck(c.hyper_channels)
        self.gaussian_conditional = GaussianConditional(None)

    bytes_per_pixel = property(lambda self: 2 * self.N, doc="2N channels in float32, at a quarter of the pixels.")

    def hyper_synthesis(self, z_hat: Tensor) -> tuple[Tensor | Recomputed, ...]:
        """Features for the means and features for the scales, `[B, M, h, w]` both."""
        return tuple(self.synthesize_hyper(network, z_hat) for network in (self.h_mean_s, self.h_scale_s))

    def predict(
        self, i: int, hyper: tuple, supports: list[Tensor], corrected: bool
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        means, scales = hyper
        sigma = self.run_networks([self.atten_scale[i], self.cc_scale_transforms[i]], scales, *supports).float()
        if not corrected:
            mu = self.run_networks([self.atten_mean[i], self.cc_mean_transforms[i]], means, *supports).float()
            return mu, sigma, None
        a_mu = self.run_networks([self.atten_mean[i]], means, *supports)
        return self.run_networks([self.cc_mean_transforms[i]], a_mu).float(), sigma, a_mu


class TCM_VBR(VariableRate, TCM):
    """TCM made variable-rate by an LAE after analysis and another before synthesis (TCSVT 2025). Arguments as TCM."""
