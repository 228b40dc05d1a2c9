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
from .parts import parts_of

MOST_MISSES = 3  # times that siblings may be called in another way than before


class Scope:
    """One call of the siblings' module: what is held for them, and what is seen while learning."""

    def __init__(self) -> None:
        self.held: dict[int, tuple[Tensor, Mode, Tensor | None]] = {}
        self.seen: list[tuple[int, Mode, Tensor | None, Tensor | None]] = []


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


class Siblings:
    """Adapted linears of one module. All that is held is held by a call of that module."""

    def __init__(self, names: Sequence[str], layers: Sequence[nn.Module]) -> None:
        self.names, self.layers = list(names), list(layers)
        self._index = {id(layer): i for i, layer in enumerate(layers)}
        self._runs: dict[int, tuple[int, ...]] = {}  # by the first: those of one x, in order
        self._next: dict[int, tuple[int, ...]] | None = None  # the runs from some call on
        self._to_recompute = 0  # calls that a checkpoint will make again
        self._misses = 0
        self._tries = 0
        self._why: str | None = None
        self._of_thread = threading.local()

    def state(self) -> str:
        """Say what runs together, and why not if something does not."""
        runs = " and ".join("+".join(self.names[i] for i in run) for run in self._runs.values())
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
        mode = Mode(x)
        if (held := scope.held.pop(index, None)) is not None:
            y, its_mode, drawn = held
            if not its_mode.is_of(mode):
                self._miss(f"{self.names[index]} got another tensor, or was in another mode", scope)
                return alone()
            if drawn is not None and not torch.equal(drawn, _random_state(x)):
                self._miss("something else draws random numbers between them", scope)
            return y
        if (run := self._runs.get(index)) is not None:
            layers = [self.layers[i] for i in run]
            parts = parts_of(layers, x)
            ys = parts if isinstance(parts, str) else grouped.run(x, parts)
            if not isinstance(ys, str):
                drawn = _random_state(x) if any(part.dropout for part in parts) else None  # type: ignore[union-attr]
                scope.held |= {i: (y, mode, drawn) for i, y in zip(run[1:], ys[1:], strict=True)}
                return ys[0]
            self._why = ys
        if not self.learning:
            return alone()
        draws = self.layers[index].training
        before = _random_state(x) if draws else None
        y = alone()
        scope.seen.append((index, mode, before, _random_state(x) if draws else None))
        return y

    def end(self, scope: Scope) -> None:
        """Learn from a call of the module that returned."""
        if scope.held:
            names = ", ".join(self.names[i] for i in scope.held)
            self._miss(f"{names} was not called", scope)
        elif scope.seen and self.learning:
            self._tries += 1
            self._learn(scope.seen)

    def _learn(self, seen: list[tuple[int, Mode, Tensor | None, Tensor | None]]) -> None:
        """Find the runs: layers of one tensor in one mode, between which nothing else draws."""
        runs: list[list[tuple[int, Mode, Tensor | None, Tensor | None]]] = []
        why = "no two get the same tensor"
        for call in seen:
            index, mode, before, _ = call
            run = next((run for run in reversed(runs) if run[0][1].is_of(mode)), None)
            if run is not None and any(index == other for other, *_ in run):
                continue  # called twice: the second time alone
            after = run[-1][3] if run else None
            if run and (before is None or after is None or torch.equal(before, after)):
                run.append(call)
                continue
            if run:
                why = "something else draws random numbers between them"
            runs.append([call])
        found = [tuple(index for index, *_ in run) for run in runs if len(run) > 1]
        self._next = {run[0]: run for run in found} or None
        self._why = None if found else why

    def _miss(self, why: str, scope: Scope) -> None:
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
    return torch.get_rng_state() if x.is_cpu else torch.cuda.get_rng_state(x.device)


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
