"""Rate, distortion and time of one picture at one rate: estimated from likelihoods, or measured from its file."""

from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor

from models import TCM, TCM_VBR
from models.lambdas import index_to_lambda
from utils.codec.decode import decode
from utils.codec.encode import encode
from utils.codec.request import EncodeRequest
from utils.device import out_of_memory_as_value_error, timed
from utils.images import crop, pad, to_float, to_uint8
from utils.metrics import bits, decibels, distortion, ms_ssim_value, psnr


@dataclass
class Result:
    """One picture at one rate.

    Attributes:
        bpp: bits per original pixel.
        ms_ssim, ms_ssim_db: None for pictures that are too small.
        loss: bpp + λ · D, with D = MSE on the 0–255 scale or 1 − MS-SSIM; None without an index.
        encode_seconds, decode_seconds: None for estimates.
    """

    image: str
    width: int
    height: int
    index: float | None
    bpp: float
    psnr: float
    ms_ssim: float | None = None
    ms_ssim_db: float | None = None
    loss: float | None = None
    encode_seconds: float | None = None
    decode_seconds: float | None = None

    as_dict = asdict


def evaluate(model: TCM, name: str, image: Tensor, index: float | None, real: bool) -> tuple[Result, Tensor]:
    """Measure one picture, uint8 `[3, H, W]` on the model's device, and return its reconstruction as well.

    Args:
        real: encode, decode and count the bytes, instead of estimating.

    Raises:
        ValueError: it cannot be coded, or has no room on the GPU.
    """
    if real:
        encoded = encode(model, image, EncodeRequest(index))
        return evaluate_file(model, name, image, encoded.index, encoded.data, encoded.seconds)
    count, decoded = estimate(model, image, index)
    return _result(model, name, image, index, count, decoded), decoded


def evaluate_file(
    model: TCM, name: str, image: Tensor, index: float | None, data: bytes, encode_seconds: float
) -> tuple[Result, Tensor]:
    """As `evaluate`, for a file that exists already."""
    decoded, decode_seconds = timed(lambda: decode(model, data), image.device)
    result = _result(model, name, image, index, 8.0 * len(data), decoded)
    return replace(result, encode_seconds=encode_seconds, decode_seconds=decode_seconds), decoded


@out_of_memory_as_value_error()
@torch.no_grad()
def estimate(model: TCM, image: Tensor, index: float | None) -> tuple[float, Tensor]:
    """Bits by the likelihoods under the coding tables, and the reconstruction, without coding.

    The tables are selected by the published rule; files are a little smaller.
    """
    out = model(pad(to_float(image)), index, use_scale_table=True)
    x_hat = crop(out["x_hat"], *image.shape[1:])
    return float(sum(bits(likelihoods) for likelihoods in out["likelihoods"].values())), to_uint8(x_hat[0])


def _result(
    model: TCM, name: str, image: Tensor, index: float | None, count: float, decoded: Tensor
) -> Result:
    height, width = image.shape[1:]
    bpp, quality = count / (height * width), ms_ssim_value(image, decoded)
    error = distortion(image, decoded, model.metric)
    return Result(
        image=name,
        width=width,
        height=height,
        index=index if isinstance(model, TCM_VBR) else None,
        bpp=bpp,
        psnr=psnr(image, decoded),
        ms_ssim=quality,
        ms_ssim_db=None if quality is None else decibels(quality),
        loss=None if index is None or error is None else bpp + index_to_lambda(index, model.metric) * error,
    )


def mean(results: list[Result], field: str) -> float | None:
    """Mean of a field over the results that have it."""
    values = [value for result in results if (value := getattr(result, field)) is not None]
    return sum(values) / len(values) if values else None
