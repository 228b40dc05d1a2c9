"""Tensor parallelism over two processes, and with FSDP2 across it over four."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import parallelize_module
from torch.utils.checkpoint import checkpoint

from lora_ext import LinearWithLoRA, explain, merge_, unmerge_
from lora_ext.distributed import LoRAColwiseParallel, LoRARowwiseParallel
from tests.processes import run_cases
from tests.stacks.test_distributed import FP64, STEPS, assert_equals, counted_calls, loss_of
from tests.training import batches, make_models, one_backward, train

MODELS = ("ours", "exact")


def split(model: nn.Module, mesh: DeviceMesh, sequence: bool = False) -> nn.Module:
    """Up by columns, down by rows, the head by columns and gathered."""
    plan = {}
    layout = {"input_layouts": Shard(1)} if sequence else {}
    for i in (0, 1):
        plan[f"blocks.{i}.up"] = LoRAColwiseParallel(**layout)
        back = {"output_layouts": Shard(1)} if sequence else {}
        plan[f"blocks.{i}.down"] = LoRARowwiseParallel(**back)
    plan["head"] = LoRAColwiseParallel(output_layouts=Replicate(), **layout)
    return parallelize_module(model, mesh, plan)


def one_dimension() -> DeviceMesh:
    return init_device_mesh("cpu", (dist.get_world_size(),))


def adapters_train_as_one_process() -> None:
    models = make_models(FP64)
    model = models["ours"]
    keys = list(model.state_dict())
    split(model, one_dimension())
    assert list(model.state_dict()) == keys
    with counted_calls() as calls:
        trained = train(model)
    assert calls == [5 * STEPS]
    assert_equals(trained, train(models["exact"]))
    for name, value in trained.state.items():
        whole_one = "up.lora.A" in name or "down.lora.B" in name or "head.lora.A" in name
        assert (value.placements == (Replicate(),)) == whole_one, name
        if whole_one:
            others = [torch.empty_like(value.to_local()) for _ in range(dist.get_world_size())]
            dist.all_gather(others, value.to_local().contiguous())
            assert all(torch.equal(t, others[0]) for t in others), f"{name} differs over ranks"


def everything_trains_as_one_process() -> None:
    """Weights and biases too; the bias of one block frozen: layers of one shape, other needs."""
    models = make_models(FP64)
    for name in MODELS:
        models[name].requires_grad_(True)
        for key in ("up", "down"):
            getattr(models[name].blocks[0], key).linear.bias.requires_grad_(False)
    split(models["ours"], one_dimension())
    trained, want = train(models["ours"]), train(models["exact"])
    assert len(want.state) == 2 * (5 * 3 + 2)
    assert_equals(trained, want)


def split_sequence_trains_as_one_process() -> None:
    """Parts of the sequence come and go: gathered before, scattered behind."""
    mesh = one_dimension()
    world, rank = mesh.size(), mesh.get_rank()

    def step(model, x, target):
        logits = model(x.to(FP64).chunk(world, dim=1)[rank])
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten())
        loss.backward()
        return loss.detach()

    data = [(x[:, :2], target[:, :2]) for x, target in batches()]  # a length that divides
    models = make_models(FP64)
    split(models["ours"], mesh, sequence=True)
    with counted_calls() as calls:
        trained = train(models["ours"], step, data)
    assert calls == [5 * STEPS]
    assert_equals(trained, train(models["exact"], data=data))


def a_layer_of_odd_sizes_agrees() -> None:
    """Sizes that two ranks can't share evenly; x (..., K) in two and four dimensions."""
    mesh = one_dimension()
    for style, layout in ((LoRAColwiseParallel, Replicate()), (LoRARowwiseParallel, Replicate())):
        for lead in ((5,), (2, 1, 3)):
            torch.manual_seed(5)
            layer = LinearWithLoRA(nn.Linear(7, 9, dtype=FP64), 3, 1.5)
            nn.init.normal_(layer.lora.B)
            x = torch.randn(*lead, 7, dtype=FP64)
            want = layer.linear(x) + 1.5 * (x @ layer.lora.A @ layer.lora.B)
            gradients = torch.autograd.grad(want.square().sum(), list(layer.parameters()))
            styled = style(input_layouts=layout, output_layouts=Replicate())
            parallelize_module(layer, mesh, styled)
            given = DTensor.from_local(x, mesh, [Replicate()])
            with counted_calls() as calls:
                y = layer(given)
            assert calls == [1]
            torch.testing.assert_close(y, want)
            y.square().sum().backward()
            for (name, parameter), gradient in zip(
                layer.named_parameters(), gradients, strict=True
            ):
                torch.testing.assert_close(parameter.grad.full_tensor(), gradient, msg=name)
            with torch.no_grad():
                torch.testing.assert_close(layer(given), want)


def dropout_trains_as_one_process() -> None:
    """Both draws, x whole and split along the sequence: the masks are the unsplit layers' own."""
    mesh = one_dimension()
    world, rank = mesh.size(), mesh.get_rank()
    data = [(x[:, :2], target[:, :2]) for x, target in batches()]

    def split_step(model, x, target):
        logits = model(x.to(FP64).chunk(world, dim=1)[rank])
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten())
        loss.backward()
        return loss.detach()

    for draw in ("hash", "torch"):
        for sequence in (False, True):
            runs = []
            for is_split in (True, False):
                model = make_models(FP64)["ours"]
                for module in model.modules():
                    if isinstance(module, LinearWithLoRA):
                        module.lora.dropout, module.lora.dropout_mask = 0.3, draw
                if is_split:
                    split(model, mesh, sequence)
                torch.manual_seed(8)
                with counted_calls() as calls:
                    step = split_step if is_split and sequence else one_backward
                    runs.append((train(model, step, data), torch.get_rng_state()))
                assert calls == [5 * STEPS]
            assert_equals(runs[0][0], runs[1][0])
            assert torch.equal(runs[0][1], runs[1][1])
            assert not torch.equal(runs[1][0].losses, train(make_models(FP64)["ours"]).losses)


def a_split_mask_is_the_whole_ones() -> None:
    """Columns that two ranks can't share evenly, more than a byte and less; recomputed too."""
    mesh = one_dimension()
    for style in (LoRAColwiseParallel, LoRARowwiseParallel):
        for K, draw, reentrant in (
            (21, "hash", True),
            (21, "torch", False),
            (7, "hash", False),
            (1, "hash", True),
        ):
            torch.manual_seed(5)
            layer = LinearWithLoRA(nn.Linear(K, 9), 3, 1.5, dropout=0.4, dropout_mask=draw).double()
            nn.init.normal_(layer.lora.B)
            x = torch.randn(2, 5, K, dtype=FP64)
            torch.manual_seed(6)
            want = layer(x)
            gradients = torch.autograd.grad(want.square().sum(), list(layer.parameters()))
            styled = style(input_layouts=Replicate(), output_layouts=Replicate())
            parallelize_module(layer, mesh, styled)
            given = x.clone().requires_grad_()
            torch.manual_seed(6)
            y = checkpoint(layer, given, use_reentrant=reentrant)
            torch.testing.assert_close(y, want)
            torch.rand(3)
            y.square().sum().backward()
            for parameter, gradient in zip(layer.parameters(), gradients, strict=True):
                torch.testing.assert_close(parameter.grad.full_tensor(), gradient)
            with pytest.raises(ValueError, match="x must be a plain tensor where dropout is on"):
                layer.lora(DTensor.from_local(x, mesh, [Replicate()]))


def what_cannot_be_split_raises() -> None:
    mesh = one_dimension()
    model = make_models(FP64)["ours"]
    merge_(model)
    with pytest.raises(ValueError, match="module must not be merged: call unmerge_"):
        split(model, mesh)
    unmerge_(model)
    hollow = LinearWithLoRA(nn.modules.linear.NonDynamicallyQuantizableLinear(4, 4), 2, 1.0)
    for style in (LoRAColwiseParallel(), LoRARowwiseParallel()):
        with pytest.raises(ValueError, match="over an nn.Linear, got one over a NonDyn"):
            parallelize_module(hollow, mesh, style)
    split(model, mesh)
    with pytest.raises(
        ValueError, match="blocks.0.up can't be merged: linear has a weight that is a DT"
    ):
        merge_(model)
    x = DTensor.from_local(torch.ones(2, 16, dtype=FP64), mesh, [Replicate()])
    assert ": runs, on this rank's part" in explain(model.head, x)
    plain = parallelize_module(nn.Linear(4, 4), mesh, LoRAColwiseParallel())
    assert plain.weight.placements == (Shard(0),)


def two_dimensions_train_as_one_process() -> None:
    """Two by two: rows of the batch and FSDP2 one way, tensor parallelism the other."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    part = mesh.get_local_rank("data")

    def step(model, x, target):
        loss = loss_of(model, x.chunk(2)[part], target.chunk(2)[part])
        loss.backward()
        total = loss.detach().clone()
        dist.all_reduce(total, group=mesh.get_group("data"))
        return total / 2

    models = make_models(FP64)
    model = models["ours"]
    keys = list(model.state_dict())
    split(model, mesh["tensor"])
    for block in model.blocks:
        fully_shard(block, mesh=mesh["data"])
    fully_shard(model, mesh=mesh["data"])
    assert list(model.state_dict()) == keys
    assert all(p.device_mesh.ndim == 2 for p in model.parameters())
    with counted_calls() as calls:
        trained = train(model, step)
    assert calls == [5 * STEPS]
    assert_equals(trained, train(models["exact"]))


def by_name(*cases):
    return {case.__name__: case for case in cases}


TWO = by_name(
    adapters_train_as_one_process,
    everything_trains_as_one_process,
    split_sequence_trains_as_one_process,
    a_layer_of_odd_sizes_agrees,
    dropout_trains_as_one_process,
    a_split_mask_is_the_whole_ones,
    what_cannot_be_split_raises,
)
FOUR = by_name(two_dimensions_train_as_one_process)


@pytest.fixture(scope="module")
def failures() -> dict[str, str]:
    return run_cases(TWO, world=2)


@pytest.mark.parametrize("name", TWO)
def test_two_ranks_share_the_layers(failures, name):
    assert name not in failures, failures[name]


@pytest.mark.parametrize("name", FOUR)
def test_four_ranks_share_layers_and_batch(name):
    failures = run_cases(FOUR, world=4)
    assert name not in failures, failures[name]
