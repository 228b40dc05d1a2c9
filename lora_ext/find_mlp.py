"""MLPs in a model: modules that compute `down(act(gate(x)) * up(x))` or `down(act(up(x)))`.

Their own forward must show it on a probe. Dropout may follow `down`, or stand anywhere while it is
off, and an nn.Identity anywhere.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from . import gated_mlp
from .acts import ACTS, UNGATED
from .bases import hooks_of
from .gated_mlp import Formula
from .parts import is_adapted, part_of, parts_of
from .quantised_linear import QuantisedLinear

_HALF = (torch.float16, torch.bfloat16)
_LINEARS = (nn.Linear, QuantisedLinear)


class MLP:
    """A module that is an MLP: the names of its linears, and what is between and after them."""

    def __init__(self, first: tuple[str, ...], down: str, formula: Formula) -> None:
        self.first, self.down, self.formula = first, down, formula
        self.recompute = "act"
        self.dropout: str | None = None  # an nn.Dropout after `down`
        self.off: list[str] = []  # nn.Dropout modules elsewhere
        self.passed_by: list[str] = []  # these, the activation and what does nothing
        self.children: dict[str, int] = {}  # of the module when it was probed
        self._why: str | None = None

    @property
    def act(self) -> str:
        """The activation, a name of acts.UNGATED."""
        return self.formula.act

    def state(self) -> str:
        """Say whether it runs as one operation."""
        return f"run by their module where {self._why}" if self._why else "run as one operation"

    def call(self, module: nn.Module, x: Any) -> Tensor | None:
        """Return the result, or None where the module's own forward is to run."""
        children: Any = module._modules
        if {name: id(child) for name, child in children.items()} != self.children:
            self._why = "its parts are others than those that were probed"
            return None
        if any(children[name].training and children[name].p for name in self.off):
            self._why = "dropout is on between its linears"
            return None
        for name in self.passed_by:
            if (why := _attached_to(children[name])) is not None:
                self._why = f"{name} {why}"
                return None
        parts = parts_of([children[name] for name in (*self.first, self.down)], x)
        y: Any = parts
        if not isinstance(parts, str):
            y = gated_mlp.run(x, parts[:-1], parts[-1], self.formula, self.recompute)
        if isinstance(y, str):
            self._why = y
            return None
        return y if self.dropout is None else children[self.dropout](y)


def _attached_to(module: nn.Module) -> str | None:
    """Say what is attached to a module or a part of it that is not called; None for nothing."""
    own = module.__dict__
    why = hooks_of(own, 0)
    return why or next(filter(None, map(_attached_to, own["_modules"].values())), None)


def mlp_forward(module, mlp: MLP, forward, args, kwargs):
    """Run an MLP as one operation, or by its own forward."""
    if not kwargs and len(args) == 1 and isinstance(args[0], Tensor):
        y = mlp.call(module, args[0])
        if y is not None:
            return y
    return forward(module, *args, **kwargs)


def find_mlp(parent: nn.Module, recompute: str = "act") -> MLP | str:
    """Return a module's MLP if it provably is one; else why not, "" for nothing like it."""
    children: dict[str, Any] = {n: m for n, m in parent._modules.items() if m is not None}
    linears = {n: m for n, m in children.items() if is_adapted(m) or type(m) in _LINEARS}
    candidates = list(_candidates({n: (m.in_features, m.out_features) for n, m in linears.items()}))
    if not candidates:
        return ""
    drops = {n: m for n, m in children.items() if type(m) is nn.Dropout}
    idle = {n for n, m in children.items() if type(m) is nn.Identity}
    others = [m for n, m in children.items() if n not in {*linears, *drops, *idle}]
    if len(others) > 1 or parent._parameters or parent._buffers:
        return "it has more parts than the linears and the activation of an MLP"
    if any(next(m.parameters(), None) is not None for m in others):
        return "its activation has parameters"
    why = ""
    for first, down, gated in candidates:
        layers = [linears[name] for name in (*first, down)]
        # Dropout that is on shows whether it comes last. If not, it must be off.
        for dropout in [*drops] * (len(drops) == 1) + [None]:
            with _probability(drops.values(), 0.5 if dropout else 0.0):
                act = _act_on_probe(parent, layers, gated, others, drops.get(dropout or ""))
            if act not in UNGATED:
                why = act or why
                continue
            mlp = MLP(first, down, Formula(act, gated))
            mlp.recompute, mlp.dropout = recompute, dropout
            mlp.off = [name for name in drops if name != dropout]
            mlp.passed_by = [name for name in children if name not in {*linears, dropout}]
            mlp.children = {name: id(child) for name, child in parent._modules.items()}
            return mlp
    return why or "its forward is not that of an MLP on a probe"


def _candidates(
    sizes: dict[str, tuple[int, int]],
) -> Iterator[tuple[tuple[str, ...], str, bool]]:
    """Yield what linears of these sizes, (in, out), may be: the first ones, down, and if gated."""
    for down, (K, _) in sizes.items():
        first = [name for name in sizes if name != down]
        widths = [sizes[name][1] for name in first]
        if len({sizes[name][0] for name in first}) != 1:
            continue
        if widths == [K, K]:
            yield tuple(first), down, True
            yield tuple(reversed(first)), down, True
        elif widths == [2 * K]:
            yield tuple(first), down, True
        elif widths == [K]:
            yield tuple(first), down, False


@contextmanager
def _probability(drops: Iterable[nn.Dropout], p: float) -> Iterator[None]:
    before = [(module, module.p) for module in drops]
    try:
        for module, _ in before:
            module.p = p
        yield
    finally:
        for module, own in before:
            module.p = own


def _act_on_probe(
    parent: nn.Module,
    layers: list[nn.Module],
    gated: bool,
    others: list[nn.Module],
    dropout: nn.Module | None,
) -> str:
    """Return the activation with which the formula gives what the module does; or why none.

    On small and on large values, which a clamp would show, in eval and in training, where the order
    of the layers' random numbers shows as well. `layers` ends with `down`. In half dtypes an
    activation of several operations, GPT-2's say, rounds more often than ours: the formula is then
    held to the module's own activation, of `others`, and that one to ours in float32.
    """
    like = _like(layers[0])
    if like.is_meta:
        return "its weights are on meta"
    generator = torch.Generator("cpu").manual_seed(0)
    probe = torch.randn(3, layers[0].in_features, generator=generator, device="cpu").to(like)  # type: ignore[call-overload]
    modules = list(parent.modules())
    before = [module.training for module in modules]
    devices = [like.device] if like.is_cuda else []
    try:
        for module in modules:
            module.training = True  # some quantised bases are read in training alone
        for part in (part_of(layer, probe) for layer in layers):
            if isinstance(part, str):
                return part
        with torch.no_grad(), torch.random.fork_rng(devices):
            names = ACTS if gated else UNGATED
            acts = [(act, UNGATED[act].value) for act in names]
            if like.dtype in _HALF and others:
                acts += [(act, others[0]) for act in names if _is_act(others[0], act, like.device)]
            for training in (False, True):
                for module in modules:
                    module.training = training
                for x in (probe, 30 * probe):
                    _seed(x.device)
                    want = parent.forward(x)
                    acts = [
                        (act, value)
                        for act, value in acts
                        if _gives(want, x, layers, Formula(act, gated), value, dropout)
                    ]
    except Exception as error:  # what a module of another kind makes of the probe
        return f"its forward does not take one tensor ({type(error).__name__})"
    finally:
        for module, training in zip(modules, before, strict=True):
            module.training = training
    return acts[0][0] if acts else ""


def _is_act(module: nn.Module, act: str, device: torch.device) -> bool:
    """Whether a module computes an activation in float32, up to rounding."""
    near, far = (torch.linspace(-end, end, n, device=device) for end, n in ((8, 4001), (1e3, 2001)))
    x = torch.cat((near, far))
    got, want = module(x.clone()), UNGATED[act].value(x)
    plain = isinstance(got, Tensor) and got.dtype == want.dtype and got.shape == want.shape
    return plain and torch.allclose(got, want, rtol=1e-5, atol=1e-5)


def _like(layer: Any) -> Tensor:
    """Return a tensor of no elements, of the dtype and device of the x that a layer expects."""
    base = getattr(layer, "linear", None) or getattr(layer, "base_layer", layer)
    weight, bias = base.weight, base.bias
    if weight.is_floating_point():
        return torch.empty(0, dtype=weight.dtype, device=weight.device)
    # Of codes: what it computes in where that is set; else as its bias is, or as it was.
    dtype = getattr(base, "dtype", torch.float32) if bias is None else bias.dtype
    if getattr(base, "compute_type_is_set", True):
        dtype = getattr(base, "compute_dtype", None) or dtype
    return torch.empty(0, dtype=dtype, device=weight.device)


def _seed(device: torch.device) -> None:
    """Seed the generators that are forked, and no other: the user's stay as they are."""
    torch.default_generator.manual_seed(0)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(0)


def _gives(
    want: Any,
    x: Tensor,
    layers: list[nn.Module],
    formula: Formula,
    value: Any,
    dropout: nn.Module | None,
) -> bool:
    _seed(x.device)
    *first, down = layers
    got = down(formula.of([layer(x) for layer in first], value))
    got = got if dropout is None else dropout(got)
    if not isinstance(want, Tensor) or got.shape != want.shape or got.dtype != want.dtype:
        return False
    # Half dtypes round more than two activations differ.
    if got.dtype in _HALF or torch.equal(got, want):
        return torch.equal(got, want)
    return bool((got - want).abs().max() <= 1e-5 * want.abs().max())
