"""What is the same with all networks is tested with a tiny DepthConv_VBR, in a fifth of the seconds of a TCM_VBR;
what depends on the networks, with a TCM_VBR too: tests/codec/test_tcm.py."""

import pytest

from models import DepthConv_VBR


@pytest.fixture(scope="session")
def varied(quick_model) -> DepthConv_VBR:
    return quick_model
