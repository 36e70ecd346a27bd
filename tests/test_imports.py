"""What is imported before a picture is coded, and that CompressAI is whole for other code."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
HEAVY = ["torch_geometric", "torchvision", "pandas", "timm.models", "matplotlib", "torch._dynamo"]
HEAVY += ["scipy.stats.distributions"]


def run(code: str) -> str:
    command = [sys.executable, "-W", "ignore", "-c", code]
    return subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True, timeout=300).stdout


FIRST = ["from models.tcm import TCM_VBR", "from utils.images import read_image", "import models"]


@pytest.mark.parametrize("first", FIRST)
def test_coding_imports_no_package_that_it_does_not_use(first):
    code = f"""{first}
import sys, torch
before = set(sys.modules)  # PyTorch itself imports some of them in some versions
from models.tcm import TCM_VBR
from utils.checkpoint import load_model
from utils.codec.decode import decode
from utils.codec.encode import EncodeRequest, encode
from utils.files import BUNDLED
data = encode(load_model(BUNDLED), torch.zeros(3, 100, 100, dtype=torch.uint8), EncodeRequest(2.0)).data
assert decode(load_model(BUNDLED), data).shape == (3, 100, 100)
print([name for name in {HEAVY} if name in sys.modules and name not in before])
"""
    assert run(code).strip() == "[]"


def test_compressai_and_scipy_are_whole_for_other_code():
    run("""from models import TCM_VBR
import compressai, compressai.models.google, scipy.stats
model = TCM_VBR(N=32, M=64, num_slices=1, max_support_slices=1)
model.update()
assert isinstance(model, compressai.models.CompressionModel) and isinstance(compressai.__version__, str)
assert compressai.zoo.bmshj2018_hyperprior and compressai.available_entropy_coders() == ["ans"]
from compressai.models import *
assert issubclass(JointAutoregressiveHierarchicalPriors, compressai.models.google.MeanScaleHyperprior)
from compressai.latent_codecs import HyperpriorLatentCodec, LatentCodec
assert issubclass(HyperpriorLatentCodec, LatentCodec) and compressai.layers.GDN
import timm
assert timm.create_model and timm.layers.DropPath
from scipy import stats
assert abs(stats.norm.ppf(0.975) - 1.96) < 1e-3 and scipy.stats.laplace
""")


@pytest.mark.parametrize("first", [
    "from timm.models import create_model",
    "import timm.models.vision_transformer",
    "from timm.data import create_transform",
    "import timm.optim, timm.layers.drop",
])
def test_modules_of_timm_that_want_their_package_are_found(first):
    run(f"""import models
{first}
import sys, timm, timm.models
assert timm.models is sys.modules["timm.models"] and timm.create_model is timm.models.create_model
assert timm.models.__spec__.loader is timm.models.__loader__ and timm.models.__path__
import models.layers
assert timm.layers.DropPath is models.layers.DropPath
timm.version.__version__ = "changed"
import importlib
assert importlib.reload(timm.version).__version__ != "changed"
""")


def test_threads_wait_while_one_of_them_runs_a_package():
    run("""from concurrent.futures import ThreadPoolExecutor
from models import TCM_VBR
models = [TCM_VBR(N=32, M=64, num_slices=1, max_support_slices=1) for _ in range(3)]
with ThreadPoolExecutor(3) as pool:  # scipy.stats.norm is asked for by all
    list(pool.map(lambda model: model.update(), models))
""")


def test_the_cause_is_told_again_where_a_package_cannot_be_imported():
    run("""import sys
sys.modules["torch_geometric"] = None
import models, compressai
for _ in range(2):
    try:
        compressai.__version__
    except ModuleNotFoundError as error:
        assert "torch_geometric" in str(error)
    else:
        raise AssertionError
""")


def test_a_package_that_was_imported_before_is_left_alone():
    run("""import compressai
from models import TCM_VBR
import sys
assert "torch_geometric" in sys.modules and compressai.models.CompressionModel in TCM_VBR.__mro__
""")
