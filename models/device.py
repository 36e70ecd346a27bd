"""Small tensors on their way to the device of the model."""

import torch
from torch import Tensor


def send(x: Tensor, device: torch.device) -> Tensor:
    """x on a device, from pinned memory on its way to a GPU: another copy would wait for all work before it."""
    if x.device.type == "cpu" and device.type == "cuda":
        return x.contiguous().pin_memory().to(device, non_blocking=True)  # an expanded tensor cannot be pinned
    return x.to(device)
