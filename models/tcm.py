"""TCM (CVPR 2023, arXiv 2303.14978) and its variable-rate form TCM_VBR (TCSVT 2025).

Data has one way through: image → `analyze` → latent y → `h_a` → z → `run_slices` → ŷ → `synthesize`. The slice loop
exists once; a slice coder (models/slice_coders.py) estimates the bits of each slice, writes its symbols, or reads
them. TCM_VBR overrides what happens to the latent after `g_a` and before `g_s`.
"""

import contextlib
import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict

import torch
from compressai.entropy_models import EntropyBottleneck, GaussianConditional
from compressai.layers import ResidualBlockUpsample, ResidualBlockWithStride, conv3x3, subpel_conv3x3
from compressai.models import CompressionModel
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from models import STRIDE
from models.bands import KEPT, Recomputed, band_rows, gather, in_bands, latent_rows, rows_of, scaled_height, with_rows
from models.coding_tables import CodingTables, open_stream
from models.config import PRESETS, TCMConfig
from models.device import send
from models.lambdas import MAX_INDEX, check_index
from models.layers import ConvTransBlock, SWAtten
from models.portable import EPSILON, crc_of
from models.precision import deterministic
from models.side_info import DecodingError, SideInfo
from models.slice_coders import (
    ERROR_BITS,
    Choice,
    QuantizedLatents,
    SliceDecoder,
    SliceEncoder,
    SliceEstimator,
    Surrogate,
    choose_symbols,
    likelihood_of_z,
    nearest_symbols,
    ste_round,
)
from models.state_dict import empty_tables, explain_mismatch, infer_config, normalize

__all__ = ["LAE", "PRESETS", "TCM", "TCM_VBR", "TCMConfig", "fcn", "mask"]

# In [0, 5]: one for all images, one per image `[B]`, or one per place `[B, 1, h, w]` on the grid of the latent.
RateIndex = Tensor | float | None
Noise = tuple[Tensor, Tensor] | None  # added to y and to z


def _slice_transforms(in_ch: int, widths: Sequence[int], out_ch: int) -> nn.Sequential:
    """The 3×3 convolutions that predict μ, σ or the residual of a slice: in → widths[0] → widths[1] → out."""
    first, second = widths
    return nn.Sequential(conv3x3(in_ch, first), nn.GELU(), conv3x3(first, second), nn.GELU(), conv3x3(second, out_ch))


class TCM(CompressionModel):
    """Mixed transformer-CNN image codec with channel-wise autoregression, at one fixed rate.

    Args: a `TCMConfig`, or its fields by position or name, which is the published form of the call.

    Attributes:
        config: the architecture.
        metric: "mse" or "ms-ssim", the distortion that the weights were trained for.
        epsilon: how close to a boundary of the scale table a σ must be for a file to list its position.
        checkpointing: compute gradients by running every layer twice, in a fraction of the memory.

    Raises:
        ValueError: naming the constraint that does not hold.
    """

    def __init__(self, *args, **kwargs) -> None:
        super().__init__()
        self.config = c = args[0] if args and isinstance(args[0], TCMConfig) else TCMConfig(*args, **kwargs)
        config, head_dim, N, M, num_slices = c.config, c.head_dim, c.N, c.M, c.num_slices
        self.N, self.M = N, M
        self.num_slices, self.max_support_slices = num_slices, c.max_support_slices
        rates = torch.linspace(0, c.drop_path_rate, sum(config)).tolist()
        drops = [[rates.pop(0) for _ in range(count)] for count in config]

        def stage(i: int, hyper: bool = False) -> list[nn.Module]:
            d, p, drop = (32, 4, [0.0] * config[i]) if hyper else (head_dim[i], 8, drops[i])
            return [ConvTransBlock(N, N, d, p, rate, ("W", "SW")[n % 2]) for n, rate in enumerate(drop)]

        def hyper_synthesis() -> nn.Sequential:
            up = ResidualBlockUpsample(c.hyper_channels, 2 * N, 2)
            return nn.Sequential(up, *stage(3, hyper=True), subpel_conv3x3(2 * N, M, 2))

        self.g_a = nn.Sequential(
            ResidualBlockWithStride(3, 2 * N, 2), *stage(0),
            ResidualBlockWithStride(2 * N, 2 * N, 2), *stage(1),
            ResidualBlockWithStride(2 * N, 2 * N, 2), *stage(2),
            _Float32Conv(2 * N, M, kernel_size=3, stride=2, padding=1),
        )
        self.g_a[0].skip = _SubsampledConv(3, 2 * N, kernel_size=1)
        self.g_s = nn.Sequential(
            ResidualBlockUpsample(M, 2 * N, 2), *stage(3),
            ResidualBlockUpsample(2 * N, 2 * N, 2), *stage(4),
            ResidualBlockUpsample(2 * N, 2 * N, 2), *stage(5),
            subpel_conv3x3(2 * N, 3, 2),
        )
        self.h_a = nn.Sequential(
            ResidualBlockWithStride(M, 2 * N, 2), *stage(0, hyper=True), conv3x3(2 * N, c.hyper_channels, stride=2)
        )
        self.h_mean_s, self.h_scale_s = hyper_synthesis(), hyper_synthesis()

        step = M // num_slices
        widths = [M + step * min(i, c.max_support_slices) for i in range(num_slices)]

        def attention() -> nn.ModuleList:
            return nn.ModuleList(nn.Sequential(SWAtten(w, w, 16, 8, 0, c.inter_dim)) for w in widths)

        def transforms(extra: int = 0) -> nn.ModuleList:
            return nn.ModuleList(_slice_transforms(w + extra, c.slice_widths, step) for w in widths)

        self.atten_mean, self.atten_scale = attention(), attention()
        self.cc_mean_transforms, self.cc_scale_transforms = transforms(), transforms()
        self.lrp_transforms = transforms(extra=step)
        self.entropy_bottleneck = EntropyBottleneck(c.hyper_channels)
        self.gaussian_conditional = GaussianConditional(None)
        self._tables: tuple[CodingTables, CodingTables] | None = None
        self._fingerprint: bytes | None = None
        self.epsilon, self.checkpointing, self.metric = EPSILON, False, "mse"

    @property
    def arguments(self) -> dict:
        """Plain values that rebuild the model, `type(model)(**model.arguments)`; a checkpoint stores them."""
        return asdict(self.config)

    # What TCM_VBR overrides ------------------------------------------------------------------

    def resolve_index(self, index: RateIndex, batch: int) -> Tensor | None:
        """The rate index as `check_index` returns it; None stays None, as a fixed-rate model needs no index."""
        return None if index is None else check_index(index, batch)

    def analyze(self, x: Tensor, index: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Image `[B, 3, H, W]` in [0, 1] to latent y `[B, M, H/16, W/16]` and ln m (zero `[B, 1, 1, 1]` for a TCM)."""
        return self.modulate(self.features(x), index)

    def modulate(self, y: Tensor, index: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The latent of `features` as the entropy model sees it, and ln m. A TCM leaves it unchanged: ln m is zero."""
        return y, y.new_zeros(len(y), 1, 1, 1)

    def features(self, x: Tensor) -> Tensor:
        """Image `[B, 3, H, W]` in [0, 1] to the output of `g_a` `[B, M, H/16, W/16]`, before any scaling by m."""
        return self.g_a(self._in_weight_format(x))

    def synthesize(self, y_hat: Tensor, index: Tensor | None = None) -> Tensor:
        """Quantized latent `[B, M, h, w]` to image `[B, 3, 16h, 16w]`, not clamped."""
        return self._through([self.g_s], y_hat)

    def _through(self, networks: Sequence[nn.Sequential], *parts: Tensor | Recomputed, stride: int = 1) -> Tensor:
        """What a chain of networks makes of tensors, joined along their channels.

        With checkpointing each layer keeps only its input for the gradients. Without gradients latents beyond
        `bands.LATENTS` go through in bands.

        Args:
            stride: rows of the latent y for each of their rows.
        """
        height, width = parts[0].shape[2:]
        if rows := self._rows_of_bands(height, width, stride):
            return gather(in_bands(networks, rows_of(parts, rows), height), scaled_height(networks, height))
        x = torch.cat(parts, 1) if len(parts) > 1 else parts[0]
        for network in networks:
            if self.checkpointing and torch.is_grad_enabled():
                for layer in network:
                    x = checkpoint(layer, x, use_reentrant=False)
            else:
                x = network(x)  # as a whole, which may be compiled
        return x

    @staticmethod
    def _rows_of_bands(height: int, width: int, stride: int) -> int | None:
        """Rows of the bands in which `_through` computes; None where it computes all at once, as with gradients."""
        rows = latent_rows(stride * width) // stride
        return rows if rows < height and not torch.is_grad_enabled() else None

    # Large pictures, in bands of rows --------------------------------------------------------

    def band_rows(self, width: int, height: int) -> int:
        """Rows of the bands in which a picture of this size is best computed: all of them up to two megapixels."""
        return band_rows(width, height, 2 * self.N, self.medians.device)

    @torch.no_grad()
    def features_of_bands(self, bands: Iterable[Tensor], height: int) -> Tensor:
        """`features` of an image of this height, a multiple of 128, that comes in bands `[B, 3, rows, W]`."""
        return gather(in_bands(self.g_a, map(self._in_weight_format, bands), height), height // 16)

    @torch.no_grad()
    def synthesize_bands(self, y_hat: Tensor, index: Tensor | None, rows: int) -> Iterator[Tensor]:
        """`synthesize` in bands, computed from bands of so many rows of the image, a multiple of 128."""
        yield from in_bands(self.g_s, self.demodulate_bands(y_hat, index, rows // 16), y_hat.shape[2])

    def demodulate_bands(self, y_hat: Tensor, index: Tensor | None, rows: int) -> Iterator[Tensor]:
        """A quantized latent `[B, M, h, w]` as `g_s` sees it, in bands of about so many rows."""
        return rows_of([y_hat], rows)

    # The slice loop --------------------------------------------------------------------------

    def run_slices(
        self, z_hat: Tensor, coder: Callable[[Tensor, Tensor], Tensor], complete: bool = True
    ) -> Tensor | None:
        """Channel-wise autoregression: ŷ `[B, M, h, w]` from ẑ `[B, C, h/4, w/4]` and a slice coder.

        Everything that steers entropy coding is computed here, always in the memory format of the weights:
        convolutions may differ in the last bit between formats, and decoding must not.

        Args:
            complete: compute ŷ. Without it, for a coder that only wants μ and σ, the result is None.
        """
        z_hat = self._in_weight_format(z_hat)
        means, scales = (self._hyper_synthesis(network, z_hat) for network in (self.h_mean_s, self.h_scale_s))
        decoded: list[Tensor] = []
        for i in range(self.num_slices):
            supports = decoded[: self.max_support_slices]
            sigma = self._through([self.atten_scale[i], self.cc_scale_transforms[i]], scales, *supports).float()
            if i == self.num_slices - 1 and not complete:
                mu = self._through([self.atten_mean[i], self.cc_mean_transforms[i]], means, *supports).float()
                del means, scales, supports, decoded  # no slice follows; the coder has their room
                coder(mu, sigma)
                return None
            a_mu = self._through([self.atten_mean[i]], means, *supports)
            mu = self._through([self.cc_mean_transforms[i]], a_mu).float()
            y_hat = self._in_weight_format(coder(mu, sigma))
            del mu, sigma  # of a large picture each is hundreds of megabytes, and so is what follows
            residual = self._through([self.lrp_transforms[i]], a_mu, y_hat)
            del a_mu
            decoded.append(y_hat + 0.5 * torch.tanh(residual))
            del y_hat, residual
        del means, scales
        return torch.cat(decoded, 1)

    def _hyper_synthesis(self, network: nn.Sequential, z_hat: Tensor) -> Tensor | Recomputed:
        """What the slices read of ẑ, `[B, M, h, w]`. Beyond `bands.KEPT` it is computed anew for every slice."""
        height, width = z_hat.shape[2:]
        rows = self._rows_of_bands(height, width, stride=4)
        if rows and 16 * height * width > KEPT:
            return Recomputed(network, z_hat, rows)
        return self._through([network], z_hat, stride=4)

    # Estimation ------------------------------------------------------------------------------

    def forward(self, x: Tensor, index: RateIndex = None, noise: Noise = None) -> dict:
        """Reconstruction and likelihoods of images `[B, 3, H, W]` in [0, 1], sides multiples of 128.

        Args:
            index: TCM_VBR draws it at random when it is omitted in training, and requires it in evaluation. TCM
                ignores it.
            noise: added to y and z for their likelihoods, of the `noise_shapes`; None draws it in training.

        Returns:
            `x_hat` `[B, 3, H, W]` not clamped; `likelihoods` {`y` `[B, M, h, w]`, `z`}; `lmd_index`
            `[B]` or `[B, 1, h, w]` (None for a TCM without one); `latent`: y as it enters `h_a`.
        """
        _check_sides(x)
        index = self.resolve_index(index, len(x))
        y, _ = self.analyze(x, index)
        return self._reconstruct(y, self.h_a(y), index, noise=noise)

    def forward_fromlatent(
        self, y: Tensor, z: Tensor, index: RateIndex = None, use_scale_table: bool = False,
        surrogate: Surrogate | None = None, noise: Noise = None, choose: Choice = nearest_symbols,
    ) -> dict:
        """`forward` from a latent y `[B, M, h, w]` (as `h_a` sees it) and z, as DLM refines them.

        In training mode gradients of rate and distortion reach both. In evaluation mode the likelihoods are those of
        rounded values, and rounding stops the gradient of the rate of z and of each slice; what is left comes through
        the μ and σ of later slices. With a surrogate of rounding they have gradients, and `coded_likelihoods` are those
        of the rounded values. `use_scale_table` and `choose` are those of `SliceEstimator`.
        """
        return self._reconstruct(y, z, self.resolve_index(index, len(y)), use_scale_table, surrogate, noise, choose)

    def _reconstruct(
        self, y: Tensor, z: Tensor, index: Tensor | None, use_scale_table: bool = False,
        surrogate: Surrogate | None = None, noise: Noise = None, choose: Choice = nearest_symbols,
    ) -> dict:
        y_hat, rates = self.estimate_rate(y, z, use_scale_table, surrogate, noise, choose)
        return {"x_hat": self.synthesize(y_hat, index), **rates, "lmd_index": index, "latent": y}

    def noise_shapes(self, height: int, width: int) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
        """Shapes of y and z of one image."""
        channels = self.config.hyper_channels
        return (self.M, height // 16, width // 16), (channels, height // 64, width // 64)

    def estimate_rate(
        self, y: Tensor, z: Tensor, use_scale_table: bool = False,
        surrogate: Surrogate | None = None, noise: Noise = None, choose: Choice = nearest_symbols,
    ) -> tuple[Tensor, dict]:
        """The entropy model alone: ŷ `[B, M, h, w]`, and the `likelihoods` as `forward_fromlatent` returns them."""
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
        parts = self.gaussian_conditional, y, self.num_slices
        coder = SliceEstimator(*parts, use_scale_table, noise_y, surrogate, choose)
        # Evaluation uses the arithmetic of coding, so that symbols are those of a file.
        with contextlib.nullcontext() if self.training else deterministic():
            y_hat = self.run_slices(z_hat, coder)
        out = {"likelihoods": {"y": torch.cat(coder.likelihoods, 1), "z": z_likelihoods}}
        if surrogate is not None:
            with torch.no_grad():
                rounded_z = likelihood_of_z(self.entropy_bottleneck, z_hat)
            out["coded_likelihoods"] = {"y": torch.cat(coder.rounded_likelihoods, 1), "z": rounded_z}
        return y_hat, out

    # Coding ----------------------------------------------------------------------------------

    @torch.no_grad()
    def compress(self, x: Tensor, index: RateIndex = None, portable: bool = False) -> dict:
        """Code images `[B, 3, H, W]`.

        Args:
            portable: add the side information that decoding on another machine needs; without it the coding
                tables are selected by the published rule.

        Returns:
            `strings`: [y_strings, z_strings], one bytes object per image each; `shape`: (h, w) of z; `side_info`: one
            per image, or None; `m_y`: `[B]`, mean ln m of the analysis LAE.
        """
        _check_sides(x)
        index = self.resolve_index(index, len(x))
        y, log_m = self.analyze(x, index)
        return self.encode_symbols(self.quantize(y, self.h_a(y), portable)) | {"m_y": log_m.mean((1, 2, 3))}

    @torch.no_grad()
    def decompress(
        self, strings: list[list[bytes]], shape: Sequence[int], index: RateIndex = None,
        side_info: list[SideInfo] | None = None,
    ) -> dict:
        """`x_hat` `[B, 3, H, W]` in [0, 1] from what `compress` returned.

        Without side information, decode in the batch, and on the machine, that encoded: the last bits of a
        convolution depend on both, and a σ on a boundary of the scale table would select another row.

        Raises:
            DecodingError: a stream is too short for the shape, or (with side information) the decoded symbols are
                not those that were encoded.
        """
        index = self.resolve_index(index, len(strings[0]))
        y_hat = self.decode_latents(strings, shape, side_info)
        return {"x_hat": self.synthesize(y_hat, index).clamp_(0, 1)}

    @torch.no_grad()
    def decode_latents(
        self, strings: list[list[bytes]], shape: Sequence[int], side_info: list[SideInfo] | None = None
    ) -> Tensor:
        """ŷ `[B, M, h, w]` of what `compress` returned; arguments and errors are those of `decompress`."""
        y_strings, z_strings = strings
        y_tables, z_tables = self.coding_tables
        z_indexes = self._z_indexes(shape)
        if 8 * min(map(len, z_strings)) < 0.99 * z_tables.fewest_bits(z_indexes) - 64:
            raise DecodingError("the streams are too short for a picture of this size")
        z = torch.stack([z_tables.decode(open_stream(s, z_indexes.numel()), z_indexes) for s in z_strings])
        z_hat = z.to(self.medians.device).type_as(self.medians) + self.medians
        crcs = [crc_of(symbols) for symbols in z]
        y_count = self.M * 4 * shape[0] * 4 * shape[1]
        coder = SliceDecoder(self.gaussian_conditional, y_tables, y_strings, y_count, side_info, crcs)
        with deterministic():
            y_hat = self.run_slices(z_hat, coder)
        if side_info and [info.crc for info in side_info] != coder.crcs:
            raise DecodingError("decoding went wrong: these are not the symbols that were encoded")
        return y_hat

    @torch.no_grad()
    def quantize(
        self, y: Tensor | list[Tensor], z: Tensor, portable: bool = True, complete: bool = False,
        choose: Choice = nearest_symbols,
    ) -> QuantizedLatents:
        """The symbols of latents y `[B, M, h, w]` (as `h_a` sees it) and z, with the table indexes that code them.

        Args:
            y: or the list of its slices in float32, `[B, M/S, h, w]` each, which is used up slice by slice.
            complete: compute ŷ as well, which no file needs.
            choose: makes the symbols of y.
        """
        rounded, parts = torch.round(z - self.medians), (self.gaussian_conditional, self.coding_tables[0])
        slices = y if isinstance(y, list) else list(y.float().chunk(self.num_slices, 1))
        coder = SliceEncoder(*parts, slices, rounded, self.epsilon if portable else None, choose)
        with deterministic():
            y_hat = self.run_slices(rounded + self.medians, coder, complete)
        return coder.finish(y_hat)

    def choose_symbols(self, residual: Tensor, sigma: Tensor) -> Tensor:
        """Symbols for rate and distortion together, by the coding tables and ERROR_BITS; shapes as in the function."""
        return choose_symbols(residual, sigma, self.gaussian_conditional, self.coding_tables[0], ERROR_BITS)

    def count_bits(self, quantized: QuantizedLatents) -> list[float]:
        """Bits of the streams and the side information of each image, without coding them.

        These are code lengths under the coding tables; the coder writes whole words and its final states, at most
        16 bytes more.
        """
        y_tables, z_tables = self.coding_tables
        z_indexes = self._z_indexes(quantized.z.shape[-2:])
        counts = [z_tables.count_bits(symbols, z_indexes) for symbols in quantized.z]
        for i, (symbols, indexes) in enumerate(zip(quantized.y, quantized.indexes, strict=True)):
            counts[i] += 8 * len(quantized.side_info[i].scales) if quantized.side_info else 0
            counts[i] += y_tables.count_bits(symbols, indexes)
        return counts

    def encode_symbols(self, quantized: QuantizedLatents) -> dict:
        """`strings`, `shape` and `side_info` as `compress` returns them."""
        y_tables, z_tables = self.coding_tables
        z_indexes = self._z_indexes(quantized.z.shape[-2:])
        pairs = zip(quantized.y, quantized.indexes, strict=True)
        y_strings = [y_tables.encode(symbols, indexes) for symbols, indexes in pairs]
        return {
            "strings": [y_strings, [z_tables.encode(symbols, z_indexes) for symbols in quantized.z]],
            "shape": tuple(quantized.z.shape[-2:]),
            "side_info": quantized.side_info,
        }

    def _z_indexes(self, shape: Sequence[int]) -> Tensor:
        """Table index of every element of z, which is its channel: int32 `[C, *shape]`."""
        channels = self.config.hyper_channels
        return torch.arange(channels, dtype=torch.int32).view(-1, 1, 1).expand(-1, *shape)

    def _in_weight_format(self, x: Tensor) -> Tensor:
        """x in the memory format of the weights, so that the same input has the same arithmetic."""
        channels_last = self.g_a[-1].weight.is_contiguous(memory_format=torch.channels_last)
        return x.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)

    @property
    def medians(self) -> Tensor:
        """Medians of z, `[1, C, 1, 1]`."""
        return self.entropy_bottleneck.quantiles[:, 0, 1].detach().view(1, -1, 1, 1)

    @property
    def coding_tables(self) -> tuple[CodingTables, CodingTables]:
        """Coding tables of y and of z, made at the first use."""
        if self._tables is None:
            self._tables = CodingTables(self.gaussian_conditional), CodingTables(self.entropy_bottleneck)
        return self._tables

    @property
    def fingerprint(self) -> bytes:
        """Eight bytes that identify the weights and coding tables, computed at the first use."""
        if self._fingerprint is None:
            digest = hashlib.blake2b(repr(asdict(self.config.canonical())).encode(), digest_size=8)
            for name, tensor in sorted(self.state_dict().items()):
                digest.update(name.encode())
                digest.update(tensor.detach().cpu().contiguous().view(-1).numpy())
            self._fingerprint = digest.digest()
        return self._fingerprint

    def prepare(self) -> None:
        """Make the coding tables and the fingerprint now, so that the first picture is not timed with them."""
        _ = self.coding_tables, self.fingerprint

    def update(self, *args, **kwargs) -> bool:
        """Compute the coding tables (CompressAI) where there are none; with force, also in place of fitted ones."""
        self._tables = self._fingerprint = None
        return super().update(*args, **kwargs)

    def set_tables_of_y(self, cdf: Tensor) -> None:
        """Code y with these tables, int32 `[levels, longest]`, of the lengths and offsets that `update()` gave them."""
        self.gaussian_conditional._quantized_cdf = cdf.to(self.medians.device)
        self._tables = self._fingerprint = None

    # Weights ---------------------------------------------------------------------------------

    def load_state_dict(self, state_dict: dict, strict: bool = True):
        """Load published or own weights, in any of the forms that `models.state_dict` understands.

        Raises:
            ValueError: one line that names what is missing, unknown or of another shape.
        """
        state_dict = normalize(state_dict, self)
        if strict and (problem := explain_mismatch(state_dict, self)):
            raise ValueError(f"these weights do not fit {type(self).__name__}: {problem}")
        self._tables = self._fingerprint = None
        empty_tables(self)
        return super().load_state_dict(state_dict, strict=strict)

    @classmethod
    def from_state_dict(cls, state_dict: dict) -> "TCM":
        """The model that a state dict belongs to, whatever its size, with its weights, in evaluation mode."""
        state_dict = normalize(state_dict)
        model = cls(infer_config(state_dict))
        model.load_state_dict(state_dict)
        return model.eval()


class _SubsampledConv(nn.Conv2d):
    """A 1×1 convolution of stride 2, computed as one of stride 1 on every other pixel.

    The numbers are the same, but oneDNN's weight gradient of the strided one writes past its buffer on
    channels-last images of 3 channels (AVX-512, torch 2.15: memory corruption in training).
    """

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x[:, :, ::2, ::2])


class _Float32Conv(nn.Conv2d):
    """A convolution that stays in float32 under autocast: its output is rounded to whole numbers, and bfloat16
    numbers above 128 are a step of one apart."""

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

    def content(self, y: Tensor, rows: int) -> Iterator[Tensor]:
        """α · attn(y), the part of the logits that depends on no rate, in bands of about so many rows."""
        return (self.alpha * band for band in in_bands([self.latent_attn], rows_of([y], rows), y.shape[2]))

    def rate(self, index: Tensor) -> Tensor:
        """f_λ, the part that depends on the rate indexes `[B]`: `[B, M, 1, 1]`; of maps `[B, 1, h, w]`: `[B, M, h, w]`.

        It stays in float32 under autocast: m in bfloat16 would be off by up to 0.4 %, which is half a quantization step
        where the latent is 128.
        """
        with torch.autocast(self.alpha.device.type, enabled=False):
            if index.dim() == 4:
                return self.lmd_map(index.to(self.alpha).movedim(1, -1)).movedim(-1, 1)
            return self.lmd_map(index.to(self.alpha).view(-1, 1))[:, :, None, None]

    @staticmethod
    def log_m(rate: Tensor, content: Tensor) -> Tensor:
        """ln m from both parts, which broadcast."""
        return F.softsign(rate + content)

    def forward(self, y: Tensor, index: Tensor) -> Tensor:
        ((_, log_m),) = self.bands(y, index, y.shape[2])
        return log_m

    def bands(self, y: Tensor, index: Tensor, rows: int) -> Iterator[tuple[slice, Tensor]]:
        """ln m in bands of about so many rows, each with the rows that it is of."""
        for here, content in with_rows(self.content(y, rows)):
            yield here, self.band(index, here, content)

    def band(self, index: Tensor, here: slice, content: Tensor) -> Tensor:
        """ln m of some rows, from their content and an index as in `rate`, which for maps is that of all rows."""
        return self.log_m(self.rate(index[:, :, here] if index.dim() == 4 else index), content)


class LAE(nn.Module):
    """Latent-domain auto-encoder: y · m and ln m, with m = exp(ln m) in (1/e, e); identity at the start."""

    def __init__(self, n: int, M: int) -> None:
        super().__init__()
        self.mask = mask(n, M)

    def bands(self, y: Tensor, index: Tensor, rows: int) -> Iterator[Tensor]:
        """y · m in bands of about so many rows."""
        return (y[:, :, here] * log_m.exp() for here, log_m in self.mask.bands(y, index, rows))

    def forward(self, y: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        log_m = self.mask(y, index)
        return y * log_m.exp(), log_m


class TCM_VBR(TCM):
    """TCM made variable-rate by an LAE after analysis and another before synthesis (TCSVT 2025).

    Everything between the two sees the scaled latent. The weights of a TCM can be loaded: the LAEs are then the
    identity, and the output at every index is the TCM's. Arguments as TCM.
    """

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.modnet_ga, self.modnet_gs = LAE(2, self.M), LAE(2, self.M)

    def resolve_index(self, index: RateIndex, batch: int) -> Tensor:
        """As `check_index`; omitted, it is drawn uniformly per sample in training, a ValueError in evaluation."""
        if index is None:
            if not self.training:
                raise ValueError("a variable-rate model needs a rate index in evaluation: forward(x, index)")
            index = torch.rand(batch) * MAX_INDEX
        return send(check_index(index, batch), self.medians.device)  # checked before, as reading a GPU waits for it

    def modulate(self, y: Tensor, index: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """y · m and ln m, `[B, M, H/16, W/16]` both."""
        return self.modnet_ga(y, index)

    def synthesize(self, y_hat: Tensor, index: Tensor | None = None) -> Tensor:
        return super().synthesize(self.modnet_gs(y_hat, index)[0], index)

    def demodulate_bands(self, y_hat: Tensor, index: Tensor | None, rows: int) -> Iterator[Tensor]:
        return self.modnet_gs.bands(y_hat, index, rows)

    def load_state_dict(self, state_dict: dict, strict: bool = True):
        state_dict = normalize(state_dict, self)
        if not any(name.startswith("modnet_") for name in state_dict):
            identity = LAE(2, self.M).state_dict()
            for lae in ("modnet_ga", "modnet_gs"):
                state_dict |= {f"{lae}.{name}": value for name, value in identity.items()}
        return super().load_state_dict(state_dict, strict)


def _check_sides(x: Tensor) -> None:
    if x.dim() != 4 or x.shape[1] != 3 or x.shape[2] % STRIDE or x.shape[3] % STRIDE or x.numel() == 0:
        raise ValueError(f"images must be [B, 3, H, W] with sides that are multiples of {STRIDE}, not {list(x.shape)}")
