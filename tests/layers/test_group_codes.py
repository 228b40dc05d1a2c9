"""Groups over weights of codes: as the single layers give it, and run as one operation."""

import copy

import pytest
import torch
from torch import nn

from lora_ext import (
    LinearWithLoRA,
    group_,
    lora_gated_mlp,
    lora_linears,
    mark_only_lora_as_trainable,
    quantise_,
    replace_linear_with_lora,
)
from lora_ext.codes import FORMATS
from tests.numerics import assert_same_up_to_rounding

K, HIDDEN = 128, 192


def over_codes(*layers: nn.Module, format: str = "nf4") -> list[nn.Module]:
    """Quantise the linears of some layers, and give B values."""
    model = nn.Sequential(*layers)
    quantise_(model, format)
    for layer in model:
        if isinstance(layer, LinearWithLoRA):
            nn.init.normal_(layer.lora.B)
            layer.linear.requires_grad_(False)
    return list(model)


def adapted(K: int, N: int, rank: int = 4, dropout: float = 0.0, bias: bool = True):
    return LinearWithLoRA(nn.Linear(K, N, bias=bias), rank, 1.5, dropout=dropout)


def outcome(run, x, layers) -> list[torch.Tensor]:
    """Return the results and all gradients of the sum of their squares."""
    torch.manual_seed(5)
    x = x.detach().requires_grad_()
    ys = run(x)
    wrt = [x, *(p for m in layers for p in m.parameters() if p.requires_grad)]
    loss = sum(y.double().square().sum() for y in ys)
    return [*ys, *torch.autograd.grad(loss, wrt)]


def assert_same(got, want) -> None:
    for one, other in zip(got, want, strict=True):
        assert one.dtype == other.dtype
        assert_same_up_to_rounding(one, other)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("format", FORMATS)
def test_plain_layers_codes_and_codes_without_an_adapter_are_one_group(format, dropout):
    coded = over_codes(adapted(K, 64, dropout=dropout), nn.Linear(K, 32), format=format)
    layers = [coded[0], coded[1], adapted(K, 40, 2, dropout), nn.Linear(K, 16)]
    nn.init.normal_(layers[2].lora.B)
    x = torch.randn(3, 11, K)
    got = outcome(lambda x: lora_linears(x, layers), x, layers)
    assert "_LoRALinears" in type(got[0].grad_fn).__name__
    assert_same(got, outcome(lambda x: [layer(x) for layer in layers], x, layers))


def test_autocast_gives_the_single_layers_dtypes():
    layers = over_codes(adapted(K, 64), adapted(K, 32)) + over_codes(adapted(K, 48), format="int8")
    x = torch.randn(9, K)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ys, singles = lora_linears(x, layers), [layer(x) for layer in layers]
    assert [y.dtype for y in ys] == [torch.float32, torch.float32, torch.bfloat16]
    assert_same(ys, singles)


def plain_mlp(x, gate, up, down):
    return down(nn.functional.silu(gate(x)) * up(x))


@pytest.mark.parametrize("recompute", ["act", "all"])
@pytest.mark.parametrize("format", ["nf4", "int8"])
def test_gated_mlp(format, recompute):
    layers = over_codes(
        adapted(K, HIDDEN, dropout=0.2), adapted(K, HIDDEN), adapted(HIDDEN, K), format=format
    )
    x = torch.randn(3, 11, K)
    got = outcome(lambda x: [lora_gated_mlp(x, *layers, "silu", recompute=recompute)], x, layers)
    assert "_GatedMLP" in type(got[0].grad_fn).__name__
    assert_same(got, outcome(lambda x: [plain_mlp(x, *layers)], x, layers))


@pytest.mark.parametrize("kind", ["linears", "mlp"])
def test_second_derivatives(kind):
    layers = over_codes(adapted(K, HIDDEN), adapted(K, HIDDEN), adapted(HIDDEN, K))
    x = torch.randn(5, K, requires_grad=True)
    wrt = [x, *(p for m in layers for p in m.lora.parameters())]
    runs = {
        "linears": (lambda: lora_linears(x, layers[:2]), lambda: [m(x) for m in layers[:2]]),
        "mlp": (lambda: [lora_gated_mlp(x, *layers, "silu")], lambda: [plain_mlp(x, *layers)]),
    }[kind]
    found = []
    for run in runs:
        loss = sum(y.square().sum() for y in run())
        first = torch.autograd.grad(loss, wrt, create_graph=True, allow_unused=True)
        first = [g for g in first if g is not None]
        second = torch.autograd.grad(sum(g.square().sum() for g in first), wrt, allow_unused=True)
        found.append([*first, *(g for g in second if g is not None)])
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4 * want.abs().max().item())


def test_an_mlp_over_4_bits_under_autocast_runs_layer_by_layer():
    layers = over_codes(adapted(K, HIDDEN), adapted(K, HIDDEN), adapted(HIDDEN, K))
    x = torch.randn(9, K)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = lora_gated_mlp(x, *layers, "silu")
        assert torch.equal(y, plain_mlp(x, *layers)) and y.dtype == torch.float32
    assert "_GatedMLP" not in type(y.grad_fn).__name__


def test_a_square_conv1d_is_read_as_it_lies():
    conv1d = pytest.importorskip("transformers").pytorch_utils.Conv1D
    layers = [LinearWithLoRA(conv1d(24, 24), 3, 1.5), adapted(24, 8)]
    for layer in layers:
        nn.init.normal_(layer.lora.B)
    x = torch.randn(9, 24)
    got = outcome(lambda x: lora_linears(x, layers), x, layers)
    assert "_LoRALinears" in type(got[0].grad_fn).__name__
    assert_same(got, outcome(lambda x: [layer(x) for layer in layers], x, layers))


def llama() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"vocab_size": 99, "hidden_size": 64, "intermediate_size": 128}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads))


def train(model: nn.Module, steps: int = 5) -> torch.Tensor:
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=3e-3)
    tokens = torch.randint(3, 99, (2, 17), generator=torch.Generator().manual_seed(0))
    torch.manual_seed(5)
    losses = []
    for _ in range(steps):
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach().double())
    return torch.stack(losses)


@pytest.mark.parametrize("format", ["nf4", "int8"])
@pytest.mark.parametrize("targets", ["all", "q_and_v"])
def test_llama_over_codes_trains_grouped_as_it_does_not(targets, format):
    names = r".*layers\.\d+\..*" if targets == "all" else r".*(q|v)_proj"
    single = llama()
    replace_linear_with_lora(single, 4, 2.0, target_modules=names, dropout=0.05)
    quantise_(single.model, format)
    mark_only_lora_as_trainable(single)
    model = copy.deepcopy(single)
    report = group_(model)
    torch.testing.assert_close(train(model), train(single), rtol=3e-5, atol=0)
    together = "q_proj+k_proj+v_proj" if targets == "all" else "q_proj+v_proj"
    assert f"2 run {together} together" in str(report)
    assert ("2 run as one operation" in str(report)) == (targets == "all")


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_qlora_by_peft_and_bitsandbytes_trains_grouped_as_pefts(kind):
    peft, bnb = pytest.importorskip("peft"), pytest.importorskip("bitsandbytes")
    from lora_ext.integrations.peft import accelerate

    base = llama()
    for parent in list(base.model.layers.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear:
                sizes = child.in_features, child.out_features
                if kind == "nf4":
                    made = bnb.nn.Linear4bit(*sizes, bias=False, quant_type="nf4")
                else:
                    made = bnb.nn.Linear8bitLt(*sizes, bias=False, has_fp16_weights=False)
                made.load_state_dict(child.state_dict())
                setattr(parent, name, made.to("cpu"))
    config = peft.LoraConfig(
        r=4, lora_alpha=8, lora_dropout=0.05, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    if kind == "nf4":
        base.is_loaded_in_4bit = True
    else:
        base.is_loaded_in_8bit = True
    plain = peft.get_peft_model(base, config)
    model = copy.deepcopy(plain)
    report = accelerate(model, groups=True)
    got, want = train(model), train(plain)
    assert "2 run q_proj+k_proj+v_proj together" in str(report.groups), report
    assert "2 run as one operation" in str(report.groups), report
    torch.testing.assert_close(got, want, rtol=1e-3 if kind == "int8" else 1e-4, atol=0)
