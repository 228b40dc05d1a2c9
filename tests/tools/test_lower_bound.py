"""The lower bound of a CPU run: what it is computed from, and what it refuses."""

import json

import pytest
import torch

from benchmarks import Shape, lower_bound

SHAPE = Shape(64, 32, 48, 4)


@pytest.fixture
def run_file(tmp_path):
    """Write a run of one shape: linear 2 ms, reference 4, ours 3."""
    times = {"linear": 2.0, "reference": 4.0, "lora_ext": 3.0}
    rows = [
        {"provider": name, "device": "cpu", "dtype": "fp32", "mode": "fwd", **SHAPE._asdict()}
        | {"ms_median": ms, "ms_p20": ms, "ms_p80": ms, "peak_mib": 0.0, "tflops": 0.0}
        for name, ms in times.items()
    ]
    header = {"threads": 1, "command": "a command", "device": "a CPU", "torch": "2"}
    path = tmp_path / "run.json"
    path.write_text(json.dumps({"header": header, "rows": rows, "not_timed": []}))
    return path


def test_the_bound_is_the_longer_of_flops_and_bytes():
    reads = {32 * 48 * 4: 1e-3}  # GB/s
    flops = 2 * 64 * 32 * 48 + 2 * 64 * 4 * (32 + 48)
    by_flops = lower_bound.bound_ms(SHAPE, "fwd", torch.float32, 1e-3, reads, host=0.25)
    assert by_flops == pytest.approx(flops / 1e-3 / 1e6 + 0.25)
    by_bytes = lower_bound.bound_ms(SHAPE, "fwd_bwd", torch.float32, 1e9, reads, host=0)
    assert by_bytes == pytest.approx(2 * 32 * 48 * 4 / 1e-3 / 1e6)


def test_table_has_the_ratios_of_the_run(run_file, capsys, monkeypatch):
    threads = torch.get_num_threads()
    monkeypatch.setattr(lower_bound, "gemm_gflops", lambda *_: 1e-3)
    monkeypatch.setattr(lower_bound, "read_gbs", lambda *_: 1e9)
    monkeypatch.setattr(lower_bound, "host_ms", lambda *_: 5.0)
    assert lower_bound.main([str(run_file)]) == 0
    torch.set_num_threads(threads)
    line = next(line for line in capsys.readouterr().out.splitlines() if "64,32,48,4" in line)
    cells = [cell.strip() for cell in line.strip("│ ").split("│")]
    bound_ms = (2 * 64 * 32 * 48 + 2 * 64 * 4 * 80) / 1e3 + 5
    want = [4 / bound_ms, 4 / 3, bound_ms / 2, 3 / 2, 3 / bound_ms]
    assert cells[1] == f"{bound_ms:.3g}"
    assert cells[2:] == [f"{ratio:.2f}" for ratio in want]


def test_rates_are_of_this_machine():
    assert 0.01 < lower_bound.gemm_gflops(torch.float32, 0.01) < 1e5
    assert 0.01 < lower_bound.read_gbs(2**20, 0.01) < 1e5
    assert 0 < lower_bound.host_ms("fwd", 0.01) < lower_bound.host_ms("fwd_bwd", 0.01) < 100


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"device": "cuda"}, "FILE must be a run on a CPU, got one on cuda"),
        ({"provider": "peft"}, "FILE must have the providers linear, reference and lora_ext"),
    ],
    ids=["cuda", "no-linear"],
)
def test_a_run_that_does_not_fit_is_named(run_file, capsys, change, message):
    run = json.loads(run_file.read_text())
    run["rows"][0] |= change
    run_file.write_text(json.dumps(run))
    with pytest.raises(SystemExit):
        lower_bound.main([str(run_file)])
    assert message in capsys.readouterr().err
