"""C++ CPU kernels (csrc/cpu): forward and backward as one operator each."""

import warnings
from importlib import import_module

import torch
from torch import Tensor
from torch.nn import Parameter

from .. import ops  # noqa: F401  the schemas that _C registers its kernels for

BUILD_COMMAND = "pip install --no-build-isolation -e . (in a clone of the repository)"
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_PLAIN = (Tensor, Parameter)
# The overload and not the packet, which would choose it anew at each call (1 us).
_FWD = torch.ops.lora_ext.lora_linear_fwd.default
_BWD = torch.ops.lora_ext.lora_linear_bwd.default
_FWD_PACKED = torch.ops.lora_ext.lora_linear_fwd_packed.default
_BWD_PACKED = torch.ops.lora_ext.lora_linear_bwd_packed.default

try:
    import_module("lora_ext._C")  # registers the kernels
    _not_loaded = None
except ImportError as error:
    _not_loaded = f"the extension lora_ext._C is not there ({error}); build it: {BUILD_COMMAND}"
    # Explicit, since the frame to blame is the import system's and not the user's.
    warnings.warn_explicit(
        f"{_not_loaded}\nUntil then lora_ext runs on plain PyTorch (backend 'reference').",
        UserWarning,
        filename="lora_ext",
        lineno=0,
    )


def unsupported(x: Tensor, weight: Tensor, A: Tensor) -> str | None:
    """Say why the C++ kernels can't run on these tensors; None when they can."""
    if (
        _not_loaded is None
        and type(x) in _PLAIN
        and type(weight) in _PLAIN
        and type(A) in _PLAIN
        and x.is_cpu
        and x.dtype in _DTYPES
        and x.layout is weight.layout is A.layout is torch.strided
    ):
        return None
    if _not_loaded is not None:
        return _not_loaded
    if not x.is_cpu:
        return f"runs on cpu tensors, x is on {x.device.type}"
    if x.dtype not in _DTYPES:
        return f"takes float32, bfloat16, float16 and float64, x is {x.dtype}"
    for name, tensor in (("x", x), ("weight", weight), ("A", A)):
        if type(tensor) not in _PLAIN:
            return f"takes plain tensors, {name} is a {type(tensor).__name__}"
        if tensor.layout is not torch.strided:
            return f"takes strided tensors, {name} is {tensor.layout}"
    raise AssertionError("every condition above has its reason")


def pack_weight(weight: Tensor, *, transposed: bool) -> Tensor:
    """Return weight (or weight.T, for the forward) in the kernels' panels: one dimension, opaque.

    Raises:
        RuntimeError: the kernels would not use it: PyTorch's own product is the faster one.

    """
    return torch.ops.lora_ext.pack_weight.default(weight, transposed)


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    alpha: float,
    packed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return y (M, N) and h = x @ A (M, R), in x's dtype; products accumulate in float32.

    `packed` is `pack_weight(weight, transposed=True)`.
    """
    if packed is not None:
        return _FWD_PACKED(x, weight, bias, A, B, alpha, packed)
    return _FWD(x, weight, bias, A, B, alpha)


def backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    A: Tensor,
    B: Tensor,
    h: Tensor,
    alpha: float,
    needs: tuple[bool, bool, bool, bool, bool],
    packed: Tensor | None = None,
) -> tuple[Tensor | None, ...]:
    """Return (dx, dweight, dbias, dA, dB), None where `needs` does not ask.

    `packed` is `pack_weight(weight, transposed=False)`.
    """
    if packed is not None:
        dx, dweight, dbias, dA, dB = _BWD_PACKED(dy, x, weight, A, B, h, alpha, needs, packed)
    else:
        dx, dweight, dbias, dA, dB = _BWD(dy, x, weight, A, B, h, alpha, needs)
    return (
        dx if needs[0] else None,
        dweight if needs[1] else None,
        dbias if needs[2] else None,
        dA if needs[3] else None,
        dB if needs[4] else None,
    )
