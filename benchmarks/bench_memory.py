"""Memory and time of a whole fine-tuning step: single layers, groups, and what others keep.

The models and steps of bench_model, with LoRA's dropout and in bfloat16 too. Losses over three
steps must agree with the plain layer's, under the same masks, before a row is printed; compiled
code draws masks of its own, so with dropout its losses are not held.
"""

import argparse
import json
import shlex
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lora_ext
from lora_ext import testing

from . import names_of, positive, writable
from .bench_model import (
    ALPHA,
    CHECKED_STEPS,
    MODELS,
    RANK,
    Row,
    Step,
    Work,
    _adapters,
    _frozen_copy,
    _largest,
    table,
)
from .providers import Unavailable, needed
from .report import make_header, wide_console
from .timing import measure, peak_mib, saved_mib

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
AGREE = {"fp32": 2e-5, "bf16": 2e-2}  # of the loss: rounding alone, see bench_model
Build = Callable[[Work, float], Step]


class _PlainLoRALayer(testing.LoRALayer):
    """The plain layer as people write it with dropout and float32 adapters."""

    dropout = 0.0

    def forward(self, x: Tensor) -> Tensor:
        x = F.dropout(x, self.dropout)
        return self.alpha * (x @ self.A.to(x.dtype) @ self.B.to(x.dtype))


def _model(work: Work, replace: Callable[..., Any], dropout: float) -> nn.Module:
    model = _frozen_copy(work.model)
    adapters = list(_adapters(model, work.adapted))
    replace(model.get_submodule(work.adapted), RANK, ALPHA)
    for name, A, B in adapters:
        lora: Any = model.get_submodule(name).lora
        lora.A.data, lora.B.data, lora.dropout = A, B, dropout
        if isinstance(lora, testing.LoRALayer):
            lora.__class__ = _PlainLoRALayer
        else:
            lora.dropout_mask = "torch"  # the plain layer's masks, to be checked
    return model


def _peft_model(work: Work, dropout: float) -> nn.Module:
    peft = needed("peft")
    model = _frozen_copy(work.model)
    adapters = list(_adapters(model, work.adapted))
    names = [name for name, _, _ in adapters]
    scale = {"r": RANK, "lora_alpha": ALPHA * RANK, "lora_dropout": dropout}
    peft.inject_adapter_in_model(peft.LoraConfig(target_modules=names, **scale), model)
    for name, A, B in adapters:
        layer = model.get_submodule(name)
        layer.lora_A["default"].weight.data = A.T.contiguous()
        layer.lora_B["default"].weight.data = B.T.contiguous()
    return model


def _plain(work: Work, dropout: float) -> Step:
    return Step(work, _model(work, testing.replace_linear_with_lora, dropout))


def _peft(work: Work, dropout: float) -> Step:
    return Step(work, _peft_model(work, dropout))


def _peft_checkpoint(work: Work, dropout: float) -> Step:
    model = _peft_model(work, dropout)
    if not hasattr(model, "gradient_checkpointing_enable"):
        raise Unavailable("the model has no gradient checkpointing")
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return Step(work, model.train())


def _single(work: Work, dropout: float) -> Step:
    return Step(work, _model(work, lora_ext.replace_linear_with_lora, dropout))


def _grouped(recompute: str) -> Build:
    def build(work: Work, dropout: float) -> Step:
        model = _model(work, lora_ext.replace_linear_with_lora, dropout)
        lora_ext.group_(model, recompute=recompute)
        return Step(work, model)

    return build


def _accelerated(work: Work, dropout: float) -> Step:
    model = _peft_model(work, dropout)
    from lora_ext.integrations.peft import accelerate

    accelerate(model, groups=True)
    return Step(work, model)


def _compiled(replace: Callable[..., Any]) -> Build:
    def build(work: Work, dropout: float) -> Step:
        torch.compiler.reset()
        model = _model(work, replace, dropout)
        return Step(work, model, torch.compile(model, dynamic=False))

    return build


PROVIDERS: dict[str, Build] = {
    "plain": _plain,
    "compile": _compiled(testing.replace_linear_with_lora),
    "peft": _peft,
    "peft_checkpoint": _peft_checkpoint,
    "lora_ext": _single,
    "grouped": _grouped("act"),
    "grouped_all": _grouped("all"),  # with recompute="all"
    "accelerated": _accelerated,  # peft's model, accelerate(model, groups=True)
    "lora_ext_compile": _compiled(lora_ext.replace_linear_with_lora),
}


def run(
    name: str, dtype: str, dropout: float, providers: Sequence[str], budget_s: float, say: Any
) -> tuple[list[Row], bool]:
    """Check, measure and time the steps of a model; return the rows, and whether all agreed."""
    work = MODELS[name]()
    work.model.to(DTYPES[dtype]).train()
    for module in work.model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0  # the model's own: checkpointing is on in training alone
    steps: dict[str, Step] = {}
    losses: dict[str, list[float]] = {}
    for provider in dict.fromkeys(("plain", *providers)):
        try:
            steps[provider] = PROVIDERS[provider](work, dropout)
        except Unavailable as reason:
            say(f"not timed: {provider}: {reason}")
            continue
        torch.manual_seed(0)
        losses[provider] = [steps[provider]() for _ in range(CHECKED_STEPS)]
    bound = AGREE[dtype] * max(1.0, *map(abs, losses["plain"]))
    held = [p for p in losses if not (dropout and p.endswith("compile"))]
    wrong = [p for p in held if not _largest(losses["plain"], losses[p]) <= bound]
    for provider in wrong:
        say(f"not timed: {provider}: losses {losses[provider]}, plain {losses['plain']}")
    timed = {p: s for p, s in steps.items() if p in providers and p not in wrong}
    memory = {p: (peak_mib(s, "cpu"), saved_mib(s, s.held)) for p, s in timed.items()}
    times, _ = measure(timed, "cpu", budget_s)
    rows = [
        {
            "model": name,
            "dtype": dtype,
            "dropout": dropout,
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


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; return 0, or 1 if a provider's losses are not the plain layer's."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.bench_memory", description=__doc__.partition("\n")[0]
    )
    add = parser.add_argument
    add("--model", choices=tuple(MODELS), default="llama-block")
    add("--dtype", choices=tuple(DTYPES), default="fp32")
    add("--dropout", type=float, default=0.0, metavar="P", help="LoRA's own (default 0)")
    names = names_of("provider", PROVIDERS)
    add("--providers", type=names, default=list(PROVIDERS), metavar="NAME,...")
    add("--threads", type=positive(int), metavar="N", help="default: torch's choice")
    add("--seconds", type=positive(float), default=30.0, help="of timing (default 30)")
    add("--json", type=writable, metavar="FILE", help="write the rows there")
    args = parser.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    header = make_header("cpu", f"python -m benchmarks.bench_memory {shlex.join(argv)}".rstrip())
    console = wide_console()
    try:
        rows, right = run(
            args.model, args.dtype, args.dropout, args.providers, args.seconds, console.print
        )
    except (Unavailable, ImportError) as reason:
        console.print(f"not timed: {args.model}: {reason}", highlight=False)
        return 1
    console.print(table(rows, f"{args.model}, {args.dtype}, dropout {args.dropout}"))
    if args.json:
        args.json.write_text(json.dumps({"header": header, "rows": rows}, indent=1) + "\n")
    return 0 if rows and right else 1


if __name__ == "__main__":
    sys.exit(main())
