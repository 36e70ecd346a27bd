"""Weights of CompressAI's zoo: the numbers and streams of CompressAI's own classes, and LAEs for them."""

import json

import numpy as np
import pytest
import skimage.data
import torch
from compressai.models import (
    FactorizedPrior,
    JointAutoregressiveHierarchicalPriors,
    MeanScaleHyperprior,
    ScaleHyperprior,
)
from torch import nn

import train_vbr
from models import Hyperprior, Hyperprior_VBR
from models.lambdas import index_to_lambda
from models.large.bands import bands_of, gather, in_bands
from tests.training.test_klt_start import hierarchical_projection, patches  # noqa: F401
from utils.checkpoint import CheckpointError, export_model, load_model, read_checkpoint
from utils.codec.decode import decode
from utils.codec.encode import encode
from utils.codec.request import EncodeRequest, RefinementSettings
from utils.images import save_image
from utils.training.klt_start import klt_start

OLD_NAMES = {"matrices.": "_matrix", "biases.": "_bias", "factors.": "_factor"}


def zoo_model(cls) -> nn.Module:
    """A model of CompressAI with seeded weights whose latents are several steps."""
    torch.manual_seed(0)
    model = cls(64, 64).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if not any(part in name for part in ("entropy", "beta", "gamma")):
                p.add_(torch.randn_like(p) * 0.02)
        model.g_a[-1].weight.mul_(30)
    model.update()
    return model


def zoo_state(model: nn.Module) -> dict:
    """Its state dict as the zoo's servers have it: names of the bottleneck of 2020, in DataParallel's form."""
    state = {}
    for name, value in model.state_dict().items():
        for new, old in OLD_NAMES.items():
            name = name.replace(f"entropy_bottleneck.{new}", f"entropy_bottleneck.{old}")
        state["module." + name] = value
    assert "module.entropy_bottleneck._matrix0" in state
    return state


@pytest.mark.parametrize("cls", [ScaleHyperprior, MeanScaleHyperprior])
def test_numbers_and_streams_are_those_of_compressai(cls, tmp_path):
    theirs = zoo_model(cls)
    torch.save(zoo_state(theirs), tmp_path / "zoo.pth.tar")
    ours = load_model(tmp_path / "zoo.pth.tar")
    assert type(ours) is Hyperprior and ours.config.means == (cls is MeanScaleHyperprior)
    ours.to(memory_format=torch.contiguous_format)  # as theirs is: the last bits depend on it
    x = torch.rand(2, 3, 128, 256, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected, found = theirs(x), ours(x)
        assert torch.equal(found["x_hat"], expected["x_hat"])
        for name in ("y", "z"):
            assert torch.equal(found["likelihoods"][name], expected["likelihoods"][name])
        coded = ours.compress(x)
        assert coded["strings"] == theirs.compress(x)["strings"]
        decoded = ours.decompress(coded["strings"], coded["shape"])["x_hat"]
        assert torch.equal(decoded, expected["x_hat"].clamp(0, 1))


@pytest.mark.parametrize(
    ("model", "told"),
    [(JointAutoregressiveHierarchicalPriors(32, 64), "autoregressive"), (FactorizedPrior(32, 64), "hyperprior")],
)
def test_other_models_of_the_zoo_are_refused_by_name(model, told, tmp_path):
    torch.save(model.state_dict(), tmp_path / "zoo.pth.tar")
    with pytest.raises(CheckpointError, match=told):
        load_model(tmp_path / "zoo.pth.tar")


@pytest.mark.parametrize("cls", [ScaleHyperprior, MeanScaleHyperprior])
@torch.no_grad()
def test_layers_in_bands_are_exact(cls):
    model = Hyperprior.from_state_dict(zoo_model(cls).state_dict()).double()
    model.g_a[-1].__class__ = nn.Conv2d  # which stays in float64
    for layers, channels, height in ((model.g_a, 3, 512), (model.g_s, 64, 32), (model.h_s, 64, 8)):
        x = torch.randn(1, channels, height, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        whole, found = layers(x), list(in_bands(layers, bands_of([x], max(2, height // 8)), height))
        assert len(found) >= 3
        assert torch.allclose(gather(found, whole.shape[2]), whole, rtol=0, atol=1e-9 * float(whole.abs().max()))


@pytest.mark.parametrize("means", [False, True])
def test_the_start_is_the_projection_onto_the_kept_vectors(patches, means):  # noqa: F811
    torch.manual_seed(0)
    model = Hyperprior_VBR(64, 64, means).eval()
    klt_start(model, patches, wiener=False)
    index = model.resolve_index(1.3, len(patches))
    with torch.no_grad():
        found = model.synthesize(model.analyze(patches.float() / 255, index)[0], index)
    assert np.abs(found.numpy() - hierarchical_projection(patches, (12, 48, 64, 64))).max() < 1e-4


@pytest.mark.parametrize("means", [False, True])
def test_laes_alone_make_weights_of_one_rate_variable_rate(means, tmp_path):
    """docs/training.md has what comes of longer training on many photographs."""
    pictures = [skimage.data.astronaut(), skimage.data.coffee(), skimage.data.chelsea(), skimage.data.rocket()]
    tensors = [torch.from_numpy(picture).permute(2, 0, 1) for picture in pictures]
    for i, picture in enumerate(tensors):
        save_image(tmp_path / "photos" / f"{i}.png", picture)
    model = Hyperprior(64, 64, means)
    crops = torch.cat([x.unfold(1, 128, 90).unfold(2, 128, 90).flatten(1, 2).transpose(0, 1) for x in tensors])
    klt_start(model, crops, lmbda=0.013)
    export_model(tmp_path / "fixed.pth.tar", model.eval(), [])
    train_vbr.main([
        "-d", str(tmp_path / "photos"), "--stage", "lae", "--checkpoint", str(tmp_path / "fixed.pth.tar"),
        "-lr", "5e-3", "--max-steps", "60", "--patch-size", "128", "--val-size", "128", "-bs", "4", "--warmup", "5",
        "--ema", "0.8", "--device", "cpu", "--save_path", str(tmp_path / "run"),
    ])
    (line,) = (json.loads(line) for line in (tmp_path / "run" / "validation.jsonl").read_text().splitlines())
    assert all(b > 1.05 * a for a, b in zip(line["bpp"], line["bpp"][1:], strict=False))
    assert all(b > a + 0.02 for a, b in zip(line["psnr"], line["psnr"][1:], strict=False))
    fixed, trained = (read_checkpoint(tmp_path / name)["state_dict"] for name in ("fixed.pth.tar", "run/model.pth.tar"))
    names = {name for name, _ in model.named_parameters()}
    assert all(torch.equal(fixed[name], trained[name]) for name in names)

    codec = load_model(tmp_path / "run" / "model.pth.tar")
    picture = tensors[0][:, :201, :187]
    low, high = (len(encode(codec, picture, EncodeRequest(i)).data) for i in (0.0, 5.0))
    result = encode(codec, picture, EncodeRequest(bytes=(low + high) // 2))
    assert len(result.data) == pytest.approx((low + high) / 2, rel=0.02)
    assert decode(codec, result.data).shape == picture.shape
    refined = encode(codec, picture, EncodeRequest(2.0, refinement=RefinementSettings(5)))
    before, after = refined.refinement.before, refined.refinement.after
    lmbda = index_to_lambda(2.0)
    assert after.bpp + lmbda * after.distortion <= before.bpp + lmbda * before.distortion
