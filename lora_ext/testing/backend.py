"""The rule, and the rest of the contract, held against the three functions of a backend."""

from collections.abc import Iterable
from math import prod
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..call import Call, LowRank, Weight
from .cases import NAMES, TAILS, Case, every_case
from .rule import Inputs, broken_rules, expected

ALL = (True,) * 5
# Each gradient alone, what a frozen base needs, and all without the bias's.
NEEDS = [tuple(i == j for j in range(5)) for i in range(5)]
NEEDS += [(True, False, False, True, True), (False, False, False, True, True)]


def make_call(inputs: Inputs, alpha: float) -> Call:
    """Return the `Call` of these inputs, x as a matrix (M, K)."""
    x, A, B = (_given(inputs, name) for name in "xAB")
    weight, codes = inputs["weight"], inputs.get("codes")
    rows = x.reshape(prod(x.shape[:-1]), x.shape[-1])
    base = codes if codes is not None else None if weight is None else Weight(weight)
    return Call(rows, base, inputs["bias"], LowRank(A, B, alpha, inputs.get("keep")))


def run_backend(
    backend: ModuleType, inputs: Inputs, alpha: float, needs: tuple[bool, ...] = ALL
) -> dict[str, Tensor]:
    """Return y, h and the gradients that `needs` asks for, in the order of x, weight, bias, A, B.

    The backward gets what those gradients read and None for the rest.
    """
    call, dy = make_call(inputs, alpha), _given(inputs, "dy")
    y, h = backend.forward(call)
    need_dx, need_dweight, _, need_dA, need_dB = needs
    read_A, read_B = need_dx or need_dA, need_dx or need_dA or need_dB  # for dA its layout
    low = {"A": call.low.A if read_A else None, "B": call.low.B if read_B else None}
    read: dict[str, Any] = {
        "x": call.x if need_dA or need_dweight else None,
        "weight": call.weight if need_dx else None,
        "low": call.low._replace(**low),  # type: ignore[arg-type]
    }
    rows = dy.reshape(len(y), dy.shape[-1])
    grads = backend.backward(rows, call._replace(**read), h if need_dB else None, needs)
    asked = {f"d{n}": g for n, g in zip(NAMES, grads, strict=True) if g is not None}
    if [g is not None for g in grads] != list(needs):
        raise AssertionError(f"needs {needs} asks for other gradients than {', '.join(asked)}")
    results = {"y": y.view(*dy.shape[:-1], y.shape[1]), "h": h, **asked}
    if need_dx:
        results["dx"] = results["dx"].view_as(_given(inputs, "x"))
    return results


def check_backend(backend: ModuleType, cases: Iterable[Case] | None = None) -> dict[str, str]:
    """Raise AssertionError unless a backend keeps the error rule and the rest of its contract.

    Held are, for each case: y, h and every gradient by the rule; the same bits at a second call;
    inputs left as they were; and, for one case, each gradient asked for alone.

    Args:
        backend: a module with `unsupported`, `forward` and `backward`.
        cases: the problems; None for `every_case()`. Inputs are made on torch's default device.

    Returns:
        Each case that the backend refused, with its reason. Refusing all of them raises.

    """
    cases = every_case() if cases is None else list(cases)
    refused = {}
    for case in cases:
        inputs = expected(case).inputs
        if (reason := backend.unsupported(make_call(inputs, case.alpha))) is not None:
            refused[str(case)] = reason
            continue
        _check_case(backend, case, ALL)
        if case == TAILS:
            for needs in NEEDS:
                _check_case(backend, case, needs)
    if len(refused) == len(cases):
        raise AssertionError(f"every case was refused, the first with: {refused[str(cases[0])]}")
    return refused


def _check_case(backend: ModuleType, case: Case, needs: tuple[bool, ...]) -> None:
    want = expected(case)
    needs = possible(needs, want.inputs)
    before = {n: t.clone() for n, t in want.inputs.items() if isinstance(t, Tensor)}
    first, second = (run_backend(backend, want.inputs, case.alpha, needs) for _ in range(2))
    lines = broken_rules(first, want)
    for name, t in before.items():
        if not torch.equal(t, _given(want.inputs, name)):
            lines.append(f"{name} was written to")
    for name, t in first.items():
        if not torch.equal(t, second[name]):
            lines.append(f"{name} has other bits at a second call")
    if lines:
        raise AssertionError(f"{case}, needs {needs}:\n" + "\n".join(lines))


def possible(needs: tuple[bool, ...], inputs: Inputs) -> tuple[bool, ...]:
    """Return the needs of what is there, and is not frozen as a weight of codes is."""
    frozen = ("weight",) if "codes" in inputs else ()
    has = [inputs[name] is not None and name not in frozen for name in NAMES]
    return tuple(need and given for need, given in zip(needs, has, strict=True))


def _given(inputs: Inputs, name: str) -> Tensor:
    tensor = inputs[name]
    assert tensor is not None, name
    return tensor
