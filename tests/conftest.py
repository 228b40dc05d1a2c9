"""Fixtures: every backend that can run here, one after the other, and poisoned memory."""

import contextlib
import ctypes
import importlib.util
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from unittest import mock

import pytest
import torch

from lora_ext import functional
from lora_ext.backends import BACKENDS
from lora_ext.backends.triton import regime
from lora_ext.call import Call, LowRank, Weight
from lora_ext.testing import Linear

if os.environ.get("TRITON_INTERPRET") == "1":
    from tests.gpu import interpreter

    interpreter.repair()


@dataclass(frozen=True)
class Backend:
    """A backend to test: its name, and for a variant what to set around each test."""

    name: str
    variant: str = ""
    around: Callable[[], AbstractContextManager[object]] = contextlib.nullcontext
    slow: bool = False  # leave out the problem that crosses every block size

    def __str__(self) -> str:
        """As in a test id."""
        return f"{self.name}-{self.variant}" if self.variant else self.name

    @property
    def interpreted(self) -> bool:
        """Whether its kernels run in Triton's interpreter, one program after the other."""
        return self.name == "triton" and os.environ.get("TRITON_INTERPRET") == "1"

    @property
    def default_backward(self) -> bool:
        """Whether it is a variant of the forward alone: its backward is the unvaried one's."""
        return bool(self.variant) and "backward" not in self.around.keywords

    @property
    def linear(self) -> Linear:
        """`lora_linear` with this backend asked for by name; skips what it refuses."""
        asked = linear_of(self.name)

        def linear(x, weight, bias, A, B, alpha, *, keep=None, codes=None):
            base = codes or (None if weight is None else Weight(weight))
            call = Call(x, base, bias, LowRank(A, B, alpha, keep))
            if (reason := BACKENDS[self.name].unsupported(call)) is not None:
                pytest.skip(f"{self.name} {reason}")  # test_backends.py holds what it may refuse
            return asked(x, weight, bias, A, B, alpha, keep=keep, codes=codes)

        return linear


def linear_of(backend: str, module: ModuleType = functional) -> Linear:
    """Return `lora_linear` by one backend, as lora_ext.testing calls it.

    With `keep` that is the mask that dropout draws, and without a weight the low-rank part alone;
    with `codes` these are the weight.
    `module` is functional.py, or a changed copy of it.
    """

    def linear(x, weight, bias, A, B, alpha, *, keep=None, codes=None):
        weight = weight if codes is None else codes
        if keep is not None:
            with mock.patch.object(module, "draw_keep", lambda *_: keep):  # 1 / (1 - p) is 2
                return module.adapted(x, weight, bias, A, B, alpha / 2, backend, 0.5)
        if weight is None or codes is not None:
            return module.adapted(x, weight, bias, A, B, alpha, backend)
        return module.lora_linear(x, weight, bias, A, B, alpha, backend=backend)

    return linear


def small_call(device: str = "cpu", dtype: torch.dtype = torch.float32) -> Call:
    """Return a call of one element: what a backend is asked about to know if it is there."""
    one = torch.ones(1, 1, device=device, dtype=dtype)
    return Call(one, Weight(one), None, LowRank(one, one, 1.0))


# The one list of what the tests run over: all backends, and here the further variants of one. The
# instruction sets of "cpp" are chosen once a process: test_isa.py. Those of "triton" run on a GPU,
# and in Triton's interpreter where TRITON_INTERPRET=1 is set: a job of its own in the Makefile.
VARIANTS: dict[str, list[Backend]] = {
    "triton": [
        Backend("triton", name, partial(regime, **forced), slow=True)
        for name, forced in {
            "in_loop": {"forward": "in_loop", "descriptors": False},
            "two_launches": {
                "forward": "two_launches",
                "backward": "two_launches",
                "group": "joint",
            },
            "descriptors": {
                "forward": "two_launches",
                "backward": "two_launches",
                "descriptors": True,
                "group": "joint",
            },
            "persistent": {"forward": "persistent", "backward": "persistent", "group": "joint"},
            "decode": {"forward": "decode"},
            "torch_base": {"forward": "torch_base", "backward": "torch_base", "group": "joint"},
            "addmm": {"forward": "addmm", "backward": "addmm"},
        }.items()
    ],
}


def backends_that_run_on(device: str) -> list[Backend]:
    """Return the backends that take a device's tensors on this machine, with their variants."""
    call = small_call(device)
    names = [name for name, b in BACKENDS.items() if b.unsupported(call) is None]
    return [b for name in names for b in (Backend(name), *VARIANTS.get(name, ()))]


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add --backends and --device."""
    parser.addoption("--backends", help="only tests over these: cpp, triton, triton-decode, ...")
    parser.addoption("--device", default="cpu", help="where the tests over backends run")


def pytest_configure(config: pytest.Config) -> None:
    """Refuse a name in --backends that none here has: it would pass by running nothing."""
    asked = (config.getoption("--backends") or "").split(",")
    if "triton" in asked and importlib.util.find_spec("triton") is None:
        pytest.exit("needs the package triton", 0)
    known = set().union(*map(names_of, backends_that_run_on(config.getoption("--device"))), [""])
    if unknown := set(asked) - known:
        raise pytest.UsageError(f"--backends must be among {sorted(known)}, got {sorted(unknown)}")


def names_of(backend: Backend) -> set[str]:
    """Return what --backends may call it: its own name, or its backend's for all variants."""
    return {backend.name, str(backend)}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run what asks for `backend` over each backend that runs on --device."""
    if "backend" in metafunc.fixturenames:
        backends = backends_that_run_on(metafunc.config.getoption("--device"))
        metafunc.parametrize("backend", backends, ids=str, indirect=True)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep what --backends asks for."""
    if asked := config.getoption("--backends"):
        items[:] = [item for item in items if names_of_item(item) & set(asked.split(","))]


def names_of_item(item: pytest.Item) -> set[str]:
    """Return the names of the backend that a test runs over, none for one over no backend."""
    if "backend" not in getattr(item, "fixturenames", ()):
        return set()
    return names_of(item.callspec.params["backend"])


@pytest.fixture
def backend(request: pytest.FixtureRequest) -> Iterator[Backend]:
    """Each backend that runs on --device, set up; new tensors are there."""
    device = request.config.getoption("--device")
    on_device = contextlib.nullcontext() if device == "cpu" else torch.device(device)
    with request.param.around(), on_device:
        yield request.param


# What malloc hands out, the kernels' scratch memory too, is filled with 0xFE: floats of -1.7e38.
M_PERTURB = -6  # glibc's malloc.h
with contextlib.suppress(AttributeError, OSError):  # another libc
    ctypes.CDLL(None).mallopt(M_PERTURB, 0x01)


@pytest.fixture(autouse=True)
def poison() -> Iterator[None]:
    """Fill what at::empty hands out with NaN: an element that nobody writes shows."""
    with poisoned_memory():
        yield


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """Have at::empty give NaN, without what `use_deterministic_algorithms` imports: inductor."""
    filled = torch.utils.deterministic.fill_uninitialized_memory
    torch._C._set_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = filled
        torch._C._set_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def seed() -> None:
    """Start every test from the same random state."""
    torch.manual_seed(0)
