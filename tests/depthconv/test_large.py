"""Files of any size, in bands: the tests of tests/codec and tests/models, with DepthConv_VBR."""

import pytest
from torch import nn

from tests.codec.test_large import tall, test_symbols_in_parts_make_the_same_file  # noqa: F401
from tests.models import test_bands
from tests.models.test_bands import exact, test_bands_are_exact, test_every_layer_needs_its_halo  # noqa: F401


@pytest.fixture(autouse=True)
def chains_of_depthconv(monkeypatch):
    monkeypatch.setattr(test_bands, "chains", chains)


def chains(model) -> dict[str, tuple[nn.Sequential, int, int]]:
    height = test_bands.HEIGHT
    return {
        "g_a": (model.g_a, 3, height),
        "g_s": (model.g_s, model.M, height // 16),
        "h_a": (model.h_a, model.M, height // 4),
        "h_s": (model.h_s, model.config.hyper_channels, height // 16),
        "slice": (nn.Sequential(*model.slice_transforms[0], *model.slice_heads[0]), 32, height // 16),
        "context model": (model.context_model, 32 + 2 * 32, height // 16),
        "LAE": (nn.Sequential(model.modnet_ga.mask.latent_attn), model.M, height // 16),
    }
