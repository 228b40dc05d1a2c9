"""What this machine gains, by the table of routes and by the clock, and what would help it."""

import os
import time
from collections.abc import Callable, Iterator
from importlib import import_module
from statistics import median, quantiles
from typing import Any

import torch
from torch import nn

from . import testing
from .layers import LinearWithLoRA

SHAPE = (128, 768, 768, 16)  # M, K, N, R
STEP = f"a training step at M,K,N,R {SHAPE}, median (quartiles)"
SECONDS = 0.4  # for each dtype; at least 5 steps of either layer
BUILD = 'pip install "setuptools>=77" wheel ninja pybind11 && pip install --no-build-isolation -e .'


def routes(why_not: str | None) -> Iterator[tuple[str, str]]:
    """Yield, by dtype, whose product makes y = x @ weight.T on this CPU.

    Args:
        why_not: why the C++ kernels do not run here; None if they do.

    """
    for dtype in ("float32", "bfloat16", "float16", "float64"):
        if why_not is not None:
            yield dtype, "PyTorch's, and the low-rank part too: the extension does not run here"
            continue
        line = import_module("lora_ext._C").route(dtype)
        few = f"; up to {line['dot_rows']} rows dot products of ours" if line["dot_rows"] else ""
        if line["library_base"]:
            yield dtype, f"PyTorch's, the faster one here{few}; ours adds the rest"
        else:
            yield dtype, f"ours, with the low-rank part in the same pass{few}"


def measured() -> Iterator[tuple[str, str]]:
    """Yield, by dtype, the plain layer's time over ours of a training step on this CPU.

    Both take their steps in turn, so that what else runs here slows both. Quartiles far apart say
    that it did.
    """
    M, K, N, R = SHAPE
    for dtype in (torch.float32, torch.bfloat16):
        ours, plain = (
            _step(kind(nn.Linear(K, N).requires_grad_(False), R, 1.0).to(dtype), M)
            for kind in (LinearWithLoRA, testing.LinearWithLoRA)
        )
        pairs: list[tuple[float, float]] = []
        end = time.perf_counter() + SECONDS
        while len(pairs) < 5 or time.perf_counter() < end:
            pairs.append((plain(), ours()))
        ratios = [a / b for a, b in pairs]
        low, _, high = quantiles(ratios, n=4)
        yield (
            str(dtype).removeprefix("torch."),
            f"{median(ratios):.2f}x ({low:.2f} to {high:.2f}): plain "
            f"{median(a for a, _ in pairs):.2f} ms, ours {median(b for _, b in pairs):.2f}",
        )


def _step(layer: nn.Module, rows: int) -> Callable[[], float]:
    """Return a forward and backward of a layer on `rows` rows; a call gives its time in ms."""
    linear: Any = layer.linear
    x = torch.randn(rows, linear.in_features, dtype=linear.weight.dtype, requires_grad=True)
    wanted = [x, *layer.lora.parameters()]  # type: ignore[union-attr]

    def run() -> float:
        begin = time.perf_counter()
        y = layer(x)
        torch.autograd.grad(y, wanted, y)
        return 1e3 * (time.perf_counter() - begin)

    run()
    return run


def hints(why_not: dict[str, dict[str, str | None]]) -> Iterator[tuple[str, str]]:
    """Yield what would make this machine faster: what to change, and how.

    Args:
        why_not: by device that is here and backend, why it can't run there; None if it can.

    """
    if (reason := why_not["cpu"]["cpp"]) is not None:
        yield "C++ kernels", f"{BUILD} ({reason})"
    if "cuda" in why_not and all(why_not["cuda"][name] for name in ("triton", "cpp")):
        yield "GPU kernels", f"triton: {why_not['cuda']['triton']}"
        yield "GPU kernels", f"cpp: {why_not['cuda']['cpp']}"
    if isa := os.environ.get("LORA_EXT_CPU_ISA"):
        yield "instruction set", f"unset LORA_EXT_CPU_ISA, which holds the kernels to {isa}"
    threads, cpus = torch.get_num_threads(), len(os.sched_getaffinity(0))
    if threads > cpus or 2 * threads < cpus:  # by default PyTorch takes a thread a core of two
        yield "threads", f"torch.set_num_threads: {threads} now, and {cpus} CPUs for this process"
    if reason is None and import_module("lora_ext._C").route("bfloat16")["pairs"]:
        yield "dtype", "a bfloat16 model: this CPU multiplies its elements in pairs"
