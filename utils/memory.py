"""How the C library treats freed memory, and what becomes of a picture that a GPU's has no room for."""

import contextlib
import ctypes
import sys
from collections.abc import Iterator

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4  # glibc's malloc.h


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
def room_for_a_picture() -> Iterator[None]:
    """Where a GPU's memory is too small, a ValueError: the other pictures can go on."""
    import torch  # here: it takes seconds, and not all that a script does needs it

    try:
        yield
    except torch.OutOfMemoryError:
        raise ValueError("too large for the memory of this GPU: try --device cpu") from None
