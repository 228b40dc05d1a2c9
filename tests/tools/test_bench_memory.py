"""The benchmark of memory: every row trains the plain layer's adapters under its masks."""

import json

import pytest
import torch

from benchmarks import bench_memory


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("dropout", ["0", "0.3"])
def test_rows_are_held_to_the_plain_layers_losses(dropout, tmp_path):
    pytest.importorskip("peft")
    file = tmp_path / "memory.json"
    providers = "plain,peft,lora_ext,grouped,accelerated"
    arguments = ["--model", "tiny", "--dropout", dropout, "--seconds", "0.1"]
    assert bench_memory.main([*arguments, "--providers", providers, "--json", str(file)]) == 0
    rows = json.loads(file.read_text())["rows"]
    assert [row["provider"] for row in rows] == providers.split(",")
    assert all(row["loss_difference"] < 2e-5 and row["tokens_per_s"] > 0 for row in rows)


def test_another_scale_gets_no_row(monkeypatch, capsys):
    build = bench_memory.PROVIDERS["lora_ext"]

    def wrong(work, dropout):
        step = build(work, dropout)
        for parameter in step.trainable:
            parameter.data *= 1.1
        return step

    monkeypatch.setitem(bench_memory.PROVIDERS, "lora_ext", wrong)
    arguments = ["--model", "tiny", "--providers", "plain,lora_ext", "--seconds", "0.1"]
    assert bench_memory.main(arguments) == 1
    assert "not timed: lora_ext: losses" in capsys.readouterr().out
