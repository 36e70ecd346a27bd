"""Streams: tests of tests/models, with DepthConv_VBR."""

import torch

from tests.models.test_tcm import (  # noqa: F401
    test_decoding_gives_what_forward_gives,
    test_each_image_has_its_own_index,
    test_forms_of_the_index_agree,
    test_from_latent_equals_forward,
    test_gradients_reach_the_latent,
    test_hyper_latent_is_coded_as_compressai_codes_it,
    test_index_is_required_in_evaluation_and_drawn_in_training,
    test_m_stays_within_its_bounds,
    test_other_sides_are_refused,
    test_symbols_beyond_the_tables_survive,
)


def test_the_latent_is_float32_under_autocast(tiny):
    x = torch.rand(1, 3, 128, 128)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert tiny.features(x).dtype == torch.float32
        assert tiny.g_a[:3](x).dtype == torch.bfloat16  # before the strided convolution
