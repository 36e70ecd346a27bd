"""Finding pictures among files and folders."""

import functools
from collections.abc import Iterable
from pathlib import Path

from PIL import Image

from utils.errors import UserError
from utils.files import find_files
from utils.messages import print_note
from utils.pictures.read import FORMATS, ImageError

SAMPLES = ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg")  # photographs in every scikit-image wheel


@functools.cache
def suffixes() -> frozenset[str]:
    """Suffixes of the formats that the installed Pillow can read, in lower case."""
    known = Image.registered_extensions().items()
    return frozenset(suffix for suffix, name in known if name in FORMATS and name in Image.OPEN) | {".mpo"}


def find_images(paths: Iterable[str | Path]) -> list[Path]:
    """Pictures among files and folders, as `find_files`. ImageError where there is none."""
    return find_files(paths, suffixes(), what="pictures", error=ImageError)


def part_of_data_set(paths: Iterable[str | Path], part: str) -> list[Path]:
    """Folders as they are, but DIR/train or DIR/test in place of a DIR that has both, the layout of published scripts.

    Args:
        part: "train" or "test".
    """
    found = [Path(path) for path in paths]
    for i, path in enumerate(found):
        if (path / "train").is_dir() and (path / "test").is_dir():
            found[i] = path / part
            print_note(path, f"has train and test: {found[i]} is used")
    return found


def find_images_or_samples(paths: list[str] | None) -> list[Path]:
    """`find_images` to measure on, or the photographs of the installed scikit-image where no paths are given."""
    if paths:
        return find_images(part_of_data_set(paths, "test"))
    try:
        import skimage
    except ImportError:
        raise UserError("no -d given, and scikit-image, whose photographs are the default, is missing") from None
    folder = Path(skimage.__file__).parent / "data"
    return find_images(folder / name for name in SAMPLES)
