"""Large pictures, regions, and DLM at an index and at a target: tests of this folder, with TCM_VBR."""

import pytest

from models import TCM_VBR
from tests.codec import test_large, test_quality_map, test_rate_control
from tests.codec.test_large import in_parts, in_tiles, tall  # noqa: F401
from tests.codec.test_quality_map import mask, test_places_have_the_scale_of_their_index  # noqa: F401
from tests.codec.test_quality_map import picture as large_picture  # noqa: F401
from tests.codec.test_rate_control import picture as analyzed  # noqa: F401
from tests.codec.test_refinement import (  # noqa: F401
    picture,
    test_a_target_is_kept,
    test_newtons_gradient_is_that_of_the_latents_themselves,
    test_pictures_may_be_refined_in_threads,
    test_refinement_is_never_worse_and_what_it_says,
    test_refinement_repeats_and_weights_stay,
)
from utils.codec.refinement import CURVATURES
from utils.codec.request import EncodeRequest


@pytest.fixture(scope="module")
def varied(varied_tcm) -> TCM_VBR:
    return varied_tcm


def test_a_file_with_a_map_decodes_to_what_the_encoder_saw(varied, large_picture, mask):  # noqa: F811
    test_quality_map.test_a_file_with_a_map_decodes_to_what_the_encoder_saw(varied, large_picture, mask)


def test_bits_are_counted_as_they_are_coded(analyzed):  # noqa: F811
    test_rate_control.test_bits_are_counted_as_they_are_coded(analyzed)


def test_a_picture_in_parts_is_the_same_picture(varied, tall, in_parts):  # noqa: F811
    test_large.test_a_picture_in_parts_is_the_same_picture(varied, tall, in_parts, EncodeRequest(2.0))


@pytest.mark.parametrize("curvatures", [None, CURVATURES])
def test_the_gradient_of_tiles_is_that_of_the_picture(varied, tall, in_tiles, monkeypatch, curvatures):  # noqa: F811
    arguments = "mse", False, curvatures
    test_large.test_the_gradient_of_tiles_is_that_of_the_picture(varied, tall, in_tiles, monkeypatch, *arguments)
