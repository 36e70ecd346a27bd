"""What people run into who use the codec from Python: other forms of pictures, autocast, fine-tuning, pickles."""

import copy
import json
import multiprocessing
import os
import pickle
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from models.coding.side_info import DecodingError
from utils.checkpoint import CheckpointError, load_model
from utils.codec.bitstream import BitstreamError
from utils.codec.decode import decode
from utils.codec.encode import encode
from utils.codec.quality_map import QualityMap
from utils.codec.request import EncodeRequest, RefinementSettings
from utils.errors import UserError
from utils.images import read_image, save_image
from utils.pictures import ImageError

REQUEST = EncodeRequest(2.0)
ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def picture() -> torch.Tensor:
    small = torch.rand(3, 8, 12, generator=torch.Generator().manual_seed(2))
    return (small * 255).byte().repeat_interleave(15, 1).repeat_interleave(11, 2)


# Pictures and arguments -----------------------------------------------------------------------


def test_a_numpy_picture_gives_the_same_file(tiny, picture):
    pixels = picture.permute(1, 2, 0).numpy()
    expected = encode(tiny, picture, REQUEST).data
    assert encode(tiny, pixels, REQUEST).data == expected
    upside_down = np.ascontiguousarray(pixels[::-1])[::-1]  # a view with negative strides
    assert encode(tiny, upside_down, REQUEST).data == expected
    pixels = pixels.copy()
    pixels.flags.writeable = False  # as np.asarray(Image.open(…)) is
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert encode(tiny, pixels, REQUEST).data == expected


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_that_were_rounded_once_write_no_files(tiny, picture, dtype):
    """Whose files the weights that they were could not decode."""
    rounded = copy.deepcopy(tiny).to(dtype).float()
    for model in (rounded, copy.deepcopy(rounded), pickle.loads(pickle.dumps(rounded))):
        with pytest.raises(ValueError, match=f"the weights were {dtype}; .* use load_model again"):
            encode(model, picture, REQUEST)
    assert encode(copy.deepcopy(tiny).double().float(), picture, REQUEST).data == encode(tiny, picture, REQUEST).data


@pytest.fixture
def set_precision():
    yield torch.set_default_dtype
    torch.set_default_dtype(torch.float32)


def test_weights_are_not_loaded_in_half_precision(checkpoint, set_precision):
    set_precision(torch.bfloat16)
    with pytest.raises(CheckpointError, match=r"cannot be loaded while torch.get_default_dtype\(\) is torch.bfloat16"):
        load_model(checkpoint)


def test_loading_leaves_the_precision_and_the_random_numbers_of_a_program_alone(picture, checkpoint, set_precision):
    set_precision(torch.float64)
    torch.manual_seed(0)
    expected = torch.rand(2)
    torch.manual_seed(0)
    model = load_model(checkpoint)
    assert torch.equal(torch.rand(2), expected)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    data = encode(model, picture, REQUEST).data
    set_precision(torch.float32)
    assert data == encode(load_model(checkpoint), picture, REQUEST).data


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x.float() / 255, lambda x: x.double(), lambda x: x.int(), lambda x: x.numpy(), lambda x: x[None],
        lambda x: x.permute(1, 2, 0), lambda x: x[:1], lambda x: torch.cat((x, x[:1])), lambda x: x[:, :0],
        lambda x: x.tolist(), lambda x: "photo.png", lambda x: x.permute(1, 2, 0).numpy() / 255,
    ],
)
def test_other_pictures_are_one_line_that_says_what_is_taken(tiny, picture, change):
    with pytest.raises(ValueError, match=r"uint8 tensor \[3, H, W\] or a uint8 NumPy array \[H, W, 3\]|is empty"):
        encode(tiny, change(picture), REQUEST)


def test_wrong_arguments_say_what_is_taken(tiny, picture, image):
    with pytest.raises(ValueError, match=r"EncodeRequest\(index=2.5\), not 2.5"):
        encode(tiny, picture, 2.5)
    with pytest.raises(ValueError, match="takes the bytes of a file, not 'photo.tvbr'"):
        decode(tiny, "photo.tvbr")
    for wrapped in (torch.compile(tiny), torch.nn.DataParallel(tiny)):
        with pytest.raises(ValueError, match="encode takes a codec: pass the model that it wraps, not "):
            encode(wrapped, picture, REQUEST)
        with pytest.raises(ValueError, match="decode takes a codec: pass the model that it wraps, not "):
            decode(wrapped, b"")
    with pytest.raises(ValueError, match="decode takes a codec, as models.TCM_VBR .*, not str"):
        decode("weights.pth.tar", b"")
    data = encode(tiny, picture, REQUEST).data
    for other in (bytearray, memoryview):
        assert torch.equal(decode(tiny, other(data)), decode(tiny, data))
    coded = tiny.compress(image, 2.0)
    latents = torch.zeros(1, 64, 8, 16), torch.zeros(1, 32, 2, 4)
    for convert, way in (("half", "load_model"), ("double", r"model.float\(\)"), ("bfloat16", "load_model")):
        converted = getattr(copy.deepcopy(tiny), convert)()
        for use in (
            lambda m: encode(m, picture, REQUEST), lambda m: decode(m, data), lambda m: m.decompress(**coded),
            lambda m: m(image, 2.0), lambda m: m.forward_fromlatent(*latents, 2.0),
        ):  # fmt: skip
            with pytest.raises(ValueError, match=way):
                use(converted)
    for wrong in ((255 * image).byte(), image.double(), image.numpy()):
        with pytest.raises(ValueError, match=r"float32 tensor with values in \[0, 1\], not (torch.[uf]|nd)"):
            tiny(wrong, 2.0)
    with pytest.raises(ValueError, match="a rate index is a number or a tensor of numbers, not '2'"):
        tiny(image, "2")
    with pytest.raises(ValueError, match="quality_map takes a QualityMap, .*, not ndarray"):
        EncodeRequest(2.0, quality_map=np.ones((9, 9)))
    with pytest.raises(ValueError, match=r"a mask has the shape \[H, W\] of its picture, not \[1, 9, 9\]"):
        QualityMap.from_region(np.ones((1, 9, 9)), index=4)
    with pytest.raises(ValueError, match="index must be a number, not '4'"):
        QualityMap.from_region(np.eye(9), index="4")
    with pytest.raises(ImageError, match="^cannot be read as a picture"):
        read_image(b"junk")
    other = torch.full((1, 1, 3, 3), 2.0)
    for use in (
        lambda: tiny(image, other), lambda: tiny.decompress(coded["strings"], coded["shape"], other),
        lambda: tiny.test_fromlatent(*latents, other),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=r"is \[B, 1, 8, 16\], not \[1, 1, 3, 3\]"):
            use()


def test_pictures_are_saved_as_png_or_not_at_all(picture, tmp_path):
    pixels = picture.permute(1, 2, 0).numpy()
    save_image(tmp_path / "a.png", pixels)
    assert torch.equal(read_image(tmp_path / "a.png"), picture)
    with pytest.raises(UserError, match="f.jpg: pictures are written as PNG"):
        save_image(tmp_path / "f.jpg", picture)
    with pytest.raises(ValueError, match="a picture is a uint8 tensor"):
        save_image(tmp_path / "f.png", picture.float())
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


# Autocast and inference mode --------------------------------------------------------------------


def test_autocast_changes_neither_a_file_nor_its_picture(tiny, picture, image):
    data = encode(tiny, picture, REQUEST).data
    expected, coded = decode(tiny, data), tiny.compress(image, 2.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert encode(tiny, picture, REQUEST).data == data
        assert torch.equal(decode(tiny, data), expected)
        again = tiny.compress(image, 2.0)
        x_hat = tiny.decompress(again["strings"], again["shape"], 2.0)["x_hat"]
    assert again["strings"] == coded["strings"]
    assert torch.equal(x_hat, tiny.decompress(coded["strings"], coded["shape"], 2.0)["x_hat"])


def test_inference_mode_refines_too(varied, picture):
    request = EncodeRequest(2.0, refinement=RefinementSettings(3))
    with torch.inference_mode():
        inside = encode(varied, picture, request)
    assert inside.data == encode(varied, picture, request).data and len(inside.refinement.steps) == 4


# Weights that change ------------------------------------------------------------------------------


def test_a_file_of_fine_tuned_weights_is_refused_by_the_others(tiny, made_tiny, picture):
    before = encode(tiny, picture, REQUEST).data
    with torch.no_grad():
        for p in tiny.g_s.parameters():
            p.mul_(1.02)
    after = encode(tiny, picture, REQUEST).data
    decode(tiny, after)
    for model, data in ((made_tiny, after), (tiny, before)):
        with pytest.raises(BitstreamError, match="other weights"):
            decode(model, data)


def test_weights_that_point_elsewhere_are_others(tiny):
    fingerprint = tiny.fingerprint
    vector = torch.nn.utils.parameters_to_vector(tiny.parameters()).detach()
    torch.nn.utils.vector_to_parameters(vector + 1e-3, tiny.parameters())
    assert tiny.fingerprint != fingerprint


def test_a_change_without_a_trace_is_noticed_after_training(tiny):
    fingerprint = tiny.fingerprint
    tiny.train()
    tiny.g_s[0].conv.weight.data.mul_(1.02)
    assert tiny.eval().fingerprint != fingerprint


def test_coding_tables_that_are_changed_from_outside_are_used(tiny, image):
    before = tiny.compress(image, 2.0)["strings"]
    tiny.gaussian_conditional.update_scale_table(torch.exp(torch.linspace(-2, 5, 40)), force=True)
    coded = tiny.compress(image, 2.0)
    assert coded["strings"] != before
    other = type(tiny).from_state_dict(tiny.state_dict())
    decoded = other.decompress(coded["strings"], coded["shape"], 2.0)["x_hat"]
    assert torch.equal(decoded, tiny.decompress(coded["strings"], coded["shape"], 2.0)["x_hat"])


# Streams without side information -------------------------------------------------------------------


def test_streams_that_are_cut_off_are_decoding_errors(tiny, image):
    coded = tiny.compress(image, 2.0)
    (y,), (z,) = coded["strings"]
    assert torch.isfinite(tiny.decompress([[y], [z]], coded["shape"], 2.0)["x_hat"]).all()
    longer = bytes(len(y) // 10)
    wrong = [(b"", z), (y, b""), (b"", b""), (y[: len(y) // 2], z), (y[:-40], z), (y[40:], z), (y + longer, z)]
    for streams in wrong:
        with pytest.raises((DecodingError, ValueError)):
            tiny.decompress([[streams[0]], [streams[1]]], coded["shape"], 2.0)
    with pytest.raises(DecodingError, match="empty or cut off"):
        tiny.decompress([[b""], [z]], coded["shape"], 2.0)


# The model as an object -------------------------------------------------------------------------------


def _fingerprint(model) -> bytes:
    return model.fingerprint


def test_pickles_files_of_torch_save_and_other_processes_take_the_model(tiny, image, tmp_path):
    with torch.no_grad():
        expected = tiny(image, 2.0)["x_hat"]
        assert torch.equal(pickle.loads(pickle.dumps(tiny))(image, 2.0)["x_hat"], expected)
        torch.save(tiny, tmp_path / "model.pt")
        loaded = torch.load(tmp_path / "model.pt", weights_only=False)
        assert torch.equal(loaded(image, 2.0)["x_hat"], expected)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(_fingerprint, (tiny,)) == tiny.fingerprint


# Figures ----------------------------------------------------------------------------------------------


NOTEBOOK = {"MPLBACKEND": "module://matplotlib_inline.backend_inline"}


@pytest.mark.parametrize("environment", [NOTEBOOK, {"MATPLOTLIBRC": ""}])
def test_figures_need_no_display_and_no_style_of_the_user(environment, tmp_path):
    """Without usetex, which needs LaTeX, and the size of the picture is ours."""
    (tmp_path / "matplotlibrc").write_text("text.usetex: True\nfont.family: Nope\nsavefig.dpi: 30\n")
    row = {"step": 1, "minutes": 1, "bpp": [0.2, 0.9], "psnr": [28, 33], "loss": 1.2}
    (tmp_path / "validation.jsonl").write_text(json.dumps(row))
    if "MATPLOTLIBRC" in environment:
        environment = {"MATPLOTLIBRC": str(tmp_path / "matplotlibrc")}
    code = f"""
from pathlib import Path
from utils.training.curves import draw_curves
from utils.evaluation import plots
folder = Path({str(tmp_path)!r})
draw_curves(folder / "validation.jsonl", folder / "curves.png")
from matplotlib.figure import Figure
def draw():
    figure = Figure(figsize=(4, 3))
    figure.subplots().set(title="a $b$")
    return figure
plots.render(draw, "plot", "", folder)
from PIL import Image
assert Image.open(folder / "plot.png").size == (440, 330)
"""
    command, own = [sys.executable, "-c", code], {**os.environ, **environment}
    process = subprocess.run(command, cwd=ROOT, env=own, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr
    assert (tmp_path / "curves.png").stat().st_size > 1000


@pytest.mark.parametrize(
    "module", ["evaluation.bd_rate", "evaluation.rate_study", "evaluation.report", "training.curves"]
)
def test_what_draws_can_be_imported_first_in_a_notebook(module):
    command, own = [sys.executable, "-c", f"import utils.{module}"], {**os.environ, **NOTEBOOK}
    process = subprocess.run(command, cwd=ROOT, env=own, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr
