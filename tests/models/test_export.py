"""torch.export and ONNX take the networks before and after the entropy coder (docs/export.md)."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.depthconv import tiny as depthconv

RATES = [torch.tensor([rate]) for rate in (2.5, 4.0, 6.5)]


class Analysis(nn.Module):
    def __init__(self, codec: nn.Module) -> None:
        super().__init__()
        self.codec = codec

    def forward(self, x: Tensor, index: Tensor) -> Tensor:
        return self.codec.analyze(x, index)[0]


class Synthesis(Analysis):
    def forward(self, x: Tensor, index: Tensor) -> Tensor:
        return self.codec.synthesize(x, index)


@pytest.fixture(scope="module", params=["TCM_VBR", "DepthConv_VBR"])
def exported(request, made_tiny) -> list[tuple[torch.export.ExportedProgram, Tensor, list[Tensor]]]:
    """Programs of both networks, each with an input and what PyTorch makes of it at RATES."""
    codec = made_tiny if request.param == "TCM_VBR" else depthconv.made()
    found = []
    for network, x in ((Analysis, torch.rand(1, 3, 256, 128)), (Synthesis, 3 * torch.randn(1, codec.M, 16, 8))):
        with torch.no_grad():
            program = torch.export.export(network(codec), (x, RATES[0]), strict=False)
            found.append((program, x, [network(codec)(x, rate) for rate in RATES]))
    return found


@torch.no_grad()
def test_exported_networks_compute_the_same(exported):
    for program, x, expected in exported:
        for rate, out in zip(RATES, expected, strict=True):
            torch.testing.assert_close(program.module()(x, rate), out, rtol=0, atol=1e-5)
        assert not any(torch.equal(expected[0], out) for out in expected[1:])  # the rate is an input, not a constant


@torch.no_grad()  # as the programs were made: with gradients attention has other strides
def test_onnx_runtime_computes_the_same(exported, tmp_path):
    for package in ("onnx", "onnxscript"):
        pytest.importorskip(package)
    runtime = pytest.importorskip("onnxruntime")
    for program, x, expected in exported:
        torch.onnx.export(program, dynamo=True, verbose=False).save(tmp_path / "network.onnx")
        session = runtime.InferenceSession(tmp_path / "network.onnx", providers=["CPUExecutionProvider"])
        names = [each.name for each in session.get_inputs()]
        for rate, out in zip(RATES, expected, strict=True):
            (found,) = session.run(None, dict(zip(names, (x.numpy(), rate.numpy()), strict=True)))
            assert np.abs(found - out.numpy()).max() <= 1e-4 * out.abs().max()
