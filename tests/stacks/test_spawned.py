"""Models sent to other processes: pickled, in shared memory, to spawned and to forked workers."""

import copy
import io
import os
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lora_ext import (
    LinearWithLoRA,
    LoRALayer,
    QuantisedLinear,
    group_,
    lora_gated_mlp,
    lora_mlp,
    mark_only_lora_as_trainable,
    merge_,
    prepack_,
    quantise_,
    replace_linear_with_lora,
    ungroup_,
    unmerge_,
)
from tests.numerics import assert_same_up_to_rounding
from tests.stacks.test_processes import NEEDS_FORK, from_forked_worker

X = torch.randn(5, 16, generator=torch.Generator().manual_seed(0))
RATE = 0.5


class Block(nn.Module):
    """Siblings, then a gated MLP that `group_` finds."""

    def __init__(self):
        super().__init__()
        self.q, self.k = nn.Linear(16, 16), nn.Linear(16, 16, bias=False)
        self.mlp = Gated()

    def forward(self, x):
        return self.mlp(self.q(x) * self.k(x))


class Gated(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(16, 24), nn.Linear(16, 24), nn.Linear(24, 16)

    def forward(self, x):
        return self.down(nn.functional.silu(self.gate(x)) * self.up(x))


class ByHand(Block):
    """The same by our functions."""

    def forward(self, x):
        x = lora_mlp(x, self.q, self.k, "relu")
        return lora_gated_mlp(x, self.mlp.gate, self.mlp.up, self.mlp.down, "silu")


def adapted(model: nn.Module, dropout: float = 0.0, **options) -> nn.Module:
    torch.manual_seed(3)
    replace_linear_with_lora(model, 4, 0.5, dropout=dropout, **options)
    for module in model.modules():
        if isinstance(module, LoRALayer):
            nn.init.normal_(module.B, std=0.2)
    mark_only_lora_as_trainable(model)
    return model


def changed(change, *arguments, **options) -> nn.Module:
    change(model := adapted(Block()), *arguments, **options)
    for _ in range(2):
        model(X)
    return model


def alone() -> nn.Module:
    return nn.Sequential(*list(adapted(Block()).q.children())[1:])  # a LoRALayer


MODELS = {
    "layers": lambda: adapted(Block(), scaling="alpha/rank"),
    "bfloat16": lambda: adapted(Block().bfloat16()),
    "dropout": lambda: adapted(Block(), 0.3),
    "dropout as PEFT": lambda: adapted(Block(), 0.3, dropout_mask="torch"),
    "by hand": lambda: adapted(ByHand()),
    "low-rank part": alone,
    "nf4": lambda: changed(quantise_, "nf4"),
    "int8": lambda: changed(quantise_, "int8"),
    "prepacked": lambda: changed(prepack_, backward=True),
    "grouped": lambda: changed(group_),
    "merged": lambda: changed(merge_),
}


def step(model: nn.Module, rate: float = 0.0) -> dict[str, Tensor]:
    """Return y and the gradients of one step of SGD."""
    torch.manual_seed(7)
    weight = next(p for n, p in model.named_parameters())
    x = X.to(torch.bfloat16 if weight.dtype is torch.bfloat16 else torch.float32)
    y = model(x.requires_grad_())
    gradients = {"x": x} | {n: p for n, p in model.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(y.square().sum(), gradients.values(), allow_unused=True)
    results = {"y": y.detach()}
    for (name, parameter), gradient in zip(gradients.items(), found, strict=True):
        if gradient is not None:
            results[name] = gradient
            with torch.no_grad():
                parameter -= rate * gradient if name != "x" else 0
    return results


def assert_same_steps(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert list(got) == list(want)
    for name, value in want.items():
        assert_same_up_to_rounding(got[name], value)


@pytest.mark.parametrize("kind", MODELS)
def test_pickled_model_takes_the_same_step(kind):
    model = MODELS[kind]()
    want, keys = step(model), list(model.state_dict())
    saved = io.BytesIO()
    torch.save(model, saved)
    saved.seek(0)
    for other in (
        copy.deepcopy(model),
        *(pickle.loads(pickle.dumps(model, protocol)) for protocol in (2, pickle.HIGHEST_PROTOCOL)),
        torch.load(saved, weights_only=False),
    ):
        assert_same_steps(step(other), want)
        assert list(other.state_dict()) == keys
        assert [type(m).__name__ for m in other.modules()] == [
            type(m).__name__ for m in model.modules()
        ]
        own = {p.data_ptr() for p in model.parameters()}
        assert not own & {p.data_ptr() for p in other.parameters()}
    if kind == "merged":
        unmerge_(other)
        unmerge_(model)
        assert_same_steps(step(other), step(model))


def test_pickled_quantised_linear_alone():
    linear = QuantisedLinear(nn.Linear(16, 8), "nf4")
    assert torch.equal(pickle.loads(pickle.dumps(linear))(X), linear(X))
    layer = LinearWithLoRA(linear, 4, 1.0)
    assert torch.equal(pickle.loads(pickle.dumps(layer))(X), layer(X))


class Copied(Block):
    """What another thread makes of it, in the middle of a copy."""

    meanwhile = None

    def __getstate__(self):
        if (meanwhile := self.__dict__.pop("meanwhile", None)) is not None:
            with ThreadPoolExecutor(1) as pool:
                self.seen = pool.submit(meanwhile, self).result()
        return self.__dict__


@pytest.mark.parametrize(
    "meanwhile", [copy.deepcopy, pickle.dumps, lambda model: str(ungroup_(model))]
)
def test_another_thread_may_copy_or_ungroup_what_is_being_copied(meanwhile):
    model = adapted(Copied())
    group_(model)
    model.meanwhile = meanwhile
    other = copy.deepcopy(model)
    assert model.seen and type(other) is Copied and "_lora_group" not in other.__dict__
    assert_same_steps(step(other), step(model))


def _train(rank: int, models: dict[str, nn.Module], results, read) -> None:
    torch.set_num_threads(1)
    shared = {n: all(p.is_shared() for p in m.parameters()) for n, m in models.items()}
    results.put((shared, {n: step(m, RATE) for n, m in models.items()}))
    read.wait(60)  # a process that ends takes its results' memory along


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:a prepacked weight is dropped")  # where it was laid out
def test_spawned_process_trains_models_in_shared_memory():
    """`share_memory()`, a step there: the same gradients, and the steps are seen here."""
    models = {name: make() for name, make in MODELS.items() if name != "merged"}
    own = copy.deepcopy(models)
    want = {name: step(model, RATE) for name, model in own.items()}
    for model in models.values():
        model.share_memory()
    context = mp.get_context("spawn")
    results, read = context.Queue(), context.Event()
    processes = mp.spawn(_train, (models, results, read), join=False)
    shared, got = results.get(timeout=60)
    for name, steps in want.items():
        assert shared[name]
        assert_same_steps(got[name], steps)
        for mine, theirs in zip(models[name].parameters(), own[name].parameters(), strict=True):
            if mine.is_floating_point():
                assert_same_up_to_rounding(mine, theirs)
            else:
                assert torch.equal(mine, theirs)
    read.set()
    processes.join()


class Steps(Dataset):
    """Gradients of each model, computed in a loader's worker; collated by a layer."""

    def __init__(self, models: dict[str, nn.Module]):
        self.models = models

    def __len__(self):
        return len(self.models)

    def __getitem__(self, i):
        return step(list(self.models.values())[i])


class Collate:
    """A collate function that holds a tensor of the model and runs a layer of it."""

    def __init__(self, layer: nn.Module):
        self.layer, self.A = layer, layer.lora.A

    def __call__(self, items):
        with torch.no_grad():
            return items, self.layer(X), self.A


@pytest.mark.slow
def test_loader_with_spawned_workers_holds_models():
    models = {name: make() for name, make in MODELS.items()}
    layer = models["layers"].q
    loader = DataLoader(
        Steps(models),
        batch_size=len(models),
        num_workers=1,
        collate_fn=Collate(layer),
        multiprocessing_context="spawn",
        timeout=120,
    )
    ((items, y, A),) = list(loader)
    for got, model in zip(items, models.values(), strict=True):
        assert_same_steps(got, step(model))
    assert_same_up_to_rounding(y, layer(X).detach())
    assert torch.equal(A, layer.lora.A)


class Large(Dataset):
    """A step of a layer large enough for several threads."""

    def __init__(self):
        torch.manual_seed(3)
        linear = nn.Linear(512, 768)
        self.layer = LinearWithLoRA(linear, 8, 1.0, dropout=0.2)
        nn.init.normal_(self.layer.lora.B)
        self.x = torch.randn(96, 512)

    def __len__(self):
        return 1

    def __getitem__(self, i):
        torch.manual_seed(7)
        x = self.x.requires_grad_()
        y = self.layer(x)
        return y.detach(), *torch.autograd.grad(y.sum(), [x, *self.layer.parameters()])


@NEEDS_FORK
def test_worker_forked_after_threads_ran_does_not_hang():
    """OpenMP's threads are not in the child: DataLoader gives it one, as PyTorch itself needs."""
    before, large = torch.get_num_threads(), Large()
    try:
        torch.set_num_threads(3)
        want = large[0]
        assert len(os.listdir("/proc/self/task")) >= 3
        (got,) = from_forked_worker(large)
    finally:
        torch.set_num_threads(before)
    for mine, here in zip(got, want, strict=True):
        torch.testing.assert_close(mine, here, atol=1e-3, rtol=1e-4)
