"""group_(): find the groups of a model, and run each as one operation.

Two kinds, by structure alone:

- an MLP, gated or not, which find_mlp.py recognises by a probe. It then runs as `lora_gated_mlp` or
  `lora_mlp` would.
- siblings, adapted linears of one module that get the same tensor, which siblings.py sees at the
  module's first call.

Only classes change, to subclasses of the same name: parameters, keys, hooks and pickles stay.
"""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from .find_mlp import MLP, find_mlp, mlp_forward
from .inject import require_module
from .parts import is_adapted
from .siblings import Siblings, parent_forward, sibling_forward

_CONTAINERS = (nn.ModuleList, nn.ModuleDict)  # are never called themselves
_KEY = "_lora_group"  # of a module: the group that it belongs to


@dataclass
class Report:
    """What `group_` did; `print` it, again after a step.

    Attributes:
        mlps: MLPs by the name of their module.
        siblings: groups of linears by the name of their module.
        left: modules with several linears that stay as they are, and why.

    """

    mlps: dict[str, MLP] = field(default_factory=dict)
    siblings: dict[str, Siblings] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        """Counts, and a line for each state that a group is in."""
        found: dict[str, MLP | Siblings] = {**self.mlps, **self.siblings}
        lines = [f"{len(self.mlps)} MLPs, {len(self.siblings)} groups of siblings"]
        states: dict[str, list[str]] = {}
        for name, group in found.items():
            states.setdefault(group.state(), []).append(name)
        for name, why in self.left.items():
            states.setdefault(f"left: {why}", []).append(name)
        for state, names in states.items():
            shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
            lines.append(f"{len(names)} {state} ({shown})")
        return "\n".join(lines)


def group_(model: nn.Module, *, recompute: str = "act") -> Report:
    """Run the groups of a model, q, k and v or an MLP, as one operation each, in place.

    Results and gradients are those of the single layers up to rounding, and so is the order in
    which dropout draws. Less is kept for the backward. An activation that an MLP writes out in
    several operations runs as one. A copy or a pickle of the model is not grouped; compiled code
    runs the single layers. Calling it again looks again. No other thread may run the model, or draw
    random numbers, during `group_`: it calls MLPs on a probe, in eval and in training.

    Args:
        model: a model with LinearWithLoRA layers, or PEFT layers that `accelerate` took.
        recompute: what an MLP computes again in its backward, see `lora_gated_mlp`.

    Returns:
        The groups found, and what was left with the reason.

    Raises:
        TypeError: `model` is no nn.Module.
        ValueError: an unknown `recompute`, or no such layer in the model.

    """
    require_module(model)
    if recompute not in ("act", "all"):
        raise ValueError(f"recompute must be 'act' or 'all', got {recompute!r}")
    if not any(map(is_adapted, model.modules())):
        raise ValueError(
            "model must have LinearWithLoRA layers, or PEFT's after accelerate(model), got none"
        )
    ungroup_(model)
    report = Report()
    for name, parent in model.named_modules():
        if is_adapted(parent) or isinstance(parent, _CONTAINERS) or not any(_adapted_of(parent)):
            continue
        mlp = find_mlp(parent, recompute)
        if isinstance(mlp, MLP):
            report.mlps[name] = mlp
            _change_class(parent, mlp, mlp_forward)
            continue
        adapted: dict[int, tuple[str, nn.Module]] = {}  # each once, none that another parent has
        for n, m in _adapted_of(parent):
            if _KEY not in m.__dict__:
                adapted.setdefault(id(m), (n, m))
        if len(adapted) < 2:
            if mlp:
                report.left[name] = mlp
            continue
        siblings = Siblings(*zip(*adapted.values(), strict=True))
        report.siblings[name] = siblings
        _change_class(parent, siblings, parent_forward)
        for layer in siblings.layers:
            _change_class(layer, siblings, sibling_forward)
    return report


def ungroup_(model: nn.Module) -> int:
    """Undo `group_`: every module has its own class again.

    Returns:
        How many modules were changed back.

    Raises:
        TypeError: `model` is no nn.Module.
        ValueError: something else has subclassed a grouped module since, as `fully_shard` does.
            Nothing is then changed.

    """
    require_module(model)
    ours = {n: m for n, m in model.named_modules() if _KEY in m.__dict__}
    for name, module in ours.items():
        if "_lora_base" not in type(module).__dict__:
            got = type(module).__name__
            raise ValueError(
                f"{name} was given a class after group_, a {got}: ungroup_ before that"
            )
    for module in ours.values():
        module.__class__ = type(module)._lora_base  # type: ignore[assignment]
        del module.__dict__[_KEY]
    return len(ours)


def _adapted_of(parent: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield a module's adapted linears by name, those in its lists and dictionaries too."""
    for name, child in parent._modules.items():
        if isinstance(child, _CONTAINERS):
            yield from ((f"{name}.{n}", m) for n, m in _adapted_of(child))
        elif child is not None and is_adapted(child):
            yield name, child


# ---- classes of the same name, with a forward of ours ----


def _change_class(module: nn.Module, group: Any, forward: Callable[..., Any]) -> None:
    module.__dict__[_KEY] = group
    module.__class__ = _class_with(type(module), forward)  # type: ignore[arg-type]


@functools.cache
def _class_with(base: type, call: Callable[..., Any]) -> type:
    """Return a subclass whose forward is call(module, group, base.forward, args, kwargs)."""

    @functools.wraps(base.forward)  # type: ignore[attr-defined]
    def forward(self, *args, **kwargs):
        group = self.__dict__.get(_KEY)  # none in a copy of its state
        if group is None or torch.compiler.is_compiling():
            return base.forward(self, *args, **kwargs)  # type: ignore[attr-defined]
        return call(self, group, base.forward, args, kwargs)  # type: ignore[attr-defined]

    def reduce_ex(self, protocol):
        """Copy and pickle as the class that it was, without the group."""
        # Of the base, and not by giving the class back meanwhile: other threads run or copy it.
        _, _, state, *rest = base.__reduce_ex__(self, protocol)
        return object.__new__, (base,), {k: v for k, v in state.items() if k != _KEY}, *rest

    names = {n: base.__dict__.get(n, getattr(base, n)) for n in ("__module__", "__qualname__")}
    names |= {"__doc__": base.__doc__, "forward": forward, "__reduce_ex__": reduce_ex}
    return type(base.__name__, (base,), {**names, "_lora_base": base})
