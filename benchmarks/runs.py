"""A run's JSON document: its conditions, a row for each provider and shape, what was not timed."""

import argparse
import json
import platform
import subprocess
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from . import Shape, flops
from .timing import Times

Row = dict[str, Any]
FLOOR = "linear"  # the provider of the base layer alone
KEY = ("provider", "device", "dtype", "mode", "M", "K", "N", "R")
_NUMBERS = ("ms_median", "ms_p80")
_MORE = ("avx512_bf16", "avx512_fp16", "amx_bf16", "amx_fp16", "amx_int8")


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
            all(key in row for key in KEY) and all(row[key] > 0 for key in _NUMBERS)
            for row in run["rows"]
        )
    except OSError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    except (ValueError, KeyError, TypeError):
        whole = False
    if not whole:
        raise argparse.ArgumentTypeError(f"{path} is not a file that --json wrote")
    return run


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
