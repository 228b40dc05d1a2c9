"""group_: models as transformers builds them, trained grouped and not.

Small random weights. PEFT's own training, under one seed, is the standard for its models.
"""

import pytest
import torch
from torch import nn

from lora_ext import group_, mark_only_lora_as_trainable, replace_linear_with_lora, ungroup_
from tests.stacks.grouped import assert_same_training, lora_layers, train

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
