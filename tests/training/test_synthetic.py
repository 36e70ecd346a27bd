"""Patches with parts that no photograph has."""

import numpy as np
import pytest
import skimage
import torch

from utils.training.patches import PatchDataset
from utils.training.synthetic import KINDS, add_synthetic


def photograph(side: int = 160) -> torch.Tensor:
    """uint8 `[3, side, side]`."""
    return torch.from_numpy(skimage.data.astronaut()[:side, 100 : 100 + side]).permute(2, 0, 1).contiguous()


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_makes_another_picture_of_any_size(kind):
    pixels = photograph().permute(1, 2, 0).numpy()
    for number, part in enumerate((pixels, pixels[:33, :47], pixels[:16, :31])):
        before = part.copy()
        made = kind(part, np.random.default_rng(number))
        assert made.dtype == np.uint8 and made.shape == part.shape
        assert number or (made != part).mean() > 0.02
        assert np.array_equal(part, before)
        assert np.array_equal(made, kind(part, np.random.default_rng(number)))


def test_a_patch_has_it_everywhere_or_in_a_rectangle():
    patch = photograph()
    shares = []  # of the patch, of the rectangle around what has changed
    for seed in range(60):
        changed = (add_synthetic(patch, np.random.default_rng(seed)) != patch).any(0)
        rows, cols = changed.any(1).nonzero(), changed.any(0).nonzero()
        shares.append(len(rows) and int((rows[-1] - rows[0] + 1) * (cols[-1] - cols[0] + 1)) / 160**2)
    assert sum(share > 0.95 for share in shares) >= 15
    assert sum(0.03 < share < 0.8 for share in shares) >= 15
    assert sum(share > 0 for share in shares) >= 55
    assert torch.equal(patch, photograph())


def test_a_data_set_has_the_share_of_them_that_is_asked_for():
    cache = {0: photograph(256)}

    def patches(share: float) -> torch.Tensor:
        dataset = PatchDataset(["a.png"], (128, 128), seed=0, cache=cache, synthetic_share=share)
        return torch.cat([dataset.of_size((128, 128), share)[i].patches for i in range(60)])

    plain = patches(0)
    changed = [(patches(share) != plain).flatten(1).any(1).float().mean() for share in (0, 0.3, 1)]
    assert changed[0] == 0 and 0.15 < changed[1] < 0.5 and changed[2] > 0.95
    assert torch.equal(patches(0.3), patches(0.3))
