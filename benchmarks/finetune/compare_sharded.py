"""The demo under torchrun: plain LoRA and ours, both with FSDP2, beside ours in one process."""

import os
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from torch import nn

from .checks import CheckFailed, check_adapter, check_losses, check_same_start
from .compare import conditions, make_console, make_folder, train_and_score
from .report import largest_difference, paired_ratio
from .sharded import ShardedRun, blocks, local_mib
from .task import Settings, Task, make_task
from .train import OURS, PLAIN, Run

ONE = f"{OURS}, 1 process"


def world_size() -> int:
    """Return how many processes torchrun has started, 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def compare_sharded(settings: Settings, out: Path) -> None:
    """Run the demo on all ranks; rank 0 prints the results and writes the adapter to `out`.

    Raises:
        DemoError: something is missing, or a check failed.

    """
    # Rank 0 trains one run alone, and the others wait for it.
    dist.init_process_group("gloo", timeout=timedelta(hours=4))
    try:
        _compare(settings, out, make_console(quiet=dist.get_rank() > 0))
    finally:
        dist.destroy_process_group()


def _compare(settings: Settings, out: Path, console: Console) -> None:
    torch.set_num_threads(settings.threads)
    make_folder(out)
    task = make_task(settings)
    base, batches = task.build(settings.seed), task.batches(settings.seed)
    console.print(f"[bold]{task.title}[/]")
    one = Run(OURS, task, base, settings)
    one.result.name = ONE
    console.print(conditions(one, settings, len(batches)))
    plain, ours = (ShardedRun(kind, task, base, settings) for kind in (PLAIN, OURS))
    check_same_start(plain.model, ours.model)
    console.print(
        f"FSDP2 over {dist.get_world_size()} processes (gloo): {len(blocks(ours.model))} layers "
        "and the root; each takes its rows of every batch"
    )
    train_and_score([plain, ours], task, batches, settings.seed, console)
    predicted, trained = task.predictions(ours.model), ours.trained()
    mib = [local_mib(run) for run in (plain, ours)]
    if dist.get_rank() == 0:
        train_and_score([one], task, batches, settings.seed, console)
        mib.append(local_mib(one))
        console.print(_table([plain, ours, one], mib, task, settings))
        console.print("not in the table: the linears' replay, peak memory (of one process)")
        console.print(check_losses(plain.result, ours.result, task.loss_bound))
        console.print(check_losses(one.result, ours.result, task.loss_bound))
        whole = _whole(trained, task, base, settings)
        wrong = (task.predictions(whole.model) != predicted).sum().item()
        if wrong:
            raise CheckFailed(
                f"gathered from the ranks, the model predicts otherwise {wrong} times"
            )
        adapter = out / f"{settings.task}-adapter.safetensors"
        console.print(check_adapter(whole, task, settings, adapter), soft_wrap=True)
        console.print("[green]all checks passed[/]")
    dist.barrier()


def _whole(trained: dict[str, Any], task: Task, base: nn.Module, settings: Settings) -> Run:
    """Return a run in one process that has the gathered parameters."""
    whole = Run(OURS, task, base, settings)
    unexpected = whole.model.load_state_dict(trained, strict=False).unexpected_keys
    if unexpected:
        raise CheckFailed(f"the sharded model has other parameters: {', '.join(unexpected[:4])}")
    return whole


def _table(runs: Sequence[Run], mib: Sequence[float], task: Task, settings: Settings) -> Any:
    from rich.table import Table

    results = plain, ours, one = [run.result for run in runs]
    threads = f"{settings.threads} thread{'s' * (settings.threads != 1)} each"
    made = Table(
        title=f"torch {torch.__version__}, CPU, {world_size()} processes of {threads}, float32",
        title_justify="left",
    )
    made.add_column("")
    for result in results:
        made.add_column(result.name, justify="right", no_wrap=True)
    made.add_column("plain / ours", justify="right", no_wrap=True)
    made.add_row(f"{task.metric} before", *(task.show(r.before or 0.0) for r in results))
    made.add_row(f"{task.metric} after", *(task.show(r.after or 0.0) for r in results))
    made.add_row(
        "time a step, median (ms)",
        *(f"{1e3 * r.median_step_s:.1f}" for r in results),
        f"{paired_ratio(plain, ours):.2f}x",
    )
    made.add_row("parameters and optimizer a rank (MiB)", *(f"{m:.1f}" for m in mib))
    gaps = [largest_difference(one, r) for r in (plain, ours)]
    made.add_row("largest loss difference to 1 process", *(f"{gap:.1e}" for gap in gaps))
    made.add_row("trainable parameters", *(f"{r.trainable:,}" for r in results))
    return made
