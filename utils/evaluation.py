"""Rate, distortion and time of one picture at one rate: from likelihoods, or from real files."""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

from models.tcm import TCM, TCM_VBR
from utils.bitstream import MAX_PIXELS, Coded, FileError, pack, unpack
from utils.images import crop, pad, to_float, to_uint8
from utils.lambdas import index_to_lambda
from utils.losses import bits
from utils.memory import room_for_a_picture
from utils.metrics import decibels, ms_ssim_value, mse, psnr

T = TypeVar("T")


@dataclass
class Result:
    """bpp counts the original pixels; MS-SSIM is None for small pictures, seconds for estimates."""

    image: str
    width: int
    height: int
    index: float | None
    bpp: float
    psnr: float
    ms_ssim: float | None
    ms_ssim_db: float | None
    loss: float | None  # bpp + λ · D, what the model is trained for: D = MSE on the 0–255 scale, or 1 − MS-SSIM
    encode_seconds: float | None
    decode_seconds: float | None

    as_dict = asdict


def encode(model: TCM, image: Tensor, index: float | None) -> bytes:
    """A picture, uint8 `[3, H, W]` on the model's device, as the bytes of a file."""
    index = index if isinstance(model, TCM_VBR) else None
    return to_file(model, image.shape[1:], index, model.compress(pad(to_float(image)), index, guarded=True))


def to_file(model: TCM, size: Sequence[int], index: float | None, coded: dict) -> bytes:
    """What a model coded of a picture of size (height, width), as a file."""
    (y,), (z,) = coded["strings"]
    height, width = size
    return pack(Coded(width, height, index, y, z, model.fingerprint, coded["guards"][0]))


def decode(model: TCM, data: bytes, max_pixels: int = MAX_PIXELS) -> Tensor:
    """The picture in a file, uint8 `[3, H, W]`.

    Raises:
        FileError: not a file of these weights, or damaged.
        DecodingError: the arithmetic of this machine differs from the encoder's by more than the file allows for.
    """
    coded = unpack(data, max_pixels)
    if coded.fingerprint not in (None, model.fingerprint):
        raise FileError(
            f"encoded with other weights (fingerprint {coded.fingerprint.hex()}, not {model.fingerprint.hex()})"
        )
    if (coded.index is None) == isinstance(model, TCM_VBR):
        raise FileError("encoded with weights of another kind (fixed-rate or variable-rate)")
    guards = None if coded.guard is None else [coded.guard]
    out = model.decompress([[coded.y], [coded.z]], coded.shape, coded.index, guards)
    return to_uint8(crop(out["x_hat"], coded.height, coded.width)[0])


@torch.no_grad()
def estimate(model: TCM, image: Tensor, index: float | None) -> tuple[float, Tensor]:
    """Bits by the likelihoods under the coding tables (the published rule; files take a little less), and the
    reconstruction, without coding."""
    out = model(pad(to_float(image)), index, tabled=True)
    x_hat = crop(out["x_hat"], *image.shape[1:])
    return float(sum(bits(likelihoods) for likelihoods in out["likelihoods"].values())), to_uint8(x_hat[0])


def evaluate(model: TCM, name: str, image: Tensor, index: float | None, real: bool) -> tuple[Result, Tensor]:
    """Measure one picture, uint8 `[3, H, W]`; returns the reconstruction as well.

    ValueError where it cannot be coded, or has no room.
    """
    with room_for_a_picture():
        if real:
            data, seconds = timed(lambda: encode(model, image, index), image.device)
            return evaluate_file(model, name, image, index, data, seconds)
        count, decoded = estimate(model, image, index)
    return _result(model, name, image, index, count, decoded), decoded


def evaluate_file(
    model: TCM, name: str, image: Tensor, index: float | None, data: bytes, encode_seconds: float
) -> tuple[Result, Tensor]:
    """As `evaluate`, of a file that is there already."""
    decoded, decode_seconds = timed(lambda: decode(model, data), image.device)
    result = _result(model, name, image, index, 8.0 * len(data), decoded)
    return replace(result, encode_seconds=encode_seconds, decode_seconds=decode_seconds), decoded


def _result(
    model: TCM, name: str, image: Tensor, index: float | None, count: float, decoded: Tensor
) -> Result:
    height, width = image.shape[1:]
    bpp = count / (height * width)
    quality = ms_ssim_value(image, decoded)
    missing = None if quality is None else 1 - quality
    distortion = mse(image, decoded) if model.metric == "mse" else missing
    known = index is not None and distortion is not None
    return Result(
        image=name,
        width=width,
        height=height,
        index=index,
        bpp=bpp,
        psnr=psnr(image, decoded),
        ms_ssim=quality,
        ms_ssim_db=None if quality is None else decibels(quality),
        loss=bpp + index_to_lambda(index, model.metric) * distortion if known else None,
        encode_seconds=None,
        decode_seconds=None,
    )


def mean(results: list[Result], field: str) -> float | None:
    """Mean of a field over the results that have it."""
    values = [value for result in results if (value := getattr(result, field)) is not None]
    return sum(values) / len(values) if values else None


def timed(work: Callable[[], T], device: torch.device) -> tuple[T, float]:
    """What work returns, and its seconds."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    value = work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return value, time.perf_counter() - start
