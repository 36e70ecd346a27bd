"""Call forms and command lines of the published scripts, and of CompressAI's tools."""

import copy

import pytest
import skimage.data
import torch

import eval_vbr
import models.tcm
import online_training_vbr
import train_latent_e2e
import train_vbr
from models import TCM, TCM_VBR, Block, SWAtten, SwinBlock, TCMConfig
from models.registry import from_preset
from tests.conftest import TINY
from utils.checkpoint import read_checkpoint
from utils.cli.training_arguments import check_run_arguments
from utils.cli.training_stages import new_model
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


def test_the_rate_has_its_published_names(tiny, image):
    with torch.no_grad():
        out = tiny(image, 2)
        latents = out["latent"], tiny.h_a(out["latent"])
        assert torch.equal(tiny(image, lmd_test=2)["x_hat"], out["x_hat"])
        given = torch.full((1, 1), 2.0)
        assert torch.equal(tiny.forward_fromlatent(*latents, lmd_index=given)["x_hat"], out["x_hat"])
        with pytest.raises(ValueError, match="needs a rate index in evaluation"):
            tiny(image, lmd_test=-1)
        assert tiny.train()(image, lmd_test=-1)["lmd_index"].shape == (1,)
    tiny.eval()
    coded = tiny.compress(image, lmd_test=2)
    assert coded["strings"] == tiny.test_fromlatent(*latents, lmd_index=given)["strings"]
    x_hat = tiny.decompress(coded["strings"], coded["shape"], lmd_test=2)["x_hat"]
    assert torch.equal(x_hat, out["x_hat"].clamp(0, 1))


def test_what_the_published_model_file_offers():
    x = torch.rand(1, 32, 16, 8)
    for block in (SwinBlock(32, 32, 16, 8, 0), SWAtten(32, 32, 16, 8, 0, inter_dim=16)):
        assert block(x).shape == x.shape
    with pytest.raises(ValueError, match="output_dim is 32 too"):
        Block(32, 64, 16, 8, 0)
    names = {"WMSA", "ConvTransBlock", "fcn", "mask", "LAE", "ste_round", "conv1x1", "get_scale_table", "SCALES_MIN"}
    assert names < set(models.tcm.__all__) and all(getattr(models, name) for name in models.tcm.__all__)


def test_arguments_of_the_published_constructor():
    assert TCMConfig().N == 128
    assert TCM(**TINY | {"max_support_slices": -1}).config == TCMConfig(**TINY | {"max_support_slices": 2})
    with pytest.warns(UserWarning, match="no such argument: quality"):
        assert TCM_VBR(**TINY, window_size=8, quality=3).config == TCMConfig(**TINY)
    with pytest.raises(ValueError, match="window_size is 8 in every TCM, not 4"):
        TCM(**TINY, window_size=4)


def test_a_wrapper_loads_other_weights_after_a_picture_was_coded(tiny, image):
    """As Lightning's modules do: their load_state_dict does not call that of the codec."""
    ours, theirs = (torch.nn.ModuleDict({"codec": codec}) for codec in (tiny, copy.deepcopy(tiny)))
    other = theirs["codec"]
    with torch.no_grad():
        other.g_a[-1].weight.mul_(0.9)
        cdf = other.gaussian_conditional.quantized_cdf.clone()
        cdf[:, 1] += 1
        other.set_tables_of_y(cdf)
    expected = other.compress(image, 2)["strings"]
    assert ours["codec"].compress(image, 2)["strings"] != expected
    fingerprint = ours["codec"].fingerprint
    ours.load_state_dict(theirs.state_dict())
    assert ours["codec"].compress(image, 2)["strings"] == expected
    assert ours["codec"].fingerprint == other.fingerprint != fingerprint


def test_weights_that_do_not_fit_are_a_runtime_error_as_in_pytorch(tiny):
    with pytest.raises(RuntimeError, match="do not fit TCM_VBR"):
        tiny.load_state_dict({"a": torch.zeros(1), "entropy_bottleneck.quantiles": torch.zeros(1)})


def test_folders_of_the_published_layout(checkpoint, tmp_path, capsys):
    for part, picture in (("train", skimage.data.astronaut()), ("test", skimage.data.coffee())):
        save_image(tmp_path / "set" / part / f"{part}.png", torch.from_numpy(picture).permute(2, 0, 1)[:, :128, :128])
    common = ["--checkpoint", checkpoint, "--device", "cpu"]
    sizes = ["--patch-size", "128", "--val-size", "128", "--batch_size", "1", "--max-steps", "1"]
    published = ["--save", "--test-batch-size", "8", "--skip_epoch", "0", "--continue_train", "--seed", "100.0"]
    published += ["--lr_epoch", "45", "48", "-m", "bmshj2018-factorized", "--cuda"]
    folder = str(tmp_path / "set")
    train_vbr.main(["-d", folder, "--val", folder, *common, *sizes, *published, "--save_path", str(tmp_path / "run")])
    record = read_checkpoint(tmp_path / "run" / "model.pth.tar")["training"][-1]
    assert record["photographs"] == 1 and record["settings"]["batch_size"] == 1 and record["settings"]["seed"] == 100
    told = capsys.readouterr().err
    assert f"has train and test: {tmp_path / 'set' / 'train'} is used" in told
    for flag in ("--save", "--test-batch-size", "--skip_epoch", "--continue_train", "--lr_epoch", "-m"):
        assert f"{flag}: an option of published scripts" in told
    eval_vbr.main(["-d", folder, *common, "-l", "1", "--per-image", "--clip_max_norm", "1.0"])
    assert "test" in capsys.readouterr().out
    online_training_vbr.main(["-d", folder, *common, "--lmd_index", "1", "--total_steps", "1", "--real"])
    assert "test" in capsys.readouterr().out


def test_N_alone_names_a_published_network():
    args = train_vbr.parse(["-d", "x", "--N", "96", "-e", "1"])
    train_vbr.check(args)
    assert new_model(args).arguments == TCM_VBR(N=96).arguments
    args = train_vbr.parse(["-d", "x", "-e", "1"])
    train_vbr.check(args)
    assert new_model(args).arguments == from_preset("small").arguments and args.batch_size == 8
    with pytest.raises(SystemExit):
        train_vbr.parse(["-d", "x", "--seed", "1.5"])
    check_run_arguments(train_vbr.parse(["-d", "x", "--seed", "1e2", "-e", "1"]))
    train_latent_e2e.parse(["-d", "x", "--high", "a", "--low", "b", "--N", "64", "--type", "mse", "--save"])
