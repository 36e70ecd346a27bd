"""Layers and LAEs on large pictures, band of rows by band of rows: the numbers of the whole picture in bounded memory.

Every layer waits until the rows that it looks at have come, keeps those that the next band looks at too, and hands on
what is final. So nothing is approximated, and a layer computes only the few rows around a cut twice. The last bit of a
convolution may depend on the height of its input; nothing else differs.
"""

import functools
from collections.abc import Iterable, Iterator, Sequence
from fractions import Fraction
from typing import NamedTuple

import torch
from compressai.layers import GDN, ResidualBlockUpsample, ResidualBlockWithStride
from torch import Tensor, nn

from models import STRIDE
from models.large.memory import LARGE, give_back_freed_memory, large_empty

# Pixels of pictures. Up to WHOLE are computed at once. Larger pictures come in bands of about BAND pixels. Neighboring
# bands overlap by what the layers see, and the lower they are, the more of the work is done twice: so they are
# MIN_HEIGHT rows high or more, unless that makes them larger than MAX_BAND.
WHOLE, BAND, MAX_BAND = 2**21, 2**20, 2**22
MIN_HEIGHT = 256
LATENTS = 2**16  # latent positions per band
KEPT = 2**18  # latent positions up to which the output of the hyper-synthesis is kept for all slices
TENSORS = 12  # a layer takes about as much memory as so many tensors of the size of its widest input


class Footprint(NamedTuple):
    """The rows of its input that a layer needs.

    Attributes:
        halo: context rows on either side, a multiple of align.
        align: slices of the input start and end at its multiples.
        scale: output rows per input row.
    """

    halo: int
    align: int
    scale: Fraction = Fraction(1)


@functools.singledispatch
def footprint(layer: nn.Module) -> Footprint:
    """The footprint of a layer, in rows of its input. A new kind of layer registers its own, beside its class."""
    match layer:
        case ResidualBlockWithStride():  # 3×3 of stride 2, then 3×3
            return Footprint(4, 2, Fraction(1, 2))
        case ResidualBlockUpsample():  # 3×3, shuffled to twice the rows, then 3×3
            return Footprint(2, 1, Fraction(2))
        case nn.Conv2d(stride=(stride, _)):
            reach = layer.dilation[0] * (layer.kernel_size[0] // 2)
            return Footprint(multiple(reach, stride), stride, Fraction(1, stride))
        case nn.ConvTranspose2d(stride=(stride, _)):
            reach = layer.dilation[0] * (layer.kernel_size[0] - 1)
            return Footprint(multiple(reach, stride) // stride, 1, Fraction(stride))
        case nn.PixelShuffle(upscale_factor=factor):
            return Footprint(0, 1, Fraction(factor))
        case nn.PixelUnshuffle(downscale_factor=factor):
            return Footprint(0, factor, Fraction(1, factor))
        case GDN() | nn.GELU() | nn.LeakyReLU() | nn.ReLU() | nn.Sigmoid() | nn.SiLU() | nn.Tanh():
            return Footprint(0, 1)
    raise TypeError(f"no footprint is known of {type(layer).__name__}: register one (models/large/bands.py)")


def multiple(count: int, of: int) -> int:
    """The least multiple that is not less."""
    return -(-count // of) * of


def band_height(width: int, height: int, bytes_per_pixel: float, device: torch.device) -> int:
    """Height of a band of a picture of width × height pixels, after padding: that of the picture up to WHOLE pixels.

    On a GPU a band may be as large as half of the free memory allows. Its height is rounded to 128 · 2ᵏ, so that free
    memory rarely changes the result.

    Args:
        bytes_per_pixel: size of the widest tensor between two layers.
    """
    if width * height <= WHOLE:
        return height
    found = min(max(BAND // width, MIN_HEIGHT), MAX_BAND // width)
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
        free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        found = int(free // 2 / (TENSORS * bytes_per_pixel * width))
        found = STRIDE << max(0, (found // STRIDE).bit_length() - 1)
    return min(height, max(STRIDE, found // STRIDE * STRIDE))


def latent_height(width: int) -> int:
    """Height of a band of a latent of this width, a multiple of the window of its attention."""
    return max(8, LATENTS // width // 8 * 8)


def computes_whole() -> bool:
    """Whether tensors of any size are computed at once: with gradients, and in graphs that torch.export makes."""
    exporting = getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)  # the former came with PyTorch 2.7
    return torch.is_grad_enabled() or exporting()


class Recomputed:
    """layers(x), recomputed in bands at each read.

    Attributes:
        shape: output shape; channels None.
    """

    def __init__(self, layers: nn.Sequential, x: Tensor, height: int) -> None:
        self.layers = layers
        self.x = x
        self.height = height  # of a band of x
        batch, _, *sides = x.shape
        self.shape = (batch, None, *(scaled_height(layers, side) for side in sides))

    def __iter__(self) -> Iterator[Tensor]:
        return in_bands(self.layers, bands_of([self.x], self.height), self.x.shape[2])


def bands_of(parts: Sequence[Tensor | Recomputed], height: int) -> Iterator[Tensor]:
    """Bands of this height of tensors `[B, C, h, w]` of one size, joined along their channels.

    Only the first may be a `Recomputed`; the bands are then its own.
    """
    first, *others = parts
    for here, band in located(first if isinstance(first, Recomputed) else first.split(height, 2)):
        yield torch.cat((band, *(other[:, :, here] for other in others)), 1) if others else band


def in_bands(layers: Sequence[nn.Module] | nn.Sequential, bands: Iterable[Tensor], height: int) -> Iterator[Tensor]:
    """The output, in bands, of a chain of layers for a tensor `[B, C, height, w]` that comes in bands.

    Containers in `layers` are taken apart. A single band of all rows goes through the layers as they are.
    """
    for layer in layers:
        if isinstance(layer, nn.Sequential):
            bands = in_bands(layer, bands, height)
            height = scaled_height(layer, height)
        else:
            bands = _layer_in_bands(layer, bands, height)
            height = scaled_height([layer], height)
    return iter(bands)


def scaled_height(layers: Sequence[nn.Module] | nn.Sequential, height: int) -> int:
    """The height that a chain of layers makes of another."""
    for layer in layers:
        inner = isinstance(layer, nn.Sequential)
        height = scaled_height(layer, height) if inner else int(height * footprint(layer).scale)
    return height


def _layer_in_bands(layer: nn.Module, bands: Iterable[Tensor], height: int) -> Iterator[Tensor]:
    halo, align, scale = footprint(layer)
    kept = None  # the input's rows start … end
    start = 0
    end = 0
    done = 0  # rows before it are computed
    for band in bands:
        end += band.shape[2]
        kept = band if kept is None else torch.cat((kept, band), 2)
        del band
        last_band = end == height
        stop = end if last_band else end // align * align
        # Emit the held-back rows as a band of their own.
        targets = [stop - halo] if done or not last_band else []
        targets += [stop] if last_band else []
        for ready in targets:
            if ready <= done:
                continue
            first, last = (int((at - start) * scale) for at in (done, ready))
            result = [layer(kept[:, :, : min(ready + halo, stop) - start])[:, :, first:last]]
            above = max(0, ready - halo)
            kept = None if above == end else kept[:, :, above - start :].clone()
            start = above
            done = ready
            yield result.pop()  # so that nothing here holds it while the layers that follow work


def content_bands(mask: nn.Module, y: Tensor, height: int) -> Iterator[Tensor]:
    """`mask.content` of a latent `[B, M, h, w]`, in bands of about this height (models/lae.py)."""
    return (mask.alpha * band for band in in_bands([mask.latent_attn], bands_of([y], height), y.shape[2]))


def log_m_of_band(mask: nn.Module, index: Tensor, here: slice, content: Tensor) -> Tensor:
    """ln m of some rows, from their content and an index as in `mask.rate`, which for maps is that of all rows."""
    return mask.log_m(*mask.rate(index[:, :, here] if index.dim() == 4 else index), content)


def scaled_bands(lae: nn.Module, y: Tensor, index: Tensor, height: int) -> Iterator[Tensor]:
    """y · m of an LAE, in bands of about this height."""
    for here, content in located(content_bands(lae.mask, y, height)):
        yield y[:, :, here] * log_m_of_band(lae.mask, index, here=here, content=content).exp()


def gather(bands: Iterable[Tensor], height: int) -> Tensor:
    """The tensor `[B, C, height, w]` that comes in bands."""
    out = None
    for here, band in located(bands):
        if band.shape[2] == height:
            return band
        if out is None:
            batch, channels, _, width = band.shape
            if band.is_contiguous(memory_format=torch.channels_last):
                out = large_empty((batch, height, width, channels), band.dtype, band.device).movedim(-1, 1)
            else:
                out = large_empty((batch, channels, height, width), band.dtype, band.device)
        out[:, :, here] = band
    if out.device.type == "cpu" and out.nbytes >= LARGE:
        give_back_freed_memory()
    return out


def located(bands: Iterable[Tensor]) -> Iterator[tuple[slice, Tensor]]:
    """Bands, each with its place: the slice of rows of the whole."""
    at = 0
    for band in bands:
        at += band.shape[2]
        yield slice(at - band.shape[2], at), band
