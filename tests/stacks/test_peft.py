"""PEFT models on our operation: the same losses, gradients, files and switches as PEFT's own."""

import copy
import pickle

import pytest
import torch
from torch import nn

from lora_ext import functional
from tests.conftest import Backend
from tests.numerics import assert_same_up_to_rounding
from tests.training import MLP, batches, train

peft = pytest.importorskip("peft", reason="needs the package peft")
from peft.tuners.lora import Linear as PeftLinear  # noqa: E402

from lora_ext.integrations.peft import AcceleratedLinear, accelerate, restore  # noqa: E402

TARGETS = ["up", "down", "head"]
X = batches()[0][0]


def make(dtype=torch.float32, targets=TARGETS, **options):
    torch.manual_seed(4)
    config = {"r": 4, "lora_alpha": 8, "target_modules": targets, "init_lora_weights": False}
    model = peft.get_peft_model(MLP().to(dtype), peft.LoraConfig(**config | options))
    for name, parameter in model.named_parameters():
        if "lora_B" in name and not parameter.any():
            nn.init.normal_(parameter, std=0.2)
    return model


@pytest.fixture
def calls(monkeypatch):
    """Count the calls of our operation."""
    seen = []

    def counted(*arguments):
        seen.append(arguments)
        return functional.adapted(*arguments)

    monkeypatch.setattr("lora_ext.integrations.peft_forward.adapted", counted)
    return seen


def through(backend: Backend):
    return lambda *arguments: functional.adapted(*arguments[:6], backend.name, *arguments[7:])


@pytest.mark.parametrize("options", [{}, {"use_rslora": True, "lora_alpha": 3}], ids=str)
def test_training_equals_peft(backend: Backend, monkeypatch, options):
    monkeypatch.setattr("lora_ext.integrations.peft_forward.adapted", through(backend))
    models = [make(torch.float64, **options) for _ in range(2)]
    report = accelerate(models[0])
    assert len(report.accelerated) == 5 and not report.left
    ours, theirs = (train(model) for model in models)
    torch.testing.assert_close(ours.losses, theirs.losses)
    assert list(ours.state) == list(theirs.state) and len(ours.state) == 20
    for name, value in theirs.state.items():
        assert value.any()
        torch.testing.assert_close(ours.state[name], value)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("way", ["half_base", "autocast"])
def test_halves_stay_as_close_to_the_exact_as_peft(calls, half, way):
    """PEFT keeps its adapters in float32 over a half base, as we do."""
    exact, theirs = make().double(), make()
    if way == "half_base":
        base = {n: p for n, p in theirs.named_parameters() if "base_layer" in n}
        for parameter in base.values():
            parameter.data = parameter.data.to(half)
        exact.load_state_dict(theirs.state_dict())
    ours = copy.deepcopy(theirs)
    accelerate(ours)
    x = X.to(half) if way == "half_base" else X
    with torch.autocast("cpu", dtype=half, enabled=way == "autocast"):
        y, want = ours(x), theirs(x)
    assert len(calls) == 5 and y.dtype == want.dtype == half
    reference = exact(x.double())
    error, peft_error = ((t.double() - reference).norm() for t in (y, want))
    assert error <= 2 * peft_error + torch.finfo(half).eps * reference.norm()
    y.float().square().sum().backward()
    gradient = ours.base_model.model.head.lora_A["default"].weight.grad
    assert gradient.dtype == torch.float32 and gradient.any()


def test_restored_model_is_pefts_again(calls):
    model = make()
    classes = {n: type(m) for n, m in model.named_modules()}
    want, state = model(X), {k: v.clone() for k, v in model.state_dict().items()}
    accelerate(model)
    assert accelerate(model).accelerated, "a second call is no error"
    assert_same_up_to_rounding(model(X), want)
    assert len(calls) == 5 and list(model.state_dict()) == list(state)
    assert restore(model) == 5 and restore(model) == 0
    assert {n: type(m) for n, m in model.named_modules()} == classes
    assert torch.equal(model(X), want) and len(calls) == 5
    assert all(torch.equal(model.state_dict()[key], value) for key, value in state.items())


def test_saved_and_loaded_through_peft(tmp_path, calls):
    model = make()
    accelerate(model)
    want = model(X)
    model.save_pretrained(tmp_path)
    torch.manual_seed(4)
    other = peft.PeftModel.from_pretrained(MLP(), tmp_path)
    assert_same_up_to_rounding(other(X), want)
    accelerate(other)
    assert torch.equal(other(X), want) and len(calls) == 10


def test_adapters_are_switched_merged_and_disabled(calls):
    """Each step next to a PEFT model that is led through the same."""
    ours, theirs = make(), make()
    accelerate(ours)
    models = (ours, theirs)

    def agree(ours_run):
        calls.clear()
        torch.testing.assert_close(ours(X), theirs(X), atol=1e-5, rtol=1e-5)
        assert len(calls) == (5 if ours_run else 0)
        return ours(X)

    first = agree(True)
    for model in models:
        torch.manual_seed(9)
        config = {"r": 2, "lora_alpha": 6, "target_modules": TARGETS, "init_lora_weights": False}
        model.add_adapter("second", peft.LoraConfig(**config))
        model.set_adapter("second")
    second = agree(True)
    assert not torch.allclose(first, second)
    for model in models:
        model.base_model.set_adapter(["default", "second"])
    assert not torch.allclose(agree(True), second)
    with ours.disable_adapter(), theirs.disable_adapter():
        plain = agree(False)
    for model in models:
        model.set_adapter("default")
    assert torch.equal(agree(True), first) and not torch.allclose(first, plain)
    for model in models:
        model.merge_adapter()
    torch.testing.assert_close(agree(False), first, atol=1e-4, rtol=1e-4)
    for model in models:
        model.unmerge_adapter()
    agree(True)
    for model in models:
        model.base_model.model.head.set_scale("default", 3.0)
    assert not torch.allclose(agree(True), first)
    names = ["default", "second"] * 4
    for model in models:
        model.eval()
    calls.clear()
    mixed = [model(X, adapter_names=names) for model in models]
    assert torch.equal(*mixed) and not calls
    unloaded = [model.merge_and_unload() for model in models]
    assert type(unloaded[0].head) is nn.Linear
    assert torch.equal(unloaded[0](X), unloaded[1](X))


def test_what_it_cannot_take_is_left_with_its_reason(calls):
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.plain, self.conv = nn.Linear(16, 16), nn.Conv1d(1, 1, 1)
            self.hooked, self.embed = nn.Linear(16, 16), nn.Embedding(16, 16)
            self.hooked.register_forward_hook(lambda module, args, y: y * 2)

        def forward(self, x):
            return self.hooked(self.plain(x)) + self.embed(x[..., 0].long().clamp(0, 15))

    torch.manual_seed(2)
    config = peft.LoraConfig(
        r=2, target_modules=["plain", "conv", "hooked", "embed"], init_lora_weights=False
    )
    model = peft.get_peft_model(Mixed(), config)
    want = model(X)
    report = accelerate(model)
    prefix = "base_model.model."
    assert report.accelerated == [f"{prefix}plain", f"{prefix}hooked"]
    assert report.left == {
        f"{prefix}conv": "is a Conv1d, not a linear of PEFT's LoRA",
        f"{prefix}embed": "is a Embedding, not a linear of PEFT's LoRA",
    }
    assert report.adapters["default"] == {
        f"{prefix}plain": "one operation",
        f"{prefix}hooked": "its base is called: it has hooks",
    }
    assert str(report).startswith("accelerated 2, left 2\nleft 1: is a Conv1d")
    assert_same_up_to_rounding(model(X), want)
    assert len(calls) == 1


def test_other_variants_keep_pefts_path(calls):
    model = make(targets=["up", "down"], init_lora_weights="mica")
    want = model(X)
    report = accelerate(model)
    assert not report.accelerated
    assert set(report.left.values()) == {"adapter 'default' is a MiCALinearVariant"}
    assert torch.equal(model(X), want) and not calls


def test_another_tuner_is_left(calls):
    model = peft.get_peft_model(MLP(), peft.LoHaConfig(r=2, target_modules=["up"]))
    report = accelerate(model)
    assert len(report.left) == 2 and not report.accelerated
    assert "of peft.tuners.loha" in next(iter(report.left.values()))


def test_hook_added_later_is_run(calls):
    model = make()
    accelerate(model)
    seen = []
    model.base_model.model.head.lora_A["default"].register_forward_hook(
        lambda module, args, y: seen.append(y)
    )
    model(X)
    assert len(seen) == 1 and len(calls) == 4


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copy_is_accelerated_and_its_own(copied, calls):
    model = make()
    accelerate(model)
    twin = copied(model)
    assert torch.equal(twin(X), model(X)) and len(calls) == 10
    assert restore(twin) == 5 and isinstance(model.base_model.model.head, AcceleratedLinear)
    assert type(twin.base_model.model.head) is PeftLinear


def test_accelerated_model_compiles_in_one_graph():
    model = make()
    accelerate(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(X), model(X))
    torch._dynamo.reset()


def test_errors_name_the_argument():
    for function in (accelerate, restore):
        with pytest.raises(TypeError, match="model must be an nn.Module, got str"):
            function("model")
        with pytest.raises(ValueError, match="model must have PEFT layers: .*get_peft_model"):
            function(MLP())
    model = make()
    accelerate(model)
    head = model.base_model.model.head
    head.__class__ = type("FSDPLinear", (type(head),), {})
    with pytest.raises(ValueError, match="head must be as accelerate left it .* got a FSDPLinear"):
        restore(model)
    assert isinstance(model.base_model.model.blocks[0].up, AcceleratedLinear)
