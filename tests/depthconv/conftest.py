"""`tiny` and `varied` are DepthConv_VBRs here, so that tests of other folders can be run with them."""

import pytest

from models import DepthConv_VBR
from tests.depthconv.tiny import made


@pytest.fixture(scope="session")
def made_tiny() -> DepthConv_VBR:
    return made()


@pytest.fixture(scope="session")
def varied(quick_model) -> DepthConv_VBR:
    return quick_model
