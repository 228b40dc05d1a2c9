"""Every message of lora_linear and the layers: the argument, what was expected, what came."""

import pytest
import torch
from torch import nn

from lora_ext import LinearWithLoRA, LoRALayer, lora_linear

t = torch.zeros
GOOD = {"x": t(5, 12), "weight": t(10, 12), "bias": t(10), "A": t(12, 3), "B": t(3, 10)}
GOOD["alpha"] = 1.0
META = torch.zeros(3, 10, device="meta")
F64, BF16, I64 = torch.float64, torch.bfloat16, torch.int64

WRONG = [
    ({"x": None}, TypeError, "x must be a torch.Tensor, got NoneType"),
    ({"weight": [[1.0]]}, TypeError, "weight must be a torch.Tensor, got list"),
    ({"bias": 0.0}, TypeError, "bias must be a torch.Tensor, got float"),
    ({"A": None}, TypeError, "A must be a torch.Tensor, got NoneType"),
    ({"B": "B"}, TypeError, "B must be a torch.Tensor, got str"),
    ({"alpha": None}, TypeError, "alpha must be a number, got NoneType"),
    ({"alpha": t(1)}, TypeError, "alpha must be a number, got Tensor"),
    ({"weight": t(12)}, ValueError, r"weight must have shape \(out_features, in_features\), got"),
    ({"x": t(5, 11)}, ValueError, r"x must have shape \(\.\.\., 12\), got \(5, 11\)"),
    ({"x": t(())}, ValueError, r"x must have shape \(\.\.\., 12\), got \(\)"),
    ({"bias": t(9)}, ValueError, r"bias must have shape \(10,\), got \(9,\)"),
    ({"bias": t(1, 10)}, ValueError, r"bias must have shape \(10,\), got \(1, 10\)"),
    ({"A": t(3, 12)}, ValueError, r"A must have shape \(12, rank\), got \(3, 12\)"),
    ({"A": t(12)}, ValueError, r"A must have shape \(12, rank\), got \(12,\)"),
    ({"A": t(12, 0), "B": t(0, 10)}, ValueError, r"A must have shape \(12, rank\) with rank at"),
    ({"B": t(10, 3)}, ValueError, r"B must have shape \(3, 10\), got \(10, 3\)"),
    ({"B": t(4, 10)}, ValueError, r"B must have shape \(3, 10\), got \(4, 10\)"),
    ({"x": t(5, 12).to(I64)}, TypeError, "x must have a floating-point dtype, got torch.int64"),
    ({"x": t(5, 12).cfloat()}, TypeError, "x must have a floating-point dtype, got torch.complex"),
    ({"x": t(5, 12).to(BF16)}, TypeError, "weight must have x's dtype torch.bfloat16, got torch.f"),
    ({"weight": t(10, 12).to(F64)}, TypeError, "weight must have x's dtype torch.float32, got"),
    ({"bias": t(10).to(BF16)}, TypeError, "bias must have x's dtype torch.float32, got torch.bf"),
    ({"A": t(12, 3).to(BF16)}, TypeError, "A must have x's dtype torch.float32, got torch.bfloat"),
    ({"B": t(3, 10).to(F64)}, TypeError, "B must have x's dtype torch.float32, got torch.float64"),
    ({"weight": t(10, 12).to("meta")}, ValueError, "weight must be on x's device cpu, got meta"),
    ({"bias": t(10).to("meta")}, ValueError, "bias must be on x's device cpu, got meta"),
    ({"A": t(12, 3).to("meta")}, ValueError, "A must be on x's device cpu, got meta"),
    ({"B": META}, ValueError, "B must be on x's device cpu, got meta"),
    ({"backend": "cud"}, ValueError, "backend must be None or one of .*reference.*, got 'cud'"),
    ({"backend": ["cpp"]}, ValueError, r"backend must be None or one of .*, got \['cpp'\]"),
]


@pytest.mark.parametrize(("wrong", "error", "message"), WRONG, ids=[w[2][:40] for w in WRONG])
@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
def test_wrong_argument_is_named(wrong, error, message, grad):
    with torch.set_grad_enabled(grad), pytest.raises(error, match=message):
        lora_linear(**(GOOD | wrong))


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [w for w in WRONG if "dtype" not in w[2]],
    ids=[w[2][:40] for w in WRONG if "dtype" not in w[2]],
)
def test_wrong_argument_is_named_under_autocast(wrong, error, message):
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(error, match=message):
        lora_linear(**(GOOD | wrong))


def test_float32_adapters_go_over_halves_only():
    half = {n: GOOD[n].to(BF16) for n in ("x", "weight", "bias")}
    assert lora_linear(**(GOOD | half)).dtype == BF16
    with pytest.raises(TypeError, match="A must have x's dtype torch.bfloat16, got torch.float64"):
        lora_linear(**(GOOD | half | {"A": GOOD["A"].to(F64)}))


def test_meta_tensors_give_meta_results():
    """Shape inference: a model built under torch.device('meta') can be called."""
    meta = {n: v.to("meta") if isinstance(v, torch.Tensor) else v for n, v in GOOD.items()}
    y = lora_linear(**meta)
    assert y.is_meta and y.shape == (5, 10)
    with torch.autocast("cpu", dtype=BF16):
        assert lora_linear(**meta).shape == (5, 10)
    with pytest.raises(ValueError, match="backend 'cpp' can't run on these tensors: "):
        lora_linear(**meta, backend="cpp")


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (((12, 10, 0, 1.0), {}), ValueError, "rank must be at least 1, got 0"),
        (((12, 10, 1.5, 1.0), {}), TypeError, "rank must be an integer, got float"),
        (((12, 10, 2, "1"), {}), TypeError, "alpha must be a number, got str"),
        (((12, 10, 2, True), {}), TypeError, "alpha must be a number, got bool"),
        (((12, 10, 2, float("inf")), {}), ValueError, "alpha must be finite, got inf"),
        (((12, 10, 2, 1.0), {"scaling": 2}), ValueError, "scaling must be one of .*, got 2"),
    ],
    ids=str,
)
def test_wrong_hyperparameter_of_a_layer_is_named(arguments, error, message):
    with pytest.raises(error, match=message):
        LoRALayer(*arguments[0], **arguments[1])


@pytest.mark.parametrize(
    ("linear", "error", "message"),
    [
        (nn.ReLU(), TypeError, "linear must be an nn.Linear or .*, got ReLU"),
        (None, TypeError, "linear must be an nn.Linear or .*, got NoneType"),
        (nn.Conv1d(2, 2, 1), TypeError, "linear must be an nn.Linear or .*, got Conv1d"),
        (
            LinearWithLoRA(nn.Linear(2, 2), 1, 1.0),
            TypeError,
            "the layer to adapt, got a LinearWith",
        ),
        (nn.LazyLinear(2), ValueError, "linear must have its weight: call the LazyLinear"),
    ],
    ids=["relu", "none", "conv", "adapted", "lazy"],
)
def test_layer_over_no_linear_raises(linear, error, message):
    with pytest.raises(error, match=message):
        LinearWithLoRA(linear, 2, 1.0)


def test_unknown_backend_of_a_layer_raises():
    with pytest.raises(ValueError, match="backend must be None or one of .*, got 'gpu'"):
        LinearWithLoRA(nn.Linear(2, 2), 1, 1.0, backend="gpu")


def test_wrong_input_of_a_layer_is_named():
    layer = LinearWithLoRA(nn.Linear(12, 10), 3, 1.0)
    with pytest.raises(ValueError, match=r"x must have shape \(\.\.\., 12\), got \(5, 13\)"):
        layer(t(5, 13))
    with pytest.raises(TypeError, match="weight must have x's dtype torch.float64, got torch.fl"):
        layer(t(5, 12).double())
