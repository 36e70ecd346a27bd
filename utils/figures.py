"""Matplotlib for files: without a GUI, and without the style of whoever runs it."""

import contextlib
import functools
import os

# A backend that is not installed here, as Jupyter names its own to the processes that it starts, fails the import.
_backend = os.environ.pop("MPLBACKEND", None)
import matplotlib  # noqa: E402

if _backend is not None:
    os.environ["MPLBACKEND"] = _backend
    with contextlib.suppress(ValueError):
        matplotlib.rcParams["backend"] = _backend
from matplotlib import style  # noqa: E402

# A context in which figures are drawn and written in Matplotlib's own style and the given ones, whatever matplotlibrc
# says.
own_style = functools.partial(style.context, after_reset=True)
