"""Time of calls, on a CPU and on CUDA, in milliseconds, and their memory, in MiB."""

import gc
import math
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from lora_ext.backends.cuda_graph import captured

Run = Callable[[], Any]
Timer = Callable[[], float]

MIN_ROUNDS, MIN_ROUNDS_SLOW, MAX_ROUNDS = 5, 3, 500
_CPU_SAMPLE_MS = 0.5  # a shorter call is repeated within a sample, against clock and cache effects
_GRAPH_BELOW_MS = 0.1  # what is faster than this on CUDA would time the host's launches
_FLUSHES = 8  # one empties the L2; the rest keep the GPU busy while the host queues the call


class Times(NamedTuple):
    """Median and the 20th and 80th percentile of the samples of one provider, milliseconds."""

    median: float
    p20: float
    p80: float


def measure(
    runs: Mapping[str, Run], device: str, budget_s: float
) -> tuple[dict[str, Times], dict[str, str]]:
    """Time calls that are warm already, interleaved; see `interleave` and the two timers.

    Args:
        runs: the calls by name.
        device: "cpu" or "cuda".
        budget_s: seconds to spend over all of them.

    Returns:
        The times by name, and for what could not be timed the reason by name.

    """
    failed: dict[str, str] = {}
    if device == "cuda":
        timers, failed = cuda_timers(runs)
    else:
        timers = {name: cpu_timer(run) for name, run in runs.items()}
    samples = interleave(timers, budget_s) if timers else {}
    return {name: summarize(values) for name, values in samples.items()}, failed


def interleave(timers: Mapping[str, Timer], budget_s: float) -> dict[str, list[float]]:
    """Take one sample of each timer a round, until the budget is spent.

    What drifts (clock frequency, other processes) falls on all alike. The order rotates from
    round to round and runs backwards in every second one, so that none always follows the same.
    At least 5 rounds are run, or 3 where 5 would take more than twice the budget.
    """
    names = list(timers)
    samples: dict[str, list[float]] = {name: [] for name in names}
    with no_gc():
        start = time.perf_counter()
        for done in range(MAX_ROUNDS):
            spent_s = time.perf_counter() - start
            slow = done > 0 and spent_s / done * MIN_ROUNDS > 2 * budget_s
            if spent_s >= budget_s and done >= (MIN_ROUNDS_SLOW if slow else MIN_ROUNDS):
                break
            turn = done // 2 % len(names)
            order = names[turn:] + names[:turn]
            for name in reversed(order) if done % 2 else order:
                samples[name].append(timers[name]())
    return samples


def summarize(samples_ms: list[float]) -> Times:
    """Return the median, p20 and p80 of at least two samples."""
    fifths = statistics.quantiles(samples_ms, n=5, method="inclusive")
    return Times(statistics.median(samples_ms), fifths[0], fifths[3])


def interval(values: Sequence[float]) -> tuple[float, float] | None:
    """Return the ends of a 95 % confidence interval of the median, whatever the distribution.

    Two of the sorted values: the median is below the k-th as often as a coin that is thrown so many
    times shows fewer than k heads. None for fewer than 6 values, which have no such pair.
    """
    n, k, below = len(values), 0, 0.0
    while (below := below + math.comb(n, k) / 2**n) <= 0.025:
        k += 1
    return (sorted(values)[k - 1], sorted(values)[n - k]) if k else None


def cpu_timer(run: Run) -> Timer:
    """Return a timer whose sample is the mean of as many calls as fill half a millisecond."""

    def sample_ms(calls: int) -> float:
        start = time.perf_counter_ns()
        for _ in range(calls):
            run()
        return (time.perf_counter_ns() - start) / calls / 1e6

    calls = max(1, math.ceil(_CPU_SAMPLE_MS / sample_ms(1)))
    return lambda: sample_ms(calls)


def cuda_timers(runs: Mapping[str, Run]) -> tuple[dict[str, Timer], dict[str, str]]:
    """Return timers by CUDA events, each sample one call with a cold L2, and reasons for no timer.

    Where the fastest provider's kernels take less than 100 µs, every provider of the shape is
    replayed from a CUDA graph: none then gains by having fewer launches on the host. One that
    can't be captured has no time comparable with the others', so it gets none.
    """
    cache_bytes = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
    flush = torch.empty(2 * max(cache_bytes, 32 << 20), dtype=torch.int8, device="cuda")
    eager = {name: _cuda_timer(run, flush) for name, run in runs.items()}
    if not runs or _fastest_ms(eager) >= 10 * _GRAPH_BELOW_MS:
        return eager, {}
    # Eager times near the limit may be the host's: what the kernels take is seen in the replay.
    replayed: dict[str, Timer] = {}
    failed: dict[str, str] = {}
    for name, run in runs.items():
        try:
            replayed[name] = _cuda_timer(captured(run, first_runs=3), flush)
        except RuntimeError as error:
            failed[name] = f"can't be captured in a CUDA graph: {error}"
    if not replayed or _fastest_ms(replayed) >= _GRAPH_BELOW_MS:
        return eager, {}
    return replayed, failed


def _fastest_ms(timers: Mapping[str, Timer]) -> float:
    return min(min(timer() for _ in range(5)) for timer in timers.values())


def _cuda_timer(run: Run, flush: torch.Tensor) -> Timer:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def sample_ms() -> float:
        torch.cuda.synchronize()
        for _ in range(_FLUSHES):
            flush.zero_()
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)

    return sample_ms


@contextmanager
def no_gc() -> Iterator[None]:
    """Keep the garbage collector from running meanwhile."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


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
