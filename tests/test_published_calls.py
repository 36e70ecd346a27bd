"""Call forms and command lines of the published scripts, and of CompressAI's tools."""

import pytest
import skimage.data
import torch

import eval_vbr
import online_training_vbr
import train_vbr
from models import TCM_VBR
from models.registry import from_preset
from utils.checkpoint import read_checkpoint
from utils.cli.training_arguments import check_run_arguments
from utils.images import save_image


def test_what_compress_returns_is_what_decompress_takes(tiny, image):
    coded = tiny.compress(image, 2.5)
    with torch.no_grad():
        expected = tiny(image, 2.5)["x_hat"].clamp(0, 1)
    assert torch.equal(tiny.decompress(**coded)["x_hat"], expected)


def test_latents_are_coded_as_the_online_script_asks(tiny, image):
    with torch.no_grad():
        y = tiny(image, 1)["latent"]
        z = tiny.h_a(y)
        out = tiny.test_fromlatent(y, z, 1)
        expected = tiny.forward_fromlatent(y, z, 1)["x_hat"].clamp(0, 1)
    assert out["strings"] == tiny.compress(image, 1)["strings"]
    assert torch.equal(out["x_hat"], expected)


def test_weights_that_do_not_fit_are_a_runtime_error_as_in_pytorch(tiny):
    with pytest.raises(RuntimeError, match="do not fit TCM_VBR"):
        tiny.load_state_dict({"a": torch.zeros(1), "entropy_bottleneck.quantiles": torch.zeros(1)})


def test_folders_of_the_published_layout(checkpoint, tmp_path, capsys):
    for part, picture in (("train", skimage.data.astronaut()), ("test", skimage.data.coffee())):
        save_image(tmp_path / "set" / part / f"{part}.png", torch.from_numpy(picture).permute(2, 0, 1)[:, :128, :128])
    common = ["--checkpoint", checkpoint, "--device", "cpu"]
    sizes = ["--patch-size", "128", "--val-size", "128", "--batch_size", "1", "--max-steps", "1"]
    published = ["--save", "--test-batch-size", "8", "--skip_epoch", "0", "--continue_train", "--seed", "100.0"]
    folder = str(tmp_path / "set")
    train_vbr.main(["-d", folder, "--val", folder, *common, *sizes, *published, "--save_path", str(tmp_path / "run")])
    record = read_checkpoint(tmp_path / "run" / "model.pth.tar")["training"][-1]
    assert record["photographs"] == 1 and record["settings"]["batch_size"] == 1 and record["settings"]["seed"] == 100
    told = capsys.readouterr().err
    assert f"has train and test: {tmp_path / 'set' / 'train'} is used" in told
    for flag in ("--save", "--test-batch-size", "--skip_epoch", "--continue_train"):
        assert f"{flag}: an option of published scripts" in told
    eval_vbr.main(["-d", folder, *common, "-l", "1", "--per-image", "--clip_max_norm", "1.0"])
    assert "test" in capsys.readouterr().out
    online_training_vbr.main(["-d", folder, *common, "--lmd_index", "1", "--total_steps", "1", "--real"])
    assert "test" in capsys.readouterr().out


def test_N_alone_names_a_published_network():
    args = train_vbr.parse(["-d", "x", "--N", "96", "-e", "1"])
    train_vbr.check(args)
    assert args.preset == "full" and from_preset(args.preset, N=args.N).arguments == TCM_VBR(N=96).arguments
    args = train_vbr.parse(["-d", "x", "-e", "1"])
    train_vbr.check(args)
    assert args.preset == "small" and args.batch_size == 8
    with pytest.raises(SystemExit):
        train_vbr.parse(["-d", "x", "--seed", "1.5"])
    check_run_arguments(train_vbr.parse(["-d", "x", "--seed", "1e2", "-e", "1"]))
