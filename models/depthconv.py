"""DepthConv, a backbone made to be trained and run on a CPU, and its variable-rate form DepthConv_VBR.

Its blocks are 1×1 and depth-wise 3×3 convolutions at 1/8 and 1/16 of the resolution: matrix products, and no windows.
Such blocks are those of DCVC-FM (https://arxiv.org/abs/2402.17414) and DCVC-RT (https://arxiv.org/abs/2502.20762). The
entropy model is TCM's: a hyperprior and channel-wise slices with latent residuals (CVPR 2023), without attention, and
with one network for μ and σ together. The first slice, with about half of the bits or more, may have a context model:
one network for all its parts (models/coding/order.py). No stage is narrow, so that the start in closed form loses
little (utils/training/klt_start/). docs/depthconv.md says how its sizes were chosen.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

from compressai.entropy_models import EntropyBottleneck, GaussianConditional
from torch import Tensor, nn
from torch.nn import functional as F

from models.codec import Codec
from models.coding.order import Part
from models.lae import VariableRate
from models.large.bands import Footprint, Recomputed, footprint
from models.layers import Float32Conv, PointwiseConv
from models.weights import CodecConfig

PATCH = 8  # pixels of a side that one place of the transforms stands for
EXPANSION = 2  # hidden channels of a block, in units of its own
# Bound of the hidden values of a block's feed-forward network. The gate makes them quadratic, so that without a bound
# six blocks in a row turn what no photograph has, a halftone say, into infinity. Photographs reach it nowhere in g_a
# and g_s, and in few places of the other networks.
LARGEST = 4.0
LARGEST_CHANGE = 3.0  # of ln σ, either way, by the context model


@dataclass(frozen=True)
class DepthConvConfig(CodecConfig):
    """Sizes of a DepthConv.

    Attributes:
        width, depth: channels and blocks of g_a, and of g_s, at 1/8 of the resolution.
        latent_depth: their blocks at 1/16, on the M channels of the latent.
        M: latent channels.
        num_slices: slices S of the channel-wise autoregression.
        hyper_channels: channels of z.
        hyper_width: channels of the hyper networks.
        slice_width, slice_depth: channels and blocks of the network that predicts μ and σ of a slice.
        residual_width, residual_depth: channels and blocks of the one that predicts its latent residual.
        context_model: whether the first slice is coded in parts, with a network for all but the first part, 0 or 1.

    Raises:
        ValueError: naming the constraint that does not hold.
    """

    width: int = 192
    depth: int = 5
    latent_depth: int = 1
    M: int = 320
    num_slices: int = 5
    hyper_channels: int = 128
    hyper_width: int = 128
    slice_width: int = 192
    slice_depth: int = 2
    residual_width: int = 128
    residual_depth: int = 1
    context_model: int = 0  # as checkpoints without it say nothing; the preset has 1

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            least = 0 if name.endswith(("depth", "context_model")) else 1
            if not isinstance(value, int) or value < least:
                raise ValueError(f"{name} must be a whole number, {least} or more, not {value}")
        if self.context_model not in (0, 1) or isinstance(self.context_model, bool):
            raise ValueError(f"context_model must be 0 or 1, not {self.context_model}")

    @property
    def max_support_slices(self) -> int:
        """Every slice sees all before it."""
        return self.num_slices

    @classmethod
    def infer(cls, state_dict: dict[str, Tensor]) -> "DepthConvConfig":
        """Sizes of the DepthConv or DepthConv_VBR in a (normalized) state dict.

        Raises:
            ValueError: names that every DepthConv has are missing.
        """

        def count(pattern: str) -> int:
            return len({match[1] for name in state_dict if (match := re.match(pattern, name))})

        try:
            down = next(n for n, w in state_dict.items() if re.fullmatch(r"g_a\.\d+\.weight", n) and w.shape[-1] == 3)
            at = int(down.split(".")[1])
            return cls(
                width=state_dict["g_a.1.weight"].shape[0],
                depth=at - 2,
                latent_depth=count(r"g_a\.(\d+)\.enter\.") - (at - 2),
                M=state_dict["h_a.0.weight"].shape[1],
                num_slices=count(r"slice_heads\.(\d+)\."),
                hyper_channels=state_dict["entropy_bottleneck.quantiles"].shape[0],
                hyper_width=state_dict["h_a.0.weight"].shape[0],
                slice_width=state_dict["slice_heads.0.0.weight"].shape[1],
                slice_depth=count(r"slice_transforms\.0\.(\d+)\.expand\."),
                residual_width=state_dict["lrp_transforms.0.0.weight"].shape[0],
                residual_depth=count(r"lrp_transforms\.0\.(\d+)\.expand\."),
                context_model=count(r"(context_model)\."),
            )
        except (KeyError, StopIteration) as error:
            raise ValueError(f"these are not the weights of a DepthConv (no {error.args or 'strided layer'})") from None


class DepthConvBlock(nn.Module):
    """Two residual parts on `[B, C, H, W]`: a depth-wise 3×3 convolution between two 1×1, then a gated feed-forward
    network, SwiGLU (https://arxiv.org/abs/2002.05202), of 1×1 convolutions, clipped to ±LARGEST.

    Both end in zeros, so that a new block is the identity until it learns.
    """

    def __init__(self, C: int) -> None:
        super().__init__()
        self.enter = PointwiseConv(C, C)
        self.depthwise = nn.Conv2d(C, C, 3, padding=1, groups=C)
        self.leave = PointwiseConv(C, C)
        self.expand = PointwiseConv(C, EXPANSION * C)
        self.gate = PointwiseConv(C, EXPANSION * C)  # apart from `expand`, as halves of one output would be copied
        self.reduce = PointwiseConv(EXPANSION * C, C)
        for last in (self.leave, self.reduce):
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.leave(self.depthwise(F.silu(self.enter(x))))
        return x + self.reduce(F.hardtanh_(self.expand(x) * F.silu(self.gate(x)), -LARGEST, LARGEST))


@footprint.register
def _(layer: DepthConvBlock) -> Footprint:
    return Footprint(1, 1)


def _blocks(C: int, depth: int) -> list[nn.Module]:
    return [DepthConvBlock(C) for _ in range(depth)]


class DepthConv(Codec):
    """Depth-wise image codec with channel-wise autoregression, at one fixed rate. Args: as `Codec`."""

    Config = DepthConvConfig

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        c = self.config
        M = self.M
        C = self.config.width
        H = self.config.hyper_width
        pixels = 3 * PATCH**2
        self.g_a = nn.Sequential(
            nn.PixelUnshuffle(PATCH), PointwiseConv(pixels, C), *_blocks(C, c.depth),
            Float32Conv(C, M, kernel_size=3, stride=2, padding=1), *_blocks(M, c.latent_depth),
        )
        self.g_s = nn.Sequential(
            *_blocks(M, c.latent_depth), PointwiseConv(M, 4 * C), nn.PixelShuffle(2), *_blocks(C, c.depth),
            PointwiseConv(C, pixels), nn.PixelShuffle(PATCH),
        )
        self.h_a = nn.Sequential(
            nn.Conv2d(M, H, 3, stride=2, padding=1), nn.SiLU(), *_blocks(H, 1),
            nn.Conv2d(H, c.hyper_channels, 3, stride=2, padding=1),
        )
        self.h_s = nn.Sequential(
            PointwiseConv(c.hyper_channels, 4 * H), nn.PixelShuffle(2), nn.SiLU(), *_blocks(H, 1),
            PointwiseConv(H, 4 * c.slice_width), nn.PixelShuffle(2),
        )
        step = M // c.num_slices
        D = c.slice_width
        L = c.residual_width
        self.slice_transforms = nn.ModuleList(
            nn.Sequential(PointwiseConv(D + step * i, D), *_blocks(D, c.slice_depth)) for i in range(c.num_slices)
        )
        self.slice_heads = nn.ModuleList(nn.Sequential(PointwiseConv(D, 2 * step)) for _ in range(c.num_slices))
        self.lrp_transforms = nn.ModuleList(
            nn.Sequential(PointwiseConv(D + step, L), *_blocks(L, c.residual_depth), PointwiseConv(L, step))
            for _ in range(c.num_slices)
        )
        if c.context_model:
            self.context_model = nn.Sequential(
                PointwiseConv(D + 2 * step, D), *_blocks(D, c.slice_depth), PointwiseConv(D, 2 * step)
            )
            last = self.context_model[-1]  # a new one changes nothing until it learns
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)
        self.entropy_bottleneck = EntropyBottleneck(c.hyper_channels)
        self.gaussian_conditional = GaussianConditional(None)

    @property
    def bytes_per_pixel(self) -> float:
        """The hidden channels of a block in float32, one place for 8×8 pixels."""
        return 4 * EXPANSION * self.config.width / PATCH**2

    def transform_parameters(self) -> Iterator[nn.Parameter]:
        """What the start in closed form writes into g_a and g_s. The blocks learn as fast as everything else."""
        for network in (self.g_a, self.g_s):
            for layer in network:
                if not isinstance(layer, DepthConvBlock):
                    yield from layer.parameters()

    def predict(
        self, i: int, hyper: Tensor | Recomputed, supports: list[Tensor], corrected: bool
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        if not corrected:
            found = self.run_networks([self.slice_transforms[i], self.slice_heads[i]], hyper, *supports)
            return *found.float().chunk(2, 1), None
        features = self.run_networks([self.slice_transforms[i]], hyper, *supports)
        return *self.run_networks([self.slice_heads[i]], features).float().chunk(2, 1), features

    def predict_again(
        self, part: Part, context: Tensor, symbols: Tensor, known: Tensor, mu: Tensor, sigma: Tensor
    ) -> tuple[Tensor, Tensor]:
        inputs = (context, symbols.to(context.dtype), known.to(context.dtype))
        change_of_mu, change_of_log_sigma = self.run_networks([self.context_model], *inputs).chunk(2, 1)
        factor = part.of(change_of_log_sigma).float().clamp(-LARGEST_CHANGE, LARGEST_CHANGE).exp()
        return mu + part.of(change_of_mu).float(), self.gaussian_conditional.lower_bound_scale(sigma) * factor


class DepthConv_VBR(VariableRate, DepthConv):
    """DepthConv made variable-rate by an LAE after analysis and another before synthesis (TCSVT 2025)."""
