"""Time one adapted linear layer, forward or forward and backward, next to its alternatives.

Each provider's results are first checked against an fp64 oracle; what is wrong is not timed.
"""

import argparse
import shlex
import sys
from collections.abc import Sequence
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress

from lora_ext import testing
from lora_ext.codes import FORMATS

from . import (
    DTYPES,
    GRIDS,
    MODES,
    Case,
    Shape,
    device_here,
    make_case,
    names_of,
    positive,
    random_shapes,
    shape,
    writable,
)
from .bases import Unavailable
from .providers import DEFAULT, PROVIDERS
from .report import compare, print_comparison, print_report, wide_console
from .runs import FLOOR, Row, earlier_run, make_header, make_row, write_json
from .step import Step
from .timing import measure, peak_mib, saved_mib

_SEED = 1  # of the masks that the gate checks with


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; return 0, or 1 if a provider is wrong or, with --compare, slower.

    An interrupt ends it with what it has, printed like a whole run, and 130.
    """
    argv = sys.argv[1:] if argv is None else argv
    args = _parse(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    header = make_header(args.device, f"python -m benchmarks.bench_linear {shlex.join(argv)}")
    header |= {
        name: value for name in ("dropout", "adapters", "base") if (value := getattr(args, name))
    }
    console = wide_console()
    console.print(", ".join(f"{k} {v}" for k, v in header.items() if k != "command"))
    rows, not_timed, cut = _run_all(args, header)
    title = f"{args.dtype} {args.mode} on {args.device}, threads {header['threads']}"
    print_report(console, rows, args.providers, title)
    for entry in not_timed:
        where = ",".join(str(entry[size]) for size in Shape._fields)
        text = f"not timed: {entry['provider']} at {where}: {entry['reason']}"
        console.print(text, style="red" if entry["failed"] else None, highlight=False)
    regressed = False
    if args.compare:
        changes = compare(args.compare["rows"], rows)
        print_comparison(console, changes, args.compare["header"], header)
        regressed = any(change.regressed for change in changes) or not changes
    if cut:
        done = len({tuple(row[size] for size in Shape._fields) for row in rows})
        console.print(f"cut after {done} of {len(args.shapes)} shapes", style="red")
        return 130
    return int(regressed or any(entry["failed"] for entry in not_timed))


def run_shape(
    shape: Shape,
    device: str,
    dtype: str,
    mode: str,
    providers: Sequence[str],
    budget_s: float,
    **options: Any,
) -> tuple[list[Row], list[Row]]:
    """Check, then time the providers at one shape; `options` are those of `make_case`.

    Returns:
        A row for each that was timed, and an entry with the reason for each that was not; its
        "failed" tells a wrong or broken provider from one that is not to be had here.

    """
    case = make_case(shape, device, DTYPES[dtype], mode, **options)
    not_timed: list[Row] = []

    def refuse(provider: str, reason: str, failed: bool = True) -> None:
        entry = {"provider": provider, **shape._asdict(), "reason": reason, "failed": failed}
        not_timed.append(entry)

    with torch.set_grad_enabled(case.training):
        gate = Gate(case)
        runs, more = {}, {}
        for name in providers:
            try:
                step, share = _checked(name, case, gate)
                runs[name] = step.run
                more[name] = peak_mib(step.run, device), saved_mib(step.run, step.held), share
            except Unavailable as reason:
                refuse(name, str(reason), failed=False)
            except Wrong as reason:
                refuse(name, f"wrong: {reason}")
            except Exception as error:  # of whatever kind: one provider does not end the run
                runs.pop(name, None)
                refuse(name, f"{type(error).__name__}: {error}".partition("\n")[0])
        del gate
        times, failed = measure(runs, device, budget_s)
    for name, reason in failed.items():
        refuse(name, reason)
    return [
        make_row(name, device, dtype, mode, shape, times[name], *more[name]) for name in times
    ], not_timed


def _checked(name: str, case: Case, gate: "Gate") -> tuple[Step, float]:
    """Build a provider's step and run it through the gate, twice: compilation ends in the first.

    Returns the step, and the largest of its errors as a share of what the rule allows.
    """
    step = PROVIDERS[name](case)
    return step, max(gate.check(step, lora=name != FLOOR) for _ in range(2))


class Wrong(Exception):
    """A provider's result is not the operation's; the message says which and by how much."""


class Gate:
    """The error rule of `lora_ext.testing`, held against the steps of one case."""

    def __init__(self, case: Case) -> None:
        self._case = case
        self._wanted: dict[bool, testing.Expected] = {}

    def check(self, step: Step, *, lora: bool = True) -> float:
        """Return the largest error over its limit; raise Wrong unless all keep the rule.

        Args:
            step: what is checked; under dropout with the mask that it draws from a fixed seed.
            lora: whether the low-rank part belongs to the result, or the base layer alone.

        """
        case, keep = self._case, None
        if case.dropout and lora:
            torch.manual_seed(_SEED)
            keep = step.mask(case)
            torch.manual_seed(_SEED)
        results = step.results()
        if keep is not None or lora not in self._wanted:
            inputs = {name: getattr(case, name) for name in (*testing.NAMES, "dy")}
            if not lora:
                inputs["B"] = torch.zeros_like(case.B)
            of = ("x", "A", "B") if case.training else ()
            scale = case.alpha / (1 - case.dropout)
            want = testing.expect(inputs | {"keep": keep}, scale, of, case.x.device)
            self._wanted[lora] = want
        if lines := testing.broken_rules(results, self._wanted[lora]):
            raise Wrong("; ".join(lines))
        return max(error.share for error in testing.errors(results, self._wanted[lora]))


def _run_all(args: argparse.Namespace, header: Row) -> tuple[list[Row], list[Row], bool]:
    """Run every shape until an interrupt; return rows, what was not timed, and whether one came.

    --json is written again after each, so that a run that is killed leaves it too.
    """
    rows: list[Row] = []
    not_timed: list[Row] = []
    try:
        _run_each(args, header, rows, not_timed)
    except KeyboardInterrupt:
        return rows, not_timed, True
    return rows, not_timed, False


def _run_each(args: argparse.Namespace, header: Row, rows: list[Row], not_timed: list[Row]) -> None:
    """Run every shape and add to the two lists after each."""
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=len(args.shapes))
        for shape in args.shapes:
            progress.update(task, description=str(shape))
            timed, refused = run_shape(
                shape,
                args.device,
                args.dtype,
                args.mode,
                args.providers,
                args.seconds,
                dropout=args.dropout,
                adapter_dtype=DTYPES[args.adapters or args.dtype],
                base=args.base or "plain",
            )
            rows += timed
            not_timed += refused
            if args.json:
                write_json(args.json, header, rows, not_timed)
            progress.advance(task)


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.bench_linear", description=__doc__.partition("\n")[0]
    )
    add = parser.add_argument
    add("--device", type=device_here, choices=tuple(GRIDS), default="cpu")
    add("--dtype", choices=tuple(DTYPES), default="fp32")
    add("--mode", choices=MODES, default="fwd", help="fwd runs without autograd (default)")
    add("--dropout", type=float, default=0.0, metavar="P", help="on the low-rank part (default 0)")
    add("--adapters", choices=("fp32",), help="dtype of A and B (default: that of the base)")
    add("--base", choices=FORMATS, help="a weight of codes, in bitsandbytes' linear (CPU)")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--grid", choices=tuple(GRIDS["cpu"]), default="standard")
    which.add_argument("--shape", type=shape, metavar="M,K,N,R", help="this shape alone")
    which.add_argument(
        "--random", type=positive(int), metavar="COUNT", help="shapes drawn by --seed"
    )
    add("--seed", type=int, default=0, help="of --random (default 0)")
    add("--last-first", action="store_true", help="the grid backwards, its largest shapes first")
    add(
        "--providers",
        type=names_of("provider", PROVIDERS),
        default=list(DEFAULT),
        metavar="NAME,...",
        help=f"of {', '.join(PROVIDERS)}; or all (default {','.join(DEFAULT)})",
    )
    number, seconds = positive(int), positive(float)
    add("--threads", type=number, metavar="N", help="CPU threads (default: torch's choice)")
    budget = "timing budget of a shape, over all providers (default 2)"
    add("--seconds", type=seconds, default=2.0, metavar="BUDGET", help=budget)
    add("--compare", type=earlier_run, metavar="OLD.json", help="exit 1 if a row got slower")
    add("--json", type=writable, metavar="FILE", help="write the rows there")
    args = parser.parse_args(argv)
    if args.device == "cuda" and args.base:
        parser.error("argument --base: codes are multiplied by on cpu")
    if not 0 <= args.dropout < 1:
        parser.error(f"argument --dropout: must be from 0 to below 1, got {args.dropout}")
    args.shapes = [args.shape] if args.shape else list(GRIDS[args.device][args.grid])
    if args.random:
        args.shapes = list(random_shapes(args.random, args.seed))
    if args.last_first:
        args.shapes.reverse()
    return args


if __name__ == "__main__":
    sys.exit(main())
