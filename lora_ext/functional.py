"""lora_linear(): argument checks, autocast, choice of backend, and the one autograd Function."""

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from .backends import BACKENDS, choose, reference
from .call import Call, LowRank, Weight
from .checks import HALF, check_arguments, check_dropout, fit
from .dropout import draw_keep, scale_of

if TYPE_CHECKING:
    from .panels import Panels

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
    dropout_mask: str = "hash",
) -> Tensor:
    """Linear layer with a low-rank update: `y = x @ weight.T + bias + alpha * (x @ A @ B)`.

    Differentiable in `x`, `weight`, `bias`, `A` and `B`, any number of times: under `create_graph`
    the gradients are computed by PyTorch's own operations. Follows autocast as `F.linear` does.

    Args:
        x: input, (..., in_features); any strides, any number of rows, none included.
        weight: (out_features, in_features), of x's dtype.
        bias: (out_features,), of x's dtype, or None.
        A: (in_features, rank), of x's dtype, or float32 over a bfloat16 or float16 base.
        B: (rank, out_features), likewise.
        alpha: factor of the low-rank part, applied as it is: not divided by the rank.
        backend: name of the backend to run; None takes the first that can.
        dropout: probability with which an element of x is zero for the low-rank part, which is
            scaled by 1 / (1 - dropout) in return; from 0 to 1, where that part is zero.
        dropout_mask: how the mask comes from torch's default generator: "hash" draws a seed, the
            fast way; "torch" draws what `F.dropout` would on a CPU, as PEFT does.

    Returns:
        y, (..., out_features), of the dtype that `F.linear(x, weight, bias)` gives.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a shape, device, dropout or dropout_mask that does not fit, or a backend that
            can't run here.

    Source:
        Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", arXiv:2106.09685.

    """
    if weight is None:  # lora_delta is the low-rank part alone
        raise TypeError("weight must be a torch.Tensor, got NoneType")
    return adapted(x, weight, bias, A, B, alpha, backend, dropout, dropout_mask)


def adapted(
    x: Tensor,
    weight: Tensor | Weight | None,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    scale: float,
    backend: str | None = None,
    dropout: float = 0.0,
    mask: str = "hash",
    panels: "Panels | Codes | None" = None,
) -> Tensor:
    """Return what lora_linear does; `weight` None is the low-rank part alone.

    A weight of codes comes as a Weight. Of 4 bits, y has x's dtype in autocast too, which is how
    bitsandbytes' linears give it.
    `mask` is the draw of dropout, see `dropout.draw_keep`. `panels` is the weight laid out once,
    fresh (panels.py). A backend that reads no panels, and autocast where it casts the weight, take
    the weight itself.
    """
    codes, dtype, given = None, None, weight
    if isinstance(weight, Weight):
        codes, weight = weight, None
        dtype = None if codes.format == "int8" else x.dtype
    try:
        # Not for meta: PyTorch raises when asked about a device that has no autocast.
        if not x.is_meta and torch.is_autocast_enabled("cpu" if x.is_cpu else x.device.type):
            x, weight, bias, A, B = cast_by_autocast(x, weight, bias, A, B)
        if type(scale) not in (float, int):
            check_arguments(x, weight, bias, A, B, scale)
            scale = float(scale)  # any real number, such as numpy's: the operators take these two
        keep = None
        if dropout:
            check_dropout(dropout, mask)
            scale, keep = scale * scale_of(dropout), draw_keep(x, dropout, mask)
        base = codes if weight is None else Weight(weight)
        call = Call(x, base, bias, LowRank(A, B, scale, keep))
        name = choose(backend, call)
        if name != "cpp" and not fit(x, weight, bias, A, B, scale):  # csrc/call.cpp checks itself
            check_arguments(x, weight, bias, A, B, scale)
        if codes is not None:
            panels = Codes(codes, codes)
        elif panels is not None:
            given_panels = name == "cpp" and weight is given
            panels = panels.for_input(x) if given_panels else None  # type: ignore[union-attr]
        if torch._C._get_tracing_state() is not None:  # torch.jit.trace would keep this very x
            rows = x if keep is None else rows_of(x)  # and this shape
            y, _ = reference.forward(Call(rows, codes or call.weight, bias, call.low))
            y = y if keep is None else with_shape(y, x.shape)
            return y if dtype is None else y.to(dtype)
        if torch.is_grad_enabled() and (
            x.requires_grad
            or A.requires_grad
            or B.requires_grad
            or (weight is not None and weight.requires_grad)
            or (bias is not None and bias.requires_grad)
        ):
            y = _LoRALinear.apply(x, weight, bias, A, B, (call, name, panels))
            y = y if isinstance(y, Tensor) else y[0]
            return y if dtype is None or y.dtype is dtype else y.to(dtype)
        if panels is not None or x.dim() != 2:
            base = call.weight if panels is None else panels.forward
            call = Call(rows_of(x), base, bias, call.low)
        y, _ = BACKENDS[name].forward(call)
        y = with_shape(y, x.shape)
        return y if dtype is None or y.dtype is dtype else y.to(dtype)
    except (AttributeError, IndexError, NotImplementedError, RuntimeError, TypeError, ValueError):
        _raise_what_does_not_fit(x, weight, bias, A, B, scale)
        raise


class Codes(NamedTuple):
    """A weight of codes, for both directions; as `Panels` has one for each."""

    forward: Weight
    backward: Weight


def _raise_what_does_not_fit(*arguments: Any) -> None:
    """Raise the error that names an argument, or that a transform of torch.func is active."""
    try:
        check_arguments(*arguments)
    except (TypeError, ValueError) as error:
        raise error from None
    if torch._C._are_functorch_transforms_active():
        raise RuntimeError(_NO_TRANSFORM)


class _LoRALinear(torch.autograd.Function):
    """The hand-written gradient, of the base and the low-rank part or of the latter alone.

    Keeps h = (keep * x) @ A, dropout's bits, and of the inputs what the backward will read. What is
    no tensor comes as one tuple, and what is None is not saved: each argument and each tensor saved
    costs the host 0.5 us a step.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, A, B, how):
        call, name, panels = how
        if panels is not None or x.dim() != 2:
            base = call.weight if panels is None else panels.forward
            call = Call(rows_of(x), base, bias, call.low)
        y, h = BACKENDS[name].forward(call)
        need_dx, need_dweight, _, need_dA, need_dB, _ = ctx.needs_input_grad
        keeps_x = need_dA or need_dweight
        saved = (
            x if keeps_x else None,
            weight if need_dx else None,
            A if need_dx else None,
            B if need_dx or need_dA else None,
            h if need_dB else None,
        )
        _, _, scale, keep = call.low
        if keep is None:
            ctx.save_for_backward(*saved)
        else:
            ctx.save_for_backward(*saved, keep)
        # A and B where they are not read: their gradients take the layout. A second derivative
        # reads A again, if it is still the same.
        unread = None if need_dx else (A, B, _version_of(A))
        ctx.call = (x.shape, unread, scale, name, None if panels is None else panels.backward)
        if x.dim() != 2:
            y = with_shape(y, x.shape)
        # Without x a second derivative finds h's own graph by h being a result of this Function.
        if need_dB and need_dx and not keeps_x:
            ctx.set_materialize_grads(False)
            return y, h
        return y

    @staticmethod
    def backward(ctx, dy, dh=None):
        # Grad mode is on here only under create_graph=True. A compiler traces with it on as well.
        under_create_graph = torch.is_grad_enabled() and not torch.compiler.is_compiling()
        if under_create_graph or dy is None or dh is not None:
            return _differentiable_gradients(ctx, dy, dh)
        x, weight, A, B, h, *keep = ctx.saved_tensors
        x_shape, unread, scale, name, panels = ctx.call
        if unread is not None:
            A, B = unread[0], unread[1] if B is None else B
        as_rows = len(x_shape) == 2
        if not as_rows:
            x, dy = None if x is None else rows_of(x), rows_of(dy)
        base = panels or (None if weight is None else Weight(weight))
        call = Call(x, base, None, LowRank(A, B, scale, keep[0] if keep else None))
        needs = ctx.needs_input_grad[:5]
        dx, dweight, dbias, dA, dB = BACKENDS[name].backward(dy, call, h, needs)
        if not as_rows and dx is not None:
            dx = with_shape(dx, x_shape)
        return dx, dweight, dbias, dA, dB, None


def _version_of(t: Tensor) -> int | None:
    """Return how often a tensor was written to; None where PyTorch does not count."""
    return None if torch.compiler.is_compiling() or t.is_inference() else t._version


def _differentiable_gradients(
    ctx: Any, dy: Tensor | None, dh: Tensor | None
) -> tuple[Tensor | None, ...]:
    """Return the gradients by differentiable operations: under create_graph they have a graph.

    `dh` comes, and dy may be absent, where a second derivative goes through an h that is a result.
    """
    x, weight, A, B, h, *kept = ctx.saved_tensors
    x_shape, unread, scale, _, layout = ctx.call
    if unread is not None:
        A, B = unread[0], unread[1] if B is None else B
        if ctx.needs_input_grad[4] and _version_of(A) != unread[2]:
            raise RuntimeError("A must be as it was in the forward, got one written to in place")
    keep = kept[0] if kept else None
    needs = need_dx, _, need_dbias, need_dA, need_dB = ctx.needs_input_grad[:5]
    dx = dweight = dbias = dA = dB = None
    if dy is not None:
        rows = None if x is None else rows_of(x)
        if need_dB and rows is not None:  # h again, with its graph
            h = reference.masked(rows, keep) @ A.to(rows.dtype)
        codes = None if layout is None or layout.scale is None else layout
        base = codes if weight is None else Weight(weight)
        call = Call(rows, base, None, LowRank(A, B, scale, keep))
        dx, dweight, dbias, dA, dB = reference.backward(rows_of(dy), call, h, needs)
    if dh is not None:  # h = (keep * x) @ A, of an A that needs no gradient
        through_h = reference.masked(dh @ A.to(dh.dtype).T, keep)
        dx = through_h if dx is None else dx + through_h
    if dx is not None:
        dx = dx.view(x_shape)
    return dx, dweight, dbias, dA, dB, None


def cast_by_autocast(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, A: Tensor, B: Tensor
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor, Tensor]:
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


def rows_of(x: Tensor) -> Tensor:
    """View x (..., K) as a matrix (M, K); a copy only where its strides forbid a view."""
    return x if x.dim() == 2 else x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def with_shape(rows: Tensor, like: torch.Size) -> Tensor:
    """Give a fresh matrix the leading dimensions of a shape.

    By `_unsafe_view`, as F.linear itself does: what leaves a Function as a view can't be written
    into, and `nn.ReLU(inplace=True)` behind a linear does just that.
    """
    if len(like) == 2:
        return rows
    return torch.ops.aten._unsafe_view.default(rows, (*like[:-1], rows.shape[1]))
