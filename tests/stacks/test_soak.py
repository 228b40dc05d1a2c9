"""A few rounds of the long run, `python -m tests.stacks.soak`."""

import pytest

from tests.stacks import soak


@pytest.mark.slow
def test_rounds_agree_with_the_plain_layer_and_leak_nothing(tmp_path):
    number, _, early, late = soak.soak(seconds=60, rounds=soak.SETTLED + 10)
    assert number > soak.SETTLED
    soak.check(early, late)
