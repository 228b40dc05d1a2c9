"""Bases that are called: quantised, hooked, of another library. The low-rank part is added to y.

    y = base(x);  y += scale * ((keep * x) @ A @ B)

Where nobody else holds base(x), the sum is taken in place, some rows at a time: beyond y there is
no (M, N) of memory. There is no copy of x, and none of it in A's dtype.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn import Parameter

from . import forward_only
from .backends import BACKENDS, choose, reference
from .bases import hooks_of
from .call import Call, LowRank
from .checks import HALF, check_dropout
from .dropout import draw_keep, drop, scale_of
from .functional import adapted, cast_by_autocast, rows_of

_PLAIN = (Tensor, Parameter)
_PIECE = 1 << 17  # elements of y that are added to at a time: they stay in a core's cache
# Linears that return memory of their own, which no backward of theirs reads.
_FRESH = {
    ("bitsandbytes.nn.modules", name)
    for name in ("Linear4bit", "LinearNF4", "LinearFP4", "Linear8bitLt")
}


def call_base(base: nn.Module, x: Tensor) -> tuple[Tensor, bool]:
    """Return base(x), and whether it may be added to in place.

    Args:
        base: a linear layer.
        x: (..., in_features).

    """
    kind = (type(base).__module__, type(base).__name__)
    alone = hooks_of(base.__dict__, 0) is None
    if alone and (format := forward_only.format_of(base)) is not None:
        return forward_only.call(base, x, format), True
    y = base(x)
    ours = kind in _FRESH or _of_torchao(base)
    return y, alone and ours and y is not x


def _of_torchao(base: nn.Module) -> bool:
    kind = type(base._parameters.get("weight"))
    if type(base) is not nn.Linear or kind in _PLAIN:  # of others a compiler can't ask the module
        return False
    return kind.__module__.startswith("torchao.")


def lora_delta(
    x: Tensor, A: Tensor, B: Tensor, scale: float, *, dropout: float = 0.0, mask: str = "hash"
) -> Tensor:
    """Low-rank part alone: `scale * (x @ A @ B)`.

    What is added to a base that is not a plain linear (quantised, hooked, a subclass). A and B are
    cast to x's dtype where the kernels do not take theirs. Nested tensors, transforms of
    torch.func, torch.jit.trace and torch.export get PyTorch's own products and gradient.

    Args:
        x: input, (..., in_features); a nested tensor too.
        A: (in_features, rank).
        B: (rank, out_features).
        scale: factor of the product.
        dropout: as `lora_linear` has it.
        mask: as `lora_linear`'s `dropout_mask`.

    Returns:
        (..., out_features), in x's dtype (autocast's inside an autocast region).

    """
    plain = type(x) is Tensor and type(A) in _PLAIN and type(B) in _PLAIN and not x.is_nested
    if plain and not torch._C._are_functorch_transforms_active():
        return adapted(x, None, None, *_taken(A, B, x), scale, None, dropout, mask)
    if dropout:
        check_dropout(dropout, mask)
        x, scale = drop(x, dropout), scale * scale_of(dropout)
    # F.linear and not `@`: the same product, and defined on nested tensors too.
    h = F.linear(x, A.to(x.dtype).T)
    return scale * F.linear(h, B.to(x.dtype).T)


def _taken(A: Tensor, B: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return A and B in dtypes that the kernels take next to x: x's, or float32 over halves."""
    if A.dtype == B.dtype == torch.float32 and x.dtype in HALF:
        return A, B
    return A.to(x.dtype), B.to(x.dtype)


def add_low_rank(
    y: Tensor,
    x: Tensor,
    A: Tensor,
    B: Tensor,
    scale: float,
    *,
    fresh: bool,
    dropout: float = 0.0,
    mask: str = "hash",
    keep: Tensor | None = None,
) -> Tensor:
    """Return `y + scale * ((keep * x) @ A @ B)`, in y's dtype and, where y is fresh, its memory.

    Args:
        y: what the base gave, (..., out_features).
        x: (..., in_features).
        A: (in_features, rank), of any dtype.
        B: (rank, out_features), likewise.
        scale: factor of the product.
        fresh: whether y may be written to.
        dropout: as `lora_linear` has it.
        mask: as `lora_linear`'s `dropout_mask`.
        keep: a mask as bits that was drawn before, for a y that is fresh; `dropout` is then that
            which it was drawn with.

    """
    followed = torch.compiler.is_compiling() or torch.jit.is_tracing()
    whole = _whole(y) if fresh and not followed else None
    if whole is None or any(type(t) not in _PLAIN for t in (x, A, B)) or A.shape[1] == 0:
        assert keep is None, "a mask was drawn for a y that can't be written to"
        return y + lora_delta(x, A, B, scale, dropout=dropout, mask=mask).to(y.dtype)
    if torch.is_autocast_enabled(x.device.type):
        x, _, _, A, B = cast_by_autocast(x, None, None, A, B)
    A, B = _taken(A, B, x)
    if dropout:
        check_dropout(dropout, mask)
        scale *= scale_of(dropout)
        keep = draw_keep(x, dropout, mask) if keep is None else keep
    name = choose(None, Call(x, None, None, LowRank(A, B, scale, keep)))
    needs = any(t.requires_grad for t in (y, x, A, B))
    if torch.is_grad_enabled() and needs:
        whole = _AddLowRank.apply(whole, x, A, B, scale, keep, name)
    else:
        _add(whole, x, A, B, scale, keep, name)
    same = whole.shape == y.shape
    return whole if same else torch.ops.aten._unsafe_view.default(whole, y.shape)


class _AddLowRank(torch.autograd.Function):
    """y (M, N) += scale * ((keep * x) @ A @ B); keeps of it what the backward reads, never y."""

    @staticmethod
    def forward(ctx, y, x, A, B, scale, keep, name):
        h = _add(y, x, A, B, scale, keep, name)
        ctx.mark_dirty(y)
        _, need_dx, need_dA, need_dB = ctx.needs_input_grad[:4]
        ctx.save_for_backward(x if need_dA or need_dB else None, A, B, h if need_dB else None, keep)
        ctx.call = (x.shape, x.dtype, scale, name)
        return y

    @staticmethod
    def backward(ctx, dy):
        x, A, B, h, keep = ctx.saved_tensors
        shape, dtype, scale, name = ctx.call
        needs = (ctx.needs_input_grad[1], False, False, *ctx.needs_input_grad[2:4])
        rows = None if x is None else rows_of(x)
        call = Call(rows, None, None, LowRank(A, B, scale, keep))
        backward = BACKENDS[name].backward
        if torch.is_grad_enabled():  # under create_graph: by differentiable operations
            backward = reference.backward
            h = None if h is None else reference.masked(rows, keep) @ A.to(dtype)
        dx, _, _, dA, dB = backward(rows_of(dy).to(dtype), call, h, needs)
        return dy, None if dx is None else dx.view(shape), dA, dB, None, None, None


def _add(
    y: Tensor, x: Tensor, A: Tensor, B: Tensor, scale: float, keep: Tensor | None, name: str
) -> Tensor:
    """Add to y (..., N) in place, and return h = (keep * x) @ A, (M, R)."""
    x, forward, N = rows_of(x), BACKENDS[name].forward, y.shape[-1]
    y = y.view(len(x), N)
    step = max(_PIECE // max(N, 1), 16) if x.is_cpu else max(len(x), 1)
    h = []
    for start in range(0, max(len(x), 1), step):
        some = slice(start, start + step)
        low = LowRank(A, B, scale, None if keep is None else keep[some])
        delta, part = forward(Call(x[some], None, None, low))
        y[some].add_(delta)
        h.append(part)
    return h[0] if len(h) == 1 else torch.cat(h)


def _whole(y: Tensor) -> Tensor | None:
    """Return the tensor of y's memory, where it is y's alone; None where y may not be written to.

    A view can't be written to inside a Function. One that is all of its base stands for that base.
    """
    of = y
    if y._is_view():
        assert y._base is not None
        of = y._base
        if (y.requires_grad and of.grad_fn is None) or of.numel() != y.numel():
            return None
    plain = type(y) is type(of) is Tensor and y.is_contiguous() and of.is_contiguous()
    return of if plain else None
