"""The providers that are not ours: bare F.linear, the plain layer, and others' layers."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lora_ext import testing

from . import Case
from .bases import Unavailable, frozen_linear, needed, quantised_linear
from .step import Step, step_of


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
    return step_of(case, lambda x: F.linear(x, case.weight, case.bias), {"dx": case.x})


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
    return step_of(case, prepare(layer), {"dx": case.x, "dA": layer.lora.A, "dB": layer.lora.B})


def _addmm(case: Case) -> Step:
    if case.dropout or case.A.dtype != case.x.dtype:
        raise Unavailable("addmm is written for A and B of x's dtype and no dropout")
    weight, bias, A, B, alpha = case.weight, case.bias, case.A, case.B, case.alpha
    if case.training:
        inputs = {"dx": case.x, "dA": A, "dB": B}
        return step_of(case, lambda x: _Addmm.apply(x, weight, bias, A, B, alpha), inputs)
    return step_of(case, lambda x: F.linear(x, weight, bias).addmm_(x @ A, B, alpha=alpha), {})


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
    return step_of(case, layer, {"dx": case.x, "dA.T": A, "dB.T": B})


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
    return step_of(case, layer, {"dx": case.x, "dA.T": A, "dB.T": B})


def _plain_layer(case: Case) -> testing.LinearWithLoRA:
    layer = testing.LinearWithLoRA(frozen_linear(case), case.shape.R, case.alpha)
    if case.dropout or case.A.dtype != case.x.dtype:
        layer.lora = PlainLoRALayer(case.shape.K, case.shape.N, case.shape.R, case.alpha)
        layer.lora.dropout = case.dropout
    layer.lora.A, layer.lora.B = (nn.Parameter(t.detach()) for t in (case.A, case.B))
    return layer


PEERS: dict[str, Callable[[Case], Step]] = {
    "linear": _linear,
    "reference": _reference,
    "compile": _compile,
    "addmm": _addmm,
    "peft": _peft,
    "loralib": _loralib,
}
