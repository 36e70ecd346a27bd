"""A file from its address: resumed where it broke off, checked, and put in place whole or not at all."""

import contextlib
import functools
import os
import re
from collections.abc import Iterator, Sequence
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import urljoin

import pooch
import requests
from tqdm import tqdm

from utils.download.sources import Source
from utils.errors import UserError
from utils.messages import print_note

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

TIMEOUT = 30  # seconds without an answer, or between two parts of a file
CHUNK = 2**14  # bytes: when a connection breaks, those of an unfinished chunk are lost
OVERLAP = 2**12  # bytes that a resumed download asks for again, to see that they are those of the same file
MAX_PAGE = 2**20  # bytes of a page that are read: one that says why there is no file is far shorter


def fetch_first(sources: Sequence[Source], folder: Path) -> Path:
    """`fetch` from the first of several addresses that has the file, under the name that it has there."""
    for source in sources[:-1]:
        try:
            return fetch(source, folder / file_name(source.url))
        except UserError as error:
            print_note(source.url, f"{str(error).removeprefix(f'{source.url}: ')}; trying another address")
    return fetch(sources[-1], folder / file_name(sources[-1].url))


def file_name(url: str) -> str:
    return url.split("?")[0].rsplit("/", 1)[-1]


def fetch(source: Source, path: Path) -> Path:
    """Download a file, unless it is at the path already (and has the SHA-256, where one is known); returns the path.

    An unfinished download stays beside it as `.part`, and the next call goes on from there.

    Raises:
        UserError: the address cannot be reached or has no such file, the connection broke, or the SHA-256 is another.
    """
    pooch.get_logger().setLevel("WARNING")  # its notes are those of a cache
    part = path.with_name(path.name + ".part")
    downloader = functools.partial(resume, part=part)
    try:
        pooch.retrieve(source.url, source.sha256, fname=path.name, path=path.parent, downloader=downloader)
    except ValueError:  # pooch's, whose text is two lines
        raise UserError(f"{source.url}: what came has not the SHA-256 that it should have; nothing is kept") from None
    return path


def resume(url: str, output_file: str, _: pooch.Pooch | None, part: Path) -> None:
    """A downloader as pooch calls it, which writes to `part`, from its end on, and renames it to `output_file`."""
    with _alone(part) as part:
        try:
            with requests.Session() as session:
                _receive(_open(session, url, part), part)
        except requests.RequestException as error:
            kept = f"; the same command goes on from {part}" if part.exists() and part.stat().st_size else ""
            raise UserError(f"{url}: {_cause(error)}{kept}") from None
        except OSError as error:  # a full disk does not say which file
            raise OSError(error.errno, error.strerror, str(part)) from None
        os.replace(part, output_file)


@contextlib.contextmanager
def _alone(part: Path) -> Iterator[Path]:
    """The unfinished file, or where another process writes to that, one of this process, which does not outlive it."""
    part.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        try:
            while fcntl:
                file = stack.enter_context(part.open("ab"))
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if part.exists() and os.path.samestat(os.fstat(file.fileno()), part.stat()):
                    break  # else another process has put it in place in between
        except BlockingIOError:
            own = part.with_name(f"{part.stem}.{os.getpid()}.part")
            try:
                yield own
            finally:
                own.unlink(missing_ok=True)
            return
        try:
            yield part
        finally:
            if part.exists() and not part.stat().st_size:
                part.unlink()


def _open(session: requests.Session, url: str, part: Path) -> requests.Response:
    """The answer that has the file, or the rest of it, also behind Google Drive's confirmation."""
    response = _get(session, url, part)
    page = _page(response)
    if page and page.action:
        response = _get(session, urljoin(response.url, page.action), part, fields=page.fields)
        page = _page(response)
    if page:
        raise UserError(f"{url}: answers with a page instead of the file ({page.title or 'without a title'})")
    return response


def _get(session: requests.Session, url: str, part: Path, fields: dict[str, str] | None = None) -> requests.Response:
    """The answer to a request for the file, or for what comes after `part`, with the OVERLAP bytes before it.

    `part` goes where the answer is of another place than was asked for, or of another file: where the bytes of the
    overlap are others.
    """
    size = part.stat().st_size if part.exists() else 0
    start = max(0, size - OVERLAP)
    headers = {"Accept-Encoding": "identity"}  # the lengths told are then those of the file
    if start:
        headers["Range"] = f"bytes={start}-"
    response = session.get(url, params=fields, headers=headers, stream=True, timeout=TIMEOUT)
    if start and response.status_code in (requests.codes.partial_content, requests.codes.range_not_satisfiable):
        begins, _ = _place(response)
        with part.open("rb") as file:
            file.seek(start)
            tail = file.read()
            fits = response.ok and begins == start and response.raw.read(len(tail)) == tail
        if not fits:
            response.close()
            os.truncate(part, 0)  # and not removed, as the lock is on this very file
            return _get(session, url, part, fields=fields)
    response.raise_for_status()
    return response


def _place(response: requests.Response) -> tuple[int | None, int | None]:
    """Where an answer begins in its file, and how long that is, as far as it says so."""
    if response.status_code != requests.codes.partial_content:
        told = response.headers.get("Content-Length")
        return 0, int(told) if told and "Content-Encoding" not in response.headers else None
    found = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("Content-Range", ""))
    if not found:
        return None, None
    return int(found[1]), None if found[2] == "*" else int(found[2])


def _receive(response: requests.Response, part: Path) -> None:
    """Write an answer to a file, or to its end where the answer is the rest of it."""
    rest = response.status_code == requests.codes.partial_content
    _, total = _place(response)
    start = part.stat().st_size if rest else 0
    bar = tqdm(desc=part.stem, total=total, initial=start, unit="B", unit_scale=True, disable=None, leave=False)
    with bar, part.open("ab" if rest else "wb") as file:
        for chunk in response.iter_content(CHUNK):
            file.write(chunk)
            bar.update(len(chunk))
    if total is not None and part.stat().st_size != total:  # urllib3 1 does not say so
        raise requests.ConnectionError(f"{part.stat().st_size} of {total} bytes came")


class Page(HTMLParser):
    """What a page that comes instead of a file says: its title, and Google Drive's form to confirm a download.

    Google Drive does not look for viruses in large files, and says so on a page with a form before it sends them.
    """

    def __init__(self, text: str) -> None:
        super().__init__()
        self.title = ""
        self.action = ""
        self.fields = {}
        self._text: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        if tag == "form" and values.get("id") == "download-form":
            self.action = values.get("action", "")
        elif tag == "input" and self.action and "name" in values:
            self.fields[values["name"]] = values.get("value", "")

    def handle_data(self, data: str) -> None:
        self._text.append(data)

    def handle_endtag(self, tag: str) -> None:
        if tag == "title" and not self.title:
            self.title = re.sub(r"\s+", " ", self._text[-1] if self._text else "").strip()


def _page(response: requests.Response) -> Page | None:
    """The page that an answer is, if it is one."""
    if not response.headers.get("Content-Type", "").startswith("text/html"):
        return None
    with response:
        return Page(next(response.iter_content(MAX_PAGE), b"").decode(errors="replace"))


def _cause(error: Exception) -> str:
    """The innermost cause of an error of requests, whose own text is of several nested ones."""
    if isinstance(error, requests.HTTPError):
        return f"{error.response.status_code} {error.response.reason}"
    while inner := error.__cause__ or error.__context__:
        error = inner
    return getattr(error, "strerror", None) or str(error)
