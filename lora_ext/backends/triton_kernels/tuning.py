"""The choice for a call: forced by name, remembered, measured once, or the cost model's.

A choice holds for a bucket of M (the next power of two), so that a new batch size does not tune
again, and for the life of the process, so that the same inputs give the same bits. It is kept on
disk inside Triton's cache, a file a card and version.
"""

import json
import os
import tempfile
from collections.abc import Callable
from dataclasses import astuple
from pathlib import Path
from typing import Any

import torch
import triton
from triton import knobs
from triton.errors import TritonError

from ..._version import __version__
from . import choice
from .cards import Card
from .choice import Candidate
from .configs import Tile
from .cost_model import Problem
from .gradients import BACKWARD, Backward
from .launch import describable_product
from .regimes import FORWARD, Forward

MEASURED = 4  # candidates, the cheapest by the cost model
Choice = tuple[str, Tile]
_chosen: dict[tuple, Choice] = {}


def choose_forward(call: Forward, name: str | None, descriptors: bool | None) -> Choice:
    """Return regime and tile: of the regime named where it can run, else the library's choice."""
    can = describable_product(call.x, call.w)
    p = problem(call, call.x, call.A, bias=call.bias is not None)
    if name is not None and (tiles := choice.forward_tiles(name, p, call.card, can)):
        return name, _with(tiles, descriptors)
    key = ("forward", call.x.dtype, p, can)
    return _choose(
        key,
        call.card,
        lambda: choice.forward_candidates(p, call.card, can),
        lambda c: FORWARD[c.name](call, c.tile),
    )


def choose_backward(call: Backward, name: str | None, descriptors: bool | None) -> Choice:
    """Return regime and tile, as choose_forward does; one launch's worth where dx is not needed."""
    can = describable_product(call.dy, call.weight) if call.need_dx else False
    p = problem(call, call.dy, call.A, bias=False)
    if not call.need_dx:
        return "two_launches", choice.backward_tiles("torch_base", p, call.card, can)[0]
    if name is not None and (tiles := choice.backward_tiles(name, p, call.card, can)):
        return name, _with(tiles, descriptors)
    key = ("backward", call.dy.dtype, p, can, call.needs)
    return _choose(
        key,
        call.card,
        lambda: choice.backward_candidates(p, call.card, can),
        lambda c: BACKWARD[c.name](call, c.tile),
    )


def problem(call: Forward | Backward, x: torch.Tensor, A: torch.Tensor, *, bias: bool) -> Problem:
    """Return a call's sizes, M rounded up to its bucket."""
    sizes = x.element_size(), A.element_size()
    return choice.bucketed(Problem(call.M, call.K, call.N, call.R, call.kind, *sizes, bias))


def _with(tiles: tuple[Tile, ...], descriptors: bool | None) -> Tile:
    return next((t for t in tiles if descriptors in (None, t.descriptors)), tiles[0])


def _choose(
    key: tuple,
    card: Card,
    candidates_of: Callable[[], list[Candidate]],
    run: Callable[[Candidate], object],
) -> Choice:
    key = (card.name, *key)
    if (known := _chosen.get(key)) is not None:
        return known
    candidates = candidates_of()
    best = candidates[0]
    if len(candidates) > 1 and may_measure(card):
        kept = _read(card).get(repr(key))
        match = [c for c in candidates if [c.name, *astuple(c.tile)] == kept]
        if match:
            best = match[0]
        else:
            best = min(candidates[:MEASURED], key=lambda c: _measure(run, c))
            _write(card, repr(key), [best.name, *astuple(best.tile)])
    _chosen[key] = best.name, best.tile
    return best.name, best.tile


def may_measure(card: Card) -> bool:
    """Whether a call may stop to measure.

    Not in a CUDA graph's capture, not with LORA_EXT_TUNE=0, and not where determinism is asked
    for: another run could find another winner, and other bits.
    """
    return (
        not card.interpreted
        and os.environ.get("LORA_EXT_TUNE") != "0"
        and not torch.are_deterministic_algorithms_enabled()
        and not torch.cuda.is_current_stream_capturing()
    )


def _measure(run: Callable[[Candidate], object], candidate: Candidate) -> float:
    """Return the median milliseconds of a candidate; infinite where it can't run here."""
    try:
        return triton.testing.do_bench(
            lambda: run(candidate), warmup=5, rep=20, return_mode="median"
        )
    except (TritonError, torch.OutOfMemoryError):
        return float("inf")


def tuning_file(card: Card) -> Path:
    """Return where the choices of a card are kept, for these versions."""
    versions = f"{__version__}-triton{triton.__version__}-torch{torch.__version__}"
    name = f"{card.name}-{versions}".replace(" ", "_").replace("/", "_")
    return Path(knobs.cache.dir) / "lora_ext" / f"{name}.json"


def _read(card: Card) -> dict[str, Any]:
    try:
        kept = json.loads(tuning_file(card).read_text())
        return kept if isinstance(kept, dict) else {}
    except (OSError, ValueError):  # none yet, or not ours to read: measure again
        return {}


def _write(card: Card, key: str, value: list) -> None:
    """Add a choice to the file: a new one is written beside it and takes its place."""
    path = tuning_file(card)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
            json.dump(_read(card) | {key: value}, file, indent=1)
        os.replace(file.name, path)
    except OSError:  # a cache that can't be written is measured again next time
        pass
