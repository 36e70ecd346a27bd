"""TCM (CVPR 2023, arXiv 2303.14978) and its variable-rate form TCM_VBR (TCSVT 2025).

Data has one way through: image → `analyze` → latent y → `h_a` → z → slice walk → ŷ → `synthesize`.
The slice walk exists once; `models.coding` says what happens to a slice on the way: its likelihoods
are estimated, its symbols written, or its symbols read. TCM_VBR overrides analysis and synthesis alone.
"""

import contextlib
import hashlib
from collections.abc import Callable, Iterator, Sequence

import torch
from compressai.entropy_models import EntropyBottleneck, GaussianConditional
from compressai.layers import ResidualBlockUpsample, ResidualBlockWithStride, conv3x3, subpel_conv3x3
from compressai.models import CompressionModel
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from models import STRIDE
from models.coding import (
    CodingTables,
    Decode,
    Encode,
    Estimate,
    Quantised,
    Surrogate,
    likelihood_of_z,
    open_stream,
    ste_round,
    to_symbols,
)
from models.guard import DecodingError, Guard
from models.layers import ConvTransBlock, SWAtten
from models.sensitive import EPSILON, crc_of, guard_rows, table_index
from models.state_dict import empty_tables, explain_mismatch, infer_arguments, normalise
from utils.lambdas import check_index, draw_index

__all__ = ["LAE", "PRESETS", "TCM", "TCM_VBR", "fcn", "mask"]

PRESETS = {
    "full": {},
    "small": dict(
        N=32,
        M=192,
        num_slices=4,
        max_support_slices=4,
        head_dim=(8, 16, 16, 16, 16, 8),
        hyper_channels=128,
        inter_dim=64,
        slice_widths=(128, 96),
    ),
}


def _transforms(in_ch: int, widths: Sequence[int], out_ch: int) -> nn.Sequential:
    """The 3×3 convolutions that predict a slice's μ, σ or residual: in → widths[0] → widths[1] → out."""
    first, second = widths
    return nn.Sequential(
        conv3x3(in_ch, first), nn.GELU(), conv3x3(first, second), nn.GELU(), conv3x3(second, out_ch)
    )


class TCM(CompressionModel):
    """Mixed transformer-CNN image codec with channel-wise autoregression, at one fixed rate.

    Args:
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

    def __init__(
        self,
        config: Sequence[int] = (2, 2, 2, 2, 2, 2),
        head_dim: Sequence[int] = (8, 16, 32, 32, 16, 8),
        drop_path_rate: float = 0,
        N: int = 64,
        M: int = 320,
        num_slices: int = 5,
        max_support_slices: int = 5,
        hyper_channels: int = 192,
        inter_dim: int | None = 128,
        slice_widths: Sequence[int] = (224, 128),
    ) -> None:
        super().__init__()
        # Kept as plain values: a checkpoint stores them and rebuilds the model from them.
        self.arguments = dict(
            config=list(config),
            head_dim=list(head_dim),
            drop_path_rate=float(drop_path_rate),
            N=N,
            M=M,
            num_slices=num_slices,
            max_support_slices=max_support_slices,
            hyper_channels=hyper_channels,
            inter_dim=inter_dim,
            slice_widths=list(slice_widths),
        )
        _check_arguments(**self.arguments)
        self.N, self.M = N, M
        self.num_slices, self.max_support_slices = num_slices, max_support_slices
        rates = torch.linspace(0, drop_path_rate, sum(config)).tolist()
        drops = [[rates.pop(0) for _ in range(count)] for count in config]

        def blocks(drop: Sequence[float], d: int, p: int) -> list[nn.Module]:
            return [ConvTransBlock(N, N, d, p, rate, ("W", "SW")[i % 2]) for i, rate in enumerate(drop)]

        def stage(i: int) -> list[nn.Module]:
            return blocks(drops[i], head_dim[i], 8)

        def hyper_stage(i: int) -> list[nn.Module]:
            return blocks([0.0] * config[i], 32, 4)

        def hyper_synthesis() -> nn.Sequential:
            up = ResidualBlockUpsample(hyper_channels, 2 * N, 2)
            return nn.Sequential(up, *hyper_stage(3), subpel_conv3x3(2 * N, M, 2))

        self.g_a = nn.Sequential(
            ResidualBlockWithStride(3, 2 * N, 2),
            *stage(0),
            ResidualBlockWithStride(2 * N, 2 * N, 2),
            *stage(1),
            ResidualBlockWithStride(2 * N, 2 * N, 2),
            *stage(2),
            _Float32Conv(2 * N, M, kernel_size=3, stride=2, padding=1),
        )
        self.g_a[0].skip = _SubsampledConv(3, 2 * N, kernel_size=1)
        self.g_s = nn.Sequential(
            ResidualBlockUpsample(M, 2 * N, 2),
            *stage(3),
            ResidualBlockUpsample(2 * N, 2 * N, 2),
            *stage(4),
            ResidualBlockUpsample(2 * N, 2 * N, 2),
            *stage(5),
            subpel_conv3x3(2 * N, 3, 2),
        )
        self.h_a = nn.Sequential(
            ResidualBlockWithStride(M, 2 * N, 2), *hyper_stage(0), conv3x3(2 * N, hyper_channels, stride=2)
        )
        self.h_mean_s, self.h_scale_s = hyper_synthesis(), hyper_synthesis()

        step = M // num_slices
        widths = [M + step * min(i, max_support_slices) for i in range(num_slices)]

        def attention() -> nn.ModuleList:
            return nn.ModuleList(nn.Sequential(SWAtten(w, w, 16, 8, 0, inter_dim)) for w in widths)

        def transforms(extra: int = 0) -> nn.ModuleList:
            return nn.ModuleList(_transforms(w + extra, slice_widths, step) for w in widths)

        self.atten_mean, self.atten_scale = attention(), attention()
        self.cc_mean_transforms, self.cc_scale_transforms = transforms(), transforms()
        self.lrp_transforms = transforms(extra=step)
        self.entropy_bottleneck = EntropyBottleneck(hyper_channels)
        self.gaussian_conditional = GaussianConditional(None)
        self._tables: tuple[CodingTables, CodingTables] | None = None
        self._fingerprint: bytes | None = None
        self.epsilon = EPSILON  # how near a boundary of the scale table σ has to be for a file to list it
        self.checkpointing = False  # gradients by computing every layer twice: a fraction of the memory
        self.metric = "mse"  # what the weights were trained for; a checkpoint says so

    # What TCM_VBR overrides ------------------------------------------------------------------

    def resolve_index(self, index: Tensor | float | None, batch: int) -> Tensor | None:
        """The rate index of each image; a fixed-rate model has none and passes on what it is given."""
        return None if index is None else check_index(index, batch)

    def analyze(self, x: Tensor, index: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Image `[B, 3, H, W]` in [0, 1] to latent y `[B, M, H/16, W/16]` and ln m (of a TCM zero, `[B, 1, 1, 1]`)."""
        return self.modulate(self.features(x), index)

    def modulate(self, y: Tensor, index: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The latent of `features` as the entropy model sees it, and ln m: unchanged, and zero."""
        return y, y.new_zeros(len(y), 1, 1, 1)

    def features(self, x: Tensor) -> Tensor:
        """Image `[B, 3, H, W]` in [0, 1] to the latent of `g_a` `[B, M, H/16, W/16]`, which no rate has scaled yet."""
        return self.g_a(self._formatted(x))

    def synthesize(self, y_hat: Tensor, index: Tensor | None = None) -> Tensor:
        """Quantised latent `[B, M, h, w]` to image `[B, 3, 16h, 16w]`, not clamped."""
        return self._through(self.g_s, y_hat)

    def _through(self, layers: nn.Sequential, x: Tensor) -> Tensor:
        """layers(x); with checkpointing, each keeps no more than its input for the gradients."""
        if not (self.checkpointing and torch.is_grad_enabled()):
            return layers(x)
        for layer in layers:
            x = checkpoint(layer, x, use_reentrant=False)
        return x

    # The one slice walk ----------------------------------------------------------------------

    def walk(self, z_hat: Tensor, coder: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """Channel-wise autoregression: ŷ `[B, M, h, w]` from ẑ `[B, C, h/4, w/4]` and a slice coder.

        Everything that steers entropy coding is computed here, in one memory format whoever asks:
        convolutions may differ in the last bit between formats, and decoding must not.
        """
        z_hat = self._formatted(z_hat)
        means, scales = self.h_mean_s(z_hat), self.h_scale_s(z_hat)
        decoded: list[Tensor] = []
        for i in range(self.num_slices):
            supports = decoded[: self.max_support_slices]
            a_mu = self._through(self.atten_mean[i], torch.cat([means, *supports], 1))
            a_sigma = self._through(self.atten_scale[i], torch.cat([scales, *supports], 1))
            mu = self._through(self.cc_mean_transforms[i], a_mu).float()
            sigma = self._through(self.cc_scale_transforms[i], a_sigma).float()
            y_hat = self._formatted(coder(mu, sigma))
            residual = self._through(self.lrp_transforms[i], torch.cat([a_mu, y_hat], 1))
            decoded.append(y_hat + 0.5 * torch.tanh(residual))
        return torch.cat(decoded, 1)

    # Estimation ------------------------------------------------------------------------------

    def forward(
        self,
        x: Tensor,
        index: Tensor | float | None = None,
        tabled: bool = False,
        noise: tuple[Tensor, Tensor] | None = None,
    ) -> dict:
        """Reconstruction and likelihoods of images `[B, 3, H, W]` in [0, 1], sides multiples of 128.

        Args:
            index: rate index in [0, 5], one or one an image. TCM_VBR draws it when it is omitted in
                training; in evaluation it is required. TCM computes the same whatever it is.
            tabled: likelihoods of y under the coder's table of σ, by the published rule, not under σ itself.
            noise: what is added to y and z for their likelihoods, in place of training's own noise: `noise_shapes`.

        Returns:
            `x_hat` `[B, 3, H, W]` not clamped; `likelihoods` {`y` `[B, M, h, w]`, `z`}; `lmd_index`
            `[B]` (None where TCM was given none); `latent`: y as it enters `h_a`.
        """
        _check_sides(x)
        index = self.resolve_index(index, len(x))
        y, _ = self.analyze(x, index)
        return self._estimate(y, self.h_a(y), index, tabled, noise)

    def forward_fromlatent(
        self,
        y: Tensor,
        z: Tensor,
        index: Tensor | float | None = None,
        tabled: bool = False,
        surrogate: Surrogate | None = None,
    ) -> dict:
        """`forward` from a latent y `[B, M, h, w]` (as `h_a` sees it) and z, as DLM refines them.

        In training mode gradients of rate and distortion reach both. In evaluation mode the likelihoods are those of
        rounded values: the rates of z and of the last slice then have no gradient of their own, unless a surrogate
        of rounding has one. What is rounded is then under `coded_likelihoods`, without gradients.
        """
        return self._estimate(y, z, self.resolve_index(index, len(y)), tabled, surrogate=surrogate)

    def noise_shapes(self, height: int, width: int) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
        """Shapes of y and z of one image."""
        channels = self.arguments["hyper_channels"]
        return (self.M, height // 16, width // 16), (channels, height // 64, width // 64)

    def _estimate(
        self,
        y: Tensor,
        z: Tensor,
        index: Tensor | None,
        tabled: bool = False,
        noise: tuple[Tensor, Tensor] | None = None,
        surrogate: Surrogate | None = None,
    ) -> dict:
        y_hat, rates = self.estimate_rate(y, z, tabled, noise, surrogate)
        return {"x_hat": self.synthesize(y_hat, index), **rates, "lmd_index": index, "latent": y}

    def estimate_rate(
        self,
        y: Tensor,
        z: Tensor,
        tabled: bool = False,
        noise: tuple[Tensor, Tensor] | None = None,
        surrogate: Surrogate | None = None,
    ) -> tuple[Tensor, dict]:
        """The entropy model alone: ŷ `[B, M, h, w]` and its `likelihoods`, as `forward` and `forward_fromlatent` do."""
        noise_y, noise_z = noise or (None, None)
        with torch.autocast(z.device.type, enabled=False):
            z = z.float()
            z_hat = ste_round(z - self.medians) + self.medians
            if surrogate is not None:
                z_likelihoods = likelihood_of_z(self.entropy_bottleneck, surrogate(z - self.medians) + self.medians)
            elif noise_z is not None:
                z_likelihoods = likelihood_of_z(self.entropy_bottleneck, z + noise_z)
            else:
                _, z_likelihoods = self.entropy_bottleneck(z)
        coder = Estimate(self.gaussian_conditional, y, self.num_slices, tabled, noise_y, surrogate)
        # In evaluation with the arithmetic of coding: what is estimated is what a file has.
        with contextlib.nullcontext() if self.training else repeatable():
            y_hat = self.walk(z_hat, coder)
        out = {"likelihoods": {"y": coder.likelihoods(), "z": z_likelihoods}}
        if surrogate is not None:
            with torch.no_grad():
                of_z = likelihood_of_z(self.entropy_bottleneck, z_hat)
            out["coded_likelihoods"] = {"y": coder.likelihoods_of_symbols(), "z": of_z}
        return y_hat, out

    # Coding ----------------------------------------------------------------------------------

    @torch.no_grad()
    def compress(self, x: Tensor, index: Tensor | float | None = None, guarded: bool = False) -> dict:
        """Code images `[B, 3, H, W]`.

        Args:
            guarded: for decoding on another machine too; otherwise by the published rule.

        Returns:
            `strings`: [y_strings, z_strings], a bytes object an image; `shape`: (h, w) of z; `guards`: what
            `decompress` then needs as well, one an image, or None; `m_y`: `[B]`, mean ln m of the analysis LAE.
        """
        _check_sides(x)
        index = self.resolve_index(index, len(x))
        y, log_m = self.analyze(x, index)
        return self.code(self.quantise(y, self.h_a(y), guarded)) | {"m_y": log_m.mean((1, 2, 3))}

    @torch.no_grad()
    def test_fromlatent(
        self, y: Tensor, z: Tensor, index: Tensor | float | None = None, guarded: bool = False
    ) -> dict:
        """Code a latent for real: as `compress`, with `x_hat` as `decompress` of it."""
        index = self.resolve_index(index, len(y))
        quantised = self.quantise(y, z, guarded)
        return self.code(quantised) | {"x_hat": self.synthesize(quantised.y_hat, index).clamp_(0, 1)}

    @torch.no_grad()
    def decompress(
        self,
        strings: list[list[bytes]],
        shape: Sequence[int],
        index: Tensor | float | None = None,
        guards: list[Guard] | None = None,
    ) -> dict:
        """`x_hat` `[B, 3, H, W]` in [0, 1] from what `compress` returned.

        Without guards, decode in the batch, and on the machine, that encoded: the last bits of a convolution
        depend on both, and a σ on the boundary of two table rows would be read with the other one.

        Args:
            guards: where `compress` returned some, these.

        Raises:
            DecodingError: a stream is too short for the shape, or (with guards) the symbols are not those encoded.
        """
        y_strings, z_strings = strings
        index = self.resolve_index(index, len(y_strings))
        y_tables, z_tables = self.tables
        rows = self._z_rows(shape)
        if 8 * min(map(len, z_strings)) < 0.99 * z_tables.fewest_bits(rows) - 64:
            raise DecodingError("the streams are too short for a picture of this size")
        z = torch.stack([z_tables.decode(open_stream(s, rows.numel()), rows) for s in z_strings])
        z_hat = z.to(self.medians.device).type_as(self.medians) + self.medians
        latent = (self.M, 4 * shape[0], 4 * shape[1])
        crcs = [crc_of(symbols) for symbols in z]
        coder = Decode(self.gaussian_conditional, y_tables, y_strings, latent, guards, crcs)
        with repeatable():
            y_hat = self.walk(z_hat, coder)
        if guards and [guard.crc for guard in guards] != coder.crcs:
            raise DecodingError("decoding went wrong: these are not the symbols that were encoded")
        return {"x_hat": self.synthesize(y_hat, index).clamp_(0, 1)}

    @torch.no_grad()
    def quantise(self, y: Tensor, z: Tensor, guarded: bool = True) -> Quantised:
        """The symbols of latents y `[B, M, h, w]` (as `h_a` sees it) and z, and their table rows: all that is coded."""
        rounded = torch.round(z - self.medians)
        coder = Encode(y, self.num_slices)
        with repeatable():
            y_hat = self.walk(rounded + self.medians, coder)
        z_symbols, symbols, sigma = to_symbols(rounded), coder.symbols, coder.sigma
        if not guarded:
            rows = table_index(self.gaussian_conditional, sigma).cpu()
            return Quantised(symbols, rows, z_symbols, sigma, y_hat, None)
        lengths = self.tables[0].code_lengths
        all_rows, guards = [], []
        for of_z, of_y, scales in zip(z_symbols, symbols, sigma, strict=True):
            parts = lengths, of_y.flatten(), scales.flatten()
            rows, listed = guard_rows(self.gaussian_conditional, *parts, self.epsilon)
            all_rows.append(rows.view(of_y.shape))
            guards.append(Guard(listed, crc_of(of_y, crc_of(of_z))))
        return Quantised(symbols, torch.stack(all_rows), z_symbols, sigma, y_hat, guards)

    def count_bits(self, quantised: Quantised) -> list[float]:
        """Bits of the streams and the guard of each image, without coding them.

        Code lengths under the coding tables; the coder writes whole words and its final states, at most 16 bytes more.
        """
        y_tables, z_tables = self.tables
        z_rows = self._z_rows(quantised.z.shape[-2:])
        counts = [z_tables.count_bits(symbols, z_rows) for symbols in quantised.z]
        for i, guard in enumerate(quantised.guards or ()):
            counts[i] += 8 * len(guard.listed)
        for i, (symbols, rows) in enumerate(zip(quantised.symbols, quantised.rows, strict=True)):
            counts[i] += y_tables.count_bits(symbols, rows)
        return counts

    def code(self, quantised: Quantised) -> dict:
        """`strings`, `shape` and `guards` as `compress` returns them."""
        y_tables, z_tables = self.tables
        z_rows = self._z_rows(quantised.z.shape[-2:])
        pairs = zip(quantised.symbols, quantised.rows, strict=True)
        y_strings = [y_tables.encode(symbols, rows) for symbols, rows in pairs]
        return {
            "strings": [y_strings, [z_tables.encode(symbols, z_rows) for symbols in quantised.z]],
            "shape": tuple(quantised.z.shape[-2:]),
            "guards": quantised.guards,
        }

    def _z_rows(self, shape: Sequence[int]) -> Tensor:
        """Table row of every element of z: its channel. int32 `[C, *shape]`."""
        channels = self.arguments["hyper_channels"]
        return torch.arange(channels, dtype=torch.int32).view(-1, 1, 1).expand(-1, *shape)

    def _formatted(self, x: Tensor) -> Tensor:
        """x in the memory format of the weights, whatever its own: the same input, the same arithmetic."""
        channels_last = self.g_a[-1].weight.is_contiguous(memory_format=torch.channels_last)
        return x.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)

    @property
    def medians(self) -> Tensor:
        """Medians of z, `[1, C, 1, 1]`."""
        return self.entropy_bottleneck.quantiles[:, 0, 1].detach().view(1, -1, 1, 1)

    @property
    def tables(self) -> tuple[CodingTables, CodingTables]:
        """Coding tables of y and z."""
        if self._tables is None:
            self._tables = CodingTables(self.gaussian_conditional), CodingTables(self.entropy_bottleneck)
        return self._tables

    @property
    def fingerprint(self) -> bytes:
        """Eight bytes that tell weights and coding tables from others; of what they were at the first call."""
        if self._fingerprint is None:
            digest = hashlib.blake2b(repr(self.arguments).encode(), digest_size=8)
            for name, tensor in sorted(self.state_dict().items()):
                digest.update(name.encode())
                digest.update(tensor.detach().cpu().contiguous().view(-1).numpy())
            self._fingerprint = digest.digest()
        return self._fingerprint

    def prepare(self) -> None:
        """Make the coding tables and the fingerprint now, not within the seconds of the first picture."""
        _ = self.tables, self.fingerprint

    def update(self, *args, **kwargs) -> bool:
        """Compute the coding tables (CompressAI); needed once after training."""
        self._tables = self._fingerprint = None
        return super().update(*args, **kwargs)

    # Weights ---------------------------------------------------------------------------------

    def load_state_dict(self, state_dict: dict, strict: bool = True):
        """Load published or own weights: see `models.state_dict` for the forms that are understood.

        Raises:
            ValueError: one line that names what is missing, unknown or of another shape.
        """
        state_dict = normalise(state_dict, self)
        if strict and (problem := explain_mismatch(state_dict, self)):
            raise ValueError(f"these weights do not fit {type(self).__name__}: {problem}")
        self._tables = self._fingerprint = None
        empty_tables(self)
        return super().load_state_dict(state_dict, strict=strict)

    @classmethod
    def from_state_dict(cls, state_dict: dict) -> "TCM":
        """The model, of any size, that a state dict belongs to, with its weights, in evaluation mode."""
        state_dict = normalise(state_dict)
        model = cls(**infer_arguments(state_dict))
        model.load_state_dict(state_dict)
        return model.eval()


@contextlib.contextmanager
def repeatable() -> Iterator[None]:
    """Full float32 (TF32's ten bits, or oneDNN's bfloat16, would steer the decoder), and on a GPU no kernels chosen by
    how fast they ran."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
            yield
    finally:
        torch.set_float32_matmul_precision(precision)


class _SubsampledConv(nn.Conv2d):
    """A 1×1 convolution of stride 2, as one of stride 1 on every other pixel.

    The same numbers; but oneDNN's weight gradient of the strided one writes past its buffer on
    channels-last images of 3 channels (AVX-512, torch 2.15: memory corruption in training).
    """

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x[:, :, ::2, ::2])


class _Float32Conv(nn.Conv2d):
    """A convolution in float32 under autocast too: what it makes is rounded to whole numbers, and bfloat16 has steps
    of one from 128 on."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(x.float())


class fcn(nn.Module):
    """f_λ: n linear layers from the rate index `[B, 1]` to M logits `[B, M]`, zero at the start."""

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
    """ln m = softsign(f_λ(λ) + α · attn(y)), in (−1, 1), for a latent `[B, M, h, w]` (TCSVT 2025)."""

    def __init__(self, n: int, M: int) -> None:
        super().__init__()
        self.lmd_map = fcn(n, M)
        self.latent_attn = ConvTransBlock(M // 2, M // 2, 32, 4, 0, "SW")
        self.alpha = nn.Parameter(torch.zeros(1))

    def content(self, y: Tensor) -> Tensor:
        """α · attn(y): what the logits owe to the latent, whatever the rate; of y's shape."""
        return self.alpha * self.latent_attn(y)

    def rate(self, index: Tensor) -> Tensor:
        """f_λ: what they owe to the rate indices `[B]`; `[B, M, 1, 1]`. In float32 under autocast too: bfloat16's m
        would be off by up to 0.4 %, half a step where the latent is 128."""
        with torch.autocast(self.alpha.device.type, enabled=False):
            return self.lmd_map(index.to(self.alpha).view(-1, 1))[:, :, None, None]

    def forward(self, y: Tensor, index: Tensor) -> Tensor:
        return F.softsign(self.rate(index) + self.content(y))


class LAE(nn.Module):
    """Latent-domain auto-encoder: y · m and ln m, with m = exp(ln m) in (1/e, e); identity at the start."""

    def __init__(self, n: int, M: int) -> None:
        super().__init__()
        self.mask = mask(n, M)

    def forward(self, y: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        log_m = self.mask(y, index)
        return y * log_m.exp(), log_m


class TCM_VBR(TCM):
    """TCM made variable-rate by an LAE after analysis and another before synthesis (TCSVT 2025).

    Arguments as TCM. Everything between the two sees the scaled latent. A TCM's weights can be
    loaded: the LAEs then stay at identity, and the output is the TCM's at every index.
    """

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.modnet_ga, self.modnet_gs = LAE(2, self.M), LAE(2, self.M)

    def resolve_index(self, index: Tensor | float | None, batch: int) -> Tensor:
        """As `check_index`; drawn per sample when omitted in training. ValueError when omitted in evaluation."""
        if index is None:
            if not self.training:
                raise ValueError("a variable-rate model needs a rate index in evaluation: forward(x, index)")
            index = draw_index(batch)
        return check_index(index, batch)

    def modulate(self, y: Tensor, index: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """y · m and ln m, both `[B, M, H/16, W/16]`."""
        return self.modnet_ga(y, index)

    def synthesize(self, y_hat: Tensor, index: Tensor | None = None) -> Tensor:
        return super().synthesize(self.modnet_gs(y_hat, index)[0], index)

    def load_state_dict(self, state_dict: dict, strict: bool = True):
        state_dict = normalise(state_dict, self)
        if not any(name.startswith("modnet_") for name in state_dict):
            identity = LAE(2, self.M).state_dict()
            for lae in ("modnet_ga", "modnet_gs"):
                state_dict |= {f"{lae}.{name}": value for name, value in identity.items()}
        return super().load_state_dict(state_dict, strict)


def _check_sides(x: Tensor) -> None:
    if x.dim() != 4 or x.shape[1] != 3 or x.shape[2] % STRIDE or x.shape[3] % STRIDE or x.numel() == 0:
        raise ValueError(f"images must be [B, 3, H, W] with sides that are multiples of {STRIDE}, not {list(x.shape)}")


def _check_arguments(
    config: Sequence[int],
    head_dim: Sequence[int],
    drop_path_rate: float,
    N: int,
    M: int,
    num_slices: int,
    max_support_slices: int,
    hyper_channels: int,
    inter_dim: int | None,
    slice_widths: Sequence[int],
) -> None:
    def need(condition: bool, text: str) -> None:
        if not condition:
            raise ValueError(text)

    need(len(config) == 6 and min(config) >= 0, f"config must be six counts >= 0, not {config}")
    need(len(head_dim) == 6 and min(head_dim) > 0, f"head_dim must be six widths > 0, not {head_dim}")
    need(0 <= drop_path_rate < 1, f"drop_path_rate must lie in [0, 1), not {drop_path_rate}")
    need(N > 0 and N % 32 == 0, f"N must be a positive multiple of 32, not {N}")
    need(M > 0 and M % 64 == 0, f"M/2 must be a positive multiple of 32, not {M}/2")
    need(all(N % d == 0 for d in head_dim), f"every head_dim must divide N = {N}, not {head_dim}")
    need(num_slices > 0 and M % num_slices == 0, f"num_slices must divide M = {M}, not {num_slices}")
    need(
        0 <= max_support_slices <= num_slices,
        f"max_support_slices must lie in [0, num_slices = {num_slices}], not {max_support_slices}",
    )
    need(hyper_channels > 0, f"hyper_channels must be positive, not {hyper_channels}")
    need(len(slice_widths) == 2 and min(slice_widths) > 0, f"slice_widths must be two widths > 0, not {slice_widths}")
    if inter_dim is None:
        step = M // num_slices if max_support_slices and num_slices > 1 else 0
        need(step % 16 == 0, f"without inter_dim, M/num_slices must be a multiple of 16, not {step}")
    else:
        need(inter_dim > 0 and inter_dim % 16 == 0, f"inter_dim must be a positive multiple of 16, not {inter_dim}")
