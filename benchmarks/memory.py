"""Memory of calls, in MiB: the most that one holds, and what it keeps for the backward."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from .timing import Run, no_gc


def peak_mib(run: Run, device: str) -> float:
    """Return the most memory that one call holds beyond what was there before it, MiB.

    Results are included. CUDA: PyTorch's allocator (`max_memory_allocated`). CPU: the running sum
    of the profiler's allocation events, which are those of PyTorch's allocator too: scratch space
    that MKL or oneDNN take for themselves is not in it.
    """
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        kept = run()
        torch.cuda.synchronize()
        del kept
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    with (
        no_gc(),
        _silent_stderr(),
        profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler,
    ):
        kept = run()
    del kept
    events = profiler.profiler.kineto_results.events()
    changes = sorted(
        (e.start_ns(), i, e.nbytes()) for i, e in enumerate(events) if e.name() == "[memory]"
    )
    held = peak = 0
    for _, _, change in changes:
        held += change
        peak = max(peak, held)
    return peak / 2**20


def saved_mib(run: Run, held: tuple[Tensor, ...]) -> float:
    """Return what a forward keeps for its backward beyond the tensors in `held`, MiB.

    Each storage counts once and whole. What a step saves is seen by saved-tensor hooks, so `run`
    may contain its backward.

    Args:
        run: the call.
        held: inputs and parameters, which are there whether they are saved or not.

    """
    known = {tensor.untyped_storage().data_ptr() for tensor in held}
    sizes: dict[int, int] = {}
    keep: list[Tensor] = []  # so that no storage is freed and its address used again

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            sizes[storage.data_ptr()] = storage.nbytes()
            keep.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return sum(sizes.values()) / 2**20


@contextmanager
def _silent_stderr() -> Iterator[None]:
    """Drop what the profiler of torch 2.13 writes to file descriptor 2 at every start and stop."""
    saved, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(nowhere)
