"""Data parallelism over two processes: DDP, FSDP2, and checkpoints of sharded models."""

import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from lora_ext import distributed, functional
from lora_ext.testing import LinearWithLoRA as PlainLinearWithLoRA
from tests.processes import run_cases
from tests.training import (
    Trained,
    assert_trains_like_plain,
    batches,
    loss_of,
    make_models,
    train,
    with_float32_adapters,
)

STEPS = len(batches())
FP64 = torch.float64


def on_my_rows(model: nn.Module, x: Tensor, target: Tensor) -> Tensor:
    """Run forward and backward on this rank's part of the batch; return the mean loss over all."""
    rank, world = dist.get_rank(), dist.get_world_size()
    loss = loss_of(model, x.chunk(world)[rank], target.chunk(world)[rank])
    loss.backward()
    total = loss.detach().clone()
    dist.all_reduce(total)
    return total / world


def whole(trained: Trained) -> Trained:
    """Gather what is sharded, and name it as without DDP."""
    state = {
        name.removeprefix("module."): t.full_tensor() if isinstance(t, DTensor) else t
        for name, t in trained.state.items()
    }
    return Trained(trained.losses, state)


def assert_equals(trained: Trained, want: Trained) -> None:
    """Assert that losses, parameters and gradients are those of a single process."""
    got = whole(trained)
    torch.testing.assert_close(got.losses, want.losses)
    assert list(got.state) == list(want.state)
    for name, value in want.state.items():
        assert value.any(), name
        torch.testing.assert_close(got.state[name], value, msg=lambda m, name=name: f"{name}: {m}")


@contextmanager
def counted_calls() -> Iterator[list[int]]:
    """Count what goes through a Function with its weight, that is not composed."""
    calls, functions = [0], (functional._LoRALinear, distributed._OnParts)

    def counting(apply):
        def counted(x, weight, *others):
            calls[0] += weight is not None
            return apply(x, weight, *others)

        return counted

    with ExitStack() as stack:
        for function in functions:
            stack.enter_context(mock.patch.object(function, "apply", counting(function.apply)))
        yield calls


def layers_of(model: nn.Module) -> list[nn.Module]:
    return [m for block in model.blocks for m in (block.up, block.down)] + [model.head]


def ddp_trains_as_one_process() -> None:
    models = make_models(FP64)
    with counted_calls() as calls:
        trained = train(DistributedDataParallel(models["ours"]), on_my_rows)
    assert calls == [5 * STEPS]
    assert_equals(trained, train(models["exact"]))


def ranks_draw_masks_of_their_own() -> None:
    """Each by its own seed; the gradients are the mean of what single processes compute so."""
    rank, world = dist.get_rank(), dist.get_world_size()
    x, target = batches()[0]
    for draw in ("hash", "torch"):
        for wrap in (DistributedDataParallel, shard_root_and_blocks):
            models = [make_models(FP64)["ours"] for _ in range(2)]
            for layer in (layer for model in models for layer in layers_of(model)):
                layer.lora.dropout, layer.lora.dropout_mask = 0.3, draw
            losses = []
            for other in range(world):
                torch.manual_seed(20 + other)
                losses.append(loss_of(models[0], x.chunk(world)[other], target.chunk(world)[other]))
            torch.stack(losses).mean().backward()
            wrapped = wrap(models[1])
            torch.manual_seed(20 + rank)
            loss = loss_of(wrapped, x.chunk(world)[rank], target.chunk(world)[rank])
            torch.testing.assert_close(loss, losses[rank])
            loss.backward()
            got = whole(Trained(loss, {n: p.grad for n, p in models[1].named_parameters()}))
            for name, parameter in models[0].named_parameters():
                if parameter.requires_grad:
                    torch.testing.assert_close(got.state[name], parameter.grad, msg=name)
            seeds = [torch.manual_seed(20 + other) and models[0](x.to(FP64)) for other in (0, 1)]
            assert not torch.equal(*seeds)


def shard_root_and_blocks(model: nn.Module) -> nn.Module:
    shard_blocks(model)
    return fully_shard(model)


def shard_layers(model: nn.Module, **options) -> None:
    for layer in layers_of(model):
        fully_shard(layer, **options)


def shard_blocks(model: nn.Module, **options) -> None:
    for block in model.blocks:
        fully_shard(block, **options)


def shard_root(model: nn.Module, **options) -> None:
    """Leave all to the call on the model itself."""


def shard_lora(model: nn.Module, **options) -> None:
    for layer in layers_of(model):
        fully_shard(layer.lora, **options)


def shard_linear(model: nn.Module, **options) -> None:
    for layer in layers_of(model):
        fully_shard(layer.linear, **options)


def fsdp(how, fused: bool) -> None:
    """Train sharded; `fused` says whether our operation runs, or `linear` and `lora` apart."""
    models = make_models(FP64)
    model = models["ours"]
    keys = list(model.state_dict())
    how(model)
    fully_shard(model)
    assert list(model.state_dict()) == keys
    assert all(isinstance(p, DTensor) for p in model.parameters())
    with counted_calls() as calls:
        trained = train(model, on_my_rows)
    assert calls == [5 * STEPS if fused else 0]
    assert_equals(trained, train(models["exact"]))


def fsdp_per_layer() -> None:
    fsdp(shard_layers, fused=True)


def fsdp_per_block() -> None:
    fsdp(shard_blocks, fused=True)


def fsdp_root_only() -> None:
    fsdp(shard_root, fused=True)


def fsdp_lora_on_its_own() -> None:
    fsdp(shard_lora, fused=False)


def fsdp_linear_on_its_own() -> None:
    fsdp(shard_linear, fused=False)


def fsdp_in_bfloat16() -> None:
    """A bf16 policy over a float32 model: as far from the exact run as the plain layer is."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    models = make_models()
    results = {"exact": train(models["exact"])}
    for name in ("ours", "plain"):
        shard_blocks(models[name], mp_policy=policy)
        fully_shard(models[name], mp_policy=policy)
        with counted_calls() as calls:
            results[name] = whole(train(models[name], on_my_rows))
        assert calls == [5 * STEPS if name == "ours" else 0]
    assert_trains_like_plain(**results, dtype=torch.bfloat16)


def fsdp_float32_adapters_over_bfloat16() -> None:
    """Two dtypes in one unit, kept as they are."""
    models = make_models(torch.bfloat16)
    models["exact"].load_state_dict(models["plain"].state_dict())
    results = {"exact": train(models["exact"])}
    for name in ("ours", "plain"):
        model = with_float32_adapters(models[name])
        shard_layers(model)
        fully_shard(model)
        with counted_calls() as calls:
            results[name] = whole(train(model, on_my_rows))
        assert calls == [5 * STEPS if name == "ours" else 0]
    assert all(t.dtype == torch.float32 for t in results["ours"].state.values())
    assert_trains_like_plain(**results, dtype=torch.bfloat16)


def checkpoint_of_a_sharded_model() -> None:
    """Saved by two ranks; read back sharded another way, and whole into the plain classes."""
    model = make_models(FP64)["ours"]
    shard_blocks(model)
    fully_shard(model)
    train(model, on_my_rows)
    temporary = tempfile.TemporaryDirectory()
    folder = [temporary.name]
    dist.broadcast_object_list(folder)  # rank 0's
    dcp.save(model.state_dict(), checkpoint_id=folder[0])
    models = make_models(FP64)
    shard_layers(models["ours"])
    fully_shard(models["ours"])
    x = batches()[0][0].to(FP64)
    want = model(x)
    for other in (models["ours"], models["plain"]):
        assert not torch.allclose(other(x), want)
        state = other.state_dict()
        dcp.load(state, checkpoint_id=folder[0])
        other.load_state_dict(state, strict=True)
        torch.testing.assert_close(other(x), want)
    assert type(models["plain"].head) is PlainLinearWithLoRA
    dist.barrier()
    temporary.cleanup()


CASES = {
    case.__name__: case
    for case in (
        ddp_trains_as_one_process,
        ranks_draw_masks_of_their_own,
        fsdp_per_layer,
        fsdp_per_block,
        fsdp_root_only,
        fsdp_lora_on_its_own,
        fsdp_linear_on_its_own,
        fsdp_in_bfloat16,
        fsdp_float32_adapters_over_bfloat16,
        checkpoint_of_a_sharded_model,
    )
}


@pytest.fixture(scope="module")
def failures() -> dict[str, str]:
    return run_cases(CASES, world=2)


@pytest.mark.parametrize("name", CASES)
def test_two_processes_train_as_one(failures, name):
    assert name not in failures, failures[name]
