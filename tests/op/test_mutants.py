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
from lora_ext.testing import TAILS, Case, Linear, broken_rules, expected, gradients, plain_linear
from tests.conftest import linear_of

FOLDER = Path(lora_ext.__file__).parent
CASES = [TAILS, TAILS.but(lead=(0,)), TAILS.but(lead=(3, 5)), TAILS.but(dtype=torch.bfloat16)]
CASES += [Case((19,), 64, 64, 8), Case((19,), 40, 24, 24, bias=False)]  # square: transposes fit
CASES += [TAILS.but(dtype=torch.float16, adapter_dtype=torch.float32)]
CASES += [TAILS.but(layout="A_transposed")]
CASES += [TAILS.but(K=91, dropout=0.3), TAILS.but(base=False)]


def refused(linear: Linear, cases: list[Case] = CASES) -> str | None:
    """Return why the checks refuse `linear`: the first rule it breaks or what it raises."""
    for case in cases:
        want = expected(case)
        try:
            broken = broken_rules(gradients(linear, want.inputs, case.alpha), want)
        except (RuntimeError, AttributeError) as error:  # a shape that does not fit, a lost tensor
            return f"{case}: {error}"
        if broken:
            return f"{case}: {broken[0]}"
    return None


def changed(path: str, *changes: tuple[str, str]) -> ModuleType:
    """Return a module of lora_ext with lines of its source changed, next to the real one."""
    source = (FOLDER / path).read_text()
    for old, new in changes:
        assert source.count(old) == 1, f"{path} has {old!r} {source.count(old)} times: fix the test"
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


H = "h = masked(x, keep) @ A.to(x.dtype)"
Y = "F.linear(x, matrix_of(weight, A, B, x), bias) + low, h"
LOW = "low = scale * (h @ B.to(x.dtype))"
DX_LOW = "dx = masked(scale * (t @ A.to(dy.dtype).T), keep)"
DX = "dx = dx if weight is None else dy @ matrix_of(weight, A, B, dy) + dx"
DA = "scale * product_like(A, masked(x, keep).T, t)"
DB = "scale * product_like(B, h.T, dy)"
BACKEND_MUTANTS = {
    "scale_dropped": (LOW, LOW.replace("scale * ", "")),
    "scale_dropped_in_dx": (DX_LOW, DX_LOW.replace("scale * ", "")),
    "scale_dropped_in_dA": (DA, DA.replace("scale * ", "")),
    "scale_twice_in_dB": (DB, "scale * " + DB),
    "one_percent_in_y": (LOW, LOW.replace("scale *", "1.01 * scale *")),
    "one_percent_in_dx": (DX_LOW, DX_LOW.replace("scale *", "1.01 * scale *")),
    "one_percent_in_dA": (DA, "1.01 * " + DA),
    "one_percent_in_dB": (DB, "1.01 * " + DB),
    "low_rank_part_forgotten": (Y, "F.linear(x, matrix_of(weight, A, B, x), bias), h"),
    "dx_without_low_rank_part": (DX, DX.replace("dy) + dx", "dy)")),
    "dx_without_base": (DX, "pass"),
    "bias_forgotten": (
        "F.linear(x, matrix_of(weight, A, B, x), bias)",
        "F.linear(x, matrix_of(weight, A, B, x))",
    ),
    "weight_transposed": (
        "dy @ matrix_of(weight, A, B, dy) +",
        "dy @ (weight.data.T if dy.shape[1] == A.shape[0] else matrix_of(weight, A, B, dy)) +",
    ),
    "A_and_B_swapped": (H, H.replace("A.to", "(B.T if B.T.shape == A.shape else A).to")),
    "dbias_forgotten": ("dy.sum(0) if need_dbias", "dy.new_zeros(dy.shape[1]) if need_dbias"),
    "dbias_a_mean": ("dy.sum(0)", "dy.mean(0)"),
    "dbias_of_first_row": ("dy.sum(0)", "dy[:1].sum(0)"),
    "dweight_transposed": ("dy.T @ x if", "(x.T @ dy).reshape(dy.shape[1], -1) if"),
    "h_not_kept": (Y, Y + " * 0"),
    "h_scaled": (Y, Y.replace(", h", ", scale * h")),
    "tail_rows_forgotten": (
        Y,
        "F.pad((" + Y[:-3] + ")[: len(x) // 4 * 4], (0, 0, 0, len(x) % 4)), h",
    ),
    "tail_rows_unwritten": (DX, "dx = dy.new_empty(len(dy), A.shape[0])"),
    "tail_rows_out_of_the_sum": (
        DB,
        "scale * product_like(B, h[: len(h) // 8 * 8].T, dy[: len(h) // 8 * 8])",
    ),
    "one_element_wrong": (
        DX,
        f"{DX}; dx[-1:, -1:] = 9",
    ),
    "rank_tail_forgotten": (
        H,
        H.replace("A.to", "(A * (torch.arange(A.shape[1]) < max(A.shape[1] - 1, 1))).to"),
    ),
    "dA_of_a_transposed_A_in_its_order": (
        "return (right.T @ left.T).T",
        "return (right.T @ left.T).reshape(len(left), -1)",
    ),
    "mask_forgotten_in_h": (H, "h = x @ A.to(x.dtype)"),
    "mask_forgotten_in_dx": (DX_LOW, "dx = scale * (t @ A.to(dy.dtype).T)"),
    "mask_forgotten_in_dA": (DA, DA.replace("masked(x, keep)", "x")),
    "mask_of_the_base_too": (
        DX,
        DX.replace(
            "dy @ matrix_of(weight, A, B, dy) + dx",
            "masked(dy @ matrix_of(weight, A, B, dy) + dx, keep)",
        ),
    ),
    "mask_the_other_way_round": ("~unpack_bits", "unpack_bits"),
    "mask_with_its_bits_in_the_other_order": (
        "unpack_bits(keep, x.shape[1])",
        "unpack_bits(keep.new_tensor([int(f'{b:08b}'[::-1], 2) for b in range(256)])[keep.int()],"
        " x.shape[1])",
    ),
    "mask_off_by_a_row": (
        "unpack_bits(keep, x.shape[1])",
        "unpack_bits(keep.roll(1, 0), x.shape[1])",
    ),
    "mask_off_by_a_column": (
        "unpack_bits(keep, x.shape[1])",
        "unpack_bits(keep, x.shape[1]).roll(1, 1)",
    ),
    "mask_on_the_low_rank_output": (
        f"{H}\n    {LOW}",
        f"h = x @ A.to(x.dtype)\n    {LOW}\n"
        "    low = low if keep is None else masked(low, keep.repeat(1, 99))",
    ),
    "mask_of_first_row_for_all": (
        "unpack_bits(keep, x.shape[1])",
        "unpack_bits(keep, x.shape[1])[:1]",
    ),
}


@pytest.mark.parametrize("name", BACKEND_MUTANTS)
def test_wrong_backend_is_refused(name):
    mutant = changed("backends/reference.py", BACKEND_MUTANTS[name])
    mutant.torch = torch
    with through(mutant):
        assert refused(linear_of("mutant"))


def test_right_backend_is_accepted():
    """The same way with nothing changed: what refuses the mutants is the mutation."""
    with through(changed("backends/reference.py")):
        assert refused(linear_of("mutant")) is None
    assert refused(linear_of("reference", changed("functional.py"))) is None


def test_one_percent_is_refused_in_bfloat16_too():
    for name in ("one_percent_in_dA", "one_percent_in_dB"):
        with through(changed("backends/reference.py", BACKEND_MUTANTS[name])):
            assert refused(linear_of("mutant"), [TAILS.but(dtype=torch.bfloat16)])


SAVED_H = "h if need_dB else None,\n        )"
GRADIENTS = """dx = with_shape(dx, x_shape)
        return dx, dweight, dbias, dA, dB,"""
FUNCTIONAL_MUTANTS = {
    "x_not_saved": ("keeps_x = need_dA or need_dweight", "keeps_x = need_dweight"),
    "h_not_saved": (SAVED_H, "None,\n        )"),
    "B_not_kept_for_dA": (
        "A, B = unread[0], unread[1] if B is None else B\n        as_rows",
        "A, B = unread[0], None\n        as_rows",
    ),
    "y_saved_for_h": (SAVED_H, "y if need_dB else None,\n        )"),
    "gradients_swapped": (GRADIENTS, GRADIENTS.replace("dA, dB", "dB, dA")),
    "dbias_lost": (GRADIENTS, GRADIENTS.replace("dbias", "None")),
    "scale_not_kept": ("(x.shape, unread, scale,", "(x.shape, unread, 1.0,"),
    "mask_not_saved": ("(*saved, keep)", "(*saved, None)"),
    "dropout_not_scaled": ("scale * scale_of(dropout), draw", "scale, draw"),
}


@pytest.mark.parametrize("name", FUNCTIONAL_MUTANTS)
def test_wrong_autograd_function_is_refused(name):
    linear = linear_of("reference", changed("functional.py", FUNCTIONAL_MUTANTS[name]))
    frozen = (False, False, False, True, False)  # only A trains: not all that is saved is needed
    assert refused(linear) or refused(partial(only, frozen, linear))


def only(needs, linear, *arguments, **masked):
    """Call with gradients for some of the tensors alone; the others' come from PyTorch."""
    *tensors, alpha = arguments
    with_gradient, others = (
        [t if t is None or n is need else t.detach() for t, n in zip(tensors, needs, strict=True)]
        for need in (True, False)
    )
    y = linear(*with_gradient, alpha, **masked)
    rest = plain_linear(*others, alpha, **masked)
    return y + (rest - rest.detach())
