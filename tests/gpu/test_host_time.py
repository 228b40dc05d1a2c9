"""The host side of a warm call of the Triton backend: at most 25 µs forward and 40 backward."""

import os

import pytest

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("needs the compiler, not the interpreter", allow_module_level=True)

from lora_ext.backends import triton as backend
from lora_ext.backends.triton import tuning
from tests.gpu import host_time

SHAPE = (16, 4096, 4096, 16)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("direction", "name", "most_us"),
    [("forward", "in_loop", 25), ("forward", "two_launches", 25), ("forward", "decode", 25),
     ("backward", "two_launches", 40)],
)  # fmt: skip
def test_a_warm_call_is_quick(direction, name, most_us):
    """The best of several rounds: what else runs here only adds to it."""
    run = host_time.calls(*SHAPE)[direction == "backward"]
    with host_time.stand_in(with_triton=False), backend.regime(**{direction: name}):
        assert any(host_time.time_us(run) <= most_us for _ in range(5))


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
