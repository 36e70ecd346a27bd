"""Download test pictures, or published weights, from their public addresses.

    python -m utils.download kodak                       # 24 pictures into data/kodak
    python -m utils.download clic2020 --out pictures     # another folder

Pictures are checked: those of Kodak by SHA-256, those of the other sets by the SHA-256 of their archive where it is
known, by their number, and by decoding each. A download that breaks off goes on where it was when the command is
given again, and what is there already stays.
"""

import argparse
from pathlib import Path

from tqdm import tqdm

from utils import cli
from utils.download.fetch import fetch, fetch_first, file_name
from utils.download.sources import ARCHIVES, KODAK, KODAK_URL, WEIGHTS, WEIGHTS_NAME, Archive, Source
from utils.download.unpack import check_pictures, unpack
from utils.errors import UserError
from utils.files import BUNDLED

SETS = {
    "kodak": "24 photographs, 15 MB",
    "clic2020": "41 of the professional validation set, 135 MB",
    "clic2020-test": "250 of the professional test set, 0.9 GB",
    "tecnick": "100 of 1200×1200 pixels, of an archive of 0.5 GB",
    "weights": "TCM_VBR as the authors trained it",
}


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = cli.make_parser(__doc__)
    add = parser.add_argument
    add("what", choices=SETS, metavar="WHAT", help="; ".join(f"{name}: {text}" for name, text in SETS.items()))
    add("--out", type=Path, metavar="DIR", help=f"folder (default: data/WHAT, and {BUNDLED.parent.name} for weights)")
    add("--base-url", metavar="URL", help="a mirror: the files are taken from URL/NAME instead of the public address")
    args = parser.parse_args(argv)
    args.out = args.out or (BUNDLED.parent if args.what == "weights" else Path("data") / args.what)
    return args


def mirrored(source: Source, base_url: str | None, name: str = "") -> Source:
    """A source at a mirror, under a name (default: its own)."""
    return source._replace(url=f"{base_url.rstrip('/')}/{name or file_name(source.url)}") if base_url else source


def download_kodak(folder: Path, base_url: str | None) -> None:
    for name, sha256 in tqdm(KODAK.items(), desc="Kodak", unit="image", disable=None):
        fetch(Source(f"{(base_url or KODAK_URL).rstrip('/')}/{name}", sha256), folder / name)


def download_archive(archive: Archive, folder: Path, base_url: str | None) -> None:
    """A set into a folder that is new or empty, or holds the set already. UserError where it holds other things."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        check_pictures(folder, archive.pictures)
        return
    sources = [mirrored(archive.sources[0], base_url)] if base_url else archive.sources
    path = fetch_first(sources, folder.parent)
    try:
        unpack(path, archive, folder)
    except UserError:
        path.unlink()  # the same command downloads it again
        raise
    path.unlink()


def download_weights(folder: Path, base_url: str | None) -> None:
    """The published weights. UserError where the file is no checkpoint; it is not kept then."""
    from utils.checkpoint import CheckpointError, read_checkpoint

    path = fetch(mirrored(WEIGHTS, base_url, WEIGHTS_NAME), folder / WEIGHTS_NAME)
    try:
        read_checkpoint(path)
    except CheckpointError as error:
        path.unlink()
        raise UserError(f"{error}: what came is no checkpoint; nothing is kept") from None


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    if args.what == "kodak":
        download_kodak(args.out, args.base_url)
    elif args.what == "weights":
        download_weights(args.out, args.base_url)
    else:
        download_archive(ARCHIVES[args.what], args.out, args.base_url)
    print(args.out / WEIGHTS_NAME if args.what == "weights" else args.out)


if __name__ == "__main__":
    cli.run(main)
