"""What every script does the same way: help texts with defaults, and errors in one line.

Importing PyTorch takes seconds, and help, `info` and the refusal of bad input do without it. So scripts, and modules of
which they need a part before, import what needs PyTorch inside their functions.
"""

import argparse
import os
import sys
from collections.abc import Callable

from PIL import Image

from utils.device import keep_freed_memory
from utils.errors import UserError
from utils.messages import print_note


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Appends the default of each option, except where there is none or the help text names it already."""

    def _get_help_string(self, action: argparse.Action) -> str:
        named = action.default is None or action.default is False or "default" in (action.help or "")
        return action.help if named else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """A parser that refuses empty arguments: where a path is meant, they would be the current folder, or none."""

    def parse_known_args(self, args: list[str] | None = None, namespace: argparse.Namespace | None = None) -> tuple:
        args = sys.argv[1:] if args is None else args
        for before, argument in zip(["the command", *args], args, strict=False):
            if not argument or argument.startswith("-") and argument.endswith("="):
                place = argument or f"after {before}"
                self.error(f"an argument is empty ({place}): is a variable of the shell not set?")
        return super().parse_known_args(args, namespace)


def make_parser(docstring: str | None) -> argparse.ArgumentParser:
    """A parser whose description is the first paragraph of a module's docstring (None with python -OO); its usage is as
    the module is run."""
    module = getattr(sys.modules["__main__"], "__spec__", None)  # of python -m
    name = module and f"python -m {module.name.removesuffix('.__main__')}"
    description = (docstring or "").split("\n\n")[0]
    # No abbreviations: --lr would be taken for --lr_epoch, of published scripts, which has no meaning.
    return Parser(name, description=description, formatter_class=HelpFormatter, allow_abbrev=False)


class _WithoutMeaning(argparse.Action):
    def __call__(self, parser: object, namespace: object, values: object, option_string: str | None = None) -> None:
        print_note(option_string, "an option of published scripts that has no meaning here")


def accept_published(parser: argparse.ArgumentParser, *names: str) -> None:
    """Accept options of published scripts that have no meaning here, with or without a value; each is noted."""
    for name in names:
        parser.add_argument(name, nargs="*", action=_WithoutMeaning, dest=argparse.SUPPRESS, help=argparse.SUPPRESS)


def whole_number(text: str) -> int:
    """A whole number, also in the form of published command lines: 100.0."""
    value = float(text)
    if not value.is_integer():  # infinity is none
        raise ValueError
    return int(value)


def positive(text: str) -> int:
    """A whole number of at least 1."""
    try:
        value = whole_number(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is no whole number of at least 1")
    return value


def add_device_argument(parser: argparse.ArgumentParser, published: bool = False) -> None:
    """Add --device, and for a published script its --cuda, which is accepted and has no effect."""
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"), help="where to compute")
    if published:
        text = "accepted for published command lines: a GPU is used where there is one"
        parser.add_argument("--cuda", action="store_true", help=text)


def run(main: Callable[[], int | None]) -> None:
    """Run a script's main and exit with its status: 1 after a UserError or OSError, 130 after Ctrl-C.

    What a terminal's encoding lacks, also names that are no UTF-8, is printed with backslashes. Closed streams and
    pipes that nobody reads are no errors.
    """
    keep_freed_memory()
    Image.MAX_IMAGE_PIXELS = None  # Pillow's limit: ours is refused before pixels are decoded (utils/pictures/read.py)
    # A closed stream is None.
    sys.stdout, sys.stderr = (stream or open(os.devnull, "w") for stream in (sys.stdout, sys.stderr))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")
    try:
        status = main()
        sys.stdout.flush()  # here, where a broken pipe is caught
        sys.exit(status)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # for Python's flush at the end
        sys.exit(141)  # as of a program that SIGPIPE ends
    except (UserError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
