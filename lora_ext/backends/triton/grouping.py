"""The choice for calls of one x: jointly or one after the other, and the plan of a group.

Jointly only where that moves fewer bytes and is predicted to take no longer; on a card both are
then timed once, as tuning.py times a call's candidates, and kept in the same file.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import Tensor

from . import group_launches, tuning
from .backward_launches import Backward, Gradients
from .cards import Card, card_of
from .costs import Problem, time_us
from .forward_launches import Forward
from .group_costs import MOST_LEGS, apart, gains, joint
from .tiling import Tile

Plan = Callable[[], Callable[[Any], list]]  # makes what runs a group
_plans: dict[tuple, Callable[[Any], list]] = {}
_unmeasured: dict[tuple, Callable[[Any], list]] = {}
_chosen: dict[tuple, str] = {}


def run_forward(calls: Sequence[Forward]) -> list[tuple[Tensor, Tensor]]:
    """Return (y, h) of each call."""
    results = []
    for i in range(0, len(calls), MOST_LEGS):
        some = calls[i : i + MOST_LEGS]
        results += _plan("forward", some)(some)
    return results


def run_backward(calls: Sequence[Backward]) -> list[Gradients]:
    """Return (dx, dA, dB) of each call; dx is the sum, with the first."""
    results: list[Gradients] = []
    for i in range(0, len(calls), MOST_LEGS):
        some = calls[i : i + MOST_LEGS]
        results += _plan("backward", some)(some)
    return _summed(results)


def _summed(results: list[Gradients]) -> list[Gradients]:
    """Return gradients with every dx added to the first one's."""
    total, *others = (dx for dx, *_ in results)
    for dx in others:
        if dx is not None:
            total.add_(dx)  # type: ignore[union-attr]
    return [(None if i else total, dA, dB) for i, (_, dA, dB) in enumerate(results)]


def _forward_apart(calls: Sequence[Forward]) -> list[tuple[Tensor, Tensor]]:
    return list(map(tuning.run_forward, calls))


def _backward_apart(calls: Sequence[Backward]) -> list[Gradients]:
    return _summed(list(map(tuning.run_backward, calls)))


_APART: dict[str, Callable[[Any], list]] = {"forward": _forward_apart, "backward": _backward_apart}


def _plan(direction: str, calls: Sequence[Any]) -> Callable[[Any], list]:
    """Choose for a group, and keep what runs all such groups; as tuning keeps a call's plan."""
    kind = tuning.kind_of(calls[0][0].dtype)
    key = (direction, kind, *tuning._forced.values(), *map(_like, calls))
    if (run := _plans.get(key)) is not None:
        return run
    card = card_of(calls[0][0].device)
    plans = _plans if card.interpreted or tuning.may_measure() else _unmeasured
    if (run := plans.get(key)) is None:
        if len(plans) >= tuning._MAX_PLANS:
            plans.clear()
        of_one = tuning.forward_problem if direction == "forward" else tuning.backward_problem
        run = plans[key] = chosen(direction, calls, list(map(of_one, calls)), card)
    return run


def _like(call: Forward | Backward) -> tuple:
    """Return what calls with one plan have in common: all but the values."""
    return tuple(
        (of.shape, of.stride(), of.dtype, of.device, of.data_ptr() % 16)
        if isinstance(of, Tensor)
        else of
        for of in call
        if type(of) is not float
    )


def chosen(
    direction: str, calls: Sequence[Any], problems: Sequence[Problem], card: Card
) -> Callable[[Any], list]:
    """Return what runs a group, and all like it: forced, remembered, measured or by its cost."""
    forced, bucket = tuning._forced["group"], [p.bucketed() for p in problems]
    one_by_one = _APART[direction]
    found = None if forced == "apart" else joint(direction, bucket, card, _allowed(direction))
    if found is None:
        return one_by_one
    jointly = partial(_joint, direction, calls, problems, found.choices, card)
    if forced is None:
        kind, others = bucket[0].kind, apart(direction, bucket, card)
        if not gains(found.kernels, others, card, kind):
            return one_by_one
        if not card.interpreted and tuning.may_measure():
            plans: dict[str, Plan] = {"joint": jointly, "apart": lambda: one_by_one}
            key = (card.name, f"{direction} of a group", *bucket)
            by_graph = time_us(found.kernels, card, kind) < tuning._GRAPH_BELOW_US
            return plans[_sooner(key, plans, calls, card, by_graph)]()
    return jointly()


def _joint(
    direction: str,
    calls: Sequence[Any],
    problems: Sequence[Problem],
    choices: Sequence[tuple[str, Tile]],
    card: Card,
) -> Callable[[Any], list]:
    if direction == "forward":
        return group_launches.forward(calls, problems, choices, card)
    return group_launches.backward(calls, problems, choices[0][1], card)


def _allowed(direction: str) -> Callable[[str, Tile], bool]:
    """Return whether what is forced leaves a regime and a tile."""
    name, descriptors = tuning._forced[direction], tuning._forced["descriptors"]
    return lambda regime, tile: (
        name in (None, regime) and (descriptors is None or tile.descriptors == descriptors)
    )


def _sooner(
    key: tuple,
    plans: dict[str, Plan],
    calls: Sequence[Any],
    card: Card,
    by_graph: bool,
) -> str:
    """Return which of two plans took less time: remembered, or else measured now."""
    if (way := _chosen.get(key)) is None:
        kept = tuning._read(card).get(repr(key[1:]))
        way = kept.get("chosen") if isinstance(kept, dict) else None
        if way not in plans:
            times = {
                name: tuning.measured(partial(_bound, plan, calls), f"{key} {name}", by_graph)
                for name, plan in plans.items()
            }
            ran = {name: time for name, time in times.items() if time is not None}
            way = min(ran, key=lambda name: ran[name], default="apart")
            tuning._write(card, repr(key[1:]), {"chosen": way, "measured_us": times})
        _chosen[key] = way
    return way


def _bound(plan: Plan, calls: Sequence[Any]) -> Callable[[], list]:
    """Return what runs a group's calls by a plan, made now."""
    return partial(plan(), calls)
