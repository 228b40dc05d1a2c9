"""The error rule over several layers of one x: dx is the sum over them, all else is each one's."""

from collections.abc import Iterable, Sequence
from types import ModuleType
from unittest import mock

import torch
from torch import Tensor

from lora_ext import grouped
from lora_ext.parts import Part
from lora_ext.testing import NAMES, Case, broken_rules, expected
from lora_ext.testing.rule import Expected

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
WIDE = Case((37,), 96, 128, 8)
NARROW = WIDE.but(N=32)  # k and v of grouped-query attention
ODD = Case((37,), 91, 157, 5)
CODED = Case((37,), 128, 64, 8, format="nf4")
# Of each group the cases share lead, K, dtype and x's layout.
GROUPS: dict[str, list[Case]] = {
    "query_key_value": [WIDE, NARROW, NARROW.but(bias=False, R=16, alpha=-0.5)],
    "odd_sizes": [ODD.but(N=31, R=3), ODD, ODD.but(N=1, R=1)],
    "two": [WIDE, WIDE.but(alpha=0.3)],
    "six": [WIDE.but(N=n, R=r) for n, r in ((16, 1), (48, 2), (5, 8), (64, 16), (33, 4), (96, 64))],
    "transposed_A": [c.but(layout="A_transposed") for c in (WIDE, NARROW, NARROW.but(R=3))],
    "A_of_both_layouts": [WIDE.but(layout="A_transposed"), NARROW],
    "dropout_of_each": [c.but(dropout=0.3) for c in (ODD, ODD.but(N=31), ODD.but(N=40, R=16))],
    "dropout_of_some": [ODD, ODD.but(dropout=0.3), ODD.but(N=40)],
    "batched": [c.but(lead=(3, 15)) for c in (WIDE, NARROW, NARROW.but(R=9))],
    "few_rows": [c.but(lead=(3,)) for c in (ODD, ODD.but(N=40, R=8))],
    "one_row_dropout": [c.but(lead=(1,), dropout=0.3) for c in (WIDE, NARROW)],
    "codes_and_plain": [CODED, CODED.but(N=31, format="int8"), CODED.but(format="plain", R=3)],
    "codes_of_few_rows": [
        CODED.but(lead=(3,), format=f, dropout=p) for f, p in (("fp4", 0.0), ("nf4", 0.3))
    ],
    "codes_of_odd_sizes": [ODD.but(format=f, dropout=0.3) for f in ("nf4", "int8")],
    "no_rows": [c.but(lead=(0,)) for c in (WIDE, NARROW)],
    "panels_for_all_threads": [Case((400,), 264, n, 8) for n in (404, 40)],
    "past_each_block": [Case((400,), 404, n, 8, dropout=p) for n, p in ((264, 0.3), (40, 0.0))],
}
DTYPES = [(FP32, None), (BF16, None), (FP16, FP32), (FP64, None)]


def cases_of(name: str, dtype: torch.dtype, adapter: torch.dtype | None) -> list[Case]:
    """Return a group in a dtype; the first layer's adapter stays in x's where others' differs."""
    cases = [case.but(dtype=dtype, adapter_dtype=adapter) for case in GROUPS[name]]
    return [cases[0].but(adapter_dtype=None), *cases[1:]]


def wanted(cases: Sequence[Case]) -> list[Expected]:
    """Return what each layer of a group should give on the first one's x, and with it all of dx."""
    wants = []
    for case in cases:
        want = expected(case)  # x is drawn first, so that a seed gives all cases the same
        assert torch.equal(want.inputs["x"], expected(cases[0]).inputs["x"])
        wants.append(want)
    return wants


def of_group(
    wants: list[Expected], cases: Sequence[Case], backend: str, module: ModuleType = grouped
) -> list[dict[str, Tensor]]:
    """Return y and the gradients of each layer, dx with the first, as a group computes them."""
    x = wants[0].inputs["x"].detach().requires_grad_()
    parts, leaves, keeps = [], [], []
    for want, case in zip(wants, cases, strict=True):
        codes = want.inputs.get("codes")  # in place of the weight, and without a gradient
        own = {
            name: None if (t := want.inputs[name]) is None else t.detach().requires_grad_()
            for name in NAMES[1:]
            if name != "weight" or codes is None
        }
        keep = want.inputs.get("keep")
        keeps += [] if keep is None else [keep]
        drawn = {} if keep is None else {"scale": case.alpha / 2, "dropout": 0.5}
        given = {"weight": codes} if codes else {}
        parts.append(Part(**own, **given, **({"scale": case.alpha} | drawn)))
        leaves.append(own)
    masks = iter(keeps)
    with mock.patch.object(module, "draw_keep", lambda *_: next(masks)):
        ys = module.run(x, parts, backend)
    assert not isinstance(ys, str), ys
    wrt = [x, *(t for own in leaves for t in own.values() if t is not None)]
    dys = [want.inputs["dy"] for want in wants]
    dx, *rest = torch.autograd.grad(ys, wrt, dys)
    left = iter(rest)
    results = [{"y": y.detach()} for y in ys]
    for result, own in zip(results, leaves, strict=True):
        result |= {f"d{name}": next(left) for name, t in own.items() if t is not None}
    results[0]["dx"] = dx
    return results


def broken_in_group(cases: Sequence[Case], backend: str, module: ModuleType = grouped) -> list[str]:
    """Return a line for each result of a group that breaks the rule."""
    wants = wanted(cases)
    results = of_group(wants, cases, backend, module)
    lines = []
    for i, (result, want) in enumerate(zip(results, wants, strict=True)):
        dx = result.pop("dx", None)
        lines += [f"layer {i}, {line}" for line in broken_rules(result, want)]
        if dx is not None:
            sums = [
                {"dx": sum(getattr(w, kind)["dx"] for w in wants)}
                for kind in ("exact", "magnitude", "plain")
            ]
            lines += broken_rules({"dx": dx}, Expected(want.inputs, *sums))
    return lines


def dtypes_of(name: str) -> tuple[torch.dtype, ...]:
    """Return the dtypes that a group is checked in."""
    of_codes = any(case.format != "plain" for case in GROUPS[name])
    return (FP32, BF16) if of_codes else (FP32, BF16, FP64)


def every_case_of_a_group() -> Iterable[Case]:
    """Yield the cases of what `refused_group` checks."""
    for name in GROUPS:
        for dtype in dtypes_of(name):
            yield from cases_of(name, dtype, None)


def refused_group(
    backend: str, module: ModuleType = grouped, names: Iterable[str] = GROUPS
) -> str | None:
    """Return why the checks refuse a way to run groups: the first rule it breaks."""
    for name in names:
        for dtype in dtypes_of(name):
            try:
                broken = broken_in_group(cases_of(name, dtype, None), backend, module)
            except (RuntimeError, AttributeError) as error:
                return f"{name}: {error}"
            if broken:
                return f"{name}, {dtype}: {broken[0]}"
    return None
