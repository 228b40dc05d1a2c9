"""What a run leaves: the JSON document, and the table that leads with the two ratios."""

import json
import math
import platform
import subprocess
from collections.abc import Iterable, Sequence
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from .cases import flops
from .grids import Shape
from .timing import Times

Row = dict[str, Any]
OURS, FLOOR, PLAIN = "lora_ext", "linear", "reference"
LOSES = 0.97  # of the plain layer's speed: below it a shape is named as lost
_TABLE_PROVIDERS = 4  # side by side in one table of about 120 columns


def make_header(device: str, command: str) -> dict[str, Any]:
    """Return the conditions of a run: versions, machine, threads, commit, date, command."""
    return {
        "torch": torch.__version__,
        "triton": _version("triton"),
        "device": torch.cuda.get_device_name() if device == "cuda" else _cpu_name(),
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
) -> Row:
    """Return one row: milliseconds, MiB, and TFLOP/s of the arithmetic that the result needs."""
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
    }


def write_json(path: Path, header: dict[str, Any], rows: list[Row], not_timed: list[Row]) -> None:
    """Write a run: "header", "rows", and "not_timed" (provider, shape, reason)."""
    document = {"header": header, "rows": rows, "not_timed": not_timed}
    path.write_text(json.dumps(document, indent=1) + "\n")


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
    gains = {s: g for s, cells in shapes.items() if (g := ratio(cells, PLAIN, OURS))}
    if gains:
        worst = min(gains, key=gains.__getitem__)
        floor = _times(ratio(shapes[worst], OURS, FLOOR))
        lines.append(
            f"worst shape: {worst}: {PLAIN} / {OURS} {_times(gains[worst])}, "
            f"{OURS} / {FLOOR} {floor}"
        )
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


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def _commit() -> str | None:
    """Return the commit of the code that ran, "-dirty" appended if files differ from it."""
    here = Path(__file__).parent
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    try:
        done = subprocess.run(command, cwd=here, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
