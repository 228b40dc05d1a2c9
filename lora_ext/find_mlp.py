"""Gated MLPs in a model: modules whose own forward is `down(act(gate(x)) * up(x))`, on a probe."""

from typing import Any

import torch
from torch import Tensor, nn

from . import gated_mlp
from .acts import ACTS
from .parts import is_adapted, part_of, parts_of
from .quantised_linear import QuantisedLinear

_LINEARS = (nn.Linear, QuantisedLinear)


class GatedMLP:
    """A module that is `down(act(gate(x)) * up(x))`: the names of its linears, and `act`."""

    def __init__(self, first: tuple[str, ...], down: str, act: str, recompute: str) -> None:
        self.first, self.down, self.act, self.recompute = first, down, act, recompute
        self.children: dict[str, int] = {}  # of the module when it was probed
        self._why: str | None = None

    def state(self) -> str:
        """Say whether it runs as one operation."""
        return f"run by their module where {self._why}" if self._why else "run as one operation"

    def call(self, module: nn.Module, x: Any) -> Tensor | None:
        """Return the result, or None where the module's own forward is to run."""
        children: Any = module._modules
        if {name: id(child) for name, child in children.items()} != self.children:
            self._why = "its parts are others than those that were probed"
            return None
        parts = parts_of([children[name] for name in (*self.first, self.down)], x)
        y: Any = parts
        if not isinstance(parts, str):
            y = gated_mlp.run(x, parts[:-1], parts[-1], self.act, self.recompute)
        if isinstance(y, str):
            self._why = y
            return None
        return y


def mlp_forward(module, mlp: GatedMLP, forward, args, kwargs):
    """Run a gated MLP as one operation, or by its own forward."""
    if not kwargs and len(args) == 1 and isinstance(args[0], Tensor):
        y = mlp.call(module, args[0])
        if y is not None:
            return y
    return forward(module, *args, **kwargs)


def find_gated_mlp(parent: nn.Module, recompute: str = "act") -> GatedMLP | str:
    """Return a module's gated MLP if it provably is one; else why not, "" for nothing like it."""
    children: dict[str, Any] = {n: m for n, m in parent._modules.items() if m is not None}
    linears = {n: m for n, m in children.items() if is_adapted(m) or type(m) in _LINEARS}
    by_sizes = {name: (m.in_features, m.out_features) for name, m in linears.items()}
    if len(linears) == 3:
        downs = [n for n, (K, N) in by_sizes.items() if list(by_sizes.values()).count((N, K)) == 2]
    else:
        downs = [
            n for n, (K, _) in by_sizes.items() if any(2 * K == N for _, N in by_sizes.values())
        ]
    if len(linears) not in (2, 3) or len(downs) != 1 and len(set(by_sizes.values())) > 1:
        return ""
    others = [m for n, m in children.items() if n not in linears]
    if len(others) > 1 or parent._parameters or parent._buffers:
        return "it has more parts than the linears and the activation of a gated MLP"
    if any(next(m.parameters(), None) is not None for m in others):
        return "its activation has parameters"
    for down in downs or list(linears):
        first = [name for name in linears if name != down]
        orders = [tuple(first), tuple(reversed(first))] if len(first) == 2 else [tuple(first)]
        for order in orders:
            act = _act_on_probe(parent, [linears[n] for n in order], linears[down])
            if act in ACTS:
                mlp = GatedMLP(order, down, act, recompute)
                mlp.children = {name: id(child) for name, child in parent._modules.items()}
                return mlp
    return act or "its forward is not that of a gated MLP on a probe"


def _act_on_probe(parent: nn.Module, first: list[nn.Module], down: nn.Module) -> str:
    """Return the activation with which the formula gives what the module does; or why none.

    On small and on large values, which a clamp would show, in eval and in training, where the order
    of the layers' random numbers shows as well.
    """
    like = _like(first[0])
    if like.is_meta:
        return "its weights are on meta"
    generator = torch.Generator().manual_seed(0)
    probe = torch.randn(3, first[0].in_features, generator=generator).to(like)  # type: ignore[call-overload]
    modules = list(parent.modules())
    before = [module.training for module in modules]
    devices = [like.device] if like.is_cuda else []
    try:
        for module in modules:
            module.training = True  # some quantised bases are read in training alone
        for part in (part_of(layer, probe) for layer in (*first, down)):
            if isinstance(part, str):
                return part
        with torch.no_grad(), torch.random.fork_rng(devices):
            acts = list(ACTS)
            for training in (False, True):
                for module in modules:
                    module.training = training
                for x in (probe, 30 * probe):
                    _seed(x.device)
                    want = parent.forward(x)
                    acts = [act for act in acts if _gives(want, x, first, down, act)]
    except Exception as error:  # what a module of another kind makes of the probe
        return f"its forward does not take one tensor ({type(error).__name__})"
    finally:
        for module, training in zip(modules, before, strict=True):
            module.training = training
    return acts[0] if acts else ""


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


def _gives(want: Any, x: Tensor, first: list[nn.Module], down: nn.Module, act: str) -> bool:
    _seed(x.device)
    ys = [layer(x) for layer in first]
    gate, up = ys if len(ys) == 2 else ys[0].chunk(2, -1)
    got = down(ACTS[act].value(gate) * up)
    if not isinstance(want, Tensor) or got.shape != want.shape or got.dtype != want.dtype:
        return False
    # Half dtypes round more than two activations differ.
    exact = got.dtype in (torch.float16, torch.bfloat16)
    return torch.equal(got, want) or (not exact and torch.allclose(got, want, 1e-5, 1e-6))
