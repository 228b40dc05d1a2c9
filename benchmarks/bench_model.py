"""Time a whole fine-tuning step of a model: plain LoRA layer, its torch.compile, peft, and ours.

Forward, loss, backward and AdamW, in float32 on the CPU. All start from the same adapters; their
losses over three steps must agree before a time is printed, with --dropout under the same masks.
"""

import argparse
import copy
import json
import math
import shlex
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import lora_ext
from lora_ext import testing

from . import names_of, positive, writable
from .providers import PlainLoRALayer, Unavailable, needed
from .report import make_header, wide_console
from .timing import measure, peak_mib, saved_mib

RANK, ALPHA, CHECKED_STEPS = 8, 2.0, 3
LEARNING_RATE = 1e-4
# Rounding alone: losses of one model in float32 differ by 1e-7 to 1e-6 of themselves after three
# steps; alpha 1 % wrong makes 1e-3.
AGREE = 2e-5
Row = dict[str, Any]


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
    from .finetune.data import DemoError
    from .finetune.tasks import Settings, Sms

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
                linear = nn.Linear(*child.weight.shape)
                linear.weight.data = child.weight.detach().T.contiguous()
                linear.bias.data = child.bias.detach()
                setattr(parent, name, linear)
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


class Step:
    """A model in training: each call is one step, and returns its loss."""

    def __init__(self, work: Work, model: nn.Module, call: nn.Module | None = None) -> None:
        self._loss, self._model = work.loss, model if call is None else call
        self.trainable = [p for p in model.parameters() if p.requires_grad]
        self.held = tuple(model.parameters())
        self._optimizer = torch.optim.AdamW(self.trainable, lr=LEARNING_RATE)

    def draw_by_hash(self) -> None:
        """Have our own layers draw their masks the fast way from here on."""
        for _, layer in lora_ext.layers.lora_layers(self._model):
            layer.lora.dropout_mask = "hash"

    def __call__(self) -> float:
        """Take a step."""
        loss = self._loss(self._model)
        loss.backward()
        self._optimizer.step()
        self._optimizer.zero_grad()
        return loss.item()


def with_lora(replace: Callable[..., Any], *, compiled: bool = False):
    """Return a provider: the linears replaced, and where asked each step compiled."""

    def build(work: Work, dropout: float = 0.0) -> Step:
        model = _frozen_copy(work.model)
        adapters = list(_adapters(model, work.adapted))
        if compiled and dropout:
            raise Unavailable("compiled code draws masks of its own, so its losses can't be held")
        replace(model.get_submodule(work.adapted), RANK, ALPHA)
        for name, A, B in adapters:
            lora: Any = model.get_submodule(name).lora
            lora.A.data, lora.B.data = A, B
            if isinstance(lora, testing.LoRALayer):
                lora.__class__ = PlainLoRALayer
            else:
                lora.train().dropout_mask = "torch"  # the plain layer's masks, to be checked
            lora.dropout = dropout
        if not compiled:
            return Step(work, model)
        torch.compiler.reset()
        return Step(work, model, torch.compile(model, dynamic=False))

    return build


def peft_step(work: Work, dropout: float = 0.0) -> Step:
    """Return the step of peft's LoRA on the same linears."""
    return Step(work, _peft_model(work, dropout))


def accelerated_step(work: Work, dropout: float = 0.0) -> Step:
    """Return that step once `accelerate` has been called, with peft's own masks."""
    model = _peft_model(work, dropout)
    from lora_ext.integrations.peft import accelerate

    accelerate(model)
    return Step(work, model)


def _peft_model(work: Work, dropout: float) -> nn.Module:
    peft = needed("peft")
    model = _frozen_copy(work.model)
    adapters = list(_adapters(model, work.adapted))
    names = [name for name, _, _ in adapters]
    config = peft.LoraConfig(
        r=RANK, lora_alpha=ALPHA * RANK, target_modules=names, lora_dropout=dropout
    )
    peft.inject_adapter_in_model(config, model)
    for name, A, B in adapters:
        layer = model.get_submodule(name)
        layer.lora_dropout.train()
        layer.lora_A["default"].weight.data = A.T.contiguous()
        layer.lora_B["default"].weight.data = B.T.contiguous()
    return model


MODELS = {"minilm": minilm, "gpt2": gpt2, "llama-block": llama_block, "tiny": tiny}
PROVIDERS: dict[str, Callable[..., Step]] = {
    "plain": with_lora(testing.replace_linear_with_lora),
    "compile": with_lora(testing.replace_linear_with_lora, compiled=True),
    "peft": peft_step,
    "accelerated": accelerated_step,
    "lora_ext": with_lora(lora_ext.replace_linear_with_lora),
}


def run(
    name: str, providers: Sequence[str], budget_s: float, console: Console, dropout: float = 0.0
) -> tuple[list[Row], bool]:
    """Check and time a step of the model called `name`; return the rows, and whether all agreed."""
    work = MODELS[name]()
    work.model.eval()  # no dropout but LoRA's: a compiled one draws other numbers
    steps: dict[str, Step] = {}
    losses: dict[str, list[float]] = {}
    for provider in dict.fromkeys(("plain", *providers)):
        try:
            steps[provider] = PROVIDERS[provider](work, dropout)
        except Unavailable as reason:
            console.print(f"not timed: {provider}: {reason}", highlight=False)
            continue
        torch.manual_seed(0)
        losses[provider] = [steps[provider]() for _ in range(CHECKED_STEPS)]
        steps[provider].draw_by_hash()
    wrong = {p: why for p in losses if (why := _difference(losses["plain"], losses[p]))}
    for provider, why in wrong.items():
        console.print(f"not timed: {provider}: {why}", style="red", highlight=False)
    timed = {p: step for p, step in steps.items() if p in providers and p not in wrong}
    memory = {p: (peak_mib(step, "cpu"), saved_mib(step, step.held)) for p, step in timed.items()}
    times, _ = measure(timed, "cpu", budget_s)
    rows = [
        {
            "model": name,
            "provider": provider,
            **{f"ms_{name}": round(value, 3) for name, value in ms._asdict().items()},
            "tokens_per_s": round(work.tokens / ms.median * 1e3, 1),
            "peak_mib": round(memory[provider][0], 1),
            "saved_mib": round(memory[provider][1], 1),
            "loss": losses[provider][-1],
            "loss_difference": _largest(losses["plain"], losses[provider]),
        }
        for provider, ms in times.items()
    ]
    return rows, not wrong


def table(rows: Sequence[Row], title: str) -> Table:
    """Lay out the rows of one model, a line a provider."""
    lines = Table(title=title, title_justify="left")
    headings = ("", "ms a step", "tokens/s", "plain / it", "peak MiB", "kept MiB", "loss off by")
    for heading in headings:
        lines.add_column(heading, justify="right" if heading else "left", no_wrap=True)
    base = next((row["ms_median"] for row in rows if row["provider"] == "plain"), math.nan)
    for row in rows:
        spread = 50 * (row["ms_p80"] - row["ms_p20"]) / row["ms_median"]
        lines.add_row(
            row["provider"],
            f"{row['ms_median']:.4g} ±{spread:.0f}%",
            f"{row['tokens_per_s']:.0f}",
            f"{base / row['ms_median']:.2f}",
            f"{row['peak_mib']:.0f}",
            f"{row['saved_mib']:.0f}",
            f"{row['loss_difference']:.1e}",
        )
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; return 0, or 1 if a provider's losses are not the plain layer's."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.bench_model", description=__doc__.partition("\n")[0]
    )
    add = parser.add_argument
    real = [name for name in MODELS if name != "tiny"]
    add("--model", choices=tuple(MODELS), action="append", help=f"default: {', '.join(real)}")
    add(
        "--providers",
        type=names_of("provider", PROVIDERS),
        default=list(PROVIDERS),
        metavar="NAME,...",
    )
    add("--dropout", type=float, default=0.0, metavar="P", help="LoRA's own (default 0)")
    add("--threads", type=positive(int), metavar="N", help="default: torch's choice")
    add("--seconds", type=positive(float), default=30.0, help="a model (default 30)")
    add("--json", type=writable, metavar="FILE", help="write the rows there")
    args = parser.parse_args(argv)
    if not 0 <= args.dropout < 1:
        parser.error(f"argument --dropout: must be from 0 to below 1, got {args.dropout}")
    if args.threads:
        torch.set_num_threads(args.threads)
    header = make_header("cpu", f"python -m benchmarks.bench_model {shlex.join(argv)}".rstrip())
    header |= {"dropout": args.dropout} if args.dropout else {}
    console = wide_console()
    console.print(", ".join(f"{k} {v}" for k, v in header.items() if k != "command"))
    rows: list[Row] = []
    right = True
    for name in args.model or real:
        try:
            timed, agreed = run(name, args.providers, args.seconds, console, args.dropout)
        except (Unavailable, ImportError) as reason:
            console.print(f"not timed: {name}: {reason}", highlight=False)
            continue
        rows, right = rows + timed, right and agreed
        console.print(table(timed, f"{name}, float32, LoRA of rank {RANK} on every linear"))
        if args.json:
            args.json.write_text(json.dumps({"header": header, "rows": rows}, indent=1) + "\n")
    return 0 if rows and right else 1


def _frozen_copy(model: nn.Module) -> nn.Module:
    """Copy the modules and share the parameters, which no one trains: one base for all."""
    model.requires_grad_(False)
    return copy.deepcopy(model, {id(p): p for p in model.parameters()})


def _adapters(model: nn.Module, part: str) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Yield (name, A, B) for each linear of a part: the same for all providers, B not zero."""
    prefix = f"{part}." if part else ""
    for name, linear in model.named_modules():
        if isinstance(linear, nn.Linear) and name.startswith(prefix):
            generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            A = torch.randn(linear.in_features, RANK, generator=generator)
            B = torch.randn(RANK, linear.out_features, generator=generator)
            yield name, A / linear.in_features**0.5, B / 30


def _difference(plain_losses: Sequence[float], losses: Sequence[float]) -> str | None:
    """Say how the losses differ by more than rounding; None if they don't."""
    bound = AGREE * max(1.0, *map(abs, plain_losses))
    if _largest(plain_losses, losses) <= bound:  # a NaN is not below it
        return None
    return f"losses {losses} are not the plain layer's {plain_losses}, bound {bound:.1e}"


def _largest(first: Sequence[float], second: Sequence[float]) -> float:
    gaps = [abs(a - b) for a, b in zip(first, second, strict=True)]
    return math.nan if any(map(math.isnan, gaps)) else max(gaps)


if __name__ == "__main__":
    sys.exit(main())
