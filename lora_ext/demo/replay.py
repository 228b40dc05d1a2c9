"""Time spent in the LoRA'd linears, by replaying their calls outside the model.

Hooks around each call would be part of what they measure, and they weigh more on the faster side.
So the shapes of one training step are recorded first, in a forward of its own, and each layer is
then called on inputs of these shapes, forward and backward, plain and ours in turn.
"""

import statistics
import time
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .task import Batch, Task
from .train import Run

Shapes = dict[str, tuple[torch.Size, bool]]


def typical(batches: Sequence[Batch]) -> Batch:
    """Return the batch of median size, in tokens with padding."""
    return sorted(batches, key=lambda batch: batch["input_ids"].numel())[len(batches) // 2]


def time_linears(runs: Sequence[Run], task: Task, batch: Batch, repeats: int) -> None:
    """Set `linears_s` of each run's result: seconds a step in its LoRA'd linears.

    The sum over layers of the median of `repeats` calls, each forward and backward with all the
    gradients that training asks for.

    Args:
        runs: runs with the same layers.
        task: the task.
        batch: the batch whose shapes are replayed.
        repeats: calls of each layer.

    """
    shapes = _shapes(runs[0], task, batch)
    layers = [dict(run.model.named_modules()) for run in runs]
    totals = [0.0] * len(runs)
    for name, (shape, needs_dx) in shapes.items():
        x = torch.randn(shape, requires_grad=needs_dx)
        dy = torch.randn(*shape[:-1], layers[0][name].linear.out_features)
        times: list[list[float]] = [[] for _ in runs]
        for repeat in range(repeats):
            order = range(len(runs)) if repeat % 2 == 0 else reversed(range(len(runs)))
            for i in order:
                times[i].append(_call(layers[i][name], x, dy))
        totals = [t + statistics.median(ts) for t, ts in zip(totals, times, strict=True)]
    for run, total in zip(runs, totals, strict=True):
        run.result.linears_s = total


def _shapes(run: Run, task: Task, batch: Batch) -> Shapes:
    """Record what each LoRA'd linear gets in training: the shape of x, and whether dx is wanted."""
    shapes: Shapes = {}
    handles = []
    for name, module in run.model.named_modules():
        if hasattr(module, "linear") and hasattr(module, "lora"):

            def record(_module: nn.Module, args: tuple[Tensor], name: str = name) -> None:
                shapes[name] = (args[0].shape, args[0].requires_grad)

            handles.append(module.register_forward_pre_hook(record))
    run.model.train()
    task.loss(run.model, batch)
    for handle in handles:
        handle.remove()
    return shapes


def _call(layer: nn.Module, x: Tensor, dy: Tensor) -> float:
    """Return the seconds of one forward and backward of a layer; its gradients are dropped."""
    begin = time.perf_counter()
    layer(x).backward(dy)
    seconds = time.perf_counter() - begin
    x.grad = None
    layer.zero_grad()
    return seconds
