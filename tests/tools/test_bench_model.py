"""The benchmark of whole steps: same losses or no time, and every provider on the same adapters."""

import json

import pytest
import torch

from benchmarks import bench_model, models
from benchmarks.bases import Unavailable
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
    assert "tiny, fp32" in capsys.readouterr().out


LACKING = {
    "peft_checkpoint": "no gradient checkpointing",
    "grouped_loss_compile": "no loss function of its own",
}


def test_every_provider_trains_the_plain_layers_adapters():
    pytest.importorskip("peft")
    work = models.tiny(torch.float32)
    losses = {}
    for name, build in models.PROVIDERS.items():
        if name in LACKING:
            with pytest.raises(Unavailable, match=LACKING[name]):
                build(work)
            continue
        if name.endswith("compile"):  # seconds of compiling
            continue
        step = build(work)
        if name == "base":  # the model itself, and its biases trained
            assert sum(p.numel() for p in step.trainable) == 64 + 32
            first = step()
            assert first == pytest.approx(work.loss(work.model).item(), rel=1e-6)
            assert step() < first
            continue
        magnitudes = 64 + 32 if name.endswith("_dora") else 0
        assert sum(p.numel() for p in step.trainable) == 2 * 8 * (32 + 64) + magnitudes
        losses[name] = [step() for _ in range(5)], step.like
    for name, (of, like) in losses.items():
        assert of == pytest.approx(losses[like][0], rel=1e-6), name
    base = work.loss(work.model).item()
    plain, dora = losses["plain"][0], losses["peft_dora"][0]
    assert abs(plain[0] - base) > 1e-3  # the low-rank part counts from the first step
    assert dora != pytest.approx(plain, rel=1e-6)


@pytest.mark.parametrize("options", [["--dropout", "0.3"], ["--dtype", "bf16"]], ids=" ".join)
def test_groups_and_dora_are_held_to_their_own_kind(options, tmp_path):
    pytest.importorskip("peft")
    file = tmp_path / "model.json"
    providers = "lora_ext,grouped,accelerated_groups,accelerated_dora"
    arguments = ["--model", "tiny", "--seconds", "0.1", "--providers", providers, *options]
    assert bench_model.main([*arguments, "--json", str(file)]) == 0
    rows = json.loads(file.read_text())["rows"]
    assert [row["provider"] for row in rows] == providers.split(",")
    bound = 2e-2 if "bf16" in options else 2e-5
    assert all(row["loss_difference"] < bound and row["tokens_per_s"] > 0 for row in rows)
    assert {(row["dtype"], row["dropout"]) for row in rows} == {
        ("bf16" if "bf16" in options else "fp32", 0.3 if "0.3" in options else 0.0)
    }


def test_a_step_of_one_linear_computes_dx():
    pytest.importorskip("peft")
    work = models.one_linear(6, 32, 16)(torch.float32)
    seen = []
    step = models.PROVIDERS["lora_ext"](work)
    step._model[0].register_full_backward_hook(lambda _, dx, dy: seen.append(dx[0].shape))
    step(), step()
    assert seen == [(6, 32), (6, 32)] and work.tokens == 6


def test_under_dropout_every_provider_is_held_under_the_plain_layers_masks(capsys):
    pytest.importorskip("peft")
    providers = "plain,peft,accelerated,lora_ext"
    arguments = ["--model", "tiny", "--providers", providers, "--seconds", "0.1"]
    assert bench_model.main([*arguments, "--dropout", "0.4"]) == 0
    out = capsys.readouterr().out
    assert all(f"│ {name} " in out for name in providers.split(","))
    work = models.tiny(torch.float32)
    runs = {}
    for name in providers.split(","):
        step = models.PROVIDERS[name](work, 0.4)
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

    monkeypatch.setitem(models.PROVIDERS, "wrong", models.with_lora(replace))
    arguments = ["--model", "tiny", "--providers", "plain,wrong", "--seconds", "0.1"]
    assert bench_model.main(arguments) == 1
    out = capsys.readouterr().out
    assert "not timed: wrong: losses" in out
    assert "│ wrong" not in out


def test_a_nan_is_no_agreement():
    assert bench_model.difference([1.0, 2.0], [1.0, float("nan")], 2e-5)
    assert bench_model.difference([1.0, 2.0], [1.0, 2.0 + 1e-3], 2e-5)
    assert bench_model.difference([1.0, 2.0], [1.0, 2.0 + 1e-6], 2e-5) is None


def test_bad_arguments_are_named(capsys):
    for arguments, message in (
        (["--providers", "plain,fast"], "no provider 'fast'"),
        (["--dropout", "1"], "must be from 0 to below 1, got 1.0"),
    ):
        with pytest.raises(SystemExit):
            bench_model.main(arguments)
        assert message in capsys.readouterr().err
