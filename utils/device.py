"""The machine that computes: its device, time and memory."""

import contextlib
import ctypes
import errno
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, TypeVar

from utils.errors import UserError

if TYPE_CHECKING:
    import torch

T = TypeVar("T")
RESIDENT_UNIT = 1 if sys.platform == "darwin" else 1024  # bytes: of getrusage's ru_maxrss
NO_MEMORY = (  # in texts of errors, in small letters
    "out of memory", "allocate memory", "bad_alloc", "alloc_failed", "allocation_failed", "unable to find an engine",
    "cublas_status_not_initialized",
)  # fmt: skip
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4  # glibc's malloc.h


def pick_device(name: str) -> "torch.device":
    """The device of a name; "auto" is CUDA where there is one. UserError if "cuda" is asked for and absent."""
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: this machine has no CUDA device that PyTorch can use")
    return torch.device(name)


def local_processes() -> int:
    """Processes of this run on this machine, as torchrun says."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def clock(device: "torch.device") -> float:
    """Seconds of a monotonic clock, once a GPU has finished what was asked of it."""
    if device.type == "cuda":
        import torch

        torch.cuda.synchronize(device)
    return time.perf_counter()


def timed(work: Callable[[], T], device: "torch.device") -> tuple[T, float]:
    """The result of `work`, and the seconds it took."""
    start = clock(device)
    value = work()
    return value, clock(device) - start


def processor(device: "torch.device") -> str:
    """The name of a GPU, or of the processor and how many threads PyTorch uses."""
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, StopIteration), open("/proc/cpuinfo") as file:
        name = next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    return f"{name}, {torch.get_num_threads()} threads"


def choose_kernels_for_training() -> None:
    """Let cuDNN time its kernels, and leave its attention out: gradients with a mask may be NaN (reported upstream)."""
    import torch

    torch.backends.cudnn.benchmark = True
    torch.backends.cuda.enable_cudnn_sdp(False)


def keep_freed_memory() -> None:
    """Let glibc reuse large blocks instead of returning each to the kernel.

    By default every tensor over 32 MiB is mapped afresh, and the kernel zeroes its pages one fault at a
    time: a fifth of the time of analysis and synthesis on a CPU. The process keeps its peak size.
    Does nothing where there is no glibc.
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
        mallopt(_M_TOP_PAD, 2**28)


@contextlib.contextmanager
def out_of_memory_as_value_error() -> Iterator[None]:
    """Turn running out of memory, a GPU's or this machine's, into a ValueError, so that the other pictures go on."""
    try:
        yield
    except (RuntimeError, OSError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        on_gpu = any(name in str(error) for name in ("CUDA", "cuDNN", "CUDNN", "CUBLAS", "engine"))
        where = "this GPU: try --device cpu" if on_gpu else "this machine"
        raise ValueError(f"too large for the memory of {where}") from None


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error means that there was no memory, whoever wanted it.

    PyTorch's allocator on the CPU and C++ raise a plain RuntimeError, whose text alone tells. oneDNN says no more than
    that it could not create a primitive; a shape that it does not support is another text ("primitive descriptor").
    cuDNN finds no engine where none has room to work, and cuBLAS cannot begin.
    """
    if isinstance(error, OSError):  # raised by mmap
        return error.errno == errno.ENOMEM
    if isinstance(error, MemoryError) or str(error).strip() == "could not create a primitive":
        return True
    text = str(error).lower()
    return any(phrase in text for phrase in NO_MEMORY)
