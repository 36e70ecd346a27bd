"""Coding tables fitted to symbols: the mixture that they come from, levels that never occur, and files that decode."""

import copy

import numpy as np
import pytest
import torch
from compressai.entropy_models import GaussianConditional

from models import TCM_VBR
from models.coding.tables import rounded_gaussians
from utils.checkpoint import load_model, read_checkpoint
from utils.codec.analyzed import AnalyzedImage
from utils.codec.decode import decode
from utils.files import BUNDLED
from utils.images import read_image
from utils.pictures import find_images_or_samples
from utils.training.fit_tables import fit_mixtures, fit_tables, quantized_cdf

LEVELS = torch.tensor([0.11, 0.3, 1.0, 3.0, 9.0])


def code_length(counts: torch.Tensor, probabilities: torch.Tensor) -> float:
    return float(-(counts * probabilities.clamp(min=1e-30).log2()).sum() / counts.sum())


def bits(model: TCM_VBR, picture: torch.Tensor, index: float) -> float:
    return AnalyzedImage(model, picture).quantize(index).bits


def test_symbols_of_a_mixture_are_coded_at_their_entropy():
    """A third of the symbols of the level σ = 1 have σ = 3."""
    random, counts = np.random.default_rng(0), torch.zeros(5, 101, dtype=torch.float64)
    scales = np.where(random.random(200_000) < 1 / 3, 3.0, 1.0)
    symbols = np.rint(random.normal(0, scales)).astype(int)
    counts[2] += torch.bincount(torch.from_numpy(symbols).clamp(-50, 50) + 50, minlength=101)
    gaussians = rounded_gaussians(LEVELS, 50)
    truth = (2 * gaussians[2] + gaussians[3]) / 3
    fitted = fit_mixtures(counts, LEVELS)
    best = code_length(counts[2], truth)
    assert code_length(counts[2], fitted[2]) == pytest.approx(best, rel=1e-3)
    assert code_length(counts[2], gaussians[2]) > 1.1 * best
    for level in (0, 1, 3, 4):  # these never occurred
        assert torch.allclose(fitted[level], gaussians[level], atol=1e-4)


def test_tables_of_gaussians_are_those_of_compressai():
    gaussian = GaussianConditional(LEVELS.tolist())
    gaussian.update()
    reach = -int(gaussian.offset.min())
    cdf = quantized_cdf(gaussian, rounded_gaussians(LEVELS, reach))
    assert cdf.shape == gaussian.quantized_cdf.shape
    assert int((cdf - gaussian.quantized_cdf).abs().max()) <= 2  # in 65,536ths: theirs is computed in float32


def test_fitted_tables_make_smaller_files_that_decode(varied):
    """The tables of the tiny model's own symbols."""
    pictures = torch.stack([read_image(path)[:, :128, :128] for path in find_images_or_samples(None)[:4]])
    model = copy.deepcopy(varied)
    fit_tables(model, pictures.split(2), (0.0, 5.0))
    before, after = (sum(bits(m, picture, i) for picture in pictures for i in (0.0, 5.0)) for m in (varied, model))
    assert after < 0.99 * before
    assert model.fingerprint != varied.fingerprint
    analyzed = AnalyzedImage(model, pictures[0])
    assert decode(model, analyzed.write(analyzed.quantize(5.0)).data).shape == pictures[0].shape


@pytest.mark.parametrize("name, share", [("tcm_vbr_small", 0.995), ("depthconv_vbr", 0.997)])
def test_the_shipped_tables_are_fitted(name, share):
    """They save bits on a photograph that is not of the training set, and load as saved. With TCM small that is a
    percent; the context model of the default weights leaves less of what no Gaussian has (0.4 %)."""
    file = BUNDLED.with_name(f"{name}.pth.tar")
    model = load_model(file)
    stored = read_checkpoint(file)["state_dict"]["gaussian_conditional._quantized_cdf"]
    assert torch.equal(model.gaussian_conditional.quantized_cdf, stored)
    photo = read_image(find_images_or_samples(None)[1])[:, 20:276, 80:336]
    fitted = sum(bits(model, photo, float(index)) for index in range(6))
    assert not model.update()
    with pytest.warns(UserWarning, match="fitted to photographs are replaced"):
        model.update(force=True)
    assert fitted < share * sum(bits(model, photo, float(index)) for index in range(6))
