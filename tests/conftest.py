import copy
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from models import TCM_VBR, DepthConv_VBR
from tests.depthconv import tiny as depthconv
from utils.checkpoint import export_model

TINY = dict(
    config=(1, 0, 2, 0, 2, 0),
    head_dim=(8, 16, 16, 16, 16, 8),
    N=32,
    M=64,
    num_slices=2,
    max_support_slices=1,
    hyper_channels=32,
    inter_dim=32,
    slice_widths=(32, 16),
)
BLOCKS_IN_EVERY_STAGE = dict(config=(1, 1, 2, 1, 2, 1))  # in place of those of TINY, with which tests take less time
SHARED = Path(__file__).resolve().parent.parent.parent / "shared"


def shake(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Move every weight off its initial value, so that nothing is zero or identity by accident."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if ".gdn." not in name and ".igdn." not in name and "entropy_bottleneck" not in name:
                p.add_(torch.randn(p.shape, generator=generator) * 0.02)
        for i in range(model.num_slices):
            model.cc_scale_transforms[i][4].bias.add_(20.0)
        model.g_a[-1].weight.mul_(20.0)  # latents of several quantization steps
    return model


def golden_model() -> tuple[TCM_VBR, np.random.RandomState]:
    """A tiny model with weights of NumPy's legacy random numbers, which are the same everywhere, and their source."""
    model = TCM_VBR(**TINY | BLOCKS_IN_EVERY_STAGE).eval()
    random = np.random.RandomState(0)
    with torch.no_grad():
        for name, p in sorted(model.named_parameters()):
            if not name.startswith("entropy_bottleneck") and "gdn" not in name:
                fan_in = max(1, p[0].numel()) if p.dim() > 1 else 1
                p.copy_(torch.from_numpy(random.standard_normal(p.shape) * 0.6 / fan_in**0.5))
        for biases in model.entropy_bottleneck.biases:
            biases.zero_()
        model.g_a[-1].weight.mul_(20.0)
        for transforms in model.cc_scale_transforms:
            transforms[4].bias.add_(4.0)
    model.update(force=True)
    return model, random


# Slow fixtures are made once and not changed: `tiny` and `photos` are copies that a test may change.


def made(**change) -> TCM_VBR:
    """A tiny TCM_VBR with coding tables; `change` are arguments other than those of TINY."""
    torch.manual_seed(0)
    model = shake(TCM_VBR(**TINY | change)).eval()
    model.update(force=True)
    return model


@pytest.fixture(scope="session")
def made_tiny() -> TCM_VBR:
    return made()


@pytest.fixture
def tiny(made_tiny) -> TCM_VBR:
    torch.manual_seed(0)
    return copy.deepcopy(made_tiny)


def vary(made_tiny, last: torch.nn.Conv2d):
    """A copy with gains that rise with the index, from 0.55 to 1.9: rates 7 % apart; and pictures that are not all
    black and white.

    Args:
        last: the convolution of its g_s that makes the pixels.
    """
    model = copy.deepcopy(made_tiny)
    last = model.get_submodule(next(name for name, module in made_tiny.named_modules() if module is last))
    with torch.no_grad():
        for lae, sign in ((model.modnet_ga, 1), (model.modnet_gs, -1)):
            first, second = lae.mask.lmd_map.fc_layers
            first.weight.fill_(1)
            first.bias.zero_()
            second.weight.fill_(sign * 0.6 / model.M)
            second.bias.fill_(sign * -1.5)
        x = model(torch.full((1, 3, 128, 128), 0.5), 2.5)["x_hat"]
        last.weight.mul_(0.15 / x.std())
        last.bias.mul_(0.15 / x.std()).add_(0.5 - 0.15 * x.mean() / x.std())
    return model


@pytest.fixture(scope="session")
def varied_tcm() -> TCM_VBR:
    """A tiny TCM_VBR with rates that differ; not to be changed."""
    model = made()
    return vary(model, model.g_s[-1][0])


@pytest.fixture(scope="session")
def varied(varied_tcm) -> TCM_VBR:
    return varied_tcm


def file_of(model: torch.nn.Module, tmp_path_factory: pytest.TempPathFactory, name: str) -> str:
    path = tmp_path_factory.mktemp("weights") / f"{name}.pth.tar"
    export_model(path, model, [])
    return str(path)


@pytest.fixture(scope="session")
def checkpoint(made_tiny, tmp_path_factory) -> str:
    """File of the model `tiny`."""
    return file_of(made_tiny, tmp_path_factory, "tiny")


@pytest.fixture(scope="session")
def varied_checkpoint(varied, tmp_path_factory) -> str:
    """File of the model `varied`."""
    return file_of(varied, tmp_path_factory, "varied")


@pytest.fixture(scope="session")
def quick_model() -> DepthConv_VBR:
    """For tests of what is the same with all networks: a training step takes a fifth of that of `tiny`. Its rates
    differ; not to be changed."""
    model = depthconv.made()
    return vary(model, model.g_s[-2])


@pytest.fixture(scope="session")
def quick(quick_model, tmp_path_factory) -> str:
    """File of `quick_model`."""
    return file_of(quick_model, tmp_path_factory, "quick")


@pytest.fixture(scope="session")
def made_photos(tmp_path_factory) -> Path:
    """Eight smooth pictures of odd sizes."""
    random = np.random.default_rng(0)
    folder = tmp_path_factory.mktemp("photos")
    for i in range(8):
        small = Image.fromarray(random.integers(0, 255, (6, 7, 3), dtype=np.uint8))
        small.resize((190 + i, 170 + i), Image.Resampling.BICUBIC).save(folder / f"p{i}.png")
    return folder


@pytest.fixture
def photos(made_photos, tmp_path) -> Path:
    return shutil.copytree(made_photos, tmp_path / "photos")


@pytest.fixture
def image() -> torch.Tensor:
    """A smooth random picture `[1, 3, 128, 256]`."""
    small = torch.rand(1, 3, 8, 16, generator=torch.Generator().manual_seed(1))
    return torch.nn.functional.interpolate(small, (128, 256), mode="bicubic").clamp(0, 1)


@pytest.fixture
def shared() -> Path:
    """The project's shared folder with photographs and more reference outputs, where it is there."""
    if not SHARED.is_dir():
        pytest.skip("no shared folder beside the project")
    return SHARED
