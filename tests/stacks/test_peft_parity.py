"""PEFT's features and quantised bases by the error rule: what `python -m lora_ext.testing` runs."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

peft = pytest.importorskip("peft", reason="needs the package peft")

from lora_ext.integrations.peft import accelerate, restore  # noqa: E402
from lora_ext.testing.bases import BASES, NEEDS  # noqa: E402
from lora_ext.testing.parity import (  # noqa: E402
    Parity,
    check_parity,
    every_parity,
    make_models,
    sizes_of,
    why_skipped,
)
from tests.numerics import assert_same_up_to_rounding  # noqa: E402


def x_of(case):
    return torch.randn(3, 5, sizes_of(case)[0], generator=torch.Generator().manual_seed(7))


X = x_of(Parity("LoRA"))


def models(*case):
    if why := why_skipped(Parity(*case)):
        pytest.skip(why)
    return make_models(Parity(*case))


@pytest.mark.parametrize("case", list(every_parity()), ids=str)
def test_ours_is_as_close_to_float64_as_pefts_own(case):
    if why := why_skipped(case):
        pytest.skip(why)
    check_parity(case)


def test_a_wrong_scale_fails_the_check(monkeypatch):
    from lora_ext.integrations import peft_forward

    right = peft_forward.adapted
    monkeypatch.setattr(
        peft_forward,
        "adapted",
        lambda x, w, b, A, B, s, *more: right(x, w, b, A, B, 1.01 * s, *more),
    )
    with pytest.raises(AssertionError, match="y: max error"):
        check_parity(Parity("LoRA"))


@pytest.mark.parametrize("base", BASES)
def test_over_a_quantised_base_20_steps_are_pefts(base):
    """Dropout 0.05 from one seed; PEFT over the same base, but over FP8, which no CPU runs."""
    case = Parity("LoRA", base, dropout=0.05)
    if why := why_skipped(case):
        pytest.skip(why)
    ours, plain = make_models(case)
    X = x_of(case)
    theirs = plain if NEEDS[base] == "transformers" else make_models(case)[0]
    accelerate(ours)
    losses = []
    for layer in (ours, theirs):
        torch.manual_seed(11)
        trained = [p for p in layer.parameters() if p.requires_grad]
        assert len(trained) == 2
        optimizer = torch.optim.SGD(trained, lr=0.05, momentum=0.9)
        losses.append([])
        for _ in range(20):
            optimizer.zero_grad()
            loss = (layer(X) - 1).square().mean()
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    assert losses[1][-1] < 0.95 * losses[1][0]
    torch.testing.assert_close(*map(torch.tensor, losses), rtol=2e-5, atol=0)


@pytest.mark.parametrize("base", BASES)
def test_over_a_quantised_base_checkpointing_and_copies_change_nothing(base, tmp_path):
    ours, _ = models("LoRA", base)
    X = x_of(Parity("LoRA", base))
    accelerate(ours)
    x = X.clone().requires_grad_()
    want = torch.autograd.grad(ours(x).square().sum(), x)[0]
    again = torch.autograd.grad(checkpoint(ours, x, use_reentrant=False).square().sum(), x)[0]
    assert torch.equal(want, again)
    state = {n: p.clone() for n, p in ours.state_dict().items() if "lora_" in n}
    torch.save(state, tmp_path / "adapter.pt")
    other, _ = models("LoRA", base)
    accelerate(other)
    for name, parameter in other.named_parameters():
        if "lora_" in name:
            parameter.data.zero_()
    other.load_state_dict(torch.load(tmp_path / "adapter.pt"), strict=False)
    assert torch.equal(other(X), ours(X))
    assert_same_up_to_rounding(other.to("cpu")(X), ours(X))


@pytest.mark.parametrize("amp", [False, True], ids=["plain", "autocast"])
@pytest.mark.parametrize("base", [b for b in BASES if NEEDS[b] != "transformers"])
def test_y_has_the_dtype_that_pefts_layer_gives(base, amp):
    ours, _ = models("LoRA", base)
    X = x_of(Parity("LoRA", base))
    with torch.autocast("cpu", torch.bfloat16, enabled=amp):
        want = ours(X)
        accelerate(ours)
        assert ours(X).dtype == want.dtype


@pytest.mark.parametrize("base", ["torchao float8", "torchao int4", "transformers FineGrainedFP8"])
def test_a_called_base_needs_no_second_output(base):
    """Between the base's output and ours no memory of (M, N) is taken, nor a copy of x."""
    ours, _ = models("LoRA", base)
    K, N = sizes_of(Parity("LoRA", base))
    accelerate(ours)
    x = torch.randn(4096, K)
    from lora_ext import called

    made, call = [], called.call_base

    def counted(module, x):
        y = call(module, x)
        made.append(torch.profiler.profile(profile_memory=True).__enter__())
        return y

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lora_ext.integrations.peft_forward.call_base", counted)
        ours(x)
    made[0].__exit__(None, None, None)
    taken = [event.self_cpu_memory_usage for event in made[0].events()]
    assert taken and max(taken) < 4096 * N * 4 / 2


@pytest.mark.parametrize(
    "base", ["nn.Linear", "torchao int8", *(b for b in BASES if "bitsandbytes" in b)]
)
def test_a_base_that_is_read_takes_memory_for_y_alone(base):
    """Of all allocations of a forward with dropout one is of half of (M, N) or more."""
    ours, _ = models("LoRA", base, torch.float32, 0.05)
    accelerate(ours)
    x = torch.randn(4096, 91)
    ours(x)  # what is computed once
    with torch.profiler.profile(profile_memory=True) as profile:
        ours(x)
    taken = [event.self_cpu_memory_usage for event in profile.events()]
    assert sum(size >= 4096 * 70 * 4 / 2 for size in taken) == 1


@pytest.mark.parametrize("feature", ["DoRA", "several adapters, lora_bias"])
def test_second_derivatives_are_pefts(feature):
    ours, theirs = models(feature, "nn.Linear", torch.float64, 0.3)
    accelerate(ours)
    found = []
    for layer in (ours, theirs):
        x = X.double().requires_grad_()
        torch.manual_seed(5)
        (dx,) = torch.autograd.grad(layer(x).sin().sum(), x, create_graph=True)
        dx.square().sum().backward()
        found.append([x.grad, *(p.grad for p in layer.parameters() if p.requires_grad)])
    for mine, other in zip(*found, strict=True):
        torch.testing.assert_close(mine, other)


@pytest.mark.parametrize("kind", [torch.Tensor, nn.Parameter])
@pytest.mark.parametrize("feature", ["LoRA", "several adapters", "DoRA"])
def test_scaling_may_be_a_tensor_with_a_gradient(kind, feature):
    ours, theirs = models(feature, "nn.Linear", torch.float64)
    accelerate(ours)
    found = []
    for layer in (ours, theirs):
        scale = torch.tensor(1.7, dtype=torch.float64)
        scale = nn.Parameter(scale) if kind is nn.Parameter else scale
        layer.scaling["default"] = scale
        y = layer(X.double())
        y.square().sum().backward()
        found.append((y.detach(), scale.grad))
    torch.testing.assert_close(found[0][0], found[1][0])
    assert (found[1][1] is None) == (kind is torch.Tensor)
    if kind is nn.Parameter:
        torch.testing.assert_close(found[0][1], found[1][1])


def model_of_two():
    torch.manual_seed(0)
    config = {"target_modules": ["0", "2"], "init_lora_weights": False}
    net = nn.Sequential(nn.Linear(91, 16), nn.ReLU(), nn.Linear(16, 70))
    model = peft.get_peft_model(net, peft.LoraConfig(r=3, **config))
    model.add_adapter("other", peft.LoraConfig(r=2, **config | {"target_modules": ["2"]}))
    model.add_adapter("mica", peft.LoraConfig(r=2, **config | {"init_lora_weights": "mica"}))
    return model


@pytest.mark.parametrize("active", [["default"], ["other"], ["default", "other", "mica"]])
def test_the_report_is_of_each_adapter_whichever_are_active(active):
    model = model_of_two()
    model.base_model.set_adapter(active)
    report = accelerate(model)
    first, second = (f"base_model.model.{i}" for i in (0, 2))
    mica = "PEFT's own forward: adapter 'mica' is a MiCALinearVariant"
    assert report.accelerated == [first, second] and not report.left
    assert report.adapters == {
        "default": {first: "one operation", second: "one operation"},
        "mica": {first: mica, second: mica},
        "other": {second: "one operation"},
    }
    assert str(report).splitlines()[1] == f"adapter 'default': 2: one operation ({first}, {second})"
    assert str(report).splitlines()[-1].startswith("adapter_names (several adapters in one batch)")
    twin = model_of_two()
    for names in (["default"], ["other"], ["default", "other"], ["default", "mica"]):
        for each in (model, twin):
            each.base_model.set_adapter(names)
        torch.testing.assert_close(model(X), twin(X))


def test_names_of_classes_stay_pefts():
    model, twin = model_of_two(), model_of_two()
    accelerate(model)
    assert repr(model) == repr(twin)
    names = [[type(m).__name__ for m in each.modules()] for each in (model, twin)]
    assert names[0] == names[1]
    status = [[one.module_type for one in each.get_layer_status()] for each in (model, twin)]
    assert status[0] == status[1]
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(copied(X), model(X)) and restore(copied) == 2
    assert restore(model) == 2
    assert [type(m) for m in model.modules()] == [type(m) for m in twin.modules()]


def test_modules_to_save_run_as_pefts():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(91, 16), nn.ReLU(), nn.Linear(16, 70))
    config = {"target_modules": ["0"], "modules_to_save": ["2"], "init_lora_weights": False}
    model = peft.get_peft_model(net, peft.LoraConfig(r=3, **config))
    model.base_model.model[2].modules_to_save["default"].weight.data.add_(0.1)
    want = model(X)
    assert len(accelerate(model).accelerated) == 1
    assert_same_up_to_rounding(model(X), want)


def test_hot_swapped_adapter_runs_as_pefts(tmp_path):
    from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap

    config = {"target_modules": ["0", "2"], "init_lora_weights": False}
    made = []
    for seed, rank in ((1, 3), (2, 5)):
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Linear(91, 16), nn.ReLU(), nn.Linear(16, 70))
        model = peft.get_peft_model(net, peft.LoraConfig(r=rank, **config))
        model.save_pretrained(tmp_path / str(rank))
        made.append(model)
    model, _ = made
    twin = copy.deepcopy(model)
    accelerate(model)
    for each in (model, twin):
        prepare_model_for_compiled_hotswap(each, target_rank=8)
    torch.testing.assert_close(model(X), twin(X))
    before = model(X)
    for each in (model, twin):
        hotswap_adapter(each, tmp_path / "5", "default")
    torch.testing.assert_close(model(X), twin(X))
    assert not torch.allclose(model(X), before)
