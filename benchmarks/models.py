"""The models whose steps bench_model times, and the ways to train their adapters.

A way is a provider: `PROVIDERS[name](work, dropout)` gives a `Step`. All share the model's frozen
parameters and start from the same adapters, drawn by `adapters`.
"""

import copy
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import lora_ext
from lora_ext import testing

from .bases import Unavailable, needed
from .peers import PlainLoRALayer

RANK, ALPHA = 8, 2.0
LEARNING_RATE = 1e-4


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


def minilm(dtype: torch.dtype) -> Work:
    """Return the demo's model and longest batch: all-MiniLM-L6-v2 on 16 SMS texts."""
    from .finetune.data import DemoError
    from .finetune.tasks import Settings, Sms

    try:
        task = Sms(Settings())
    except DemoError as reason:
        raise Unavailable(str(reason)) from None
    batch = max(task.batches(0), key=lambda batch: batch["input_ids"].numel())
    tokens = int(batch["attention_mask"].sum())
    model = task.build(0).to(dtype)
    return Work(model, lambda model: task.loss(model, batch), "encoder", tokens)


def gpt2(dtype: torch.dtype) -> Work:
    """Return GPT-2-small's shapes, random weights, 2 sequences of 256 tokens."""
    from transformers import GPT2Config, GPT2LMHeadModel
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0))
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if isinstance(child, Conv1D):  # GPT-2's own linear, with a transposed weight
                linear = nn.Linear(*child.weight.shape)
                linear.weight.data = child.weight.detach().T.contiguous()
                linear.bias.data = child.bias.detach()
                setattr(parent, name, linear)
    return _language_model(model.to(dtype), "transformer", model.config.vocab_size, 2, 256)


def llama_block(dtype: torch.dtype) -> Work:
    """Return one decoder block of Llama-3-8B's shapes, random weights, 128 tokens."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32}
    config = LlamaConfig(**sizes, num_key_value_heads=8, num_hidden_layers=1, vocab_size=512)
    return _language_model(LlamaForCausalLM(config).to(dtype), "model", config.vocab_size, 1, 128)


def tiny(dtype: torch.dtype) -> Work:
    """Return a model of two small linears, to see the benchmark work in a second."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 32)).to(dtype)
    x = torch.randn(8, 32).to(dtype)
    return Work(model, lambda model: (model(x) - 1).square().mean(), "", len(x))


def one_linear(rows: int, inputs: int, outputs: int) -> Callable[[torch.dtype], Work]:
    """Return the maker of a model of one linear, whose x needs a gradient too."""

    def make(dtype: torch.dtype) -> Work:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(inputs, outputs)).to(dtype)
        x, dy = (torch.randn(rows, size).to(dtype) for size in (inputs, outputs))
        x.requires_grad_()

        def loss(model: nn.Module) -> Tensor:
            x.grad = None
            return (model(x) * dy).mean()

        return Work(model, loss, "", rows)

    return make


def _language_model(model: nn.Module, adapted: str, vocabulary: int, count: int, length: int):
    tokens = torch.randint(vocabulary, (count, length), generator=torch.Generator().manual_seed(0))
    return Work(
        model,
        lambda model: model(input_ids=tokens, labels=tokens, use_cache=False).loss,
        adapted,
        tokens.numel(),
    )


class Step:
    """A model in training: each call is one step, and returns its loss.

    `like` is the provider whose losses its own have to be, `held` whether they are compared:
    compiled code draws dropout's masks by itself.
    """

    def __init__(self, work: Work, model: nn.Module, call: nn.Module | None = None) -> None:
        self._loss, self._model = work.loss, model if call is None else call
        self.trainable = [p for p in model.parameters() if p.requires_grad]
        self.parameters = tuple(model.parameters())
        self._optimizer = torch.optim.AdamW(self.trainable, lr=LEARNING_RATE)
        self.like, self.held = "plain", True

    def draw_by_hash(self) -> None:
        """Have our own layers draw their masks the fast way from here on."""
        for _, layer in lora_ext.inject.lora_layers(self._model):
            layer.lora.dropout_mask = "hash"

    def __call__(self) -> float:
        """Take a step."""
        loss = self._loss(self._model)
        loss.backward()
        self._optimizer.step()
        self._optimizer.zero_grad()
        return loss.item()


def with_lora(
    replace: Callable[..., Any],
    *,
    compiled: bool = False,
    then: Callable[[nn.Module], Any] = lambda _: None,
):
    """Return a provider: linears replaced, `then` called, each step compiled where asked."""

    def build(work: Work, dropout: float = 0.0) -> Step:
        model = _frozen_copy(work.model)
        drawn = list(adapters(model, work.adapted))
        replace(model.get_submodule(work.adapted), RANK, ALPHA)
        for name, A, B in drawn:
            lora: Any = model.get_submodule(name).lora
            lora.A.data, lora.B.data = A, B
            if isinstance(lora, testing.LoRALayer):
                lora.__class__ = PlainLoRALayer
            else:
                lora.train().dropout_mask = "torch"  # the plain layer's masks, to be checked
            lora.dropout = dropout
        then(model)
        if not compiled:
            return Step(work, model)
        torch.compiler.reset()
        step = Step(work, model, torch.compile(model, dynamic=False))
        step.held = not dropout
        return step

    return build


def with_biases(work: Work, dropout: float = 0.0) -> Step:
    """Return the floor: linears with a bias trained in place of LoRA, so the base and dx alone."""
    model = _frozen_copy(work.model)
    for name, _, _ in list(adapters(model, work.adapted)):
        linear = model.get_submodule(name)
        bias = linear.weight.new_zeros(linear.out_features) if linear.bias is None else linear.bias
        linear.bias = nn.Parameter(bias.detach().clone())
    step = Step(work, model)
    step.held = False  # it trains another thing
    return step


def with_peft(*, dora: bool = False, then: Callable[[nn.Module], Any] = lambda _: None):
    """Return a provider: peft's LoRA or DoRA on the same linears, and `then` called."""

    def build(work: Work, dropout: float = 0.0) -> Step:
        peft = needed("peft")
        model = _frozen_copy(work.model)
        drawn = list(adapters(model, work.adapted))
        config = peft.LoraConfig(
            r=RANK,
            lora_alpha=ALPHA * RANK,
            target_modules=[name for name, _, _ in drawn],
            lora_dropout=dropout,
            use_dora=dora,
        )
        peft.inject_adapter_in_model(config, model)
        for name, A, B in drawn:
            layer = model.get_submodule(name)
            layer.lora_dropout.train()
            layer.lora_A["default"].weight.data = A.T.contiguous()
            layer.lora_B["default"].weight.data = B.T.contiguous()
        then(model)
        step = Step(work, model)
        step.like = "peft_dora" if dora else "plain"
        return step

    return build


def _accelerate(**options: bool) -> Callable[[nn.Module], Any]:
    def then(model: nn.Module) -> None:
        from lora_ext.integrations.peft import accelerate

        accelerate(model, **options)

    return then


def _checkpoint(model: Any) -> None:
    if not hasattr(model, "gradient_checkpointing_enable"):
        raise Unavailable("the model has no gradient checkpointing")
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()


def _group(recompute: str) -> Callable[[nn.Module], Any]:
    return lambda model: lora_ext.group_(model, recompute=recompute)


def _group_and_compile_loss(model: Any) -> None:
    """Run groups, and the loss over the vocabulary by the compiler: one tensor of logits less."""
    if not hasattr(model, "loss_function"):
        raise Unavailable("the model has no loss function of its own")
    lora_ext.group_(model)
    model.loss_function = torch.compile(model.loss_function)


MODELS: dict[str, Callable[[torch.dtype], Work]] = {
    "minilm": minilm,
    "gpt2": gpt2,
    "llama-block": llama_block,
    "tiny": tiny,
    "linear-960-768-768": one_linear(960, 768, 768),  # rows, in, out
    "linear-960-768-3072": one_linear(960, 768, 3072),
    "linear-512-2048-2048": one_linear(512, 2048, 2048),
}
OURS, PLAIN = lora_ext.replace_linear_with_lora, testing.replace_linear_with_lora
PROVIDERS: dict[str, Callable[..., Step]] = {
    "base": with_biases,
    "plain": with_lora(PLAIN),
    "compile": with_lora(PLAIN, compiled=True),
    "peft": with_peft(),
    "accelerated": with_peft(then=_accelerate()),  # with peft's own masks
    "lora_ext": with_lora(OURS),
    "lora_ext_compile": with_lora(OURS, compiled=True),
    "peft_checkpoint": with_peft(then=_checkpoint),
    "accelerated_groups": with_peft(then=_accelerate(groups=True)),
    "grouped": with_lora(OURS, then=_group("act")),
    "grouped_all": with_lora(OURS, then=_group("all")),  # keeps x alone
    "grouped_loss_compile": with_lora(OURS, then=_group_and_compile_loss),
    "peft_dora": with_peft(dora=True),
    "accelerated_dora": with_peft(dora=True, then=_accelerate()),
}


def _frozen_copy(model: nn.Module) -> nn.Module:
    """Copy the modules and share the parameters, which no one trains: one base for all."""
    model.requires_grad_(False)
    return copy.deepcopy(model, {id(p): p for p in model.parameters()})


def adapters(model: nn.Module, part: str) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Yield (name, A, B) for each linear of a part: the same for all providers, B not zero."""
    prefix = f"{part}." if part else ""
    for name, linear in model.named_modules():
        if isinstance(linear, nn.Linear) and name.startswith(prefix):
            generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            A = torch.randn(linear.in_features, RANK, generator=generator)
            B = torch.randn(RANK, linear.out_features, generator=generator)
            yield name, A / linear.in_features**0.5, B / 30
