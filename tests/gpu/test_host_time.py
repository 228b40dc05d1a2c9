"""The host side of a warm call of the Triton backend, counted in calls of our own functions.

Microseconds are the machine's: `python -m tests.gpu.host_time` prints them.
"""

import os
import sys

import pytest

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("needs the compiler, not the interpreter", allow_module_level=True)

from lora_ext.backends import triton as backend
from lora_ext.backends.triton import tuning
from tests.gpu import host_time

SHAPE = (16, 4096, 4096, 16)
OURS = os.path.dirname(backend.__file__)


@pytest.mark.parametrize(
    ("direction", "name", "most"),
    [("forward", "in_loop", 12), ("forward", "two_launches", 14), ("forward", "decode", 12),
     ("backward", "two_launches", 14)],
)  # fmt: skip
def test_a_warm_call_calls_few_functions(direction, name, most):
    """Of 25 µs for a forward and 40 for a backward."""
    called = []

    def profile(frame, event, argument):
        if event == "call" and frame.f_code.co_filename.startswith(OURS):
            called.append(frame.f_code.co_name)

    run = host_time.calls(*SHAPE)[direction == "backward"]
    with host_time.stand_in(with_triton=False), backend.regime(**{direction: name}):
        run()
        before = sys.getprofile()
        sys.setprofile(profile)
        try:
            run()
        finally:
            sys.setprofile(before)
    assert 0 < len(called) <= most, called


def test_a_warm_call_looks_its_plan_up_and_asks_nothing_again(monkeypatch):
    forward, backward = host_time.calls(*SHAPE)
    monkeypatch.setattr(tuning, "_plans", {})
    forced = backend.regime(forward="decode", backward="two_launches")
    with host_time.stand_in(with_triton=False), forced:
        forward(), backward()
        for asked in ("forward_problem", "backward_problem", "planned", "choose"):
            monkeypatch.delattr(tuning, asked)
        forward(), backward()
    assert len(tuning._plans) == 2
