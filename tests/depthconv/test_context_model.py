"""The context model of the first slice: order of coding, what its parts see, and the stage that trains it."""

import pytest
import torch

import train_vbr
from models import TCM_VBR, DepthConv_VBR
from models.coding.order import BLACK, FIRST_SLICE, WHITE, CodingOrder, Part
from models.state_dict import digest
from tests.conftest import TINY as TINY_TCM
from tests.depthconv.tiny import TINY, made, shake
from tests.training.runs import SIZES
from utils import cli
from utils.checkpoint import export_model, read_checkpoint

PARTS = len(FIRST_SLICE)


def test_black_and_white_are_the_places_of_a_checkerboard():
    y = torch.rand(2, 5, 6, 8)
    board = torch.zeros_like(y)
    black, white = (Part(1, 4, places) for places in (BLACK, WHITE))
    black.put(board, torch.ones_like(black.of(y)))
    rows, columns = torch.meshgrid(torch.arange(6), torch.arange(8), indexing="ij")
    assert torch.equal(board[:, 1:4], ((rows + columns) % 2 == 0).float().expand(2, 3, 6, 8))
    assert not board[:, [0, 4]].any()
    for part in (black, white):
        part.put(board, part.of(y))
        assert part.of(y).shape == (2, *part.shape(6, 8)) == (2, 3, 6, 4)
    assert torch.equal(board[:, 1:4], y[:, 1:4])
    assert torch.equal(black.of(y)[:, :, 3], y[:, 1:4, 1, 1::2])


@pytest.mark.parametrize("context_model", [False, True])
def test_the_order_of_coding_and_back(context_model):
    order = CodingOrder(M=64, num_slices=4, context_model=context_model)
    y = torch.rand(2, 64, 4, 6)
    parts = order.split(y)
    assert len(parts) == (PARTS + 3 if context_model else 4) and torch.equal(order.join(parts), y)
    flat = order.flatten(y)
    assert torch.equal(flat, torch.cat([part.flatten(1) for part in parts], 1))
    assert torch.equal(order.unflatten(flat, 4, 6), y)


def test_neighbors_of_white_places_are_coded_before_them():
    """In every group of channels; and of the black ones in the first group one kind comes before the other."""
    order = CodingOrder(M=64, num_slices=4, context_model=True)
    when = torch.empty(1, 16, 8, 8)
    for number, part in enumerate(order.first_slice):
        part.put(when, torch.full((1, *part.shape(8, 8)), float(number)))
    when = when[0]
    white = torch.tensor([[(row + column) % 2 == 1 for column in range(8)] for row in range(8)])
    for axis in (1, 2):  # the board continues at its edges
        for shift in (-1, 1):
            assert (when.roll(shift, axis)[:, white] < when[:, white]).all()
    assert (when[:4, 1::2, 1::2] > when[:4, 0::2, 0::2]).all()
    assert (when[1:].amin((1, 2)) >= when[:-1].amin((1, 2))).all()  # channels in their order


def test_every_part_sees_those_before_it_and_no_others(image):
    """μ and σ of every part, where one symbol of a part is changed."""
    tiny = made()

    def predicted(changed: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        seen = []

        def coder(mu: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
            symbols = torch.zeros_like(mu)
            if len(seen) == changed:
                symbols[0, 0, 2, 2] = 3.0
            seen.append((mu, sigma))
            return mu + symbols

        tiny.run_slices(z_hat, coder)
        return seen

    with torch.no_grad():
        z_hat = tiny.h_a(tiny.analyze(image, torch.tensor([2.0]))[0]).round()
        plain = predicted(-1)
        assert len(plain) == PARTS + 1  # and the other slice
        for changed in range(PARTS):
            for number, values in enumerate(predicted(changed)):
                equal = [torch.equal(one, other) for one, other in zip(plain[number], values, strict=True)]
                assert equal == [number <= changed] * 2


def test_the_network_is_told_which_symbols_are_known(image, monkeypatch):
    tiny = made()
    seen = []
    original = type(tiny).predict_again

    def watched(self, part, context, symbols, known, mu, sigma):
        seen.append((symbols.clone(), known.clone()))
        return original(self, part, context, symbols=symbols, known=known, mu=mu, sigma=sigma)

    monkeypatch.setattr(type(tiny), "predict_again", watched)
    with torch.no_grad():
        y = tiny.analyze(image, torch.tensor([4.0]))[0]
        coded = tiny.quantize(y, tiny.h_a(y)).y
        first = coded[:, : tiny.M // tiny.num_slices]
        expected = torch.zeros(1, *first.shape[1:])
        assert len(seen) == PARTS - 1 and first.unique().numel() > 3
        for part, (symbols, known) in zip(tiny.order.first_slice, seen, strict=False):
            part.put(expected, torch.ones(1, *part.shape(*first.shape[2:])))
            assert torch.equal(known, expected) and torch.equal(symbols, first * expected)
    nothing = torch.zeros(1, 32, 4, 4)
    mu = sigma = part.of(nothing)
    with torch.no_grad():
        unknown, zeros = (original(tiny, part, nothing, nothing, known, mu, sigma) for known in (nothing, nothing + 1))
    assert not torch.equal(unknown[0], zeros[0])


def test_gradients_are_those_of_a_walk_without_writing_in_place():
    """Those of the latent and of the context model, by every part put together anew."""
    tiny = made().requires_grad_(True)
    size = tiny.M // tiny.num_slices
    parts = tiny.order.first_slice

    def places(part: Part) -> torch.Tensor:
        mask = torch.zeros(1, size, 4, 4)
        part.put(mask, torch.ones(1, *part.shape(4, 4)))
        return mask

    def loss(values: torch.Tensor) -> torch.Tensor:
        return (values * torch.linspace(-1, 1, values.numel()).view(values.shape)).sum()

    def gradients(total: torch.Tensor) -> list[torch.Tensor]:
        return torch.autograd.grad(total, [y, *tiny.context_model.parameters(), tiny.slice_heads[0][0].weight])

    generator = torch.Generator().manual_seed(0)
    y = (3 * torch.randn(1, size, 4, 4, generator=generator)).requires_grad_(True)
    z_hat = torch.randn(1, 32, 1, 1, generator=generator).round()
    waiting = list(parts)
    spread = []

    def coder(mu: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        values = waiting.pop(0).of(y)
        spread.append((mu, sigma))
        return torch.round(values - mu).detach() + mu.detach() + values - values.detach()

    tiny.train()
    hyper = tiny.hyper_synthesis(z_hat)
    y_hat, _ = tiny._run_first_slice(hyper, coder)
    found = gradients(loss(y_hat) + sum(loss(mu) + loss(sigma) for mu, sigma in spread))

    mu, sigma, context = tiny.predict(0, hyper, [], corrected=True)
    symbols, known, y_hat, total = 0.0, torch.zeros_like(mu), 0.0, 0.0
    for number, part in enumerate(parts):
        mask = places(part)
        now = mu, sigma
        if number:
            change = tiny.context_model(torch.cat((context, symbols, known), 1))
            bounded = tiny.gaussian_conditional.lower_bound_scale(sigma)
            now = mu + change[:, :size], bounded * change[:, size:].clamp(-3, 3).exp()
        values = torch.round(y - now[0]).detach() + now[0].detach() + y - y.detach()
        total = total + loss(part.of(now[0])) + loss(part.of(now[1]))
        exact = torch.round(y - now[0]).detach() + y - y.detach()
        symbols = symbols + mask * exact
        known = known + mask
        y_hat = y_hat + mask * values
    for one, other in zip(found, gradients(total + loss(y_hat)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
        assert one.abs().max() > 0


@pytest.mark.parametrize("sizes", [{}, {"num_slices": 4}, {"context_model": 0}])
def test_files_decode(sizes, image):
    torch.manual_seed(0)
    tiny = shake(DepthConv_VBR(**TINY | sizes)).eval()
    tiny.update(force=True)
    coded = tiny.compress(image, 3.0, portable=True)
    with torch.no_grad():
        expected = tiny(image, 3.0)
    assert torch.equal(tiny.decompress(**coded)["x_hat"], expected["x_hat"].clamp(0, 1))
    bits = -sum(float(part.log2().sum()) for part in expected["likelihoods"].values())
    assert 8 * sum(len(stream) for (stream,) in coded["strings"]) == pytest.approx(bits, rel=0.03)


def test_networks_without_it_have_the_fingerprint_that_they_had_before_it_was_there():
    model = DepthConv_VBR(**{**TINY, "context_model": 0}).eval()
    model.update(force=True)
    sizes = {name: value for name, value in TINY.items() if name != "context_model"}
    assert model.fingerprint == digest(model.state_dict(), repr(sizes).encode())
    other = made()
    assert other.fingerprint == digest(other.state_dict(), repr(TINY).encode())


def test_new_networks_change_nothing(image):
    tiny = made()
    state = tiny.state_dict()
    old = {name: value for name, value in state.items() if not name.startswith("context_model.")}
    plain = DepthConv_VBR(**{**TINY, "context_model": 0}).eval()
    plain.load_state_dict(old)
    new = DepthConv_VBR(**TINY).eval()
    new.load_state_dict({**new.state_dict(), **old})
    with torch.no_grad():
        expected, found, trained = (model(image, 2.0) for model in (plain, new, tiny))
    assert torch.allclose(found["likelihoods"]["y"], expected["likelihoods"]["y"], rtol=1e-4, atol=1e-9)
    assert torch.allclose(found["x_hat"], expected["x_hat"], atol=1e-5)
    assert not torch.allclose(trained["likelihoods"]["y"], expected["likelihoods"]["y"], rtol=1e-2, atol=1e-9)


def test_sizes_without_and_with_it():
    for context_model in (0, 1):
        model = DepthConv_VBR(**{**TINY, "context_model": context_model})
        assert type(model).from_state_dict(model.state_dict()).config == model.config
    for wrong in (-1, 2, 0.5, True):
        with pytest.raises(ValueError, match="context_model"):
            DepthConv_VBR(**{**TINY, "context_model": wrong})
    for sizes in ({"num_slices": 1}, {"num_slices": 32}):  # 32 slices have 2 channels each
        with pytest.raises(ValueError, match="a context_model wants two slices or more, of a multiple of 4 channels"):
            DepthConv_VBR(**{**TINY, **sizes})


def test_a_stage_trains_it_alone_and_weights_without_it_get_it(photos, tmp_path):
    old = {name: value for name, value in made().state_dict().items() if not name.startswith("context_model.")}
    plain = DepthConv_VBR(**{**TINY, "context_model": 0}).eval()
    plain.load_state_dict(old)
    export_model(tmp_path / "plain.pth.tar", plain, [])
    old = read_checkpoint(tmp_path / "plain.pth.tar")["state_dict"]
    stage = ["-d", str(photos), *SIZES, "--stage", "context", "--keep-latents", "4", "-lr", "1e-3", "--ema", "0.5"]
    start = ["--checkpoint", str(tmp_path / "plain.pth.tar"), "--max-steps", "12", "--save_path", str(tmp_path / "run")]
    train_vbr.main([*stage, *start])
    trained = read_checkpoint(tmp_path / "run" / "model.pth.tar")
    assert trained["arguments"] == TINY and trained["training"][-1]["stage"] == "context"
    learned = [name for name, _ in plain.named_parameters()]
    assert len(learned) > 100 and all(torch.equal(trained["state_dict"][name], old[name]) for name in learned)
    fresh = DepthConv_VBR(**TINY).state_dict()
    last = "context_model.2.weight"
    assert fresh[last].eq(0).all() and not trained["state_dict"][last].eq(0).all()


def test_codecs_that_have_none_are_refused_by_the_stage(photos, tmp_path):
    stage = ["-d", str(photos), *SIZES, "--stage", "context", "--keep-latents", "4", "--max-steps", "1"]
    with pytest.raises(cli.UserError, match="needs a --checkpoint"):
        train_vbr.main(stage)
    one_slice = DepthConv_VBR(**{**TINY, "num_slices": 1, "context_model": 0})
    causes = "a TCM_VBR can have no context model", "a context_model wants two slices"
    for model, cause in zip((TCM_VBR(**TINY_TCM), one_slice), causes, strict=True):
        weights = tmp_path / f"{type(model).__name__}.pth.tar"
        export_model(weights, model, [])
        with pytest.raises(cli.UserError, match=f"{weights.name}: {cause}"):
            train_vbr.main([*stage, "--checkpoint", str(weights)])
    weights = str(tmp_path / "DepthConv_VBR.pth.tar")
    run = ["-d", str(photos), *SIZES, "--max-steps", "1", "--save_path", str(tmp_path / "run")]
    train_vbr.main([*run, "--checkpoint", weights])
    with pytest.raises(cli.UserError, match="run: holds a run of another stage, of a network without a context model"):
        train_vbr.main([*stage, "--save_path", str(tmp_path / "run"), "--resume"])
