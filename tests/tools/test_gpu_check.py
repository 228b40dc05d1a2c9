"""The driver of gpu-check: limits, what a cut stage keeps, what is missing."""

import json
import sys
import time

import pytest
import torch

from tests.gpu import gpu_check
from tests.gpu.gpu_check import Stage


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
    assert sum(stage.limit_s for stage in gpu_check.stages(tmp_path)) < 9 * 60


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_device_it_says_so_and_runs_nothing(capsys, tmp_path):
    assert gpu_check.main(["--out", str(tmp_path / "out")]) == 2
    assert "there is no CUDA device here" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


def test_unknown_stage_is_refused_by_name(capsys):
    with pytest.raises(SystemExit):
        gpu_check.main(["--stages", "fwd,nothing"])
    assert "no stage 'nothing', there are: build," in capsys.readouterr().err
