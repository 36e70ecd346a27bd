"""The codec that every backbone plugs into: image ↔ latents ↔ symbols ↔ streams.

            ┌─────────────────── encoder ───────────────────┐         ┌──────────── decoder ────────────┐
    x ──► g_a ──► y ──► LAE ──► y · m ──► round(y · m − μ) ──► rANS ──► symbols ──► ŷ ──► LAE ──► g_s ──► x̂
                                 │                ▲              │                   ▲
                                h_a               │ μ, σ         │                   │ μ, σ
                                 ▼                │              │                   │
                                 z ──► rounded, ẑ ┴─► slices     └──► z ──► ẑ ──► slices

The two LAEs are there in a variable-rate codec (models/lae.py; TCSVT 2025). The slices are a channel-wise
autoregression ("Channel-wise Autoregressive Entropy Models for Learned Image Compression",
https://arxiv.org/abs/2007.08739): each sees ẑ and the slices before it. A backbone may have a context model, for which
the first slice, which sees ẑ alone, is coded in parts (models/coding/order.py). The loop, `Codec.run_slices`, exists
once. What happens to a slice is up to a slice coder (models/coding/slice_coders.py), which estimates its bits, writes
its symbols, or reads them.
"""

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models import STRIDE
from models.coding.order import CodingOrder, Part
from models.coding.portable import EPSILON, crc_of
from models.coding.precision import deterministic, without_autocast
from models.coding.side_info import DecodingError, SideInfo
from models.coding.slice_coders import (
    ERROR_BITS,
    Choice,
    Quantization,
    QuantizedLatents,
    SliceDecoder,
    SliceEncoder,
    SliceEstimator,
    choose_symbols,
    likelihood_of_z,
    nearest_symbols,
    ste_round,
)
from models.coding.tables import CODER_STATE, SHORTEST_STREAM, open_stream
from models.lambdas import check_index
from models.large.bands import (
    KEPT,
    Recomputed,
    band_height,
    bands_of,
    computes_whole,
    gather,
    in_bands,
    latent_height,
    scaled_height,
)
from models.weights import CodecWeights

# In [−2, 7]: one for all images, one per image `[B]`, or one per place `[B, 1, h, w]` on the grid of the latent.
RateIndex = Tensor | float | None
AS_COMPRESSAI = Quantization()


def published_names(method: Callable) -> Callable:
    """A method whose rate index has the published names too: lmd_test, which is none if negative, and lmd_index."""

    @functools.wraps(method)
    def call(self: "Codec", *args, lmd_test: RateIndex = None, lmd_index: RateIndex = None, **kwargs) -> dict:
        if lmd_index is not None:
            kwargs["index"] = lmd_index
        if isinstance(lmd_test, Tensor) or lmd_test is not None and lmd_test >= 0:
            kwargs["index"] = lmd_test
        return method(self, *args, **kwargs)

    return call


class Codec(CodecWeights):
    """What all backbones share. A fixed-rate backbone is a subclass that has

    - `Config`, a `CodecConfig` with M a multiple of 64 (for the LAEs) and of num_slices;
    - `g_a` and `g_s`: image `[B, 3, H, W]` to latent y `[B, M, H/16, W/16]`, which is float32 under autocast too (a
      `Float32Conv` makes it), and back. One convolution of g_a, not a depth-wise one, is larger than 1×1;
    - `h_a`: y to z `[B, hyper_channels, H/64, W/64]`;
    - `entropy_bottleneck` and `gaussian_conditional` of CompressAI;
    - the method `predict`, and `hyper_synthesis` and `correct` where they are not those of one network `h_s` and of
      `lrp_transforms`: what the slices compute by `run_networks`; `predict_again` where there is a context model;
    - `bytes_per_pixel`, memory of the widest tensor of g_a and g_s, for pictures that are computed in bands.

    Networks are `nn.Sequential`s of layers with a registered footprint (models/large/bands.py), so that pictures of any
    size take bounded memory. Networks of latent residuals, if any, are called `lrp_transforms`. Every parameter takes
    part in the loss, as several processes wait for its gradient, and no layer has running statistics. A class NAME and
    its variable-rate form NAME_VBR are known by models/registry.py.

    Args: a `Config` of the class, or its fields by position or name.

    Attributes:
        config: the architecture.
        order: that in which y is coded.
        metric: "mse" or "ms-ssim", the distortion in the loss that the weights minimize.
        epsilon: how close to a boundary of the scale table a σ must be for a file to list its position.
        checkpointing: compute gradients by running every layer twice, in a fraction of the memory.

    Raises:
        ValueError: naming the constraint of the `Config` that does not hold.
    """

    bytes_per_pixel: float

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.M = self.config.M
        self.num_slices = self.config.num_slices
        self.max_support_slices = self.config.max_support_slices
        if self.M % 64 or self.M % self.num_slices:
            raise ValueError(f"M = {self.M} must be a multiple of 64 and of num_slices = {self.num_slices}")
        self.order = CodingOrder(self.M, self.num_slices, bool(self.config.context_model))
        self.epsilon = EPSILON
        self.checkpointing = False
        self.metric = "mse"

    # What a backbone defines -----------------------------------------------------------------

    def hyper_synthesis(self, z_hat: Tensor) -> Any:
        """Features of ẑ `[B, C, h/4, w/4]` for the slices; made by `synthesize_hyper`."""
        return self.synthesize_hyper(self.h_s, z_hat)

    def predict(self, i: int, hyper: Any, supports: list[Tensor], corrected: bool) -> tuple[Tensor, Tensor, Any]:
        """μ and σ of slice i, float32 `[B, M/S, h, w]`, and what `predict_again` and `correct` want to see again.

        Args:
            hyper: what `hyper_synthesis` returned.
            supports: the slices before it that it may see, `[B, M/S, h, w]` each.
            corrected: whether `correct` follows; without, the third value is not used.
        """
        raise NotImplementedError

    def predict_again(
        self, part: Part, context: Any, symbols: Tensor, known: Tensor, mu: Tensor, sigma: Tensor
    ) -> tuple[Tensor, Tensor]:
        """μ and σ of a part of the first slice, in the shape of `Part.of`, by the parts before it.

        Args:
            context: what `predict` returned for the slice.
            symbols: of the parts before, as floats, and zero elsewhere, `[B, M/S, h, w]`.
            known: one where these parts are, and zero elsewhere, `[B, M/S, h, w]`.
            mu, sigma: of the part, as `predict` returned them.
        """
        raise NotImplementedError

    def correct(self, i: int, context: Any, y_hat: Tensor) -> Tensor:
        """Slice i with its latent residual, `[B, M/S, h, w]`; context is the third value of `predict`."""
        return y_hat + 0.5 * torch.tanh(self.run_networks([self.lrp_transforms[i]], context, y_hat))

    def transform_parameters(self) -> Iterator[nn.Parameter]:
        """The weights that `--transform-lr-factor` is for: they learn more slowly than the others."""
        yield from self.g_a.parameters()
        yield from self.g_s.parameters()

    @property
    def networks(self) -> list[nn.Sequential]:
        """g_a, g_s and all others that are run layer by layer, those of every slice too."""
        parts = list(self.children())
        alone = [part for part in parts if isinstance(part, nn.Sequential)]
        return alone + [network for part in parts if isinstance(part, nn.ModuleList) for network in part]

    # What a variable-rate codec overrides ----------------------------------------------------

    def resolve_index(self, index: RateIndex, batch: int) -> Tensor | None:
        """The rate index as `check_index` returns it; None stays None, as a fixed-rate model needs no index."""
        return None if index is None else check_index(index, batch)

    def modulate(self, y: Tensor, index: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The latent of `features` as the entropy model sees it, and ln m. A fixed rate leaves it unchanged."""
        return y, y.new_zeros(len(y), 1, 1, 1)

    def demodulate(self, y_hat: Tensor, index: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """A quantized latent `[B, M, h, w]` as `g_s` sees it, and ln m."""
        return y_hat, y_hat.new_zeros(len(y_hat), 1, 1, 1)

    def demodulate_bands(self, y_hat: Tensor, index: Tensor | None, height: int) -> Iterator[Tensor]:
        """`demodulate` in bands of about this height."""
        return bands_of([y_hat], height)

    # Transforms ------------------------------------------------------------------------------

    def analyze(self, x: Tensor, index: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Image `[B, 3, H, W]` in [0, 1] to latent y `[B, M, H/16, W/16]` and ln m (of a fixed rate `[B, 1, 1, 1]`)."""
        return self.modulate(self.features(x), index)

    def features(self, x: Tensor) -> Tensor:
        """Image `[B, 3, H, W]` in [0, 1] to the output of `g_a` `[B, M, H/16, W/16]`, before any scaling by m."""
        return self.g_a(self._in_weight_format(x))

    def synthesize(self, y_hat: Tensor, index: Tensor | None = None) -> Tensor:
        """Quantized latent `[B, M, h, w]` to image `[B, 3, 16h, 16w]`, not clamped."""
        return self.run_networks([self.g_s], self.demodulate(y_hat, index)[0])

    def run_networks(self, networks: Sequence[nn.Sequential], *parts: Tensor | Recomputed, stride: int = 1) -> Tensor:
        """The output of a chain of networks for tensors joined along their channels.

        With checkpointing each layer keeps only its input for the gradients. Without gradients latents beyond
        `bands.LATENTS` go through in bands.

        Args:
            stride: side of a place of `parts` in places of y: 1 on the grid of y, 4 on that of z.
        """
        height, width = parts[0].shape[2:]
        if band := self._band_height_within(height, width, stride):
            return gather(in_bands(networks, bands_of(parts, band), height), scaled_height(networks, height))
        x = torch.cat(parts, 1) if len(parts) > 1 else parts[0]
        for network in networks:
            if self.checkpointing and torch.is_grad_enabled():
                for layer in network:
                    x = checkpoint(layer, x, use_reentrant=False)
            else:
                x = network(x)  # as a whole, which may be compiled
        return x

    @staticmethod
    def _band_height_within(height: int, width: int, stride: int) -> int | None:
        """Height of the bands in which `run_networks` computes; None where all comes at once, as with gradients."""
        if computes_whole():
            return None
        band = latent_height(stride * width) // stride
        return band if band < height else None

    # Large pictures, in bands ----------------------------------------------------------------

    def band_height(self, width: int, height: int) -> int:
        """Height of the bands in which a picture of this size is best computed: its own up to two megapixels."""
        return band_height(width, height, bytes_per_pixel=self.bytes_per_pixel, device=self.medians.device)

    @torch.no_grad()
    def features_of_bands(self, bands: Iterable[Tensor], height: int) -> Tensor:
        """`features` of an image of this height, a multiple of 128, that comes in bands `[B, 3, h, W]`."""
        return gather(in_bands(self.g_a, map(self._in_weight_format, bands), height), height // 16)

    @torch.no_grad()
    def synthesize_bands(self, y_hat: Tensor, index: Tensor | None, height: int) -> Iterator[Tensor]:
        """`synthesize` in bands of about this height in pixels, a multiple of 128."""
        yield from in_bands(self.g_s, self.demodulate_bands(y_hat, index, height // 16), y_hat.shape[2])

    # The slice loop --------------------------------------------------------------------------

    def run_slices(
        self, z_hat: Tensor, coder: Callable[[Tensor, Tensor], Tensor], complete: bool = True
    ) -> Tensor | None:
        """Channel-wise autoregression: ŷ `[B, M, h, w]` from ẑ `[B, C, h/4, w/4]` and a slice coder.

        Everything that steers entropy coding is computed here, always in the memory format of the weights:
        convolutions may differ in the last bit between formats, and decoding must not.

        Args:
            coder: called with μ and σ of each part in the order of coding, `[B, M/S, h, w]` of a slice; of a part of
                the first in the shape of `Part.of`.
            complete: compute ŷ. Without it, for a coder that only wants μ and σ, the result is None.
        """
        hyper = self.hyper_synthesis(self._in_weight_format(z_hat))
        decoded: list[Tensor] = []
        for i in range(self.num_slices):
            corrected = complete or i < self.num_slices - 1
            if i == 0 and self.order.first_slice:
                y_hat, context = self._run_first_slice(hyper, coder)
            else:
                mu, sigma, context = self.predict(i, hyper, decoded[: self.max_support_slices], corrected=corrected)
                if not corrected:
                    del hyper, decoded, context  # no slice follows; the coder has their room
                    coder(mu, sigma)
                    return None
                y_hat = coder(mu, sigma)
                del mu, sigma  # hundreds of megabytes each where the picture is large, and so is what follows
            y_hat = self._in_weight_format(y_hat)
            decoded.append(self.correct(i, context, y_hat))
            del context, y_hat
        del hyper
        return torch.cat(decoded, 1)

    def _run_first_slice(self, hyper: Any, coder: Callable[[Tensor, Tensor], Tensor]) -> tuple[Tensor, Any]:
        """The quantized first slice, `[B, M/S, h, w]`, coded in parts, and what `correct` wants to see again. The
        arguments are those of `predict` and of `run_slices`."""
        mu, sigma, context = self.predict(0, hyper, [], corrected=True)
        y_hat = torch.empty_like(mu)
        symbols = self._in_weight_format(torch.zeros_like(mu))
        known = self._in_weight_format(torch.zeros_like(mu))
        for number, part in enumerate(self.order.first_slice):
            mu_of_part, sigma_of_part = part.of(mu), part.of(sigma)
            if number:
                mu_of_part, sigma_of_part = self.predict_again(
                    part, context, symbols=symbols, known=known, mu=mu_of_part, sigma=sigma_of_part
                )
            values = coder(mu_of_part, sigma_of_part)
            part.put(y_hat, values)
            # Whole numbers again, on every machine. As in ŷ, their gradient is that of y.
            part.put(symbols, ste_round(values - mu_of_part.detach()))
            part.put(known, torch.ones_like(values))
            del mu_of_part, sigma_of_part, values
        return y_hat, context

    def synthesize_hyper(self, network: nn.Sequential, z_hat: Tensor) -> Tensor | Recomputed:
        """The output of a network for ẑ, `[B, C, h, w]`. Beyond `bands.KEPT` it is computed anew for every slice."""
        height, width = z_hat.shape[2:]
        band = self._band_height_within(height, width, stride=4)
        if band and 16 * height * width > KEPT:
            return Recomputed(network, z_hat, band)
        return self.run_networks([network], z_hat, stride=4)

    # Estimation ------------------------------------------------------------------------------

    @published_names
    def forward(self, x: Tensor, index: RateIndex = None, quantization: Quantization = AS_COMPRESSAI) -> dict:
        """Reconstruction and likelihoods of images `[B, 3, H, W]` in [0, 1], sides multiples of 128.

        Args:
            index: a variable-rate codec draws it at random when it is omitted in training, and requires it in
                evaluation. A fixed-rate one ignores it.
            quantization: noise of the `noise_shapes`, and more.

        Returns:
            `x_hat` `[B, 3, H, W]` not clamped; `likelihoods` {`y` `[B, M, h, w]`, `z`}; `lmd_index`
            `[B]` or `[B, 1, h, w]` (None where none was given); `latent`: y as it enters `h_a`; `log_m_ga` and
            `log_m_gs`: ln m of analysis and synthesis.
        """
        index = self._check(x, index)
        y, log_m = self.analyze(x, index)
        out, _ = self._reconstruct(y, self.h_a(y), index=index, quantization=quantization)
        return out | {"log_m_ga": log_m}

    @published_names
    def forward_fromlatent(
        self, y: Tensor, z: Tensor, index: RateIndex = None, quantization: Quantization = AS_COMPRESSAI
    ) -> dict:
        """`forward` from a latent y `[B, M, h, w]` (as `h_a` sees it) and z, as DLM refines them; without `log_m_ga`,
        and with `y_hat`, ŷ `[B, M, h, w]`.

        In training mode gradients of rate and distortion reach both. In evaluation mode the likelihoods are those of
        rounded values, and rounding stops the gradient of the rate of z and of each slice; what is left comes through
        the μ and σ of later slices. With `Quantization.straight_through` they have the gradients of the latents.
        """
        index = self._index_of_latent(index, len(y), y.shape[2:])
        out, y_hat = self._reconstruct(y, z, index=index, quantization=quantization)
        return out | {"y_hat": y_hat}

    def _reconstruct(
        self, y: Tensor, z: Tensor, index: Tensor | None, quantization: Quantization
    ) -> tuple[dict, Tensor]:
        y_hat, rates = self.estimate_rate(y, z, quantization)
        scaled, log_m = self.demodulate(y_hat, index)
        x_hat = self.run_networks([self.g_s], scaled)
        return {"x_hat": x_hat, **rates, "lmd_index": index, "latent": y, "log_m_gs": log_m}, y_hat

    @published_names
    def test_fromlatent(self, y: Tensor, z: Tensor, index: RateIndex = None) -> dict:
        """The dict of `compress` for latents, with the `x_hat` `[B, 3, H, W]` in [0, 1] of `decompress`.

        The published online script calls it by this name. Arguments as `forward_fromlatent`.
        """
        index = self._index_of_latent(index, len(y), y.shape[2:])
        coded = self.encode_symbols(self.quantize(y, z, portable=False)) | {"index": index}
        return coded | self.decompress(**coded)

    def noise_shapes(self, height: int, width: int) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
        """Shapes of y and of z, in this order, of one image of this size in pixels."""
        channels = self.config.hyper_channels
        return (self.M, height // 16, width // 16), (channels, height // 64, width // 64)

    def estimate_rate(self, y: Tensor, z: Tensor, quantization: Quantization = AS_COMPRESSAI) -> tuple[Tensor, dict]:
        """The entropy model alone: ŷ `[B, M, h, w]`, and the `likelihoods` as `forward_fromlatent` returns them."""
        with torch.autocast(z.device.type, enabled=False):
            z = z.float()
            z_hat = ste_round(z - self.medians) + self.medians
            if quantization.straight_through:
                z_likelihoods = likelihood_of_z(self.entropy_bottleneck, z_hat)
            elif quantization.noise:
                z_likelihoods = likelihood_of_z(self.entropy_bottleneck, z + quantization.noise[1])
            else:
                _, z_likelihoods = self.entropy_bottleneck(z)
        noise = self.order.split(quantization.noise[0]) if quantization.noise else None
        coder = SliceEstimator(self.gaussian_conditional, self.order.split(y.float()), noise, quantization)
        # Evaluation uses the arithmetic of coding, so that symbols are those of a file.
        with contextlib.nullcontext() if self.training else deterministic():
            y_hat = self.run_slices(z_hat, coder)
        return y_hat, {"likelihoods": {"y": self.order.join(coder.likelihoods), "z": z_likelihoods}}

    # Coding ----------------------------------------------------------------------------------

    @published_names
    @without_autocast()
    @torch.no_grad()
    def compress(self, x: Tensor, index: RateIndex = None, portable: bool = False) -> dict:
        """Code images `[B, 3, H, W]`.

        Args:
            portable: add the side information that decoding on another machine needs; without it the coding
                tables are selected by the published rule.

        Returns:
            `strings`: [y_strings, z_strings], one bytes object per image each; `shape`: (h, w) of z; `side_info`: one
            per image, or None; `m_y`: `[B]`, mean ln m of the analysis LAE; `index`: as resolved. `decompress` takes
            all of them.
        """
        index = self._check(x, index)
        y, log_m = self.analyze(x, index)
        coded = self.encode_symbols(self.quantize(y, self.h_a(y), portable))
        return coded | {"m_y": log_m.mean((1, 2, 3)), "index": index}

    @published_names
    @without_autocast()
    @torch.no_grad()
    def decompress(
        self, strings: list[list[bytes]], shape: Sequence[int], index: RateIndex = None,
        side_info: list[SideInfo] | None = None, m_y: Tensor | None = None,
    ) -> dict:
        """`x_hat` `[B, 3, H, W]` in [0, 1] from what `compress` returned, of which m_y is not needed.

        Without side information, decode in the batch, and on the machine, that encoded: the last bits of a
        convolution depend on both, and a σ on a boundary of the scale table would select another row.

        Raises:
            DecodingError: a stream is too short for the shape, or the decoded symbols are not those that were encoded:
                by the checksum of the side information, and without it by the length of the stream.
        """
        index = self._index_of_latent(index, len(strings[0]), [4 * side for side in shape])
        y_hat = self.decode_latents(strings, shape, side_info)
        return {"x_hat": self.synthesize(y_hat, index).clamp_(0, 1)}

    @torch.no_grad()
    def decode_latents(
        self, strings: list[list[bytes]], shape: Sequence[int], side_info: list[SideInfo] | None = None
    ) -> Tensor:
        """ŷ `[B, M, h, w]` of what `compress` returned; arguments and errors are those of `decompress`."""
        y_strings, z_strings = strings
        y_tables, z_tables = self.coding_tables
        z_rows = self._rows_of_z(shape)
        if 8 * min(map(len, z_strings)) < 0.99 * z_tables.fewest_bits(z_rows) - 64:
            raise DecodingError("the streams are too short for a picture of this size")
        if not side_info and min(map(len, (*y_strings, *z_strings))) < SHORTEST_STREAM:
            raise DecodingError("a stream is empty or cut off")
        z = torch.stack([z_tables.from_stream(open_stream(s, z_rows.numel()), z_rows) for s in z_strings])
        z_hat = z.to(self.medians.device).type_as(self.medians) + self.medians
        crcs = [crc_of(symbols) for symbols in z]
        y_count = self.M * 4 * shape[0] * 4 * shape[1]
        coder = SliceDecoder(
            self.gaussian_conditional, y_tables, y_strings, count=y_count, side_info=side_info, crcs=crcs
        )
        with deterministic():
            y_hat = self.run_slices(z_hat, coder)
        if side_info and [info.crc for info in side_info] != coder.crcs:
            raise DecodingError("decoding went wrong: these are not the symbols that were encoded")
        if not side_info:
            found = ([z_tables.count_bits(symbols, z_rows) for symbols in z], coder.bits)
            for strings, counts in zip((z_strings, y_strings), found, strict=True):
                for stream, bits in zip(strings, counts, strict=True):
                    if abs(8 * len(stream) - bits) > 0.01 * bits + 8 * CODER_STATE:
                        raise DecodingError("decoding went wrong: a stream is not as long as its symbols' codes")
        return y_hat

    @torch.no_grad()
    def quantize(
        self, y: Tensor | list[Tensor], z: Tensor, portable: bool = True, complete: bool = False,
        choose: Choice = nearest_symbols,
    ) -> QuantizedLatents:
        """The symbols of latents y `[B, M, h, w]` (as `h_a` sees it) and z, with the table rows that code them.

        Args:
            y: or the list of its parts in float32, as `order.split` returns it, which is used up part by part.
            complete: compute ŷ as well, which no file needs.
            choose: makes the symbols of y.
        """
        rounded = torch.round(z - self.medians)
        coder = SliceEncoder(
            self.gaussian_conditional, self.coding_tables[0],
            parts=y if isinstance(y, list) else self.order.split(y.float()), order=self.order,
            z=rounded, epsilon=self.epsilon if portable else None, choose=choose,
        )
        with deterministic():
            y_hat = self.run_slices(rounded + self.medians, coder, complete)
        return coder.finish(y_hat)

    def choose_symbols(self, residual: Tensor, sigma: Tensor) -> Tensor:
        """Symbols for rate and distortion together, by the coding tables and ERROR_BITS; shapes as in the function."""
        tables, _ = self.coding_tables
        return choose_symbols(residual, sigma, gaussian=self.gaussian_conditional, tables=tables, error_bits=ERROR_BITS)

    def count_bits(self, quantized: QuantizedLatents) -> list[float]:
        """Bits of the streams and the side information of each image, without coding them.

        These are code lengths under the coding tables; the coder writes whole words and its final states, at most
        16 bytes more.
        """
        y_tables, z_tables = self.coding_tables
        z_rows = self._rows_of_z(quantized.z.shape[-2:])
        counts = [z_tables.count_bits(symbols, z_rows) for symbols in quantized.z]
        for i, (symbols, rows) in enumerate(zip(quantized.y, quantized.rows, strict=True)):
            counts[i] += 8 * len(quantized.side_info[i].scales) if quantized.side_info else 0
            counts[i] += y_tables.count_bits(symbols, rows)
        return counts

    def encode_symbols(self, quantized: QuantizedLatents) -> dict:
        """`strings`, `shape` and `side_info` as `compress` returns them."""
        y_tables, z_tables = self.coding_tables
        z_rows = self._rows_of_z(quantized.z.shape[-2:])
        pairs = zip(self.order.flatten(quantized.y), self.order.flatten(quantized.rows), strict=True)
        y_strings = [y_tables.to_stream(symbols, rows) for symbols, rows in pairs]
        return {
            "strings": [y_strings, [z_tables.to_stream(symbols, z_rows) for symbols in quantized.z]],
            "shape": tuple(quantized.z.shape[-2:]),
            "side_info": quantized.side_info,
        }

    def _rows_of_z(self, shape: Sequence[int]) -> Tensor:
        """Table row of every element of z, which is its channel: int32 `[C, *shape]`."""
        channels = self.config.hyper_channels
        return torch.arange(channels, dtype=torch.int32).view(-1, 1, 1).expand(-1, *shape)

    def _in_weight_format(self, x: Tensor) -> Tensor:
        """x in the memory format of the weights, so that the same input has the same arithmetic."""
        # The weights of a 1×1 or a depth-wise convolution are the same in both formats.
        weight = next(w for w in self.g_a.parameters() if w.dim() == 4 and w.shape[1] > 1 and w.shape[2] > 1)
        channels_last = weight.is_contiguous(memory_format=torch.channels_last)
        return x.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)

    def _check(self, x: Tensor, index: RateIndex) -> Tensor | None:
        """The resolved index of images. ValueError where they are something else, and as `_index_of_latent`."""
        if not isinstance(x, Tensor) or x.dtype != torch.float32:
            found = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(f"images must be a float32 tensor with values in [0, 1], not {found}")
        if x.dim() != 4 or x.shape[1] != 3 or x.shape[2] % STRIDE or x.shape[3] % STRIDE or x.numel() == 0:
            sides = f"sides that are multiples of {STRIDE}"
            raise ValueError(f"images must be [B, 3, H, W] with {sides}, not {list(x.shape)}")
        return self._index_of_latent(index, len(x), [side // 16 for side in x.shape[2:]])

    def _index_of_latent(self, index: RateIndex, batch: int, sides: Sequence[int]) -> Tensor | None:
        """The resolved index. ValueError for a map that has not the sides of the latent, and as `check_precision`."""
        self.check_precision()
        index = self.resolve_index(index, batch)
        if index is not None and index.dim() == 4 and list(index.shape[2:]) != list(sides):
            wanted = f"[B, 1, {sides[0]}, {sides[1]}]"
            raise ValueError(f"a map of indexes for these images is {wanted}, not {list(index.shape)}")
        return index
