"""Matplotlib for files: without a GUI, and without the style of whoever runs it."""

import contextlib
import os
from collections.abc import Iterator

# A backend that is not installed here, as Jupyter names its own to the processes that it starts, fails the import.
_backend = os.environ.pop("MPLBACKEND", None)
import matplotlib  # noqa: E402

if _backend is not None:
    os.environ["MPLBACKEND"] = _backend
    with contextlib.suppress(ValueError):
        matplotlib.rcParams["backend"] = _backend


@contextlib.contextmanager
def own_style(**settings: object) -> Iterator[None]:
    """Figures drawn and written within have Matplotlib's own style and these settings, whatever matplotlibrc says."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(settings)
        yield
