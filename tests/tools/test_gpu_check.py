"""The driver of gpu-check: limits, what a cut stage keeps, what is missing."""

import importlib.util
import json
import os
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path

import pytest
import torch

from tests.gpu import gpu_check
from tests.gpu.gpu_check import ROOT, Stage


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_check, "STOP_S", 0.5)

    def run(*plan: Stage) -> list[dict]:
        with open(tmp_path / "log", "w") as log:
            outcomes = gpu_check.run_all(plan, log, tmp_path / "summary.json", "Some GPU")
        assert json.loads((tmp_path / "summary.json").read_text())["stages"] == outcomes
        return outcomes

    return run


def python(code: str) -> list[str]:
    return [sys.executable, "-u", "-c", code]


def test_results_and_last_lines(run):
    outcomes = run(
        Stage("good", 20, python("print('one'); print('two')")),
        Stage("bad", 20, python("print('three'); raise SystemExit(3)")),
        Stage("none", 20, ["no"], needs="no_such_tool"),
        Stage("after", 20, python("print('four')")),
    )
    assert [(o["stage"], o["result"], o["last"]) for o in outcomes] == [
        ("good", "passed", "two"),
        ("bad", "failed", "three"),
        ("none", "missing", "no_such_tool is not there"),
        ("after", "passed", "four"),
    ]


def test_a_stage_is_cut_at_its_limit_with_all_it_started(run, tmp_path):
    """One that would catch the interrupt, and whose child would write on after it."""
    child = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(3)"
    child += f"; open({str(tmp_path / 'late')!r}, 'w')"
    code = f"""
import signal, subprocess, sys, time
signal.signal(signal.SIGINT, lambda *_: print("interrupted", flush=True))
subprocess.Popen([sys.executable, "-c", {child!r}], stderr=subprocess.DEVNULL)
print("kept", flush=True)
while True: time.sleep(60)
"""
    start = time.monotonic()
    (outcome,) = run(Stage("endless", 2.5, python(code)))
    assert outcome["result"] == "cut" and outcome["last"] == "interrupted"
    assert time.monotonic() - start < 10
    assert "kept" in (tmp_path / "log").read_text()
    time.sleep(max(0.0, start + 4 - time.monotonic()))
    assert not (tmp_path / "late").exists()


def test_all_stages_together_end_within_nine_minutes(tmp_path):
    plan = gpu_check.stages(tmp_path)
    assert sum(stage.limit_s for stage in plan) < 9 * 60
    rehearsed = gpu_check.stages(tmp_path, True)
    assert [(s.name, s.limit_s, s.needs) for s in rehearsed] == [
        (s.name, s.limit_s, s.needs) for s in plan
    ]


@pytest.mark.parametrize("stage", gpu_check.stages(Path("out")), ids=lambda stage: stage.name)
def test_a_benchmarks_options_are_known_to_it(stage, monkeypatch):
    """Those of the device's own plan, which a rehearsal changes."""
    at = next((i for i, word in enumerate(stage.command) if word.startswith("benchmarks.")), None)
    if at is None:
        pytest.skip("no benchmark")
    module = import_module(stage.command[at])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.chdir(ROOT)
    asked = [word.replace("out/", "benchmarks/") for word in stage.command[at + 1 :]]
    args = module._parse(asked)
    assert args.device == "cuda"


@pytest.fixture
def run_forked():
    """Run a stage as gpu_check does, a module of Python in a fork of one process."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.gpu.forked"],
        cwd=ROOT,
        env=os.environ | gpu_check.REHEARSED,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    run_stage = gpu_check.run_stage

    def run(stage, log, more) -> tuple[str, str]:
        if stage.command[:3] != [*gpu_check.PYTHON, "-m"]:
            return run_stage(stage, log, more)
        print(json.dumps([stage.command[3:], log.name]), file=process.stdin, flush=True)
        return "passed" if process.stdout.readline() == "0\n" else "failed", ""

    yield run
    process.communicate()


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="its kernels run in the interpreter"
)
def test_the_whole_plan_runs_in_a_rehearsal(run_forked, tmp_path, monkeypatch):
    """Every command starts, takes its options and ends; what profiles runs its command alone."""
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("ncu", "compute-sanitizer"):
        tool = tools / name
        tool.write_text('#!/bin/sh\nwhile [ "${1##*/}" != "$PYTHON" ]; do shift; done; exec "$@"\n')
        tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("PYTHON", Path(sys.executable).name)
    plan = [s._replace(limit_s=600) for s in gpu_check.stages(tmp_path, True)]
    monkeypatch.setattr(gpu_check, "run_stage", run_forked)
    with open(tmp_path / "log", "a") as log:  # to which the forks append
        summary = tmp_path / "summary.json"
        outcomes = gpu_check.run_all(plan, log, summary, "none", gpu_check.REHEARSED)
    said = (tmp_path / "log").read_text()
    bad = [o for o in outcomes if o["result"] != "passed"]
    assert not bad, said
    files = {path.name for path in tmp_path.glob("*.json")} - {"summary.json"}
    named = ("ladder", "steps", *(f"cuda-bf16-{n}" for n in ("fwd", "fwd_bwd", "compile")))
    assert files == {f"{name}.json" for name in named}
    ladder = json.loads((tmp_path / "ladder.json").read_text())["rows"]
    rungs = [row["rung"] for row in ladder if "rung" in row]
    assert "F.linear" in rungs and "two_launches: our GEMM, no LoRA" in rungs
    steps = json.loads((tmp_path / "steps.json").read_text())["rows"]
    assert {row["provider"] for row in steps if "us" in row} >= {"linear", "triton.in_loop"}
    assert "largest error over its limit" in said and "geometric means" in said


@pytest.mark.slow
def test_an_interrupted_benchmark_prints_what_it_has(run, tmp_path):
    """The signal of a stage that is cut, at the second shape."""
    code = """
import os, signal, sys, time
from benchmarks import bench_linear
run_shape, seen = bench_linear.run_shape, []
def interrupted(shape, *rest, **options):
    seen.append(shape)
    if len(seen) == 2:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(600)
    return run_shape(shape, *rest, **options)
bench_linear.run_shape = interrupted
sys.exit(bench_linear.main(["--grid", "quick", "--device", "cpu", "--seconds", "0.1"]))
"""
    (outcome,) = run(Stage("long", 300, python(code)))
    assert outcome["last"] == "cut after 1 of 3 shapes"
    assert "geometric means: lora_ext / linear" in (tmp_path / "log").read_text()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_device_it_says_so_and_runs_nothing(capsys, tmp_path):
    assert gpu_check.main(["--out", str(tmp_path / "out")]) == 2
    assert "there is no CUDA device here" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


def test_unknown_stage_is_refused_by_name(capsys):
    with pytest.raises(SystemExit):
        gpu_check.main(["--stages", "fwd,nothing"])
    assert "no stage 'nothing', there are: ladder," in capsys.readouterr().err
