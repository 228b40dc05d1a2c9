"""Triton GPU kernels: forward and backward as one operator each.

    common.py             what the kernels share: loads, dropout's mask, products, the epilogue
    forward_kernels.py    kernels of y and h
    decode_kernels.py     the kernel of y and h for few rows
    backward_kernels.py   kernels of the gradients
    persistent_kernels.py kernels of y and dx that take tile after tile, from sm_90 on
    cards.py              what is known of a card: its limits, its speeds
    tiling.py             the tile sizes of each card, and how sums are split over its programs
    costs.py              what each regime's launches move and compute, and the time that takes
    torch_costs.py        the same of the regimes that PyTorch runs
    regimes.py            the table of regimes, the ways to run a call: tiles and cost of each
    launches.py           what launches share: operands, options, the launch itself
    forward_launches.py   the launches of each forward regime
    backward_launches.py  the launches of each backward regime
    operators.py          the operators: empty sizes by PyTorch, the rest by plans
    mask.py               dropout's mask as bits: kernels and launches
    tuning.py             the choice among them, measured once, and the plan of a call
    group_kernels.py      kernels of several layers of one x: h of all, and dx as one sum
    group_costs.py        the cost of such a group, jointly and one call after the other
    group_launches.py     the launches of a group
    grouping.py           the choice between the two, and the plan of a group

`import triton` and every question to a device wait for the first tensor: the one costs 0.3 s and
may be missing.
"""

import functools
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

import torch
from torch import Tensor
from torch.nn import Parameter

from ...call import Call
from ...dropout import draw_bits, pack_bits
from ...ops import LIBRARY, run_linears_bwd
from . import operators
from .regimes import REGIMES

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_PLAIN = (Tensor, Parameter)
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # as Triton itself: when it is imported
_Needs = tuple[bool, bool, bool, bool, bool]
_LIBRARY = operators.define_all("lora_ext_triton")
_FWD = torch.ops.lora_ext_triton.linear_fwd.default
_BWD = torch.ops.lora_ext_triton.linear_bwd.default

_FWD_GROUP = torch.ops.lora_ext_triton.linears_fwd.default
_BWD_GROUP = torch.ops.lora_ext_triton.linears_bwd.default


def unsupported(call: Call) -> str | None:
    """Say why the Triton kernels can't run a call; None when they can."""
    x, weight, bias, (A, B, _, keep) = call
    if not x.is_cuda and not (_INTERPRETED and x.is_cpu):
        return f"runs on cuda tensors, x is on {x.device.type}"
    if x.dtype not in _DTYPES:
        return f"takes float16, bfloat16 and float32, x is {x.dtype}"
    if weight is None:
        return "needs a weight, and this is the low-rank part alone"
    if weight.format != "plain":
        return f"takes a plain weight, not one in format {weight.format!r}"
    named = ("x", x), ("weight", weight.data), ("bias", bias), ("A", A), ("B", B), ("keep", keep)
    for name, tensor in named:
        if tensor is not None and (
            type(tensor) not in _PLAIN or tensor.layout is not torch.strided
        ):
            kind = f"{type(tensor).__name__}, {tensor.layout}"
            return f"takes plain strided tensors, {name} is {kind}"
    return why_not_here(x.device)


def why_not_here(device: torch.device) -> str | None:
    """Say why no Triton kernel can run on a device; None when it can. Asked once a device."""
    return _why_not_here(device)


# A compiler that traces a call takes the answer for a constant, and does not look for a C compiler
# by itself: what torch.compiler.assume_constant_result does, which imports all of Dynamo for it.
why_not_here._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.cache
def _why_not_here(device: torch.device) -> str | None:
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
    *,
    forward: str | None = None,
    backward: str | None = None,
    descriptors: bool | None = None,
    group: str | None = None,
) -> Iterator[None]:
    """Run every call inside by the regimes named, whatever would be chosen.

    For tests and benchmarks; the names are those of regimes.REGIMES. `descriptors` also fixes how
    tiles are loaded, where there is a choice, and `group` how calls of one x are run: "joint" or
    "apart". What a regime can't take (in_loop beyond rank 64, decode beyond 64 rows; jointly, what
    has no shrink of its own) is left to the choice.

    Raises:
        ValueError: a name that is not there.

    """
    for direction, name in (("forward", forward), ("backward", backward)):
        if name is not None and name not in REGIMES[direction]:
            names = ", ".join(REGIMES[direction])
            raise ValueError(f"{direction} must be one of {names}, got {name!r}")
    if group not in (None, "joint", "apart"):
        raise ValueError(f"group must be one of joint, apart, got {group!r}")
    forced = _tuning()._forced
    before = dict(forced)
    forced.update(forward=forward, backward=backward, descriptors=descriptors, group=group)
    try:
        yield
    finally:
        forced.update(before)


def forward(call: Call) -> tuple[Tensor, Tensor]:
    """Return y (M, N) and h = (keep * x) @ A (M, R), in x's dtype; sums in float32."""
    x, weight, bias, (A, B, scale, keep) = call
    assert weight is not None, "unsupported(call) asks for a weight"
    run = operators.linear_fwd if x.is_cpu else _FWD
    return run(x, weight.data, bias, A, B, scale, keep=keep)


def backward(dy: Tensor, call: Call, h: Tensor | None, needs: _Needs) -> tuple[Tensor | None, ...]:
    """Return (dx, dweight, dbias, dA, dB), None where `needs` does not ask."""
    x, weight, _, (A, B, scale, keep) = call
    data = None if weight is None else weight.data
    run = operators.linear_bwd if dy.is_cpu else _BWD
    return run(dy, x, data, A, B, h, scale, needs, keep=keep)


def forward_group(calls: Sequence[Call]) -> tuple[list[Tensor], list[Tensor]]:
    """Return y (M, N) and h (M, R) of each call; all have the same x, and a weight."""
    x = calls[0].x
    weights, biases, lows = list(zip(*calls, strict=True))[1:]
    As, Bs, scales, keeps = zip(*lows, strict=True)
    run = operators.linears_fwd if x.is_cpu else _FWD_GROUP
    return run(x, [weight.data for weight in weights], biases, As, Bs, scales, keeps)


def backward_group(
    dys: Sequence[Tensor],
    calls: Sequence[Call],
    hs: Sequence[Tensor | None],
    needs: Sequence[_Needs],
) -> list[tuple[Tensor | None, ...]]:
    """Return the gradients of each call; dx, the sum over calls, with the first."""
    run = operators.linears_bwd if dys[0].is_cpu else _BWD_GROUP
    return run_linears_bwd(run, dys, calls, hs, needs)


def _draw_keep(seed: Tensor, rows: int, cols: int, p: float, first_column: int = 0) -> Tensor:
    """Kernel of the operator lora_ext::draw_keep: one launch, or PyTorch's operations."""
    if why_not_here(seed.device) is not None:
        return draw_bits(seed, rows, cols, p, first_column)
    with operators.current(seed.device):
        return _mask().draw_keep(seed, rows, cols, p, first_column)


def _pack_keep(mask: Tensor) -> Tensor:
    """Kernel of the operator lora_ext::pack_keep: one launch, or PyTorch's operations."""
    if why_not_here(mask.device) is not None:
        return pack_bits(mask)
    with operators.current(mask.device):
        return _mask().pack_keep(mask)


@functools.cache
def _tuning() -> ModuleType:
    return import_module(f"{__name__}.tuning")


@functools.cache
def _mask() -> ModuleType:
    return import_module(f"{__name__}.mask")


if find_spec("triton") is not None:
    for _name in ("linear_fwd", "linear_bwd", "linears_fwd", "linears_bwd"):
        _LIBRARY.impl(_name, getattr(operators, _name), "CUDA")
    LIBRARY.impl("draw_keep", _draw_keep, "CUDA")
    LIBRARY.impl("pack_keep", _pack_keep, "CUDA")
