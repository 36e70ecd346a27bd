"""Rate, distortion and time of pictures, one at one rate: by code lengths, or from its file."""

import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor
from tqdm import tqdm

from models import Codec, VariableRate
from models.lambdas import index_to_lambda
from utils.codec.analyzed import AnalyzedImage
from utils.codec.decode import decode, picture_of
from utils.codec.encode import EncodeResult, MeasuredFile, encode
from utils.codec.quality_map import psnr_by_region
from utils.codec.request import EncodeRequest
from utils.device import out_of_memory_as_value_error, timed
from utils.distributed import DistContext
from utils.evaluation.results import Result, decibels, distortion_of, mse_of_psnr, short_names
from utils.images import read_image
from utils.messages import print_error, print_note
from utils.metrics import ms_ssim_value, psnr
from utils.pictures import ImageError

J = TypeVar("J")
T = TypeVar("T")


def for_each(
    paths: list[Path], jobs: Sequence[J], device: torch.device, work: Callable[[str, Tensor, J], T],
    names: dict[Path, str] | None = None, quiet: bool = False,
) -> Iterator[tuple[Path, J, T | None]]:
    """Do each job with each picture: its path, the job, and what `work` returned, or None where that failed.

    A picture that cannot be read, or with which a job fails, is named on stderr once, and the others go on.

    Args:
        jobs: rates, or whatever else `work` takes.
        work: gets a picture's short name, the picture, uint8 `[3, H, W]` on the device, and a job. It fails by a
            ValueError: sides or latents that the file format cannot hold, or no room in memory.
        names: short names of the pictures (default: those that are short among `paths`).
        quiet: without notes about how pictures are read, which were told before.
    """
    names = names or short_names(paths)
    failed = set()
    for path in paths:
        try:
            image = read_image(path, **({} if quiet else {"note": functools.partial(print_note, path)}))
        except ImageError as error:
            image = error
        for job in jobs:
            result = None
            try:
                if isinstance(image, ImageError):
                    raise image
                with out_of_memory_as_value_error():
                    result = work(names[path], image.to(device), job)
            except (ImageError, ValueError) as error:
                if path not in failed:
                    print_error(path, error)
                failed.add(path)
            yield path, job, result


def measure_all(
    paths: list[Path], jobs: Sequence[J], context: DistContext, device: torch.device,
    work: Callable[[str, Tensor, J], T], title: str, tell: Callable[[T], None] | None = None,
    names: dict[Path, str] | None = None, quiet: bool = False,
) -> tuple[list[T], int]:
    """The values of `work` for every picture by every job, in this order, and how many pictures failed.

    Processes share the pictures; all of them get what all have found. A job that fails with every picture has
    no values; a picture with which another job fails is left out of all, or means would be of different pictures.

    Args:
        work, names, quiet: as those of `for_each`; what `work` returns must be possible to pickle.
        title: what the progress bar is called.
        tell: called with each value of this process as soon as it is there.

    Raises:
        UserError: another process has ended.
    """
    mine = context.share(paths)
    number = len(jobs)
    each = for_each(mine, jobs, device=device, work=work, names=names or short_names(paths), quiet=quiet)
    bar = tqdm(each, total=len(mine) * number, desc=title, unit="job", disable=None if context.is_main else True)
    values = []
    for _, _, value in bar:
        values.append(value)
        if tell and value is not None:
            tell(value)
    pictures = context.join([values[i * number : (i + 1) * number] for i in range(len(mine))])
    done = [job for job in range(number) if any(found[job] is not None for found in pictures)]
    whole = [found for found in pictures if done and all(found[job] is not None for job in done)]
    partly = sum(any(value is not None for value in found) for found in pictures) - len(whole)
    if partly and context.is_main:
        print_note(title, f"{partly} of {len(pictures)} pictures failed at some of the rates, and are left out of all")
    return [found[job] for found in whole for job in done], sum(None in found for found in pictures)


def evaluate(model: Codec, name: str, image: Tensor, request: EncodeRequest, real: bool) -> tuple[Result, Tensor]:
    """Measure one picture, uint8 `[3, H, W]` on the model's device, and return its reconstruction as well.

    Args:
        request: with a map there is no loss, as there is no one λ. An estimate takes its index and `nearest` alone.
        real: encode, decode and count the bytes, instead of summing up code lengths.

    Raises:
        ValueError: it cannot be coded, or has no room in memory.
    """
    if real:
        encoded = encode(model, image, request)
        result, decoded = evaluate_file(model, name, image, file=encoded, encode_seconds=encoded.seconds)
        if request.quality_map:
            result.loss = None
            result.psnr_inside, result.psnr_outside = psnr_by_region(image, decoded, request.quality_map.region)
        return result, decoded
    count, decoded = estimate(model, image, index=request.index, nearest=request.nearest)
    return _of_model(model, result_of(name, image, decoded, count=count, index=request.index)), decoded


def evaluate_file(
    model: Codec, name: str, image: Tensor, file: EncodeResult | MeasuredFile, encode_seconds: float
) -> tuple[Result, Tensor]:
    """As `evaluate`, for a file that exists already."""
    decoded, decode_seconds = timed(lambda: decode(model, file.data), image.device)
    seconds = {"encode_seconds": encode_seconds, "decode_seconds": decode_seconds}
    result = result_of(name, image, decoded, count=8.0 * len(file.data), index=file.index, **seconds)
    return _of_model(model, result), decoded


@out_of_memory_as_value_error()
@torch.no_grad()
def estimate(model: Codec, image: Tensor, index: float | None, nearest: bool = False) -> tuple[float, Tensor]:
    """Bits of a file by its code lengths, some bytes off (`CODER_BITS`), and its picture, without coding."""
    model.resolve_index(index, 1)  # may refuse it
    analyzed = AnalyzedImage(model, image, nearest=nearest)
    trial = analyzed.quantize(index, last=True, complete=True)
    y_hat = trial.quantized.y_hat
    return trial.bits, picture_of(model, y_hat, index, *image.shape[1:], gray=analyzed.gray)


def result_of(name: str, image: Tensor, decoded: Tensor, count: float, index: float | None, **seconds: float) -> Result:
    """The result of a picture and of what `count` bits decode to, both uint8 `[3, H, W]` on one device."""
    height, width = image.shape[1:]
    quality = ms_ssim_value(image, decoded)
    return Result(
        image=name, width=width, height=height, index=index, bpp=count / (height * width), psnr=psnr(image, decoded),
        ms_ssim=quality, ms_ssim_db=None if quality is None else decibels(quality), **seconds,
    )


def _of_model(model: Codec, result: Result) -> Result:
    """A result with its loss; at a fixed rate without an index."""
    if not isinstance(model, VariableRate):
        result.index = None
    elif (distortion := distortion_of(model.metric, mse_of_psnr(result.psnr), result.ms_ssim)) is not None:
        result.loss = result.bpp + index_to_lambda(result.index, model.metric) * distortion
    return result
