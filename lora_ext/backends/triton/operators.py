"""What the operators run: plans of launches, or PyTorch where a size is zero.

Under lora_ext_triton, with the schemas of ops.py. The kernels and all that imports Triton wait for
the first call.
"""

import functools
from contextlib import AbstractContextManager, nullcontext
from importlib import import_module
from types import ModuleType

import torch
from torch import Tensor

from ...call import Call, LowRank, Weight
from ...ops import LINEARS_BWD, define, fwd_fake, linears_bwd_fake
from .. import reference

# As lora_ext's own, but with each h in memory of its own, which a backward reads it from.
LINEARS_FWD = (
    "linears_fwd(Tensor x, Tensor[] weights, Tensor?[] biases, Tensor[] As, Tensor[] Bs,"
    " float[] scales, Tensor?[] keeps) -> (Tensor[] ys, Tensor[] hs)"
)


def define_all(namespace: str) -> torch.library.Library:
    """Declare the operators of one call and of several under a namespace."""
    library = define(namespace)
    for schema, fake in ((LINEARS_FWD, _linears_fwd_fake), (LINEARS_BWD, linears_bwd_fake)):
        library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        torch.library.register_fake(f"{namespace}::{schema.split('(')[0]}", fake, lib=library)
    return library


def _linears_fwd_fake(x, weights, biases, As, Bs, scales, keeps):
    results = [
        fwd_fake(x, *operands, 1.0, keep=keep)
        for *operands, keep in zip(weights, biases, As, Bs, keeps, strict=True)
    ]
    return [y for y, _ in results], [h for _, h in results]


def linear_fwd(
    x, weight, bias, A, B, scale, *, format="plain", keep=None, weight_scale=None
) -> tuple[Tensor, Tensor]:
    """Return y and h."""
    if x.numel() == 0 or weight.numel() == 0:
        return reference.forward(Call(x, Weight(weight), bias, LowRank(A, B, scale, keep)))
    tuning = _module("tuning")
    bias = None if bias is None else bias.contiguous()
    keep = tuning.words_of(keep, x.shape[1])
    with current(x.device):
        return tuning.run_forward(tuning.Forward(x, weight, bias, A, B, scale, keep))


def linear_bwd(
    dy, x, weight, A, B, h, scale, needs, *, format="plain", keep=None, weight_scale=None
) -> tuple[Tensor | None, ...]:
    """Return dx, dweight, dbias, dA and dB, None where `needs` does not ask."""
    need_dx, need_dweight, need_dbias, need_dA, need_dB = needs
    if dy.numel() == 0 or ((need_dx or need_dA) and A.numel() == 0):
        low = LowRank(A, B, scale, keep)
        call = Call(x, None if weight is None else Weight(weight), None, low)
        return reference.backward(dy, call, h, needs)
    dx = dA = dB = None
    with current(dy.device):
        if need_dx or need_dA or need_dB:
            call = _backward_call(dy, x, weight, A, B, h, scale, needs, keep)
            dx, dA, dB = _module("tuning").run_backward(call)
        dweight = dy.T @ x if need_dweight else None
        dbias = dy.sum(0) if need_dbias else None
    return dx, dweight, dbias, dA, dB


def linears_fwd(x, weights, biases, As, Bs, scales, keeps) -> tuple[list[Tensor], list[Tensor]]:
    """Return y of each layer, and h of each."""
    layers = list(zip(weights, biases, As, Bs, scales, keeps, strict=True))
    if x.numel() == 0 or any(weight.numel() == 0 for weight in weights):
        results = [linear_fwd(x, *own, keep=keep) for *own, keep in layers]
    else:
        tuning = _module("tuning")
        calls = [
            tuning.Forward(
                x, weight, None if bias is None else bias.contiguous(), *low,
                tuning.words_of(keep, x.shape[1]),
            )
            for weight, bias, *low, keep in layers
        ]  # fmt: skip
        with current(x.device):
            results = _module("grouping").run_forward(calls)
    return [y for y, _ in results], [h for _, h in results]


def linears_bwd(
    dys, x, weights, As, Bs, hs, scales, needs, formats, keeps, weight_scales
) -> list[Tensor]:
    """Return dx, the sum over the layers, and dweight, dbias, dA and dB of each."""
    of_each = [(needs[0], *needs[1 + 4 * i : 5 + 4 * i]) for i in range(len(dys))]
    layers = list(zip(dys, weights, As, Bs, hs, scales, of_each, keeps, strict=True))
    # The low-rank parts' gradients by one plan, where none is empty; the bases' are PyTorch's.
    jointly = [
        i
        for i, (need_dx, _, _, need_dA, need_dB) in enumerate(of_each)
        if need_dx or need_dA or need_dB
    ]
    empty = any(dys[i].numel() == 0 or As[i].numel() == 0 for i in jointly)
    found = {}
    if jointly and not empty:
        calls = [_backward_call(dy, x, *own) for dy, *own in (layers[i] for i in jointly)]
        with current(dys[0].device):
            results = _module("grouping").run_backward(calls)
        found = dict(zip(jointly, results, strict=True))
    dx, gradients = None, []
    for i, (dy, weight, A, B, h, scale, asked, keep) in enumerate(layers):
        if i in found:
            asked = (False, *asked[1:3], False, False)
        one, dweight, dbias, *low = linear_bwd(dy, x, weight, A, B, h, scale, asked, keep=keep)
        one, *low = found.get(i, (one, *low))
        if one is not None:
            dx = one if dx is None else dx.add_(one)
        gradients += [dweight, dbias, *low]
    # A list of an operator's results holds no None.
    return [dys[0].new_empty(0) if of is None else of for of in (dx, *gradients)]


def _backward_call(dy, x, weight, A, B, h, scale, needs, keep):
    tuning = _module("tuning")
    need_dx, _, _, need_dA, need_dB = needs
    reads_A = need_dx or need_dA
    return tuning.Backward(
        dy,
        x if need_dA else None,
        weight if need_dx else None,
        A if reads_A else None,
        B,
        h.contiguous() if need_dB else None,
        scale,
        (need_dx, need_dA, need_dB),
        None if keep is None or not reads_A else tuning.words_of(keep, A.shape[0]),
    )


def current(device: torch.device) -> AbstractContextManager:
    """Make the tensors' device the current one: Triton launches there."""
    if device.type == "cpu" or device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)


@functools.cache
def _module(name: str) -> ModuleType:
    return import_module(f".{name}", __package__)
