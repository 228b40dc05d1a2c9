"""The choice for a call: forced by name, remembered, measured once, or the cheapest by its cost.

A choice holds for a bucket of M (the next power of two), so that a new batch size does not tune
again, and for the life of the process, so that the same inputs give the same bits. It is kept on
disk inside Triton's cache, a file a card and version, with each candidate's cost as predicted and
as measured.
"""

import functools
import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Callable
from dataclasses import astuple
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton import knobs

from ..._version import __version__
from ..cuda_graph import captured
from . import backward_launches, forward_launches
from .backward_launches import Backward, Gradients
from .cards import Card, card_of
from .costs import Problem
from .forward_launches import Forward
from .regimes import REGIMES, Candidate, candidates
from .tiling import Tile

_MAX_PLANS = 1024
# Problems whose kernels may take less than the host needs to launch them are timed by a CUDA graph:
# all candidates of one in the same way.
_GRAPH_BELOW_US = 150.0
_MAX_BOX = 2**31 - 1  # a descriptor's sizes and coordinates are 32-bit
_LOG = logging.getLogger(__name__)
Choice = tuple[str, Tile]
_forced: dict[str, Any] = dict.fromkeys(("forward", "backward", "descriptors", "group"))
_chosen: dict[tuple, Choice] = {}
_plans: dict[tuple, Callable[[Any], tuple]] = {}
_unmeasured: dict[tuple, Callable[[Any], tuple]] = {}


def run_forward(call: Forward) -> tuple[Tensor, Tensor]:
    """Return (y, h)."""
    x, weight, bias, A, B, _, keep = call
    key = (
        x.shape, x.stride(), x.dtype, x.device, weight.shape[0], weight.stride(), A.shape[1],
        A.stride(), A.dtype, B.stride(), B.dtype, bias is None, keep is None or keep.dtype,
        (x.data_ptr() | weight.data_ptr()) % 16, kind_of(x.dtype),
        _forced["forward"], _forced["descriptors"],
    )  # fmt: skip
    return (_plans.get(key) or _plan(key, call, forward_problem(call)))(call)


def run_backward(call: Backward) -> Gradients:
    """Return (dx, dA, dB), None where `needs` does not ask."""
    dy, x, weight, A, B, _, _, needs, keep = call
    key = (
        dy.shape, dy.stride(), dy.dtype, dy.device, B.shape, B.stride(), B.dtype,
        None if A is None else (A.shape, A.stride(), A.dtype),
        None if x is None else x.stride(), None if weight is None else weight.stride(), needs,
        keep is None or keep.dtype,
        (dy.data_ptr() | (0 if weight is None else weight.data_ptr())) % 16, kind_of(dy.dtype),
        _forced["backward"], _forced["descriptors"],
    )  # fmt: skip
    return (_plans.get(key) or _plan(key, call, backward_problem(call)))(call)


def words_of(keep: Tensor | None, K: int) -> Tensor | None:
    """Return dropout's bits (M, ceil(K / 8)) in 32-bit words where a row is whole words."""
    if keep is None or K % 32 or keep.data_ptr() % 4:
        return keep
    return keep.view(torch.int32)


def kind_of(dtype: torch.dtype) -> str:
    """Return the kind of product: half, tf32 (only where PyTorch's own may use it), or fp32."""
    if dtype != torch.float32:
        return "half"
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "fp32"


def forward_problem(call: Forward) -> Problem:
    """Return what the choice of a regime depends on."""
    x, weight, bias, A, B, _, keep = call
    (M, K), (R, N) = x.shape, B.shape
    sizes = kind_of(x.dtype), x.element_size(), A.element_size()
    described = describable(x) and (describable(weight) or describable(weight.T))
    return Problem(M, K, N, R, *sizes, bias is not None, described, keep is not None)


def backward_problem(call: Backward) -> Problem:
    """Return what the choice of a regime depends on."""
    dy, _, weight, A, B, _, _, needs, keep = call
    (M, N), R, K = dy.shape, B.shape[0], 1 if A is None else A.shape[0]
    sizes = kind_of(dy.dtype), dy.element_size(), B.element_size()
    described = weight is not None and (describable(weight) or describable(weight.T))
    described = described and describable(dy)
    return Problem(M, K, N, R, *sizes, False, described, keep is not None, needs)


def describable(matrix: Tensor) -> bool:
    """Whether a tensor descriptor can describe a matrix: unit stride inside, the rest 16-byte."""
    rows, cols = matrix.shape
    row_bytes = matrix.stride(0) * matrix.element_size()
    return (
        matrix.stride(1) == 1
        and row_bytes % 16 == 0
        and cols <= matrix.stride(0)
        and max(rows, cols) <= _MAX_BOX
        and matrix.data_ptr() % 16 == 0
    )


def _plan(key: tuple, call: Forward | Backward, p: Problem) -> Callable[[Any], tuple]:
    """Choose a regime and a tile for a call, and keep what runs all such calls.

    What may not be measured now is planned for now: the next call that may measure does.
    """
    card = card_of(call[0].device)
    plans = _plans if card.interpreted or may_measure() else _unmeasured
    if (run := plans.get(key)) is None:
        direction = "forward" if isinstance(call, Forward) else "backward"
        name, tile = choose(direction, call, p, card)
        if len(plans) >= _MAX_PLANS:
            plans.clear()
        run = plans[key] = planned(direction, name, call, p, tile, card)
    return run


def planned(
    direction: str, name: str, call: Forward | Backward, p: Problem, tile: Tile, card: Card
) -> Callable[[Any], tuple]:
    """Return what runs a call, and all like it, by a regime and tile."""
    module = forward_launches if direction == "forward" else backward_launches
    return getattr(module, name)(call, p, tile, card)


def choose(direction: str, call: Forward | Backward, p: Problem, card: Card) -> Choice:
    """Return regime and tile.

    They are of the regime forced by name where it can run; else remembered, in this process or on
    disk; else measured; else, where the call may not measure, the cheapest by its cost.
    """
    forced = _forced[direction]
    if forced is not None and (tiles := REGIMES[direction][forced].tiles(p, card)):
        wanted = _forced["descriptors"]
        return forced, next((t for t in tiles if wanted in (None, t.descriptors)), tiles[0])
    bucket = p.bucketed()
    key = (card.name, direction, bucket)
    if (chosen := _chosen.get(key)) is not None:
        return chosen
    found = candidates(direction, bucket, card)
    if len(found) == 1 or card.interpreted or not may_measure():
        return found[0].name, found[0].tile
    kept = _read(card).get(repr(key[1:]))
    chosen = kept.get("chosen") if isinstance(kept, dict) else None
    best = next((c for c in found if [c.name, *astuple(c.tile)] == chosen), None)
    if best is None:
        best, times = _fastest(direction, call, p, card, found)
        _write(card, repr(key[1:]), {"chosen": [best.name, *astuple(best.tile)], **times})
    _chosen[key] = best.name, best.tile
    return best.name, best.tile


def may_measure() -> bool:
    """Whether a call may stop to measure.

    Not in a CUDA graph's capture, not with LORA_EXT_TUNE=0, and not where determinism is asked
    for: another run could find another winner, and other bits.
    """
    return (
        os.environ.get("LORA_EXT_TUNE") != "0"
        and not torch.are_deterministic_algorithms_enabled()
        and not torch.cuda.is_current_stream_capturing()
    )


def _fastest(
    direction: str, call: Forward | Backward, p: Problem, card: Card, found: list[Candidate]
) -> tuple[Candidate, dict[str, Any]]:
    """Return the candidate whose median time is the shortest, and what was predicted and measured.

    Of each regime the cheapest is timed, so PyTorch's own ways are timed too, and a call is never
    slower than the fastest of them. Plain where none runs here.
    """
    best_of = {c.name: c for c in reversed(found)}
    by_graph = min(c.time_us for c in found) < _GRAPH_BELOW_US
    times = {}
    for graph in (True, False) if by_graph else (False,):
        times = {n: _measure(direction, call, p, card, c, graph) for n, c in best_of.items()}
        if any(time_us is not None for time_us in times.values()):
            break
    ran = [(time_us, name) for name, time_us in times.items() if time_us is not None]
    report = [
        {"regime": n, "tile": astuple(c.tile), "predicted_us": c.time_us, "measured_us": times[n]}
        for n, c in best_of.items()
    ]
    how = {"by_graph": graph, "candidates": report}
    return best_of[min(ran)[1]] if ran else best_of["plain"], how


def _measure(
    direction: str,
    call: Forward | Backward,
    p: Problem,
    card: Card,
    candidate: Candidate,
    by_graph: bool,
) -> float | None:
    """Return the median microseconds of a candidate; None where it can't run here."""

    def run() -> Callable[[], Any]:
        plan = planned(direction, candidate.name, call, p, candidate.tile, card)
        return lambda: plan(call)

    return measured(run, f"{direction} {p} by {candidate}", by_graph)


def measured(plan: Callable[[], Callable[[], Any]], what: str, by_graph: bool) -> float | None:
    """Return the median microseconds of what is planned, L2 cold; None where it can't run here.

    Whatever it raises, a compiler's crash too, is logged and costs it the choice: the user's call
    has other ways to run.
    """
    try:
        run = plan()
        bench = triton.testing.do_bench
        timed = captured(run) if by_graph else run
        return round(1e3 * bench(timed, warmup=5, rep=20, return_mode="median"), 3)
    except Exception as error:
        _LOG.warning("%s can't run here: %s", what, error)
        return None


@functools.cache
def tuning_file(card: Card) -> Path:
    """Return where the choices of a card are kept, for these versions and these kernels."""
    sources = b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py")))
    versions = f"{__version__}-{hashlib.sha256(sources).hexdigest()[:12]}"
    versions += f"-triton{triton.__version__}-torch{torch.__version__}"
    name = f"{card.name}-{versions}".replace(" ", "_").replace("/", "_")
    return Path(knobs.cache.dir) / "lora_ext" / f"{name}.json"


def _read(card: Card) -> dict[str, Any]:
    try:
        kept = json.loads(tuning_file(card).read_text())
        return kept if isinstance(kept, dict) else {}
    except (OSError, ValueError):  # none yet, or not ours to read: measure again
        return {}


def _write(card: Card, key: str, value: dict[str, Any]) -> None:
    """Add a choice to the file: a new one is written next to it and takes its place."""
    path = tuning_file(card)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
            json.dump(_read(card) | {key: value}, file, indent=1)
        os.replace(file.name, path)
    except OSError:  # a cache that can't be written is measured again next time
        pass
