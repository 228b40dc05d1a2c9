"""What is timed: each provider turns a case into a step, a call without arguments.

A step returns y and, in mode "fwd_bwd", the gradients, fresh at each call. All providers share the
case's tensors. A new one is a function here and its name in `PROVIDERS`.
"""

import os
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

import lora_ext
from lora_ext import testing
from lora_ext.backends import BACKENDS
from lora_ext.backends.triton import regime
from lora_ext.backends.triton.regimes import REGIMES, Problem
from lora_ext.call import Call, LowRank, Weight
from lora_ext.dropout import draw_keep, pack_bits

from . import Case
from .bases import (
    Unavailable,
    frozen_linear,
    needed,
    own_quantised_linear,
    quantised_linear,
)


def hash_mask(case: Case) -> Tensor:
    """Draw dropout's mask as lora_ext does, as bits."""
    return draw_keep(case.x, case.dropout)


def torch_mask(case: Case) -> Tensor:
    """Draw dropout's mask as `F.dropout` does on x, as bits."""
    return pack_bits(
        F.dropout(torch.ones_like(case.x, requires_grad=case.training), case.dropout) != 0
    )


class Step(NamedTuple):
    """A call to time, and what it returns.

    run() gives a tensor for each of `names`: "y", "dx", "dA", "dB", with ".T" appended where the
    provider holds the transpose. `held` are the inputs and parameters. `mask` gives the mask that
    dropout would draw next. `checked` is what the gate runs where that is another call than `run`.
    """

    run: Callable[[], tuple[Tensor, ...]]
    names: tuple[str, ...]
    held: tuple[Tensor, ...]
    mask: Callable[[Case], Tensor] = torch_mask
    checked: Callable[[], tuple[Tensor, ...]] | None = None

    def results(self) -> dict[str, Tensor]:
        """Run once and return the tensors by name, transposes undone."""
        pairs = zip(self.names, (self.checked or self.run)(), strict=True)
        return {n.removesuffix(".T"): t.T if n.endswith(".T") else t for n, t in pairs}


class PlainLoRALayer(testing.LoRALayer):
    """The plain layer with what people add by hand: dropout, and adapters of another dtype."""

    dropout = 0.0

    def forward(self, x: Tensor) -> Tensor:
        """Return `alpha * (dropout(x) @ A @ B)` in x's dtype, (..., N)."""
        if self.dropout:
            x = F.dropout(x, self.dropout)
        return self.alpha * (x @ self.A.to(x.dtype) @ self.B.to(x.dtype))


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
    return _plain(case, lambda layer: layer)


def _compile(case: Case) -> Step:
    torch.compiler.reset()  # a graph for this shape alone, none with symbolic sizes
    compiled = partial(torch.compile, fullgraph=True, dynamic=False)
    step = _plain(case, compiled)
    if not case.dropout:
        return step
    # Compiled code draws other numbers than eager code, unless it is told not to.
    as_eager = _plain(case, partial(compiled, options={"fallback_random": True}))
    return step._replace(checked=as_eager.run)


def _plain(case: Case, prepare: Callable[[nn.Module], Callable[[Tensor], Tensor]]) -> Step:
    layer = _plain_layer(case)
    return _step(case, prepare(layer), {"dx": case.x, "dA": layer.lora.A, "dB": layer.lora.B})


def _addmm(case: Case) -> Step:
    if case.dropout or case.A.dtype != case.x.dtype:
        raise Unavailable("addmm is written for A and B of x's dtype and no dropout")
    weight, bias, A, B, alpha = case.weight, case.bias, case.A, case.B, case.alpha
    if case.training:
        inputs = {"dx": case.x, "dA": A, "dB": B}
        return _step(case, lambda x: _Addmm.apply(x, weight, bias, A, B, alpha), inputs)
    return _step(case, lambda x: F.linear(x, weight, bias).addmm_(x @ A, B, alpha=alpha), {})


def _peft(case: Case) -> Step:
    peft, rank = needed("peft"), case.shape.R
    config = peft.LoraConfig(
        r=rank,
        lora_alpha=case.alpha * rank,
        lora_dropout=case.dropout,
        target_modules=["0"],
    )
    model = peft.get_peft_model(
        nn.Sequential(quantised_linear(case)), config, autocast_adapter_dtype=False
    )
    layer = model.base_model.model[0]
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    with torch.no_grad():
        A.data, B.data = case.A.detach().T.contiguous(), case.B.detach().T.contiguous()
    return _step(case, layer, {"dx": case.x, "dA.T": A, "dB.T": B})


def _loralib(case: Case) -> Step:
    loralib = needed("loralib")
    M, K, N, R = case.shape
    if case.A.dtype != case.x.dtype:
        raise Unavailable("loralib takes A and B of x's dtype alone")
    layer = loralib.Linear(
        K, N, r=R, lora_alpha=case.alpha * R, lora_dropout=case.dropout, merge_weights=False
    )
    layer.weight, layer.bias = (nn.Parameter(t, False) for t in (case.weight, case.bias))
    A, B = layer.lora_A, layer.lora_B
    with torch.no_grad():
        A.data, B.data = case.A.detach().T.contiguous(), case.B.detach().T.contiguous()
    return _step(case, layer, {"dx": case.x, "dA.T": A, "dB.T": B})


def _lora_ext(case: Case) -> Step:
    return _adapted(case)[0]


def _torch_draw(case: Case) -> Step:
    if not case.dropout:
        raise Unavailable("torch_draw is lora_ext with dropout's other draw: give --dropout")
    return _adapted(case, "torch")[0]._replace(mask=torch_mask)


def _lora_ext_plain(case: Case) -> Step:
    if case.base == "plain":
        raise Unavailable("lora_ext_plain is lora_ext over what codes stand for: give --base")
    return _adapted(case, base=frozen_linear(case))[0]


def _lora_ext_quantise(case: Case) -> Step:
    if case.unquantised is None:
        raise Unavailable("lora_ext_quantise is lora_ext after quantise_: give --base")
    return _adapted(case, base=own_quantised_linear(case))[0]


def _adapted(
    case: Case, draw: str = "hash", base: nn.Module | None = None
) -> tuple[Step, lora_ext.LinearWithLoRA]:
    drawn = {"dropout": case.dropout, "dropout_mask": draw}
    layer = lora_ext.LinearWithLoRA(
        base or quantised_linear(case), case.shape.R, case.alpha, dtype=case.A.dtype, **drawn
    )
    with torch.no_grad():
        layer.lora.A.copy_(case.A)
        layer.lora.B.copy_(case.B)
    step = _step(case, layer, {"dx": case.x, "dA": layer.lora.A, "dB": layer.lora.B})
    return step._replace(mask=hash_mask), layer


def _prepacked(case: Case) -> Step:
    step, layer = _adapted(case)
    report = lora_ext.prepack_(layer, backward=case.training)
    if report.left:
        raise Unavailable(next(iter(report.left.values())))
    return step


def _backend(name: str) -> Callable[[Case], Step]:
    def build(case: Case) -> Step:
        keep = hash_mask(case) if case.dropout else None
        low = LowRank(case.A, case.B, case.alpha, keep)
        reason = BACKENDS[name].unsupported(Call(case.x, Weight(case.weight), case.bias, low))
        if reason is not None:
            raise Unavailable(reason)
        weight, bias, A, B, alpha = case.weight, case.bias, case.A, case.B, case.alpha
        options = {"backend": name} | ({"dropout": case.dropout} if case.dropout else {})
        step = _step(
            case,
            lambda x: lora_ext.lora_linear(x, weight, bias, A, B, alpha, **options),
            {"dx": case.x, "dA": A, "dB": B},
        )
        return step._replace(mask=hash_mask)

    return build


def _own_base(case: Case) -> Step:
    """The backend "cpp" on a GPU with the base product by its own kernels, see csrc/cuda."""
    if not case.x.is_cuda or case.x.dtype == torch.float32:
        raise Unavailable("cpp.own_base is a way of the CUDA kernels with 16-bit dtypes")
    step = _backend("cpp")(case)

    def run() -> tuple[Tensor, ...]:
        os.environ["LORA_EXT_CUDA_BASE"] = "own"
        try:
            return step.run()
        finally:
            del os.environ["LORA_EXT_CUDA_BASE"]

    return step._replace(run=run)


def _regime(name: str) -> Callable[[Case], Step]:
    """Return a provider: the backend "triton", its regime forced by name, forward and backward."""

    def build(case: Case) -> Step:
        step = _backend("triton")(case)
        from lora_ext.backends.triton.cards import card_of
        from lora_ext.backends.triton.tuning import describable, kind_of

        problem = Problem(
            *case.shape,
            kind_of(case.x.dtype),
            case.x.element_size(),
            case.A.element_size(),
            descriptors=describable(case.x) and describable(case.weight),
            masked=case.dropout > 0,
        )
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


def _plain_layer(case: Case) -> testing.LinearWithLoRA:
    layer = testing.LinearWithLoRA(frozen_linear(case), case.shape.R, case.alpha)
    if case.dropout or case.A.dtype != case.x.dtype:
        layer.lora = PlainLoRALayer(case.shape.K, case.shape.N, case.shape.R, case.alpha)
        layer.lora.dropout = case.dropout
    layer.lora.A, layer.lora.B = (nn.Parameter(t.detach()) for t in (case.A, case.B))
    return layer


PROVIDERS: dict[str, Callable[[Case], Step]] = {
    "linear": _linear,
    "reference": _reference,
    "compile": _compile,
    "addmm": _addmm,
    "peft": _peft,
    "loralib": _loralib,
    "lora_ext": _lora_ext,
    "lora_ext_plain": _lora_ext_plain,
    "lora_ext_quantise": _lora_ext_quantise,
    "torch_draw": _torch_draw,
    "prepacked": _prepacked,
}
# Each backend under its own name; the backend "reference" yields that name to the plain classes.
PROVIDERS |= {n if n not in PROVIDERS else f"lora_ext.{n}": _backend(n) for n in BACKENDS}
PROVIDERS["cpp.own_base"] = _own_base
PROVIDERS |= {f"triton.{name}": _regime(name) for name in REGIMES["forward"]}
DEFAULT = ("linear", "reference", "lora_ext")
