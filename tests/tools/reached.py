"""What each test runs: the lines of some Python files, or the faults of a library of C++.

So a fault is tried by the tests that can see it alone, the quickest first.
"""

import ctypes
import itertools
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import CodeType, FrameType

import pytest

from tests.tools.switched import MOST_FAULTS

Place = tuple[str, int]  # a file and its line, or "" and the number of a fault
BEFORE = ""  # stands for what runs outside of tests, by imports


@dataclass
class Reached:
    """The places that each test ran, and the seconds that it took."""

    places: dict[str, set[Place]] = field(default_factory=lambda: {BEFORE: set()})
    seconds: dict[str, float] = field(default_factory=dict)

    def tests_of(self, places: set[Place]) -> list[str]:
        """Return the tests that run one of some places, the quickest first."""
        by_imports = not places.isdisjoint(self.places[BEFORE])
        found = [t for t in self.seconds if by_imports or not places.isdisjoint(self.places[t])]
        return sorted(found, key=self.seconds.__getitem__)

    def within(self, tests: list[str], seconds: float) -> list[str]:
        """Return as many of some tests as run in some seconds."""
        ends = itertools.accumulate(self.seconds[test] for test in tests)
        return [test for test, end in zip(tests, ends, strict=True) if end <= seconds]


class Recorder:
    """A plugin of pytest that fills a Reached."""

    def __init__(self, files: set[str]) -> None:
        self.reached, self.files = Reached(), files
        self.now = self.reached.places[BEFORE]
        self.names: dict[CodeType, str] = {}

    def start(self) -> None:
        """Trace this thread and those to come."""
        sys.settrace(self._calls)
        threading.settrace(self._calls)

    def _calls(self, frame: FrameType, event: str, argument: object) -> Callable | None:
        return self._lines if frame.f_code.co_filename in self.files else None

    def _lines(self, frame: FrameType, event: str, argument: object) -> Callable:
        self.now.add((frame.f_code.co_filename, frame.f_lineno))
        return self._lines

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        """Note what one test runs."""
        start, self.now = time.perf_counter(), self.reached.places.setdefault(item.nodeid, set())
        result = yield
        self.reached.seconds[item.nodeid] = time.perf_counter() - start
        self.now = self.reached.places[BEFORE]
        return result


class RecorderOfFaults(Recorder):
    """The same for the faults of a library, which notes by itself which of them it passes."""

    def __init__(self, library: Path) -> None:
        super().__init__(set())
        flags = ctypes.c_ubyte * MOST_FAULTS
        self.flags = flags.in_dll(ctypes.CDLL(str(library)), "lora_ext_reached")

    def start(self) -> None:
        """Have nothing to start."""

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        """Note what one test runs."""
        ctypes.memset(self.flags, 0, MOST_FAULTS)
        result = yield from super().pytest_runtest_protocol(item)
        passed = {("", number) for number, flag in enumerate(self.flags) if flag}
        self.reached.places[item.nodeid] |= passed
        return result


class Chosen:
    """A plugin of pytest that runs some tests alone, in a given order."""

    def __init__(self, tests: list[str]) -> None:
        self.place = {test: number for number, test in enumerate(tests)}

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Keep those tests."""
        items[:] = [item for item in items if item.nodeid in self.place]
        items.sort(key=lambda item: self.place[item.nodeid])
