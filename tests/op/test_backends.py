"""Every backend against the oracle: forward and backward, shapes each for a reason."""

import mmap

import pytest
import torch
from torch import Tensor

from lora_ext.backends import BACKENDS
from tests.conftest import Backend
from tests.numerics import LAYOUTS, Case, broken_rules, check, expected, gradients, plain_linear
from tests.reference import LinearWithLoRA as PlainLinearWithLoRA

FP32, BF16, FP16, FP64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
DTYPES = [(FP32, None), (BF16, None), (FP16, None), (FP64, None), (BF16, FP32), (FP16, FP32)]


def in_each_dtype(*cases: Case, dtypes=DTYPES) -> pytest.MarkDecorator:
    """Parametrise a test by these cases in each (dtype of x, dtype of A and B)."""
    spread = [c.but(dtype=dtype, adapter_dtype=ab) for c in cases for dtype, ab in dtypes]
    return pytest.mark.parametrize("case", spread, ids=str)


TAILS = Case((37,), 96, 160, 8)  # no dimension is a multiple of a block, most not of a vector
SHAPES = [
    Case((128,), 256, 128, 16),  # tile-exact
    Case((0,), 96, 160, 8),  # nothing to do; dA, dB and dbias are zeros all the same
    Case((1,), 96, 160, 8),  # a single row: decoding
    Case((), 96, 160, 8),  # x is a vector
    TAILS,
    Case((37,), 91, 157, 8),  # K and N odd: rows at any alignment
    Case((3,), 93, 70, 5),  # few rows, which may go ways of their own: not one row, not full ones
    Case((4,), 70, 93, 9),
    Case((2,), 8, 3, 1),  # less than a vector everywhere
    Case((1,), 1, 1, 1),
    *(Case((19,), 72, 88, R) for R in (1, 3, 16, 64, 100)),  # below, at and past a block; R > K
    Case((3, 5), 96, 160, 8),  # batched
    Case((2, 1, 7), 40, 24, 4),
    Case((2, 0), 96, 160, 8),  # batched, without rows
    TAILS.but(bias=False),
    TAILS.but(alpha=1.0),
]
CROSSES_EVERY_BLOCK = Case((400,), 1100, 700, 24)
LARGE_WEIGHT = Case((40,), 1400, 1300, 8)  # over 3 MiB in 16 bits: what is_far (products.h) takes


@in_each_dtype(*SHAPES)
def test_shapes_keep_the_error_rule(backend: Backend, case):
    check(backend.linear, case)


@in_each_dtype(
    *(c.but(layout=name) for c in (TAILS, Case((2, 9), 48, 56, 5)) for name in LAYOUTS),
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


def far_apart(matrix: Tensor) -> Tensor:
    """Copy a matrix to where its last row begins past 2^31 elements; pages between stay unused."""
    rows, cols = matrix.shape
    stride = 2**31 // (rows - 1) // 16 * 16 + 16
    size = ((rows - 1) * stride + cols) * matrix.element_size()
    no_reserve = 0x4000  # Linux; Python names it from 3.13 on
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve)
    far = torch.frombuffer(memory, dtype=matrix.dtype).as_strided((rows, cols), (stride, 1))
    return far.copy_(matrix)


def test_rows_past_2_to_the_31_elements(backend: Backend):
    want = expected(TAILS.but(dtype=BF16))
    if want.inputs["x"].device.type != "cpu":
        pytest.skip("test_cuda.py does this in GPU memory")
    far = {name: far_apart(want.inputs[name]) for name in ("x", "weight", "dy")}
    assert all((len(t) - 1) * t.stride(0) > 2**31 for t in far.values())
    got = gradients(backend.linear, want.inputs | far, TAILS.alpha)
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


@pytest.mark.parametrize("needs", ["none", "dx", "dweight", "dbias", "dA", "dB"])
def test_backend_functions_keep_their_contract(backend: Backend, needs):
    """What backends/__init__.py promises of the three functions, stand-ins included."""
    module = BACKENDS[backend.name]
    asked = tuple(needs == n for n in ("dx", "dweight", "dbias", "dA", "dB"))
    want = expected(TAILS)
    inputs = want.inputs
    x, weight, A, B = (inputs[n] for n in ("x", "weight", "A", "B"))
    y, h = module.forward(x, weight, inputs["bias"], A, B, TAILS.alpha)
    assert y.shape == (37, 160) and h.shape == (37, 8)
    torch.testing.assert_close(h, x @ A)

    dx, dweight, _, dA, dB = asked
    read = (dA or dweight, dx, dx, dx or dA, dB)
    saved = [t if r else t.new_empty(0) for t, r in zip((x, weight, A, B, h), read, strict=True)]
    grads = module.backward(inputs["dy"], *saved, TAILS.alpha, asked)
    assert [g is not None for g in grads] == list(asked)
    names = ("dx", "dweight", "dbias", "dA", "dB")
    got = {name: g for name, g in zip(names, grads, strict=True) if g is not None}
    assert broken_rules(got, want) == []


def test_poison_is_on():
    assert torch.empty(1000).isnan().all()
    assert torch.ones(3).new_empty(7, dtype=torch.bfloat16).isnan().all()


def test_plain_of_the_rule_is_the_reference_class():
    """`plain_linear` is what everything is measured by: it must be the reference classes."""
    want = expected(TAILS)
    linear = torch.nn.Linear(96, 160)
    layer = PlainLinearWithLoRA(linear, 8, TAILS.alpha)
    state = {"linear.weight": want.inputs["weight"], "linear.bias": want.inputs["bias"]}
    state |= {"lora.A": want.inputs["A"], "lora.B": want.inputs["B"]}
    layer.load_state_dict(state, strict=True)
    assert torch.equal(layer(want.inputs["x"]), want.plain["y"])
    assert plain_linear(*(want.inputs[n] for n in ("x", "weight", "bias", "A", "B")), 0.0).any()
