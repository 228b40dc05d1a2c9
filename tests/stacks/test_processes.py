"""Threads and processes that share a layer."""

import multiprocessing
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from lora_ext import LinearWithLoRA
from tests.conftest import Backend
from tests.stacks.test_training import use_backend
from tests.training import batches, make_models, one_backward

BATCHES = batches(steps=4)
NEEDS_FORK = pytest.mark.skipif(
    "fork" not in multiprocessing.get_all_start_methods(), reason="this system has no fork"
)


def test_threads_that_share_a_model_get_their_own_results(backend: Backend):
    """Four threads, no lock: inference and training at once over the same parameters."""
    model = make_models()["ours"]
    use_backend(model, backend.name)
    parameters = [p for p in model.parameters() if p.requires_grad]

    def work(number):
        x, _ = BATCHES[number % 4]
        if number % 8 < 4:
            with torch.inference_mode():
                return (model(x).clone(),)
        y = model(x)
        return (y.detach(), *torch.autograd.grad(y.square().sum(), parameters))

    want = [work(number) for number in range(8)]
    with ThreadPoolExecutor(4) as pool:
        got = list(pool.map(work, list(range(8)) * 25))
    for number, results in enumerate(got):
        for mine, alone in zip(results, want[number % 8], strict=True):
            assert torch.equal(mine, alone), number


class Features(Dataset):
    """What a frozen model makes of each batch: computed in the loader's worker."""

    def __init__(self, model):
        self.model = model

    def __len__(self):
        return len(BATCHES)

    def __getitem__(self, i):
        loss = one_backward(self.model, *BATCHES[i])
        gradients = [p.grad.clone() for p in self.model.parameters() if p.requires_grad]
        self.model.zero_grad()
        return loss, *gradients


class Dropped(Dataset):
    """One x through a layer in training, computed in the loader's workers."""

    def __init__(self, draw):
        self.layer = LinearWithLoRA(nn.Linear(64, 8), 4, 1.0, dropout=0.5, dropout_mask=draw)
        nn.init.normal_(self.layer.lora.B)

    def __len__(self):
        return 4

    @torch.no_grad()
    def __getitem__(self, i):
        return self.layer(torch.ones(5, 64))


@NEEDS_FORK
@pytest.mark.parametrize("draw", ["hash", "torch"])
def test_forked_workers_draw_masks_of_their_own(draw):
    dataset = Dropped(draw)
    dataset[0]  # what the draw keeps for the process is there before the fork
    loader = DataLoader(
        dataset, batch_size=None, num_workers=2, multiprocessing_context="fork", timeout=60
    )
    torch.manual_seed(3)
    first, second = list(loader), list(loader)
    torch.manual_seed(3)
    assert all(map(torch.equal, first, list(loader)))
    ys = first + second
    assert not any(torch.equal(a, b) for i, a in enumerate(ys) for b in ys[:i])


def from_forked_worker(dataset: Dataset) -> list:
    """Return what a forked worker makes of a dataset; skip where PyTorch refuses any model."""
    loader = DataLoader(
        dataset, batch_size=None, num_workers=1, multiprocessing_context="fork", timeout=60
    )
    try:
        return list(loader)
    except RuntimeError as error:
        # Once a reentrant backward, or one on a GPU, has run in this process.
        if "autograd's threading in combination with fork" not in str(error):
            raise
        pytest.skip("an earlier test of this process ran a reentrant backward")


@NEEDS_FORK
def test_worker_forked_after_use_computes_the_same(backend: Backend):
    """Training in a forked child after the parent's threads have run: a lock held hangs it."""
    model = make_models()["ours"]
    use_backend(model, backend.name)
    dataset = Features(model)
    want = [dataset[i] for i in range(len(dataset))]
    got = from_forked_worker(dataset)
    assert len(got) == len(want) == 4
    for mine, alone in zip(got, want, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(mine, alone, strict=True))
    assert not torch.equal(got[0][1], got[1][1])
