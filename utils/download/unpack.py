"""Pictures out of an untrusted zip file."""

import os
import stat
import tempfile
import zipfile
import zlib
from pathlib import Path, PurePosixPath

from tqdm import tqdm

from utils.download.sources import Archive
from utils.errors import UserError
from utils.pictures import ImageError, find_images, read_pixels
from utils.pictures.find import suffixes

MAX_BYTES = 2**26  # one picture's file; those of these sets have at most a quarter


def unpack(path: Path, archive: Archive, folder: Path) -> None:
    """Unpack the pictures of a zip file into a new folder, all in one place, all of them or none.

    Raises:
        UserError: it is damaged, has another number of pictures, one that cannot be decoded or is too large, or names
            that lead out of the folder or are links.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        with zipfile.ZipFile(path) as file, tempfile.TemporaryDirectory(prefix=".", dir=folder.parent) as temporary:
            unpacked = Path(temporary) / folder.name
            unpacked.mkdir()
            members = _pictures(file, path, archive)
            for name, member in tqdm(members.items(), desc="unpacking", disable=None, leave=False):
                with file.open(member) as picture:  # no more than it claims, which was checked
                    (unpacked / name).write_bytes(picture.read(member.file_size))
            check_pictures(unpacked, archive.pictures)
            if folder.exists():
                folder.rmdir()  # it is empty, or this fails
            os.replace(unpacked, folder)
    except (zipfile.BadZipFile, zlib.error, RuntimeError, EOFError) as error:
        raise UserError(f"{path}: cannot be unpacked ({error})") from None


def _pictures(file: zipfile.ZipFile, path: Path, archive: Archive) -> dict[str, zipfile.ZipInfo]:
    """The pictures of the archive's folder by their names without folders."""
    found: dict[str, zipfile.ZipInfo] = {}
    for member in file.infolist():
        place = PurePosixPath(member.filename.replace("\\", "/"))
        if place.is_absolute() or ".." in place.parts or stat.S_ISLNK(member.external_attr >> 16):
            raise UserError(f"{path}: refused: it holds {member.filename}, which leads out of its folder")
        hidden = any(part.startswith((".", "__MACOSX")) for part in place.parts)
        if hidden or place.suffix.lower() not in suffixes() or archive.folder not in (*place.parts[:-1], ""):
            continue
        known = member.compress_type in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)  # others unpack without bounds
        if member.file_size > MAX_BYTES or place.name in found or not known:
            cause = "twice" if place.name in found else f"with {member.file_size} bytes"
            cause = cause if known else "compressed in a way that is not expected"
            raise UserError(f"{path}: refused: it holds {place.name} {cause}")
        found[place.name] = member
    if len(found) != archive.pictures:  # before a byte is unpacked
        raise UserError(f"{path}: refused: it holds {len(found)} pictures instead of {archive.pictures}")
    return found


def check_pictures(folder: Path, number: int) -> None:
    """UserError unless a folder holds this number of pictures, and all can be decoded."""
    paths = find_images([folder])
    if len(paths) != number:
        raise UserError(f"{folder}: holds {len(paths)} pictures instead of {number}")
    for path in tqdm(paths, desc="decoding", unit="image", disable=None, leave=False):
        try:
            read_pixels(path)
        except ImageError as error:
            raise UserError(f"{folder.name}/{path.name}: {str(error).removeprefix(f'{path}: ')}") from None
