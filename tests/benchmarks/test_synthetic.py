"""One picture of each kind that no photograph has."""

import torch

from utils.benchmarks import synthetic
from utils.images import read_image
from utils.training.synthetic import KINDS


def test_there_is_one_picture_of_each_kind(photos, tmp_path, capsys):
    synthetic.main([str(tmp_path / "made"), "-d", str(photos)])
    assert f"{len(KINDS)} pictures" in capsys.readouterr().out
    pictures = {path.stem: read_image(path) for path in (tmp_path / "made").iterdir()}
    assert set(pictures) == {kind.__name__ for kind in KINDS}
    photograph = read_image(photos / "p0.png")
    assert all(image.shape == photograph.shape and not torch.equal(image, photograph) for image in pictures.values())
