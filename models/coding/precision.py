"""The arithmetic of everything that steers entropy coding."""

import contextlib
import threading
from collections.abc import Iterator

import torch
from torch import backends


@contextlib.contextmanager
def without_autocast() -> Iterator[None]:
    """Compute in the precision of the weights, whatever autocast the caller has switched on. A decorator too."""
    with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
        yield


_lock = threading.Lock()
_inside = 0  # threads that compute in full float32 now
_before = contextlib.ExitStack()  # sets the switches back


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    """Compute in full float32, as TF32 or bfloat16 would steer the decoder, and on a GPU without cuDNN's autotuning.

    PyTorch's switches are of the process: the first thread sets them, and the last one sets them back.
    """
    global _inside
    with without_autocast():
        with _lock:
            if not _inside:
                _before.enter_context(_full_float32())
            _inside += 1
        try:
            yield
        finally:
            with _lock:
                _inside -= 1
                if not _inside:
                    _before.close()


@contextlib.contextmanager
def _full_float32() -> Iterator[None]:
    """Set the switches, and set them back.

    PyTorch 2.9 has a switch `fp32_precision` for all libraries, for each of them, and for each of its operations.
    Only these are touched there: it refuses to read the older ones where a program has set both.
    """
    if not hasattr(backends, "fp32_precision"):
        with _full_float32_before_2_9():
            yield
        return
    cudnn, mkldnn = backends.cudnn, backends.mkldnn
    values = [(cudnn, "enabled", True), (cudnn, "benchmark", False), (cudnn, "deterministic", True)]
    # Global switches first: unset ones inherit.
    switches = (backends, cudnn, cudnn.conv, backends.cuda.matmul, mkldnn.conv, mkldnn.matmul)
    values += [(switch, "fp32_precision", "ieee") for switch in switches]
    with contextlib.ExitStack() as stack:
        for owner, name, value in values:
            if (before := getattr(owner, name)) != value:
                stack.callback(setattr, owner, name, before)
                setattr(owner, name, value)
        yield


@contextlib.contextmanager
def _full_float32_before_2_9() -> Iterator[None]:
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
            yield
    finally:
        torch.set_float32_matmul_precision(precision)
