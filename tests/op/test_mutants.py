"""The suite's own test: wrong kernels that the checks must refuse.

A mutant is a backend module with one line of `reference.py`, or a copy of functional.py with
one line of it, changed. `refused` runs what test_backends.py and test_backward.py run; it takes any
callable like `lora_linear`, so a mutant of a compiled backend is checked in the same way.
"""

import sys
from functools import partial
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from types import ModuleType
from unittest import mock

import pytest
import torch

import lora_ext
from lora_ext.backends import BACKENDS
from tests.numerics import Case, Linear, broken_rules, expected, gradients

FOLDER = Path(lora_ext.__file__).parent
TAILS = Case((37,), 96, 160, 8)
CASES = [TAILS, TAILS.but(lead=(0,)), TAILS.but(lead=(3, 5)), TAILS.but(dtype=torch.bfloat16)]
CASES += [Case((19,), 64, 64, 8), Case((19,), 40, 24, 24, bias=False)]  # square: transposes fit
CASES += [TAILS.but(dtype=torch.float16, adapter_dtype=torch.float32)]


def refused(linear: Linear, cases: list[Case] = CASES) -> str | None:
    """Return why the checks refuse `linear`: the first rule it breaks or what it raises."""
    for case in cases:
        want = expected(case)
        try:
            broken = broken_rules(gradients(linear, want.inputs, case.alpha), want)
        except RuntimeError as error:  # a shape that does not fit is refused as well
            return f"{case}: {error}"
        if broken:
            return f"{case}: {broken[0]}"
    return None


def changed(path: str, *changes: tuple[str, str]) -> ModuleType:
    """Return a module of lora_ext with lines of its source changed, beside the real one."""
    source = (FOLDER / path).read_text()
    for old, new in changes:
        assert source.count(old) == 1, (
            f"{path} has {old!r} {source.count(old)} times: mend the test"
        )
        source = source.replace(old, new)
    name = "lora_ext." + path.removesuffix(".py").replace("/", ".")
    module = module_from_spec(spec_from_loader(f"{name}_mutant", loader=None))
    module.__package__ = name.rpartition(".")[0]
    with mock.patch.dict(sys.modules, {module.__name__: module}):
        exec(compile(source, path, "exec"), module.__dict__)
    return module


def through(backend: ModuleType):
    """Make a backend module known as "mutant", the time of a with statement."""
    return mock.patch.dict(BACKENDS, mutant=backend)


MUTANT_LINEAR = partial(lora_ext.lora_linear, backend="mutant")
FORWARD = "F.linear(x, weight, bias) + alpha * (h @ B.to(x.dtype)), h"
DX = "dy @ weight + alpha * (t @ A.to(dy.dtype).T)"
DA = "alpha * (x.T @ t).to(A.dtype)"
DB = "alpha * (h.T @ dy).to(B.dtype)"
BACKEND_MUTANTS = {
    "scale_dropped": (FORWARD, FORWARD.replace("alpha * ", "")),
    "scale_dropped_in_dx": (DX, DX.replace("alpha * ", "")),
    "scale_dropped_in_dA": (DA, DA.replace("alpha * ", "")),
    "scale_twice_in_dB": (DB, "alpha * " + DB),
    "one_percent_in_y": (FORWARD, FORWARD.replace("alpha *", "1.01 * alpha *")),
    "one_percent_in_dx": (DX, DX.replace("alpha *", "1.01 * alpha *")),
    "one_percent_in_dA": (DA, "1.01 * " + DA),
    "one_percent_in_dB": (DB, "1.01 * " + DB),
    "low_rank_part_forgotten": (FORWARD, "F.linear(x, weight, bias), h"),
    "dx_without_low_rank_part": (DX, "dy @ weight"),
    "dx_without_base": (DX, "alpha * (t @ A.to(dy.dtype).T)"),
    "bias_forgotten": ("F.linear(x, weight, bias)", "F.linear(x, weight)"),
    "weight_transposed": (DX, DX.replace("dy @ weight", "dy @ (weight.T if N_IS_K else weight)")),
    "A_and_B_swapped": (
        "x @ A.to(x.dtype)",
        "x @ (B.T if B.T.shape == A.shape else A).to(x.dtype)",
    ),
    "dbias_forgotten": ("dy.sum(0) if need_dbias", "dy.new_zeros(dy.shape[1]) if need_dbias"),
    "dbias_a_mean": ("dy.sum(0)", "dy.mean(0)"),
    "dbias_of_first_row": ("dy.sum(0)", "dy[:1].sum(0)"),
    "dweight_transposed": ("dy.T @ x if", "(x.T @ dy).reshape(dy.shape[1], -1) if"),
    "h_not_kept": (FORWARD, FORWARD[:-1] + "h * 0"),
    "h_scaled": (FORWARD, FORWARD[:-1] + "alpha * h"),
    "tail_rows_forgotten": (
        FORWARD,
        "F.pad((" + FORWARD[:-3] + ")[: len(x) // 4 * 4], (0, 0, 0, len(x) % 4)), h",
    ),
    "tail_rows_unwritten": (DX, "dy.new_empty(len(dy), weight.shape[1])"),
    "tail_rows_out_of_the_sum": (
        DB,
        "alpha * (h[: len(h) // 8 * 8].T @ dy[: len(h) // 8 * 8]).to(B.dtype)",
    ),
    "one_element_wrong": (
        DX,
        f"({DX}).index_put((torch.tensor([-1]), torch.tensor([-1])), "
        "torch.tensor(9.0).to(dy.dtype))",
    ),
    "rank_tail_forgotten": (
        "h = x @ A.to(x.dtype)",
        "h = x @ (A * (torch.arange(A.shape[1]) < max(A.shape[1] - 1, 1))).to(x.dtype)",
    ),
}


@pytest.mark.parametrize("name", BACKEND_MUTANTS)
def test_wrong_backend_is_refused(name):
    old, new = BACKEND_MUTANTS[name]
    new = new.replace("N_IS_K", "weight.shape[0] == weight.shape[1]")
    mutant = changed("backends/reference.py", (old, new))
    mutant.torch = torch
    with through(mutant):
        assert refused(MUTANT_LINEAR)


def test_right_backend_is_accepted():
    """The same way with nothing changed: what refuses the mutants is the mutation."""
    with through(changed("backends/reference.py")):
        assert refused(MUTANT_LINEAR) is None
    assert refused(partial(changed("functional.py").lora_linear, backend="reference")) is None


def test_one_percent_is_refused_in_bfloat16_too():
    for name in ("one_percent_in_dA", "one_percent_in_dB"):
        with through(changed("backends/reference.py", BACKEND_MUTANTS[name])):
            assert refused(MUTANT_LINEAR, [TAILS.but(dtype=torch.bfloat16)])


FUNCTIONAL_MUTANTS = {
    "x_not_saved": ("x if need_dA or need_dweight else", "x if need_dweight else"),
    "h_not_saved": ("h if need_dB else _stand_in(h)", "_stand_in(h)"),
    "B_not_saved_for_dA": ("B if need_dx or need_dA else", "B if need_dx else"),
    "y_saved_for_h": ("h if need_dB else _stand_in(h)", "y if need_dB else _stand_in(h)"),
    "gradients_swapped": (
        "return dx, dweight, dbias, dA, dB,",
        "return dx, dweight, dbias, dB, dA,",
    ),
    "dbias_lost": ("return dx, dweight, dbias, dA,", "return dx, dweight, None, dA,"),
    "alpha_not_kept": (
        "ctx.alpha, ctx.name, ctx.x_shape = alpha,",
        "ctx.alpha, ctx.name, ctx.x_shape = 1.0,",
    ),
}


@pytest.mark.parametrize("name", FUNCTIONAL_MUTANTS)
def test_wrong_autograd_function_is_refused(name):
    linear = changed("functional.py", FUNCTIONAL_MUTANTS[name]).lora_linear
    linear = partial(linear, backend="reference")
    frozen = (False, False, False, True, False)  # only A trains: not all that is saved is needed
    assert refused(linear) or refused(partial(only, frozen, linear))


def only(needs, linear, *arguments):
    """Call with gradients for some of the tensors alone; the others' come from PyTorch."""
    exact = partial(lora_ext.lora_linear, backend="reference")
    tensors = [
        t if t is None or need else t.detach() for t, need in zip(arguments[:5], needs, strict=True)
    ]
    others = [
        t if t is None or not need else t.detach()
        for t, need in zip(arguments[:5], needs, strict=True)
    ]
    y, rest = linear(*tensors, arguments[5]), exact(*others, arguments[5])
    return y + (rest - rest.detach())
