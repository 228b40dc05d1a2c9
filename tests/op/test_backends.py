"""Every backend against the oracle: forward and backward, shapes each for a reason."""

import mmap
import os

import pytest
import torch
from torch import Tensor

from lora_ext.backends import BACKENDS
from lora_ext.testing import (
    DTYPES,
    LAYOUTS,
    MASKED,
    NAMES,
    NEEDS,
    OF_CODES,
    SHAPES,
    TAILS,
    WITHOUT_BASE,
    Case,
    broken_rules,
    check,
    every_case,
    expected,
    gradients,
    make_call,
    make_inputs,
    possible,
    run_backend,
)
from tests.conftest import Backend

FP32, BF16, FP64 = torch.float32, torch.bfloat16, torch.float64


def in_each_dtype(*cases: Case, dtypes=DTYPES) -> pytest.MarkDecorator:
    """Parametrise a test by these cases in each (dtype of x, dtype of A and B)."""
    spread = [c.but(dtype=dtype, adapter_dtype=ab) for c in cases for dtype, ab in dtypes]
    return pytest.mark.parametrize("case", spread, ids=str)


CROSSES_EVERY_BLOCK = Case((400,), 1100, 700, 24)
LARGE_WEIGHT = Case((40,), 1400, 1300, 8)  # over 3 MiB in 16 bits: what is_far (products.h) takes


@in_each_dtype(*SHAPES)
def test_shapes_keep_the_error_rule(backend: Backend, case):
    check(backend.linear, case)


@in_each_dtype(
    *(c.but(layout=name) for c in (TAILS, Case((2, 9), 48, 56, 5)) for name in LAYOUTS),
    *(MASKED[0].but(layout=name) for name in LAYOUTS if name.startswith("x_")),
    dtypes=[(FP32, None), (BF16, None)],
)
def test_strides_keep_the_error_rule(backend: Backend, case):
    check(backend.linear, case)


@in_each_dtype(
    TAILS.but(layout="x_every_other_row", bias=False),
    TAILS.but(layout="weight_transposed", bias=False),
    TAILS.but(layout="dy_expanded", bias=False),
)
def test_strides_without_bias_keep_the_error_rule(backend: Backend, case):
    check(backend.linear, case)


def named(needs: tuple[bool, ...]) -> str:
    """Return "dx-dA" for the needs of x and A."""
    asked = (f"d{name}" for name, need in zip(NAMES, needs, strict=True) if need)
    return "-".join(asked) or "none"


def far_apart(matrix: Tensor) -> Tensor:
    """Copy a matrix to where its last row begins past 2^31 elements; pages between stay unused."""
    rows, cols = matrix.shape
    stride = 2**31 // (rows - 1) // 16 * 16 + 16
    size = ((rows - 1) * stride + cols) * matrix.element_size()
    no_reserve = 0x4000  # Linux; Python names it from 3.13 on
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve)
    far = torch.frombuffer(memory, dtype=matrix.dtype).as_strided((rows, cols), (stride, 1))
    return far.copy_(matrix)


@pytest.mark.parametrize("case", [TAILS, MASKED[0]], ids=str)
def test_rows_past_2_to_the_31_elements(backend: Backend, case):
    want = expected(case.but(dtype=BF16))
    if want.inputs["x"].device.type != "cpu":
        pytest.skip("test_cuda.py does this in GPU memory")
    far = {name: far_apart(want.inputs[name]) for name in ("x", "weight", "dy")}
    assert all((len(t) - 1) * t.stride(0) > 2**31 for t in far.values())
    got = gradients(backend.linear, want.inputs | far, case.alpha)
    assert broken_rules(got, want) == []


@in_each_dtype(CROSSES_EVERY_BLOCK, LARGE_WEIGHT)
def test_many_blocks_keep_the_error_rule(backend: Backend, case):
    if backend.slow:
        pytest.skip(f"{backend} is too slow for a problem of this size")
    if backend.interpreted:  # no block is larger than 64, a sum of dB's parts 256
        case = case.but(lead=(150,), K=330, N=270)
    check(backend.linear, case)


@in_each_dtype(
    *(TAILS.but(alpha=alpha) for alpha in (0.0, -2.5, 0.125, 16, 1e4)),
    dtypes=[(FP32, None), (BF16, None), (FP64, None)],
)
def test_any_alpha_keeps_the_error_rule(backend: Backend, case):
    check(backend.linear, case)


def test_any_number_of_threads_keeps_the_error_rule(backend: Backend):
    if backend.interpreted:
        pytest.skip("the interpreter runs on one thread")
    threads = torch.get_num_threads()
    try:
        for torch_threads in (1, 2, 3, 4, 7):  # more than rows in the second case
            torch.set_num_threads(torch_threads)
            for case in (TAILS, TAILS.but(lead=(2,)), TAILS.but(lead=(150,), dtype=torch.bfloat16)):
                check(backend.linear, case)
    finally:
        torch.set_num_threads(threads)


@in_each_dtype(*MASKED, *WITHOUT_BASE)
def test_a_mask_or_no_base_keeps_the_error_rule(backend: Backend, case):
    check(backend.linear, case)


@in_each_dtype(*OF_CODES, dtypes=[(FP32, None), (BF16, None), (BF16, FP32), (torch.float16, None)])
def test_a_weight_of_codes_keeps_the_error_rule(backend: Backend, case):
    check(backend.linear, case)


def may_refuse(backend: Backend, case: Case) -> bool:
    """Whether a backend has no kernel for a case: all that it may leave to the next one."""
    if backend.name == "triton":
        return case.dtype == FP64 or not case.base or case.format != "plain"
    on_cuda = torch.get_default_device().type == "cuda" or "LORA_EXT_EMULATED" in os.environ
    return backend.name == "cpp" and on_cuda and case.format != "plain"


def test_backend_refuses_what_it_has_no_kernel_for_alone(backend: Backend):
    module = BACKENDS[backend.name]
    for case in every_case():
        reason = module.unsupported(make_call(make_inputs(case), case.alpha))
        assert (reason is not None) == may_refuse(backend, case), f"{case}: {reason}"


@pytest.mark.parametrize("needs", [(False,) * 5, *NEEDS, (True,) * 5], ids=named)
@pytest.mark.parametrize("case", [TAILS, MASKED[0], WITHOUT_BASE[0], OF_CODES[2]], ids=str)
def test_backend_functions_keep_their_contract(backend: Backend, case, needs):
    """What backends/__init__.py promises of the three functions, None for what is not read."""
    want = expected(case)
    if may_refuse(backend, case):
        pytest.skip(f"{backend} refuses it, which another test holds")
    needs = possible(needs, want.inputs)
    got = run_backend(BACKENDS[backend.name], want.inputs, case.alpha, needs)
    assert broken_rules(got, want) == []


def test_poison_is_on():
    assert torch.empty(1000).isnan().all()
    assert torch.ones(3).new_empty(7, dtype=torch.bfloat16).isnan().all()
