"""The backends, in order of preference, and the choice among them.

A backend is a module with three functions (M rows, K in, N out, R rank; x is a matrix (M, K)):

    unsupported(x, weight, A) -> str | None
        why it can't run on these tensors, in words; None when it can
    forward(x, weight, bias, A, B, alpha) -> (y, h)
        y = x @ weight.T + bias + alpha * h @ B, (M, N);  h = x @ A, (M, R), kept for backward
    backward(dy, x, weight, A, B, h, alpha, needs) -> (dx, dweight, dbias, dA, dB)
        None where `needs`, five booleans, does not ask

The forward and backward of `cpp` take `packed`, a weight laid out once, too (packed_weight.py).

A new one is a file here and its name in NAMES, before the reference, which can always run.
"""

from importlib import import_module
from types import ModuleType

from torch import Tensor

from ..checks import check_backend

NAMES = ("triton", "cpp", "dtensor", "reference")
BACKENDS: dict[str, ModuleType] = {name: import_module(f"{__name__}.{name}") for name in NAMES}
_BEFORE_REFERENCE = tuple((name, BACKENDS[name]) for name in NAMES if name != "reference")


def choose(name: str | None, x: Tensor, weight: Tensor, A: Tensor) -> str:
    """Return the name of the backend to run: the one asked for, else the first that can.

    Raises:
        ValueError: `name` is no backend, or can't run on these tensors (the message says why).

    """
    if name is None:
        for candidate, backend in _BEFORE_REFERENCE:
            if backend.unsupported(x, weight, A) is None:
                return candidate
        return "reference"
    check_backend(name, tuple(BACKENDS))
    reason = BACKENDS[name].unsupported(x, weight, A)
    if reason is not None:
        raise ValueError(f"backend {name!r} can't run on these tensors: {reason}")
    return name


def unsupported_reasons(x: Tensor, weight: Tensor, A: Tensor) -> dict[str, str | None]:
    """Return every backend's answer: None when it can run, else why not."""
    return {name: backend.unsupported(x, weight, A) for name, backend in BACKENDS.items()}
