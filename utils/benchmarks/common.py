"""What the benchmarks share: times of work done in turn, a matrix product to compare with, operations, peak memory."""

import resource
import statistics
from collections.abc import Callable, Collection

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from utils.device import timed

WARM_UPS = 2  # untimed runs: memory is allocated and kernels are chosen in the first ones


def median_seconds(works: Collection[Callable[[], object]], device: torch.device, runs: int) -> list[float]:
    """Median seconds of each piece of work.

    They are run in turn, because a shared machine's speed drifts: what is compared has to be measured together.
    """
    rounds = [[timed(work, device)[1] for work in works] for _ in range(WARM_UPS + runs)]
    return [statistics.median(seconds) for seconds in zip(*rounds[WARM_UPS:], strict=True)]


def matrix_product(device: torch.device, dtype: torch.dtype = torch.float32) -> Callable[[], Tensor]:
    """A product of two square matrices, whose rate is the one that networks are compared with."""
    size = 8192 if device.type == "cuda" else 2048
    a, b = torch.randn(2, size, size, device=device, dtype=dtype)
    return lambda: a @ b


def count_macs(work: Callable[[], object]) -> float:
    """Multiply-accumulate operations, by PyTorch's FLOP counter."""
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops() / 2


def peak_memory(device: torch.device) -> int:
    """Peak bytes so far: of the process on the CPU, of PyTorch's tensors on a GPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
