"""C++ kernels, csrc/cpu and csrc/cuda: forward and backward as one operator each.

The CUDA kernels are a library of their own, loaded for the first CUDA tensor.
"""

import functools
import warnings
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec

import torch
from torch import Tensor
from torch.nn import Parameter

from .. import (
    acts,
    ops,  # the schemas that _C registers its kernels for
)
from ..call import Call, Weight

BUILD_COMMAND = "pip install --no-build-isolation -e . (in a clone of the repository)"
BUILD_CUDA = f"with a CUDA torch and a CUDA toolkit (nvcc): LORA_EXT_BUILD=cuda {BUILD_COMMAND}"
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_PLAIN = (Tensor, Parameter)
Needs = tuple[bool, bool, bool, bool, bool]
# The overload and not the packet, which would choose it again at each call (1 us).
_FWD = torch.ops.lora_ext.linear_fwd.default
_BWD = torch.ops.lora_ext.linear_bwd.default
_FWD_GROUP = torch.ops.lora_ext.linears_fwd.default
_BWD_GROUP = torch.ops.lora_ext.linears_bwd.default
_GATED = torch.ops.lora_ext.gated_fwd.default
_GATED_BACKWARD = torch.ops.lora_ext.gated_bwd.default

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


def unsupported(call: Call) -> str | None:
    """Say why the C++ kernels can't run a call; None when they can."""
    x, weight, bias, (A, B, _, keep) = call
    data = x if weight is None else weight.data
    if (
        _not_loaded is None
        and x.is_cpu
        and x.dtype in DTYPES
        and type(x) in _PLAIN
        and type(data) in _PLAIN
        and type(A) in _PLAIN
        and type(B) in _PLAIN
        and (bias is None or (type(bias) in _PLAIN and bias.layout is torch.strided))
        and x.layout is data.layout is A.layout is B.layout is torch.strided
        and (weight is None or weight.scale is None or x.dtype is not torch.float64)
    ):
        return None
    if x.is_cpu and _not_loaded is not None:
        return _not_loaded
    if not x.is_cpu and not x.is_cuda:
        return f"runs on cpu and cuda tensors, x is on {x.device.type}"
    if x.dtype not in DTYPES:
        return f"takes float32, bfloat16, float16 and float64, x is {x.dtype}"
    for name, tensor in (("x", x), ("weight", data), ("bias", bias), ("A", A), ("B", B)):
        if tensor is not None and type(tensor) not in _PLAIN:
            return f"takes plain tensors, {name} is a {type(tensor).__name__}"
        if tensor is not None and tensor.layout is not torch.strided:
            return f"takes strided tensors, {name} is {tensor.layout}"
    if x.is_cpu and weight is not None:
        return f"has no kernel for float64 over a weight in format {weight.format!r}"
    if (why := why_no_cuda_kernel(call)) is not None:
        return why
    return _why_not_on(x.device)


def why_no_cuda_kernel(call: Call) -> str | None:
    """Say what of a call the CUDA kernels, unlike the CPU's, do not read."""
    if call.weight is None or call.weight.format == "plain":
        return None
    return f"has no CUDA kernel for a weight in format {call.weight.format!r}"


@functools.cache
def _why_not_on(device: torch.device) -> str | None:
    """Say why the CUDA kernels can't run on a device; None when they can. Asked once a device."""
    if (why_not := load_cuda()) is not None:
        return why_not
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        name = torch.cuda.get_device_name(device)
        return f"needs compute capability 8.0, {name} has {capability[0]}.{capability[1]}"
    return None


@functools.cache
def load_cuda() -> str | None:
    """Load the library of CUDA kernels, which registers them; say why it can't be, else None.

    Asks no device.
    """
    library = find_spec("lora_ext._cuda")
    if library is None or library.origin is None:
        return f"the library lora_ext._cuda is not there; {BUILD_CUDA}"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is not built for CUDA, lora_ext._cuda is"
    if _not_loaded is None:
        built = import_module("lora_ext._C").build_info()["cuda"].split()[0]
        if built == "none":
            return f"the library lora_ext._cuda is there, but not of the last build; {BUILD_CUDA}"
        if built.split(".")[0] != torch.version.cuda.split(".")[0]:
            return (
                f"the library lora_ext._cuda is built for CUDA {built}, torch "
                f"{torch.__version__} for {torch.version.cuda}; {BUILD_CUDA}"
            )
    try:
        torch.ops.load_library(library.origin)
    except OSError as error:
        return (
            f"the library lora_ext._cuda does not load ({error.__cause__ or error}); {BUILD_CUDA}"
        )
    return None


def why_not_packed(weight: Tensor) -> str | None:
    """Say why a weight can't be laid out by `pack_weight`, or need not be; None when it can."""
    if _not_loaded is not None:
        return _not_loaded
    if not weight.is_cpu or weight.layout is not torch.strided:
        return f"weight must be strided and on cpu, got {weight.layout} on {weight.device.type}"
    if weight.dtype not in DTYPES:
        return f"weight must have dtype float32, bfloat16 or float16, got {weight.dtype}"
    own_products = import_module("lora_ext._C").build_info()["own_products"]
    if str(weight.dtype).removeprefix("torch.") not in own_products:
        return f"PyTorch's own product is the faster one for {weight.dtype} on this CPU"
    return None


def pack_weight(weight: Tensor, *, transposed: bool) -> Weight:
    """Return weight (or weight.T, for the forward) in the kernels' panels: one dimension, opaque.

    For a weight with no reason in `why_not_packed`.
    """
    return Weight(torch.ops.lora_ext.pack_weight.default(weight, transposed), "panels")


def forward(call: Call) -> tuple[Tensor, Tensor]:
    """Return y (M, N) and h (M, R), in x's dtype; products accumulate in float32."""
    x, weight, bias, (A, B, scale, keep) = call
    if weight is not None and keep is None and weight.format == "plain":  # defaults cost nothing
        return _FWD(x, weight.data, bias, A, B, scale)
    data, format, codes = (None, "plain", None) if weight is None else weight
    return _FWD(x, data, bias, A, B, scale, format=format, keep=keep, weight_scale=codes)


def backward(
    dy: Tensor, call: Call, h: Tensor | None, needs: tuple[bool, bool, bool, bool, bool]
) -> tuple[Tensor | None, ...]:
    """Return (dx, dweight, dbias, dA, dB), None where `needs` does not ask."""
    x, weight, _, (A, B, scale, keep) = call
    if keep is None and (weight is None or weight.format == "plain"):  # defaults cost nothing
        return _BWD(dy, x, weight and weight.data, A, B, h, scale, needs)
    data, format, codes = (None, "plain", None) if weight is None else weight
    given = {"format": format, "keep": keep, "weight_scale": codes}
    return _BWD(dy, x, data, A, B, h, scale, needs, **given)


def forward_group(calls: Sequence[Call]) -> tuple[list[Tensor], Sequence[Tensor]]:
    """Return y (M, N) and h (M, R) of each call; all have the same x, and a weight."""
    x, *_ = calls[0]
    weights, biases, lows = list(zip(*calls, strict=True))[1:]
    data, formats, codes = zip(*weights, strict=True)
    As, Bs, scales, keeps = zip(*lows, strict=True)
    ys, h = _FWD_GROUP(x, data, biases, As, Bs, scales, formats, keeps, codes)
    return ys, h.split([A.shape[1] for A in As], 1)


def backward_group(
    dys: Sequence[Tensor],
    calls: Sequence[Call],
    hs: Sequence[Tensor | None],
    needs: Sequence[Needs],
) -> list[tuple[Tensor | None, ...]]:
    """Return the gradients of each call; dx, the sum over calls, with the first."""
    return ops.run_linears_bwd(_BWD_GROUP, dys, calls, hs, needs)


def gated(gate: Tensor, up: Tensor, act: str) -> Tensor:
    """Return act(gate) * up, (M, hidden), in one pass on a CPU."""
    return _GATED(gate, up, act) if gate.is_cpu else acts.gated(gate, up, act)


def gated_backward(
    d_hidden: Tensor, gate: Tensor, up: Tensor, act: str, d_gate: Tensor, d_up: Tensor
) -> None:
    """Write the gradients of `gated`, on a CPU in one pass; see acts.gated_backward."""
    run = _GATED_BACKWARD if gate.is_cpu else acts.gated_backward
    run(d_hidden, gate, up, act, d_gate, d_up)
