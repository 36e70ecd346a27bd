"""codec_vbr.py as a user runs it."""

import contextlib
import errno
import io
import os
import re
import resource
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import codec_vbr
from models import TCM
from tests.conftest import TINY, shake
from utils import cli
from utils.checkpoint import export_model, load_model
from utils.codec.analyzed import AnalyzedImage
from utils.codec.bitstream import unpack
from utils.codec.decode import decode
from utils.codec.encode import encode
from utils.codec.request import EncodeRequest
from utils.images import crop, margins, pad, padded_bands, read_image, to_float
from utils.metrics import psnr

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def codec(quick):
    """Call codec_vbr.py's main with the tiny weights; returns its status."""

    def call(command, *more) -> int:
        weights = [] if command == "info" else ["--checkpoint", quick, "--device", "cpu"]
        return codec_vbr.main([command, *map(str, more), *weights])

    return call


def test_one_picture_there_and_back(codec, photos, quick, tmp_path, capsys):
    file, back = tmp_path / "a.tvbr", tmp_path / "back.png"
    assert codec("encode", photos / "p0.png", file, "-l", 1.5, "--verify") == 0
    said = capsys.readouterr().err
    assert f"{file.stat().st_size} bytes" in said and "index 1.5, 190×170" in said
    assert codec("decode", file, back) == 0
    model, image = load_model(quick), read_image(photos / "p0.png")
    assert torch.equal(read_image(back), decode(model, encode(model, image, EncodeRequest(1.5)).data))
    assert float(re.search(r"verified: ([\d.]+) dB", said)[1]) == round(psnr(image, read_image(back)), 2)
    capsys.readouterr()
    assert codec("info", file) == 0
    said = capsys.readouterr().out
    assert "version 3, 190×170" in said and "index 1.5" in said and load_model(quick).fingerprint.hex() in said


def test_the_papers_rounding(codec, photos, quick, tmp_path):
    """`--nearest` takes the nearest symbols, those that `compress` takes."""
    file = tmp_path / "a.tvbr"
    assert codec("encode", photos / "p0.png", file, "-l", 1.5, "--nearest") == 0
    model, image = load_model(quick), read_image(photos / "p0.png")
    assert unpack(file.read_bytes()).y == model.compress(pad(to_float(image)), 1.5, portable=True)["strings"][0][0]


def test_a_picture_without_colors_has_none_again(codec, photos, quick, tmp_path, capsys):
    gray = tmp_path / "gray.png"
    Image.open(photos / "p0.png").convert("L").save(gray)
    file, back = tmp_path / "a.tvbr", tmp_path / "back.png"
    assert codec("encode", gray, file, "-l", 1.5) == 0 and codec("decode", file, back) == 0
    with Image.open(back) as decoded:
        assert decoded.mode == "L" and decoded.size == Image.open(gray).size
    model, data = load_model(quick), file.read_bytes()
    image = decode(model, data)
    assert torch.equal(image[0], image[1]) and torch.equal(image, read_image(back))
    colored = decode(model, replace(unpack(data), gray=False)).float()
    assert not torch.equal(colored[0], colored[1])
    assert torch.equal(image[0].float(), colored.mean(0).round())
    codec("info", file)
    assert "190×170, gray, " in capsys.readouterr().out
    assert not unpack(encode(model, read_image(photos / "p0.png"), EncodeRequest(1.5)).data).gray


def test_what_is_around_a_picture_has_the_colors_of_its_edges(quick, photos):
    """Smoothed along the edges; with `nearest` it has the published zeros."""
    model, image = load_model(quick), read_image(photos / "p0.png")
    height, width = image.shape[1:]
    left, right, top, bottom = margins(height, width)
    (padded,) = padded_bands(image, 10**6, extend=True)
    x = to_float(image)
    assert padded.shape[2] % 128 == padded.shape[3] % 128 == 0
    assert torch.equal(crop(padded, height, width), x)
    for row, column, expected in (
        (0, left + 50, x[0, :, 0, 34:67].mean(1)),  # above the middle of a window of 33 pixels
        (-1, left + 50, x[0, :, -1, 34:67].mean(1)),
        (top + 60, 0, x[0, :, 44:77, 0].mean(1)),
        (top + 60, -1, x[0, :, 44:77, -1].mean(1)),
    ):
        torch.testing.assert_close(padded[0, :, row, column], expected)
    with torch.no_grad():
        for nearest, whole in ((False, padded), (True, pad(x))):
            analyzed = AnalyzedImage(model, image, nearest=nearest)
            torch.testing.assert_close(analyzed.y_before_lae, model.features(whole))


def test_nothing_is_overwritten_without_force(codec, photos, tmp_path):
    file = tmp_path / "a.tvbr"
    file.write_bytes(b"precious")
    with pytest.raises(cli.UserError, match="a.tvbr: exists; --force"):
        codec("encode", photos / "p0.png", file)
    assert file.read_bytes() == b"precious"
    assert codec("encode", photos / "p0.png", file, "--force") == 0
    assert file.read_bytes()[:4] == b"TVBR"


@pytest.mark.parametrize("inputs", [["p0.png"], ["p0.png", "p1.png"]])
def test_where_nothing_can_be_written_is_told_before_a_picture_is_coded(codec, photos, tmp_path, monkeypatch, inputs):
    monkeypatch.setattr(codec_vbr, "encode_picture", lambda *_, **__: pytest.fail("a picture is coded"))
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="is no folder.*file"):
        codec("encode", *(photos / name for name in inputs), tmp_path / "file" / "out")


def test_folders_and_a_rerun(codec, photos, tmp_path, capsys):
    (photos / "p3.png").write_bytes(b"broken")
    (photos / "deeper").mkdir()
    (photos / "p7.png").rename(photos / "deeper" / "p7.png")
    assert codec("encode", photos, tmp_path / "coded") == 1
    said = capsys.readouterr().err
    assert "error: " in said and "p3.png: cannot be read as a picture" in said
    names = {str(path.relative_to(tmp_path / "coded")) for path in (tmp_path / "coded").rglob("*.tvbr")}
    assert names == {f"p{i}.tvbr" for i in range(7) if i != 3} | {"deeper/p7.tvbr"}  # subfolders are mirrored
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "coded").rglob("*.tvbr")}
    (tmp_path / "coded" / "p0.tvbr").unlink()
    assert codec("encode", photos, tmp_path / "coded") == 1  # p3 is still broken
    assert "6 of 8 are finished and left alone" in capsys.readouterr().err
    assert all(path.stat().st_mtime_ns == before for path, before in times.items() if path.name != "p0.tvbr")
    assert codec("decode", tmp_path / "coded", tmp_path / "pictures") == 0
    pictures = (tmp_path / "pictures").rglob("*.png")
    assert {str(path.relative_to(tmp_path / "pictures")) for path in pictures} == {f"{name[:-5]}.png" for name in names}
    assert codec("info", tmp_path / "coded") == 0


def test_pictures_of_one_name_keep_their_suffixes_and_each_is_coded_once(codec, photos, tmp_path):
    (photos / "p1.jpg").write_bytes((photos / "p1.png").read_bytes())
    assert codec("encode", photos, photos / "p2.png", tmp_path / "coded") == 0
    names = {path.name for path in (tmp_path / "coded").iterdir()}
    assert names == {f"p{i}.tvbr" for i in range(8) if i != 1} | {"p1.png.tvbr", "p1.jpg.tvbr"}
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "p3.png").write_bytes((photos / "p3.png").read_bytes())
    with pytest.raises(cli.UserError, match="would both become"):
        codec("encode", photos, tmp_path / "more", tmp_path / "coded")
    for name in ("one", "two"):  # links are pictures of their own
        (tmp_path / "more" / f"{name}.png").symlink_to(tmp_path / "more" / "p3.png")
    assert codec("encode", tmp_path / "more", tmp_path / "links") == 0
    assert {path.name for path in (tmp_path / "links").iterdir()} == {"p3.tvbr", "one.tvbr", "two.tvbr"}


@pytest.mark.parametrize(
    ("before", "now", "said"),
    [
        (["-l", 1], ["-l", 2], "was made at index 1, not 2"),
        (["-l", 1], ["-l", 1, "--roi", "0,0,64,64", "--mask-index", 3], "was made without a region"),
        (["-l", 1, "--roi", "0,0,64,64", "--mask-index", 3], ["-l", 1], "was made with a region"),
        (
            ["-l", 1, "--roi", "0,0,64,64", "--mask-index", 3],
            ["-l", 1, "--roi", "0,0,64,64", "--mask-index", 4],
            "another region, or another index for it",
        ),
        (
            ["-l", 1, "--roi", "0,0,64,64", "--mask-index", 3],
            ["-l", 1, "--roi", "999,0,64,64", "--mask-index", 3],
            "does not lie within the picture",
        ),
        (["-l", 1], ["--max-bytes", 150], "more than 150"),
    ],
)
def test_a_rerun_names_what_was_made_with_other_settings(codec, photos, tmp_path, capsys, before, now, said):
    folder = tmp_path / "coded"
    assert codec("encode", photos / "p0.png", f"{folder}/", *before) == 0
    data = (folder / "p0.tvbr").read_bytes()
    assert codec("encode", photos / "p0.png", folder, *before) == 0
    assert "error" not in capsys.readouterr().err
    assert codec("encode", photos / "p0.png", folder, *now) == 1
    assert f"error: {folder / 'p0.tvbr'}: " in (told := capsys.readouterr().err) and said in told
    assert (folder / "p0.tvbr").read_bytes() == data


def test_a_rerun_with_other_weights_names_what_the_former_made(codec, photos, checkpoint, tmp_path, capsys):
    folder = str(tmp_path / "coded")
    assert codec("encode", photos / "p0.png", f"{folder}/") == 0
    pictures = [str(photos / f"p{i}.png") for i in range(2)]
    assert codec_vbr.main(["encode", *pictures, folder, "--checkpoint", checkpoint, "--device", "cpu"]) == 1
    assert "p0.tvbr: was made with other weights" in capsys.readouterr().err
    assert len(list((tmp_path / "coded").iterdir())) == 2


def test_what_changed_since_a_run_is_told(codec, photos, tmp_path, capsys):
    for command, source, target in (("encode", photos / "p0.png", "coded"), ("decode", "coded/p0.tvbr", "decoded")):
        more = ["--verify"] if command == "encode" else []
        assert codec(command, tmp_path / source, f"{tmp_path / target}/", *more) == 0
        os.utime(tmp_path / source, (made := time.time() + 60, made))
        capsys.readouterr()
        assert codec(command, tmp_path / source, f"{tmp_path / target}/", *more) == 0
        told = capsys.readouterr().err
        assert (f"is older than {tmp_path / source}; --force makes it again" in told) == bool(more)
        assert ("not verified" in told) == bool(more)


def test_the_pictures_that_were_encoded_are_not_taken_for_decoded_ones(codec, photos, tmp_path, capsys):
    shutil.copy(photos / "p0.png", tmp_path / "p0.png")
    before = (tmp_path / "p0.png").read_bytes()
    for request in ([], ["--force", "-l", 3]):
        assert codec("encode", tmp_path / "p0.png", f"{tmp_path}/", *request) == 0
        capsys.readouterr()
        assert codec("decode", tmp_path / "p0.tvbr", f"{tmp_path}/") == 1
        assert "p0.png: was not decoded from" in (told := capsys.readouterr().err) and "finished" not in told
        assert (tmp_path / "p0.png").read_bytes() == before


def test_a_picture_decoded_from_another_file_of_the_name_is_told(codec, photos, tmp_path, capsys):
    for index in (1, 3):
        assert codec("encode", photos / "p0.png", tmp_path / "p0.tvbr", "-l", index, "--force") == 0
        assert codec("decode", tmp_path / "p0.tvbr", f"{tmp_path / 'back'}/") == (0 if index == 1 else 1)
    assert "p0.png: was not decoded from" in capsys.readouterr().err
    assert codec("decode", tmp_path / "p0.tvbr", f"{tmp_path / 'back'}/", "--force") == 0
    assert codec("decode", tmp_path / "p0.tvbr", f"{tmp_path / 'back'}/") == 0


def test_another_picture_of_the_same_name_is_not_taken_for_finished(codec, photos, tmp_path, capsys):
    assert codec("encode", photos / "p0.png", f"{tmp_path / 'coded'}/") == 0
    with Image.open(photos / "p0.png") as image:
        image.crop((0, 0, 50, 40)).save(tmp_path / "p0.jpg")
    capsys.readouterr()
    assert codec("encode", tmp_path / "p0.jpg", f"{tmp_path / 'coded'}/") == 1
    told = capsys.readouterr().err
    assert f"p0.tvbr: has {image.width}×{image.height} pixels, and" in told and "finished" not in told
    assert codec("encode", photos / "p1.png", f"{tmp_path / 'coded'}/") == 0
    assert codec("encode", tmp_path / "p0.jpg", photos / "p1.png", tmp_path / "coded") == 1  # whatever the others are
    assert "1 of 1 are finished" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without CUDA")
def test_a_device_that_is_not_there_is_no_fault_of_the_weights(photos, tmp_path):
    assert codec_vbr.main(["encode", str(photos / "p0.png"), str(tmp_path / "x.tvbr"), "-l", "1", "--device", "cpu"]) == 0
    with pytest.raises(cli.UserError, match="no CUDA device"):
        codec_vbr.main(["decode", str(tmp_path / "x.tvbr"), str(tmp_path / "x.png"), "--device", "cuda"])


@pytest.mark.parametrize("settings", [["-l", 3, "-t", 3, "--keep-rate"], ["--target-bytes", 120]])
def test_a_rerun_with_the_same_settings_succeeds(codec, photos, tmp_path, capsys, settings):
    Image.open(photos / "p0.png").resize((40, 40)).save(tmp_path / "small.png")
    for _ in range(2):
        assert codec("encode", tmp_path / "small.png", f"{tmp_path / 'coded'}/", *settings) == 0
    told = capsys.readouterr().err
    assert "1 of 1 are finished" in told and ("note: " in told) == ("--target-bytes" in settings)


def test_a_folder_of_one_picture_is_a_folder(codec, photos, tmp_path, capsys):
    (tmp_path / "one").mkdir()
    (photos / "p0.png").rename(tmp_path / "one" / "p0.png")
    for _ in range(2):
        assert codec("encode", tmp_path / "one", tmp_path / "coded") == 0
    assert "1 of 1 are finished and left alone" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "coded").iterdir()] == ["p0.tvbr"]


def test_a_device_is_no_finished_file(codec, photos):
    assert codec("encode", photos / "p0.png", os.devnull) == 0


def test_long_names_and_names_that_are_no_utf8(codec, photos, tmp_path):
    for name in ("x" * 250, os.fsdecode(b"caf\xe9")):
        source = photos / "p0.png"
        assert codec("encode", source, tmp_path / name, "--force") == 0
        assert codec("info", tmp_path / name) == 0


def test_decoding_writes_png(codec, photos, tmp_path):
    codec("encode", photos / "p0.png", tmp_path / "a.tvbr")
    with pytest.raises(cli.UserError, match="back.jpg: pictures are written as PNG"):
        codec("decode", tmp_path / "a.tvbr", tmp_path / "back.jpg")
    before = (tmp_path / "a.tvbr").read_bytes()
    with pytest.raises(cli.UserError, match="a.tvbr: pictures are written as PNG"):
        codec("decode", tmp_path / "a.tvbr", tmp_path / "a.tvbr", "--force")
    assert (tmp_path / "a.tvbr").read_bytes() == before


def test_streams_as_shells_leave_them(codec, photos, tmp_path):
    """A reader that goes away, a closed stream, and a terminal that knows few characters."""
    codec("encode", photos, tmp_path / "coded")
    info = f"{sys.executable} codec_vbr.py info {tmp_path / 'coded'}"
    for command in (f"{info} | head -1", f"{info} >&-", f"PYTHONIOENCODING=ascii {info}"):
        ran = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True)
        assert ran.returncode == 0 and not ran.stderr, (command, ran.stderr)
    assert "190\\xd7170" in ran.stdout  # the × of the size


def test_standard_input_and_output(photos, quick):
    """Two processes and a pipe."""

    def start(data, *more):
        command = [sys.executable, "codec_vbr.py", *more, "-", "-", "--checkpoint", quick]
        return subprocess.Popen(command, cwd=ROOT, stdin=data, stdout=subprocess.PIPE)

    with (
        (photos / "p0.png").open("rb") as file,
        start(file, "encode") as encoding,
        start(encoding.stdout, "decode") as decoding,
    ):
        picture = Image.open(io.BytesIO(decoding.communicate(timeout=200)[0]))
    assert encoding.returncode == decoding.returncode == 0
    assert picture.size == (190, 170)


@pytest.mark.parametrize("stream", ["input", "output"])
def test_closed_streams_that_have_the_picture_are_one_line(photos, quick, stream):
    source, closed = ("-", "<&-") if stream == "input" else (photos / "p0.png", ">&-")
    command = f"{sys.executable} codec_vbr.py encode {source} - --checkpoint {quick} {closed}"
    ran = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True)
    lines = [line for line in ran.stderr.splitlines() if not line.startswith("weights: ")]
    assert ran.returncode == 1 and len(lines) == 1 and f"standard {stream} is closed" in lines[0]


def test_what_is_read_is_not_overwritten(codec, photos, tmp_path):
    (tmp_path / "photo").write_bytes((photos / "p0.png").read_bytes())
    codec("encode", photos / "p0.png", tmp_path / "coded.tvbr")
    (tmp_path / "coded.tvbr").rename(tmp_path / "coded")
    for command in ("encode", "decode"):
        path = tmp_path / ("photo" if command == "encode" else "coded")
        before = path.read_bytes()
        with pytest.raises(cli.UserError, match=f"{path}: is what is read"):
            codec(command, path, path, "--force")
        assert path.read_bytes() == before


def test_sources_without_a_file_may_have_a_target_that_exists(photos, quick, tmp_path):
    """Standard input, and a broken link, which does not stop the other pictures."""
    (tmp_path / "a.tvbr").touch()
    command = f"{sys.executable} codec_vbr.py encode - {tmp_path / 'a.tvbr'} --checkpoint {quick} --force"
    with (photos / "p0.png").open("rb") as file:
        subprocess.run(command.split(), cwd=ROOT, stdin=file, check=True)
    for path in photos.iterdir():
        path.unlink() if path.name != "p0.png" else (photos / "gone.png").symlink_to(tmp_path / "nowhere.png")
    (tmp_path / "out").mkdir()
    shutil.copy(tmp_path / "a.tvbr", tmp_path / "out" / "gone.tvbr")
    arguments = ["encode", str(photos), str(tmp_path / "out"), "--checkpoint", quick]
    assert codec_vbr.main([*arguments, "--force"]) == 1
    assert (tmp_path / "out" / "p0.tvbr").exists()


def test_a_name_that_is_too_long_for_its_file_does_not_stop_the_others(codec, photos, tmp_path, capsys):
    (photos / "p0.png").rename(photos / f"{'x' * 251}.png")
    (tmp_path / "out").mkdir()
    assert codec("encode", photos, tmp_path / "out") == 1
    assert f"error: {photos / 'x'}" in capsys.readouterr().err
    assert len(list((tmp_path / "out").iterdir())) == 7


@pytest.mark.parametrize("arguments", [["encode", "", "out"], ["encode", "a.png", ""], ["encode", "a.png", "b", "-l="]])
def test_empty_arguments_are_refused(arguments, capsys):
    """As of a shell's variable that is not set. An empty path would be the current folder."""
    with pytest.raises(SystemExit) as leaving:
        codec_vbr.main(arguments)
    assert leaving.value.code == 2 and "an argument is empty" in capsys.readouterr().err


def test_a_fixed_rate_model_codes_too(photos, tmp_path, capsys):
    export_model(tmp_path / "tcm.pth.tar", shake(TCM(**TINY)), [])
    weights = ["--checkpoint", str(tmp_path / "tcm.pth.tar")]
    assert codec_vbr.main(["encode", str(photos / "p0.png"), str(tmp_path / "a.tvbr"), "--verify", *weights]) == 0
    assert codec_vbr.main(["decode", str(tmp_path / "a.tvbr"), str(tmp_path / "a.png"), *weights]) == 0
    codec_vbr.main(["info", str(tmp_path / "a.tvbr")])
    assert "fixed rate" in capsys.readouterr().out
    with pytest.raises(cli.UserError, match="has no rate index; leave out -l"):
        codec_vbr.main(["encode", str(photos / "p0.png"), str(tmp_path / "b.tvbr"), "-l", "4", *weights])


def hostile_pictures(folder: Path, good: bytes) -> None:
    folder.mkdir()
    (folder / "empty.png").touch()
    (folder / "truncated.png").write_bytes(good[: len(good) // 2])
    jpeg = io.BytesIO()
    Image.open(io.BytesIO(good)).save(jpeg, format="JPEG")
    (folder / "cut.jpg").write_bytes(jpeg.getvalue()[:900])
    (folder / "random.png").write_bytes(np.random.default_rng(0).bytes(5000))
    bomb = io.BytesIO()
    Image.new("L", (20000, 20000)).save(bomb, format="PNG")
    (folder / "bomb.png").write_bytes(bomb.getvalue())
    (folder / "folder.png").mkdir()
    (folder / "folder.png" / "text.jpg").write_text("no picture")


def test_hostile_pictures_are_named_and_the_good_ones_coded(codec, photos, tmp_path, capsys):
    hostile_pictures(tmp_path / "bad", (photos / "p0.png").read_bytes())
    (tmp_path / "bad" / "wrong extension.jpg").write_bytes((photos / "p0.png").read_bytes())
    assert codec("encode", tmp_path / "bad", tmp_path / "coded") == 1
    said = capsys.readouterr().err
    empty = "empty.png: cannot be read as a picture (is empty)"
    for text in (empty, "truncated.png", "cut.jpg", "random.png", "bomb.png", "text.jpg"):
        assert any(line.startswith("error: ") and text in line for line in said.splitlines()), text
    assert [path.name for path in (tmp_path / "coded").iterdir()] == ["wrong extension.tvbr"]


def test_hostile_files_are_one_line_each_and_leave_nothing(codec, photos, tmp_path, capsys):
    coded = tmp_path / "good.tvbr"
    codec("encode", photos / "p0.png", coded)
    good = coded.read_bytes()
    bad = tmp_path / "bad"
    bad.mkdir()
    for name, data in {
        "empty": b"",
        "picture": (photos / "p0.png").read_bytes(),
        "truncated": good[:-9],
        "random": np.random.default_rng(0).bytes(999),
        "huge": good[:6] + b"\xff" * 4 + good[10:],
        "newer": good[:4] + b"\x07" + good[5:],
    }.items():
        (bad / f"{name}.tvbr").write_bytes(data)
    capsys.readouterr()
    for command in (["decode", bad, tmp_path / "pictures"], ["info", bad]):
        start, memory = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        assert codec(*command) == 1
        assert time.monotonic() - start < 30  # six files and the weights
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 2**21
        errors = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
        assert len(errors) == 6
    assert not (tmp_path / "pictures").exists() or not list((tmp_path / "pictures").iterdir())
    with pytest.raises(cli.UserError, match="no such file"):
        codec("decode", tmp_path / "nowhere.tvbr", tmp_path / "x.png")
    with pytest.raises(cli.UserError, match="no .tvbr files"):
        codec("info", photos)


@pytest.mark.parametrize("error, where", (
    (torch.OutOfMemoryError("CUDA out of memory"), "this GPU: try --device cpu"),
    (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), "this GPU: try --device cpu"),
    (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), "this GPU: try --device cpu"),
    (RuntimeError("CUDNN_BACKEND_OPERATION: cudnnFinalize CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"), "this GPU: try --device cpu"),
    (RuntimeError("FIND was unable to find an engine to execute this computation"), "this GPU: try --device cpu"),  # cuDNN's
    (RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"), "this machine"),
    (RuntimeError("std::bad_alloc"), "this machine"),
    (RuntimeError("could not create a primitive"), "this machine"),  # oneDNN's words
    (OSError(errno.ENOMEM, "Cannot allocate memory"), "this machine"),
))
def test_a_picture_without_room_is_named_and_the_others_coded(error, where, codec, photos, tmp_path, capsys, monkeypatch):
    real = AnalyzedImage.quantize

    def quantize(image, index, last=False):
        if image.width == 193:
            raise error
        return real(image, index, last)

    monkeypatch.setattr(AnalyzedImage, "quantize", quantize)
    assert codec("encode", photos, tmp_path / "coded") == 1
    assert f"p3.png: too large for the memory of {where}" in capsys.readouterr().err
    assert len(list((tmp_path / "coded").iterdir())) == 7


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="sets a limit that only Linux keeps")
def test_a_picture_without_room_in_memory_is_named_and_the_others_coded(quick, photos, tmp_path):
    Image.new("RGB", (3000, 2200)).save(photos / "large.png")
    program = """
import resource, sys, codec_vbr
photos, folder, *more = sys.argv[1:]
codec_vbr.main(["encode", f"{photos}/p0.png", f"{folder}/loaded.tvbr", *more])
size = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmSize"))
resource.setrlimit(resource.RLIMIT_AS, (1024 * size + 100 * 2**20, resource.RLIM_INFINITY))
sys.exit(codec_vbr.main(["encode", photos, f"{folder}/coded", *more]))
"""
    command = [sys.executable, "-c", program, photos, tmp_path, "--checkpoint", quick, "--device", "cpu", "--threads", "1"]
    run = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 1
    assert f"error: {photos / 'large.png'}: too large for the memory of this machine" in run.stderr
    assert sorted(file.name for file in (tmp_path / "coded").iterdir()) == [f"p{i}.tvbr" for i in range(8)]


def test_what_would_overwrite_a_photograph_is_refused(codec, photos):
    before = (photos / "p1.png").read_bytes()
    with pytest.raises(cli.UserError, match="p1.png: the name of a picture"):
        codec("encode", photos / "p0.png", photos / "p1.png", "--force")
    assert (photos / "p1.png").read_bytes() == before


def test_a_lambda_in_place_of_an_index_is_noticed(codec, photos, tmp_path, capsys):
    assert codec("encode", photos / "p0.png", tmp_path / "a.tvbr", "--lmd", 0.05) == 0
    assert "note: 0.05: is taken as a rate index; the λ of that value has index 5" in capsys.readouterr().err
    assert unpack((tmp_path / "a.tvbr").read_bytes()).index == np.float32(0.05)


def test_info_and_bad_input_do_without_pytorch(codec, photos, tmp_path):
    """PyTorch takes seconds to import. Tested in fresh processes, as this one has imported it."""
    hostile_pictures(tmp_path / "bad", (photos / "p0.png").read_bytes())
    codec("encode", photos / "p0.png", tmp_path / "good.tvbr")
    (tmp_path / "cut.tvbr").write_bytes((tmp_path / "good.tvbr").read_bytes()[:-1])
    program = "import sys, codec_vbr; s = codec_vbr.main(sys.argv[1:]); assert 'torch' not in sys.modules; sys.exit(s)"
    for status, command in (
        (0, ["info", tmp_path / "good.tvbr"]),
        (1, ["decode", tmp_path / "cut.tvbr", tmp_path / "x.png"]),
        (1, ["encode", tmp_path / "bad", tmp_path / "coded"]),
    ):
        command = [sys.executable, "-c", program, *map(str, command)]
        ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert ran.returncode == status and "Traceback" not in ran.stderr, ran.stderr
    assert not (tmp_path / "x.png").exists() and not (tmp_path / "coded").exists()


def test_another_models_file_is_refused(codec, photos, tmp_path, capsys):
    codec("encode", photos / "p0.png", tmp_path / "a.tvbr")
    torch.manual_seed(3)
    export_model(tmp_path / "tcm.pth.tar", shake(TCM(**TINY)), [])
    weights = ["--checkpoint", str(tmp_path / "tcm.pth.tar")]
    assert codec_vbr.main(["decode", str(tmp_path / "a.tvbr"), str(tmp_path / "a.png"), *weights]) == 1
    assert "a.tvbr: encoded with other weights" in capsys.readouterr().err
    assert not (tmp_path / "a.png").exists()


def test_killed_in_the_middle_of_a_batch_nothing_finished_is_lost(photos, quick, tmp_path):
    command = ["encode", str(photos), str(tmp_path / "coded"), "--checkpoint", quick]
    process = subprocess.Popen([sys.executable, "codec_vbr.py", *command], cwd=ROOT, stderr=subprocess.DEVNULL)
    end = time.monotonic() + 100
    while len(list((tmp_path / "coded").glob("p*.tvbr")) if (tmp_path / "coded").exists() else []) < 2:
        assert time.monotonic() < end and process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait()
    model = load_model(quick)
    finished = list((tmp_path / "coded").glob("p*.tvbr"))
    for path in finished:
        decode(model, path.read_bytes())
    with contextlib.redirect_stderr(io.StringIO()) as said:
        assert codec_vbr.main(command) == 0
    assert f"{len(finished)} of 8 are finished" in said.getvalue()
    assert len(list((tmp_path / "coded").glob("p*.tvbr"))) == 8


@pytest.mark.parametrize("more", [["encode", "-l", "8", "a", "b"], ["decode"], []])
def test_wrong_arguments(more, capsys):
    with pytest.raises(SystemExit) as leaving:
        codec_vbr.main(more)
    assert leaving.value.code == 2


def test_a_folder_is_needed_for_several(codec, photos, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(cli.UserError, match="several pictures need a folder"):
        codec("encode", photos, tmp_path / "file")
    with pytest.raises(cli.UserError, match="standard output takes one picture"):
        codec("encode", photos, "-")
