"""What is timed: each provider turns a case into a step, a call without arguments.

A step returns y and, in mode "fwd_bwd", the gradients, fresh at each call. All providers share the
case's tensors. A new one is a function here and its name in `PROVIDERS`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

import lora_ext
from lora_ext.backends import BACKENDS
from lora_ext.backends.triton import regime
from lora_ext.backends.triton.cards import card_of
from lora_ext.backends.triton.regimes import REGIMES, Problem

from .cases import Case


class Unavailable(Exception):
    """A provider can't run here; the message says why and what mends it."""


class Step(NamedTuple):
    """A call to time, and what it returns.

    run() gives a tensor for each of `names`: "y", "dx", "dA", "dB", with ".T" appended where the
    provider holds the transpose. `held` are the inputs and parameters.
    """

    run: Callable[[], tuple[Tensor, ...]]
    names: tuple[str, ...]
    held: tuple[Tensor, ...]

    def results(self) -> dict[str, Tensor]:
        """Run once and return the tensors by name, transposes undone."""
        pairs = zip(self.names, self.run(), strict=True)
        return {n.removesuffix(".T"): t.T if n.endswith(".T") else t for n, t in pairs}


class PlainLoRALayer(nn.Module):
    """The low-rank part as people write it by hand: `alpha * (x @ A @ B)`."""

    def __init__(self, A: Tensor, B: Tensor, alpha: float) -> None:
        super().__init__()
        self.A, self.B, self.alpha = nn.Parameter(A), nn.Parameter(B), alpha

    def forward(self, x: Tensor) -> Tensor:
        """Return (..., N)."""
        return self.alpha * (x @ self.A @ self.B)


class PlainLinearWithLoRA(nn.Module):
    """The adapted layer as people write it by hand: `linear(x) + lora(x)`."""

    def __init__(self, linear: nn.Module, lora: nn.Module) -> None:
        super().__init__()
        self.linear, self.lora = linear, lora

    def forward(self, x: Tensor) -> Tensor:
        """Return (..., N)."""
        return self.linear(x) + self.lora(x)


class _Addmm(torch.autograd.Function):
    """Base product, then the low-rank part added in place by `addmm_`; the same in the backward.

    The way of Unsloth's LoRA kernels, except that h = x @ A is kept and not computed again.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, A: Tensor, B: Tensor, alpha):
        h = x @ A
        ctx.save_for_backward(x, weight, A, B, h)
        ctx.alpha = alpha
        return F.linear(x, weight, bias).addmm_(h, B, alpha=alpha)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor):
        x, weight, A, B, h = ctx.saved_tensors
        t = dy @ B.T
        dx = (dy @ weight).addmm_(t, A.T, alpha=ctx.alpha)
        dA, dB = torch.empty_like(A), torch.empty_like(B)
        dA.addmm_(x.T, t, beta=0, alpha=ctx.alpha)
        dB.addmm_(h.T, dy, beta=0, alpha=ctx.alpha)
        return dx, None, None, dA, dB, None


def _linear(case: Case) -> Step:
    return _step(case, lambda x: F.linear(x, case.weight, case.bias), {"dx": case.x})


def _reference(case: Case) -> Step:
    layer = _plain_layer(case)
    return _step(case, layer, {"dx": case.x, "dA": layer.lora.A, "dB": layer.lora.B})


def _compile(case: Case) -> Step:
    torch.compiler.reset()  # a graph for this shape alone, none with symbolic sizes
    layer = _plain_layer(case)
    inputs = {"dx": case.x, "dA": layer.lora.A, "dB": layer.lora.B}
    return _step(case, torch.compile(layer, fullgraph=True, dynamic=False), inputs)


def _addmm(case: Case) -> Step:
    weight, bias, A, B, alpha = case.weight, case.bias, case.A, case.B, case.alpha
    if case.training:
        inputs = {"dx": case.x, "dA": A, "dB": B}
        return _step(case, lambda x: _Addmm.apply(x, weight, bias, A, B, alpha), inputs)
    return _step(case, lambda x: F.linear(x, weight, bias).addmm_(x @ A, B, alpha=alpha), {})


def _peft(case: Case) -> Step:
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise Unavailable(f"peft can't be imported ({error}); pip install peft") from None
    rank = case.shape.R
    config = LoraConfig(r=rank, lora_alpha=case.alpha * rank, target_modules=["0"])
    model = get_peft_model(
        nn.Sequential(_frozen_linear(case)), config, autocast_adapter_dtype=False
    )
    layer = model.base_model.model[0]
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    with torch.no_grad():
        A.data, B.data = case.A.detach().T.contiguous(), case.B.detach().T.contiguous()
    return _step(case, layer, {"dx": case.x, "dA.T": A, "dB.T": B})


def _loralib(case: Case) -> Step:
    try:
        import loralib
    except ImportError as error:
        raise Unavailable(f"loralib can't be imported ({error}); pip install loralib") from None
    M, K, N, R = case.shape
    layer = loralib.Linear(K, N, r=R, lora_alpha=case.alpha * R, merge_weights=False)
    layer.weight, layer.bias = (nn.Parameter(t, False) for t in (case.weight, case.bias))
    A, B = layer.lora_A, layer.lora_B
    with torch.no_grad():
        A.data, B.data = case.A.detach().T.contiguous(), case.B.detach().T.contiguous()
    return _step(case, layer, {"dx": case.x, "dA.T": A, "dB.T": B})


def _lora_ext(case: Case) -> Step:
    return _adapted(case)[0]


def _adapted(case: Case) -> tuple[Step, lora_ext.LinearWithLoRA]:
    linear = _frozen_linear(case)
    layer = lora_ext.LinearWithLoRA(linear, case.shape.R, case.alpha, dtype=case.A.dtype)
    with torch.no_grad():
        layer.lora.A.copy_(case.A)
        layer.lora.B.copy_(case.B)
    step = _step(case, layer, {"dx": case.x, "dA": layer.lora.A, "dB": layer.lora.B})
    return step, layer


def _prepacked(case: Case) -> Step:
    step, layer = _adapted(case)
    report = lora_ext.prepack_(layer, backward=case.training)
    if report.left:
        raise Unavailable(next(iter(report.left.values())))
    return step


def _backend(name: str) -> Callable[[Case], Step]:
    def build(case: Case) -> Step:
        reason = BACKENDS[name].unsupported(case.x, case.weight, case.A)
        if reason is not None:
            raise Unavailable(reason)
        weight, bias, A, B, alpha = case.weight, case.bias, case.A, case.B, case.alpha
        return _step(
            case,
            lambda x: lora_ext.lora_linear(x, weight, bias, A, B, alpha, backend=name),
            {"dx": case.x, "dA": A, "dB": B},
        )

    return build


def _regime(name: str) -> Callable[[Case], Step]:
    """Return a provider: the backend "triton", its regime forced by name, forward and backward."""

    def build(case: Case) -> Step:
        step = _backend("triton")(case)
        from lora_ext.backends.triton.tuning import kind_of

        kind, size = kind_of(case.x.dtype), case.x.element_size()
        problem = Problem(*case.shape, kind, size, size, descriptors=False)
        if not REGIMES["forward"][name].tiles(problem, card_of(case.x.device)):
            raise Unavailable(f"regime {name} does not take these sizes in {case.x.dtype}")
        forced = {"forward": name, "backward": name if name in REGIMES["backward"] else None}

        def run() -> tuple[Tensor, ...]:
            with regime(**forced):
                return step.run()

        return step._replace(run=run)

    return build


def _step(case: Case, layer: Callable[[Tensor], Tensor], inputs: dict[str, Tensor]) -> Step:
    x, dy = case.x, case.dy
    held = (x, case.weight, case.bias, case.A, case.B, *inputs.values())
    if not case.training:
        return Step(lambda: (layer(x),), ("y",), held)
    wanted = tuple(inputs.values())

    def run() -> tuple[Tensor, ...]:
        y = layer(x)
        return y, *torch.autograd.grad(y, wanted, dy)

    return Step(run, ("y", *inputs), held)


def _plain_layer(case: Case) -> PlainLinearWithLoRA:
    lora = PlainLoRALayer(case.A.detach(), case.B.detach(), case.alpha)
    return PlainLinearWithLoRA(_frozen_linear(case), lora)


def _frozen_linear(case: Case) -> nn.Linear:
    linear = nn.Linear(case.shape.K, case.shape.N, device="meta")
    linear.weight = nn.Parameter(case.weight, requires_grad=False)
    linear.bias = nn.Parameter(case.bias, requires_grad=False)
    return linear


PROVIDERS: dict[str, Callable[[Case], Step]] = {
    "linear": _linear,
    "reference": _reference,
    "compile": _compile,
    "addmm": _addmm,
    "peft": _peft,
    "loralib": _loralib,
    "lora_ext": _lora_ext,
    "prepacked": _prepacked,
}
# Each backend under its own name; the backend "reference" yields that name to the plain classes.
PROVIDERS |= {n if n not in PROVIDERS else f"lora_ext.{n}": _backend(n) for n in BACKENDS}
PROVIDERS |= {f"triton.{name}": _regime(name) for name in REGIMES["forward"]}
DEFAULT = ("linear", "reference", "lora_ext")
