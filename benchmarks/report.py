"""What a run leaves: its JSON document, the table with the two ratios, the change since another."""

import argparse
import json
import math
import platform
import subprocess
from collections.abc import Iterable, Sequence
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table

from . import Shape, flops
from .timing import Times

Row = dict[str, Any]
OURS, FLOOR, PLAIN = "lora_ext", "linear", "reference"
LOSES = 0.97  # of the plain layer's speed: below it a shape is named as lost
SLOWER = 1.10  # a smaller change is not called a regression
_MORE = ("avx512_bf16", "avx512_fp16", "amx_bf16", "amx_fp16", "amx_int8")
_TABLE_PROVIDERS = 4  # side by side in one table of about 120 columns
_KEY = ("provider", "device", "dtype", "mode", "M", "K", "N", "R")
_NUMBERS = ("ms_median", "ms_p80")
_CONDITIONS = "torch triton device instruction_set threads dropout adapters".split()


def make_header(device: str, command: str) -> dict[str, Any]:
    """Return the conditions of a run: versions, machine, threads, commit, date, command."""
    return {
        "torch": torch.__version__,
        "triton": _version("triton"),
        "device": torch.cuda.get_device_name() if device == "cuda" else _cpu("model name"),
        "instruction_set": instruction_set(),
        "threads": torch.get_num_threads(),
        "commit": _commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": command,
    }


def make_row(
    provider: str,
    device: str,
    dtype: str,
    mode: str,
    shape: Shape,
    times: Times,
    peak_mib: float,
    saved_mib: float,
    share: float,
) -> Row:
    """Return one row: milliseconds, MiB, and TFLOP/s of the arithmetic that the result needs.

    `share` is the largest error over what the error rule allows.
    """
    work = flops(shape, mode, lora=provider != FLOOR)
    return {
        "provider": provider,
        "device": device,
        "dtype": dtype,
        "mode": mode,
        **shape._asdict(),
        "ms_median": round(times.median, 6),
        "ms_p20": round(times.p20, 6),
        "ms_p80": round(times.p80, 6),
        "peak_mib": round(peak_mib, 3),
        "saved_mib": round(saved_mib, 3),
        "tflops": round(work / times.median / 1e9, 6),
        "err_over_limit": round(share, 4),
    }


def write_json(path: Path, header: dict[str, Any], rows: list[Row], not_timed: list[Row]) -> None:
    """Write a run: "header", "rows", and "not_timed" (provider, shape, reason)."""
    document = {"header": header, "rows": rows, "not_timed": not_timed}
    path.write_text(json.dumps(document, indent=1) + "\n")


def earlier_run(path: str | Path) -> dict[str, Any]:
    """Read the file of an earlier run; it may be a command's argument.

    Raises:
        argparse.ArgumentTypeError: it can't be read, or is not such a file.

    """
    try:
        run = json.loads(Path(path).read_text())
        whole = isinstance(run["header"], dict) and all(
            all(key in row for key in _KEY) and all(row[key] > 0 for key in _NUMBERS)
            for row in run["rows"]
        )
    except OSError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    except (ValueError, KeyError, TypeError):
        whole = False
    if not whole:
        raise argparse.ArgumentTypeError(f"{path} is not a file that --json wrote")
    return run


def wide_console() -> Console:
    """Return a console that cuts no table short where the output is a file or a pipe."""
    console = Console()
    return console if console.is_terminal else Console(width=240)


def print_report(
    console: Console, rows: Sequence[Row], providers: Sequence[str], title: str
) -> None:
    """Print the table of a run, a line a shape, and the summary under it."""
    timed = [name for name in providers if any(row["provider"] == name for row in rows)]
    for first in range(0, len(timed), _TABLE_PROVIDERS):
        shown = timed[first : first + _TABLE_PROVIDERS]
        console.print(ratio_table(rows, shown, title if first == 0 else f"{title}, continued"))
    console.print("ms: median ± half of p20 to p80; MiB: peak of one call, results included")
    for line in summary(rows):
        console.print(line, highlight=False)


def ratio_table(rows: Sequence[Row], providers: Sequence[str], title: str) -> Table:
    """Lay out a line a shape: the two ratios, then time, spread and memory by provider."""
    table = Table(title=title, title_justify="left")
    table.add_column("M,K,N,R", no_wrap=True)
    table.add_column(f"{OURS}\n/ {FLOOR}", justify="right", style="bold")
    table.add_column(f"{PLAIN}\n/ {OURS}", justify="right", style="bold")
    for provider in providers:
        table.add_column(f"{provider}\nms", justify="right", no_wrap=True)
        table.add_column("\nMiB", justify="right", style="dim")
    for shape, cells in by_shape(rows).items():
        line = [str(shape), _times(ratio(cells, OURS, FLOOR)), _times(ratio(cells, PLAIN, OURS))]
        for provider in providers:
            line += _cells(cells.get(provider))
        table.add_row(*line)
    return table


def summary(rows: Sequence[Row]) -> list[str]:
    """Return the last lines: geometric means over the shapes, and the worst shape for us."""
    shapes = by_shape(rows)
    lines = []
    others = [p for p in dict.fromkeys(r["provider"] for r in rows) if p not in (OURS, FLOOR)]
    cells = list(shapes.values())
    if others and any(FLOOR in cell for cell in cells):
        shown = ", ".join(f"{p} {_mean(cells, p, FLOOR)}" for p in others)
        lines.append(f"geometric means over {FLOOR}: {shown}")
    ours, gain = _mean(cells, OURS, FLOOR), _mean(cells, PLAIN, OURS)
    lines.append(f"geometric means: {OURS} / {FLOOR} {ours}, {PLAIN} / {OURS} {gain}")
    kept = {p: sum(cell[p].get("saved_mib", 0) for cell in cells if p in cell) for p in others}
    if any(kept.values()):
        shown = ", ".join(f"{provider} {mib:.3g}" for provider, mib in kept.items())
        lines.append(f"kept for the backward beyond x and parameters, all shapes (MiB): {shown}")
    shares: dict[str, float] = {}
    for row in rows:
        if "err_over_limit" in row:
            shares[row["provider"]] = max(shares.get(row["provider"], 0), row["err_over_limit"])
    if shares:
        shown = ", ".join(f"{provider} {share:.2f}" for provider, share in shares.items())
        lines.append(f"largest error over its limit: {shown}")
    gains = {s: g for s, cells in shapes.items() if (g := ratio(cells, PLAIN, OURS))}
    if gains:
        worst = min(gains, key=gains.__getitem__)
        over = f"{OURS} / {FLOOR} {_times(ratio(shapes[worst], OURS, FLOOR))}"
        lines.append(f"worst shape: {worst}: {PLAIN} / {OURS} {_times(gains[worst])}, {over}")
    if losers := [f"{shape} ({gain:.2f})" for shape, gain in gains.items() if gain < LOSES]:
        lines.append(f"slower than {PLAIN} by more than 3 %: {', '.join(losers)}")
    return lines


def by_shape(rows: Iterable[Row]) -> dict[Shape, dict[str, Row]]:
    """Group the rows of one device, dtype and mode: shape -> provider -> row."""
    shapes: dict[Shape, dict[str, Row]] = {}
    for row in rows:
        shape = Shape(*(row[size] for size in Shape._fields))
        shapes.setdefault(shape, {})[row["provider"]] = row
    return shapes


def ratio(cells: dict[str, Row], over: str, under: str) -> float | None:
    """Return the ratio of two providers' median times at one shape, None unless both are there."""
    if over not in cells or under not in cells:
        return None
    return cells[over]["ms_median"] / cells[under]["ms_median"]


def geometric_mean(values: Sequence[float]) -> float | None:
    """Return the geometric mean of positive values, None of none."""
    return math.exp(math.fsum(map(math.log, values)) / len(values)) if values else None


class Change(NamedTuple):
    """One row in both runs; `ratio` is the new median time over the old one."""

    old: Row
    new: Row
    ratio: float

    @property
    def regressed(self) -> bool:
        """More than 10% slower, and outside what the old run's own spread (p80) explains."""
        return self.ratio > SLOWER and self.new["ms_median"] > self.old["ms_p80"]


def compare(old: Sequence[Row], new: Sequence[Row]) -> list[Change]:
    """Pair the rows of two runs by provider, device, dtype, mode and shape."""
    before = {_key(row): row for row in old}
    pairs = ((before[_key(row)], row) for row in new if _key(row) in before)
    return [Change(o, n, n["ms_median"] / o["ms_median"]) for o, n in pairs]


def drift_free(changes: Sequence[Change]) -> list[float | None]:
    """Return each change's ratio over that of `linear` at the same shape, None where it has none.

    `linear` is timed in the same rounds, so a machine that is slower as a whole cancels out. Shown
    next to the plain ratio and not part of the verdict.
    """
    floors = {_key(c.new)[1:]: c.ratio for c in changes if c.new["provider"] == FLOOR}
    under = (floors.get(_key(change.new)[1:]) for change in changes)
    return [c.ratio / floor if floor else None for c, floor in zip(changes, under, strict=True)]


def print_comparison(console: Console, changes: Sequence[Change], old: dict, new: dict) -> None:
    """Print a line a row that both runs have, what differs in their headers, and the verdict."""
    title = f"against commit {old.get('commit')} of {old.get('date')}"
    table = Table(title=title, title_justify="left")
    headings = ("provider", "M,K,N,R", "old ms", "new ms", "new / old", f"over {FLOOR}'s", "")
    for heading in headings:
        table.add_column(heading, justify="left" if heading in ("provider", "") else "right")
    for change, relative in zip(changes, drift_free(changes), strict=True):
        row = change.new
        table.add_row(
            row["provider"],
            ",".join(str(row[size]) for size in "MKNR"),
            f"{change.old['ms_median']:.3g}",
            f"{row['ms_median']:.3g}",
            f"{change.ratio:.2f}",
            "-" if relative is None else f"{relative:.2f}",
            "regression" if change.regressed else "",
            style="bold red" if change.regressed else None,
        )
    console.print(table)
    for key in _CONDITIONS:
        if old.get(key) != new.get(key):
            console.print(f"differs: {key} was {old.get(key)}, is {new.get(key)}", highlight=False)
    by_provider: dict[str, list[float]] = {}
    for change in changes:
        by_provider.setdefault(change.new["provider"], []).append(change.ratio)
    shown = ", ".join(f"{name} {geometric_mean(all_):.2f}" for name, all_ in by_provider.items())
    console.print(f"geometric means, new / old: {shown}", highlight=False)
    count = sum(change.regressed for change in changes)
    console.print(f"regressions: {count} of {len(changes)} rows", highlight=False)


def _key(row: Row) -> tuple:
    return tuple(row[key] for key in _KEY)


def _mean(shapes: Sequence[dict[str, Row]], over: str, under: str) -> str:
    """Show a geometric mean, and over how many shapes where that is not all of them."""
    ratios = [r for cells in shapes if (r := ratio(cells, over, under))]
    part = f" ({len(ratios)} of {len(shapes)} shapes)" if 0 < len(ratios) < len(shapes) else ""
    return _times(geometric_mean(ratios)) + part


def _times(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _cells(row: Row | None) -> list[str]:
    if row is None:
        return ["-", "-"]
    spread = 50 * (row["ms_p80"] - row["ms_p20"]) / row["ms_median"]
    return [f"{row['ms_median']:.3g} ±{spread:.0f}%", f"{row['peak_mib']:.1f}"]


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def instruction_set() -> str:
    """Return what PyTorch computes by on this CPU, and what the CPU has beyond that."""
    more = [flag for flag in _cpu("flags").split() if flag in _MORE]
    return " ".join([torch.backends.cpu.get_cpu_capability(), *sorted(more)])


def _cpu(field: str) -> str:
    """Return a field of /proc/cpuinfo; where there is none, the processor's name or ""."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    values = (line.partition(":")[2].strip() for line in lines if line.startswith(field))
    return next(values, platform.processor() if field == "model name" else "")


def _commit() -> str | None:
    """Return the commit of the code that ran, "-dirty" appended if files differ from it."""
    here = Path(__file__).parent
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    try:
        done = subprocess.run(command, cwd=here, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
