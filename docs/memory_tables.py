"""The tables of docs/memory.md, from the `*-memory-*` files of benchmarks/results/models."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

LABELS = {
    "base": "the floor: no LoRA, biases trained",
    "plain": "plain layer",
    "compile": "plain layer, `torch.compile`",
    "peft": "PEFT",
    "peft_checkpoint": "PEFT, gradient checkpointing",
    "accelerated": "PEFT, `accelerate(model)`",
    "accelerated_groups": "PEFT, `accelerate(model, groups=True)`",
    "lora_ext": "single layers of ours",
    "lora_ext_compile": "single layers of ours, `torch.compile`",
    "grouped": "groups",
    "grouped_loss_compile": "groups, and the loss by `torch.compile`",
    "grouped_all": '`group_(model, recompute="all")`',
}
MODELS = {
    "llama-block": "One decoder block of Llama-3-8B's shapes, 128 tokens",
    "gpt2": "GPT-2 small's shapes, 2 x 256 tokens",
    "minilm": "The demo's MiniLM, its longest batch of 16 texts",
}
Run = dict[str, Any]


def memory_runs(folder: Path) -> list[Run]:
    """Return the runs of bench_model that were made for their memory, by model and machine."""
    read = [json.loads(path.read_text()) for path in sorted(folder.glob("*-memory-*.json"))]
    order = [*MODELS]
    return sorted(read, key=lambda run: order.index(run["rows"][0]["model"]))


def tables(runs: Sequence[Run]) -> str:
    """Return the page's text: for each run what it is, a line a provider, and the command."""
    return "\n\n".join(map(_table, runs))


def _table(run: Run) -> str:
    header, rows = run["header"], run["rows"]
    first, command = rows[0], header["command"].split(" --json ")[0]
    # Before it was a part of bench_model, its PEFT provider ran groups.
    labels = dict(LABELS)
    if "bench_memory" in command:
        labels["accelerated"] = LABELS["accelerated_groups"]
    dtype = {"fp32": "float32", "bf16": "bfloat16"}[first["dtype"]]
    threads = f"{header['threads']} thread{'s' if header['threads'] > 1 else ''}"
    machine = f"{header['device']} ({header['instruction_set'].split()[0]})"
    base = next(row["ms_median"] for row in rows if row["provider"] == "plain")
    lines = [
        f"{MODELS[first['model']]}, rank 8 on every linear, {dtype}, dropout {first['dropout']:g}; "
        f"{machine}, {threads}:",
        "",
        "| | ms a step | plain / it | tokens/s | peak MiB | kept MiB |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        ms = row["ms_median"]
        lines.append(
            f"| {labels[row['provider']]} | {ms:.0f} | {base / ms:.2f} | {row['tokens_per_s']:.0f} "
            f"| {row['peak_mib']:.0f} | {row['saved_mib']:.0f} |"
        )
    of_old = "by what `python -m benchmarks.bench_model` is now"
    by = of_old if "bench_memory" in command else f"`{command}`"
    return "\n".join([*lines, "", f"Commit {header['commit']}, {by}."])
