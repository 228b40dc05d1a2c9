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


def test_under_dropout_every_provider_is_held_under_the_plain_layers_masks(capsys):
    pytest.importorskip("peft")
    providers = "plain,peft,accelerated,lora_ext"
    arguments = ["--model", "tiny", "--providers", providers, "--seconds", "0.1"]
    assert bench_model.main([*arguments, "--dropout", "0.4"]) == 0
    out = capsys.readouterr().out
    assert all(f"│ {name} " in out for name in providers.split(","))
    work = bench_model.MODELS["tiny"]()
    runs = {}
    for name in providers.split(","):
        step = bench_model.PROVIDERS[name](work, 0.4)
        for draw in ("plain's", "own"):
            torch.manual_seed(2)
            runs[name, draw] = [step() for _ in range(3)]
            step.draw_by_hash()
    for name in providers.split(","):
        assert runs[name, "plain's"] == pytest.approx(runs["plain", "plain's"], rel=1e-6), name
    assert runs["plain", "plain's"] != pytest.approx(runs["plain", "own"], rel=1e-6)
    assert runs["lora_ext", "own"] != pytest.approx(runs["plain", "own"], rel=1e-6)


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
    for arguments, message in (
        (["--providers", "plain,fast"], "no provider 'fast'"),
        (["--dropout", "1"], "must be from 0 to below 1, got 1.0"),
    ):
        with pytest.raises(SystemExit):
            bench_model.main(arguments)
        assert message in capsys.readouterr().err
