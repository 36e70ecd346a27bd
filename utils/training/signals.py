"""What asks a run to stop."""

import contextlib
import signal
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def answered_signals(stop: Callable[[int], None], go_on: Callable[[], None]) -> Iterator[contextlib.ExitStack]:
    """SIGINT, SIGTERM, SIGUSR1 (of batch systems, before the time is up) and SIGHUP (of terminals that close, without
    nohup) call `stop` with their number, a second SIGINT interrupts at once. SIGCONT, after a run was suspended, calls
    `go_on`.

    Yields:
        what will bring the former answers back: the caller may keep these for good by its `pop_all()`.
    """

    def handle(number: int, frame: object) -> None:
        stop(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    handlers = {signal.SIGINT: handle, signal.SIGTERM: handle}
    if hasattr(signal, "SIGCONT"):  # not on Windows
        handlers[signal.SIGCONT] = lambda number, frame: go_on()
        handlers[signal.SIGUSR1] = handle
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
            handlers[signal.SIGHUP] = handle
    with contextlib.ExitStack() as stack:
        for number, handler in handlers.items():
            stack.callback(signal.signal, number, signal.signal(number, handler))
        yield stack
