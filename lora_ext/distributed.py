"""Tensor parallelism: how a LinearWithLoRA is split over ranks, and the operation on the parts.

A rank computes with its part of each tensor, by the same kernels:

    columns   weight (N/p, K)  bias (N/p,)  A (K, R) whole   B (R, N/p)    y (M, N/p)
    rows      weight (N, K/p)  bias (N,)    A (K/p, R)       B (R, N) whole   y (M, N), a summand

Dropout's mask is the unsplit layer's, of which a rank in rows draws its own columns: the ranks need
their default generators in one state, as any dropout on replicated tensors does.

In rows the sum over ranks is the one that the base layer needs anyway: h = x @ A stays a summand
on each rank, and no communication is added for the low-rank part.
"""

from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import (
    DTensor,
    Partial,
    Placement,
    Replicate,
    Shard,
    distribute_module,
    distribute_tensor,
)
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel
from torch.nn import Parameter

from .backends import BACKENDS, choose
from .bases import why_not_now
from .call import Call, LowRank, Weight
from .checks import check_arguments, fit
from .dropout import draw_keep, scale_of
from .explain import other_backends
from .functional import cast_by_autocast, rows_of, with_shape
from .layers import LinearWithLoRA, why_composed

__all__ = ["LoRAColwiseParallel", "LoRARowwiseParallel"]


class LoRAColwiseParallel(ColwiseParallel):
    """Split a LinearWithLoRA by its outputs, as ColwiseParallel splits an nn.Linear.

    `weight` (N, K), `bias` (N,) and `B` (R, N) are sharded along N, `A` (K, R) is the same on all
    ranks. Takes x whole (`input_layouts=Shard(1)` gathers a split sequence first) and gives y
    sharded along N. On a plain nn.Linear it is ColwiseParallel.

    Args:
        input_layouts: how x comes, Replicate() if not said.
        output_layouts: how y is wanted, Shard(-1) if not said.
        use_local_output: give y as a plain tensor, the rank's part; True if not said.

    Raises:
        ValueError: when applied to a layer that is merged, or whose linear is more than its weight.

    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        if not isinstance(module, LinearWithLoRA):
            return super()._apply(module, device_mesh)
        placements = {"weight": Shard(0), "bias": Shard(0), "A": Replicate(), "B": Shard(1)}
        return _distribute(self, module, device_mesh, placements, _Columns(self))


class LoRARowwiseParallel(RowwiseParallel):
    """Split a LinearWithLoRA by its inputs, as RowwiseParallel splits an nn.Linear.

    `weight` (N, K) and `A` (K, R) are sharded along K, `bias` (N,) and `B` (R, N) are the same on
    all ranks; the bias is added once. Takes x sharded along K and gives y whole
    (`output_layouts=Shard(1)` leaves it split along the sequence). On a plain nn.Linear it is
    RowwiseParallel.

    Args:
        input_layouts: how x comes, Shard(-1) if not said.
        output_layouts: how y is wanted, Replicate() if not said.
        use_local_output: give y as a plain tensor, the rank's part; True if not said.

    Raises:
        ValueError: when applied to a layer that is merged, or whose linear is more than its weight.

    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        if not isinstance(module, LinearWithLoRA):
            return super()._apply(module, device_mesh)
        self.desired_input_layouts = (Shard(-1),)
        placements = {"weight": Shard(1), "bias": Replicate(), "A": Shard(0), "B": Replicate()}
        return _distribute(self, module, device_mesh, placements, _Rows(self))


def _distribute(
    style: Any,
    layer: LinearWithLoRA,
    mesh: DeviceMesh,
    placements: dict[str, Placement],
    split: "_Split",
) -> nn.Module:
    if layer._unmerged_weight:
        raise ValueError("module must not be merged: call unmerge_(model) before parallelising")
    if type(layer.linear) is not nn.Linear:
        got = type(layer.linear).__name__
        raise ValueError(f"module must be a LinearWithLoRA over an nn.Linear, got one over a {got}")

    def shard(name: str, module: nn.Module, mesh: DeviceMesh) -> None:
        for key, parameter in list(module._parameters.items()):
            if parameter is not None:
                source = getattr(style, "src_data_rank", 0)
                part = distribute_tensor(parameter, mesh, [placements[key]], src_data_rank=source)
                module.register_parameter(key, Parameter(part, parameter.requires_grad))

    layer._parallel = split
    hooks: tuple[Any, Any] = (partial(split.take, style), partial(split.give, style))
    return distribute_module(layer, mesh, shard, *hooks)


class _Split:
    """How one layer is split: what x comes as, what y leaves as, which results are summands."""

    takes: Placement  # x
    gives: Placement  # y, computed from the parts
    sums_dx = sums_dA = sums_dB = False  # a rank has a summand of it

    def __init__(self, style: Any) -> None:
        # A layout that the parts have anyway needs no DTensor around x and y, 50 us a layer.
        self.x_stays_plain = style.input_layouts == style.desired_input_layouts
        leaves: tuple[Placement, ...] = style.output_layouts if style.use_local_output else ()
        self.sums_y = self.gives.is_partial() and leaves == (Replicate(),)
        self.y_stays_plain = self.sums_y or leaves == (self.gives,)

    def take(self, style: Any, layer: nn.Module, inputs: Any, mesh: DeviceMesh) -> Any:
        """Hook before the layer: what comes as the layer takes it stays a plain tensor."""
        x = inputs[0]
        if self.x_stays_plain and not isinstance(x, DTensor):
            return x
        return style._prepare_input_fn(
            style.input_layouts, style.desired_input_layouts, layer, inputs, mesh
        )

    def give(self, style: Any, layer: Any, y: Tensor, mesh: DeviceMesh) -> Tensor:
        """Hook behind the layer: what leaves as it was computed stays a plain tensor."""
        if not isinstance(y, DTensor):
            if self.y_stays_plain:
                return y
            shape = torch.Size((*y.shape[:-1], layer.out_features))  # parts may be uneven
            strides = torch.empty(shape, device="meta").stride()
            y = DTensor.from_local(
                y, mesh, (self.gives,), run_check=False, shape=shape, stride=strides
            )
        return style._prepare_output_fn(
            style.output_layouts, style.use_local_output, layer, y, mesh
        )

    def __call__(self, layer: LinearWithLoRA, x: Tensor) -> Tensor:
        """Return y plain: this rank's part or summand, or the sum; composed, a DTensor."""
        linear: Any = layer.linear
        lora: Any = layer.lora
        mesh = lora.A.device_mesh
        why = why_composed(linear, lora, kind=DTensor) or why_not_now(x)
        if why is not None:
            if layer.backend is not None:
                raise ValueError(f"backend {layer.backend!r} can't run this layer: {why}")
            if not isinstance(x, DTensor):
                x = DTensor.from_local(x, mesh, (self.takes,), run_check=False)
            return layer._composed(x)
        sums_dx = self.sums_dx
        if isinstance(x, DTensor):
            if x.placements != self._placements_of(x):
                x = x.redistribute(placements=(self.takes,))
            # What to_local hands back has a gradient that is a summand, or a part, as x was.
            grads = (Partial(),) if sums_dx else x.placements
            x, sums_dx = x.to_local(grad_placements=grads), False
        if isinstance(x, AsyncCollectiveTensor):
            x = x.wait()
        own, low = linear._parameters, lora._parameters
        weight, bias, A, B = own["weight"], own["bias"], low["A"], low["B"]
        if torch.is_autocast_enabled(x.device.type):
            x, weight, bias, A, B = cast_by_autocast(x, weight, bias, A, B)
        scale, keep, dropout = lora.scale, None, lora.dropout if lora.training else 0.0
        if dropout:
            scale *= scale_of(dropout)
            keep = draw_keep(x, dropout, lora.dropout_mask, self._columns_of(layer, mesh))
        operands = (x, weight, bias, A, B, scale, keep)
        return _OnParts.apply(*operands, layer.backend, self, sums_dx)

    def explain(self, layer: LinearWithLoRA, x: Tensor) -> str:
        """Say what runs on this rank's parts, see `lora_ext.explain`."""
        why = why_composed(layer.linear, layer.lora, kind=DTensor) or why_not_now(x)
        if why is not None:
            return f"runs linear(x) + lora(x), composed: {why}"
        parameters: tuple[Any, ...] = (layer.weight, layer.lora.A, layer.lora.B)
        weight, A, B = (t.to_local() for t in parameters)
        part = x.to_local() if isinstance(x, DTensor) else x
        call = Call(part, Weight(weight), None, LowRank(A, B, layer.lora.scale))
        chosen = choose(layer.backend, call)
        return "\n".join([f"{chosen}: runs, on this rank's part", *other_backends(call, chosen)])

    def _columns_of(self, layer: LinearWithLoRA, mesh: DeviceMesh) -> tuple[int, int] | None:
        """Return the first of the columns that this rank has of x, and how many x has; None: all.

        Ranks whose generators are in one state then have parts of one mask, the unsplit layer's.
        """
        if not isinstance(self.takes, Shard):
            return None
        K = layer.in_features
        return min(-(-K // mesh.size()) * mesh.get_local_rank(), K), K

    def _placements_of(self, x: Tensor) -> tuple[Placement, ...]:
        takes = self.takes
        return (Shard(x.ndim - 1),) if isinstance(takes, Shard) else (takes,)


class _Columns(_Split):
    takes, gives = Replicate(), Shard(-1)
    sums_dx = sums_dA = True


class _Rows(_Split):
    takes, gives = Shard(-1), Partial()
    sums_dB = True


class _OnParts(torch.autograd.Function):
    """functional._LoRALinear on a rank's parts: plain x and y, parameters that are DTensors."""

    @staticmethod
    def forward(ctx, x, weight, bias, A, B, scale, keep, backend, split, sums_dx):
        mesh = A.device_mesh
        parts = [x, *(None if t is None else t.to_local() for t in (weight, bias, A, B))]
        if not fit(*parts, scale):
            check_arguments(*parts, scale)
        x, part, bias_part, A_part, B_part = parts
        if split.gives.is_partial() and mesh.get_local_rank() != 0:
            bias_part = None  # so that the sum over ranks has it once
        low = LowRank(A_part, B_part, scale, keep)
        call = Call(rows_of(x), Weight(part), bias_part, low)
        name = choose(backend, call)
        y, h = BACKENDS[name].forward(call)
        if split.sums_y:
            dist.all_reduce(y, group=mesh.get_group())
        need_dx, need_dweight, _, need_dA, need_dB = ctx.needs_input_grad[:5]
        ctx.save_for_backward(
            x if need_dA or need_dweight else None,
            part if need_dx else None,
            A_part,
            B_part,
            h if need_dB else None,
            keep,
        )
        ctx.specs = [None if t is None else t._spec for t in (weight, bias, A, B)]
        ctx.scale, ctx.name, ctx.x_shape = scale, name, x.shape
        ctx.mesh, ctx.split, ctx.sums_dx = mesh, split, sums_dx
        return with_shape(y, x.shape)

    @staticmethod
    def backward(ctx, dy):
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError("a LinearWithLoRA that is split over ranks has no second derivative")
        x, weight, A, B, h, keep = ctx.saved_tensors
        if isinstance(dy, AsyncCollectiveTensor):
            dy = dy.wait()
        call = Call(
            None if x is None else rows_of(x),
            None if weight is None else Weight(weight),
            None,
            LowRank(A, B, ctx.scale, keep),
        )
        needs = ctx.needs_input_grad[:5]
        dx, *others = BACKENDS[ctx.name].backward(rows_of(dy), call, h, needs)
        split, group = ctx.split, ctx.mesh.get_group()
        sums = (ctx.sums_dx, False, False, split.sums_dA, split.sums_dB)
        for gradient, is_summand in zip((dx, *others), sums, strict=True):
            if is_summand and gradient is not None:
                dist.all_reduce(gradient, group=group)
        # By the constructor: from_local takes twice its 35 us, for each parameter.
        gradients = [
            None if gradient is None else DTensor(gradient, spec, requires_grad=False)
            for gradient, spec in zip(others, ctx.specs, strict=True)
        ]
        if dx is not None:
            dx = with_shape(dx, ctx.x_shape)
        return dx, *gradients, None, None, None, None, None
