"""The closed-form start: what it claims of transform, rate and steps, and what trains from it."""

import json
import math

import numpy as np
import pytest
import skimage.data
import torch
from torch.nn import functional as F

import train_vbr
from models import TCM, TCM_VBR
from models.lambdas import LADDERS, index_to_lambda, middle_lambda
from models.registry import PRESETS, from_preset
from tests.conftest import TINY
from tests.depthconv import tiny as depthconv
from utils import cli
from utils.checkpoint import read_checkpoint
from utils.distributed import DistContext
from utils.training.klt_start import WRITERS, klt_start, quantization_step
from utils.training.objectives import EntropyObjective, Objective
from utils.training.optimizers import make_optimizers
from utils.training.schedule import Settings
from utils.training.validation import validate


def crops(images: list[np.ndarray], step: int) -> torch.Tensor:
    """Every crop of 128×128 at such steps, uint8 `[P, 3, 128, 128]`."""
    found = []
    for image in images:
        x = torch.from_numpy(image).permute(2, 0, 1)
        height, width = image.shape[:2]
        corners = [(i, j) for i in range(0, height - 127, step) for j in range(0, width - 127, step)]
        found += [x[:, i : i + 128, j : j + 128] for i, j in corners]
    return torch.stack(found)


@pytest.fixture(scope="module")
def patches() -> torch.Tensor:
    return crops([skimage.data.astronaut(), skimage.data.coffee()], 120)


def hierarchical_projection(patches: torch.Tensor, widths: tuple[int, ...]) -> np.ndarray:
    """The projection of pictures onto what a hierarchical KLT keeps, by NumPy, one basis of whole 16×16 blocks."""
    x = patches.numpy().astype(np.float64) / 255
    color = x.mean((0, 2, 3), keepdims=True)
    level, bases = x - color, []
    for width in widths:
        b, c, h, w = level.shape
        blocks = level.reshape(b, c, h // 2, 2, w // 2, 2).transpose(0, 2, 4, 1, 3, 5).reshape(-1, 4 * c)
        values, vectors = np.linalg.eigh(blocks.T @ blocks)
        bases.append(vectors[:, np.argsort(values)[::-1][:width]])
        level = (blocks @ bases[-1]).reshape(b, h // 2, w // 2, -1).transpose(0, 3, 1, 2)
    for basis in reversed(bases):
        b, k, h, w = level.shape
        blocks = level.transpose(0, 2, 3, 1) @ basis.T
        level = blocks.reshape(b, h, w, -1, 2, 2).transpose(0, 3, 1, 4, 2, 5).reshape(b, -1, 2 * h, 2 * w)
    return level + color


@pytest.mark.parametrize("cls", [TCM, TCM_VBR])
def test_round_trip_is_the_projection_onto_the_kept_vectors(patches, cls):
    torch.manual_seed(0)
    model = cls(**TINY).eval()
    klt_start(model, patches, lmbda=0.013, wiener=False)
    index = model.resolve_index(1.3, len(patches))
    with torch.no_grad():
        y, _ = model.analyze(patches.float() / 255, index)
        found = model.synthesize(y, index)
    expected = hierarchical_projection(patches, (12, 48, 64, 64))
    assert np.abs(found.numpy() - expected).max() < 1e-4
    assert np.abs(expected - patches.numpy() / 255).max() > 0.05  # something is lost: the test is not of the identity


def test_least_squares_synthesis_is_better_than_the_transpose():
    seen, unseen = crops([skimage.data.astronaut(), skimage.data.coffee()], 60), crops([skimage.data.chelsea()], 80)

    def error(wiener: bool) -> float:
        torch.manual_seed(0)
        model = TCM(**TINY).eval()
        klt_start(model, seen, lmbda=0.0067, wiener=wiener)
        x = unseen.float() / 255
        with torch.no_grad():
            return float((model.synthesize(model.features(x).round()) - x).square().mean())

    assert error(True) < 0.98 * error(False)


def test_bits_at_step_zero_are_those_of_gaussians(patches):
    torch.manual_seed(0)
    model = TCM(**TINY).eval()
    klt_start(model, patches, lmbda=0.05)
    with torch.no_grad():
        out = model(patches.float() / 255)
    deviations = out["latent"].square().mean((0, 2, 3)).sqrt()
    live = deviations > 0.5
    assert live.sum() > 20
    places = out["latent"][0, 0].numel()
    expected = float(places * (0.5 * (2 * math.pi * math.e * deviations[live].square()).log2()).sum())
    found = float(-out["likelihoods"]["y"][:, live].log2().sum()) / len(patches)
    assert found == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize("lmbda", LADDERS["mse"])
def test_step_minimizes_the_high_rate_loss(lmbda):
    """λ · MSE + bpp of one coefficient, by search: λ/3 · Δ²/12 − log2 Δ."""
    steps = np.linspace(5, 200, 200_001)
    best = steps[np.argmin(lmbda / 3 * steps**2 / 12 - np.log2(steps))]
    assert quantization_step(lmbda) == pytest.approx(best, abs=1e-2)


@pytest.mark.parametrize("metric", sorted(LADDERS))
@pytest.mark.parametrize("preset", sorted(name for name, (cls, _) in PRESETS.items() if cls in WRITERS))
def test_every_preset_starts_as_a_codec(patches, preset, metric):
    torch.manual_seed(0)
    model = from_preset(preset).eval()
    model.metric = metric
    record = klt_start(model, patches[::8])
    assert record["mse_lost_in_each_stage"][0] == pytest.approx(0, abs=0.01)  # 12 of 12 are kept
    model.requires_grad_(False)
    for index in (0.0, 2.0, 5.0):
        m = F.softsign(model.modnet_ga.mask.rate(torch.tensor([index]))[0]).exp()
        assert m.mean() == pytest.approx((index_to_lambda(index) / middle_lambda()) ** 0.5, rel=1e-4)
        n = F.softsign(model.modnet_gs.mask.rate(torch.tensor([index]))[0]).exp()
        assert torch.allclose(m * n, torch.ones(()), atol=1e-5)
    x = patches[:1].float() / 255
    with torch.no_grad():
        x_hat = model(x, 5.0)["x_hat"]
    assert -10 * math.log10(float((x_hat - x).square().mean())) > 26


def test_fixed_rate_of_the_ms_ssim_ladder_takes_the_step_of_its_rung(patches):
    def first_weight(lmbda: float, metric: str) -> torch.Tensor:
        torch.manual_seed(0)
        model = TCM(**TINY)
        model.metric = metric
        klt_start(model, patches[::8], lmbda, wiener=False)
        return model.g_a[-1].weight

    for mse, ms_ssim in zip(LADDERS["mse"], LADDERS["ms-ssim"], strict=True):
        assert torch.allclose(first_weight(mse, "mse"), first_weight(ms_ssim, "ms-ssim"), rtol=1e-4, atol=1e-6)


# Training from it ------------------------------------------------------------------------------


@pytest.fixture
def arguments(photos, tmp_path, monkeypatch) -> list[str]:
    monkeypatch.setitem(PRESETS, "small", ("TCM", TINY))
    sizes = ["--patch-size", "128", "--val-size", "128", "-bs", "2", "--warmup", "1", "--device", "cpu"]
    return ["-d", str(photos), "--save_path", str(tmp_path / "run"), *sizes]


@pytest.fixture
def quick_arguments(arguments, monkeypatch) -> list[str]:
    """For what is the same with all networks."""
    monkeypatch.setitem(PRESETS, "small", ("DepthConv", depthconv.TINY))
    return arguments


def test_a_run_starts_there_and_is_monotone_in_the_index(arguments, tmp_path):
    train_vbr.main([*arguments, "--max-steps", "1", "-lr", "1e-6"])
    row = json.loads((tmp_path / "run" / "validation.jsonl").read_text())
    assert all(np.diff(row["bpp"]) > 0) and all(np.diff(row["psnr"]) > 0)
    assert row["psnr"][-1] > 30  # the photographs are smooth
    start, run = read_checkpoint(tmp_path / "run" / "model.pth.tar")["training"]
    assert start["stage"] == "klt start" and run["stage"] == "joint"


def test_random_start_is_still_there(quick_arguments, tmp_path):
    train_vbr.main([*quick_arguments, "--max-steps", "1", "--init", "random"])
    assert len(read_checkpoint(tmp_path / "run" / "model.pth.tar")["training"]) == 1


def test_entropy_stage_leaves_transforms_alone_and_computes_latents_once(arguments, tmp_path, monkeypatch):
    calls = []
    features = TCM.features
    monkeypatch.setattr(TCM, "features", lambda self, x: calls.append(len(x)) or features(self, x))
    stage = ["--stage", "entropy", "--keep-latents", "3", "--max-steps", "6", "-lr", "1e-3"]
    train_vbr.main([*arguments, *stage])
    in_training = sum(calls[:2])
    assert in_training == 4  # 3 rounded up to whole steps; what follows is validation
    assert len(calls) == 2 + 6 + 2  # one held-out photograph at six rates, and 12 patches for the tables
    state = read_checkpoint(tmp_path / "run" / "last.pth.tar")["state_dict"]
    trained = [*arguments[:2], "--save_path", str(tmp_path / "again"), *arguments[4:], "--max-steps", "1", "-lr", "0"]
    train_vbr.main(trained)
    before = read_checkpoint(tmp_path / "again" / "last.pth.tar")["state_dict"]
    names = {name for name, value in state.items() if not torch.equal(value, before[name])}
    assert any(name.startswith("entropy_bottleneck.") and "quantiles" not in name for name in names)
    moved = {name.split(".")[0] for name in names}
    assert {"h_a", "h_mean_s", "h_scale_s", "atten_mean", "cc_scale_transforms"} <= moved
    assert not moved & {"g_a", "g_s", "modnet_ga", "modnet_gs", "lrp_transforms"}


def test_entropy_stage_of_a_fixed_rate_model_in_bfloat16(arguments, tmp_path):
    train_vbr.main([*arguments, "--stage", "entropy", "--lambda", "0.013", "--max-steps", "2", "--amp"])
    state = read_checkpoint(tmp_path / "run" / "last.pth.tar")
    assert state["model"] == "TCM"
    assert state["objective"]["lambda"] == 0.013 and state["objective"]["stage"] == "entropy"


def test_entropy_stage_with_workers_trains_on_the_same(quick_arguments, tmp_path):
    arguments = quick_arguments
    stage = ["--stage", "entropy", "--keep-latents", "4", "--max-steps", "3"]
    train_vbr.main([*arguments, *stage])
    train_vbr.main([*arguments[:2], "--save_path", str(tmp_path / "read"), *arguments[4:], *stage, "--cache-gb", "0"])
    kept, read = (read_checkpoint(tmp_path / run / "last.pth.tar")["state_dict"] for run in ("run", "read"))
    assert all(torch.equal(value, read[name]) for name, value in kept.items())


def test_a_resumed_run_has_the_factor_it_is_given(quick_arguments, tmp_path):
    arguments = quick_arguments
    start = ["--init", "random", "--transform-lr-factor"]
    train_vbr.main([*arguments, *start, "1", "--max-steps", "1"])
    train_vbr.main([*arguments, *start, "0.25", "--max-steps", "2", "--resume"])
    groups = read_checkpoint(tmp_path / "run" / "last.pth.tar")["optimizers"]["net"]["param_groups"]
    assert sorted(group["factor"] for group in groups) == [0.25, 1, 10]


def test_entropy_stage_minimizes_the_bits_that_validation_measures(patches, tiny):
    objective = EntropyObjective(tiny, 8)
    objective.eval()
    x, rate_uniform = patches[:2].float() / 255, torch.tensor([0.1, 0.9])
    noise = tuple(torch.zeros(2, *shape) for shape in tiny.noise_shapes(128, 128))
    bpp = float(objective(x, rate_uniform, noise, [0, 1])["bpp"].detach())
    tiny.requires_grad_(False)
    expected = float(Objective(tiny).eval()(x, rate_uniform, noise)["bpp"])
    assert bpp == pytest.approx(expected, rel=1e-2)  # latents are kept in float16
    assert validate(objective, tiny, [patches[0]], DistContext(torch.device("cpu")))[0]["loss"] > 0


@pytest.mark.parametrize(
    "more",
    [
        ["--init", "klt", "--checkpoint", "x"],
        ["--keep-latents", "0"],
        ["--lambda", "0.05"],
        ["--transform-lr-factor", "-1"],
        ["--balance", "nan"],
    ],
)
def test_flags_that_do_not_go_together_are_refused(arguments, more):
    with pytest.raises(cli.UserError):
        train_vbr.main([*arguments, "--max-steps", "1", *more])


# What the joint stage was given for it ----------------------------------------------------------


def test_transforms_have_a_learning_rate_of_their_own(tiny):
    groups = make_optimizers(tiny, Settings(transform_factor=0.2))["net"].param_groups
    factor = {id(p): group["factor"] for group in groups for p in group["params"]}
    for name, p in tiny.named_parameters():
        if name.startswith(("g_a.", "g_s.")):
            assert factor[id(p)] == 0.2
        elif not name.startswith("entropy_bottleneck."):
            assert factor[id(p)] == 1


def test_balance_weighs_each_sample_by_its_rate(tiny):
    objective = Objective(tiny)
    balanced = Objective(tiny, settings=Settings(balance=0.5))
    lmbda = objective.lambdas(torch.tensor([0.0, 5.0]), torch.empty(2))
    losses = torch.ones(2)
    assert float(objective.weighted(losses, lmbda)) == pytest.approx(1.0)
    ratio = 20**0.25  # of each end of the ladder to its middle, to the power ½
    assert float(balanced.weighted(losses, lmbda)) == pytest.approx((ratio + 1 / ratio) / 2, rel=1e-5)
