"""`tiny` is a DepthConv_VBR here, so that tests of other folders can be run with it."""

import pytest

from models import DepthConv_VBR
from tests.depthconv.tiny import made


@pytest.fixture(scope="session")
def made_tiny() -> DepthConv_VBR:
    return made()
