"""Siblings: linears of one module that are called with the same tensor, run as one operation.

The first call of the module shows which they are and in what order they come. From then on the
first of them computes for all, and the others' results are held until they ask with the same
tensor, at most until the module returns. Where they don't, they run alone.
"""

import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from . import grouped
from .dropout import draw_keep
from .parts import Part, parts_of

MOST_MISSES = 3  # times that siblings may be called in another way than before


Place = tuple[int, int]  # a layer's index, and how often its module has called it before


class Scope:
    """One call of the siblings' module: what is held for them, and what is seen while learning."""

    def __init__(self) -> None:
        self.held: dict[Place, tuple[Tensor, Run]] = {}
        self.seen: list[tuple[Place, Mode, Tensor | None, Tensor | None]] = []
        self._calls: dict[int, int] = {}

    def place(self, index: int) -> Place:
        """Count a call of a layer."""
        nth = self._calls.get(index, 0)
        self._calls[index] = nth + 1
        return index, nth


class Mode:
    """The tensor that a layer is called with, as it is now, and what decides how it is run."""

    def __init__(self, x: Tensor) -> None:
        self.x = x
        device = "cpu" if x.is_cpu else x.device.type
        self.rest = (
            0 if x.is_inference() else x._version,
            torch.is_grad_enabled(),
            torch.is_inference_mode_enabled(),
            not x.is_meta
            and torch.is_autocast_enabled(device)
            and torch.get_autocast_dtype(device),
        )

    def is_of(self, other: "Mode") -> bool:
        """Whether two calls have the same tensor in the same mode."""
        return self.x is other.x and self.rest == other.rest


class Run:
    """Siblings computed together, and the random numbers that were drawn for them."""

    def __init__(self, mode: Mode, places: Sequence[Place], parts: Sequence[Part]) -> None:
        self.mode, self._places, self._parts = mode, places, parts
        self._draws = any(part.dropout for part in parts)
        self._asked = 1
        self._before = _random_state(mode.x) if self._draws else None
        self._after: Tensor | None = None

    def drew(self) -> None:
        """Note that the masks are drawn."""
        self._after = _random_state(self.mode.x) if self._draws else None

    def why_not(self, place: Place, mode: Mode) -> str | None:
        """Say why a layer's result is not that of this call, as it would be alone."""
        if not self.mode.is_of(mode):
            return "got another tensor, or was in another mode"
        if self._draws and self._places[self._asked] != place:
            return "was called in another order"
        if self._after is not None and not torch.equal(self._after, _random_state(mode.x)):
            return "was called after something else drew random numbers"
        self._asked += 1
        return None

    def give_back(self) -> None:
        """Leave the generator as if the layers not asked for had not drawn, where that is known."""
        if self._before is None or self._after is None:
            return
        x = self.mode.x
        if torch.equal(self._after, _random_state(x)):
            _set_random_state(x, self._before)
            for part in self._parts[: self._asked]:
                if part.dropout:
                    draw_keep(x, part.dropout, part.mask)
            self._before = None


class Siblings:
    """Adapted linears of one module. All that is held is held by a call of that module."""

    def __init__(self, names: Sequence[str], layers: Sequence[nn.Module]) -> None:
        self.names, self.layers = list(names), list(layers)
        self._index = {id(layer): i for i, layer in enumerate(layers)}
        self._runs: dict[Place, tuple[Place, ...]] = {}  # by the first: those of one x, in order
        self._next: dict[Place, tuple[Place, ...]] | None = None  # the runs from some call on
        self._to_recompute = 0  # calls that a checkpoint will make again
        self._misses = 0
        self._tries = 0
        self._why: str | None = None
        self._of_thread = threading.local()

    def state(self) -> str:
        """Say what runs together, and why not if something does not."""
        runs = " and ".join("+".join(self.names[i] for i, _ in run) for run in self._runs.values())
        why = f"run alone where {self._why}" if self._why else ""
        if runs:
            return f"run {runs} together" + (f"; {why}" if why else "")
        return why or "wait for the first call of their module"

    @property
    def scope(self) -> Scope | None:
        """The call of the siblings' module in this thread; None outside one."""
        return getattr(self._of_thread, "scope", None)

    @scope.setter
    def scope(self, scope: Scope | None) -> None:
        self._of_thread.scope = scope

    @property
    def learning(self) -> bool:
        """Whether calls are watched, to see which layers get one tensor."""
        return (
            not self._runs
            and self._next is None
            and self._misses < MOST_MISSES
            and self._tries < MOST_MISSES
        )

    def begin(self) -> Scope:
        """Begin a call of the module.

        What a checkpoint computes again must keep the same tensors as before: nothing that was
        learnt is put to use between a call and its recomputation.
        """
        again = torch._C._current_graph_task_id() != -1  # inside a backward
        if again:
            self._to_recompute = max(self._to_recompute - 1, 0)
        elif self._next is not None and self._to_recompute == 0:
            self._runs, self._next = self._next, None
        if not again and _is_checkpointed():
            self._to_recompute += 1
        return Scope()

    def call(self, scope: Scope, layer: nn.Module, x: Tensor, alone: Callable[[], Any]) -> Any:
        """Return a layer's result: what is held for it, or the first of a run, or alone."""
        index = self._index.get(id(layer))
        idle = not self._runs and not self.learning
        if idle or index is None or type(x) is not Tensor:
            return alone()
        mode, place = Mode(x), scope.place(index)
        if (held := scope.held.pop(place, None)) is not None:
            y, run = held
            if (why := run.why_not(place, mode)) is None:
                return y
            self._miss(f"{self.names[index]} {why}", scope, run)
            return alone()
        if (places := self._runs.get(place)) is not None:
            first = self._run(scope, mode, places)
            if first is not None:
                return first
        if not self.learning:
            return alone()
        draws = self.layers[index].training
        before = _random_state(x) if draws else None
        y = alone()
        scope.seen.append((place, mode, before, _random_state(x) if draws else None))
        return y

    def _run(self, scope: Scope, mode: Mode, places: Sequence[Place]) -> Tensor | None:
        """Compute the layers of a run and hold all but the first; None where they run alone."""
        parts = parts_of([self.layers[i] for i, _ in places], mode.x)
        if isinstance(parts, str):
            self._why = parts
            return None
        run = Run(mode, places, parts)
        ys = grouped.run(mode.x, parts)
        if isinstance(ys, str):
            self._why = ys
            return None
        run.drew()
        scope.held |= {place: (y, run) for place, y in zip(places[1:], ys[1:], strict=True)}
        return ys[0]

    def end(self, scope: Scope) -> None:
        """Learn from a call of the module that returned."""
        if scope.held:
            names = ", ".join(self.names[i] for i, _ in scope.held)
            *_, (_, run) = scope.held.values()
            self._miss(f"{names} was not called", scope, run)
        elif scope.seen and self.learning:
            self._tries += 1
            self._learn(scope.seen)

    def _learn(self, seen: list[tuple[Place, Mode, Tensor | None, Tensor | None]]) -> None:
        """Find the runs: layers of one tensor in one mode, between which nothing else draws."""
        runs: list[list[tuple[Place, Mode, Tensor | None, Tensor | None]]] = []
        why = "no two get the same tensor"
        for call in seen:
            (index, _), mode, before, _ = call
            run = next((run for run in reversed(runs) if run[0][1].is_of(mode)), None)
            if run is not None and all(index != other for (other, _), *_ in run):
                after = run[-1][3]
                if before is None or after is None or torch.equal(before, after):
                    run.append(call)
                    continue
                why = "something else draws random numbers between them"
            runs.append([call])
        found = [tuple(place for place, *_ in run) for run in runs if len(run) > 1]
        self._next = {run[0]: run for run in found} or None
        self._why = None if found else why

    def _miss(self, why: str, scope: Scope, run: Run) -> None:
        run.give_back()
        scope.held.clear()
        self._next, self._why = {}, why
        self._misses += 1
        self._tries = 0


def _is_checkpointed() -> bool:
    """Whether a checkpoint drops what is kept now, to compute it again and compare the two."""
    if not torch.is_grad_enabled():
        return False
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)
    return hooks is not None and hooks[0].__module__ == "torch.utils.checkpoint"


def _random_state(x: Tensor) -> Tensor:
    """Return the state of the generator that dropout of x draws from; of one that has none, any."""
    return torch.cuda.get_rng_state(x.device) if x.is_cuda else torch.get_rng_state()


def _set_random_state(x: Tensor, state: Tensor) -> None:
    if x.is_cuda:
        torch.cuda.set_rng_state(state, x.device)
    else:
        torch.set_rng_state(state)


def parent_forward(module, siblings: Siblings, forward, args, kwargs):
    """Run the siblings' module, and drop all that is held for them, however it ends."""
    outer = siblings.scope
    siblings.scope = scope = siblings.begin()
    try:
        result = forward(module, *args, **kwargs)
        siblings.end(scope)
        return result
    finally:
        siblings.scope = outer


def sibling_forward(module, siblings: Siblings, forward, args, kwargs):
    """Run one sibling: with the others inside a call of their module, alone outside."""
    scope = siblings.scope
    if scope is None or kwargs or len(args) != 1:
        return forward(module, *args, **kwargs)
    return siblings.call(scope, module, args[0], lambda: forward(module, args[0]))
