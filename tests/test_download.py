"""Downloads from a server on this machine: whole, resumed, refused."""

import hashlib
import io
import resource
import signal
import stat
import subprocess
import sys
import threading
import time
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch

from utils.cli import UserError
from utils.download.__main__ import download_archive, main
from utils.download.fetch import CHUNK, OVERLAP, fetch, fetch_first
from utils.download.sources import ARCHIVES, KODAK, WEIGHTS_NAME, Archive, Source
from utils.pictures import png_bytes

ROOT = Path(__file__).resolve().parent.parent
DATA = np.random.default_rng(0).bytes(300_000)
SHA256 = hashlib.sha256(DATA).hexdigest()
FORM = """<!DOCTYPE html><html><head><title>Google Drive - Virus scan warning</title></head><body>
<form id="download-form" action="/confirmed?a=1" method="get">
<input type="submit" id="uc-download-link" value="Download anyway">
<input type="hidden" name="id" value="1&amp;2"><input type="hidden" name="confirm" value="t">
<input type="hidden" name="uuid" value="0-1"></form></body></html>"""


class Server(ThreadingHTTPServer):
    """Serves `files`; `pages` are HTML. The next answer ends after `breaks_after` bytes where that is set; it `hangs`
    then, or the connection closes."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.pages: dict[str, str] = {}
        self.ranges, self.breaks_after, self.hangs = True, None, False
        self.shift = self.lie = 0  # bytes by which the rest of a file is of another place, and by which it says so
        self.leave = threading.Event()
        self.asked: list[tuple[str, str | None]] = []  # path and range

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        wanted = self.headers.get("Range")
        self.server.asked.append((self.path, wanted))
        if page := self.server.pages.get(self.path):
            return self.answer(200, page.encode(), "text/html; charset=utf-8")
        data = self.server.files.get(self.path)
        if data is None:
            return self.send_error(404)
        start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted and self.server.ranges else 0
        if wanted and start >= len(data):
            return self.send_error(416)
        place = None
        if start:
            start = max(0, start + self.server.shift)
            place = f"bytes {start + self.server.lie}-{len(data) - 1}/{len(data)}"
        return self.answer(206 if place else 200, data[start:], "application/octet-stream", place)

    def answer(self, status: int, data: bytes, kind: str, place: str | None = None) -> None:
        self.send_response(status)
        if place:
            self.send_header("Content-Range", place)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data[: self.server.breaks_after])
        self.server.breaks_after = None
        if self.server.hangs:
            self.server.leave.wait(30)

    def log_message(self, *_) -> None:
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with Server() as made:
        threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        yield made
        made.leave.set()
        made.shutdown()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def zip_of(*members: tuple[str | zipfile.ZipInfo, bytes]) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members:
            archive.writestr(name, data)
    return file.getvalue()


def picture(value: int) -> bytes:
    return png_bytes(np.full((4, 5, 3), value, np.uint8))


# One file -------------------------------------------------------------------------------------


def test_a_whole_file_and_no_second_download(server, tmp_path):
    server.files["/file.bin"] = DATA
    source = Source(f"{server.url}/file.bin", SHA256)
    fetch(source, tmp_path / "new" / "file.bin")
    fetch(source, tmp_path / "new" / "file.bin")
    assert (tmp_path / "new" / "file.bin").read_bytes() == DATA
    assert names(tmp_path / "new") == ["file.bin"]
    assert server.asked == [("/file.bin", None)]
    assert (tmp_path / "new" / "file.bin").stat().st_mode & 0o044  # others may read it, as any file that is made


@pytest.mark.parametrize("ranges", [True, False])
def test_a_broken_connection_is_resumed(server, tmp_path, ranges):
    server.files["/file.bin"], server.ranges, server.breaks_after = DATA, ranges, 100_000
    source = Source(f"{server.url}/file.bin", SHA256)
    with pytest.raises(UserError, match=r"/file\.bin: .*; the same command goes on from .*file\.bin\.part"):
        fetch(source, tmp_path / "file.bin")
    assert names(tmp_path) == ["file.bin.part"]
    have = (tmp_path / "file.bin.part").read_bytes()
    assert 0 <= 100_000 - len(have) < CHUNK and DATA.startswith(have)
    fetch(source, tmp_path / "file.bin")
    assert server.asked[1:] == [("/file.bin", f"bytes={len(have) - OVERLAP}-")]
    assert (tmp_path / "file.bin").read_bytes() == DATA
    assert names(tmp_path) == ["file.bin"]


@pytest.mark.parametrize(("shift", "lie"), [(-10**6, 0), (-1000, 0), (-1000, 1000), (1000, -1000)])
def test_the_rest_from_another_place_is_not_taken(server, tmp_path, shift, lie):
    """A server that answers 206 with all of the file, or a proxy that is off by some bytes and may not know it."""
    server.files["/file.bin"], server.shift, server.lie = DATA, shift, lie
    (tmp_path / "file.bin.part").write_bytes(DATA[:100_000])
    fetch(Source(f"{server.url}/file.bin"), tmp_path / "file.bin")  # no hash would tell
    assert (tmp_path / "file.bin").read_bytes() == DATA and names(tmp_path) == ["file.bin"]


def test_an_unfinished_older_file_is_not_gone_on_from(server, tmp_path):
    server.files["/file.bin"] = DATA
    (tmp_path / "file.bin.part").write_bytes(bytes(100_000))
    fetch(Source(f"{server.url}/file.bin"), tmp_path / "file.bin")
    assert (tmp_path / "file.bin").read_bytes() == DATA and names(tmp_path) == ["file.bin"]


def test_two_processes_fetch_the_same_file(server, tmp_path):
    server.files["/file.bin"], server.breaks_after, server.hangs = DATA, 100_000, True
    code = "import sys; from utils.download.fetch import *; fetch(Source(sys.argv[1]), Path(sys.argv[2]))"
    command = [sys.executable, "-c", code, f"{server.url}/file.bin", str(tmp_path / "file.bin")]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL) as first:
        end = time.monotonic() + 60
        while not (tmp_path / "file.bin.part").exists() or (tmp_path / "file.bin.part").stat().st_size < 90_000:
            assert time.monotonic() < end and first.poll() is None
            time.sleep(0.02)
        server.hangs = False
        fetch(Source(f"{server.url}/file.bin"), tmp_path / "file.bin")
        assert (tmp_path / "file.bin").read_bytes() == DATA
        assert {"file.bin", "file.bin.part"} <= set(names(tmp_path))  # the first goes on with its own
        assert len(list(tmp_path.glob("*.part"))) == 1
        first.kill()


def test_an_unfinished_file_that_is_too_long_starts_again(server, tmp_path):
    server.files["/file.bin"] = DATA
    (tmp_path / "file.bin.part").write_bytes(DATA + b"more")
    fetch(Source(f"{server.url}/file.bin", SHA256), tmp_path / "file.bin")
    assert (tmp_path / "file.bin").read_bytes() == DATA


def test_of_a_file_with_another_hash_nothing_is_kept(server, tmp_path):
    server.files["/file.bin"] = DATA[:-1] + b"x"
    with pytest.raises(UserError, match="SHA-256"):
        fetch(Source(f"{server.url}/file.bin", SHA256), tmp_path / "file.bin")
    assert names(tmp_path) == []


def test_another_address_is_tried(server, tmp_path, capsys):
    server.files["/second.bin"] = DATA
    sources = [Source(f"{server.url}/first.bin"), Source(f"{server.url}/second.bin?viasf=1")]
    server.files["/second.bin?viasf=1"] = DATA
    assert fetch_first(sources, tmp_path) == tmp_path / "second.bin"
    assert capsys.readouterr().err == f"note: {server.url}/first.bin: 404 Not Found; trying another address\n"
    with pytest.raises(UserError, match="404"):
        fetch_first(sources[:1], tmp_path)


def test_a_full_disk_names_the_file(server, tmp_path):
    server.files["/file.bin"] = DATA
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(OSError, match=r"file\.bin\.part"):
            fetch(Source(f"{server.url}/file.bin"), tmp_path / "file.bin")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_offline_is_one_line_and_a_status(server, tmp_path):
    url = server.url
    server.shutdown()
    server.server_close()
    command = [sys.executable, "-m", "utils.download", "kodak", "--out", str(tmp_path), "--base-url", url]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert result.returncode == 1
    assert result.stderr == f"error: {url}/kodim01.png: Connection refused\n"
    assert names(tmp_path) == []


def test_ctrl_c_leaves_what_is_resumed(server, tmp_path):
    server.files["/kodim01.png"], server.breaks_after, server.hangs = DATA, 100_000, True
    command = [sys.executable, "-m", "utils.download", "kodak", "--out", str(tmp_path), "--base-url", server.url]
    process = subprocess.Popen(
        command, cwd=ROOT, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # shells let their background jobs ignore it
    )  # fmt: skip
    part, until = tmp_path / "kodim01.png.part", time.monotonic() + 60
    while time.monotonic() < until and not (part.exists() and part.stat().st_size):
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=60)[1].splitlines()[-1] == "interrupted"
    assert process.returncode == 130
    assert names(tmp_path) == [part.name]
    assert DATA.startswith(part.read_bytes())


# Sets of pictures -----------------------------------------------------------------------------


def test_kodak_from_a_mirror(server, tmp_path, monkeypatch, capsys):
    pictures = {f"kodim{i:02}.png": picture(i) for i in (1, 2)}
    server.files |= {f"/mirror/{name}": data for name, data in pictures.items()}
    hashes = {name: hashlib.sha256(data).hexdigest() for name, data in pictures.items()}
    monkeypatch.setattr("utils.download.__main__.KODAK", hashes)
    (tmp_path / "kodim01.png").write_bytes(picture(1))  # is there already
    (tmp_path / "kodim02.png").write_bytes(b"damaged")
    main(["kodak", "--out", str(tmp_path), "--base-url", f"{server.url}/mirror/"])
    assert server.asked == [("/mirror/kodim02.png", None)]
    assert {name: (tmp_path / name).read_bytes() for name in names(tmp_path)} == pictures
    assert capsys.readouterr().out == f"{tmp_path}\n"


def test_hashes_of_kodak(shared):
    """The files of the shared folder are those at the public address: the SHA-1 of all is one that was published."""
    paths = [shared / "data" / "kodak" / name for name in KODAK]
    assert len(paths) == 24
    assert {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths} == KODAK
    together = hashlib.sha1(b"".join(path.read_bytes() for path in paths)).hexdigest()
    assert together == "076e2a5fd4515b5fda677f15fe63dd112d266bc5"


def test_pictures_of_an_archive(server, tmp_path, monkeypatch):
    mine = [(f"TESTIMAGES/RGB/RGB_OR_1200x1200/RGB_OR_1200x1200_00{i}.png", picture(i)) for i in (1, 2, 3)]
    others = [("TESTIMAGES/RGB/RGB_R02_0600x0600/a.png", picture(9)), ("TESTIMAGES/RGB/RGB_OR_1200x1200/README", b"-")]
    others.append(("__MACOSX/RGB_OR_1200x1200/._RGB_OR_1200x1200_001.png", b"\0\5\x16\7"))
    server.files["/testimages.zip"] = zip_of(*mine, *others)
    monkeypatch.setitem(ARCHIVES, "tecnick", ARCHIVES["tecnick"]._replace(pictures=3))
    out = tmp_path / "data" / "tecnick"
    for _ in range(2):  # the second time they are there
        main(["tecnick", "--out", str(out), "--base-url", server.url])
    assert len(server.asked) == 1
    assert {name: (out / name).read_bytes() for name in names(out)} == {Path(n).name: data for n, data in mine}
    assert names(tmp_path / "data") == ["tecnick"]  # the archive is not kept
    (out / "RGB_OR_1200x1200_002.png").write_bytes(b"damaged")
    with pytest.raises(UserError, match="tecnick/RGB_OR_1200x1200_002.png: cannot be read as a picture"):
        main(["tecnick", "--out", str(out), "--base-url", server.url])


LINK = zipfile.ZipInfo("valid/link.png")
LINK.create_system, LINK.external_attr = 3, (stat.S_IFLNK | 0o777) << 16
LZMA = zipfile.ZipInfo("a.png")  # unpacks to any size, whatever it claims
LZMA.compress_type = zipfile.ZIP_LZMA


@pytest.mark.parametrize(("members", "cause"), [
    ([("../evil.png", picture(1)), ("b.png", picture(2))], "leads out of its folder"),
    ([("..\\evil.png", picture(1)), ("b.png", picture(2))], "leads out of its folder"),
    ([("/evil.png", picture(1)), ("b.png", picture(2))], "leads out of its folder"),
    ([(LINK, b"/etc/passwd"), ("b.png", picture(2))], "leads out of its folder"),
    ([("a/a.png", picture(1)), ("b/a.png", picture(2))], "a.png twice"),
    ([("a.png", bytes(2**26 + 1)), ("b.png", picture(2))], "a.png with 67108865 bytes"),
    ([(LZMA, picture(1)), ("b.png", picture(2))], "compressed in a way that is not expected"),
    ([("a.png", picture(1))], "1 pictures instead of 2"),
    ([("a.png", picture(1)), ("b.png", picture(2)[:-30])], "cannot be read as a picture"),
])  # fmt: skip
def test_an_archive_that_is_wrong_leaves_nothing(server, tmp_path, members, cause):
    server.files["/set.zip"] = zip_of(*members)
    with pytest.raises(UserError, match=cause):
        download_archive(Archive((Source(f"{server.url}/set.zip"),), 2), tmp_path / "data" / "set", None)
    assert names(tmp_path) == ["data"]
    assert names(tmp_path / "data") == []


def test_a_damaged_archive_leaves_nothing(server, tmp_path):
    data = zip_of(("a.png", DATA))
    for damaged in (data[:-30], data[:1000] + b"damage" + data[1006:], DATA):
        server.files["/set.zip"] = damaged
        with pytest.raises(UserError, match="set.zip: cannot be unpacked"):
            download_archive(Archive((Source(f"{server.url}/set.zip"),), 1), tmp_path / "set", None)
        assert names(tmp_path) == []


# Weights --------------------------------------------------------------------------------------


def checkpoint_bytes(**options) -> bytes:
    file = io.BytesIO()
    torch.save({"state_dict": {"weight": torch.arange(5000.0)}}, file, **options)
    return file.getvalue()


def download_weights(server: Server, folder: Path) -> None:
    main(["weights", "--out", str(folder), "--base-url", server.url])


def test_google_drives_confirmation_is_given(server, tmp_path):
    weights = checkpoint_bytes()
    confirmed = "/confirmed?a=1&id=1%262&confirm=t&uuid=0-1"
    server.pages[f"/{WEIGHTS_NAME}"] = FORM
    server.files[confirmed] = weights
    download_weights(server, tmp_path)
    assert (tmp_path / WEIGHTS_NAME).read_bytes() == weights
    (tmp_path / WEIGHTS_NAME).unlink()
    (tmp_path / f"{WEIGHTS_NAME}.part").write_bytes(weights[:-1000])
    download_weights(server, tmp_path)
    assert server.asked[-1] == (confirmed, f"bytes={len(weights) - 1000 - OVERLAP}-")
    assert (tmp_path / WEIGHTS_NAME).read_bytes() == weights


@pytest.mark.parametrize("page", [FORM, "<html><title>Google Drive -\nQuota exceeded</title><p>Sorry</html>"])
def test_a_page_is_not_kept_as_weights(server, tmp_path, page):
    server.pages[f"/{WEIGHTS_NAME}"] = page
    server.pages["/confirmed?a=1&id=1%262&confirm=t&uuid=0-1"] = "<html><title>Google Drive - Quota exceeded</title>"
    with pytest.raises(UserError, match=r"answers with a page instead of the file \(Google Drive - Quota exceeded\)"):
        download_weights(server, tmp_path)
    assert names(tmp_path) == []


def test_what_is_no_checkpoint_is_not_kept(server, tmp_path):
    for data in (b"<html>a page that its server calls a file</html>", b"PK\x03\x04 cut off"):
        server.files[f"/{WEIGHTS_NAME}"] = data
        with pytest.raises(UserError, match="no checkpoint"):
            download_weights(server, tmp_path)
        assert names(tmp_path) == []
    server.files[f"/{WEIGHTS_NAME}"] = checkpoint_bytes(_use_new_zipfile_serialization=False)  # of PyTorch before 1.6
    download_weights(server, tmp_path)
    assert names(tmp_path) == [WEIGHTS_NAME]
