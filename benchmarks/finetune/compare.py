"""One demo run from model to table: train, measure, check, report."""

from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

import lora_ext

from .checks import check_adapter, check_losses, check_same_start
from .memory import peak_mib
from .packages import DemoError
from .plot import save_plot
from .replay import time_linears, typical
from .report import table
from .task import ALPHA, RANK, Batch, Settings, Task, make_task
from .train import HEAD_ONLY, OURS, PLAIN, Run, train_in_lockstep

REPEATS, QUICK_REPEATS = 15, 5


def compare(settings: Settings, out: Path) -> None:
    """Run the demo and print its results; files go to the folder `out`.

    Raises:
        DemoError: something is missing, or a check failed.

    """
    console = make_console()
    make_folder(out)
    torch.set_num_threads(settings.threads)
    task = make_task(settings)
    console.print(f"[bold]{task.title}[/]")
    with console.status("loading the model"):
        base, batches = task.build(settings.seed), task.batches(settings.seed)
    kinds = [HEAD_ONLY, PLAIN, OURS] if task.modules_to_save else [PLAIN, OURS]
    runs = [Run(kind, task, base, settings) for kind in kinds]
    del base
    plain, ours = runs[-2:]
    check_same_start(plain.model, ours.model)
    console.print(conditions(ours, settings, len(batches)))

    train_and_score(runs, task, batches, settings.seed, console)
    with console.status("timing the LoRA'd linears"):
        repeats = QUICK_REPEATS if settings.quick else REPEATS
        time_linears([plain, ours], task, typical(batches), repeats)
    with console.status("measuring peak memory, each run in its own process"):
        for run in runs:
            run.result.peak_mib = peak_mib(run.result.name, settings)

    results = [run.result for run in runs]
    console.print(
        table(results, plain.result, ours.result, task.metric, task.show, _machine(settings))
    )
    picture = out / f"{settings.task}.png"
    save_plot(plain.result, ours.result, picture, task.title, _machine(settings))
    console.print(f"plot {picture}", soft_wrap=True)
    _check(plain, ours, task, settings, out, console)


def train_and_score(
    runs: Sequence[Run], task: Task, batches: Sequence[Batch], seed: int, console: Console
) -> None:
    """Score, train with a progress bar, and score again: the baseline alone, then the two."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[losses]}"),
    )
    for group in (runs[:-2], runs[-2:]):
        if not group:
            continue
        names = " and ".join(run.result.name for run in group)
        with Progress(*columns, console=console) as progress:
            bar = progress.add_task(f"{names}: score", total=len(batches), losses="")
            for run in group:
                run.result.before = task.score(run.model)
            progress.update(bar, description=names)

            def advance(_step: int, progress=progress, bar=bar, group=group) -> None:
                losses = "  ".join(f"{run.result.losses[-1]:.4f}" for run in group)
                progress.update(bar, advance=1, losses=f"loss {losses}")

            train_in_lockstep(group, task, batches, seed, advance)
            progress.update(bar, description=f"{names}: score")
            for run in group:
                run.result.after = task.score(run.model)
            progress.update(bar, description=names)


def _check(
    plain: Run, ours: Run, task: Task, settings: Settings, out: Path, console: Console
) -> None:
    """Print a line for each check that holds; raise DemoError at the first that does not."""
    console.print(check_losses(plain.result, ours.result, task.loss_bound))
    adapter = out / f"{settings.task}-adapter.safetensors"
    console.print(check_adapter(ours, task, settings, adapter), soft_wrap=True)
    before, after = ours.result.before, ours.result.after
    # A few steps teach nothing yet; and a number of steps that the user chose is no promise.
    if not settings.quick and settings.steps is None and before is not None and after is not None:
        if why := task.shortfall(before, after):
            raise DemoError(why)
    console.print("[green]all checks passed[/]")


def conditions(ours: Run, settings: Settings, steps: int) -> str:
    """Return a line on the layers, their backend and the steps."""
    layers = [m for m in ours.model.modules() if isinstance(m, lora_ext.LinearWithLoRA)]
    backend = lora_ext.explain(layers[0]).partition(":")[0]
    return (
        f"{len(layers)} linears with LoRA of rank {RANK}, alpha {ALPHA:g}; {steps} steps; "
        f"backend {backend}, seed {settings.seed}"
    )


def _machine(settings: Settings) -> str:
    threads = "1 thread" if settings.threads == 1 else f"{settings.threads} threads"
    return f"torch {torch.__version__}, CPU, {threads}, float32"


def make_console(quiet: bool = False) -> Console:
    """Return a console; where the output is no terminal, one wide enough for the table."""
    console = Console(highlight=False, quiet=quiet)
    return console if console.is_terminal else Console(width=110, highlight=False, quiet=quiet)


def make_folder(out: Path) -> None:
    """Make the output folder; raise DemoError if it can't be made."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DemoError(f"--out must be a folder that can be made: {error}") from None
