"""Pictures, bitstreams, metrics, checkpoints: what goes in and out of files."""

import argparse
import errno
import gzip
import json
import os
import pickle
import re
import shutil
import struct
import tempfile
import threading
import zipfile
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from compressai.models.base import get_scale_table

import eval_vbr
import online_training_vbr
from models import TCM
from tests.conftest import TINY
from utils import checkpoint as checkpoint_module
from utils import cli
from utils.checkpoint import CheckpointError, export_model, load_model, read_checkpoint
from utils.evaluation.results import decibels
from utils.files import atomic_write, check_output_file, remove_left_over, write_json
from utils.images import crop, pad, read_image, save_image, to_uint8
from utils.messages import print_error
from utils.metrics import ms_ssim_value, psnr

COLORS = np.array([[[255, 0, 0], [0, 255, 0], [0, 0, 255]], [[10, 20, 30], [200, 100, 50], [0, 0, 0]]], np.uint8)


# Pictures ------------------------------------------------------------------------------------


@pytest.mark.parametrize("height", [1, 127, 128, 129, 300])
@pytest.mark.parametrize("width", [1, 128, 131])
def test_padding_is_centerd_zeros_and_comes_off(height, width):
    x = torch.rand(1, 3, height, width) + 0.1
    padded = pad(x)
    assert padded.shape[2] % 128 == padded.shape[3] % 128 == 0
    assert padded.shape[2] - height < 128 and padded.shape[3] - width < 128
    top, left = (padded.shape[2] - height) // 2, (padded.shape[3] - width) // 2
    assert torch.equal(padded[:, :, top : top + height, left : left + width], x)
    assert padded.sum() == pytest.approx(float(x.sum()), rel=1e-5)
    assert torch.equal(crop(padded, height, width), x)


def test_saved_pictures_are_what_was_saved(tmp_path):
    image = torch.from_numpy(COLORS).permute(2, 0, 1)
    save_image(tmp_path / "new" / "x.png", image)
    assert torch.equal(read_image(tmp_path / "new" / "x.png"), image)


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(b"old")
    with pytest.raises(RuntimeError), atomic_write(path) as file:
        file.write(b"half of the n")
        raise RuntimeError
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_what_a_killed_writer_left_is_cleared_away(tmp_path):
    (tmp_path / "x.pth").write_bytes(b"finished")
    with pytest.raises(RuntimeError), atomic_write(tmp_path / "x.pth") as file:
        file.write(b"half of the n")
        assert len(list(tmp_path.iterdir())) == 2
        remove_left_over(tmp_path, "*.pth")  # before it is done: as if it had been killed
        assert list(tmp_path.iterdir()) == [tmp_path / "x.pth"]
        raise RuntimeError
    assert (tmp_path / "x.pth").read_bytes() == b"finished"


def test_links_and_devices_stay_what_they_are(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "target")
    for path in (tmp_path / "link", "/dev/null"):
        with atomic_write(path) as file:
            file.write(b"new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "target").read_bytes() == b"new"
    assert not Path("/dev/null").is_file()


# Metrics -------------------------------------------------------------------------------------


def test_psnr_and_ms_ssim():
    a = torch.full((3, 200, 200), 100, dtype=torch.uint8)
    b = a + 5
    assert psnr(a, b) == pytest.approx(20 * np.log10(255 / 5))
    assert psnr(a, a) == float("inf")
    assert ms_ssim_value(a, a) == pytest.approx(1)
    assert ms_ssim_value(a[:, :160], b[:, :160]) is None
    assert ms_ssim_value(a[:, :161, :161], b[:, :161, :161]) is not None
    assert decibels(0.99) == pytest.approx(20)


def test_8_bit_values_are_rounded_and_clamped():
    assert to_uint8(torch.tensor([-1.0, 0.1, 0.5, 0.9999, 2.0])).tolist() == [0, 26, 128, 255, 255]


# Checkpoints ---------------------------------------------------------------------------------


def test_exported_model_is_self_describing_and_exact(tiny, image, tmp_path):
    path = tmp_path / "m.pth.tar"
    export_model(path, tiny, [{"patches": 7}])
    checkpoint = read_checkpoint(path)
    assert checkpoint["training"] == [{"patches": 7}]
    assert checkpoint["arguments"]["slice_widths"] == [32, 16]
    assert checkpoint["state_dict"]["g_a.0.conv1.weight"].dtype == torch.float16
    model = load_model(path)
    tables = model.entropy_bottleneck._quantized_cdf.clone()
    model.update(force=True)  # the tables in the file are those of the rounded weights
    assert torch.equal(tables, model.entropy_bottleneck._quantized_cdf)
    with torch.no_grad():
        out = model.compress(image, 2.5)
        decoded = model.decompress(out["strings"], out["shape"], 2.5)["x_hat"]
        assert torch.equal(decoded, model(image, 2.5)["x_hat"].clamp(0, 1))


class Evil:
    def __reduce__(self):
        return print, ("code ran",)


def test_a_file_that_is_replaced_keeps_its_permissions(tmp_path):
    path = tmp_path / "a.bin"
    with atomic_write(path) as file:
        file.write(b"old")
    path.chmod(0o640)
    with atomic_write(path) as file:
        file.write(b"new")
    assert path.read_bytes() == b"new" and path.stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("wrapped", [False, True])
def test_weights_of_another_network_are_called_that(tmp_path, wrapped):
    weights = {"conv.weight": torch.zeros(3, 3)}
    torch.save({"state_dict": weights} if wrapped else weights, tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match="other.pth: these are not the weights of a TCM"):
        load_model(tmp_path / "other.pth")


def test_a_checkpoint_cannot_run_code(tmp_path, capsys):
    torch.save({"state_dict": Evil()}, tmp_path / "evil.pth")
    (tmp_path / "evil.pkl").write_bytes(pickle.dumps(Evil()))
    for name in ("evil.pth", "evil.pkl"):
        with pytest.raises(CheckpointError, match=name):
            load_model(tmp_path / name)
    assert "code ran" not in capsys.readouterr().out


@pytest.mark.parametrize("core", ["_core", "core"])
def test_numbers_of_either_numpy_are_read(tmp_path, core):
    torch.save({"state_dict": {"x": torch.zeros(1)}, "loss": np.float64(1.5)}, tmp_path / "a.pth")
    with zipfile.ZipFile(tmp_path / "a.pth") as old, zipfile.ZipFile(tmp_path / "b.pth", "w") as new:
        for entry in old.infolist():
            part = old.read(entry)
            if entry.filename.endswith("data.pkl"):
                assert b"multiarray\nscalar" in part
                part = re.sub(rb"numpy\._?core\.multiarray", f"numpy.{core}.multiarray".encode(), part)
            new.writestr(entry.filename, part)
    assert read_checkpoint(tmp_path / "b.pth")["loss"] == 1.5


@pytest.mark.parametrize("content", [b"", b"nonsense", struct.pack("100d", *range(100))])
def test_files_that_are_no_checkpoint(tmp_path, content):
    (tmp_path / "x.pth").write_bytes(content)
    with pytest.raises(CheckpointError, match="x.pth"):
        load_model(tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match="no such file"):
        load_model(tmp_path / "y.pth")


def forms(state: dict) -> dict[str, dict]:
    """A state dict as training scripts and frameworks save it."""
    prefixes = ("module.", "_orig_mod.", "module._orig_mod.", "module.module.", "net.", "model.")
    zeros = {name: torch.zeros_like(value) for name, value in state.items()}
    return {
        "bare": state,
        **{prefix: {"state_dict": {prefix + name: value for name, value in state.items()}} for prefix in prefixes},
        **{key: {key: state, "epoch": 3} for key in ("model", "model_state_dict", "network", "ema")},
        "ema beside": {"state_dict": zeros, "ema": {"module." + name: value for name, value in state.items()}},
        "NumPy and argparse": {"state_dict": state, "best": np.float64(1.5), "args": argparse.Namespace(N=32)},
        "double": {name: v.double() if v.is_floating_point() else v for name, v in state.items()},
        "without tables": {name: v for name, v in state.items() if not name.endswith(("_cdf", "_length", "_offset"))},
        "other modules": {"state_dict": {"model." + n: v for n, v in state.items()} | {"loss.weight": torch.ones(1)}},
    }


def test_every_form_of_a_checkpoint_is_the_same_weights(checkpoint, tmp_path):
    """Their files decode with each other: the fingerprint is of the network and its tensors, not of the wrapping."""
    expected = load_model(checkpoint)
    saved = read_checkpoint(checkpoint)["state_dict"]
    state = {name: v.float() if v.dtype == torch.float16 else v for name, v in saved.items()}
    for name, content in forms(state).items():
        torch.save(content, tmp_path / "x.pth")
        assert load_model(tmp_path / "x.pth").fingerprint == expected.fingerprint, name
    safetensors.torch.save_file({n: v.contiguous() for n, v in state.items()}, tmp_path / "x.safetensors")
    assert load_model(tmp_path / "x.safetensors").fingerprint == expected.fingerprint


@pytest.mark.parametrize("precision", [torch.float16, torch.bfloat16])
def test_tables_that_were_rounded_are_computed_anew(checkpoint, tmp_path, precision):
    """In bfloat16 the levels of σ are off by up to 0.4 %, and their steps are no longer even."""
    state = load_model(checkpoint).state_dict()
    torch.save({n: v.to(precision) if v.is_floating_point() else v for n, v in state.items()}, tmp_path / "x.pth")
    table = load_model(tmp_path / "x.pth").gaussian_conditional.scale_table
    assert table.dtype == torch.float32 and torch.equal(table, torch.as_tensor(get_scale_table()))


def test_values_that_leave_no_trace_do_not_change_the_fingerprint():
    one, other = (TCM(**TINY | {"max_support_slices": s, "drop_path_rate": d}) for s, d in ((1, 0.0), (2, 0.1)))
    other.load_state_dict(one.state_dict())
    assert one.fingerprint == other.fingerprint
    assert one.fingerprint != TCM(**TINY | {"max_support_slices": 0}).fingerprint


def test_weights_that_are_not_finite_are_refused(checkpoint, tmp_path):
    content = read_checkpoint(checkpoint)
    content["state_dict"]["g_s.0.conv.bias"][0] = float("nan")
    torch.save(content, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match="its weights are not finite .g_s.0.conv.bias"):
        load_model(tmp_path / "x.pth")


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"<!doctype html><html>virus scan warning</html>", "an HTML page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 27764144\n", "a Git LFS pointer"),
        (b"", "the file is empty"),
        (bytes(257) + b"ustar" + bytes(300), "a tar archive"),
    ],
)
def test_what_is_no_checkpoint_is_told_as_what_it_is(tmp_path, content, text):
    (tmp_path / "x.pth").write_bytes(content)
    with pytest.raises(CheckpointError, match=f"x.pth: refused: {text}"):
        read_checkpoint(tmp_path / "x.pth")


def test_a_truncated_checkpoint(checkpoint, tmp_path):
    (tmp_path / "x.pth").write_bytes(Path(checkpoint).read_bytes()[:100000])
    with pytest.raises(CheckpointError, match="x.pth: refused: truncated or damaged"):
        read_checkpoint(tmp_path / "x.pth")


def test_published_checkpoint_with_more_than_weights(tiny, image, tmp_path):
    state = {f"module.{name}": value for name, value in tiny.state_dict().items()}
    optimizer = torch.optim.Adam(tiny.parameters()).state_dict()
    torch.save({"epoch": 3, "state_dict": state, "optimizer": optimizer, "loss": 1.5}, tmp_path / "p.pth.tar")
    model = load_model(tmp_path / "p.pth.tar")
    assert model.arguments["config"] == list(TINY["config"])
    with torch.no_grad():
        torch.testing.assert_close(model(image, 1)["latent"], tiny(image, 1)["latent"], atol=1e-4, rtol=1e-4)


def test_wrong_weights_are_explained(tiny, tmp_path):
    state = tiny.state_dict()
    del state["g_s.0.conv.bias"]
    torch.save({"state_dict": state, "arguments": tiny.arguments}, tmp_path / "w.pth.tar")
    with pytest.raises(CheckpointError, match=r"w.pth.tar: .*1 missing: g_s.0.conv.bias"):
        load_model(tmp_path / "w.pth.tar")
    torch.save({"state_dict": state, "arguments": {"sides": 3}}, tmp_path / "v.pth.tar")
    with pytest.raises(CheckpointError, match=r"v.pth.tar: not of this version .* \(a TCM_VBR has no sides\)"):
        load_model(tmp_path / "v.pth.tar")
    for arguments in ([1, 2], None, "x", {1: 2}):
        torch.save({"state_dict": state, "arguments": arguments}, tmp_path / "t.pth.tar")
        with pytest.raises(CheckpointError, match=r"t.pth.tar: not of this version"):
            load_model(tmp_path / "t.pth.tar")
    torch.save({"model": "DepthConv", "state_dict": state, "arguments": {"sides": 3}}, tmp_path / "u.pth.tar")
    with pytest.raises(CheckpointError, match=r"u.pth.tar: not of this version .* \(a DepthConv has no sides\)"):
        load_model(tmp_path / "u.pth.tar")


def test_checkpoints_by_what_they_hold(tiny, tmp_path):
    """Not by their suffix: safetensors under another name, a pipe, and what people forget to unpack."""
    export_model(tmp_path / "w.pth.tar", tiny, [])
    expected = load_model(tmp_path / "w.pth.tar")
    state = {name: value.contiguous() for name, value in expected.state_dict().items()}
    safetensors.torch.save_file(state, tmp_path / "x.bin")
    assert load_model(tmp_path / "x.bin").fingerprint == expected.fingerprint
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=lambda: (tmp_path / "pipe").write_bytes((tmp_path / "w.pth.tar").read_bytes()))
    writer.start()
    assert load_model(tmp_path / "pipe").fingerprint == expected.fingerprint
    writer.join()
    (tmp_path / "w.gz").write_bytes(gzip.compress(b"weights"))
    with zipfile.ZipFile(tmp_path / "w.zip", "w") as file:
        file.writestr("weights.bin", b"weights")
    with zipfile.ZipFile(tmp_path / "w2.zip", "w") as file:  # not compressed: begins much as the weights in it
        file.write(tmp_path / "w.pth.tar", "w.pth.tar")
    for name, told in (("w.gz", "a gzip file"), ("w.zip", "a zip archive"), ("w2.zip", "a zip archive")):
        with pytest.raises(CheckpointError, match=told):
            load_model(tmp_path / name)


# Where results go ----------------------------------------------------------------------------------


@pytest.mark.parametrize("script", [eval_vbr, online_training_vbr])
@pytest.mark.parametrize("option", ["--json", "--report", "--save"])
def test_what_cannot_be_written_is_said_before_the_work(script, option, photos, checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint_module, "load_model", lambda *args, **kwargs: pytest.fail("the work has begun"))
    (tmp_path / "file").write_text("")
    wrong = [tmp_path / "file" / "below"] + ([tmp_path] if option == "--json" else [tmp_path / "file"])
    for path in wrong:
        with pytest.raises(OSError, match=r"is no folder|is a folder"):
            script.main(["-d", str(photos), "--checkpoint", checkpoint, option, str(path)])
    assert (tmp_path / "file").read_text() == ""


@pytest.mark.parametrize("script", [eval_vbr, online_training_vbr])
def test_json_to_standard_output_is_alone_there(script, photos, checkpoint, tmp_path, capsys):
    more = ["-t", "0"] if script is online_training_vbr else ["--report", str(tmp_path / "page")]
    script.main(["-d", str(photos / "p0.png"), "--checkpoint", checkpoint, "-l", "1", "--json", "-", *more])
    told = capsys.readouterr()
    assert json.loads(told.out)["images"][0]["image"] == "p0.png"
    assert "mean of 1" in told.err and not Path("-").exists()


def test_a_pipe_that_is_named_by_its_number_is_written_to():
    """As /dev/stdout before a pipe, and as the >(…) of a shell: their names resolve to what cannot be opened."""
    ours, theirs = os.pipe()
    path = f"/dev/fd/{theirs}"
    check_output_file(path)
    write_json(path, {"bpp": 1})
    os.close(theirs)
    with open(ours) as file:
        assert json.load(file) == {"bpp": 1}


@pytest.mark.parametrize(("script", "option"), [(eval_vbr, "--save"), (online_training_vbr, "--out")])
def test_pictures_whose_files_would_have_one_name_are_refused(script, option, photos, checkpoint, tmp_path):
    for name in ("d/a.png", "e/a.png", "f/d_a.png"):
        (tmp_path / name).parent.mkdir()
        shutil.copy(photos / "p0.png", tmp_path / name)
    stem = f"{tmp_path.as_posix().strip('/')}/d/a.png".replace("/", "_")
    (tmp_path / "f" / "d_a.png").rename(tmp_path / "f" / stem)
    with pytest.raises(cli.UserError, match="would have the name of what is written for .*a.png"):
        script.main(["-d", str(tmp_path), "--checkpoint", checkpoint, option, str(tmp_path / "out")])


@pytest.mark.parametrize(
    ("path", "error", "told"),
    [
        ("file", "the file is damaged", "error: file: the file is damaged"),
        ("-", "--roi 1,2,3,4 does not fit", "error: -: --roi 1,2,3,4 does not fit"),
        ("a.png", "a.png: no such file", "error: a.png: no such file"),
        ("a.png", FileNotFoundError(2, "No such file", "a.png"), "error: [Errno 2] No such file: 'a.png'"),
        ("it's.png", FileNotFoundError(2, "No such file", "it's.png"), 'error: [Errno 2] No such file: "it\'s.png"'),
    ],
)
def test_an_error_names_its_file_once(path, error, told, capsys):
    print_error(path, error)
    assert capsys.readouterr().err == f"{told}\n"


def test_a_device_that_is_full_and_a_folder_without_room_are_named(tmp_path, monkeypatch):
    with pytest.raises(OSError, match="No space left on device: '/dev/full'"):
        write_json("/dev/full", {"bpp": 1})

    with pytest.raises(OSError, match="a.bin: encoder error -2"), atomic_write(tmp_path / "a.bin"):
        raise OSError("encoder error -2")  # as Pillow does

    def refuse(*args, **kwargs):
        raise FileNotFoundError(errno.ENOENT, "No such file or directory", f"{tmp_path}/.a.json.x7")

    monkeypatch.setattr(tempfile, "mkstemp", refuse)
    with pytest.raises(FileNotFoundError) as error:
        write_json(tmp_path / "a.json", {"bpp": 1})
    assert error.value.filename == str(tmp_path / "a.json")


def test_a_folder_that_nobody_may_write_to_is_named(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    with pytest.raises(PermissionError) as error:
        check_output_file(tmp_path / "new" / "results.json")
    assert error.value.filename == str(tmp_path) and not (tmp_path / "new").exists()
    check_output_file(None)
    check_output_file("/dev/null")
