"""Time spent in the LoRA'd linears, by replaying their calls outside the model.

Hooks around each call would be part of what they measure, and they weigh more on the faster side.
So the calls of one training step are recorded first, in a forward of its own, and then repeated on
inputs of the same shapes, forward and backward, plain and ours in turn.
"""

import statistics
import time
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .task import Batch, Task
from .train import Run


def typical(batches: Sequence[Batch]) -> Batch:
    """Return the batch of median size, in tokens with padding."""
    return sorted(batches, key=lambda batch: batch["input_ids"].numel())[len(batches) // 2]


def time_linears(runs: Sequence[Run], task: Task, batch: Batch, repeats: int) -> None:
    """Set `linears_s` of each run's result: seconds a step in its LoRA'd linears.

    Layers that are called alike are timed once and counted as often as they are: the median of
    `repeats` calls, each forward and backward with all the gradients that training asks for.

    Args:
        runs: runs with the same layers.
        task: the task.
        batch: the batch whose shapes are replayed.
        repeats: calls of each.

    """
    layers = [dict(run.model.named_modules()) for run in runs]
    totals = [0.0] * len(runs)
    for (shape, needs_dx, *_), names in _calls(runs[0], task, batch).items():
        same = [of_run[names[0]] for of_run in layers]
        x = torch.randn(shape, requires_grad=needs_dx)
        dy = torch.randn(*shape[:-1], same[0].linear.out_features)
        times: list[list[float]] = [[] for _ in runs]
        for repeat in range(repeats):
            order = range(len(runs)) if repeat % 2 == 0 else reversed(range(len(runs)))
            for i in order:
                times[i].append(_call(same[i], x, dy))
        totals = [
            t + len(names) * statistics.median(ts) for t, ts in zip(totals, times, strict=True)
        ]
    for run, total in zip(runs, totals, strict=True):
        run.result.linears_s = total


def _calls(run: Run, task: Task, batch: Batch) -> dict[tuple, list[str]]:
    """Group the LoRA'd linears by how training calls them.

    Returns:
        From (shape of x, whether dx is wanted, out_features, whether there is a bias) to the names
        of the layers called so.

    """
    calls: dict[tuple, list[str]] = defaultdict(list)
    handles = []
    for name, module in run.model.named_modules():
        if hasattr(module, "linear") and hasattr(module, "lora"):

            def record(layer: Any, args: tuple[Tensor], name: str = name) -> None:
                bias = layer.linear.bias is not None
                call = (args[0].shape, args[0].requires_grad, layer.linear.out_features, bias)
                calls[call].append(name)

            handles.append(module.register_forward_pre_hook(record))
    run.model.train()
    task.loss(run.model, batch)
    for handle in handles:
        handle.remove()
    return calls


def _call(layer: nn.Module, x: Tensor, dy: Tensor) -> float:
    """Return the seconds of one forward and backward of a layer; its gradients are dropped."""
    begin = time.perf_counter()
    layer(x).backward(dy)
    seconds = time.perf_counter() - begin
    x.grad = None
    layer.zero_grad()
    return seconds
