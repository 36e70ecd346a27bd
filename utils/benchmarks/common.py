"""What the benchmarks share: times of work done in turn, a matrix product to compare with, operations, peak memory."""

import resource
import statistics
import warnings
from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count

from utils.device import RESIDENT_UNIT, timed

WARM_UPS = 2  # untimed runs: memory is allocated and kernels are chosen in the first ones


def waits(work: Callable[[], object], device: torch.device) -> list[str]:
    """Where the host waits for a GPU while it does this work: a line each, as PyTorch's debug mode tells them."""
    if device.type != "cuda":
        return []
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            work()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return [f"{w.filename}:{w.lineno}" for w in told if "synchronizing CUDA operation" in str(w.message)]


def peak_of(works: Collection[Callable[[], object]], device: torch.device) -> int:
    """Peak bytes of the process on a CPU, or of PyTorch's tensors on a GPU, once each piece of work has been run."""
    for work in works:
        timed(work, device)
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * RESIDENT_UNIT


def median_seconds(works: Collection[Callable[[], object]], device: torch.device, runs: int) -> list[float]:
    """Median seconds of each piece of work.

    They are run in turn, because a shared machine's speed drifts: what is compared has to be measured together.
    """
    rounds = [[timed(work, device)[1] for work in works] for _ in range(WARM_UPS + runs)]
    return [statistics.median(seconds) for seconds in zip(*rounds[WARM_UPS:], strict=True)]


def convolutions_use_tf32(device: torch.device) -> bool:
    """Whether float32 convolutions are computed in TF32 there, as PyTorch's default is on a GPU that has it."""
    if device.type != "cuda":
        return False
    return torch.backends.cudnn.allow_tf32 and torch.cuda.get_device_capability(device) >= (8, 0)


def matrix_product(
    device: torch.device, dtype: torch.dtype = torch.float32, tf32: bool = False
) -> Callable[[], Tensor]:
    """A product of two square matrices, whose rate is the yardstick for networks of the same precision.

    Make it after the peak memory has been read: on a GPU its matrices take 0.8 GB.
    """
    size = 8192 if device.type == "cuda" else 2048
    a, b = torch.randn(2, size, size, device=device, dtype=dtype)

    def product() -> Tensor:
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("high" if tf32 else "highest")
        try:
            return a @ b
        finally:
            torch.set_float32_matmul_precision(before)

    return product


def _gradients_of_convolution(
    grad_shape: Sequence[int], x_shape: Sequence[int], w_shape: Sequence[int], *args, out_shape: object
) -> int:
    """Operations of the gradients of a convolution, each as many as those of the convolution. PyTorch's own formula
    does not know groups, and counts nearly a hundred times too many for a depth-wise one of 192 channels."""
    transposed, wanted = args[4], args[7]
    return conv_flop_count(x_shape, w_shape, grad_shape, transposed=transposed) * sum(wanted[:2])


def count_macs(work: Callable[[], object]) -> float:
    """Multiply-accumulate operations, by PyTorch's FLOP counter."""
    formulas = {torch.ops.aten.convolution_backward: _gradients_of_convolution}
    with FlopCounterMode(display=False, custom_mapping=formulas) as counter:
        work()
    return counter.get_total_flops() / 2
