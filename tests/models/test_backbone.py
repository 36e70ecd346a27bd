"""Another backbone is one file and a line: a toy one, by what docs/architecture.md says, and what it works with."""

import sys
from dataclasses import dataclass

import pytest
import skimage.data
import torch
from compressai.entropy_models import EntropyBottleneck, GaussianConditional
from torch import nn

import eval_vbr
import train_vbr
from models import VariableRate, registry
from models.codec import Codec
from models.layers import Float32Conv
from models.weights import CodecConfig
from utils import cli
from utils.checkpoint import load_model, read_checkpoint
from utils.codec.decode import decode
from utils.codec.encode import encode
from utils.codec.request import EncodeRequest
from utils.images import save_image


@dataclass(frozen=True)
class ToyConfig(CodecConfig):
    M: int = 64
    num_slices: int = 2
    max_support_slices: int = 2
    hyper_channels: int = 16

    @classmethod
    def infer(cls, state_dict):
        return cls(M=state_dict["g_a.0.weight"].shape[0], num_slices=2 * int("heads.0.0.weight" in state_dict))


class Toy(Codec):
    Config = ToyConfig
    bytes_per_pixel = 4 * 64 / 256

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        M, C = self.M, self.config.hyper_channels
        self.g_a = nn.Sequential(Float32Conv(3, M, 17, stride=16, padding=8))
        self.g_s = nn.Sequential(nn.Conv2d(M, 3 * 256, 3, padding=1), nn.PixelShuffle(16))
        self.h_a = nn.Sequential(nn.Conv2d(M, C, 5, stride=4, padding=2))
        self.h_s = nn.Sequential(nn.Conv2d(C, 16 * M, 1), nn.PixelShuffle(4))
        self.heads = nn.ModuleList(nn.Sequential(nn.Conv2d(M + M // 2 * i, M, 1)) for i in range(2))
        self.entropy_bottleneck, self.gaussian_conditional = EntropyBottleneck(C), GaussianConditional(None)

    def hyper_synthesis(self, z_hat):
        return self.synthesize_hyper(self.h_s, z_hat)

    def predict(self, i, hyper, supports, corrected):
        return *self.run_networks([self.heads[i]], hyper, *supports).float().chunk(2, 1), None

    def correct(self, i, context, y_hat):
        return y_hat


class Toy_VBR(VariableRate, Toy):
    pass


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    monkeypatch.setitem(registry.BACKBONES, "Toy", __name__)
    monkeypatch.setitem(registry.MODULES, "Toy", __name__)
    monkeypatch.setitem(registry.MODULES, "Toy_VBR", __name__)
    monkeypatch.setitem(registry.PRESETS, "toy", ("Toy", {}))
    assert sys.modules[__name__].Toy is Toy


def test_it_trains_codes_and_is_evaluated_by_its_name(tmp_path, capsys):
    picture = torch.from_numpy(skimage.data.astronaut()).permute(2, 0, 1)
    save_image(tmp_path / "photos" / "a.png", picture)
    save_image(tmp_path / "photos" / "b.png", picture.flip(2))
    sizes = ["--max-steps", "2", "-bs", "1", "--patch-size", "128", "--val-size", "128", "--device", "cpu"]
    arguments = ["-d", str(tmp_path / "photos"), "--preset", "toy", *sizes, "--save_path"]
    with pytest.raises(cli.UserError, match="a Toy has no start in closed form: give --init random"):
        train_vbr.main([*arguments, str(tmp_path / "klt")])
    train_vbr.main([*arguments, str(tmp_path / "run"), "--init", "random"])
    file = str(tmp_path / "run" / "model.pth.tar")
    assert read_checkpoint(file)["model"] == "Toy_VBR"
    model = load_model(file)
    bare = tmp_path / "bare.pth"
    torch.save(model.state_dict(), bare)
    assert type(load_model(bare)) is Toy_VBR
    with torch.no_grad():
        model.g_a[0].weight.mul_(300)
        model.modnet_ga.mask.lmd_map.fc_layers[-1].weight.normal_(0.2)
    smallest, largest = (len(encode(model, picture, EncodeRequest(i)).data) for i in (0.0, 5.0))
    assert smallest != largest
    result = encode(model, picture[:, :201, :187], EncodeRequest(1.0))
    assert decode(model, result.data).shape == (3, 201, 187)
    eval_vbr.main(["-d", str(tmp_path / "photos"), "--checkpoint", file, "-l", "2"])
    assert "mean of 2" in capsys.readouterr().out


def test_sizes_that_the_laes_cannot_take_are_one_line():
    for wrong in ({"M": 48}, {"num_slices": 3}):
        with pytest.raises(ValueError, match="must be a multiple of 64 and of num_slices"):
            Toy_VBR(**wrong)
