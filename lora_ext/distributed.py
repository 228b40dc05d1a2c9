"""Tensor parallelism: how a LinearWithLoRA is split over ranks, and the operators' sharding rules.

A rank computes with its part of each tensor, by the same kernels:

    columns   weight (N/p, K)  bias (N/p,)  A (K, R) whole   B (R, N/p)    y (M, N/p)
    rows      weight (N, K/p)  bias (N,)    A (K/p, R)       B (R, N) whole   y (M, N), a summand

In rows the sum over ranks is the one that the base layer needs anyway: h = x @ A stays a summand
on each rank, and no communication is added for the low-rank part.
"""

from functools import partial
from typing import Any

import torch
from torch import nn
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
from torch.distributed.tensor._op_schema import RuntimeSchemaInfo
from torch.distributed.tensor.experimental import register_sharding
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel
from torch.nn import Parameter

from .backends import dtensor
from .layers import LinearWithLoRA

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
        return _distribute(self, module, device_mesh, placements)


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
        return _distribute(self, module, device_mesh, placements)


def _distribute(
    style: Any, layer: LinearWithLoRA, mesh: DeviceMesh, placements: dict[str, Placement]
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

    return distribute_module(
        layer,
        mesh,
        shard,
        partial(style._prepare_input_fn, style.input_layouts, style.desired_input_layouts),
        partial(style._prepare_output_fn, style.output_layouts, style.use_local_output),
    )


_FWD = torch.ops.lora_ext.lora_linear_fwd.default
_BWD = torch.ops.lora_ext.lora_linear_bwd.default


@register_sharding(_FWD)
def _forward_rules(x, weight, bias, A, B, alpha):
    """(y, h) from (x, weight, bias, A, B, alpha), for one dimension of the mesh at a time."""
    whole, summand = Replicate(), Partial()

    def inputs(x, weight, bias_part, A, B):
        return [x, weight, None if bias is None else bias_part, A, B, None]

    return [
        ([whole, whole], inputs(whole, whole, whole, whole, whole)),
        ([Shard(0), Shard(0)], inputs(Shard(0), whole, whole, whole, whole)),  # rows of x
        ([Shard(1), whole], inputs(whole, Shard(0), Shard(0), whole, Shard(1))),  # columns
        # Rows: each rank adds its share of the bias, so that the sum has it once.
        ([summand, summand], inputs(Shard(1), Shard(1), summand, Shard(0), whole)),
    ]


@register_sharding(_BWD)
def _backward_rules(dy, x, weight, A, B, h, alpha, needs):
    """(dx, dweight, dbias, dA, dB) from (dy, x, weight, A, B, h, alpha, needs), likewise."""
    whole, summand = Replicate(), Partial()
    need_dx, need_dweight, _, need_dA, need_dB = needs

    def rule(outputs, dy, x, weight, A, B, h):
        # A result not asked for and an input not read have no elements: nothing to split.
        outputs = [out if need else whole for out, need in zip(outputs, needs, strict=True)]
        read = (need_dweight or need_dA, need_dx, need_dx, need_dx or need_dA, need_dB)
        parts = zip((x, weight, A, B, h), read, strict=True)
        return outputs, [dy, *(part if r else whole for part, r in parts), None, None]

    return [
        rule([whole] * 5, whole, whole, whole, whole, whole, whole),
        rule([Shard(0)] + [summand] * 4, Shard(0), Shard(0), whole, whole, whole, Shard(0)),
        rule(
            [summand, Shard(0), Shard(0), summand, Shard(1)],
            Shard(1), whole, Shard(0), whole, Shard(1), whole,
        ),
        rule(
            [Shard(1), Shard(1), whole, Shard(0), summand],
            whole, Shard(1), Shard(1), Shard(0), whole, summand,
        ),
    ]  # fmt: skip


# The rules depend on `needs`, which register_sharding would leave out of the key that it keeps a
# derived rule under: two layers of one shape, one with its bias frozen, would share theirs.
DTensor._op_dispatcher.sharding_propagator.op_to_schema_info[_BWD] = RuntimeSchemaInfo(
    static_argnum=7, needs_pytree=True
)
dtensor.TYPES.add(DTensor)
