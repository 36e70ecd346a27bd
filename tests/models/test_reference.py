"""Numbers of the reference implementation, and golden numbers of this one."""

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
import skimage.data
import torch

from models import TCM, TCM_VBR
from tests.conftest import SHARED, golden_model
from tests.reference.fill_weights import fill_weights
from utils.images import read_image, to_float

MODELS = {"TCM": TCM, "TCM_VBR": TCM_VBR}
HERE = Path(__file__).parents[1] / "reference"  # on photographs of scikit-image
KODAK = SHARED / "reference"
GOLDEN = Path(__file__).parents[1] / "golden.json"


@pytest.mark.parametrize("name", sorted(MODELS))
def test_every_name_and_shape_is_the_published_one(name):
    with gzip.open(HERE / "state_dict_shapes.json.gz") as file:
        published = json.load(file)[f"{name}(N=64, M=320)"]
    assert {key: list(value.shape) for key, value in MODELS[name](N=64).state_dict().items()} == published


def close(ours: torch.Tensor, theirs: np.ndarray) -> bool:
    return float((ours - torch.from_numpy(theirs)).abs().max()) <= 2e-5 * np.abs(theirs).max()


def run_case(case: dict, folder: Path, image: torch.Tensor) -> float:
    """Check all of a case but its reconstruction; return the share of that within 2e-4.

    Args:
        folder: of the reference outputs.
        image: uint8 `[3, H, W]`, of which the case is a crop.
    """
    arguments = {key: case[key] for key in ("num_slices", "max_support_slices") if key in case}
    model = MODELS[case["model"]](N=64, **arguments).eval()
    fill_weights(model.state_dict(), case["seed"])
    model.update(force=True)
    top, left = case["top"], case["left"]
    x = to_float(image[:, top : top + case["height"], left : left + case["width"]])
    reference = np.load(folder / case["file"])
    index = case.get("index")
    with torch.no_grad():
        out = model(x, index)
        coded = model.compress(x, index)
        decoded = model.decompress(coded["strings"], coded["shape"], index)["x_hat"]
        z = model.h_a(out["latent"])
    assert close(out["latent"], reference["y"])
    assert close(z, reference["z"])
    for name, strings in zip(("y", "z"), coded["strings"], strict=True):
        bits = float(-out["likelihoods"][name].double().log2().sum())
        assert bits == pytest.approx(float(reference[f"bits_{name}"]), rel=1e-4)
        assert sum(map(len, strings)) == pytest.approx(int(reference[f"bytes_{name}"]), rel=2e-3)
    if "mean_log_m" in reference:
        assert float(coded["m_y"]) == pytest.approx(float(reference["mean_log_m"]), abs=1e-6)
    assert torch.equal(decoded, out["x_hat"].clamp(0, 1))
    difference = (out["x_hat"][:, :, ::2, ::2] - torch.from_numpy(reference["x_hat"])).abs()
    assert difference.max() < 0.15 and (difference < 2e-2).float().mean() >= 0.95
    return float((difference < 2e-4).float().mean())


def test_reference_cases_on_photographs_of_scikit_image():
    cases = json.loads((HERE / "cases.json").read_text())
    pictures = (torch.from_numpy(getattr(skimage.data, case["image"])()).permute(2, 0, 1) for case in cases)
    shares = [run_case(case, HERE, picture) for case, picture in zip(cases, pictures, strict=True)]
    # A symbol on a rounding boundary may flip under another order of summation, here as below in one case.
    assert len(shares) == 2 and max(shares) >= 0.995, shares


@pytest.mark.skipif(not SHARED.is_dir(), reason="no shared folder beside the project")
def test_reference_cases_on_kodak():
    cases = json.loads((KODAK / "cases.json").read_text())
    folder = SHARED / "data" / "kodak"
    shares = [run_case(case, KODAK, read_image(folder / f"{case['image']}.png")) for case in cases]
    assert len(shares) == 5
    # One symbol on a rounding boundary may flip under another order of summation: in one case of five, and in two on
    # processors without AVX-512.
    flips = 1 if "AVX512" in torch.backends.cpu.get_cpu_capability() else 2
    assert sorted(shares)[flips] >= 0.995, shares


def golden_numbers() -> dict:
    """What the golden model makes of a synthetic picture."""
    model, random = golden_model()
    x = torch.from_numpy(random.uniform(size=(1, 3, 128, 128))).float()
    with torch.no_grad():
        out = model(x, 1.5)
        coded = model.compress(x, 1.5)
    return {
        "y": out["latent"].flatten()[::53].tolist(),
        "x_hat": out["x_hat"].flatten()[::997].tolist(),
        "m_y": float(coded["m_y"]),
        "bits_y": float(-out["likelihoods"]["y"].log2().sum()),
        "bits_z": float(-out["likelihoods"]["z"].log2().sum()),
    }


def test_own_golden_numbers():
    """Made by code that passes the cases above: GOLDEN.write_text(json.dumps(golden_numbers()))."""
    golden = json.loads(GOLDEN.read_text())
    ours = golden_numbers()
    scale = max(map(abs, golden["y"]))
    assert ours["y"] == pytest.approx(golden["y"], abs=2e-5 * scale)
    assert ours["m_y"] == pytest.approx(golden["m_y"], abs=1e-6)
    assert ours["bits_y"] == pytest.approx(golden["bits_y"], rel=1e-4)
    assert ours["bits_z"] == pytest.approx(golden["bits_z"], rel=2e-2)
    assert np.mean(np.abs(np.subtract(ours["x_hat"], golden["x_hat"])) < 2e-2) >= 0.95


def test_golden_numbers_notice_a_mistake(monkeypatch):
    """A shift in the wrong direction, say."""
    golden = json.loads(GOLDEN.read_text())
    roll = torch.Tensor.roll
    monkeypatch.setattr(torch.Tensor, "roll", lambda x, shifts, dims: roll(x, tuple(-s for s in shifts), dims))
    assert golden_numbers()["y"] != pytest.approx(golden["y"], abs=2e-5 * max(map(abs, golden["y"])))
