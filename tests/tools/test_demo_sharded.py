"""The demo over two processes: the losses of one, an adapter that loads, one table."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

import lora_ext
from benchmarks.finetune import sharded
from benchmarks.finetune.tasks import Settings
from benchmarks.finetune.train import OURS, PLAIN, Run, train_in_lockstep
from tests.processes import run_cases
from tests.tools.toy_task import ROWS, Toy

ROOT = Path(__file__).parents[2]


def trains_as_one_process() -> None:
    task = Toy(Settings(seed=1))
    batches, base = task.batches(1), sharded.without_dropout(task.build(1))
    for kind in (PLAIN, OURS):
        one = Run(kind, task, base)
        many = sharded.ShardedRun(kind, task, base)
        assert all(isinstance(p, DTensor) for p in many.model.parameters())
        train_in_lockstep([one], task, batches, seed=1)
        train_in_lockstep([many], task, batches, seed=1)
        assert len(many.result.losses) == len(ROWS)
        torch.testing.assert_close(many.result.losses, one.result.losses, rtol=0, atol=1e-6)
        trained = many.trained()
        want = {name: p for name, p in one.model.named_parameters() if p.requires_grad}
        assert trained.keys() == want.keys() and any(".lora.B" in name for name in want)
        for name, value in want.items():
            assert value.any(), name
            torch.testing.assert_close(trained[name], value, rtol=0, atol=1e-6)


def gradients_are_one_process() -> None:
    task = Toy(Settings())
    base = sharded.without_dropout(task.build(0))
    one, many = (kind(OURS, task, base) for kind in (Run, sharded.ShardedRun))
    for run in (one, many):
        run.optimizer.zero_grad = lambda: None
        run.step(task, task.batches(0)[1], 0)
    want = {name: p.grad for name, p in one.model.named_parameters() if p.requires_grad}
    many.model.reshard()
    for name, parameter in many.model.named_parameters():
        if name in want:
            torch.testing.assert_close(
                parameter.grad.full_tensor(), want[name], rtol=1e-5, atol=1e-6
            )
    assert want["encoder.1.linear.lora.B"].abs().max() > 1e-3


def ranks_share_what_one_process_keeps() -> None:
    task = Toy(Settings())
    batch, base = task.batches(0)[0], task.build(0)
    one, many = (kind(OURS, task, base) for kind in (Run, sharded.ShardedRun))
    sizes = []
    for run in (one, many):
        run.step(task, batch, 0)
        sizes.append(torch.tensor(sharded.local_mib(run)))
    dist.all_reduce(sizes[1])
    # The steps that AdamW counts are kept by each rank, 4 bytes a parameter.
    counts = sum(p.requires_grad for p in one.model.parameters()) * 4 / 2**20
    torch.testing.assert_close(sizes[1], sizes[0] + counts)


CASES = {
    case.__name__: case
    for case in (
        trains_as_one_process,
        gradients_are_one_process,
        ranks_share_what_one_process_keeps,
    )
}


@pytest.fixture(scope="module")
def failures() -> dict[str, str]:
    return run_cases(CASES, world=2)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_two_processes_train_as_one(failures, name):
    assert name not in failures, failures[name]


@pytest.mark.parametrize("total, world", [(16, 2), (11, 4), (3, 4), (1, 2)])
def test_shares_cover_the_batch_once(total, world):
    shares = [sharded.share(total, rank, world) for rank in range(world)]
    rows = [i for part, weight in shares if weight for i in range(total)[part]]
    assert rows == list(range(total))
    for part, weight in shares:
        assert len(range(total)[part]) == max(1, round(weight * total))
    assert sum(weight for _, weight in shares) == pytest.approx(1)


def test_without_dropout_no_two_forwards_differ():
    model, x = Toy(Settings()).build(0).train(), torch.randn(2, 5, 6)
    assert not torch.equal(model(x), model(x))
    assert torch.equal(sharded.without_dropout(model)(x), model(x))


LACKING = [n for n in ("rich", "transformers", "matplotlib") if not importlib.util.find_spec(n)]


@pytest.mark.slow
@pytest.mark.skipif(bool(LACKING), reason=f"not installed: {', '.join(LACKING)}")
def test_torchrun_prints_one_table_and_saves_the_adapter_whole(tmp_path):
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*launch, "-m", "tests.tools.toy_task", "--seed=1", "--threads=1", f"--out={tmp_path}"],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("time a step, median (ms)") == 1
    assert done.stdout.count("all checks passed") == 1
    gaps = re.findall(r"over 4 steps: largest difference (\S+) nats", done.stdout)
    assert len(gaps) == 2 and max(map(float, gaps)) <= 1e-6
    task = Toy(Settings(seed=1))
    one = Run(OURS, task, sharded.without_dropout(task.build(1)))
    train_in_lockstep([one], task, task.batches(1), seed=1)
    loaded = task.build(2)
    lora_ext.load_adapter(loaded, tmp_path / "sms-adapter.safetensors")
    state = loaded.state_dict()
    assert not any(isinstance(value, DTensor) for value in state.values())
    for name, parameter in one.model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(state[name], parameter.detach(), rtol=0, atol=1e-6)
