"""Dropout on the low-rank branch: forward and backward under one mask, which nobody keeps."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lora_ext import LinearWithLoRA, lora_linear, merge_, replace_linear_with_lora
from lora_ext.dropout import drop
from lora_ext.testing import NAMES, Case, make_inputs
from tests.conftest import Backend
from tests.numerics import assert_same_up_to_rounding
from tests.op.test_autograd import leaves, make_layer
from tests.stacks.test_compile import NEEDS_COMPILER
from tests.training import MLP, assert_trains_like_plain, batches, make_models, train

P = 0.3
CASE = Case((5,), 12, 10, 3)
DOUBLE = CASE.but(dtype=torch.float64)


def with_seed(function):
    """Run from the same random state each time."""

    def seeded(*arguments, **options):
        torch.manual_seed(42)
        return function(*arguments, **options)

    return seeded


def mask_of(case: Case) -> torch.Tensor:
    """Return what `with_seed` multiplies x by, found out through the public function."""
    K = case.K
    ones, eye = torch.ones(*case.lead, K, dtype=torch.float64), torch.eye(K, dtype=torch.float64)
    zero = torch.zeros(K, K, dtype=torch.float64)
    return with_seed(lora_linear)(ones, zero, None, eye, eye, 1.0, dropout=P)


def plain_with(mask, x, weight, bias, A, B, alpha):
    """Compute the equation, the mask given, scaled by 1 / (1 - p) as it comes."""
    low = (x * mask.to(x.dtype)) @ A.to(x.dtype) @ B.to(x.dtype)
    return nn.functional.linear(x, weight, bias) + alpha * low


def test_mask_is_scaled_and_seeded_by_the_default_generator():
    mask = mask_of(CASE.but(lead=(40,)))
    assert set(mask.unique().tolist()) == {0.0, 1 / (1 - P)}
    assert 0.2 < (mask == 0).double().mean() < 0.4
    assert torch.equal(mask, mask_of(CASE.but(lead=(40,))))
    x = torch.ones(40, 12, dtype=torch.float64)
    torch.manual_seed(42)
    two = [drop(x, P) for _ in range(2)]
    assert torch.equal(two[0], mask * (1 - P)) and not torch.equal(two[1], two[0])


@pytest.mark.parametrize("lead", [(5,), (2, 3), (), (0,)], ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "nobias"])
def test_forward_and_gradients_are_those_of_the_equation(lead, bias):
    case = DOUBLE.but(lead=lead, bias=bias)
    mask = mask_of(case)
    tensors = leaves(case)
    given = [t for t in tensors if t is not None]
    torch.manual_seed(42)
    y = lora_linear(*tensors, case.alpha, dropout=P)
    want = plain_with(mask, *tensors, case.alpha)
    torch.testing.assert_close(y, want)
    dy = make_inputs(case)["dy"]
    ours, theirs = (torch.autograd.grad(t, given, dy) for t in (y, want))
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other)


@pytest.mark.parametrize("needs", range(1, 32))
def test_any_subset_of_the_gradients(needs):
    mask = mask_of(DOUBLE)
    inputs = make_inputs(DOUBLE)
    tensors = [inputs[n].detach().requires_grad_(bool(needs >> i & 1)) for i, n in enumerate(NAMES)]
    asked = [t for t in tensors if t.requires_grad]
    torch.manual_seed(42)
    y = lora_linear(*tensors, DOUBLE.alpha, dropout=P)
    ours = torch.autograd.grad(y, asked, inputs["dy"])
    theirs = torch.autograd.grad(plain_with(mask, *tensors, DOUBLE.alpha), asked, inputs["dy"])
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other)


def test_gradcheck_passes():
    inputs = leaves(DOUBLE)
    run = with_seed(lambda *t: lora_linear(*t, DOUBLE.alpha, dropout=P))
    assert torch.autograd.gradcheck(run, inputs)
    assert torch.autograd.gradgradcheck(run, inputs)


def test_a_bit_an_element_is_kept_of_the_mask():
    tensors = leaves(CASE.but(lead=(64,)))
    inputs = {t.data_ptr() for t in tensors}
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        lora_linear(*tensors, CASE.alpha, dropout=P)
    own = sorted(t.nbytes for t in saved if t.data_ptr() not in inputs)
    assert own == [64 * 2, 64 * 3 * 4]  # the bits of 12 columns, and h


def make(p=P, dtype=torch.float64):
    layer = make_layer(CASE.but(dtype=dtype))
    layer.lora.dropout = p
    return layer


def test_layer_drops_in_training_alone():
    layer, x = make(), make_inputs(DOUBLE)["x"]
    plain = make(0.0)
    assert torch.equal(layer.eval()(x), plain(x))
    layer.train()
    assert not torch.equal(layer(x), layer(x))
    mask = mask_of(DOUBLE)
    lora = layer.lora
    want = plain_with(mask, x, layer.weight, layer.bias, lora.A, lora.B, lora.scale)
    torch.testing.assert_close(with_seed(layer)(x), want)
    assert "dropout=0.3" in repr(layer) and "dropout" not in repr(plain)


def test_probability_of_zero_is_todays_path():
    """The same bits, no random number drawn, the kernels called."""
    layer, x = make(0.0), make_inputs(DOUBLE)["x"]
    state = torch.get_rng_state()
    A, B = layer.lora.A, layer.lora.B
    want = lora_linear(x, layer.weight, layer.bias, A, B, layer.lora.scale)
    assert torch.equal(layer(x), want)
    assert torch.equal(torch.get_rng_state(), state)


def test_composed_base_drops_in_the_same_places():
    """Hooks on the linear: the layer calls it, and adds lora(x) with its own dropout."""
    fused, composed = make(), make()
    composed.linear.register_forward_hook(lambda module, args, y: y)
    x = make_inputs(DOUBLE)["x"]
    results = []
    for layer in (fused, composed):
        leaf = x.clone().requires_grad_()
        y = with_seed(layer)(leaf)
        y.square().sum().backward()
        results.append([y, leaf.grad, layer.lora.A.grad, layer.lora.B.grad, layer.weight.grad])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("composed", [False, True], ids=["fused", "composed"])
def test_checkpointing_recomputes_the_same_mask(use_reentrant, composed):
    results = []
    for checkpointed in (False, True):
        layer = make()
        if composed:
            layer.linear.register_forward_hook(lambda module, args, y: y)
        x = make_inputs(DOUBLE)["x"].requires_grad_()
        torch.manual_seed(42)
        y = checkpoint(layer, x, use_reentrant=use_reentrant) if checkpointed else layer(x)
        torch.rand(7)  # other draws between forward and backward
        y.square().sum().backward()
        results.append([y.detach(), x.grad, layer.lora.A.grad, layer.lora.B.grad])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@NEEDS_COMPILER
@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compiled_layer_agrees_with_its_own_mask(compiler):
    """The compiler draws its own numbers, so the mask is read off the result: x dropped is x or 0.

    With weight 0, A = B = 1 and alpha = 1 - p, y is keep * x and dx is keep * dy.
    """
    torch._dynamo.reset()
    layer = LinearWithLoRA(nn.Linear(12, 12, bias=False), 12, 1 - P, dropout=P)
    with torch.no_grad():
        layer.weight.zero_()
        layer.lora.A.copy_(torch.eye(12))
        layer.lora.B.copy_(torch.eye(12))
    layer.linear.requires_grad_(False)
    compiled = torch.compile(layer, fullgraph=True, backend=compiler)
    masks = []
    for _ in range(2):
        x = torch.rand(40, 12).add_(1).requires_grad_()
        y = compiled(x)
        dy = torch.rand_like(y).add_(1)
        y.backward(dy)
        keep = y != 0
        assert 0.2 < 1 - keep.double().mean() < 0.4
        torch.testing.assert_close(y, x * keep)
        torch.testing.assert_close(x.grad, dy * keep)
        torch.testing.assert_close(layer.lora.A.grad, (x * keep).T @ dy)
        layer.zero_grad()
        masks.append(keep)
    assert not torch.equal(*masks)
    torch._dynamo.reset()


@pytest.mark.parametrize("half", [None, torch.bfloat16], ids=["fp32", "autocast"])
def test_model_with_dropout_trains_like_the_plain_layer_under_the_same_masks(half):
    """The plain model's LoRA input goes through nn.Module hooks that apply our mask."""

    def step(model, x, target):
        torch.manual_seed(int(x.sum() * 1e4) % 10007)
        logits = model(x.to(next(model.parameters()).dtype)).flatten(0, -2)
        wide = torch.promote_types(logits.dtype, torch.float32)
        loss = nn.functional.cross_entropy(logits.to(wide), target.flatten())
        loss.backward()
        return loss.detach()

    def amp_step(model, x, target):
        with torch.autocast("cpu", dtype=half, enabled=half is not None):
            return step(model, x, target)

    models = make_models()
    for module in models["ours"].modules():
        if isinstance(module, LinearWithLoRA):
            module.lora.dropout = 0.1
    for name in ("plain", "exact"):
        for key, module in models[name].named_modules():
            if key.endswith("lora"):
                module.register_forward_pre_hook(lambda m, args: drop(args[0], 0.1) / 0.9)
    results = {"exact": train(models["exact"], step)}
    results |= {name: train(models[name], amp_step) for name in ("ours", "plain")}
    assert_trains_like_plain(**results, dtype=half or torch.float32)


def test_replace_and_merge_and_copies_keep_it():
    model = MLP()
    replace_linear_with_lora(model, 4, 2.0, dropout=0.25)
    adapted = [m for m in model.modules() if isinstance(m, LinearWithLoRA)]
    assert len(adapted) == 5 and all(m.lora.dropout == 0.25 for m in adapted)
    nn.init.normal_(adapted[0].lora.B)
    assert copy.deepcopy(model).head.lora.dropout == 0.25
    x = batches()[0][0]
    assert not torch.equal(model(x), model(x))
    want = model.eval()(x)
    merge_(model.train())
    torch.testing.assert_close(model(x), want)


def test_vmap_needs_its_randomness_said():
    layer, x = make(), make_inputs(DOUBLE.but(lead=(2, 3)))["x"]
    with pytest.raises(RuntimeError, match="randomness"):
        torch.func.vmap(layer)(x)
    y = torch.func.vmap(layer, randomness="different")(x)
    assert y.shape == (2, 3, 10) and not torch.allclose(y, make(0.0)(x))


@pytest.mark.parametrize(
    ("p", "error", "message"),
    [
        (1.1, ValueError, "dropout must be from 0 to 1, got 1.1"),
        (-0.1, ValueError, "dropout must be from 0 to 1, got -0.1"),
        (float("nan"), ValueError, "dropout must be from 0 to 1, got nan"),
        ("0.1", TypeError, "dropout must be a number, got str"),
        (True, TypeError, "dropout must be a number, got bool"),
    ],
    ids=str,
)
def test_wrong_dropout_is_named(p, error, message):
    with pytest.raises(error, match=message):
        lora_linear(*leaves(CASE), 1.0, dropout=p)
    with pytest.raises(error, match=message):
        LinearWithLoRA(nn.Linear(2, 2), 1, 1.0, dropout=p)
    model = MLP()
    with pytest.raises(error, match=message):
        replace_linear_with_lora(model, 2, 1.0, dropout=p)
    assert type(model.head) is nn.Linear


def test_the_low_rank_part_is_zero_where_all_is_dropped():
    tensors = leaves(CASE)
    y = lora_linear(*tensors, CASE.alpha, dropout=1.0)
    x, weight, bias, A, B = tensors
    assert torch.equal(y, lora_linear(x, weight, bias, A, torch.zeros_like(B), CASE.alpha))
    assert_same_up_to_rounding(y, nn.functional.linear(*tensors[:3]))
    y.sum().backward()
    assert not tensors[3].grad.any() and not tensors[4].grad.any()


def test_every_backend_takes_the_same_mask(backend: Backend):
    """The mask is drawn before the backend is asked, so a name changes no number drawn."""
    named = with_seed(lambda: lora_linear(*leaves(CASE), 1.0, backend=backend.name, dropout=P))()
    chosen = with_seed(lambda: lora_linear(*leaves(CASE), 1.0, dropout=P))()
    assert_same_up_to_rounding(named, chosen)


def test_a_nested_tensor_is_refused():
    nested = torch.nested.nested_tensor([torch.ones(2, 12), torch.ones(3, 12)])
    with pytest.raises(ValueError, match="x must be a plain tensor where dropout is on, got a nes"):
        make(dtype=torch.float32)(nested)
