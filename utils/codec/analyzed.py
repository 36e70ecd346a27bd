"""One picture after analysis: its latents at any rate index, their symbols, and the file."""

import copy
from dataclasses import dataclass

import torch
from torch import Tensor

from models import Codec, VariableRate
from models.coding.slice_coders import QuantizedLatents, nearest_symbols
from models.lambdas import index_to_lambda
from models.large.memory import large_empty
from utils.codec.bitstream import HEADER_BYTES, CodedImage, pack, pack_offsets
from utils.codec.quality_map import QualityMap, pixel_weights
from utils.codec.rate_model import RateModel
from utils.images import Watch, crop, margins, padded_bands

CODER_BITS = 96  # stream overhead: 96 ± 32 bits


@dataclass(frozen=True)
class TrialEncode:
    """A picture's symbols at an index, and the bits of their file by their code lengths."""

    index: float | None
    quantized: QuantizedLatents
    bits: float


@dataclass(frozen=True)
class CodedTrial:
    """The file of a trial encode."""

    index: float | None
    data: bytes

    @property
    def bits(self) -> float:
        return 8.0 * len(self.data)


class AnalyzedImage:
    """A picture, uint8 `[3, H, W]` on the model's device, after `g_a`, which is the same at every rate.

    Attributes:
        height, width, pixels: size of the original.
        image: the picture.
        rate_model: the R-λ model, which also scales the latent; None at a fixed rate.
        quality_map: where the index differs from that of the file; None where it is the same everywhere.
        choose: makes the symbols.
        gray: whether the picture has no colors, which a file says, as decoded channels are never quite equal.

    Args:
        nearest: as in `EncodeRequest`.
        watch: gets the bands of the picture while they are analyzed.

    Raises:
        ValueError: the map is of a picture of another size.
    """

    @torch.no_grad()
    def __init__(
        self, model: Codec, image: Tensor, quality_map: QualityMap | None = None, nearest: bool = False,
        watch: Watch | None = None,
    ) -> None:
        self.model = model
        self.image = image
        self.quality_map = quality_map
        self.choose = nearest_symbols if nearest else model.choose_symbols
        self.gray = torch.equal(image[0], image[1]) and torch.equal(image[1], image[2])
        self.height, self.width = image.shape[1:]
        self.pixels = self.height * self.width
        if quality_map and quality_map.region.shape != (self.height, self.width):
            raise ValueError("the map of qualities was made for a picture of another size")
        left, right, top, bottom = margins(self.height, self.width)
        height = top + self.height + bottom
        width = left + self.width + right
        # Nobody sees what is around the picture, and its own colors cost less than an edge to the published black.
        bands = padded_bands(image, model.band_height(width, height), extend=not nearest)
        if watch:
            bands = watch(bands, height)
        self.y_before_lae = model.features_of_bands(bands, height)
        variable = isinstance(model, VariableRate)
        self.rate_model = RateModel(model, self.y_before_lae, quality_map) if variable else None

    @torch.no_grad()
    def latents(self, index: float | None, last: bool = False) -> tuple[Tensor, Tensor]:
        """y `[1, M, h, w]`, scaled by m for the index, and z.

        Args:
            last: scale in place, to save memory; the object is then spent.
        """
        if self.rate_model is None:
            y, _ = self.model.modulate(self.y_before_lae)
        else:
            y = self.rate_model.scaled(index, in_place=last)
        return y, self.model.h_a(y)

    def rounded(self) -> "AnalyzedImage":
        """The same picture, whose symbols are the nearest ones."""
        other = copy.copy(self)
        other.choose = nearest_symbols
        return other

    def quantize(self, index: float | None, last: bool = False, complete: bool = False) -> TrialEncode:
        """The picture's symbols at an index. No analysis, synthesis or entropy coding: about 0.4 of an encode.

        last, complete: as in `latents` and in `Codec.quantize`.
        """
        y, z = self.latents(index, last)
        if not last:  # a copy of its own for every part, which goes when its symbols are there
            y = [large_empty(part.shape, part.dtype, part.device).copy_(part) for part in self.model.order.split(y)]
        return self.quantize_latents(index, y, z, complete=complete)

    def quantize_latents(
        self, index: float | None, y: Tensor | list[Tensor], z: Tensor, complete: bool = False
    ) -> TrialEncode:
        """The symbols of given latents, of the form of `latents`, for a file of an index; y as in `Codec.quantize`."""
        quantized = self.model.quantize(y, z, complete=complete, choose=self.choose)
        overhead = 8 * (HEADER_BYTES + len(pack_offsets(self.offsets(index)))) + CODER_BITS
        return TrialEncode(index, quantized, overhead + self.model.count_bits(quantized)[0])

    def offsets(self, index: float | None) -> bytes:
        """The map in a file of this index; nothing where the index is the same everywhere."""
        return self.quality_map.cell_offsets(index) if self.quality_map else b""

    def distortion_weights(self, index: float) -> Tensor | None:
        """λ of every pixel in units of that of the file's index, `[1, 1, height, width]`; None without a map."""
        if self.quality_map is None:
            return None
        metric = self.model.metric
        places = self.rate_model.index_of_places(index)
        lmbda = torch.tensor([index_to_lambda(index, metric)], device=self.image.device)
        return crop(pixel_weights(places, lmbda, metric), self.height, self.width)

    def write(self, trial: TrialEncode) -> CodedTrial:
        """The file of a trial encode."""
        coded = self.model.encode_symbols(trial.quantized)
        (y,), (z,) = coded["strings"]
        (side_info,) = coded["side_info"]
        image = CodedImage(
            width=self.width, height=self.height, index=trial.index, y=y, z=z,
            fingerprint=self.model.fingerprint, side_info=side_info, offsets=self.offsets(trial.index), gray=self.gray,
        )
        return CodedTrial(trial.index, pack(image))
