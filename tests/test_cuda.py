"""What only a GPU can show: skipped without one, unless tests/gpu.sh --cpu tries these tests out on the CPU."""

import os

import pytest
import torch

from models.coding.precision import deterministic
from models.layers import WMSA
from utils.checkpoint import load_model
from utils.codec.decode import decode
from utils.codec.encode import EncodeRequest, encode
from utils.images import read_image
from utils.metrics import ms_ssim_value
from utils.training.objectives import Objective


@pytest.fixture
def device() -> torch.device:
    if torch.cuda.is_available():
        return torch.device("cuda")
    if "CUDA_TESTS_ON_CPU" not in os.environ:
        pytest.skip("no GPU")
    return torch.device("cpu")


@pytest.mark.parametrize("index", [-2.0, 2.5, 7.0])
def test_files_decode_on_the_other_device(varied, varied_checkpoint, photos, device, index):
    models = [load_model(varied_checkpoint, where) for where in (torch.device("cpu"), device)]
    image = read_image(photos / "p0.png")
    for here, there in (models, reversed(models)):
        data = encode(here, image.to(here.medians.device), EncodeRequest(index)).data
        pictures = [decode(model, data).cpu().int() for model in (here, there)]
        assert (pictures[0] - pictures[1]).abs().max() <= 1


def test_bands_are_the_picture(varied_checkpoint, device):
    model = load_model(varied_checkpoint, device)
    x = torch.rand(1, 3, 640, 256, generator=torch.Generator().manual_seed(0)).to(device)
    index = model.resolve_index(2.0, 1)
    with torch.no_grad(), deterministic():
        y = model.features(x)
        assert torch.allclose(model.features_of_bands(x.split(128, 2), 640), y, atol=1e-3 * float(y.abs().max()))
        x_hat = torch.cat(list(model.synthesize_bands(y, index, 128)), 2)
        assert torch.allclose(x_hat, model.synthesize(y, index), atol=1e-3)
    assert model.band_height(6016, 4096) % 128 == 0


def test_ms_ssim_is_that_of_the_cpu(photos, device):
    a, b = (read_image(photos / f"p{i}.png")[:, :170, :170] for i in (0, 1))
    b = ((3 * a.float() + b.float()) / 4).round().byte()
    assert ms_ssim_value(a.to(device), b.to(device)) == pytest.approx(ms_ssim_value(a, b), abs=1e-5)


def test_losses_are_those_of_the_cpu(tiny, device):
    x, rates = torch.rand(2, 3, 128, 128, generator=torch.Generator().manual_seed(0)), torch.tensor([0.2, 0.7])
    noise = [torch.zeros(2, *shape) for shape in tiny.noise_shapes(128, 128)]
    losses = []
    for where in (torch.device("cpu"), device):
        out = Objective(tiny.to(where).train())(x.to(where), rates, tuple(part.to(where) for part in noise))
        out["total"].backward()
        losses.append(float(out["loss"]))
    assert losses[1] == pytest.approx(losses[0], rel=0.01)


def test_attention_takes_more_windows_than_a_kernel(device):
    attention = WMSA(8, 8, 8, 4, "SW").to(device)
    x = torch.randn(1, 4 * 257, 4 * 256, 8, device=device, requires_grad=True)  # 65,792 windows
    attention(x).square().mean().backward()
    assert torch.isfinite(x.grad).all() and x.grad.abs().sum() > 0
