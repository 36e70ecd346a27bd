"""The shipped weights: size and training record of the files, and more bits at every higher index."""

import itertools

import numpy as np
import pytest
import torch
from PIL import Image

import codec_vbr
from models import VariableRate
from models.lambdas import LADDER, index_to_lambda
from models.registry import from_preset
from utils.checkpoint import load_model, read_checkpoint
from utils.codec.request import EncodeRequest
from utils.evaluation.evaluate import evaluate
from utils.evaluation.results import mse_of_psnr
from utils.files import BUNDLED
from utils.images import read_image
from utils.pictures import find_images_or_samples
from utils.training.synthetic import KINDS

SHIPPED = {"depthconv": BUNDLED, "small": BUNDLED.with_name("tcm_vbr_small.pth.tar")}  # by preset


@pytest.fixture(scope="module", params=SHIPPED)
def preset(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def bundled(preset) -> VariableRate:
    return load_model(SHIPPED[preset])


@pytest.fixture(scope="module")
def photo() -> torch.Tensor:
    """The middle of scikit-image's cat."""
    return read_image(find_images_or_samples(None)[1])[:, 20:276, 80:336]


def test_the_file(bundled, preset):
    assert SHIPPED[preset].stat().st_size <= 30e6
    checkpoint = read_checkpoint(SHIPPED[preset])
    assert checkpoint["lambdas"] == list(LADDER)
    assert {checkpoint["state_dict"][name].dtype for name, _ in bundled.named_parameters()} == {torch.float16}
    assert checkpoint["state_dict"]["gaussian_conditional._quantized_cdf"].numel() > 0
    *_, joint = (record for record in checkpoint["training"] if record["stage"] == "joint")
    assert {"patches", "minutes", "machine", "bpp", "psnr", "loss"} <= set(joint)
    assert bundled.arguments == from_preset(preset).arguments


def test_a_file_finds_the_weights_that_made_it(photo, tmp_path, capsys):
    """Both that ship do, whichever is the default."""
    Image.fromarray(photo.permute(1, 2, 0).numpy()).save(tmp_path / "cat.png")
    for preset, weights in SHIPPED.items():
        coded, back = tmp_path / f"{preset}.tvbr", tmp_path / f"{preset}.png"
        options = ["-l", "1", "--checkpoint", str(weights), "--verify"]
        assert codec_vbr.main(["encode", str(tmp_path / "cat.png"), str(coded), *options]) == 0
        assert codec_vbr.main(["decode", str(coded), str(back)]) == 0
        told = capsys.readouterr().err
        assert told.count(f"weights: {weights}") == 2 and "error" not in told
        assert read_image(back).shape == photo.shape


def test_more_bits_at_every_higher_index(bundled, photo):
    bpp = [evaluate(bundled, "cat", photo, EncodeRequest(float(index)), real=False)[0].bpp for index in range(6)]
    assert all(lower < higher for lower, higher in zip(bpp, bpp[1:], strict=False)), bpp


def test_rates_go_on_beyond_the_ladder(bundled, preset, photo):
    """With files that decode. What bits buy there is near λ; less where the transforms lose much, as TCM small's do."""
    most = {"depthconv": 1.5, "small": 2.5}[preset]
    for indexes in ((-2.0, -1.0, 0.0), (5.0, 6.0, 7.0)):
        results = [evaluate(bundled, "cat", photo, EncodeRequest(index), real=True)[0] for index in indexes]
        for lower, higher in itertools.pairwise(results):
            assert lower.bpp < 0.95 * higher.bpp and lower.psnr < higher.psnr
            slope = (higher.bpp - lower.bpp) / (mse_of_psnr(lower.psnr) - mse_of_psnr(higher.psnr))
            middle = (lower.index + higher.index) / 2
            assert 1 / 1.5 < slope / index_to_lambda(middle) < most, (middle, slope)


def test_real_files_cost_what_was_estimated(bundled, photo):
    real, decoded = evaluate(bundled, "cat", photo, EncodeRequest(2.5), real=True)
    estimated, expected = evaluate(bundled, "cat", photo, EncodeRequest(2.5), real=False)
    assert torch.equal(decoded, expected)
    assert real.bpp == pytest.approx(estimated.bpp, abs=16 * 8 / photo[0].numel())  # the coder writes whole words
    assert real.psnr > 30


@pytest.mark.parametrize("kind", [*KINDS, None])
def test_what_is_no_photograph_is_coded_too(bundled, photo, kind):
    """Its file has a bounded size, and decodes to a picture; None is noise of full contrast, a color for each pixel."""
    random = np.random.default_rng(1)
    pixels = photo[:, 64:192, 64:192].permute(1, 2, 0).numpy()
    made = kind(pixels, random) if kind else random.integers(0, 256, pixels.shape, dtype=np.uint8)
    image = torch.from_numpy(made.copy()).permute(2, 0, 1)
    for index in (0.0, 5.0):
        result, _ = evaluate(bundled, "made", image, EncodeRequest(index), real=True)
        assert result.bpp < 8 and result.psnr > 5, (index, result.bpp, result.psnr)
