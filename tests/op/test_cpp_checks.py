"""What the C++ operators refuse: csrc/call.cpp, each message once."""

import re
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from lora_ext import ops
from lora_ext.backends import BACKENDS, cpp
from tests.conftest import small_call

WITHOUT_CPP = BACKENDS["cpp"].unsupported(small_call())
pytestmark = pytest.mark.skipif(WITHOUT_CPP is not None, reason=str(WITHOUT_CPP))
M, K, N, R = 5, 12, 10, 3
F64 = torch.float64


def t(*shape, **options):
    return torch.ones(*shape, **options)


def bits(*shape):
    return torch.zeros(*shape, dtype=torch.uint8)


def of_codes(format):
    if format == "int8":
        given = {"weight": t(N, K, dtype=torch.int8), "weight_scale": t(N)}
    else:
        given = {"weight": bits(N * K // 2, 1), "weight_scale": t(2)}
    return given | {"format": format}


def freed(tensor):
    tensor.untyped_storage().resize_(0)
    return tensor


def forward(**given):
    arguments = {"x": t(M, K), "weight": t(N, K), "bias": t(N), "A": t(K, R), "B": t(R, N)}
    return torch.ops.lora_ext.linear_fwd.default(**arguments | {"scale": 1.0} | given)


def backward(needs=(True,) * 5, **given):
    arguments = {"dy": t(M, N), "x": t(M, K), "weight": t(N, K), "A": t(K, R), "B": t(R, N)}
    arguments |= {"h": t(M, R), "scale": 1.0, "needs": needs}
    return torch.ops.lora_ext.linear_bwd.default(**arguments | given)


FORWARD = {
    "x": ({"x": t(K)}, "x must have shape (M, in_features), got (12,)"),
    "weight_dim": (
        {"weight": t(N)},
        "weight must have shape (out_features, in_features), got (10,)",
    ),
    "weight": ({"weight": t(N, 11)}, "weight must have shape (10, 12), got (10, 11)"),
    "bias": ({"bias": t(9)}, "bias must have shape (10,), got (9,)"),
    "A_dim": ({"A": t(K)}, "A must have shape (in_features, rank), got (12,)"),
    "A": ({"A": t(11, R)}, "A must have shape (12, 3), got (11, 3)"),
    "rank": ({"A": t(K, 0), "B": t(0, N)}, "rank at least 1, got (12, 0)"),
    "B": ({"B": t(R, 9)}, "B must have shape (3, 10), got (3, 9)"),
    "B_dim": ({"B": t(N), "weight": None, "bias": None}, "B must have shape (rank, out_features)"),
    "weight_dtype": (
        {"weight": t(N, K, dtype=F64)},
        "weight must have x's dtype Float, got Double",
    ),
    "bias_dtype": ({"bias": t(N, dtype=F64)}, "bias must have x's dtype Float, got Double"),
    "A_dtype": ({"A": t(K, R, dtype=F64)}, "A must have x's dtype Float, got Double"),
    "B_dtype": ({"B": t(R, N, dtype=F64)}, "B must have x's dtype Float, got Double"),
    "dtype": (
        {n: t(*s, dtype=torch.int32) for n, s in {"x": (M, K), "weight": (N, K)}.items()}
        | {"bias": None, "A": t(K, R, dtype=torch.int32), "B": t(R, N, dtype=torch.int32)},
        "x must have dtype float32, float64, bfloat16 or float16, got Int",
    ),
    "bias_alone": ({"weight": None}, "bias must be None where weight is None"),
    "format": ({"format": "int3"}, "format must be plain, panels, nf4, fp4 or int8, got int3"),
    "codes_float64": (
        of_codes("nf4") | {n: t(*s, dtype=F64) for n, s in {"x": (M, K), "bias": (N,)}.items()},
        "x must have dtype float32, bfloat16 or float16 where the weight is of codes, got Double",
    ),
    "codes_scale": (
        of_codes("nf4") | {"weight_scale": None},
        "weight_scale must be a tensor where format is nf4, fp4 or int8, got None",
    ),
    "codes": (of_codes("fp4") | {"weight": bits(61, 1)}, "must have shape (60, 1), got (61, 1)"),
    "codes_dtype": (
        of_codes("nf4") | {"weight": t(60, 1)},
        "weight must have dtype Byte, got Float",
    ),
    "int8": (of_codes("int8") | {"weight": bits(N, K)}, "weight must have dtype Char, got Byte"),
    "int8_shape": (
        of_codes("int8") | {"weight": t(N, 11, dtype=torch.int8)},
        "weight must have shape (10, 12), got (10, 11)",
    ),
    "codes_rows": (
        of_codes("int8") | {"weight": t(N, 2 * K, dtype=torch.int8)[:, ::2]},
        "weight must be contiguous where it is of codes, got strides (24, 2)",
    ),
    "int8_scale": (
        of_codes("int8") | {"weight_scale": t(9)},
        "weight_scale must have shape (10,), got (9,)",
    ),
    "blocks": (
        of_codes("nf4") | {"weight_scale": t(5)},
        "weight_scale must have one value a block of a power of two of the 120 elements, from 32 "
        "on, got shape (5,)",
    ),
    "blocks_dim": (
        of_codes("nf4") | {"weight_scale": t(2, 1)},
        "weight_scale must have shape (blocks,), got (2, 1)",
    ),
    "scale_dtype": (
        of_codes("nf4") | {"weight_scale": t(2, dtype=F64)},
        "weight_scale must have dtype Float, got Double",
    ),
    "scale_rows": (
        of_codes("nf4") | {"weight_scale": t(4)[::2]},
        "weight_scale must be contiguous, got stride 2",
    ),
    "codes_freed": (
        of_codes("nf4") | {"weight": freed(bits(60, 1))},
        "weight's memory must hold the 60 bytes",
    ),
    "scale_freed": (
        of_codes("nf4") | {"weight_scale": freed(t(2))},
        "weight_scale's memory must hold the 8 bytes",
    ),
    "panels": ({"format": "panels"}, "weight must be the panels that pack_weight makes"),
    "keep": ({"keep": bits(M, 1)}, "keep must have shape (5, 2), got (5, 1)"),
    "keep_dtype": ({"keep": t(M, 2)}, "keep must have dtype Byte, got Float"),
    "keep_rows": ({"keep": bits(M, 4)[:, ::2]}, "keep must have rows without gaps, got stride 2"),
}
BACKWARD = {
    "dy": ({"dy": t(N)}, "dy must have shape (M, out_features), got (10,)"),
    "x": ({"x": t(M, 11)}, "x must have shape (5, 12), got (5, 11)"),
    "weight": ({"weight": t(9, K)}, "weight must have shape (10, 12), got (9, 12)"),
    "A": ({"A": t(K, 2)}, "B must have shape (2, 10), got (3, 10)"),
    "B": ({"B": t(R, 9)}, "B must have shape (3, 10), got (3, 9)"),
    "h": ({"h": t(M, 4)}, "h must have shape (5, 3), got (5, 4)"),
    "x_dtype": ({"x": t(M, K, dtype=F64)}, "x must have x's dtype Float, got Double"),
    "h_dtype": ({"h": t(M, R, dtype=F64)}, "h must have x's dtype Float, got Double"),
    "no_x": ({"x": None}, "x must be a tensor where dA is asked for, got None"),
    "no_A": ({"A": None}, "A must be a tensor where dx is asked for, got None"),
    "no_B": ({"B": None}, "B must be a tensor where dx is asked for, got None"),
    "no_h": ({"h": None}, "h must be a tensor where dB is asked for, got None"),
    "no_x_for_dweight": (
        {"x": None, "needs": (False, True, False, False, False)},
        "x must be a tensor where dweight is asked for, got None",
    ),
    "keep": ({"keep": bits(4, 2)}, "keep must have shape (5, 2), got (4, 2)"),
}


@pytest.mark.parametrize(("given", "message"), FORWARD.values(), ids=FORWARD)
def test_forward_names_what_does_not_fit(given, message):
    with pytest.raises(RuntimeError, match=re.escape(message)):
        forward(**given)


@pytest.mark.parametrize(("given", "message"), BACKWARD.values(), ids=BACKWARD)
def test_backward_names_what_does_not_fit(given, message):
    with pytest.raises(RuntimeError, match=re.escape(message)):
        backward(**given)


@pytest.mark.parametrize("name", ["weight", "bias", "A", "B", "keep", "dy_weight", "dy_h"])
def test_another_device_is_named(name, monkeypatch):
    """By the CPU's kernel itself: the dispatcher would hand a tensor on meta to the shape rule."""
    cpu = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
    for run in ("linear_fwd", "linear_bwd"):
        op = getattr(torch.ops.lora_ext, run).default
        to_kernel = SimpleNamespace(default=partial(op.redispatch, cpu))
        monkeypatch.setattr(torch.ops.lora_ext, run, to_kernel)
    call = backward if name.startswith("dy_") else forward
    name = name.removeprefix("dy_")
    whole = {"weight": t(N, K), "bias": t(N), "A": t(K, R), "B": t(R, N), "keep": bits(M, 2)}
    whole |= {"h": t(M, R)}
    with pytest.raises(RuntimeError, match=f"{name} must be on device cpu, got meta"):
        call(**{name: whole[name].to("meta")})


def test_what_the_needs_do_not_read_may_be_anything():
    needs = (False, False, True, False, False)
    gradients = backward(needs, x=None, weight=None, A=None, B=None, h=None, keep=bits(1, 1))
    assert torch.equal(gradients[2], t(N) * M)
    assert gradients[0] is gradients[1] is None


@pytest.mark.parametrize("name", ["x", "weight", "bias", "A", "B", "keep"])
@pytest.mark.parametrize("left", [0, 1])
def test_forward_reads_no_freed_memory(name, left):
    """As FSDP1 and offloaders free it. A byte too few is too few."""
    whole = {"x": t(M, K), "weight": t(N, K), "bias": t(N), "A": t(K, R), "B": t(R, N)}
    tensor = (whole | {"keep": bits(M, 2)})[name].clone()
    storage = tensor.untyped_storage()
    storage.resize_(0 if left == 0 else storage.nbytes() - 1)
    with pytest.raises(RuntimeError, match=f"{name}'s memory must hold the {tensor.nbytes} bytes"):
        forward(**{name: tensor})


@pytest.mark.parametrize("name", ["dy", "x", "weight", "A", "B", "h", "keep"])
def test_backward_reads_no_freed_memory(name):
    whole = {"dy": t(M, N), "x": t(M, K), "weight": t(N, K), "A": t(K, R), "B": t(R, N)}
    tensor = (whole | {"h": t(M, R), "keep": bits(M, 2)})[name].clone()
    tensor.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match=f"{name}'s memory must hold"):
        backward(**{name: tensor})


@pytest.mark.parametrize("name", ["A", "B"])
def test_a_factor_whose_layout_alone_is_read_may_be_freed(name):
    needs = (False, False, False, name == "A", name == "B")
    factor = {"A": t(K, R), "B": t(R, N)}[name]
    factor.untyped_storage().resize_(0)
    gradient = backward(needs, **{name: factor})[3 if name == "A" else 4]
    assert gradient.shape == factor.shape and (gradient != 0).all()


def test_memory_is_counted_from_the_tensors_place_in_it():
    """The end of a storage that is shared; a tensor of no elements reaches nothing."""
    shared = torch.ones(2, M, K)
    want = forward(x=t(M, K))[0]
    assert torch.equal(forward(x=shared[1])[0], want)
    assert torch.equal(forward(x=t(1, K).expand(M, K))[0], want)
    first, second = shared
    shared.untyped_storage().resize_(shared.nbytes - 4)
    assert torch.equal(forward(x=first)[0], want)
    with pytest.raises(RuntimeError, match="x's memory must hold the 480 bytes"):
        forward(x=second)
    empty = t(0, K)
    empty.untyped_storage().resize_(0)
    assert forward(x=empty)[0].shape == (0, N)


def test_out_of_memory_keeps_torchs_words():
    rows = t(1, 1).expand(2**50, 1)
    with pytest.raises(RuntimeError) as ours:
        forward(x=rows, weight=t(N, 1), A=t(1, R))
    if torch.__version__ >= "2.13":  # older headers can't ask for the text
        assert "can't allocate memory" in str(ours.value)


def test_pack_weight_names_what_does_not_fit():
    for weight in (t(N), t(N, K, 1)):
        with pytest.raises(RuntimeError, match=r"weight must have shape \(out_features, in_feat"):
            cpp.pack_weight(weight, transposed=True)
    freed = t(N, K)
    freed.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="weight's memory must hold"):
        cpp.pack_weight(freed, transposed=True)


@pytest.mark.parametrize("over", [1, 2, 40])
def test_gradients_lie_in_memory_as_the_adapters(over):
    """A transposed A or B, as PEFT has them, gets a gradient that autograd need not copy."""
    for rows in (2, M, over * M):
        for A in (t(K, R), t(R, K).T):
            for B in (t(R, N), t(N, R).T):
                given = {"dy": t(rows, N), "x": t(rows, K), "h": t(rows, R), "A": A, "B": B}
                *_, dA, dB = backward(**given)
                assert dA.stride() == A.stride() and dB.stride() == B.stride()
                assert torch.equal(dA, ops.empty_like_factor(A).fill_(rows * N))
                assert torch.equal(dB, ops.empty_like_factor(B).fill_(rows))
