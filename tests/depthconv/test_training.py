"""The stages of training, the start in closed form, checkpoints and benchmarks, with DepthConv."""

import json

import numpy as np
import pytest
import torch

import eval_vbr
import train_vbr
from models import DepthConv, DepthConv_VBR
from models.depthconv import DepthConvBlock, DepthConvConfig
from models.lambdas import LADDERS
from models.registry import PRESETS
from tests.depthconv.tiny import TINY
from tests.training.runs import SIZES
from tests.training.test_klt_start import patches  # noqa: F401
from utils import cli
from utils.benchmarks import speed, training
from utils.checkpoint import build_model, export_model, load_model, read_checkpoint
from utils.training.compiled import compile_networks
from utils.training.klt_start import klt_start
from utils.training.optimizers import make_optimizers
from utils.training.schedule import Settings


@pytest.fixture(autouse=True)
def tiny_preset(monkeypatch):
    monkeypatch.setitem(PRESETS, "depthconv", ("DepthConv", TINY))


def train(photos, folder, *more) -> dict:
    train_vbr.main(["-d", str(photos), "--save_path", str(folder), *SIZES, *map(str, more)])
    return read_checkpoint(folder / "model.pth.tar")


def test_every_stage_trains_it(photos, tmp_path, capsys):
    teachers = tmp_path / "teachers"
    for lmbda in LADDERS["mse"]:
        more = ["--stage", "base", "--preset", "depthconv", "--lambda", lmbda, "--max-steps", 1]
        base = train(photos, teachers / f"{lmbda}", *more)
    assert base["model"] == "DepthConv" and base["arguments"] == TINY
    start = ["--checkpoint", teachers / "0.05" / "model.pth.tar", "--max-steps", 1]
    static = train(photos, tmp_path / "static", "--stage", "static", "--teachers", teachers, *start)
    entropy = train(photos, tmp_path / "entropy", "--stage", "entropy", "--keep-latents", 2, *start)
    assert static["model"] == entropy["model"] == "DepthConv_VBR"
    changed = {name.split(".")[0] for name, weight in static["state_dict"].items() if name.startswith(("g_", "modnet_"))
               and not torch.equal(weight, base["state_dict"].get(name, torch.zeros(1)))}
    assert changed == {"modnet_ga", "modnet_gs"}
    assert all(torch.equal(entropy["state_dict"][name], base["state_dict"][name])
               for name in base["state_dict"] if name.startswith(("g_a.", "g_s.", "lrp_transforms.")))
    found = tmp_path / "static" / "model.pth.tar"
    capsys.readouterr()
    tables = train(photos, tmp_path / "tables", "--stage", "tables", "--checkpoint", found)
    told = capsys.readouterr().err
    assert "--stage tables: trains no network, without effect are --val-size, --batch-size, --warmup" in told
    assert tables["model"] == "DepthConv_VBR"


def test_joint_training_learns_from_the_closed_form_start(photos, tmp_path, capsys):
    more = ["--preset", "depthconv", "-lr", 2e-3, "--transform-lr-factor", 0.1, "--ema", 0.8]
    train(photos, tmp_path / "run", *more, "--max-steps", 30)
    losses = [json.loads(line)["loss"] for line in (tmp_path / "run" / "validation.jsonl").read_text().splitlines()]
    train(photos, tmp_path / "first", *more, "--max-steps", 1)
    first = json.loads((tmp_path / "first" / "validation.jsonl").read_text())["loss"]
    assert losses[-1] < 0.9 * first
    capsys.readouterr()
    weights = str(tmp_path / "run" / "model.pth.tar")
    eval_vbr.main(["-d", str(photos), "--checkpoint", weights, "-l", "0", "5", "--real"])
    assert capsys.readouterr().out.count("mean of 8") == 2


def test_the_blocks_learn_at_the_full_rate():
    model = DepthConv_VBR(**TINY)
    groups = make_optimizers(model, Settings(transform_factor=0.1))["net"].param_groups
    (slow,) = (set(group["params"]) for group in groups if group["factor"] == 0.1)
    assert slow == {p for i in (1, 3) for p in model.g_a[i].parameters()} | {
        p for i in (1, -2) for p in model.g_s[i].parameters()
    }


@pytest.mark.parametrize("cls", [DepthConv, DepthConv_VBR])
def test_the_start_is_the_projection_onto_the_kept_vectors(patches, cls):  # noqa: F811
    """An independent projection, by NumPy: 8×8 pixels to 32 coefficients, then 2×2 of their places to 64."""
    torch.manual_seed(0)
    model = cls(**TINY).eval()
    record = klt_start(model, patches, lmbda=0.013, wiener=False)
    index = model.resolve_index(1.3, len(patches))
    with torch.no_grad():
        found = model.synthesize(model.analyze(patches.float() / 255, index)[0], index).numpy()
    x = patches.numpy().astype(np.float64) / 255
    color = x.mean((0, 2, 3), keepdims=True)
    level, bases = x - color, []
    for size, width in ((8, 32), (2, 64)):
        b, c, h, w = level.shape
        blocks = level.reshape(b, c, h // size, size, w // size, size).transpose(0, 2, 4, 1, 3, 5)
        blocks = blocks.reshape(-1, c * size**2)
        values, vectors = np.linalg.eigh(blocks.T @ blocks)
        bases.append((vectors[:, np.argsort(values)[::-1][:width]], size, c))
        level = (blocks @ bases[-1][0]).reshape(b, h // size, w // size, width).transpose(0, 3, 1, 2)
    kept = []
    for basis, size, c in reversed(bases):
        b, _, h, w = level.shape
        kept.append(float((level**2).sum()))
        blocks = (level.transpose(0, 2, 3, 1) @ basis.T).reshape(b, h, w, c, size, size)
        level = blocks.transpose(0, 3, 1, 4, 2, 5).reshape(b, c, h * size, w * size)
    assert np.abs(found - (level + color)).max() < 2e-4
    lost = 255**2 * (float(((x - color) ** 2).sum()) - kept[0]) / x.size
    assert sum(record["mse_lost_in_each_stage"]) == pytest.approx(lost, abs=0.02) and lost > 1


def test_a_new_block_is_the_identity():
    x = torch.randn(1, 16, 4, 4)
    assert torch.equal(DepthConvBlock(16)(x), x)


def test_blocks_are_bounded_and_below_the_bound_they_are_products():
    """A product of two linear functions in every block would be of degree 64 after six."""
    torch.manual_seed(0)
    blocks = torch.nn.Sequential(*(DepthConvBlock(16) for _ in range(6))).double()
    for p in blocks.parameters():
        torch.nn.init.normal_(p, std=0.5)
    x = torch.randn(1, 16, 8, 8).double()
    block = blocks[0]
    with torch.no_grad():
        assert blocks(1e4 * x).abs().max() < 1e12
        inner = x + block.leave(block.depthwise(torch.nn.functional.silu(block.enter(x))))
        hidden = block.expand(inner) * torch.nn.functional.silu(block.gate(inner))
        for scale in (0.001, 1000.0):
            hidden *= scale
            expected = inner + block.reduce(hidden.clamp(-4, 4))
            block.expand.weight *= scale
            block.expand.bias *= scale
            torch.testing.assert_close(block(x), expected)
            assert (hidden.abs().max() > 4) == (scale == 1000.0)


def test_a_bare_state_dict_is_recognized(made_tiny, tmp_path):
    file = tmp_path / "weights.pth"
    torch.save({"module." + name: value for name, value in made_tiny.state_dict().items()}, file)
    model = load_model(file)
    assert type(model) is DepthConv_VBR and model.fingerprint == made_tiny.fingerprint
    fixed = {name: value for name, value in made_tiny.state_dict().items() if not name.startswith("modnet_")}
    assert type(build_model({"state_dict": fixed}, file)) is DepthConv
    assert DepthConvConfig.infer(fixed) == made_tiny.config


def test_weights_of_one_rate_start_with_laes_at_identity(made_tiny, image, tmp_path):
    fixed = DepthConv(**TINY)
    fixed.load_state_dict({name: v for name, v in made_tiny.state_dict().items() if not name.startswith("modnet_")})
    variable = DepthConv_VBR(**TINY)
    variable.load_state_dict(fixed.state_dict())
    with torch.no_grad():
        assert torch.equal(variable.eval()(image, 3.0)["x_hat"], fixed.eval()(image)["x_hat"])
    export_model(tmp_path / "fixed.pth.tar", fixed, [])
    assert type(load_model(tmp_path / "fixed.pth.tar")) is DepthConv


@pytest.mark.parametrize("wrong", [{"M": 100}, {"width": 0}, {"num_slices": 3}, {"depth": -1}, {"depth": 1.5}])
def test_sizes_that_do_not_fit_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        DepthConv(**{**TINY, **wrong})


def test_arguments_of_another_backbone_are_one_line(photos, tmp_path):
    with pytest.raises(cli.UserError, match="--preset depthconv: .*N"):
        train(photos, tmp_path / "run", "--preset", "depthconv", "--N", 64, "--max-steps", 1)


def test_benchmarks_run_it(capsys):
    speed.main(["--preset", "depthconv", "--width", "128", "--height", "128", "--runs", "1"])
    training.main(["--preset", "depthconv", "--patch-size", "128", "-bs", "1", "--runs", "1"])
    output = capsys.readouterr().out
    assert "analysis + synthesis" in output and "patches per second" in output


def test_every_network_is_compiled(made_tiny, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, dynamic: compiled.append(self))
    compile_networks(made_tiny)
    assert len(compiled) == 4 + 3 * TINY["num_slices"] + TINY["context_model"]
