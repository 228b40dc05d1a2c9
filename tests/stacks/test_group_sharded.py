"""group_ over two processes: FSDP2 by block, by layer and after the fact, and tensor parallelism.

A weight that is not gathered, or split over ranks, is read by nobody: those layers run alone, the
report says why, and training is that of one process all the same.
"""

import copy
from contextlib import ExitStack
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import parallelize_module

from lora_ext import (
    LinearWithLoRA,
    gated_mlp,
    group_,
    grouped,
    mark_only_lora_as_trainable,
    replace_linear_with_lora,
)
from lora_ext.distributed import LoRAColwiseParallel, LoRARowwiseParallel
from tests.processes import run_cases

K, HIDDEN, STEPS = 24, 40, 3
# Group calls of two blocks: siblings are learnt in the first step.
TOGETHER, AT_ONCE = 2 * (STEPS - 1), 2 * STEPS
FP64 = torch.float64


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(K, K, dtype=FP64) for _ in range(3))

    def forward(self, x):
        return self.q(x) * self.k(x).tanh() + self.v(x)


class MLP(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate, self.up = (nn.Linear(K, HIDDEN, dtype=FP64) for _ in range(2))
        self.down = nn.Linear(HIDDEN, K, dtype=FP64)

    def forward(self, x):
        return self.down(nn.functional.silu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention, self.mlp = Attention(), MLP()

    def forward(self, x):
        return x + self.mlp(x + self.attention(x))


def models() -> tuple[nn.Module, nn.Module]:
    """Return a model and its like, to be left as it is."""
    torch.manual_seed(0)
    model = nn.Sequential(Block(), Block())
    replace_linear_with_lora(model, 4, 2.0, dtype=FP64)
    mark_only_lora_as_trainable(model)
    for layer in layers_of(model):
        nn.init.normal_(layer.lora.B, std=0.1)
    return model, copy.deepcopy(model)


def layers_of(model: nn.Module) -> list[LinearWithLoRA]:
    return [m for m in model.modules() if isinstance(m, LinearWithLoRA)]


def trained(model: nn.Module, rows=slice(None)) -> dict[str, torch.Tensor]:
    """Return the parameters after some steps on some rows of each batch, whole."""
    generator = torch.Generator().manual_seed(1)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.05)
    for _ in range(STEPS):
        x = torch.randn(4, 5, K, generator=generator, dtype=FP64)[rows]
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return {
        name: (p.full_tensor() if isinstance(p, DTensor) else p).detach()
        for name, p in model.named_parameters()
    }


def mine() -> slice:
    """Return the rows of a batch of four that are this rank's."""
    rank = dist.get_rank()
    return slice(2 * rank, 2 * rank + 2)


def assert_trains_as_one_process(model, single, rows, siblings: int, mlps: int) -> None:
    """Hold the parameters to those of one process, and so many group calls in all steps."""
    calls = []
    with ExitStack() as stack:
        for function in (grouped._LoRALinears, gated_mlp._GatedMLP):
            seen = mock.Mock(side_effect=function.apply)
            calls.append(seen)
            stack.enter_context(mock.patch.object(function, "apply", seen))
        got = trained(model, rows)
    want = trained(single)
    assert [seen.call_count for seen in calls] == [siblings, mlps]
    assert list(got) == list(want)
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, msg=lambda m, name=name: f"{name}: {m}")


def fsdp_by_block() -> None:
    """What a unit gathers whole runs as groups."""
    model, single = models()
    report = group_(model)
    for block in model:
        fully_shard(block)
    fully_shard(model)
    assert_trains_as_one_process(model, single, mine(), TOGETHER, AT_ONCE)
    assert "2 run q+k+v together" in str(report), report
    assert "2 run as one operation" in str(report), report


def fsdp_of_all() -> None:
    model, single = models()
    report = group_(model)
    fully_shard(model)
    assert_trains_as_one_process(model, single, mine(), TOGETHER, AT_ONCE)
    assert "2 run q+k+v together" in str(report), report
    assert "2 run as one operation" in str(report), report


def fsdp_by_layer() -> None:
    """When q runs, k is not gathered."""
    model, single = models()
    report = group_(model)
    for layer in layers_of(model):
        fully_shard(layer)
    fully_shard(model)
    assert_trains_as_one_process(model, single, mine(), 0, 0)
    assert "alone where a layer has hooks" in str(report), report
    assert "2 run by their module where a layer has hooks" in str(report), report


def fsdp_of_bases() -> None:
    """The frozen linears are units of their own: a sibling's weight is a DTensor until it runs."""
    model, single = models()
    report = group_(model)
    for layer in layers_of(model):
        fully_shard(layer.linear)
    fully_shard(model)
    assert_trains_as_one_process(model, single, mine(), 0, 0)
    assert str(report).count("where linear is a FSDPLinear") == 2, report


def fsdp_before_groups() -> None:
    """Siblings are seen when they run; an MLP whose weights are sharded is not probed."""
    model, single = models()
    for block in model:
        fully_shard(block)
    fully_shard(model)
    report = group_(model)
    assert_trains_as_one_process(model, single, mine(), 2 * TOGETHER, 0)
    assert "2 run q+k+v together" in str(report), report
    assert "2 run gate+up together" in str(report), report


def tensor_parallel(before: bool) -> None:
    model, single = models()
    report = group_(model) if before else None
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    plan = {}
    for i in range(2):
        # q, k and v whole again behind their layers: this attention mixes them elementwise.
        for name in ("q", "k", "v"):
            plan[f"{i}.attention.{name}"] = LoRAColwiseParallel(output_layouts=Replicate())
        plan |= {f"{i}.mlp.{name}": LoRAColwiseParallel() for name in ("gate", "up")}
        plan[f"{i}.mlp.down"] = LoRARowwiseParallel()
    parallelize_module(model, mesh, plan)
    report = report or group_(model)
    assert_trains_as_one_process(model, single, slice(None), 0, 0)
    assert "split over ranks" in str(report), report


def tensor_parallel_after_groups() -> None:
    tensor_parallel(before=True)


def tensor_parallel_before_groups() -> None:
    tensor_parallel(before=False)


CASES = {
    case.__name__: case
    for case in (
        fsdp_by_block,
        fsdp_of_all,
        fsdp_by_layer,
        fsdp_of_bases,
        fsdp_before_groups,
        tensor_parallel_after_groups,
        tensor_parallel_before_groups,
    )
}


@pytest.fixture(scope="module")
def failures() -> dict[str, str]:
    return run_cases(CASES, world=2)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_two_processes(failures, name):
    assert name not in failures, failures[name]
