"""Small tensors on their way to the device of the model, and room for large ones."""

import contextlib
import ctypes
import math
import mmap
from collections.abc import Sequence

import torch
from torch import Tensor

LARGE = 2**26  # bytes: a latent of some twenty megapixels; what is smaller comes and goes too often for its own mapping


def send(x: Tensor, device: torch.device) -> Tensor:
    """x on a device, from pinned memory on its way to a GPU: another copy would wait for all work before it."""
    if x.device.type == "cpu" and device.type == "cuda":
        return x.contiguous().pin_memory().to(device, non_blocking=True)  # an expanded tensor cannot be pinned
    return x.to(device)


def large_empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """`torch.empty`. On a CPU large tensors get their own mapping; the heap fragments (utils/device.py says why)."""
    size = math.prod(shape) * dtype.itemsize
    if device.type != "cpu" or size < LARGE or not hasattr(mmap, "MAP_ANONYMOUS"):  # Windows has none
        return torch.empty(shape, dtype=dtype, device=device)
    memory = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(memory, dtype=dtype).view(shape)  # the tensor keeps `memory` alive


def give_back_freed_memory() -> None:
    """Let glibc give all pages of the heap that hold nothing back to the system, as it keeps them by itself
    (utils/device.py); does nothing where there is no glibc."""
    with contextlib.suppress(OSError, AttributeError, TypeError):  # Windows has no library of that kind
        ctypes.CDLL(None).malloc_trim(0)
