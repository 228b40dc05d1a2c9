"""The models whose fine-tuning step is timed: a frozen base, a batch, and how its loss is had."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .providers import Unavailable


@dataclass(frozen=True)
class Work:
    """A model to adapt and one batch of its training.

    loss(model) gives a scalar; `adapted` is the name of the part whose linears get LoRA ("" for
    all of it); `tokens` is what one step reads, padding not counted.
    """

    model: nn.Module
    loss: Callable[[nn.Module], Tensor]
    adapted: str
    tokens: int


def minilm() -> Work:
    """Return the demo's model and longest batch: all-MiniLM-L6-v2 on 16 SMS texts."""
    from benchmarks.finetune.packages import DemoError
    from benchmarks.finetune.sms import Sms
    from benchmarks.finetune.task import Settings

    try:
        task = Sms(Settings())
    except DemoError as reason:
        raise Unavailable(str(reason)) from None
    batch = max(task.batches(0), key=lambda batch: batch["input_ids"].numel())
    tokens = int(batch["attention_mask"].sum())
    return Work(task.build(0), lambda model: task.loss(model, batch), "encoder", tokens)


def gpt2() -> Work:
    """Return GPT-2-small's shapes, random weights, 2 sequences of 256 tokens."""
    from transformers import GPT2Config, GPT2LMHeadModel
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0))
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if isinstance(child, Conv1D):  # GPT-2's own linear, with a transposed weight
                setattr(parent, name, _linear_of(child.weight.T, child.bias))
    return _language_model(model, "transformer", model.config.vocab_size, 2, 256)


def llama_block() -> Work:
    """Return one decoder block of Llama-3-8B's shapes, random weights, 128 tokens."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32}
    config = LlamaConfig(**sizes, num_key_value_heads=8, num_hidden_layers=1, vocab_size=512)
    return _language_model(LlamaForCausalLM(config), "model", config.vocab_size, 1, 128)


def tiny() -> Work:
    """Return a model of two small linears, to see the benchmark work in a second."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 32))
    x = torch.randn(8, 32)
    return Work(model, lambda model: (model(x) - 1).square().mean(), "", len(x))


def _language_model(model: nn.Module, adapted: str, vocabulary: int, count: int, length: int):
    tokens = torch.randint(vocabulary, (count, length), generator=torch.Generator().manual_seed(0))
    return Work(
        model,
        lambda model: model(input_ids=tokens, labels=tokens, use_cache=False).loss,
        adapted,
        tokens.numel(),
    )


def _linear_of(weight: Tensor, bias: Tensor) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
    linear.weight = nn.Parameter(weight.detach().contiguous())
    linear.bias = nn.Parameter(bias.detach())
    return linear


MODELS: dict[str, Callable[[], Work]] = {
    "minilm": minilm,
    "gpt2": gpt2,
    "llama-block": llama_block,
    "tiny": tiny,
}
