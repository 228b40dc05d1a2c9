"""The backends, which of them a device asks, and the choice among them.

A backend is a module with three functions over a `Call` (call.py):

    unsupported(call) -> str | None
        why it can't run the whole call, in words; None when it can
    forward(call) -> (y, h)
        y = x @ weight.T + bias + scale * h @ B, (M, N);  h = (keep * x) @ A, (M, R)
    backward(dy, call, h, needs) -> (dx, dweight, dbias, dA, dB)
        None where `needs`, five booleans, does not ask; what they do not read is None in the call

A new one is a file here, its name in BACKENDS, and in BY_DEVICE where it is to be chosen unasked.
"""

from types import ModuleType

from ..call import Call
from ..checks import check_backend
from . import cpp, reference, triton

BACKENDS: dict[str, ModuleType] = {"triton": triton, "cpp": cpp, "reference": reference}
NAMES = tuple(BACKENDS)
# Asked in this order for tensors on a device, before the reference, which can always run.
BY_DEVICE: dict[str, tuple[str, ...]] = {"cpu": ("cpp",), "cuda": ("triton", "cpp")}
_ON_CPU = BY_DEVICE["cpu"]


def choose(name: str | None, call: Call) -> str:
    """Return the name of the backend to run: the one asked for, else the first that can.

    Raises:
        ValueError: `name` is no backend, or can't run this call (the message says why).

    """
    if name is None:
        x = call.x  # device.type makes its string again at each call, 4 us cold
        for candidate in _ON_CPU if x.is_cpu else BY_DEVICE.get(x.device.type, ()):
            if BACKENDS[candidate].unsupported(call) is None:
                return candidate
        return "reference"
    check_backend(name, tuple(BACKENDS))
    reason = BACKENDS[name].unsupported(call)
    if reason is not None:
        raise ValueError(f"backend {name!r} can't run on these tensors: {reason}")
    return name


def unsupported_reasons(call: Call) -> dict[str, str | None]:
    """Return every backend's answer: None when it can run the call, else why not."""
    return {name: backend.unsupported(call) for name, backend in BACKENDS.items()}
