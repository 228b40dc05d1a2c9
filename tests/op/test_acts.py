"""A gated MLP's activation, by the C++ kernels and by PyTorch: error rule and mutants."""

import pytest
import torch

from lora_ext import acts
from lora_ext.backends import BACKENDS, gated
from lora_ext.call import Call, LowRank, Weight
from tests.op.acts import DTYPES, LAYOUTS, PLAIN, broken_acts, operands, plain, refused_acts
from tests.op.test_mutants import changed

CPP = BACKENDS["cpp"]
one = torch.ones(1, 1)
WHY = CPP.unsupported(Call(one, Weight(one), None, LowRank(one, one, 1.0)))
MODULES = [
    pytest.param(CPP, id="cpp", marks=pytest.mark.skipif(WHY is not None, reason=str(WHY))),
    pytest.param(acts, id="pytorch"),
]


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("act", PLAIN)
@pytest.mark.parametrize("module", MODULES)
def test_activation_keeps_the_error_rule(module, act, dtype, layout, in_place):
    assert broken_acts(module, act, dtype, layout, in_place) == []


@pytest.mark.parametrize("act", PLAIN)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_special_values_are_pytorchs(act, dtype):
    """NaN stays, what is far from zero neither overflows nor becomes NaN."""
    gate = torch.tensor([[torch.nan, -1e4, -90.0, -20.0, 0.0, 20.0, 90.0, 1e4, 3.0]], dtype=dtype)
    up = torch.full_like(gate, 0.5)
    hidden, d_gate, d_up = CPP.gated(gate, up, act), torch.empty_like(gate), torch.empty_like(gate)
    CPP.gated_backward(up, gate, up, act, d_gate, d_up)
    want = plain(act, gate.double(), up.double(), up.double())
    most = torch.finfo(dtype).max
    for got, name in ((hidden, "hidden"), (d_gate, "d_gate"), (d_up, "d_up")):
        expected = want[name]
        assert got[0, 0].isnan() and not got[0, 1:].isnan().any()
        inside = expected.abs() < most
        # What is next to nothing, the oracle takes for zero.
        rtol, atol = 4 * torch.finfo(dtype).eps, torch.finfo(dtype).tiny * 16
        if dtype == torch.float64:  # the oracle's own roundings
            rtol, atol = 1e-13, 1e-80
        torch.testing.assert_close(got[inside].double(), expected[inside], rtol=rtol, atol=atol)


def test_threads_share_the_rows():
    gate, up, dy = operands((300, 130), torch.float32, "dense")
    assert torch.equal(CPP.gated(gate, up, "silu")[7:8], CPP.gated(gate[7:8], up[7:8], "silu"))


MUTANTS = {
    "up_forgotten_in_the_gates_gradient": ("d_hidden, up, out=d_gate", "d_hidden, 1, out=d_gate"),
    "activation_forgotten_in_ups_gradient": ("(ACTS[act].value(gate), d_hid", "(gate, d_hid"),
    "derivative_of_another_activation": ("_ATEN.silu_backward", "_ATEN.sigmoid_backward"),
    "derivative_of_another_gelu": ("da, g, approximate=approximate, g", "da, g, g"),
    "product_without_the_activation": ("ACTS[act].value(gate).mul_(up)", "gate * up"),
    "relu_not_squared": ("F.relu(g).square()", "F.relu(g)"),
    "derivative_halved": ("F.relu(g).mul_(2)", "F.relu(g)"),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTANTS)
def test_wrong_activation_is_refused(name):
    assert refused_acts(changed("acts.py", MUTANTS[name])) is not None


def test_right_activations_are_accepted():
    assert refused_acts(changed("acts.py")) is None
    assert refused_acts(CPP) is None


def test_operators_name_what_does_not_fit():
    a, ops = torch.ones(2, 3), torch.ops.lora_ext
    with pytest.raises(RuntimeError, match="act must be one of silu, .*, got tanh"):
        ops.gated_fwd(a, a, "tanh")
    with pytest.raises(RuntimeError, match=r"up must have shape \(2, 3\), got \(2, 2\)"):
        ops.gated_fwd(a, a[:, :2], "silu")
    with pytest.raises(RuntimeError, match="up must have dtype Float, got Double"):
        ops.gated_fwd(a, a.double(), "silu")
    with pytest.raises(RuntimeError, match=r"gate must have shape \(M, hidden\), got \(3,\)"):
        ops.gated_fwd(a[0], a, "silu")
    with pytest.raises(RuntimeError, match=r"d_up must have shape \(2, 3\), got \(3, 2\)"):
        ops.gated_bwd(a, a, a, "silu", a.clone(), a.T)
    with pytest.raises(RuntimeError, match="gate must have dtype float32"):
        ops.gated_fwd(a.int(), a.int(), "silu")


def test_operators_have_shape_rules():
    gate, up, dy = operands((7, 40), torch.float32, "dense")
    ops, tests = torch.ops.lora_ext, ("test_schema", "test_faketensor")
    torch.library.opcheck(ops.gated_fwd.default, (gate, up, "silu"), test_utils=tests)
    results = torch.empty_like(gate), torch.empty_like(gate)
    given = (dy, gate, up, "gelu", *results)
    torch.library.opcheck(ops.gated_bwd.default, given, test_utils=tests)


def test_a_backend_without_a_kernel_runs_pytorchs():
    gate, up, _ = operands((7, 40), torch.float32, "dense")
    assert not hasattr(BACKENDS["reference"], "gated")
    for name in ("reference", None):
        assert torch.equal(gated(name, gate, up, "silu"), acts.gated(gate, up, "silu"))
