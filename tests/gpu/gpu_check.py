"""Test and time lora_ext on a CUDA machine, in stages that each keep what they have.

The first stages tell most: what the card reaches, where a forward's time goes, then tests, then the
grid. Needs what the stages themselves need and no network; a stage whose tools are missing says so
and the others run. Under --out: gpu_check.json (each stage's outcome, written after each),
gpu_check.log (all output, the benchmarks' tables in it), and JSON files of the benchmarks.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any, NamedTuple

from lora_ext.backends.triton.regimes import REGIMES

ROOT = Path(__file__).parents[2]
PYTHON = [sys.executable, "-u"]
ALL = "linear,reference,addmm,lora_ext,cpp,cpp.own_base"
ALL += "".join(f",triton.{name}" for name in REGIMES["forward"] if name not in ("addmm", "plain"))
FEW, COMPILED = "linear,reference,lora_ext", "linear,compile,lora_ext"
LARGE = "8192,4096,4096,16"
SUITES = [f"tests/op/test_{name}.py" for name in ("backends", "backward", "extremes")]
STACKS = [
    f"tests/stacks/test_{name}.py" for name in ("compile", "amp", "checkpointing", "transforms")
]
SANITIZER = ["compute-sanitizer", "--error-exitcode", "1"]
# Each kernel of ours once: those of one forward and one backward.
NCU = "ncu --target-processes all -k regex:lora_ --launch-count 1 --filter-mode per-launch-config"
NCU = [*NCU.split(), "--section=SpeedOfLight", "--section=Occupancy", "--section=WarpStateStats"]
STOP_S = 5.0  # from the interrupt, at which pytest still prints its summary, to the kill
# A rehearsal's: one small shape on the CPU, Triton's kernels in its interpreter.
REHEARSED = {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
REPAIRED = "tests.gpu.rehearsed"
TINY = "16,32,32,4"
INTERPRETED = "linear,reference,lora_ext,triton.in_loop"  # the interpreter takes seconds a regime


class Stage(NamedTuple):
    """A command and the seconds it may take; `needs` is a module or a program to be there."""

    name: str
    limit_s: float
    command: list[str]
    needs: str = ""


class Commands(NamedTuple):
    """The stages' command lines; `small` takes the place of a benchmark's sizes in a rehearsal."""

    out: Path
    rehearsal: bool

    def bench(self, module: str, *arguments: str, small: Sequence[str] = ()) -> list[str]:
        """Return a benchmark's."""
        module = f"benchmarks.{module}"
        if self.rehearsal:
            return [*PYTHON, "-m", REPAIRED, module, "--device", "cpu", *arguments, *small]
        return [*PYTHON, "-m", module, "--device", "cuda", *arguments]

    def linear(self, mode: str, providers: str, *arguments: str) -> list[str]:
        """Return that of bench_linear: over the grid, where `arguments` do not say otherwise."""
        small = ("--shape", TINY, "--seconds", "0.01")
        which = ("--dtype", "bf16", "--mode", mode, "--providers", providers)
        if self.rehearsal:  # which takes one shape, and it once
            which = tuple({ALL: INTERPRETED}.get(word, word) for word in which)
            named = arguments.index("--shape") if "--shape" in arguments else len(arguments)
            arguments = (*arguments[:named], *arguments[named + 2 :])
        return self.bench("bench_linear", *which, *arguments, small=small)

    def json(self, name: str) -> tuple[str, str]:
        """Return the option that names a benchmark's file."""
        return "--json", str(self.out / f"{name}.json")

    def pytest(self, *arguments: str, workers: bool = True) -> list[str]:
        """Return that of tests: those of a GPU are collected in a rehearsal, and not run."""
        command = [*PYTHON, "-m", "pytest", "-p", "no:cacheprovider", *arguments]
        if self.rehearsal:
            return [*command, "--collect-only", "-q"]
        return [*command, "-v", *(["-n", "12"] if workers and find_spec("xdist") else [])]


def stages(out: Path, rehearsal: bool = False) -> list[Stage]:
    """Return what is run, in order: 9 minutes at most.

    A rehearsal has the same stages and no GPU: it times one small shape on the CPU, collects the
    tests that a GPU would run, and reads the build's options.
    """
    c = Commands(out, rehearsal)
    on = ("--device", "cpu" if rehearsal else "cuda")
    one, small = ("--shape", LARGE), ("--shape", TINY, "--small", TINY, "--calls", "1")
    some = ("--providers", INTERPRETED)
    build = [
        *PYTHON,
        "setup.py",
        "-q",
        "build_ext",
        "--inplace",
        *(["--help"] if rehearsal else []),
    ]
    # The report's self-test has bfloat16 too, which the interpreter multiplies wrongly.
    compiled = ["env", "-u", "TRITON_INTERPRET"] if rehearsal else []
    launches = ("--parts", "host", "--calls", "1", "--providers", "triton.two_launches")
    launches = (*launches, "--small", LARGE)
    cuda = "tests/gpu/test_cuda.py"
    few = "test_every_regime and (two_launches or decode or cpp) and 300 and bfloat16"
    bfloat16 = [c.json(f"cuda-bf16-{name}") for name in ("fwd", "fwd_bwd", "compile")]
    tiny = ("--shape", TINY, "--seconds", "0.01")
    return [
        Stage("ladder", 70, c.bench("gpu.ladder", *c.json("ladder"), small=tiny), "triton"),
        Stage("steps", 60, c.bench("gpu.steps", *c.json("steps"), small=(*small, *some))),
        Stage("build", 55, build, "pybind11"),
        Stage("report", 15, [*compiled, *PYTHON, "-m", "lora_ext"]),
        Stage("cuda tests", 50, c.pytest(cuda), "pytest"),
        Stage("stacks", 35, c.pytest(*STACKS, *on), "pytest"),
        Stage("fwd", 45, c.linear("fwd", ALL, "--seconds", "0.6", *bfloat16[0]), "rich"),
        Stage("fwd_bwd", 55, c.linear("fwd_bwd", ALL, "--seconds", "0.8", *bfloat16[1]), "rich"),
        Stage("adapters", 15, c.linear("fwd_bwd", FEW, "--adapters", "fp32", *one), "rich"),
        Stage("dropout", 15, c.linear("fwd_bwd", FEW, "--dropout", "0.1", *one), "rich"),
        Stage("compile", 35, c.linear("fwd_bwd", COMPILED, *bfloat16[2]), "rich"),
        Stage("suite", 35, c.pytest(*SUITES, *on), "pytest"),
        Stage("tuning", 10, c.bench("gpu.tuned", *c.json("tuning")), "triton"),
        Stage(
            "sanitizer", 20, [*SANITIZER, *c.pytest(cuda, "-k", few, workers=False)], SANITIZER[0]
        ),
        Stage("ncu", 20, [*NCU, *c.bench("gpu.steps", *launches, small=small)], NCU[0]),
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the stages; return 0 when each passed, was cut or could not be had here, else 1."""
    args = _parse(argv)
    import torch

    if args.rehearse:
        device = "no GPU: a rehearsal"
    elif torch.cuda.is_available():
        device = torch.cuda.get_device_name()
        capability = ".".join(map(str, torch.cuda.get_device_capability()))
        os.environ.setdefault(
            "TORCH_CUDA_ARCH_LIST", capability
        )  # the others' code would take time
    else:
        built = torch.version.cuda or torch.version.hip
        why = f"torch {torch.__version__} finds none" if built else "this torch is for the CPU only"
        print(f"gpu-check: there is no CUDA device here ({why}); nothing was run")
        return 2
    args.out.mkdir(parents=True, exist_ok=True)
    plan = stages(args.out.resolve(), args.rehearse)
    plan = [stage for stage in plan if not args.stages or stage.name in args.stages]
    more = REHEARSED if args.rehearse else {}
    with open(args.out / "gpu_check.log", "w") as log:
        outcomes = run_all(plan, log, args.out / "gpu_check.json", device, more)
    return int(any(outcome["result"] == "failed" for outcome in outcomes))


def run_all(
    plan: Sequence[Stage],
    log: IO[str],
    summary: Path,
    device: str,
    more: Mapping[str, str] | None = None,
) -> list[dict]:
    """Run stages one after the other, `more` in their environment; write the summary after each.

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
            result, last = run_stage(stage, log, more or {})
        seconds = round(time.monotonic() - start, 1)
        outcomes.append({"stage": stage.name, "result": result, "seconds": seconds, "last": last})
        summary.write_text(json.dumps({"device": device, "stages": outcomes}, indent=1) + "\n")
        print(f"{stage.name:14} {result:7} {seconds:6.1f} s  {last}", flush=True)
    return outcomes


def run_stage(stage: Stage, log: IO[str], more: Mapping[str, str]) -> tuple[str, str]:
    """Run one command within its limit; return its result and the last line that it printed."""
    print(f"\n$ {' '.join(stage.command)}", file=log, flush=True)
    began = log.tell()
    env = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "240"} | more
    # A session of its own, so that its workers end with it. Under `nohup ... &` an interrupt is
    # ignored, and so it would be in what is started there.
    process = subprocess.Popen(
        stage.command,
        cwd=ROOT,
        env=env,
        stdout=log,
        stderr=log,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
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
    rehearse = "without a GPU: run every stage's command on the CPU, one small shape, no test"
    parser.add_argument("--rehearse", action="store_true", help=rehearse)
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
