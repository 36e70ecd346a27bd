"""Operations on tensors of two devices, which a GPU would refuse, found without a GPU: PyTorch's fake tensors have
shapes, types and devices, and no values. (Their gradients need a GPU, and so does reading a value.)"""

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import models.lae
from models.coding.slice_coders import Quantization
from models.layers import _cut_windows
from models.tcm import TCM_VBR
from utils.codec.rate_model import RateModel
from utils.training.objectives import Objective


@pytest.fixture
def on_gpu(tiny, monkeypatch) -> TCM_VBR:
    """`tiny`, in channels-last format, on a GPU that need not exist."""
    # The one value that a pass reads, and always of a tensor on the CPU.
    monkeypatch.setattr(models.lae, "check_index", lambda index, batch: torch.as_tensor(index).flatten().expand(batch))
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x: x)  # needs a driver
    tiny.to(memory_format=torch.channels_last)
    with FakeTensorMode() as mode:
        try:
            mode.from_tensor(torch.zeros(1)).to("cuda")
        except RuntimeError as error:
            pytest.skip(f"the fake tensors of PyTorch {torch.__version__} need a GPU themselves ({error})")
        for module in tiny.modules():
            for name, p in module.named_parameters(recurse=False):
                setattr(module, name, nn.Parameter(mode.from_tensor(p).detach().to("cuda")))
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, mode.from_tensor(buffer).to("cuda"))
        _cut_windows.cache_clear()
        yield tiny
    _cut_windows.cache_clear()


def test_training_stays_on_one_device(on_gpu):
    objective = Objective(on_gpu.train())
    y, z = (torch.rand(2, *shape, device="cuda") - 0.5 for shape in on_gpu.noise_shapes(128, 128))
    out = objective(torch.rand(2, 3, 128, 128, device="cuda"), torch.rand(2), (y, z))
    assert out["total"].device.type == "cuda" and out["total"].requires_grad


def test_refinement_and_rate_control_stay_on_one_device(on_gpu):
    model = RateModel(on_gpu, on_gpu.features(torch.rand(1, 3, 128, 256, device="cuda")))
    y = model.scaled(2.0)
    assert y.device.type == "cuda" and y.shape == (1, on_gpu.M, 8, 16)
    quantization = Quantization(use_scale_table=True, straight_through=True)
    out = on_gpu.forward_fromlatent(y, on_gpu.h_a(y), torch.tensor([2.0]), quantization)
    for found in (out["x_hat"], *out["likelihoods"].values()):
        assert found.device.type == "cuda"
