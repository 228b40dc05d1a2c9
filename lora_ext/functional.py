"""lora_linear(): argument checks, autocast, choice of backend, and the autograd Function."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .backends import BACKENDS, choose
from .checks import HALF, check_arguments, check_dropout, fit
from .dropout import linear_with_dropout
from .packed_weight import PackedWeight

_PLAIN = (Tensor, torch.nn.Parameter)
_NO_TRANSFORM = (
    "lora_linear has no rule for the transforms of torch.func (vmap, grad, jvp, ...): call a "
    "LinearWithLoRA, by torch.func.functional_call where the parameters are arguments"
)


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    alpha: float,
    *,
    backend: str | None = None,
    dropout: float = 0.0,
    packed: PackedWeight | None = None,
) -> Tensor:
    """Linear layer with a low-rank update: `y = x @ weight.T + bias + alpha * (x @ A @ B)`.

    Differentiable once in `x`, `weight`, `bias`, `A` and `B`. Follows autocast as `F.linear` does.

    Args:
        x: input, (..., in_features); any strides, any number of rows, none included.
        weight: (out_features, in_features), of x's dtype.
        bias: (out_features,), of x's dtype, or None.
        A: (in_features, rank), of x's dtype, or float32 over a bfloat16 or float16 base.
        B: (rank, out_features), likewise.
        alpha: factor of the low-rank part, applied as it is: not divided by the rank.
        backend: name of the backend to run; None takes the first that can.
        dropout: probability with which an element of x is zero for the low-rank part, which is
            scaled by 1 / (1 - dropout) in return; from 0 to below 1. The mask comes from torch's
            default generator by way of a seed. By plain PyTorch: backend None or "reference".
        packed: `PackedWeight(weight)`, which spares the C++ kernels laying the weight out; other
            backends, dropout, compiled code, and autocast where it casts the weight, do without.

    Returns:
        y, (..., out_features), of the dtype that `F.linear(x, weight, bias)` gives.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a shape, device or dropout that does not fit, a backend that can't run here, or
            a `packed` made of another weight or before this one changed.

    Source:
        Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", arXiv:2106.09685.

    """
    if packed is not None:
        packed = _checked(packed, weight)
    # Not for meta: PyTorch raises when asked about a device that has no autocast.
    if isinstance(x, Tensor) and not x.is_meta and torch.is_autocast_enabled(_device_type(x)):
        given = weight
        x, weight, bias, A, B = _autocast(x, weight, bias, A, B)
        packed = packed if weight is given else None
    if not fit(x, weight, bias, A, B, alpha):
        check_arguments(x, weight, bias, A, B, alpha)
        alpha = float(alpha)  # any real number, such as numpy's: the operators take float and int
    if dropout:
        return _with_dropout(x, weight, bias, A, B, alpha, backend, dropout)
    name = choose(backend, x, weight, A)
    if packed is not None and name != "cpp":
        packed = None
    if torch.is_grad_enabled() and (
        x.requires_grad
        or A.requires_grad
        or B.requires_grad
        or weight.requires_grad
        or (bias is not None and bias.requires_grad)
    ):
        try:
            return _LoRALinear.apply(x, weight, bias, A, B, alpha, name, packed)
        except RuntimeError as error:
            if not torch._C._are_functorch_transforms_active():
                raise
            raise RuntimeError(_NO_TRANSFORM) from error
    y, _ = _forward(name, _rows(x), weight, bias, A, B, alpha, packed)
    return _with_shape(y, (*x.shape[:-1], y.shape[1]))


def _checked(packed: Any, weight: Tensor) -> PackedWeight | None:
    """Raise unless `packed` stands for the weight; None in compiled code, which can't ask."""
    if not isinstance(packed, PackedWeight):
        raise TypeError(f"packed must be a PackedWeight or None, got {type(packed).__name__}")
    if torch.compiler.is_compiling():
        return None
    if (why := packed.why_stale(weight)) is not None:
        raise ValueError(f"packed must stand for weight as it is: {why}")
    return packed


def _with_dropout(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    alpha: float,
    backend: str | None,
    p: float,
) -> Tensor:
    check_dropout(p)
    if backend not in (None, "reference"):
        raise ValueError(f"backend {backend!r} can't run with dropout: its kernels take no mask")
    y = linear_with_dropout(_rows(x), weight, bias, A, B, alpha, p)
    return y.view(*x.shape[:-1], y.shape[1])


def _forward(
    name: str,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    alpha: float,
    packed: PackedWeight | None,
) -> tuple[Tensor, Tensor]:
    if packed is None:
        return BACKENDS[name].forward(x, weight, bias, A, B, alpha)
    return BACKENDS[name].forward(x, weight, bias, A, B, alpha, packed.forward)


class _LoRALinear(torch.autograd.Function):
    """The hand-written gradient. Keeps h = x @ A, and of the inputs what the backward will read."""

    @staticmethod
    def forward(ctx, x, weight, bias, A, B, alpha, name, packed):
        y, h = _forward(name, _rows(x), weight, bias, A, B, alpha, packed)
        need_dx, need_dweight, _, need_dA, need_dB = ctx.needs_input_grad[:5]
        ctx.save_for_backward(
            x if need_dA or need_dweight else _stand_in(x),
            weight if need_dx else _stand_in(weight),
            A if need_dx else _stand_in(A),
            B if need_dx or need_dA else _stand_in(B),
            h if need_dB else _stand_in(h),
        )
        ctx.alpha, ctx.name, ctx.x_shape = alpha, name, x.shape
        ctx.packed = None if packed is None else packed.backward
        return _with_shape(y, (*x.shape[:-1], y.shape[1]))

    @staticmethod
    def backward(ctx, dy):
        # Grad mode is on here only under create_graph=True; the guard costs 8 us a call.
        return (_gradients_once if torch.is_grad_enabled() else _gradients)(ctx, dy)


def _gradients(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    """Return the gradient of each argument of _LoRALinear."""
    x, weight, A, B, h = ctx.saved_tensors
    options = {} if ctx.packed is None else {"packed": ctx.packed}
    dx, dweight, dbias, dA, dB = BACKENDS[ctx.name].backward(
        _rows(dy), _rows(x), weight, A, B, h, ctx.alpha, ctx.needs_input_grad[:5], **options
    )
    if dx is not None:
        dx = _with_shape(dx, ctx.x_shape)
    return dx, dweight, dbias, dA, dB, None, None, None


_gradients_once = once_differentiable(_gradients)


def lora_delta(x: Tensor, A: Tensor, B: Tensor, alpha: float) -> Tensor:
    """Low-rank part alone, by PyTorch's own products: `alpha * (x @ A @ B)`.

    What is added to a base that is not a plain linear (quantised, hooked, a subclass). A and B are
    cast to x's dtype where it differs. The gradient is written by hand for plain tensors; nested
    and sharded ones, transforms of torch.func and torch.export get PyTorch's own.

    Args:
        x: input, (..., in_features); a nested tensor too.
        A: (in_features, rank).
        B: (rank, out_features).
        alpha: factor of the product.

    Returns:
        (..., out_features), in x's dtype (autocast's inside an autocast region).

    """
    plain = type(x) is Tensor and type(A) in _PLAIN and type(B) in _PLAIN and not x.is_nested
    if plain and not torch._C._are_functorch_transforms_active():
        if not x.is_meta and torch.is_autocast_enabled(_device_type(x)):
            x, _, _, A, B = _autocast(x, B, None, A, B)
        y = _LoRADelta.apply(_rows(x), A, B, alpha)
        return y.view(*x.shape[:-1], y.shape[1])
    # F.linear and not `@`: the same product, and defined on nested tensors too.
    h = F.linear(x, A.to(x.dtype).T)
    return alpha * F.linear(h, B.to(x.dtype).T)


class _LoRADelta(torch.autograd.Function):
    """The low-rank part's gradient: dx = alpha * t @ A.T, dA = alpha * x.T @ t, t = dy @ B.T."""

    @staticmethod
    def forward(ctx, x, A, B, alpha):
        need_dx, need_dA, need_dB = ctx.needs_input_grad[:3]
        h = x @ A.to(x.dtype)  # (M, R)
        ctx.save_for_backward(x if need_dA else None, A, B, h if need_dB else None)
        ctx.alpha = alpha
        return alpha * (h @ B.to(x.dtype))

    @staticmethod
    def backward(ctx, dy):
        return (_delta_gradients_once if torch.is_grad_enabled() else _delta_gradients)(ctx, dy)


def _delta_gradients(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    """Return the gradient of each argument of _LoRADelta."""
    x, A, B, h = ctx.saved_tensors
    need_dx, need_dA, need_dB = ctx.needs_input_grad[:3]
    t = dy @ B.to(dy.dtype).T if need_dx or need_dA else None  # (M, R)
    dx = ctx.alpha * (t @ A.to(dy.dtype).T) if need_dx else None
    dA = ctx.alpha * (x.T @ t).to(A.dtype) if need_dA else None
    dB = ctx.alpha * (h.T @ dy).to(B.dtype) if need_dB else None
    return dx, dA, dB, None


_delta_gradients_once = once_differentiable(_delta_gradients)


def _autocast(
    x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor
) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor]:
    """Cast as autocast casts what F.linear gets; float32 adapters stay, the kernels cast them."""
    device = x.device.type
    dtype = torch.get_autocast_dtype(device)

    def cast(t: Any) -> Any:
        eligible = isinstance(t, Tensor) and t.is_floating_point() and t.dtype != torch.float64
        return t.to(dtype) if eligible and t.device.type == device else t

    x, weight, bias = cast(x), cast(weight), cast(bias)
    keep = x.dtype in HALF
    A, B = (t if keep and getattr(t, "dtype", None) == torch.float32 else cast(t) for t in (A, B))
    return x, weight, bias, A, B


def _device_type(x: Tensor) -> str:
    # Device.type makes its string anew at each call, 4 us cold: not for the commonest answer.
    return "cpu" if x.is_cpu else x.device.type


def _rows(x: Tensor) -> Tensor:
    """View x (..., K) as a matrix (M, K); a copy only where its strides forbid a view."""
    return x if x.dim() == 2 else x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def _with_shape(rows: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Give a fresh matrix its leading dimensions.

    By `_unsafe_view`, as F.linear itself does: what leaves a Function as a view can't be written
    into, and `nn.ReLU(inplace=True)` behind a linear does just that.
    """
    return rows if len(shape) == 2 else torch.ops.aten._unsafe_view.default(rows, shape)


def _stand_in(tensor: Tensor) -> Tensor:
    """Keep a dtype without the data: the backward reads no more of what it does not need."""
    return tensor.new_empty(0, 0)
