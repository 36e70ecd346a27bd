"""The stage in which the decoder alone learns, on the symbols that files have."""

import copy
import json

import pytest
import torch

import train_vbr
from models import TCM
from models.coding.slice_coders import Quantization
from tests.conftest import TINY, shake
from tests.training.runs import arguments, recorded_losses, same, train
from utils import cli
from utils.checkpoint import export_model, load_model, read_checkpoint
from utils.metrics import rate_distortion
from utils.training.objectives import DecoderObjective, Objective
from utils.training.trainer import Trainer

ENCODER = "g_a.", "h_a.", "modnet_ga.", "entropy_bottleneck."


@pytest.fixture
def codec(quick_model):
    """With tables of Gaussians, those that choose the symbols, most of which are zero, as at low rates."""
    model = copy.deepcopy(quick_model)
    with torch.no_grad():
        model.g_a[3].weight.mul_(0.04)
        for (head,) in model.slice_heads:
            head.bias[len(head.bias) // 2 :].sub_(9.8)
    model.update(force=True)
    return model


def noise_of(model, batch: int) -> tuple[torch.Tensor, torch.Tensor]:
    return tuple(torch.rand(batch, *shape) - 0.5 for shape in model.noise_shapes(128, 256))


def test_it_changes_the_decoder_and_nothing_else(photos, quick, tmp_path):
    start = ["--stage", "decoder", "--checkpoint", quick, "-lr", 1e-3, "--ema", 0, "--max-steps", 8]
    train(photos, tmp_path / "run", *start)
    before, after = (read_checkpoint(file) for file in (quick, tmp_path / "run" / "model.pth.tar"))
    assert after["training"][-1]["stage"] == "decoder"
    names = {n for n, value in before["state_dict"].items() if not torch.equal(value, after["state_dict"][n])}
    learned = {name for name, _ in load_model(quick).named_parameters() if not name.startswith(ENCODER)}
    tables = {name for name in before["state_dict"] if name.startswith("gaussian_conditional.")}
    assert learned <= names <= learned | tables


def test_its_loss_is_that_of_the_symbols_of_files(codec, image):
    """By coding them: rounded latents would have another one."""
    found, x_hat = DecoderObjective(codec).measure(codec, image, 3.0)
    y, _ = codec.analyze(image, torch.tensor([3.0]))
    z = codec.h_a(y)
    rounded = codec.quantize(y, z, portable=False)
    coded = codec.quantize(y, z, portable=False, complete=True, choose=codec.choose_symbols)
    picture = codec.synthesize(coded.y_hat, torch.tensor([3.0])).clamp(0, 1)
    assert torch.allclose(x_hat, (picture * 255).round() / 255, atol=1.01 / 255)
    # Likelihoods are of σ itself, and files of a row of its table.
    assert found["bpp"] * 128 * 256 == pytest.approx(codec.count_bits(coded)[0], rel=0.1)
    assert codec.count_bits(rounded)[0] > 1.5 * codec.count_bits(coded)[0]


def test_training_minimizes_what_validation_measures(codec, image):
    objective = DecoderObjective(codec).eval()
    losses = objective(image, torch.tensor([0.6]), noise_of(codec, 1))
    again = objective(image, torch.tensor([0.6]), noise_of(codec, 1))
    assert torch.equal(losses["total"], again["total"])  # no noise takes part
    found, _ = objective.measure(codec, image, 3.0)
    assert float(losses["bpp"]) == pytest.approx(found["bpp"], rel=1e-4)
    plain = Objective(codec).eval()
    with torch.no_grad():
        rounded = codec(image, torch.tensor([3.0]), Quantization(straight_through=True))
        other = rate_distortion(rounded, image, plain.lambdas(3.0, image))
    assert float(other["bpp"][0]) > 1.5 * found["bpp"]


def test_gradients_are_of_the_decoder_alone(codec, image):
    objective = DecoderObjective(codec)
    objective.train()
    objective(image, torch.tensor([0.4]), noise_of(codec, 1))["total"].backward()
    for name, parameter in codec.named_parameters():
        assert (parameter.grad is None) == name.startswith(ENCODER), name


def test_a_resumed_run_is_the_uninterrupted_one(photos, quick, tmp_path, monkeypatch):
    losses = recorded_losses(monkeypatch)
    more = ["--stage", "decoder", "--checkpoint", quick, "--max-steps", 4]
    whole = train(photos, tmp_path / "whole", *more)
    expected = losses.copy()
    losses.clear()
    step = Trainer.step

    def interrupted(self):
        if self.progress.step == 2:
            self.save()
            raise KeyboardInterrupt
        return step(self)

    monkeypatch.setattr(Trainer, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(photos, tmp_path / "parts", *more)
    monkeypatch.setattr(Trainer, "step", step)
    parts = train(photos, tmp_path / "parts", *more, "--resume")
    assert losses == expected and len(expected) == 4
    assert same(whole["state_dict"], parts["state_dict"]) and same(whole["ema"], parts["ema"])


def test_a_fixed_rate_codec_has_one_rate(photos, tmp_path):
    torch.manual_seed(1)
    earlier = {"lambda": 0.013, "settings": {"checkpoint": "/home/me/first.pth.tar"}}
    export_model(tmp_path / "tcm.pth.tar", shake(TCM(**TINY)), [earlier])
    more = ["--stage", "decoder", "--checkpoint", tmp_path / "tcm.pth.tar", "--lambda", 0.013, "--max-steps", 1]
    state = train(photos, tmp_path / "run", *more, "--ema", 0)
    assert state["model"] == "TCM" and state["objective"]["lambda"] == 0.013
    assert state["objective"]["stage"] == "decoder"
    before = load_model(tmp_path / "tcm.pth.tar").state_dict()
    moved = {name for name, _ in TCM(**TINY).named_parameters() if not torch.equal(before[name], state["ema"][name])}
    assert {name.split(".")[0] for name in moved} & {"g_s", "cc_scale_transforms", "lrp_transforms", "h_mean_s"}
    assert not any(name.startswith(ENCODER) for name in moved)
    row = json.loads((tmp_path / "run" / "validation.jsonl").read_text())
    assert len(row["bpp"]) == 1
    records = read_checkpoint(tmp_path / "run" / "model.pth.tar")["training"]
    assert [record["settings"]["checkpoint"] for record in records] == ["first.pth.tar", "tcm.pth.tar"]
    objective = DecoderObjective(load_model(tmp_path / "tcm.pth.tar"), lmbda=0.013)
    assert objective.indexes == (None,)


def test_frozen_analysis_drops_no_paths():
    """As it is when the picture is coded."""
    torch.manual_seed(0)
    objective = DecoderObjective(shake(TCM(**TINY, drop_path_rate=0.6)), lmbda=0.013)
    objective.train()
    x = torch.rand(1, 3, 128, 128)
    assert torch.equal(objective.model.g_a(x), objective.model.g_a(x))
    assert objective.model.training and objective.model.g_s.training


def test_what_does_not_go_with_it(photos, checkpoint, tmp_path):
    with pytest.raises(cli.UserError, match="--stage decoder needs a --checkpoint"):
        train_vbr.main(arguments(photos, tmp_path, "--stage", "decoder", "--max-steps", 1))
    more = ["--stage", "decoder", "--checkpoint", checkpoint, "--lambda", 0.013, "--max-steps", 1]
    with pytest.raises(cli.UserError, match="has no scale of its own for one λ, and this stage learns none"):
        train_vbr.main(arguments(photos, tmp_path, *more))
    torch.manual_seed(1)
    fixed = str(tmp_path / "tcm.pth.tar")
    export_model(fixed, shake(TCM(**TINY)), [{"lambda": 0.013}])
    more = ["--stage", "decoder", "--checkpoint", fixed, "--max-steps", 1]
    with pytest.raises(cli.UserError, match="a fixed-rate codec: give its λ with --lambda"):
        train_vbr.main(arguments(photos, tmp_path, *more))
    with pytest.raises(cli.UserError, match="draws maps of rates; a fixed-rate codec has one"):
        train_vbr.main(arguments(photos, tmp_path, *more, "--lambda", 0.013, "--map-share", 0.2))
    run = ["--stage", "joint", "--checkpoint", checkpoint, "--max-steps", 1]
    train(photos, tmp_path / "joint", *run)
    with pytest.raises(cli.UserError, match="stage joint, not decoder"):
        train_vbr.main(arguments(photos, tmp_path / "joint", "--stage", "decoder", "--max-steps", 2, "--resume"))


def test_runs_that_were_the_same_are_the_same(photos, quick, tmp_path):
    more = ["--stage", "decoder", "--checkpoint", quick, "--max-steps", 2]
    one, other = (train(photos, tmp_path / name, *more) for name in ("one", "other"))
    assert same(one["state_dict"], other["state_dict"])
