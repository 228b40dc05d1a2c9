"""Host time of one small call, by layer of the stack: where the microseconds beside a kernel go.

Each line does what the one above it does and adds its own layer: dispatch of an operator that gets
no rows (its check of the arguments and its results included), kernel, autograd Function, functional
call, module.
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

import lora_ext
from lora_ext import functional
from lora_ext.backends import choose
from lora_ext.backends.cpp import _BWD, _FWD

from . import arguments
from .cases import Case, make_case
from .grids import Shape
from .providers import PROVIDERS
from .report import make_header, wide_console
from .timing import Run, cpu_timer, interleave, summarize

PEERS = ("F.linear", "plain layer")
SMALL = Shape(1, 64, 64, 8)  # 17,000 operations, 0.3 us: what is measured is not arithmetic
_NEEDS = (True, False, False, True, True)


def calls(case: Case) -> dict[str, Run]:
    """Return a call by name: the peers, then the layers of the stack from the inside out."""
    runs = {
        "F.linear": PROVIDERS["linear"](case).run,
        "plain layer": PROVIDERS["reference"](case).run,
        "dispatch": _operators(case, rows=0),
        "kernel": _operators(case, rows=case.shape.M),
    }
    if case.training:
        name = choose(None, case.x, case.weight, case.A)
        runs["Function"] = _step(case, lambda *t: functional._LoRALinear.apply(*t, name, None))
    runs["functional"] = _step(case, lora_ext.lora_linear)
    return runs | {"module": PROVIDERS["lora_ext"](case).run}


def _operators(case: Case, rows: int) -> Run:
    x, dy = case.x.detach()[:rows], case.dy[:rows]
    weight, bias, alpha = case.weight, case.bias, case.alpha
    A, B = case.A.detach(), case.B.detach()
    h = x @ A
    if not case.training:
        return lambda: _FWD(x, weight, bias, A, B, alpha)

    @torch.no_grad()
    def both() -> None:
        _FWD(x, weight, bias, A, B, alpha)
        _BWD(dy, x, weight, A, B, h, alpha, _NEEDS)

    return both


def _step(case: Case, linear: Callable[..., Tensor]) -> Run:
    x, A, B, dy = case.x, case.A, case.B, case.dy
    tensors = (x, case.weight, case.bias, A, B, case.alpha)
    if not case.training:
        return lambda: linear(*tensors)
    return lambda: torch.autograd.grad(linear(*tensors), (x, A, B), dy)


def measure(shape: Shape, mode: str, budget_s: float) -> list[dict[str, Any]]:
    """Time the calls of one mode, interleaved; a row each, in microseconds.

    Args:
        shape: sizes of the call, float32.
        mode: "fwd" or "fwd_bwd".
        budget_s: seconds to spend.

    """
    case = make_case(shape, "cpu", torch.float32, mode)
    with torch.set_grad_enabled(case.training):
        samples = interleave({n: cpu_timer(run) for n, run in calls(case).items()}, budget_s)
    times = {name: summarize(values)._asdict() for name, values in samples.items()}
    return [
        {"mode": mode, **shape._asdict(), "layer": name}
        | {f"us_{key}": round(1e3 * ms, 2) for key, ms in by.items()}
        for name, by in times.items()
    ]


def table(rows: Sequence[dict[str, Any]], title: str) -> Table:
    """Lay out the rows of a mode; "added" is what a layer of the stack adds to the one inside."""
    lines = Table(title=title, title_justify="left")
    for heading in ("", "us", "p20 to p80", "added"):
        lines.add_column(heading, justify="right" if heading else "left", no_wrap=True)
    inside = None
    for row in rows:
        own = "" if inside is None else f"{row['us_median'] - inside:+.1f}"
        spread = f"{row['us_p20']:.1f} to {row['us_p80']:.1f}"
        lines.add_row(row["layer"], f"{row['us_median']:.1f}", spread, own)
        inside = None if row["layer"] in PEERS else row["us_median"]
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    """Print, and with --json write, microseconds by layer of the stack, for both modes."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.bench_overhead", description=__doc__.partition("\n")[0]
    )
    add = parser.add_argument
    add("--shape", type=arguments.shape, default=SMALL, metavar="M,K,N,R")
    add("--seconds", type=arguments.positive(float), default=5.0, help="of each mode (default 5)")
    add("--json", type=arguments.writable, metavar="FILE", help="write the rows there")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    header = make_header("cpu", "python -m benchmarks.bench_overhead")
    console, rows = wide_console(), []
    console.print(", ".join(f"{k} {v}" for k, v in header.items() if k != "command"))
    for mode in ("fwd", "fwd_bwd"):
        measured = measure(args.shape, mode, args.seconds)
        rows += measured
        console.print(table(measured, f"{mode} {args.shape} float32, us a call"))
    if args.json:
        args.json.write_text(json.dumps({"header": header, "rows": rows}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
