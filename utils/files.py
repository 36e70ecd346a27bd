"""Files: finding them, and writing them whole or not at all."""

import contextlib
import errno
import json
import math
import os
import stat
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from utils.errors import UserError
from utils.messages import print_note

MAX_SIDE = 2**16 - 1  # pixels: the file format has 16 bits for each side
MAX_PIXELS = 2**28  # pictures and files of more pixels are refused, as they may be an attack, unless a user allows more
_UMASK = os.umask(0)  # once, as it cannot be read without being changed for all threads
os.umask(_UMASK)
BUNDLED = Path(__file__).resolve().parent.parent / "vbr_models" / "depthconv_vbr.pth.tar"  # the default weights


def find_files(paths: Iterable[str | Path], suffixes: Collection[str], what: str, error: type[Exception]) -> list[Path]:
    """Paths that are files or pipes, whatever their suffix, and files with one of the suffixes in folders; once each.

    Folders are searched recursively, through links too, and the files of each are sorted regardless of case. Hidden
    files are left out; of the others that are left out the number is printed. Broken links and folders that cannot be
    read are in the list, so that they are reported where they are read.

    Args:
        suffixes: in lower case, with their dot.
        what: the kind of file in words ("pictures"), for the message.
        error: raised where a path is missing, or a folder holds none.
    """
    found: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            inside, others = _search(path, suffixes)
            if others:
                kinds = Counter(other.suffix.lower() or "without suffix" for other in others).most_common(3)
                told = ", ".join(f"{count} {kind}" for kind, count in kinds)
                print_note(path, f"{len(others)} files that are no {what} are passed over ({told})")
            if not inside:
                raise error(f"{path}: no {what} in this folder")
            found += sorted(inside, key=lambda p: (str(p).lower(), str(p)))
        elif path.exists():
            found.append(path)
        else:
            raise error(f"{path}: {'a broken link' if path.is_symlink() else 'no such file or folder'}")
    once: dict[str, Path] = {}
    for path in found:
        once.setdefault(os.path.abspath(path), path)
    return list(once.values())


def _search(folder: Path, suffixes: Collection[str]) -> tuple[list[Path], list[Path]]:
    """The files of a folder, with what cannot be read, and files with other suffixes."""
    inside = []
    others = []
    visited = {folder.resolve()}
    walk = os.walk(folder, onerror=lambda error: inside.append(Path(error.filename)), followlinks=True)
    for place, folders, names in walk:
        for name in sorted(folders):
            real = (Path(place) / name).resolve()
            if name.startswith(".") or real in visited:
                folders.remove(name)
                if real in visited:
                    print_note(Path(place) / name, "a link to a folder that is searched already")
            visited.add(real)
        for path in (Path(place) / name for name in names if not name.startswith(".")):
            if os.path.islink(path) or not is_special(path):
                (inside if path.suffix.lower() in suffixes else others).append(path)
    return inside, others


def is_special(path: Path) -> bool:
    """Whether a path is /dev/null, a pipe or the like: what is there is no file, and its name has no meaning.

    Not where that cannot be told, as in a folder without permission: there reading and writing fail, and say why.
    """
    return os.path.exists(path) and not os.path.isfile(path)


@contextlib.contextmanager
def atomic_write(path: str | Path) -> Iterator[BinaryIO]:
    """A binary file that gets its name when the block ends; on an error an older file stays as it was."""
    path = Path(path)
    try:
        if is_special(path):  # /dev/stdout too, which resolves to a name that cannot be opened
            with path.open("wb") as device:
                yield device
        else:
            with _replacing(path.resolve()) as file:  # a symbolic link keeps pointing to the file
                yield file
    except OSError as error:
        if error.errno is None:  # Pillow's
            raise OSError(f"{path}: {error}") from None
        if error.filename is None:  # a full disk does not say which file
            raise OSError(error.errno, error.strerror, str(path)) from None
        raise


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[BinaryIO]:
    """A file of a temporary name that replaces the one of this path when the block ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        handle, temporary = tempfile.mkstemp(prefix=_temporary(path.name), dir=path.parent)
    except OSError as error:  # which names the temporary file
        raise OSError(error.errno, error.strerror, str(path)) from None
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        # mkstemp's 0600 would lock out others who share the folder, and a file that is replaced has its own.
        os.chmod(temporary, stat.S_IMODE(path.stat().st_mode) if path.exists() else 0o666 & ~_UMASK)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.chmod(temporary, 0o600)  # Windows deletes no file that cannot be written
            os.unlink(temporary)
        raise


def check_name_of_png(path: str | Path) -> None:
    """UserError where the name of a picture to be written ends in something else than .png."""
    path = Path(path)
    if path.suffix.lower() not in ("", ".png") and not is_special(path):
        raise UserError(f"{path}: pictures are written as PNG, so its name must end in .png")


def check_output_file(path: str | Path | None) -> None:
    """OSError where no file can be written there, before the work whose result it is to have. None is no path."""
    if path and Path(path).is_dir():
        raise IsADirectoryError(errno.EISDIR, "is a folder, and a file is to be written", str(path))
    if path and not is_special(Path(path)):
        check_output_folder(Path(path).resolve().parent)


def check_standard_output() -> None:
    """OSError where standard output was closed before the program began, and a result is to be written there."""
    if sys.__stdout__ is None:
        raise OSError("standard output is closed")


def check_output_folder(path: str | Path | None) -> None:
    """OSError where no file can be written into a folder, which need not exist yet. None is no path."""
    if not path:
        return
    folder = Path(path)
    while not folder.exists():  # the nearest that there is
        folder = folder.parent
    if not folder.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, "is no folder", str(folder))
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(folder)) from None


def finite(value: Any) -> Any:
    """A value with None for what JSON lacks, in dicts and lists too: NaN, and infinity, the PSNR of a perfect copy."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_json(path: str | Path) -> Any:
    """The value in a JSON file, with or without the mark that some editors put before it. OSError, ValueError."""
    return json.loads(Path(path).read_text("utf-8-sig"))


def write_json(path: str | Path, value: dict | list) -> None:
    """Write whole or not at all, as JSON."""
    with atomic_write(path) as file:
        file.write(json.dumps(value, indent=1).encode())


@contextlib.contextmanager
def json_output(path: str | None) -> Iterator[Callable[[dict | list], None]]:
    """A function that writes results to the file of --json, each time anew; without a path it does nothing.

    The path is checked before the work. `-` is standard output, which then has the last results and nothing else:
    what is printed meanwhile goes to standard error.
    """
    if path != "-":
        check_output_file(path)
        yield lambda value: write_json(path, value) if path else None
        return
    check_standard_output()
    results: list[dict | list] = []
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield results.append
    finally:
        for value in results[-1:]:
            print(json.dumps(value, indent=1))


def remove_left_over(folder: Path, names: str) -> None:
    """Delete unfinished files that killed writers left in a folder; names is a glob pattern of the finished ones."""
    for left_over in folder.glob(_temporary(names) + "*"):
        left_over.unlink()


def _temporary(name: str) -> str:
    """The first part of an unfinished file's name."""
    return f".{os.fsencode(name)[:100].decode(errors='ignore')}."  # short: a name may have 255 bytes with what follows
