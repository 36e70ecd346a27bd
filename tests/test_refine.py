"""DLM: latents of one picture refined by gradient; the decoder's weights untouched."""

import math

import pytest
import torch

from utils.evaluation import decode
from utils.images import to_uint8
from utils.losses import bits
from utils.metrics import mse
from utils.online import produce
from utils.orders import Order, Refinement
from utils.rate_control import Picture, Unreachable
from utils.refine import SURROGATES, Hold, Step, gumbel_round, soft_round


@pytest.fixture(scope="module")
def picture() -> torch.Tensor:
    """uint8 `[3, 100, 120]`."""
    small = torch.rand(1, 3, 9, 15, generator=torch.Generator().manual_seed(4))
    return to_uint8(torch.nn.functional.interpolate(small, (100, 120), mode="bicubic").clamp(0, 1)[0])


def test_surrogates_of_rounding():
    x = torch.linspace(-2.4, 2.4, 97, requires_grad=True)
    assert torch.allclose(soft_round(x, 50.0), x, atol=1e-3)
    away = (x - x.floor() - 0.5).abs() > 0.05
    assert torch.allclose(soft_round(x, 0.01)[away], x.round()[away], atol=1e-3)
    torch.manual_seed(0)
    for surrogate in SURROGATES.values():
        value = surrogate(x, 0.4)
        assert (value - x).abs().max() <= 1
        (gradient,) = torch.autograd.grad(value.sum(), x)
        assert gradient.isfinite().all() and gradient.abs().sum() > 0
    cold = torch.stack([gumbel_round(x.detach(), 0.05) for _ in range(20)])
    assert ((cold - x.detach().floor()).round() - (cold - x.detach().floor())).abs().mean() < 0.02


def test_every_latent_has_a_gradient_of_its_own_rate(tiny, image):
    """In evaluation mode rounding had zeroed it, for z and for the last slice (SPEC 5)."""
    y, z = tiny.analyze(image, torch.tensor([1.0]))[0].detach(), None
    z = tiny.h_a(y).detach().requires_grad_()
    y.requires_grad_()
    for name, surrogate in SURROGATES.items():
        out = tiny.forward_fromlatent(y, z, 1.0, tabled=True, surrogate=lambda r, s=surrogate: s(r, 0.5))
        last = out["likelihoods"]["y"].chunk(tiny.num_slices, 1)[-1]
        of_y, of_z = torch.autograd.grad(bits(last).sum() + bits(out["likelihoods"]["z"]).sum(), (y, z))
        assert of_y.chunk(tiny.num_slices, 1)[-1].abs().sum() > 0, name
        assert of_z.abs().sum() > 0, name


def test_the_surrogate_changes_neither_the_picture_nor_the_bits_of_a_file(tiny, image):
    with torch.no_grad():
        plain = tiny(image, 1.0, tabled=True)
        y = plain["latent"]
        out = tiny.forward_fromlatent(y, tiny.h_a(y), 1.0, tabled=True, surrogate=lambda r: r + 0.3)
    assert torch.equal(out["x_hat"], plain["x_hat"])
    for name, likelihoods in plain["likelihoods"].items():
        assert torch.allclose(out["coded_likelihoods"][name], likelihoods)
        assert not torch.allclose(out["likelihoods"][name], likelihoods)


@pytest.mark.parametrize("method", SURROGATES)
def test_refinement_is_never_worse_and_what_it_says(varied, picture, method):
    outcome = produce(varied, "a", picture, Order(3.0, refinement=Refinement(6, method)))
    assert outcome.result.loss <= outcome.plain.loss
    assert len(outcome.steps) <= 7 and outcome.steps[0].number == 0
    assert outcome.steps[0].bpp == pytest.approx(outcome.plain.bpp, rel=1e-6)
    decoded = decode(varied, outcome.data)
    assert torch.equal(decoded, outcome.decoded)
    assert outcome.result.bpp == 8 * len(outcome.data) / picture[0].numel()
    # Latent and loss belong together: what the chosen step claims is what its file has.
    claimed = outcome.steps[outcome.chosen]
    assert outcome.result.bpp == pytest.approx(claimed.bpp, rel=2e-3)
    assert mse(picture, decoded) == pytest.approx(claimed.mse, rel=0.02)
    assert outcome.chosen > 0 and outcome.loss_change < 0


def test_steps_that_make_it_worse_leave_the_plain_file(varied, picture):
    order = Order(3.0, refinement=Refinement(3, "ste", learning_rate=50.0))
    outcome = produce(varied, "a", picture, order)
    assert outcome.chosen == 0 and outcome.result == outcome.plain
    assert outcome.data == produce(varied, "a", picture, Order(3.0)).data


def test_a_seed_repeats_and_weights_stay(varied, picture):
    before = {name: t.clone() for name, t in varied.state_dict().items()}
    state = torch.get_rng_state()
    files = [produce(varied, "a", picture, Order(1.25, refinement=Refinement(3))).data for _ in range(2)]
    assert files[0] == files[1]
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[name], t) for name, t in varied.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in varied.parameters()) and not varied.checkpointing


def test_checkpointing_gives_the_same_gradients(tiny, image):
    with torch.no_grad():
        y, _ = tiny.analyze(image, torch.tensor([1.0]))
        z = tiny.h_a(y)
    gradients = []
    for tiny.checkpointing in (False, True):
        y, z = y.detach().requires_grad_(), z.detach().requires_grad_()
        out = tiny.forward_fromlatent(y, z, 1.0, tabled=True, surrogate=lambda r: r)
        loss = out["x_hat"].square().mean() + bits(out["likelihoods"]["y"]).sum()
        gradients.append(torch.autograd.grad(loss, (y, z)))
    for one, other in zip(*gradients, strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-6 * float(one.abs().max()))


@pytest.mark.parametrize("steps", [2, 12])
def test_a_target_is_kept(varied, picture, steps):
    wanted = round(Picture(varied, picture).quantise(2.0).bits / 8)
    outcome = produce(varied, "a", picture, Order(bytes=wanted, refinement=Refinement(steps)))
    assert abs(outcome.error) <= 0.005 and not outcome.note
    assert outcome.chosen > 0 and outcome.result.psnr > outcome.plain.psnr
    outcome = produce(varied, "a", picture, Order(max_bytes=wanted, refinement=Refinement(steps)))
    assert len(outcome.data) <= wanted and -0.01 < outcome.error <= 0
    assert outcome.result.psnr >= outcome.plain.psnr


def test_an_index_may_keep_its_rate(varied, picture):
    outcome = produce(varied, "a", picture, Order(1.5, refinement=Refinement(8), keep_rate=True))
    assert abs(outcome.result.bpp / outcome.plain.bpp - 1) <= 0.005
    assert outcome.result.psnr > outcome.plain.psnr and outcome.error is not None


def test_targets_out_of_reach_still_give_a_file(varied, picture):
    smallest, largest = (Picture(varied, picture).quantise(index).bits / 8 for index in (0.0, 5.0))
    many = Refinement(110, "ste")
    outcome = produce(varied, "a", picture, Order(bytes=round(smallest / 3), refinement=many))
    assert outcome.error > 1 and (outcome.note.startswith("out of reach: the smallest") or outcome.index > 0)
    loose = Order(max_bytes=round(3 * largest), refinement=Refinement(3))
    outcome = produce(varied, "a", picture, loose)
    assert outcome.error is None and outcome.note.startswith("above the largest file")
    assert outcome.result.psnr > outcome.plain.psnr
    with pytest.raises(Unreachable, match="smallest file"):
        produce(varied, "a", picture, Order(max_bytes=60, refinement=Refinement(2)))


def test_a_cap_below_the_smallest_file_is_met_by_what_refinement_finds(varied, picture, monkeypatch):
    def found(self, probe, how, target, on_step):
        y = 0.3 * self.rate_model.scaled(0.0)
        return [(self._probe_of_latents(0.0, y, varied.h_a(y).detach()), Step(1, 1, 1, 1, 1))], []

    monkeypatch.setattr(Picture, "refine", found)
    smallest = len(produce(varied, "a", picture, Order(0.0)).data)
    outcome = produce(varied, "a", picture, Order(max_bytes=smallest - 1, refinement=Refinement(1)))
    assert len(outcome.data) < smallest and outcome.chosen == 1


def test_files_of_a_target_are_compared_by_distortion_whatever_their_index(varied, picture, monkeypatch):
    """λ · D would make the worse of two pictures the better, where its index is the smaller."""

    def found(self, probe, how, target, on_step):
        return [(self.quantise(index), Step(1, 1, 1, 1, 1)) for index in (probe.index + 0.02, probe.index - 0.02)], []

    monkeypatch.setattr(Picture, "refine", found)
    wanted = round(Picture(varied, picture).quantise(2.0).bits / 8)
    outcome = produce(varied, "a", picture, Order(bytes=wanted, refinement=Refinement(1)))
    tried = [produce(varied, "a", picture, Order(outcome.plain.index + move)).result for move in (-0.02, 0, 0.02)]
    allowed = [result.psnr for result in tried if abs(result.bpp * 100 * 120 / 8 / wanted - 1) <= 0.005]
    assert len(allowed) > 1 and outcome.result.psnr == max(allowed)


def test_what_a_hold_prefers():
    hold, cap = Hold(1.0), Hold(0.997, limit=1.0)
    assert hold.rank(1.002, 5) < hold.rank(0.999, 6) < hold.rank(1.01, 1) < hold.rank(0.9, 1)
    assert cap.rank(0.9, 1) < cap.rank(0.998, 5) < cap.rank(1.001, 1) < cap.rank(1.1, 0.5)
    rising = [Step(0, bpp, 1.0, 1.0, 1.0) for bpp in (1.0, 1.02)]
    assert hold.correction(rising) > 0 > hold.correction([*rising[::-1], Step(0, 0.97, 1.0, 1.0, 1.0)])
    assert Hold(0.9, limit=1.0, steered=False).correction(rising) == 0


def test_one_pixel_is_refined(varied):
    outcome = produce(varied, "a", torch.full((3, 1, 1), 90, dtype=torch.uint8), Order(0.5, refinement=Refinement(2)))
    assert outcome.decoded.shape == (3, 1, 1) and outcome.result.loss <= outcome.plain.loss
    assert math.isfinite(outcome.steps[-1].loss)


def test_only_the_original_pixels_count(varied, picture):
    whole = Picture(varied, picture)
    probe, seen = whole.quantise(2.0), []
    whole.refine(probe, Refinement(1), on_step=seen.append)
    decoded = decode(varied, whole.code(probe))
    assert seen[0].mse == pytest.approx(mse(picture, decoded), rel=0.02)
    assert seen[0].bpp == pytest.approx(probe.bits / (100 * 120), rel=1e-3)
