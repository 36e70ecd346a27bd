"""Layers in bands of rows give what they give at once."""

import copy
import platform
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from torch import nn

from models import TCM_VBR, codec
from models.coding.portable import EPSILON
from models.large import bands, memory
from models.large.bands import (
    Footprint,
    band_height,
    bands_of,
    footprint,
    gather,
    in_bands,
    latent_height,
    scaled_height,
)
from tests.conftest import BLOCKS_IN_EVERY_STAGE, made

HEIGHT = 640


@pytest.fixture(scope="module")
def made_tiny() -> TCM_VBR:
    """With blocks in every stage, and so in the hyper-synthesis."""
    return made(**BLOCKS_IN_EVERY_STAGE)


@pytest.fixture(scope="module")
def exact(made_tiny):
    """`tiny` in float64, where what remains is no rounding."""
    model = copy.deepcopy(made_tiny).double()
    for layer in model.g_a:
        if isinstance(layer, nn.Conv2d):
            layer.__class__ = nn.Conv2d  # which stays in float64
    return model


def chains(model) -> dict[str, tuple[nn.Sequential, int, int]]:
    """Chains of layers, each with the channels and the rows of its input."""
    return {
        "g_a": (model.g_a, 3, HEIGHT),
        "g_s": (model.g_s, model.M, HEIGHT // 16),
        "h_a": (model.h_a, model.M, HEIGHT // 4),
        "h_s": (model.h_mean_s, model.config.hyper_channels, HEIGHT // 16),
        "slice": (nn.Sequential(*model.atten_mean[0], *model.cc_mean_transforms[0]), model.M, HEIGHT // 16),
        "LAE": (nn.Sequential(model.modnet_ga.mask.latent_attn), model.M, HEIGHT // 16),
    }


def noise(channels: int, height: int) -> torch.Tensor:
    size = 1, channels, height, 128 if channels == 3 else 16
    return torch.randn(size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", ["g_a", "g_s", "h_a", "h_s", "slice", "LAE"])
@pytest.mark.parametrize("rows", [8, 24])
@torch.no_grad()
def test_bands_are_exact(exact, name, rows):
    layers, channels, height = chains(exact)[name]
    x = noise(channels, height)
    whole, found = layers(x), list(in_bands(layers, bands_of([x], rows), height))
    assert len(found) >= 2 and whole.shape[2] == scaled_height(layers, height)
    assert torch.allclose(gather(found, whole.shape[2]), whole, rtol=0, atol=1e-9 * float(whole.abs().max()))
    assert max(band.shape[2] for band in found) <= 2 * scaled_height(layers, 48)  # none is much larger than the others


@pytest.mark.parametrize("name", ["g_a", "g_s", "h_s", "slice", "LAE"])
@torch.no_grad()
def test_every_layer_needs_its_halo(exact, name, monkeypatch):
    """Else the test above would pass with layers that see nothing of each other."""
    layers, channels, height = chains(exact)[name]
    x = noise(channels, height)
    whole, true = layers(x), bands.footprint
    for kind in {type(layer) for layer in layers if true_halo(layer, true)}:
        def without(layer, kind=kind):
            found = true(layer)
            return Footprint(0, found.align, found.scale) if isinstance(layer, kind) else found

        monkeypatch.setattr(bands, "footprint", without)
        found = gather(in_bands(layers, bands_of([x], 16), height), whole.shape[2])
        assert not torch.allclose(found, whole, rtol=0, atol=1e-6)


def true_halo(layer, true) -> int:
    return 0 if isinstance(layer, nn.Sequential) else true(layer).halo


def test_a_layer_of_another_kind_is_refused():
    with pytest.raises(TypeError, match="Softmax"):
        footprint(nn.Softmax())


def test_no_layer_keeps_what_the_next_ones_have(exact):
    """A picture that is computed at once takes no more memory than by the layers themselves."""
    alive, watches = [], []

    class Watched(nn.GELU):
        def forward(self, x):
            alive.append(sum(watch() is not None for watch in watches))
            out = super().forward(x)
            watches.append(weakref.ref(out))
            return out

    with torch.no_grad():
        gather(in_bands([Watched() for _ in range(6)], iter([torch.ones(1, 2, 8, 8)]), 8), 8)
    assert max(alive) <= 1


def test_rows_of_a_band(monkeypatch):
    cpu = torch.device("cpu")
    assert band_height(2048, 1024, 64, cpu) == 1024  # up to two megapixels at once
    assert band_height(6016, 4096, 64, cpu) == 256 and band_height(2048, 1408, 64, cpu) == 512
    assert band_height(65536, 4096, 64, cpu) == 128 and band_height(128, 65536, 64, cpu) == 8192
    # Of the 268 megapixels in docs/performance.md a band has four, and of wider pictures no more.
    assert band_height(16384, 16384, 64, cpu) == 256 and band_height(32768, 8192, 64, cpu) == 128
    assert all(latent_height(width) % 8 == 0 for width in (1, 8, 1000, 4096))
    assert latent_height(768 // 16) >= 512 // 16 and latent_height(6000 // 16) < 4000 // 16  # Kodak's whole, 24 MP not
    assert latent_height(4096 // 16) >= 4096 // 16  # whole too: a slice of 64 channels of theirs has 16 MiB
    gpu, gib = torch.device("cuda"), 2**30
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 2 * gib)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: gib)
    for free, rows in ((60, 4096), (6, 512), (0.1, 128)):  # there is room for all, for some, and for little
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (int(free * gib), 80 * gib))
        assert band_height(6016, 4096, 64, gpu) == rows


@torch.no_grad()
def test_the_hyper_synthesis_is_kept_up_to_67_megapixels(tiny):
    """As docs/performance.md says; beyond, it is computed anew for every slice."""
    network = nn.Sequential(nn.PixelShuffle(4))
    for height, width, kept in ((8192, 8192, True), (8192, 8192 + 128, False)):
        found = tiny.synthesize_hyper(network, torch.zeros(1, 16, height // 64, width // 64))
        assert tuple(found.shape[2:]) == (height // 16, width // 16) and isinstance(found, torch.Tensor) == kept


@pytest.mark.parametrize("recomputed", [False, True])
@torch.no_grad()
def test_slices_in_bands_steer_the_same_decoder(tiny, monkeypatch, recomputed):
    y = torch.randn(1, tiny.M, 48, 16, generator=torch.Generator().manual_seed(0)) * 3
    z = tiny.h_a(y)
    whole = tiny.quantize(y, z, complete=True)
    seen = sigma_of(tiny, whole)
    monkeypatch.setattr(bands, "LATENTS", 16 * 16)
    monkeypatch.setattr(codec, "KEPT", 16 * 16 if recomputed else 2**18)
    assert latent_height(16) == 16
    assert isinstance(tiny.synthesize_hyper(tiny.h_mean_s, z), bands.Recomputed) == recomputed
    parts = tiny.quantize(y, z, complete=True)
    for one, other in zip(sigma_of(tiny, whole), seen, strict=True):
        assert ((one - other) / other).abs().max() < EPSILON
    assert torch.equal(parts.y, whole.y) and torch.allclose(parts.y_hat, whole.y_hat, atol=1e-4)
    coded = tiny.encode_symbols(whole)
    decoded = tiny.decode_latents(coded["strings"], coded["shape"], coded["side_info"])
    assert torch.allclose(decoded, whole.y_hat, atol=1e-4)


def sigma_of(model, quantized) -> list[torch.Tensor]:
    seen, slices = [], model.order.split(quantized.y)

    def replay(mu, sigma):
        seen.append(model.gaussian_conditional.lower_bound_scale(sigma))
        return slices.pop(0) + mu

    model.run_slices(quantized.z + model.medians, replay)
    return seen


@pytest.mark.parametrize("M", [192, 320])  # of the shipped weights
def test_the_latent_of_24_megapixels_has_its_own_mapping_and_that_of_a_small_picture_has_not(M, monkeypatch):
    """Else the heap would keep its pages; and to map what comes and goes often would take time."""
    mapped, make = [], memory.mmap.mmap
    monkeypatch.setattr(memory.mmap, "mmap", lambda *args: mapped.append(args) or make(*args))
    for height, width, own in ((4096, 6016, True), (2176, 3840, False)):
        mapped.clear()
        found = memory.large_empty((1, M, height // 16, width // 16), torch.float32, torch.device("cpu"))
        assert found.shape[1:] == (M, height // 16, width // 16) and bool(mapped) == own


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="malloc of glibc")
@pytest.mark.parametrize("memory_format", ["contiguous_format", "channels_last"])
def test_a_large_tensor_is_whole_and_leaves_nothing_behind(memory_format):
    """The check runs in a new process, because it sets the allocator to keep freed memory, which cannot be undone."""
    command = [sys.executable, "-c", LEAVES_NOTHING, memory_format]
    assert subprocess.run(command, cwd=Path(__file__).parents[2], check=False, timeout=300).returncode == 0


LEAVES_NOTHING = """
import os, sys, torch
from models.large.bands import gather, bands_of
from models.large.memory import LARGE, give_back_freed_memory
from utils.device import keep_freed_memory

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

keep_freed_memory()  # as the scripts do
memory_format = getattr(torch, sys.argv[1])
x = torch.rand(1, LARGE * 2 // (64 * 128 * 4), 64, 128).contiguous(memory_format=memory_format)
give_back_freed_memory()  # as `gather` does at its end
before = resident()
found = gather(bands_of([x], 16), 64)
assert torch.equal(found, x) and found.stride() == x.stride()
assert resident() > before + 1.9 * LARGE
part = found[:, :1]
del found
assert torch.equal(part, x[:, :1])
del part
assert resident() < before + 0.1 * LARGE
"""
