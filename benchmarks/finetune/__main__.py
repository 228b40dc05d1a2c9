"""`python -m benchmarks.finetune`: the command line, and the demo in one process."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import lora_ext
from benchmarks import positive
from benchmarks.timing import peak_mib
from lora_ext.backends import NAMES

from .data import DemoError, require
from .log import Log
from .report import check_same_start, conditions, finish
from .tasks import TASKS, Settings, Task
from .train import HEAD_ONLY, OURS, PLAIN, Run, train_and_score


def parse(argv: Sequence[str] | None = None) -> tuple[Settings, Path]:
    """Return the settings and the output folder; bad arguments end the program with status 2."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.finetune",
        description="Fine-tune a pretrained model with the plain LoRA layer and with lora_ext's, "
        "in lockstep, and compare losses, time and memory.",
    )
    add = parser.add_argument
    add(
        "--task",
        choices=tuple(TASKS),
        default="sms",
        help="sms: MiniLM finds spam (default); shakespeare: SmolLM2-135M learns the tragedies",
    )
    add("--text", metavar="PATH", help="a text for --task shakespeare to learn")
    add("--quick", action="store_true", help="a few steps, for CI")
    add("--steps", type=positive(int), help="training steps (default: one epoch of sms, 40 else)")
    add("--seed", type=int, default=0, help="default 0")
    add("--threads", type=positive(int), help="CPU threads (default: torch's)")
    add("--backend", choices=NAMES, help="of our layers (default: the first able)")
    add("--out", type=Path, default=Path("demo-output"), help="folder (default demo-output)")
    got = vars(parser.parse_args(argv))
    out, text, backend = got.pop("out"), got["text"], got["backend"]
    if text is not None and got["task"] != "shakespeare":
        parser.error("--text goes with --task shakespeare")
    if text is not None and not Path(text).is_file():
        parser.error(f"--text must name a file, there is none at {text}")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--out must be a folder that can be made: {error}")
    try:
        x, A = torch.zeros(1, 2), torch.zeros(2, 1)
        lora_ext.lora_linear(x, torch.zeros(2, 2), None, A, A.T, 1.0, backend=backend)
    except ValueError as error:
        parser.error(f"argument --backend: {error}")
    return Settings(**got | {"threads": got["threads"] or torch.get_num_threads()}), out


def compare(task: Task, out: Path, console: Any) -> None:
    """Train the plain layer and ours, and a new head alone where there is one; show the results."""
    seed = task.settings.seed
    base, batches = task.build(seed), task.batches(seed)
    kinds = [HEAD_ONLY, PLAIN, OURS] if task.modules_to_save else [PLAIN, OURS]
    runs = [Run(kind, task, base) for kind in kinds]
    results = [run.result for run in runs]
    log, (plain, ours) = Log(task, results, out, console), runs[-2:]
    check_same_start(plain.model, ours.model)
    console.print(conditions(ours, task.settings))
    for group in (runs[:-2], runs[-2:]):
        train_and_score(group, task, batches, seed, log)
    log.stage("peak memory of a step, on the largest batch")
    largest = max(batches, key=lambda batch: batch["input_ids"].numel())
    for run in runs:
        run.result.peak_mib = peak_mib(lambda run=run: run.backward(task, largest), "cpu")
        run.optimizer.zero_grad()
    finish(results, plain.result, ours, task, out, log)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo; return 0, or 1 after a message if something is missing or wrong."""
    settings, out = parse(argv)
    try:
        require("transformers", "rich", "matplotlib")
        from rich.console import Console

        width = None if sys.stdout.isatty() else 110
        console = Console(highlight=False, width=width, quiet=os.environ.get("RANK", "0") != "0")
        torch.set_num_threads(settings.threads)
        console.print("reading the texts and the model")
        task = TASKS[settings.task](settings)
        console.print(f"[bold]{task.title}[/]")
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            from .sharded import compare_sharded

            compare_sharded(task, out, console)
        else:
            compare(task, out, console)
    except DemoError as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("demo: stopped", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
