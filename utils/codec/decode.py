"""From a file to its picture."""

import torch
from torch import Tensor

from models import Codec, VariableRate
from models.coding.precision import without_autocast
from models.weights import check_codec
from utils.codec.bitstream import BitstreamError, CodedImage, unpack
from utils.codec.quality_map import index_of_places
from utils.device import out_of_memory_as_value_error
from utils.files import MAX_PIXELS
from utils.images import Watch, join_bands


@out_of_memory_as_value_error()
@without_autocast()
def decode(
    model: Codec, data: bytes | bytearray | memoryview | CodedImage, max_pixels: int = MAX_PIXELS,
    watch: Watch | None = None,
) -> Tensor:
    """The picture in a file, uint8 `[3, H, W]` on the model's device.

    Args:
        data: the file, or what `unpack` made of it.
        watch: gets the bands of the picture as they are made.

    Raises:
        BitstreamError: not a file of these weights, or damaged.
        DecodingError: the arithmetic of this machine differs from the encoder's by more than the file allows for.
        ValueError: the picture has no room in memory, or a stream is longer than its symbols can be.
    """
    check_codec(model, "decode")
    if not isinstance(data, (bytes, bytearray, memoryview, CodedImage)):
        raise ValueError(f"decode takes the bytes of a file, not {data!r:.60}: Path(...).read_bytes()")
    coded = data if isinstance(data, CodedImage) else unpack(bytes(data), max_pixels)
    if coded.fingerprint != model.fingerprint:
        model.check_precision()
        theirs = coded.fingerprint.hex()
        ours = model.fingerprint.hex()
        raise BitstreamError(f"encoded with other weights (fingerprint {theirs}, not {ours})")
    if (coded.index is None) == isinstance(model, VariableRate):
        raise BitstreamError("encoded with weights of another kind (fixed-rate or variable-rate)")
    index = coded.index
    if coded.offsets:
        index = index_of_places(coded.index, coded.offsets, coded.shape)
    y_hat = model.decode_latents([[coded.y], [coded.z]], coded.shape, [coded.side_info])
    return picture_of(model, y_hat, index, height=coded.height, width=coded.width, gray=coded.gray, watch=watch)


def picture_of(
    model: Codec, y_hat: Tensor, index: Tensor | float | None, height: int, width: int, gray: bool = False,
    watch: Watch | None = None,
) -> Tensor:
    """The picture of a quantized latent `[1, M, h, w]`, uint8 `[3, height, width]` on the model's device.

    Args:
        gray: all channels are to be their mean.
        watch: as in `decode`.
    """
    rows = 16 * y_hat.shape[2]
    band_height = model.band_height(16 * y_hat.shape[3], rows)
    bands = model.synthesize_bands(y_hat, model.resolve_index(index, 1), band_height)
    if watch:
        bands = watch(bands, rows)
    image = join_bands(bands, height, width)
    if gray:
        image[:] = (image.sum(0, dtype=torch.int16) + 1) // 3  # to the nearest
    return image
