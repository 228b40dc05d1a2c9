"""torchao's int4 weights on a CPU: read as PyTorch packs them, with the gradient that it lacks."""

import copy
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lora_ext import LinearWithLoRA, explain, int4
from lora_ext.testing import compare

SHAPES = [(16, 32, 32), (48, 96, 32), (64, 128, 64), (80, 128, 128), (144, 192, 64)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def packed(N, K, group, dtype, seed=0):
    """Return codes (N, K), and as PyTorch's product takes them: (N, K / 2), (K / group, N, 2)."""
    g = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 16, (N, K), generator=g, dtype=torch.int32)
    groups = (torch.randn(K // group, N, 2, generator=g) / 16).to(dtype)
    return codes, torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1), groups


def check_decoded(N, K, group, dtype):
    """Hold the decoded weight to its formula, and to what PyTorch's product gives for unit rows."""
    codes, data, groups = packed(N, K, group, dtype)
    found = int4.weight_of(None, (data, groups, None), torch.float32)
    scale, zero = (groups[..., i].float().T.repeat_interleave(group, 1) for i in (0, 1))
    assert torch.equal(found, (codes - 8) * scale + zero)
    product = torch.ops.aten._weight_int4pack_mm_for_cpu
    unit = product(torch.eye(K, dtype=dtype), data, group, groups).T
    assert torch.allclose(found.to(dtype), unit, rtol=torch.finfo(dtype).eps, atol=1e-7)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_codes_are_read_as_pytorchs_product_reads_them(shape, dtype):
    check_decoded(*shape, dtype)


@pytest.mark.slow
def test_codes_are_read_in_the_layout_of_another_instruction_set():
    script = "from tests.layers.test_int4 import *\nfor s in SHAPES: check_decoded(*s, DTYPES[0])"
    script += "\nprint(int4.rows_together())"
    run = [sys.executable, "-W", "ignore", "-c", script]
    environment = os.environ | {"ATEN_CPU_CAPABILITY": "avx2"}
    said = subprocess.run(run, env=environment, capture_output=True, text=True, check=True)
    assert int(said.stdout) <= 32


def quantised(N=80, K=96, dtype=torch.float32):
    prototype = pytest.importorskip(
        "torchao.prototype.quantization.int4", reason="needs torchao's int4 product for CPUs"
    )
    from torchao.quantization import quantize_

    torch.manual_seed(3)
    linear = nn.Linear(K, N).to(dtype)
    config = prototype.PrototypeInt4WeightOnlyConfig(group_size=32, set_inductor_config=False)
    quantize_(linear, config)
    return linear.requires_grad_(False)


def layer_over(linear, dropout=0.0):
    layer = LinearWithLoRA(linear, 4, 2.0, dropout=dropout)
    nn.init.normal_(layer.lora.B, std=0.2)
    return layer


def step(layer, x, dy):
    x = x.clone().requires_grad_()
    torch.manual_seed(6)
    y = layer(x)
    y.backward(dy.to(y.dtype))
    low = layer.lora
    found = {"y": y.detach(), "dx": x.grad, "dA": low.A.grad, "dB": low.B.grad}
    low.A.grad = low.B.grad = None
    return found


def plain_step(linear, lora, x, dy, dtype):
    """The same over the weight that the codes stand for, by autograd: upstream's has no dx."""
    weight = int4.weight_of(None, int4.parts_of(linear), torch.float32).to(dtype)
    x, A, B = (t.detach().to(dtype).requires_grad_() for t in (x, lora.A, lora.B))
    y = F.linear(x, weight, linear.bias.to(dtype)) + 2.0 * (x @ A @ B)
    y.backward(dy.to(dtype))
    return {"y": y.detach(), "dx": x.grad, "dA": A.grad, "dB": B.grad}


@pytest.mark.parametrize("amp", [False, True], ids=["plain", "autocast"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_step_is_as_close_to_float64_as_the_plain_layers(dtype, amp):
    linear = quantised(dtype=dtype)
    layer = layer_over(linear)
    reason = "linear has a weight that is a Int4OpaqueTensor, not a Parameter"
    x, dy = torch.randn(3, 5, 96).to(dtype), torch.randn(3, 5, 80).to(dtype)
    assert reason in explain(layer, x)
    with torch.autocast("cpu", torch.bfloat16, enabled=amp):
        found = step(layer, x, dy)
    plain = plain_step(linear, layer.lora, x, dy, torch.bfloat16 if amp else dtype)
    exact = plain_step(linear, layer.lora, x, dy, torch.float64)
    eps = torch.finfo(torch.bfloat16 if amp else dtype).eps
    for name, value in exact.items():
        floor = lambda norm, value=value: 4 * eps * norm(value)  # noqa: E731
        broken = [e for e in compare(name, found[name], plain[name], value, floor) if e.broken]
        assert not broken


def test_saved_copied_and_reloaded_it_is_the_same_layer(tmp_path):
    layer = layer_over(quantised(), dropout=0.3)
    x, dy = torch.randn(7, 96), torch.randn(7, 80)
    want = step(layer, x, dy)
    torch.save(layer.state_dict(), tmp_path / "layer.pt")
    loaded = layer_over(nn.Linear(96, 80), dropout=0.3)
    state = torch.load(tmp_path / "layer.pt", weights_only=True)
    loaded.load_state_dict(state, assign=True)
    for other in (copy.deepcopy(layer), loaded.requires_grad_()):
        found = step(other, x, dy)
        assert all(torch.equal(found[name], value) for name, value in want.items())


def test_a_factor_of_x_is_one_of_dx_too():
    linear = quantised()
    before = torch.rand(96) + 0.5
    linear.weight.act_pre_scale = before
    x, dy = torch.randn(7, 96), torch.randn(7, 80)
    layer = layer_over(linear)
    found = step(layer, x, dy)
    exact = plain_step(linear, layer.lora, x, dy, torch.float64)
    torch.testing.assert_close(found["y"], exact["y"].float())
    torch.testing.assert_close(found["dx"], exact["dx"].float())
    linear.weight.act_pre_scale = None
    assert not torch.allclose(step(layer, x, dy)["dx"], found["dx"], rtol=1e-2)


def test_a_weight_that_rounds_x_too_is_not_taken():
    linear = quantised()
    assert int4.is_int4(linear)
    linear.weight.act_mapping_type = "symmetric"
    assert not int4.is_int4(linear)
    assert not int4.is_int4(nn.Linear(96, 80))


def test_a_weight_that_changes_before_the_backward_is_noticed():
    linear = quantised()
    y = layer_over(linear)(torch.randn(7, 96, requires_grad=True))
    linear.weight.qdata.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
