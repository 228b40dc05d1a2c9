"""Triton GPU kernels (triton_kernels/): forward and backward as one operator each.

`import triton` and every question to a device wait for the first tensor.
"""

import functools
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import Parameter

from .. import ops  # noqa: F401  the schemas that kernels are registered for
from ..call import Call
from . import reference
from .triton_kernels import choice

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_PLAIN = (Tensor, Parameter)
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # as Triton itself: when it is imported
_ON_CPU = "runs on cuda tensors, x is on cpu"
_Needs = tuple[bool, bool, bool, bool, bool]
_forced: dict[str, Any] = {"forward": None, "backward": None, "descriptors": None}


def unsupported(call: Call) -> str | None:
    """Say why the Triton kernels can't run on these tensors; None when they can."""
    x, A, B = call.x, call.low.A, call.low.B
    if call.weight is None or call.low.keep is not None:
        return "takes a weight and no dropout mask"
    weight = call.weight.data
    if not x.is_cuda and not (_INTERPRETED and x.is_cpu):
        # Asked first at every call on a CPU, where device.type makes its string anew (4 us cold).
        return _ON_CPU if x.is_cpu else f"runs on cuda tensors, x is on {x.device.type}"
    if x.dtype not in _DTYPES:
        return f"takes float16, bfloat16 and float32, x is {x.dtype}"
    for name, tensor in (("x", x), ("weight", weight), ("A", A), ("B", B)):
        if type(tensor) not in _PLAIN or tensor.layout != torch.strided:
            return (
                f"takes plain strided tensors, {name} is {type(tensor).__name__}, {tensor.layout}"
            )
    return why_not_here(x.device)


@functools.cache
def why_not_here(device: torch.device) -> str | None:
    """Say why no Triton kernel can run on a device; None when it can. Asked once a device."""
    if find_spec("triton") is None:
        return "the package triton is not there; install it: pip install triton"
    if device.type == "cpu":
        return None
    if torch.version.hip:
        arch = torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
        if arch != "gfx942":
            return f"takes gfx942 of the AMD GPUs, this one is {arch}"
    elif (capability := torch.cuda.get_device_capability(device)) < (8, 0):
        name = torch.cuda.get_device_name(device)
        return f"needs compute capability 8.0, {name} has {capability[0]}.{capability[1]}"
    if not any(map(shutil.which, (os.environ.get("CC", "cc"), "gcc", "clang"))):
        return "Triton builds its launcher with a C compiler and none is on the PATH; install gcc"
    return None


@contextmanager
def regime(
    *, forward: str | None = None, backward: str | None = None, descriptors: bool | None = None
) -> Iterator[None]:
    """Run every call inside by the regimes named, whatever the cost model would choose.

    For tests and benchmarks; the names are choice.FORWARD's and choice.BACKWARD's. `descriptors`
    also fixes how tiles are loaded, where there is a choice. A call that a regime can't take
    (in_loop and h_first beyond rank 64, decode beyond 64 rows) is left to the choice.

    Raises:
        ValueError: a name that is not there.

    """
    for argument, name, names in (
        ("forward", forward, choice.FORWARD),
        ("backward", backward, choice.BACKWARD),
    ):
        if name is not None and name not in names:
            raise ValueError(f"{argument} must be one of {', '.join(names)}, got {name!r}")
    before = dict(_forced)
    _forced.update(forward=forward, backward=backward, descriptors=descriptors)
    try:
        yield
    finally:
        _forced.update(before)


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, alpha: float
) -> tuple[Tensor, Tensor]:
    """Return y (M, N) and h = x @ A (M, R), in x's dtype; products accumulate in float32."""
    if x.device.type == "cpu":
        return _forward(x, weight, bias, A, B, alpha)
    return torch.ops.lora_ext.lora_linear_fwd(x, weight, bias, A, B, alpha)


def backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    A: Tensor,
    B: Tensor,
    h: Tensor,
    alpha: float,
    needs: tuple[bool, bool, bool, bool, bool],
) -> tuple[Tensor | None, ...]:
    """Return (dx, dweight, dbias, dA, dB), None where `needs` does not ask."""
    if dy.device.type == "cpu":
        return _backward(dy, x, weight, A, B, h, alpha, needs)
    gradients = torch.ops.lora_ext.lora_linear_bwd(dy, x, weight, A, B, h, alpha, needs)
    return tuple(g if need else None for g, need in zip(gradients, needs, strict=True))


def _forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, alpha: float
) -> tuple[Tensor, Tensor]:
    if x.numel() == 0 or weight.numel() == 0:
        return reference.forward(x, weight, bias, A, B, alpha)
    with _current(x.device):
        return _kernels().forward(x, weight, bias, A, B, alpha, _forced)


def _backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    A: Tensor,
    B: Tensor,
    h: Tensor,
    alpha: float,
    needs: Iterable[bool],
) -> tuple[Tensor | None, ...]:
    needs = cast(_Needs, tuple(needs))
    read = (x, weight) if needs[0] and needs[3] else (weight,) if needs[0] else (x,) * needs[3]
    if dy.numel() == 0 or any(tensor.numel() == 0 for tensor in read):
        return reference.backward(dy, x, weight, A, B, h, alpha, needs)
    with _current(dy.device):
        dx, dA, dB = _kernels().backward(dy, x, weight, A, B, h, alpha, needs, _forced)
    return dx, dy.T @ x if needs[1] else None, dy.sum(0) if needs[2] else None, dA, dB


def _backward_op(dy, x, weight, A, B, h, alpha, needs) -> tuple[Tensor, ...]:
    """As the operator returns it: what is not needed has no elements."""
    gradients = _backward(dy, x, weight, A, B, h, alpha, needs)
    like = (dy, dy, dy, A, B)
    return tuple(t.new_empty(0) if g is None else g for g, t in zip(gradients, like, strict=True))


def _current(device: torch.device) -> AbstractContextManager:
    """Triton launches on the current device: make it the tensors'."""
    if device.type == "cpu" or device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)


@functools.cache
def _kernels() -> ModuleType:
    return import_module(f"{__package__}.triton_kernels.entry")


if find_spec("triton") is not None:
    _LIBRARY = torch.library.Library("lora_ext", "IMPL")
    _LIBRARY.impl("lora_linear_fwd", _forward, "CUDA")
    _LIBRARY.impl("lora_linear_bwd", _backward_op, "CUDA")
