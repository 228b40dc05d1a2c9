"""Test and time lora_ext on a CUDA machine, in stages that each keep what they have.

Needs what the stages themselves need and no network; a stage whose tools are missing says so and
the others run. Under --out: gpu_check.json (each stage's outcome, written after each),
gpu_check.log (all output, the benchmarks' tables in it), and a JSON file for each benchmark.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any, NamedTuple

ROOT = Path(__file__).parents[2]
PROVIDERS = "linear,reference,compile,addmm,lora_ext,triton,cpp"
PROVIDERS += ",triton.in_loop,triton.two_launches,triton.decode,triton.torch_base"
STOP_S = 5.0  # from the interrupt, at which pytest still prints its summary, to the kill


class Stage(NamedTuple):
    """A command and the seconds it may take; `needs` is a module or a program to be there."""

    name: str
    limit_s: float
    command: list[str]
    needs: str = ""


def stages(out: Path) -> list[Stage]:
    """Return what is run, in order: 500 s at most."""
    python = [sys.executable, "-u"]
    pytest = [*python, "-m", "pytest", "-p", "no:cacheprovider", "-v"]
    workers = ["-n", "12"] if find_spec("xdist") else []
    suite = [f"tests/op/test_{name}.py" for name in ("backends", "backward", "extremes")]
    suite += ["--device", "cuda", *workers]
    cuda = [*pytest, "tests/gpu/test_cuda.py"]
    sanitizer = ["compute-sanitizer", "--error-exitcode", "1"]
    few = "test_every_regime and (two_launches or decode or cpp) and 300 and bfloat16"

    def bench(name: str, mode: str, seconds: str, providers: str) -> list[str]:
        command = [*python, "-m", "benchmarks.bench_linear", "--device", "cuda"]
        command += ["--dtype", "bf16", "--mode", mode, "--seconds", seconds]
        return [*command, "--providers", providers, "--json", str(out / f"cuda-bf16-{name}.json")]

    return [
        Stage("build", 60, [*python, "setup.py", "-q", "build_ext", "--inplace"], "pybind11"),
        Stage("report", 20, [*python, "-m", "lora_ext"]),
        Stage("cuda tests", 75, [*cuda, *workers], "pytest"),
        Stage("fwd", 105, bench("fwd", "fwd", "1.5", PROVIDERS), "rich"),
        Stage("fwd_bwd", 125, bench("fwd_bwd", "fwd_bwd", "2", PROVIDERS), "rich"),
        Stage("cpp suite", 35, [*pytest, *suite, "--backends", "cpp"], "pytest"),
        Stage("suite", 55, [*pytest, *suite, "-k", "not cpp"], "pytest"),
        Stage("sanitizer", 25, [*sanitizer, *cuda, "-k", few], "compute-sanitizer"),
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the stages; return 0 when each passed, was cut or could not be had here, else 1."""
    args = _parse(argv)
    import torch

    if not torch.cuda.is_available():
        built = torch.version.cuda or torch.version.hip
        why = f"torch {torch.__version__} finds none" if built else "this torch is for the CPU only"
        print(f"gpu-check: there is no CUDA device here ({why}); nothing was run")
        return 2
    args.out.mkdir(parents=True, exist_ok=True)
    plan = [s for s in stages(args.out.resolve()) if not args.stages or s.name in args.stages]
    with open(args.out / "gpu_check.log", "w") as log:
        outcomes = run_all(plan, log, args.out / "gpu_check.json", torch.cuda.get_device_name())
    return int(any(outcome["result"] == "failed" for outcome in outcomes))


def run_all(plan: Sequence[Stage], log: IO[str], summary: Path, device: str) -> list[dict]:
    """Run stages one after the other and write the summary after each.

    Returns:
        For each `stage`, `result` ("passed", "failed", "cut" at its limit, or "missing", what it
        needs), `seconds`, and `last`, the last line it printed.

    """
    outcomes: list[dict[str, Any]] = []
    for stage in plan:
        start = time.monotonic()
        if stage.needs and not (find_spec(stage.needs) or shutil.which(stage.needs)):
            result, last = "missing", f"{stage.needs} is not there"
        else:
            result, last = run_stage(stage, log)
        seconds = round(time.monotonic() - start, 1)
        outcomes.append({"stage": stage.name, "result": result, "seconds": seconds, "last": last})
        summary.write_text(json.dumps({"device": device, "stages": outcomes}, indent=1) + "\n")
        print(f"{stage.name:14} {result:7} {seconds:6.1f} s  {last}", flush=True)
    return outcomes


def run_stage(stage: Stage, log: IO[str]) -> tuple[str, str]:
    """Run one command within its limit; return its result and the last line that it printed."""
    print(f"\n$ {' '.join(stage.command)}", file=log, flush=True)
    began = log.tell()
    env = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "240"}
    # A session of its own, so that its workers end with it.
    process = subprocess.Popen(
        stage.command, cwd=ROOT, env=env, stdout=log, stderr=log, start_new_session=True
    )
    result = ""
    try:
        process.wait(stage.limit_s - STOP_S)
    except subprocess.TimeoutExpired:
        result = "cut"
        _stop(process)
    if not result:
        result = "failed" if process.returncode else "passed"
    log.flush()
    with open(log.name) as written:
        written.seek(began)
        lines = [line.strip() for line in written if line.strip()]
    return result, lines[-1][-120:] if lines else ""


def _stop(process: subprocess.Popen) -> None:
    """Interrupt a command and all it started, then kill what is left after STOP_S seconds."""
    os.killpg(process.pid, signal.SIGINT)
    try:
        process.wait(STOP_S)
    except subprocess.TimeoutExpired:
        pass
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:  # all gone
        pass
    process.wait()


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.gpu.gpu_check", description=__doc__.partition("\n")[0]
    )
    names = [stage.name for stage in stages(Path())]
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", metavar="DIR")
    parser.add_argument(
        "--stages",
        type=lambda text: text.split(","),
        metavar="NAME,...",
        help=f"these alone, of: {', '.join(names)}",
    )
    args = parser.parse_args(argv)
    if unknown := set(args.stages or ()) - set(names):
        parser.error(f"argument --stages: no stage {min(unknown)!r}, there are: {', '.join(names)}")
    return args


if __name__ == "__main__":
    sys.exit(main())
