"""The hyperprior models of CompressAI's zoo, as they were trained: `bmshj2018-hyperprior` (https://arxiv.org/abs/1802.01436),
whose hyper-synthesis gives σ alone, and `mbt2018-mean` (https://arxiv.org/abs/1809.02736), where it gives μ and σ.

Their entropy model is one slice whose μ and σ come from ẑ. A state dict of `compressai.zoo` loads as it is.
"""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from compressai.entropy_models import EntropyBottleneck, GaussianConditional
from compressai.layers import GDN
from torch import Tensor, nn

from models.codec import Codec
from models.lae import VariableRate
from models.large.bands import Footprint, Recomputed, footprint
from models.layers import Float32Conv
from models.weights import CodecConfig


@dataclass(frozen=True)
class HyperpriorConfig(CodecConfig):
    """Sizes of a hyperprior model.

    Attributes:
        N: channels of the transforms and of z.
        M: latent channels.
        means: whether the hyper-synthesis predicts μ too (mbt2018-mean); without, μ is 0, and |y| makes z.
    """

    N: int = 128
    M: int = 192
    means: bool = True

    num_slices = max_support_slices = 1
    hyper_channels = property(lambda self: self.N)

    def __post_init__(self) -> None:
        if self.N < 1 or self.M < 1:
            raise ValueError(f"N and M must be positive, not {self.N} and {self.M}")

    @classmethod
    def infer(cls, state_dict: dict[str, Tensor]) -> "HyperpriorConfig":
        """Sizes of the model in a (normalized) state dict.

        Raises:
            ValueError: it is of another kind; autoregressive models and those without a hyperprior are named.
        """
        if any(name.startswith("context_prediction.") for name in state_dict):
            raise ValueError("an autoregressive model (mbt2018, cheng2020): its context model decodes pixel by pixel, "
                             "and is not supported; bmshj2018-hyperprior and mbt2018-mean are")
        try:
            M = state_dict["h_a.0.weight"].shape[1]
            N = state_dict["g_a.0.weight"].shape[0]
            _ = state_dict["g_a.1.beta"]
            return cls(N, M, means=state_dict["h_s.4.weight"].shape[0] == 2 * M)
        except KeyError as error:
            raise ValueError(f"these are not the weights of a hyperprior model (no {error.args[0]})") from None


class Magnitude(nn.Module):
    """|y|."""

    def forward(self, y: Tensor) -> Tensor:
        return y.abs()


@footprint.register
def _(layer: Magnitude) -> Footprint:
    return Footprint(0, 1)


def _down(C: int, D: int, make: Callable[..., nn.Conv2d] = nn.Conv2d) -> nn.Conv2d:
    return make(C, D, kernel_size=5, stride=2, padding=2)


def _up(C: int, D: int) -> nn.ConvTranspose2d:
    return nn.ConvTranspose2d(C, D, 5, stride=2, padding=2, output_padding=1)


class Hyperprior(Codec):
    """A zoo model of one fixed rate. Args: as `Codec`."""

    Config = HyperpriorConfig

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        N = self.config.N
        M = self.config.M
        means = self.config.means
        self.g_a = nn.Sequential(
            _down(3, N), GDN(N), _down(N, N), GDN(N), _down(N, N), GDN(N), _down(N, M, Float32Conv)
        )
        self.g_s = nn.Sequential(
            _up(M, N), GDN(N, inverse=True), _up(N, N), GDN(N, inverse=True), _up(N, N), GDN(N, inverse=True), _up(N, 3)
        )
        bend = nn.LeakyReLU if means else nn.ReLU
        h_a = nn.Conv2d(M, N, 3, padding=1), bend(), _down(N, N), bend(), _down(N, N)
        names = {str(i): layer for i, layer in enumerate(h_a)}  # the zoo's, which begin after the magnitude
        self.h_a = nn.Sequential(OrderedDict(names if means else {"magnitude": Magnitude()} | names))
        widths, last = ((M, 3 * M // 2, 2 * M), []) if means else ((N, N, M), [bend()])
        self.h_s = nn.Sequential(
            _up(N, widths[0]), bend(), _up(*widths[:2]), bend(), nn.Conv2d(*widths[1:], 3, padding=1), *last
        )
        self.entropy_bottleneck = EntropyBottleneck(N)
        self.gaussian_conditional = GaussianConditional(None)

    bytes_per_pixel = property(lambda self: float(self.config.N), doc="N channels at a quarter of the pixels.")

    def predict(
        self, i: int, hyper: Tensor | Recomputed, supports: list[Tensor], corrected: bool
    ) -> tuple[Tensor, Tensor, None]:
        found = self.run_networks([], hyper).float()
        sigma, mu = found.chunk(2, 1) if self.config.means else (found, found.new_zeros(()).expand_as(found))
        return mu, sigma, None

    def correct(self, i: int, context: None, y_hat: Tensor) -> Tensor:
        return y_hat


class Hyperprior_VBR(VariableRate, Hyperprior):
    """A zoo model made variable-rate by two LAEs (TCSVT 2025). Arguments as Hyperprior."""
