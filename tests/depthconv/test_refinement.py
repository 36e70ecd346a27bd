"""Gradients that DLM needs: tests of tests/codec/test_refinement.py, with DepthConv_VBR."""

from tests.codec.test_refinement import (  # noqa: F401
    test_checkpointing_gives_the_same_gradients,
    test_every_latent_has_a_gradient_of_its_rate,
    test_straight_through_gradients_change_neither_the_picture_nor_the_bits_of_a_file,
)
