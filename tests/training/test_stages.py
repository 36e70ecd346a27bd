"""Stages of training, of TCM and TCM_VBR."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import eval_vbr
import train_latent_e2e
import train_vbr
from models import TCM, TCM_VBR
from models.lambdas import LADDERS
from models.latent_map import TCM_Mapped
from models.layers import Float32GDN
from models.state_dict import without_tables
from tests.conftest import TINY, shake
from tests.training.runs import arguments, same, train
from utils import cli
from utils.checkpoint import describe, export_model, load_model, read_checkpoint
from utils.cli.training_stages import read_teachers
from utils.codec.request import EncodeRequest
from utils.evaluation.evaluate import evaluate
from utils.images import read_image, save_image
from utils.training.compiled import compile_networks
from utils.training.objectives import StaticObjective


@pytest.fixture(scope="module")
def tcm(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("weights") / "tcm.pth.tar"
    torch.manual_seed(1)
    export_model(path, shake(TCM(**TINY)), [])
    return str(path)


def test_joint_training_learns_and_leaves_weights_to_use(photos, checkpoint, tmp_path):
    before = load_model(checkpoint)
    train(photos, tmp_path / "run", "--checkpoint", checkpoint, "--max-steps", 20, "-lr", 1e-3, "--ema", 0.9)
    rows = [json.loads(line) for line in (tmp_path / "run" / "validation.jsonl").read_text().splitlines()]
    assert rows[-1]["step"] == 20
    assert all(len(rows[-1][name]) == 6 for name in ("bpp", "psnr", "log_m_ga", "log_m_gs"))
    model = load_model(tmp_path / "run" / "model.pth.tar")
    record = read_checkpoint(tmp_path / "run" / "model.pth.tar")["training"][-1]
    assert record["patches"] == 40 and record["loss"] == rows[-1]["loss"] and record["stage"] == "joint"
    assert not torch.equal(model.entropy_bottleneck.quantiles, before.entropy_bottleneck.quantiles)
    assert not torch.equal(model.modnet_gs.mask.alpha, before.modnet_gs.mask.alpha)

    def loss(m):
        pictures = [read_image(path)[:, :128, :128] for path in photos.iterdir()]
        return np.mean([evaluate(m, "", picture, EncodeRequest(3.0), real=False)[0].loss for picture in pictures])

    assert loss(model) < 0.8 * loss(before)
    events = EventAccumulator(str(tmp_path / "run"))
    events.Reload()
    scalars = set(events.Tags()["scalars"])
    assert {"training/loss", "training/learning rate", "training/gradient norm", "training/patches a second"} <= scalars
    assert {"validation/bpp 5", "validation/PSNR 0", "validation/log_m_gs 3", "validation/alpha_ga"} <= scalars
    assert {"validation/original", "validation/index 5"} <= set(events.Tags()["images"])


def test_base_stage_trains_one_rate_and_leaves_the_laes_behind(photos, checkpoint, tmp_path, capsys):
    more = ["--lambda", 0.0067, "--checkpoint", checkpoint, "--max-steps", 2]
    with pytest.raises(cli.UserError, match="has no scale of its own for one λ"):  # nor would it learn one
        train(photos, tmp_path / "entropy", "--stage", "entropy", *more)
    state = train(photos, tmp_path / "run", "--stage", "base", *more)
    assert "its LAEs stay behind, and with them its scale" in capsys.readouterr().err
    assert (tmp_path / "run" / "curves.png").exists()
    assert state["model"] == "TCM" and state["objective"]["lambda"] == 0.0067
    row = json.loads((tmp_path / "run" / "validation.jsonl").read_text())
    assert len(row["bpp"]) == 1
    image = read_image(sorted(photos.iterdir())[0])[:, :128, :128]
    model = load_model(tmp_path / "run" / "model.pth.tar")
    assert type(model) is TCM
    result, _ = evaluate(model, "", image, EncodeRequest(), real=False)
    assert result.bpp > 0 and result.loss is None


@pytest.fixture(scope="module")
def six_teachers(tmp_path_factory) -> tuple[Path, list[TCM]]:
    """Models that differ, and their folder: three are named by their record and three by their file."""
    folder, teachers = tmp_path_factory.mktemp("six"), []
    for number, lmbda in enumerate(LADDERS["mse"]):
        torch.manual_seed(number)
        teachers.append(shake(TCM(**TINY), seed=number).eval())
        name = f"tcm_{lmbda}.pth.tar" if number % 2 else f"teacher{'abcdef'[number]}.pth.tar"
        export_model(folder / name, teachers[-1], [] if number % 2 else [{"lambda": lmbda}])
    return folder, teachers


def test_the_stage_of_tables_changes_nothing_else(photos, checkpoint, tcm, tmp_path):
    """Neither of a TCM_VBR nor of a TCM, in float16 or, as published, in float32, nor their metric."""
    published = tmp_path / "float32.pth.tar"
    model = load_model(checkpoint)
    model.metric = "ms-ssim"
    torch.save(describe(model) | {"state_dict": model.state_dict()}, published)
    for number, start in enumerate((checkpoint, tcm, published)):
        train_vbr.main(arguments(photos, tmp_path / str(number), "--stage", "tables", "--checkpoint", start))
        before, after = read_checkpoint(start), read_checkpoint(tmp_path / str(number) / "model.pth.tar")
        tables = "gaussian_conditional._quantized_cdf"
        assert not torch.equal(before["state_dict"].pop(tables), after["state_dict"].pop(tables))
        assert same(before["state_dict"], after["state_dict"]) and same(after["state_dict"], before["state_dict"])
        assert all(before[name] == after[name] for name in ("model", "arguments", "metric"))
        assert after["training"][-1]["stage"] == "tables"


def test_static_stage_moves_the_laes_alone(photos, tcm, tmp_path, six_teachers):
    more = ["--stage", "static", "--checkpoint", tcm, "--teachers", six_teachers[0], "--max-steps", 3, "-lr", 1e-2]
    state = train(photos, tmp_path / "run", *more)["state_dict"]
    assert same(without_tables(load_model(tcm).state_dict()), state)
    others = shutil.copytree(six_teachers[0], tmp_path / "others")
    checkpoint = read_checkpoint(others / "tcm_0.05.pth.tar")
    checkpoint["state_dict"]["g_a.0.conv1.weight"] *= 2
    torch.save(checkpoint, others / "tcm_0.05.pth.tar")
    more[more.index("--teachers") + 1] = others
    with pytest.raises(cli.UserError, match="holds another run: teachers .*, not "):
        train(photos, tmp_path / "run", *more, "--resume")
    moved = [name for name, value in state.items() if name.startswith("modnet_") and value.abs().sum()]
    for lae in ("modnet_ga", "modnet_gs"):
        assert f"{lae}.mask.alpha" in moved and f"{lae}.mask.lmd_map.fc_layers.1.bias" in moved


def test_teachers_whose_tables_were_fitted_or_that_do_not_name_their_metric(six_teachers, tmp_path):
    """As after --stage tables, whose record has no λ; and published weights, here for MS-SSIM."""
    ladder, student = LADDERS["ms-ssim"], TCM(**TINY)
    student.metric = "ms-ssim"
    files = [tmp_path / f"{letter}.pth.tar" for letter in "abcdef"]
    for file, lmbda, teacher in zip(files, ladder, six_teachers[1], strict=True):
        export_model(file, teacher, [{"lambda": lmbda}, {"stage": "tables"}])
    with pytest.raises(cli.UserError, match="a TCM for mse"):
        read_teachers(str(tmp_path), ladder, student)
    for file in files:
        torch.save({key: value for key, value in read_checkpoint(file).items() if key != "metric"}, file)
    assert [teacher.metric for teacher in read_teachers(str(tmp_path), ladder, student)] == ["ms-ssim"] * 6


def test_static_loss_is_the_published_one(six_teachers):
    """Against the formula in docs/training.md, sample by sample."""
    folder, teachers = six_teachers
    torch.manual_seed(0)
    student = shake(TCM_VBR(**TINY))
    found = read_teachers(str(folder), LADDERS["mse"], student)
    assert len(found) == 6
    objective = StaticObjective(student, found).train()
    assert student.modnet_ga.training and not student.g_a.training and not student.g_s.training  # no drop-path
    objective.eval()
    x, rate_uniform = torch.rand(3, 3, 128, 128), torch.tensor([0.99, 0.05, 0.5])  # λ index 5, 0, 3
    noise = tuple(torch.zeros(3, *shape) for shape in student.noise_shapes(128, 128))
    with torch.no_grad():
        out = objective(x, rate_uniform, noise)
        distance = torch.stack(
            [
                (student.modnet_ga(student.g_a(x[i : i + 1]), torch.tensor([float(t)]))[0] - found[t].g_a(x[i : i + 1]))
                .square()
                .mean()
                for i, t in enumerate((5, 0, 3))
            ]
        ).mean()
        norms = sum(p.norm() for lae in (student.modnet_ga, student.modnet_gs) for p in lae.parameters())
    assert float(out["latent MSE"]) == pytest.approx(float(distance), rel=1e-4)
    assert float(out["total"]) == pytest.approx(float(out["loss"] + 0.03 * distance + 1e-4 * norms), rel=1e-5)
    half = found[3].g_a(x[2:])
    assert torch.allclose(half, teachers[3].g_a(x[2:]), rtol=0.05, atol=0.1 * float(half.abs().max()))


def test_teachers_that_do_not_fit_are_named(photos, tcm, tmp_path, six_teachers):
    shutil.copytree(six_teachers[0], tmp_path / "six")
    start = ["--stage", "static", "--checkpoint", tcm, "--max-steps", 1, "--teachers", tmp_path / "six"]

    def fails(text):
        with pytest.raises(cli.UserError, match=text):
            train(photos, tmp_path / "run", *start)

    (tmp_path / "six" / "tcm_0.0035.pth.tar").rename(tmp_path / "six" / "tcm.pth.tar")
    fails("tcm.pth.tar: neither its training record nor its name")
    (tmp_path / "six" / "tcm.pth.tar").rename(tmp_path / "six" / "again 0.05.pth.tar")
    fails("second teacher for λ = 0.05")
    (tmp_path / "six" / "again 0.05.pth.tar").unlink()
    fails("no teacher for λ = 0.0035")
    weights = read_checkpoint(six_teachers[0] / "tcm_0.05.pth.tar")["state_dict"]
    safetensors.torch.save_file(weights, tmp_path / "six" / "x 0.05.safetensors")
    fails("second teacher for λ = 0.05")


def test_ms_ssim_has_its_own_ladder(photos, checkpoint, tmp_path):
    for path in photos.iterdir():
        image = read_image(path)
        save_image(path, image.repeat(1, 2, 2))
    sizes = ["--type", "ms-ssim", "--patch-size", 256, "--val-size", 256, "-bs", 1]
    more = ["--checkpoint", checkpoint, "--max-steps", 1, *sizes]
    train(photos, tmp_path / "run", *more)
    path = tmp_path / "run" / "model.pth.tar"
    saved = read_checkpoint(path)
    assert saved["metric"] == "ms-ssim" and saved["lambdas"] == [3, 5, 8, 16, 36, 64]
    model = load_model(path)
    result, _ = evaluate(model, "", read_image(sorted(photos.iterdir())[0]), EncodeRequest(5.0), real=False)
    assert result.loss == pytest.approx(result.bpp + 64 * (1 - result.ms_ssim))
    with pytest.raises(cli.UserError, match="at least 256"):
        train(photos, tmp_path / "other", "--type", "ms-ssim", "--max-steps", 1)


@pytest.mark.parametrize(("kind", "rate", "gain_db"), [("channel", 0.3, 10), ("contextual", 0.02, 2)])
def test_the_latent_map_is_learnt_and_can_be_evaluated(photos, tmp_path, kind, rate, gain_db):
    """The low codec's latent is half the high one's: a gain of ½ for every channel."""
    torch.manual_seed(0)
    high = shake(TCM(**TINY))
    export_model(tmp_path / "high.pth.tar", high, [])
    high.g_a[-1].weight.data.mul_(0.5)
    high.g_a[-1].bias.data.mul_(0.5)
    export_model(tmp_path / "low.pth.tar", high, [{"lambda": 0.0067}])
    codecs = ["--high", tmp_path / "high.pth.tar", "--low", tmp_path / "low.pth.tar", "--map", kind]
    more = [*codecs, "--max-steps", 40, "-lr", rate, "--ema", 0.5, "--schedule", "cosine"]
    train_latent_e2e.main(arguments(photos, tmp_path / "map", *more))
    with pytest.raises(cli.UserError, match="holds another run: low .*, not "):
        others = ["--high", tmp_path / "high.pth.tar", "--low", tmp_path / "high.pth.tar", "--map", kind]
        others += ["--lambda", 0.0067, "--max-steps", 41]
        train_latent_e2e.main(arguments(photos, tmp_path / "map", *others, "--resume"))
    row = json.loads((tmp_path / "map" / "validation.jsonl").read_text())
    assert row["to_low_db"][0] > row["unmapped_db"][0] + gain_db
    model = load_model(tmp_path / "map" / "model.pth.tar")
    assert isinstance(model, TCM_Mapped) and model.contextual == (kind == "contextual")
    torch.save(model.state_dict(), tmp_path / "bare.pth")
    assert load_model(tmp_path / "bare.pth").fingerprint == model.fingerprint
    gain = torch.nn.functional.softsign(model.map.g_a.lmd_map).exp()
    if kind == "channel":
        assert torch.allclose(gain, torch.tensor(0.5), atol=0.06)
        assert torch.allclose(torch.nn.functional.softsign(model.map.g_s.lmd_map).exp(), torch.tensor(2.0), atol=0.2)
    picture = str(sorted(photos.iterdir())[0])
    assert eval_vbr.main(["-d", picture, "--real", "--checkpoint", str(tmp_path / "map" / "model.pth.tar")]) == 0
    with pytest.raises(Exception, match="two fixed-rate TCMs"):
        codecs[3] = tmp_path / "map" / "model.pth.tar"
        train_latent_e2e.main(arguments(photos, tmp_path / "other", *codecs, "--max-steps", 1))


def test_what_is_compiled_is_what_runs(tiny, image, monkeypatch):
    """With gradients and without; a network whose layers were called one by one would not be."""
    used = set()

    def compile_(network, dynamic):
        assert dynamic is False

        def call(*args):
            used.add(network)
            return network._call_impl(*args)

        compiled.append(network)
        network._compiled_call_impl = call

    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", compile_)
    compile_networks(tiny)
    tiny.train()(image, 1.0)
    assert used == set(compiled) and len(compiled) == 5 + 5 * tiny.num_slices
    used.clear()
    with torch.no_grad():
        tiny.eval()(image, 1.0)
    assert used == set(compiled)


def test_autocast_leaves_the_entropy_models_in_float32(photos, tmp_path, losses, monkeypatch):
    squared, forward = [], Float32GDN.forward
    monkeypatch.setattr(Float32GDN, "forward", lambda gdn, x: squared.append(x.shape) or forward(gdn, x))
    torch.manual_seed(0)
    export_model(tmp_path / "fresh.pth.tar", TCM_VBR(**TINY), [])
    more = ["--checkpoint", tmp_path / "fresh.pth.tar", "--max-steps", 1, "-bs", 1]  # fp16 takes long on a CPU
    more += ["--seed", 10]  # a large λ is drawn first: its gradients overflow
    train(photos, tmp_path / "float32", *more)
    for precision in ("bf16", "fp16"):
        train(photos, tmp_path / precision, *more, "--amp", precision)
        assert losses[-1] == pytest.approx(losses[0], rel=0.01) and losses[-1] != losses[0]
        record = read_checkpoint(tmp_path / precision / "model.pth.tar")["training"][-1]
        assert record["settings"]["amp"] == precision
        assert record["skipped_steps"] == (precision == "fp16")  # the scale of its gradients is found by halving
        assert bool(squared) == (precision == "fp16")
