"""group_: models as transformers builds them, trained grouped and not; what makes layers run alone.

Small random weights. PEFT's own training, under one seed, is the standard for its models.
"""

import copy
import gc
import pickle
import threading
import weakref

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lora_ext import (
    LinearWithLoRA,
    group_,
    mark_only_lora_as_trainable,
    merge_,
    replace_linear_with_lora,
    ungroup_,
    unmerge_,
)
from tests.numerics import assert_same_up_to_rounding

transformers = pytest.importorskip("transformers")

SIZES = {
    "vocab_size": 99,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED_QUERY = SIZES | {"num_key_value_heads": 2}
# name: (configuration, what it gets, model, gated MLPs, groups of siblings that run together)
MODELS = {
    "llama": ("LlamaConfig", GROUPED_QUERY, "LlamaForCausalLM", 2, 2),
    "qwen2": ("Qwen2Config", GROUPED_QUERY, "Qwen2ForCausalLM", 2, 2),
    "mistral": ("MistralConfig", GROUPED_QUERY, "MistralForCausalLM", 2, 2),
    "gemma": ("GemmaConfig", GROUPED_QUERY | {"head_dim": 12}, "GemmaForCausalLM", 2, 2),
    "phi3": ("Phi3Config", GROUPED_QUERY, "Phi3ForCausalLM", 2, 0),
    "bert": ("BertConfig", SIZES, "BertForMaskedLM", 0, 2),
    "gpt2": (
        "GPT2Config",
        {"vocab_size": 99, "n_embd": 48, "n_layer": 2, "n_head": 4, "n_positions": 64}
        | {"bos_token_id": 1, "eos_token_id": 2},
        "GPT2LMHeadModel",
        0,
        0,
    ),
}
BLOCKS = r".*(layers|layer|h)\.\d+\..*"


def build(name: str) -> nn.Module:
    config, sizes, model, *_ = MODELS[name]
    torch.manual_seed(0)
    return getattr(transformers, model)(getattr(transformers, config)(**sizes))


def adapted(name: str, dropout: float = 0.0, mask: str = "torch") -> nn.Module:
    model = build(name)
    drawn = {"dropout": dropout, "dropout_mask": mask}
    replace_linear_with_lora(model, 4, 2.0, target_modules=BLOCKS, **drawn)
    mark_only_lora_as_trainable(model)
    for layer in lora_layers(model):
        nn.init.normal_(layer.lora.B, std=0.1)
    return model


def lora_layers(model: nn.Module) -> list[LinearWithLoRA]:
    return [m for m in model.modules() if isinstance(m, LinearWithLoRA)]


def train(model: nn.Module, steps: int = 10) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the losses and the random state at the end."""
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=3e-3)
    torch.manual_seed(5)
    losses = []
    tokens = torch.randint(3, 99, (2, 17), generator=torch.Generator().manual_seed(0))
    for _ in range(steps):
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach().double())
    return torch.stack(losses), torch.get_rng_state()


def assert_same_training(got, want) -> None:
    (losses, state), (other_losses, other_state) = got, want
    assert losses[-1] < losses[0]
    # AdamW turns a rounding in a small gradient into a step: 1e-6 to 1e-5 after ten of them.
    torch.testing.assert_close(losses, other_losses, rtol=3e-5, atol=0)
    assert torch.equal(state, other_state)


def count_running(report) -> tuple[int, int]:
    states = [group.state() for group in report.mlps.values()]
    together = [group.state() for group in report.siblings.values()]
    return states.count("run as one operation"), sum("together" in state for state in together)


def slow_but(*fast: str):
    """Mark the models that others stand for in a quick run."""
    return [name if name in fast else pytest.param(name, marks=pytest.mark.slow) for name in MODELS]


@pytest.mark.parametrize("dropout", [0.05, pytest.param(0.0, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", slow_but("llama", "phi3", "bert"))
def test_grouped_model_trains_like_the_single_layers(name, dropout):
    if name == "gpt2":
        pytest.skip("has Conv1D, no nn.Linear")
    single, model = (adapted(name, dropout) for _ in range(2))
    report = group_(model)
    assert_same_training(train(model), train(single))
    assert count_running(report) == MODELS[name][3:], report
    assert "alone where" not in str(report) or name == "phi3"


@pytest.mark.parametrize("name", slow_but("llama", "bert"))
def test_peft_model_trains_like_peft(name):
    peft = pytest.importorskip("peft")
    from lora_ext.integrations.peft import accelerate, restore

    def wrapped():
        model = build(name)
        targets = [n for n, m in model.named_modules() if type(m) is nn.Linear and "." in n]
        targets = ["c_attn", "c_proj", "c_fc"] if name == "gpt2" else targets
        config = peft.LoraConfig(r=4, lora_alpha=8, lora_dropout=0.05, target_modules=targets)
        return peft.get_peft_model(model, config)

    plain, model = wrapped(), wrapped()
    report = accelerate(model, groups=True)
    assert_same_training(train(model), train(plain))
    if name == "gpt2":
        return  # Conv1D: single layers, if at all
    assert count_running(report.groups) == MODELS[name][3:], report
    assert list(model.state_dict()) == list(plain.state_dict())
    assert accelerate(model).groups is None and ungroup_(model) == 0
    accelerate(model, groups=True)
    tokens = torch.arange(3, 20)[None]
    model.eval()
    plain.eval()
    with model.disable_adapter(), plain.disable_adapter():
        assert torch.equal(model(tokens).logits, plain(tokens).logits)
    restore(model)
    assert [type(m) for m in model.modules()] == [type(m) for m in plain.modules()]


class Attention(nn.Module):
    """Three linears of one x, and what a test does between them."""

    def __init__(self, dropout: float = 0.0, between=lambda module, x: x):
        super().__init__()
        self.q, self.k, self.v = nn.Linear(24, 24), nn.Linear(24, 8), nn.Linear(24, 8)
        replace_linear_with_lora(self, 4, 2.0, dropout=dropout, dropout_mask="torch")
        for layer in lora_layers(self):
            nn.init.normal_(layer.lora.B)
        self.between = between

    def forward(self, x):
        q = self.q(x)
        x = self.between(self, x)
        return torch.cat([q, self.k(x), self.v(x)], -1)


def pair(dropout: float = 0.0, **kwargs) -> tuple[Attention, Attention]:
    """Return a grouped module and its like with single layers."""
    single = Attention(dropout, **kwargs)
    model = copy.deepcopy(single)
    return model, single


def outcome(model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    torch.manual_seed(1)
    x = x.detach().requires_grad_()
    y = model(x)
    model.zero_grad()
    y.square().sum().backward()
    grads = [p.grad for p in model.parameters() if p.requires_grad]
    return [y, x.grad, *grads, torch.get_rng_state()]


def assert_same_outcomes(model, single, x, times: int = 3) -> None:
    for _ in range(times):
        *got, state = outcome(model, x)
        *want, other = outcome(single, x)
        for one, another in zip(got, want, strict=True):
            assert_same_up_to_rounding(one, another)
        assert torch.equal(state, other)


def runs_together(model: nn.Module, x: torch.Tensor) -> bool:
    x = x.detach().requires_grad_()
    y, names, todo = model(x), set(), []
    todo.append(y.grad_fn)
    while todo:
        node = todo.pop()
        names.add(type(node).__name__)
        todo += [n for n, _ in node.next_functions if n is not None]
    return "_LoRALinearsBackward" in names


X = torch.randn(2, 5, 24, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_siblings_run_together_from_the_second_call_on(dropout):
    model, single = pair(dropout)
    report = group_(model)
    assert not runs_together(model, X)
    assert runs_together(model, X) and "run q+k+v together" in str(report)
    assert_same_outcomes(model, single, X)


def another_tensor(module, x):
    return x * 1


def draws(module, x):
    torch.rand(1)
    return x


@pytest.mark.parametrize("between", [another_tensor, draws])
def test_siblings_that_a_call_shows_to_differ_are_not_grouped(between):
    model, single = pair(0.3, between=between)
    report = group_(model)
    assert_same_outcomes(model, single, X)
    assert "run k+v together" in str(report)


@pytest.mark.parametrize("between", [another_tensor, draws])
def test_siblings_that_differ_later_fall_back_and_say_why(between):
    model, single = pair(0.0)
    report = group_(model)
    assert_same_outcomes(model, single, X)
    model.between = single.between = between
    if between is draws:  # the order of draws matters where there are masks
        for module in (model, single):
            for layer in lora_layers(module):
                layer.lora.dropout = 0.3
        outcome(model, X)  # its masks came too early: seen now, and from now on as single layers
    assert_same_outcomes(model, single, X)
    assert "run k+v together" in str(report)


def test_x_changed_in_place_between_siblings():
    model, single = pair()
    group_(model)
    outcome(model, X)
    assert runs_together(model, X)
    model.between = single.between = lambda module, x: x.mul_(2)
    x = X.repeat(99, 1, 1)
    with torch.no_grad():
        for _ in range(3):
            assert_same_up_to_rounding(model(x.clone()), single(x.clone()))


def test_a_sibling_that_is_not_called():
    model, single = pair()
    report = group_(model)
    assert_same_outcomes(model, single, X)
    single_forward = type(single).forward
    type(single).forward = lambda self, x: torch.cat([self.q(x), self.v(x)], -1)
    try:
        for module in (model, single):
            module.k.requires_grad_(False)
        assert_same_outcomes(model, single, X)
        assert "run q+v together" in str(report)
    finally:
        type(single).forward = single_forward


def test_nothing_is_held_after_a_call_and_after_an_error():
    model, _ = pair()
    group_(model)

    def fail(module, x):
        raise KeyError("between")

    model(X)
    for between in (lambda module, x: x, fail):
        model.between = between
        x = X.clone().requires_grad_()
        alive = weakref.ref(x)
        try:
            y = model(x)
            del y
        except KeyError:
            pass
        del x
        gc.collect()
        assert alive() is None
        assert model.__dict__["_lora_group"].scope is None
    model.between = lambda module, x: x
    assert runs_together(model, X)


def test_threads_do_not_share_results():
    model, single = pair()
    group_(model)
    model(X)
    barrier = threading.Barrier(2)
    inputs = [torch.randn(5, 24), torch.randn(5, 24)]
    results = {}
    model.between = lambda module, x: (barrier.wait(), x)[1]

    def work(i):
        for _ in range(5):
            results.setdefault(i, []).append(model(inputs[i]))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, ys in results.items():
        for y in ys:
            assert_same_up_to_rounding(y, single(inputs[i]))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_checkpointing(reentrant, dropout):
    model, single = pair(dropout)
    group_(model)

    class Checkpointed(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return checkpoint(self.inner, x, use_reentrant=reentrant)

    assert_same_outcomes(Checkpointed(model), Checkpointed(single), X)
    assert runs_together(model, X)


@pytest.mark.parametrize("miss", [False, True])
def test_calls_in_flight_are_computed_again_as_they_were(miss):
    model, _ = pair()
    report = group_(model)

    def losses(count):
        return [checkpoint(model, X, use_reentrant=False).sum() for _ in range(count)]

    if miss:
        losses(1)[0].backward()
        losses(1)[0].backward()
        assert "run q+k+v together" in str(report)
        model.between = another_tensor
    for loss in losses(3):  # the plan may not change before the last one's backward
        loss.backward()
    losses(1)[0].backward()
    assert f"run {'k+v' if miss else 'q+k+v'} together" in str(report) or miss


def test_autocast_and_grad_modes():
    model, single = pair()
    report = group_(model)
    assert_same_outcomes(model, single, X)
    with torch.no_grad():
        assert_same_up_to_rounding(model(X.repeat(99, 1, 1)), single(X.repeat(99, 1, 1)))
    with torch.inference_mode():
        assert_same_up_to_rounding(model(X), single(X))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model(X).dtype == torch.bfloat16
        assert runs_together(model, X)
    assert "run q+k+v together" in str(report)
    model.between = lambda module, x: (torch.set_grad_enabled(False), x)[1]
    with torch.enable_grad():
        y = model(X.clone().requires_grad_())
        torch.set_grad_enabled(True)
    assert_same_up_to_rounding(y, single(X))


def test_state_copies_pickles_and_merging_are_as_before():
    model, single = pair(0.1)
    keys, modules = list(single.state_dict()), [n for n, _ in single.named_modules()]
    group_(model)
    model(X)
    assert list(model.state_dict()) == keys
    assert [n for n, _ in model.named_modules()] == modules
    assert type(model).__name__ == "Attention" and isinstance(model.q, LinearWithLoRA)
    model.between = single.between = another_tensor  # a lambda can't be pickled
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), copy.deepcopy(model.q)):
        assert all("_lora_group" not in m.__dict__ for m in other.modules())
        assert type(other) in (Attention, LinearWithLoRA)
        assert torch.equal(
            other.eval()(X), (model if type(other) is Attention else model.q).eval()(X)
        )
        model.train()
    merge_(model)
    merge_(single)
    assert_same_up_to_rounding(model(X), single(X))
    unmerge_(model)
    unmerge_(single)
    model.between = single.between = lambda module, x: x
    assert_same_outcomes(model, single, X)
    assert ungroup_(model) == 4 and type(model) is Attention and type(model.q) is LinearWithLoRA
    assert ungroup_(model) == 0


def test_hooks_on_a_sibling_run_and_make_all_run_alone():
    model, single = pair()
    report = group_(model)
    calls = []
    handle = model.k.register_forward_hook(lambda *_: calls.append(1))
    assert_same_outcomes(model, single, X)
    assert len(calls) == 3 and "a layer has hooks" in str(report)
    handle.remove()
    assert runs_together(model, X)


class MLP(nn.Module):
    """A gated MLP whose formula a test may change."""

    def __init__(self, formula=None, act=nn.functional.silu):
        super().__init__()
        self.first, self.second = nn.Linear(24, 40), nn.Linear(24, 40)  # names that say nothing
        self.third = nn.Linear(40, 24)
        self.act, self.formula = act, formula
        replace_linear_with_lora(self, 4, 2.0, dropout=0.2, dropout_mask="torch")
        for layer in lora_layers(self):
            nn.init.normal_(layer.lora.B)

    def forward(self, x):
        if self.formula is not None:
            return self.formula(self, x)
        return self.third(self.act(self.first(x)) * self.second(x))


FORMULAS = {
    "clamp": lambda m, x: m.third(m.act(m.first(x).clamp(max=7)) * m.second(x)),
    "other_activation": lambda m, x: m.third(m.first(x).tanh() * m.second(x)),
    "scaled": lambda m, x: m.third(m.act(m.first(x)) * m.second(x)) * 1.01,
    "up_before_gate": lambda m, x: m.third(m.second(x) * m.act(m.first(x))),
    "residual": lambda m, x: x + m.third(m.act(m.first(x)) * m.second(x)),
    "dropout": lambda m, x: nn.functional.dropout(
        m.third(m.act(m.first(x)) * m.second(x)), 0.1, m.training
    ),
    "a_tuple": lambda m, x: (m.third(m.act(m.first(x)) * m.second(x)),),
    "fails": lambda m, x: m.missing(x),
}


@pytest.mark.parametrize("name", FORMULAS)
def test_a_module_that_is_no_gated_mlp_is_left(name):
    model = MLP(FORMULAS[name])
    state = torch.get_rng_state()
    report = group_(model)
    assert not report.mlps
    assert torch.equal(torch.get_rng_state(), state)
    assert all(m.training for m in model.modules())


@pytest.mark.parametrize("recompute", ["act", "all"])
@pytest.mark.parametrize(
    ("act", "name"),
    [
        (nn.functional.silu, "silu"),
        (nn.functional.gelu, "gelu"),
        (nn.GELU("tanh"), "gelu_tanh"),
        (lambda g: nn.functional.relu(g) ** 2, "relu2"),
    ],
)
def test_a_gated_mlp_is_found_by_what_it_computes(act, name, recompute):
    single = MLP(act=act)
    model = copy.deepcopy(single)
    report = group_(model, recompute=recompute)
    (mlp,) = report.mlps.values()
    assert (mlp.first, mlp.down, mlp.act) == (("first", "second"), "third", name)
    x = X.clone().requires_grad_()
    assert "GatedMLP" in type(model(x).grad_fn).__name__
    assert_same_outcomes(model, single, X)
    model.third = copy.deepcopy(single.third)
    assert_same_outcomes(model, single, X)
    assert "others than those that were probed" in str(report)


def test_arguments_are_checked():
    with pytest.raises(TypeError, match="model must be an nn.Module, got int"):
        group_(3)
    with pytest.raises(ValueError, match="model must have LinearWithLoRA layers"):
        group_(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="recompute must be 'act' or 'all', got 'none'"):
        group_(Attention(), recompute="none")


def test_a_class_given_after_group_is_not_taken_away():
    model, _ = pair()
    group_(model)
    model.q.__class__ = type("Wrapped", (type(model.q),), {})
    with pytest.raises(ValueError, match="q was given a class after group_, a Wrapped"):
        ungroup_(model)


@pytest.mark.slow
def test_compiled_code_runs_the_single_layers():
    model, single = pair()
    group_(model)
    compiled = torch.compile(model, fullgraph=True)
    x = X.clone().requires_grad_()
    torch.testing.assert_close(compiled(x), single(x), rtol=1e-5, atol=1e-5)
