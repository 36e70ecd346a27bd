"""The bytes of a file do not change: a golden picture and its file, of weights that are the same everywhere."""

from pathlib import Path

import torch

from tests.conftest import golden_model
from utils.codec.decode import decode
from utils.codec.encode import encode
from utils.codec.request import EncodeRequest
from utils.images import read_image

PICTURE, FILE = (Path(__file__).parent / name for name in ("golden.png", "golden.tvbr"))


def golden_file() -> bytes:
    """FILE was written with this. Where its bytes change, files of before no longer decode.

    The picture was chosen so that no latent lies within 5e-4 of a rounding boundary and no σ within 3e-5 of one of the
    scale table: other processors, thread counts and memory formats give the same bytes.
    """
    return encode(golden_model()[0], read_image(PICTURE), EncodeRequest(1.5, nearest=True)).data


def test_the_bytes_of_a_file():
    assert golden_file() == FILE.read_bytes()


def test_the_golden_file_decodes():
    """Its checksum covers every symbol."""
    model, _ = golden_model()
    decoded = decode(model, FILE.read_bytes())
    assert decoded.shape == read_image(PICTURE).shape and decoded.dtype == torch.uint8


def test_a_changed_weight_changes_the_bytes():
    model, _ = golden_model()
    with torch.no_grad():
        model.cc_mean_transforms[0][-1].bias += 0.1
    assert encode(model, read_image(PICTURE), EncodeRequest(1.5, nearest=True)).data[38:] != FILE.read_bytes()[38:]
