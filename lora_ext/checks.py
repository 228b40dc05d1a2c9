"""Every check of an argument: each error names it, what was expected and what came.

And how a report lists what did not pass.
"""

import math
from collections.abc import Iterable
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import UninitializedParameter

from .conv1d import is_conv1d

HALF = (torch.bfloat16, torch.float16)
SCALINGS = {
    "alpha": lambda alpha, rank: alpha,
    "alpha/rank": lambda alpha, rank: alpha / rank,
    "alpha/sqrt(rank)": lambda alpha, rank: alpha / math.sqrt(rank),
}


def fit(x: Any, weight: Any, bias: Any, A: Any, B: Any, alpha: Any) -> bool:
    """Fast path (2 us): True only if `check_arguments` (9 us) would not raise.

    On False, call that for the message.
    """
    try:
        in_features, rank = A.shape
        out_features = B.shape[1]
        dtype, device, adapter = x.dtype, x.device, A.dtype
        return (
            x.shape[-1] == in_features
            and B.shape == (rank, out_features)
            and rank > 0
            and (adapter is dtype or (adapter is torch.float32 and dtype in HALF))
            and B.dtype is adapter
            and device == A.device == B.device
            and (
                weight is None
                or (
                    weight.shape == (out_features, in_features)
                    and weight.dtype is dtype
                    and weight.device == device
                )
            )
            and (
                bias is None
                or (bias.shape == (out_features,) and bias.dtype is dtype and bias.device == device)
            )
            and dtype.is_floating_point
            and type(alpha) in (float, int)
        )
    except (AttributeError, IndexError, TypeError, ValueError):
        return False


def check_arguments(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, A: Tensor, B: Tensor, alpha: float
) -> None:
    """Raise TypeError or ValueError, naming the argument, unless all fit `lora_linear`.

    A weight of None is the low-rank part alone, which has no base.
    """
    named = {"x": x, "weight": weight, "bias": bias, "A": A, "B": B}
    for absent in [name for name in ("weight", "bias") if named[name] is None]:
        del named[absent]
    for name, tensor in named.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
    if not isinstance(alpha, Real):
        raise TypeError(f"alpha must be a number, got {type(alpha).__name__}")
    if not x.dtype.is_floating_point:
        raise TypeError(f"x must have a floating-point dtype, got {x.dtype}")
    _check_shapes(x, weight, bias, A, B)
    for name, tensor in named.items():
        if tensor.device != x.device:  # first: autocast casts only what is on x's kind of device
            raise ValueError(f"{name} must be on x's device {x.device}, got {tensor.device}")
        adapter_over_half = name in "AB" and x.dtype in HALF and tensor.dtype == torch.float32
        if tensor.dtype != x.dtype and not adapter_over_half:
            raise TypeError(f"{name} must have x's dtype {x.dtype}, got {tensor.dtype}")


def _check_shapes(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, A: Tensor, B: Tensor
) -> None:
    if weight is not None and weight.dim() != 2:
        raise ValueError(_expected("weight", "(out_features, in_features)", weight))
    if weight is None and (A.dim() != 2 or B.dim() != 2):
        name, factor = ("A", A) if A.dim() != 2 else ("B", B)
        raise ValueError(_expected(name, "of two dimensions", factor))
    N, K = (B.shape[1], A.shape[0]) if weight is None else weight.shape
    if x.dim() == 0 or x.shape[-1] != K:
        raise ValueError(_expected("x", f"(..., {K})", x))
    if bias is not None and bias.shape != (N,):
        raise ValueError(_expected("bias", f"({N},)", bias))
    if A.dim() != 2 or A.shape[0] != K:
        raise ValueError(_expected("A", f"({K}, rank)", A))
    if A.shape[1] < 1:
        raise ValueError(_expected("A", f"({K}, rank) with rank at least 1", A))
    if B.shape != (A.shape[1], N):
        raise ValueError(_expected("B", f"({A.shape[1]}, {N})", B))


def _expected(name: str, shape: str, got: Tensor) -> str:
    return f"{name} must have shape {shape}, got {tuple(got.shape)}"


def check_linear(linear: Any) -> None:
    """Raise TypeError unless `linear` has what a linear layer has."""
    sizes = ("nx", "nf") if is_conv1d(linear) else ("in_features", "out_features")
    needed = ("weight", *sizes)
    if not isinstance(linear, nn.Module) or not all(hasattr(linear, name) for name in needed):
        got = type(linear).__name__
        raise TypeError(f"linear must be an nn.Linear or a module with its attributes, got {got}")
    if isinstance(linear.weight, UninitializedParameter):
        got = type(linear).__name__
        raise ValueError(f"linear must have its weight: call the {got} on an input first")


def check_hyperparameters(rank: Any, alpha: Any, scaling: Any) -> None:
    """Raise TypeError or ValueError, naming the argument, unless the three fit a LoRALayer."""
    if not isinstance(rank, int) or isinstance(rank, bool):
        raise TypeError(f"rank must be an integer, got {type(rank).__name__}")
    if rank < 1:
        raise ValueError(f"rank must be at least 1, got {rank}")
    if not isinstance(alpha, (int, float)) or isinstance(alpha, bool):
        raise TypeError(f"alpha must be a number, got {type(alpha).__name__}")
    if not math.isfinite(alpha):
        raise ValueError(f"alpha must be finite, got {alpha}")
    if scaling not in SCALINGS:
        raise ValueError(
            f"scaling must be one of {', '.join(map(repr, SCALINGS))}, got {scaling!r}"
        )


def adapter_dtype(base: torch.dtype) -> torch.dtype:
    """Return the dtype of A and B over a base: torch's default where the kernels take it there."""
    default = torch.get_default_dtype()
    fits = default == base or (base in HALF and default == torch.float32)
    return default if fits or not base.is_floating_point or base.itemsize == 1 else base


def check_dropout(p: Any, mask: Any = "hash") -> None:
    """Raise TypeError or ValueError unless `p` is a probability and `mask` a way to draw."""
    if not isinstance(p, (int, float)) or isinstance(p, bool):
        raise TypeError(f"dropout must be a number, got {type(p).__name__}")
    if not 0 <= p <= 1:
        raise ValueError(f"dropout must be from 0 to 1, got {p}")
    if mask not in ("hash", "torch"):
        raise ValueError(f"dropout_mask must be 'hash' or 'torch', got {mask!r}")


def check_backend(name: Any, known: tuple[str, ...]) -> None:
    """Raise ValueError unless `name` is None or a backend's."""
    if name is not None and name not in known:
        raise ValueError(f"backend must be None or one of {', '.join(known)}, got {name!r}")


class Touched(tuple[str, ...]):
    """The names of the layers that a call touched; a line that says so when printed."""

    what: str

    def __new__(cls, what: str, names: Iterable[str]) -> "Touched":
        """Say what was done, up to the number of layers in the line."""
        self = super().__new__(cls, (name or "model" for name in names))
        self.what = what
        return self

    def __repr__(self) -> str:
        shown = ", ".join(self[:3]) + (", ..." if len(self) > 3 else "")
        return f"{self.what} {len(self)} layer{'s' * (len(self) != 1)}" + f": {shown}" * bool(self)

    __str__ = __repr__


def lines_by_reason(title: str, reasons: dict[str, str]) -> list[str]:
    """Return a line for each reason in {name: reason}: how many have it, and the first of them."""
    lines = []
    for reason in dict.fromkeys(reasons.values()):
        names = [name for name, its in reasons.items() if its == reason]
        shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
        lines.append(f"{title} {len(names)}: {reason} ({shown})")
    return lines
