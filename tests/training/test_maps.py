import pytest
import torch

from models.lambdas import index_to_lambda
from utils.codec.quality_map import pixel_weights
from utils.metrics import rate_distortion
from utils.training.maps import draw_maps
from utils.training.objectives import Objective
from utils.training.schedule import Settings

UNIFORM = torch.rand(400, generator=torch.Generator().manual_seed(0))


def test_a_share_of_the_patches_has_maps():
    places = draw_maps(5 * UNIFORM, UNIFORM, 256, 384, 0.2)
    assert places.shape == (400, 1, 16, 24) and places.min() >= 0 and places.max() <= 5
    varied = places.flatten(1).amax(1) != places.flatten(1).amin(1)
    assert 0.12 < varied.float().mean() < 0.25  # a block may cover all of a patch
    assert torch.equal(places[~varied].flatten(1)[:, 0], 5 * UNIFORM[~varied])
    assert torch.equal(places[:7], draw_maps(5 * UNIFORM[:7], UNIFORM[:7], 256, 384, 0.2))  # whatever the batch
    cells = places.view(400, 4, 4, 6, 4)
    assert (cells == cells[:, :, :1, :, :1]).all()
    assert (draw_maps(5 * UNIFORM, UNIFORM, 256, 256, 0.0) == 5 * UNIFORM.view(-1, 1, 1, 1)).all()


def test_every_place_is_weighed_by_its_lambda():
    places = torch.full((1, 1, 8, 8), 1.0)
    places[..., 4:] = 4.0
    weights = pixel_weights(places, index_to_lambda(torch.tensor([1.0])), "mse")
    x, x_hat = torch.zeros(1, 3, 128, 128), torch.zeros(1, 3, 128, 128)
    x_hat[..., :64], x_hat[..., 64:] = 2 / 255, 1 / 255
    out = {"x_hat": x_hat, "likelihoods": {"y": torch.ones(1, 1, 1, 1), "z": torch.ones(1, 1, 1, 1)}}
    losses = rate_distortion(out, x, index_to_lambda(torch.tensor([1.0])), "mse", weights)
    expected = (index_to_lambda(1.0) * 4 + index_to_lambda(4.0) * 1) / 2
    assert abs(float(losses["loss"]) / expected - 1) < 1e-5
    assert abs(float(losses["mse"]) - 2.5) < 1e-5


def test_training_with_maps_reaches_the_weights(tiny):
    objective = Objective(tiny, settings=Settings(map_share=1.0))
    objective.train()
    y, z = ((torch.rand(2, *shape) - 0.5) for shape in tiny.noise_shapes(128, 128))
    out = objective(torch.rand(2, 3, 128, 128), torch.tensor([0.3, 0.8]), (y, z))
    out["total"].backward()
    assert out["total"].isfinite()
    assert tiny.modnet_ga.mask.lmd_map.fc_layers[0].weight.grad.abs().sum() > 0


def test_maps_are_of_mse_alone(tiny):
    tiny.metric = "ms-ssim"
    with pytest.raises(ValueError, match="the loss of ms-ssim has none"):
        Objective(tiny, Settings(map_share=0.2))
