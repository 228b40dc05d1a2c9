"""Time and memory of a whole fine-tuning step of a model: plain LoRA layer, peft, and ours.

Forward, loss, backward and AdamW on the CPU. All start from the same adapters; their losses over
three steps must agree before a row is printed, with --dropout under the same masks. DoRA is held
to peft's DoRA. Compiled code draws masks of its own, so with --dropout its losses are not held.
The provider "base" trains biases in place of LoRA: what no LoRA layer can be faster than.
"""

import argparse
import json
import math
import shlex
import sys
from collections.abc import Sequence
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from . import names_of, positive, writable
from .bases import Unavailable
from .models import MODELS, PROVIDERS, RANK, Step
from .report import wide_console
from .runs import make_header
from .timing import measure, peak_mib, saved_mib

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
CHECKED_STEPS = 3
# Of the loss: rounding alone. Losses of one model in float32 differ by 1e-7 to 1e-6 of themselves
# after three steps; alpha 1 % wrong makes 1e-3.
AGREE = {"fp32": 2e-5, "bf16": 2e-2}
REAL = ("minilm", "gpt2", "llama-block")  # what is timed by default, and by whom
USUAL = ("plain", "compile", "peft", "accelerated", "lora_ext")
Row = dict[str, Any]


def run(
    name: str,
    providers: Sequence[str],
    budget_s: float,
    console: Console,
    dropout: float = 0.0,
    dtype: str = "fp32",
) -> tuple[list[Row], bool]:
    """Check and time a step of the model called `name`; return the rows, and whether all agreed."""
    work = MODELS[name](DTYPES[dtype])
    work.model.train()  # gradient checkpointing is on in training alone
    for module in work.model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0  # no dropout but LoRA's: a compiled one draws other numbers
    steps: dict[str, Step] = {}
    losses: dict[str, list[float]] = {}
    checked = dict.fromkeys(("plain", *providers))
    if any(provider.endswith("_dora") for provider in providers):
        checked = dict.fromkeys(("plain", "peft_dora", *providers))
    for provider in checked:
        try:
            steps[provider] = PROVIDERS[provider](work, dropout)
        except Unavailable as reason:
            console.print(f"not timed: {provider}: {reason}", highlight=False)
            continue
        torch.manual_seed(0)
        losses[provider] = [steps[provider]() for _ in range(CHECKED_STEPS)]
        steps[provider].draw_by_hash()
    wrong = {}
    for provider, step in steps.items():
        why = difference(losses[step.like], losses[provider], AGREE[dtype])
        if step.held and why is not None:
            wrong[provider] = f"{why}, those of {step.like}"
            console.print(f"not timed: {provider}: {wrong[provider]}", style="red", highlight=False)
    timed = {p: step for p, step in steps.items() if p in providers and p not in wrong}
    memory = {p: (peak_mib(s, "cpu"), saved_mib(s, s.parameters)) for p, s in timed.items()}
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
            "loss_difference": _largest(losses[steps[provider].like], losses[provider]),
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
    """Run the benchmark; return 0, or 1 if a provider's losses are not what they should be."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.bench_model", description=__doc__.partition("\n")[0]
    )
    add = parser.add_argument
    add("--model", choices=tuple(MODELS), action="append", help=f"default: {', '.join(REAL)}")
    names = names_of("provider", PROVIDERS)
    usual = f'"all", or some of {", ".join(PROVIDERS)} (default {",".join(USUAL)})'
    add("--providers", type=names, default=list(USUAL), metavar="NAME,...", help=usual)
    add("--dtype", choices=tuple(DTYPES), default="fp32", help="of the model (default fp32)")
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
    for name in args.model or REAL:
        try:
            timed, agreed = run(
                name, args.providers, args.seconds, console, args.dropout, args.dtype
            )
        except (Unavailable, ImportError) as reason:
            console.print(f"not timed: {name}: {reason}", highlight=False)
            continue
        rows, right = rows + timed, right and agreed
        title = f"{name}, {args.dtype}, LoRA of rank {RANK} on every linear"
        console.print(table(timed, title + (f", dropout {args.dropout}" if args.dropout else "")))
        if args.json:
            args.json.write_text(json.dumps({"header": header, "rows": rows}, indent=1) + "\n")
    return 0 if rows and right else 1


def difference(expected: Sequence[float], losses: Sequence[float], agree: float) -> str | None:
    """Say how the losses differ by more than `agree` of the largest; None if they don't."""
    bound = agree * max(1.0, *map(abs, expected))
    if _largest(expected, losses) <= bound:  # a NaN is not below it
        return None
    return f"losses {losses} are not within {bound:.1e} of {expected}"


def _largest(first: Sequence[float], second: Sequence[float]) -> float:
    gaps = [abs(a - b) for a, b in zip(first, second, strict=True)]
    return math.nan if any(map(math.isnan, gaps)) else max(gaps)


if __name__ == "__main__":
    sys.exit(main())
