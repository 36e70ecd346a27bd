"""The shipped weights: size and training record of the file, and more bits at every higher index."""


import pytest
import torch

from models import TCM_VBR
from models.lambdas import LADDER
from models.registry import from_preset
from utils.checkpoint import load_model, read_checkpoint
from utils.codec.request import EncodeRequest
from utils.evaluation.evaluate import evaluate
from utils.files import BUNDLED
from utils.images import read_image
from utils.pictures import find_images_or_samples


@pytest.fixture(scope="module")
def bundled() -> TCM_VBR:
    return load_model(BUNDLED)


@pytest.fixture(scope="module")
def photo() -> torch.Tensor:
    """The middle of scikit-image's cat."""
    return read_image(find_images_or_samples(None)[1])[:, 20:276, 80:336]


def test_the_file(bundled):
    assert BUNDLED.stat().st_size <= 28e6
    checkpoint = read_checkpoint(BUNDLED)
    assert checkpoint["lambdas"] == list(LADDER)
    assert checkpoint["state_dict"]["g_a.0.conv1.weight"].dtype == torch.float16
    assert checkpoint["state_dict"]["gaussian_conditional._quantized_cdf"].numel() > 0
    *_, joint = (record for record in checkpoint["training"] if record["stage"] == "joint")
    assert {"patches", "minutes", "machine", "bpp", "psnr", "loss"} <= set(joint)
    assert bundled.arguments == from_preset("small").arguments


def test_more_bits_at_every_higher_index(bundled, photo):
    bpp = [evaluate(bundled, "cat", photo, EncodeRequest(float(index)), real=False)[0].bpp for index in range(6)]
    assert all(lower < higher for lower, higher in zip(bpp, bpp[1:], strict=False)), bpp


def test_real_files_cost_what_was_estimated(bundled, photo):
    real, decoded = evaluate(bundled, "cat", photo, EncodeRequest(2.5), real=True)
    estimated, expected = evaluate(bundled, "cat", photo, EncodeRequest(2.5), real=False)
    assert torch.equal(decoded, expected)
    assert real.bpp == pytest.approx(estimated.bpp, abs=16 * 8 / photo[0].numel())  # the coder writes whole words
    assert real.psnr > 30
