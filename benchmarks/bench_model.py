"""Time a whole fine-tuning step of a model: plain LoRA layer, its torch.compile, peft, and ours.

Forward, loss, backward and AdamW, in float32 on the CPU. All start from the same adapters; their
losses over three steps must agree before a time is printed.
"""

import argparse
import copy
import json
import math
import shlex
import sys
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

import lora_ext
from benchmarks.finetune import plain

from . import arguments
from .memory import peak_mib, saved_mib
from .models import MODELS, Work
from .providers import Unavailable
from .report import make_header, wide_console
from .timing import measure

RANK, ALPHA, CHECKED_STEPS = 8, 2.0, 3
LEARNING_RATE = 1e-4
# Rounding alone: losses of one model in float32 differ by 1e-7 to 1e-6 of themselves after three
# steps; alpha 1 % wrong makes 1e-3.
AGREE = 2e-5
Row = dict[str, Any]


class Step:
    """A model in training: each call is one step, and returns its loss."""

    def __init__(self, work: Work, model: nn.Module, call: nn.Module | None = None) -> None:
        self._loss, self._model = work.loss, model if call is None else call
        self.trainable = [p for p in model.parameters() if p.requires_grad]
        self.held = tuple(model.parameters())
        self._optimizer = torch.optim.AdamW(self.trainable, lr=LEARNING_RATE)

    def __call__(self) -> float:
        """Take a step."""
        loss = self._loss(self._model)
        loss.backward()
        self._optimizer.step()
        self._optimizer.zero_grad()
        return loss.item()


def plain_step(work: Work) -> Step:
    """Return the step of the plain layer as people write it."""
    return Step(work, _adapted(work, plain.replace_linear_with_lora))


def compile_step(work: Work) -> Step:
    """Return the same, each step's forward and backward compiled."""
    torch.compiler.reset()
    model = _adapted(work, plain.replace_linear_with_lora)
    return Step(work, model, torch.compile(model, dynamic=False))


def ours_step(work: Work) -> Step:
    """Return the step of lora_ext's layer."""
    return Step(work, _adapted(work, lora_ext.replace_linear_with_lora))


def peft_step(work: Work) -> Step:
    """Return the step of peft's LoRA on the same linears."""
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise Unavailable(f"peft can't be imported ({error}); pip install peft") from None
    model = _frozen_copy(work.model)
    prefix = f"{work.adapted}." if work.adapted else ""
    names = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.startswith(prefix)
    ]
    config = LoraConfig(r=RANK, lora_alpha=ALPHA * RANK, target_modules=names)
    inject_adapter_in_model(config, model)
    for name, A, B in _adapters(work.model, names):
        layer = model.get_submodule(name)
        layer.lora_A["default"].weight.data = A.T.contiguous()
        layer.lora_B["default"].weight.data = B.T.contiguous()
    return Step(work, model)


PROVIDERS: dict[str, Callable[[Work], Step]] = {
    "plain": plain_step,
    "compile": compile_step,
    "peft": peft_step,
    "lora_ext": ours_step,
}


def run(
    name: str, providers: Sequence[str], budget_s: float, console: Console
) -> tuple[list[Row], bool]:
    """Check and time a step of the model called `name`; return the rows, and whether all agreed."""
    work = MODELS[name]()
    work.model.eval()  # no dropout: a compiled one draws other numbers
    steps: dict[str, Step] = {}
    losses: dict[str, list[float]] = {}
    for provider in dict.fromkeys(("plain", *providers)):
        try:
            steps[provider] = PROVIDERS[provider](work)
        except Unavailable as reason:
            console.print(f"not timed: {provider}: {reason}", highlight=False)
            continue
        losses[provider] = [steps[provider]() for _ in range(CHECKED_STEPS)]
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
            "ms_median": round(ms.median, 3),
            "ms_p20": round(ms.p20, 3),
            "ms_p80": round(ms.p80, 3),
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
    add("--providers", type=_providers, default=list(PROVIDERS), metavar="NAME,...")
    add("--threads", type=arguments.positive(int), metavar="N", help="default: torch's choice")
    add("--seconds", type=arguments.positive(float), default=30.0, help="a model (default 30)")
    add("--json", type=arguments.writable, metavar="FILE", help="write the rows there")
    args = parser.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    header = make_header("cpu", f"python -m benchmarks.bench_model {shlex.join(argv)}".rstrip())
    console = wide_console()
    console.print(", ".join(f"{k} {v}" for k, v in header.items() if k != "command"))
    rows: list[Row] = []
    right = True
    for name in args.model or real:
        try:
            timed, agreed = run(name, args.providers, args.seconds, console)
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


def _adapted(work: Work, replace: Callable[[nn.Module, int, float], Any]) -> nn.Module:
    model = _frozen_copy(work.model)
    names = [n for n, module in model.named_modules() if isinstance(module, nn.Linear)]
    replace(model.get_submodule(work.adapted), RANK, ALPHA)
    for name, A, B in _adapters(work.model, names):
        layer = model.get_submodule(name)
        if hasattr(layer, "lora"):
            with torch.no_grad():
                layer.lora.A.copy_(A)
                layer.lora.B.copy_(B)
    return model


def _adapters(base: nn.Module, names: Sequence[str]):
    """Yield (name, A, B) by name: the same for all providers, B not zero."""
    for name in names:
        linear = base.get_submodule(name)
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        K, N = linear.in_features, linear.out_features
        A = torch.randn(K, RANK, generator=generator) / K**0.5
        yield name, A, torch.randn(RANK, N, generator=generator) / 30


def _difference(plain_losses: Sequence[float], losses: Sequence[float]) -> str | None:
    """Say how the losses differ by more than rounding; None if they don't."""
    bound = AGREE * max(1.0, *map(abs, plain_losses))
    if _largest(plain_losses, losses) <= bound:  # a NaN is not below it
        return None
    return f"losses {losses} are not the plain layer's {plain_losses}, bound {bound:.1e}"


def _largest(first: Sequence[float], second: Sequence[float]) -> float:
    gaps = [abs(a - b) for a, b in zip(first, second, strict=True)]
    return math.nan if any(map(math.isnan, gaps)) else max(gaps)


def _providers(text: str) -> list[str]:
    names = list(dict.fromkeys(text.split(",")))
    if unknown := [name for name in names if name not in PROVIDERS]:
        known = ", ".join(PROVIDERS)
        raise argparse.ArgumentTypeError(f"no provider {unknown[0]!r}, there are: {known}")
    return names


if __name__ == "__main__":
    sys.exit(main())
