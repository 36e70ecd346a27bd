"""Rate control and DLM: the tests of other folders, with DepthConv_VBR."""

from tests.codec.test_rate_control import (  # noqa: F401
    picture,
    test_a_cap_is_never_broken_and_nearly_used_up,
    test_bits_are_counted_as_they_are_coded,
    test_the_smallest_file_is_a_cap_that_can_be_met,
    test_three_trials_meet_a_target,
)
