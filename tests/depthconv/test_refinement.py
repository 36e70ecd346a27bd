"""DLM: the tests of tests/codec/test_refinement.py, with DepthConv_VBR."""

from tests.codec.test_refinement import (  # noqa: F401
    picture,
    test_a_target_is_kept,
    test_checkpointing_gives_the_same_gradients,
    test_every_latent_has_a_gradient_of_its_rate,
    test_refinement_is_never_worse_and_what_it_says,
    test_refinement_repeats_and_weights_stay,
    test_straight_through_gradients_change_neither_the_picture_nor_the_bits_of_a_file,
)
