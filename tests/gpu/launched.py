"""Tests of Triton's kernels: which ones a call launches, and a test that runs once."""

import os
from collections.abc import Callable

import pytest

from lora_ext.backends.triton import launches, tuning
from tests.conftest import Backend

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def run_once(backend: Backend, variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip a test but in the interpreter and next to one variant, and make its plans again."""
    if str(backend) != variant or not INTERPRETED:
        pytest.skip("runs once, in the interpreter")
    monkeypatch.setattr(tuning, "_plans", {})


def record_launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a list that each launch from now on adds its kernel's name to."""
    names, launch = [], launches.launch

    def record(kernel, grid, arguments):
        names.append(kernel.__name__)
        launch(kernel, grid, arguments)

    monkeypatch.setattr(launches, "launch", record)
    return names


def launches_of(run: Callable[[], object]) -> list[tuple]:
    """Return (kernel, grid, arguments) of each launch that `run` makes; none is launched."""
    found: list[tuple] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launches, "launch", lambda *launch: found.append(launch))
        run()
    return found
