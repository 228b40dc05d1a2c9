"""The backends, which of them a device asks, and the choice among them.

A backend is a module with three functions over a `Call` (call.py):

    unsupported(call) -> str | None
        why it can't run the whole call, in words; None when it can
    forward(call) -> (y, h)
        y = x @ weight.T + bias + scale * h @ B, (M, N);  h = (keep * x) @ A, (M, R)
    backward(dy, call, h, needs) -> (dx, dweight, dbias, dA, dB)
        None where `needs`, five booleans, does not ask; what they do not read is None in the call

and, where it has a faster way than one call after the other, two more over calls of one x:

    forward_group(calls) -> (ys, hs)
    backward_group(dys, calls, hs, needs) -> gradients of each, dx the sum and with the first

and two for a gated MLP, of matrices on its device, where it has more than acts.py:

    gated(gate, up, act) -> act(gate) * up
    gated_backward(d_hidden, gate, up, act, d_gate, d_up), which writes the last two

A new one is a file here, its name in BACKENDS, and in BY_DEVICE where it is to be chosen unasked.
"""

from collections.abc import Sequence
from types import ModuleType

from torch import Tensor

from .. import acts
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


def forward_group(name: str, calls: Sequence[Call]) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    """Return y and h of each of several calls of one x, by the backend `name`."""
    backend = BACKENDS[name]
    if hasattr(backend, "forward_group"):
        return backend.forward_group(calls)
    ys, hs = zip(*map(backend.forward, calls), strict=True)
    return ys, hs


def backward_group(
    name: str,
    dys: Sequence[Tensor],
    calls: Sequence[Call],
    hs: Sequence[Tensor | None],
    needs: Sequence[tuple[bool, ...]],
) -> list[tuple[Tensor | None, ...]]:
    """Return (dx, dweight, dbias, dA, dB) of each call; dx is their sum, with the first."""
    backend = BACKENDS[name]
    if hasattr(backend, "backward_group"):
        return backend.backward_group(dys, calls, hs, needs)
    results: list[tuple[Tensor | None, ...]] = []
    for dy, call, h, own in zip(dys, calls, hs, needs, strict=True):
        dx, *others = backend.backward(dy, call, h, own)
        if results and dx is not None:
            results[0][0].add_(dx)  # type: ignore[union-attr]
            dx = None
        results.append((dx, *others))
    return results


def gated(name: str | None, gate: Tensor, up: Tensor, act: str) -> Tensor:
    """Return act(gate) * up in new memory, by the backend `name` or by PyTorch."""
    return getattr(BACKENDS.get(name or ""), "gated", acts.gated)(gate, up, act)


def gated_backward(
    name: str | None,
    d_hidden: Tensor,
    gate: Tensor,
    up: Tensor,
    act: str,
    d_gate: Tensor,
    d_up: Tensor,
) -> None:
    """Write the gradients of `gated`; see acts.gated_backward."""
    run = getattr(BACKENDS.get(name or ""), "gated_backward", acts.gated_backward)
    run(d_hidden, gate, up, act, d_gate, d_up)


def unsupported_reasons(call: Call) -> dict[str, str | None]:
    """Return every backend's answer: None when it can run the call, else why not."""
    return {name: backend.unsupported(call) for name, backend in BACKENDS.items()}
