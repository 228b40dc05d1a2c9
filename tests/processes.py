"""Work in several processes: cases over gloo, each reported by name, and what workers share."""

import contextlib
import fcntl
import json
import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

Case = Callable[[], None]


def run_cases(cases: dict[str, Case], world: int) -> dict[str, str]:
    """Run the cases in `world` new processes; return the traceback of each that failed, by name.

    The cases are functions of a module. After a failure the ranks no longer wait for each other
    where they should, so the cases that follow are not run, and say so.
    """
    # A server that has torch imported forks each process: 2 s in place of 6, and unlike a fork of
    # this process it has no OpenMP threads, whose locks a child would wait for. DTensor imports
    # torch._dynamo at its first operator, 3 s in each process.
    multiprocessing.set_forkserver_preload(["tests.stacks.test_tensor_parallel", "torch._dynamo"])
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(_worker, (world, cases, folder), world, start_method="forkserver")
        failures: dict[str, str] = {}
        for file in sorted(Path(folder).glob("rank*.json")):
            for name, text in json.loads(file.read_text()).items():
                failures[name] = f"{failures.get(name, '')}\n{file.stem}: {text}"
    return failures


def _worker(rank: int, world: int, cases: dict[str, Case], folder: str) -> None:
    torch.set_num_threads(1)
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=60),
    )
    failed: dict[str, str] = {}
    for name, case in cases.items():
        if failed:
            failed[name] = f"not run after the failure of {next(iter(failed))}"
            continue
        try:
            torch.manual_seed(0)
            case()
            dist.barrier()
        except Exception:
            failed[name] = traceback.format_exc()
    Path(folder, f"rank{rank}.json").write_text(json.dumps(failed))
    if not failed:
        dist.destroy_process_group()


@contextlib.contextmanager
def shared_by_workers(factory: pytest.TempPathFactory, name: str) -> Iterator[Path]:
    """Give a folder that pytest's workers share, to one of them at a time."""
    folder = factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    folder /= name
    folder.mkdir(exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield folder
