"""Weights that code one picture after the other, and what there is to say of each (codec_vbr.py)."""

import time

import numpy as np
import torch
from tqdm import tqdm

from models.tcm import TCM_VBR
from utils import cli
from utils.checkpoint import load_model
from utils.evaluation import decode, encode
from utils.images import to_pixels, to_tensor
from utils.memory import room_for_a_picture
from utils.metrics import psnr
from utils.online import Outcome, need_variable_rate, produce
from utils.orders import Order
from utils.pixels import png_bytes
from utils.refine import Step


class Codec:
    """A model on its device.

    Args:
        checkpoint: file of the weights.
        device: "auto", "cpu" or "cuda".
        threads: of the CPU; PyTorch's own choice where there are none.

    Raises:
        CheckpointError: the weights cannot be used.
        UserError: there is no such device.
    """

    def __init__(self, checkpoint: str, device: str, threads: int | None) -> None:
        if threads:
            torch.set_num_threads(threads)
        self.checkpoint, self.device = checkpoint, cli.pick_device(device)
        self.model = load_model(checkpoint, self.device)
        self.model.prepare()

    @room_for_a_picture()
    def encode(self, name: str, pixels: np.ndarray, order: Order, verify: bool) -> tuple[bytes, str]:
        """A picture, uint8 `[H, W, 3]`, as a file, and what there is to say of it.

        Raises:
            UserError: the order needs variable-rate weights.
            ValueError: the picture cannot be coded, or not as ordered.
        """
        image, steps = to_tensor(pixels), order.refinement.steps
        outcome, decoded = None, None
        if order.steered or steps:
            need_variable_rate(self.model, self.checkpoint)
            with tqdm(total=steps, desc=name, unit="step", leave=False, disable=None if steps else True) as bar:

                def on_step(step: Step) -> None:
                    bar.update(step.number > 0)

                outcome = produce(self.model, name, image.to(self.device), order, on_step, judge=False)
            data, index, decoded = outcome.data, outcome.index, outcome.decoded
            seconds = outcome.control_seconds + outcome.refine_seconds
        else:
            start = time.perf_counter()
            index = order.index if isinstance(self.model, TCM_VBR) else None
            data = encode(self.model, image.to(self.device), index)
            seconds = time.perf_counter() - start
        height, width = image.shape[1:]
        said = f"{len(data)} bytes, {8 * len(data) / (height * width):.4f} bpp"
        said += "" if index is None else f", index {index:.4g}"
        said += f", {width}×{height}, {seconds:.2f} s"
        said += _said_of(outcome) if outcome else ""
        if verify:
            decoded = decode(self.model, data) if decoded is None else decoded
            said += f", verified: {psnr(image, decoded.cpu()):.2f} dB"
        return data, said

    @room_for_a_picture()
    def decode(self, data: bytes, max_pixels: int) -> tuple[bytes, str]:
        """The picture in a file, as PNG, and what there is to say of it. FileError and DecodingError as `decode`."""
        start = time.perf_counter()
        pixels = to_pixels(decode(self.model, data, max_pixels))  # which waits for a GPU
        seconds = time.perf_counter() - start
        return png_bytes(pixels), f"{pixels.shape[1]}×{pixels.shape[0]}, {seconds:.2f} s"


def _said_of(outcome: Outcome) -> str:
    """What there is to say of a target and a refinement."""
    said = "" if outcome.error is None else f", {100 * outcome.error:+.2f} % off the target"
    said += f", the target is {outcome.note}" if outcome.note else ""
    said += f", {outcome.probes} probe{'' if outcome.probes == 1 else 's'}" if outcome.error is not None else ""
    if outcome.chosen:
        better, plain = outcome.result, outcome.plain
        return f"{said}, refined: {better.psnr - plain.psnr:+.2f} dB, {100 * (better.bpp / plain.bpp - 1):+.2f} % bits"
    return f"{said}, refined: nothing better found" if outcome.steps else said
