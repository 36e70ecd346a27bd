"""The first slice in two passes (`checkerboard`): networks, order of coding, and the stage that trains them."""

import pytest
import torch

import train_vbr
from models import TCM_VBR, DepthConv_VBR
from models.coding.order import halves, whole
from models.state_dict import digest
from tests.conftest import TINY as TINY_TCM
from tests.depthconv.tiny import TINY, made, shake
from tests.training.runs import SIZES
from utils import cli
from utils.checkpoint import export_model, read_checkpoint


def test_halves_are_the_places_of_a_checkerboard():
    y = torch.rand(2, 3, 6, 8)
    first, second = halves(y)
    assert torch.equal(whole(first, second), y)
    black = whole(torch.ones_like(first), torch.zeros_like(second))[0, 0]
    rows, columns = torch.meshgrid(torch.arange(6), torch.arange(8), indexing="ij")
    assert torch.equal(black, ((rows + columns) % 2 == 0).float())
    assert torch.equal(first[:, :, 1], y[:, :, 1, 1::2])  # in C, H, W order


@pytest.mark.parametrize("checkerboard", [0, 1, 2])
def test_the_order_of_coding_and_back(checkerboard):
    model = DepthConv_VBR(**{**TINY, "num_slices": 4, "checkerboard": checkerboard})
    y = torch.rand(2, model.M, 4, 6)
    parts = model.order.split(y)
    assert len(parts) == 4 + checkerboard and torch.equal(model.order.join(parts), y)
    flat = model.order.flatten(y)
    assert torch.equal(flat, torch.cat([part.flatten(1) for part in parts], 1))
    assert torch.equal(model.order.unflatten(flat, 4, 6), y)


def test_the_second_half_sees_the_first_and_not_the_other_way_round(image):
    """μ and σ of every part, where symbols of one place are changed."""
    tiny = made()

    def predicted(changed: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        seen = []

        def coder(mu: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
            symbols = torch.zeros_like(mu)
            if len(seen) == changed:
                symbols[0, 0, 4, 4] = 3.0
            seen.append((mu, sigma))
            return mu + symbols

        tiny.run_slices(z_hat, coder)
        return seen

    with torch.no_grad():
        z_hat = tiny.h_a(tiny.analyze(image, torch.tensor([2.0]))[0]).round()
        plain, first, second = predicted(-1), predicted(0), predicted(1)
    assert len(plain) == 3  # two halves, and the other slice
    for changed, same in ((first, 1), (second, 2)):
        for number in range(3):
            equal = [torch.equal(one, other) for one, other in zip(plain[number], changed[number], strict=True)]
            assert equal == [number < same] * 2


@pytest.mark.parametrize("checkerboard", [0, 2])
def test_files_with_as_many_slices_in_halves_decode(checkerboard, image):
    torch.manual_seed(0)
    model = shake(DepthConv_VBR(**{**TINY, "num_slices": 4, "checkerboard": checkerboard})).eval()
    model.update(force=True)
    coded = model.compress(image, 3.0, portable=True)
    with torch.no_grad():
        expected = model(image, 3.0)
    assert torch.equal(model.decompress(**coded)["x_hat"], expected["x_hat"].clamp(0, 1))
    bits = -sum(float(part.log2().sum()) for part in expected["likelihoods"].values())
    assert 8 * sum(len(stream) for (stream,) in coded["strings"]) == pytest.approx(bits, rel=0.03)


def test_networks_without_it_have_the_fingerprint_that_they_had_before_it_was_there():
    model = DepthConv_VBR(**{**TINY, "checkerboard": 0}).eval()
    model.update(force=True)
    sizes = {name: value for name, value in TINY.items() if name != "checkerboard"}
    assert model.fingerprint == digest(model.state_dict(), repr(sizes).encode())
    other = made()
    assert other.fingerprint == digest(other.state_dict(), repr(TINY).encode())


def test_new_networks_change_nothing(image):
    tiny = made()
    state = tiny.state_dict()
    old = {name: value for name, value in state.items() if not name.startswith("checkerboard_transforms.")}
    plain = DepthConv_VBR(**{**TINY, "checkerboard": 0}).eval()
    plain.load_state_dict(old)
    new = DepthConv_VBR(**TINY).eval()
    new.load_state_dict({**new.state_dict(), **old})
    with torch.no_grad():
        expected, found, trained = (model(image, 2.0) for model in (plain, new, tiny))
    assert torch.allclose(found["likelihoods"]["y"], expected["likelihoods"]["y"], rtol=1e-4, atol=1e-9)
    assert torch.allclose(found["x_hat"], expected["x_hat"], atol=1e-5)
    assert not torch.allclose(trained["likelihoods"]["y"], expected["likelihoods"]["y"], rtol=1e-2, atol=1e-9)


def test_sizes_without_and_with_it():
    for checkerboard in (0, 1):
        model = DepthConv_VBR(**{**TINY, "checkerboard": checkerboard})
        assert type(model).from_state_dict(model.state_dict()).config == model.config
    for wrong in (-1, 2, 0.5):
        with pytest.raises(ValueError, match="checkerboard"):
            DepthConv_VBR(**{**TINY, "checkerboard": wrong})


def test_a_stage_trains_it_alone_and_weights_without_it_get_it(photos, tmp_path):
    old = {name: value for name, value in made().state_dict().items() if not name.startswith("checkerboard_")}
    plain = DepthConv_VBR(**{**TINY, "checkerboard": 0}).eval()
    plain.load_state_dict(old)
    export_model(tmp_path / "plain.pth.tar", plain, [])
    old = read_checkpoint(tmp_path / "plain.pth.tar")["state_dict"]
    stage = ["-d", str(photos), *SIZES, "--stage", "checkerboard", "--keep-latents", "4", "-lr", "1e-3", "--ema", "0.5"]
    start = ["--checkpoint", str(tmp_path / "plain.pth.tar"), "--max-steps", "12", "--save_path", str(tmp_path / "run")]
    train_vbr.main([*stage, *start])
    trained = read_checkpoint(tmp_path / "run" / "model.pth.tar")
    assert trained["arguments"] == TINY and trained["training"][-1]["stage"] == "checkerboard"
    learned = [name for name, _ in plain.named_parameters()]
    assert len(learned) > 100 and all(torch.equal(trained["state_dict"][name], old[name]) for name in learned)
    fresh = DepthConv_VBR(**TINY).state_dict()
    last = "checkerboard_transforms.0.2.weight"
    assert fresh[last].eq(0).all() and not trained["state_dict"][last].eq(0).all()


def test_codecs_without_a_second_pass_are_refused_by_the_stage(photos, tmp_path):
    stage = ["-d", str(photos), *SIZES, "--stage", "checkerboard", "--keep-latents", "4", "--max-steps", "1"]
    with pytest.raises(cli.UserError, match="needs a --checkpoint"):
        train_vbr.main(stage)
    one_slice = DepthConv_VBR(**{**TINY, "num_slices": 1, "checkerboard": 0})
    for model in (TCM_VBR(**TINY_TCM), one_slice):
        weights = tmp_path / f"{type(model).__name__}.pth.tar"
        export_model(weights, model, [])
        with pytest.raises(cli.UserError, match=f"{weights.name}: such a {type(model).__name__} codes no slice in two"):
            train_vbr.main([*stage, "--checkpoint", str(weights)])
    weights = str(tmp_path / "DepthConv_VBR.pth.tar")
    run = ["-d", str(photos), *SIZES, "--max-steps", "1", "--save_path", str(tmp_path / "run")]
    train_vbr.main([*run, "--checkpoint", weights])
    with pytest.raises(cli.UserError, match="run: holds a run of another stage, of a network without a second pass"):
        train_vbr.main([*stage, "--save_path", str(tmp_path / "run"), "--resume"])
