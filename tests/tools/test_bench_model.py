"""The benchmark of whole steps: same losses or no time, and every provider on the same adapters."""

import json

import pytest
import torch

from benchmarks import bench_model
from lora_ext import testing


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_losses_agree_and_the_rows_are_written(tmp_path, capsys):
    file = tmp_path / "model.json"
    arguments = ["--model", "tiny", "--providers", "plain,lora_ext", "--seconds", "0.1"]
    assert bench_model.main([*arguments, "--json", str(file)]) == 0
    rows = json.loads(file.read_text())["rows"]
    assert [row["provider"] for row in rows] == ["plain", "lora_ext"]
    for row in rows:
        assert row["tokens_per_s"] == pytest.approx(8e3 / row["ms_median"], rel=1e-2)
        assert row["loss_difference"] < 1e-6
    assert "tiny, float32" in capsys.readouterr().out


def test_every_provider_trains_the_plain_layers_adapters():
    pytest.importorskip("peft")
    work = bench_model.MODELS["tiny"]()
    losses = {}
    for name, build in bench_model.PROVIDERS.items():
        if name != "compile":  # seconds of compiling
            step = build(work)
            assert sum(p.numel() for p in step.trainable) == 2 * 8 * (32 + 64)
            losses[name] = [step() for _ in range(5)]
    for name in losses:
        assert losses[name] == pytest.approx(losses["plain"], rel=1e-6), name
    base = work.loss(work.model).item()
    assert abs(losses["plain"][0] - base) > 1e-3  # the low-rank part counts from the first step


def test_a_provider_with_another_alpha_gets_no_time(monkeypatch, capsys):
    def replace(model, rank, alpha):
        testing.replace_linear_with_lora(model, rank, 1.01 * alpha)

    monkeypatch.setitem(bench_model.PROVIDERS, "wrong", bench_model.with_lora(replace))
    arguments = ["--model", "tiny", "--providers", "plain,wrong", "--seconds", "0.1"]
    assert bench_model.main(arguments) == 1
    out = capsys.readouterr().out
    assert "not timed: wrong: losses" in out
    assert "│ wrong" not in out


def test_a_nan_is_no_agreement():
    assert bench_model._difference([1.0, 2.0], [1.0, float("nan")])
    assert bench_model._difference([1.0, 2.0], [1.0, 2.0 + 1e-3])
    assert bench_model._difference([1.0, 2.0], [1.0, 2.0 + 1e-6]) is None


def test_bad_arguments_are_named(capsys):
    with pytest.raises(SystemExit):
        bench_model.main(["--providers", "plain,fast"])
    assert "no provider 'fast'" in capsys.readouterr().err
