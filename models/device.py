"""Small tensors on their way to the device of the model, and large ones that are gone."""

import contextlib
import ctypes

import torch
from torch import Tensor


def send(x: Tensor, device: torch.device) -> Tensor:
    """x on a device, from pinned memory on its way to a GPU: another copy would wait for all work before it."""
    if x.device.type == "cpu" and device.type == "cuda":
        return x.contiguous().pin_memory().to(device, non_blocking=True)  # an expanded tensor cannot be pinned
    return x.to(device)


def give_back_freed_memory() -> None:
    """Let glibc give all pages that hold nothing back to the system; does nothing where there is no glibc.

    The heap keeps the holes that freed tensors leave (utils/device.py says why), and a larger tensor fits into none.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):  # Windows has no library of that kind
        ctypes.CDLL(None).malloc_trim(0)
