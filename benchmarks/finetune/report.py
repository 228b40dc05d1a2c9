"""What is shown of a run: the table, the plot, and checks, a failure of which ends the demo."""

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import torch
from torch import nn

import lora_ext
from benchmarks.timing import interval

from .curves import draw_steps
from .data import DemoError
from .log import Log
from .tasks import Settings, Task
from .train import ALPHA, OURS, PLAIN, RANK, Result, Run, use_backend


class CheckFailed(DemoError):
    """The demo ran, and what it shows is wrong; the message says what."""


def check_same_start(plain: nn.Module, ours: nn.Module) -> None:
    """Raise CheckFailed unless both models have the same parameters, bit for bit."""
    first, second = plain.state_dict(), ours.state_dict()
    if odd := sorted(first.keys() ^ second.keys()):
        raise CheckFailed(f"the models have other parameters: {', '.join(odd[:4])}")
    for name, value in first.items():
        if not torch.equal(value, second[name]):
            raise CheckFailed(f"the models start from another {name}")


def check_losses(plain: Result, ours: Result, bound: float) -> str:
    """Return a line on the losses; raise CheckFailed if they differ by more than `bound` nats."""
    gaps = differences(plain, ours)
    for step, gap in enumerate(gaps):
        if not gap <= bound:  # so written that a NaN fails
            raise CheckFailed(
                f"the losses of {plain.name} and {ours.name} diverge: {plain.losses[step]:.6f} and "
                f"{ours.losses[step]:.6f} at step {step + 1}, the bound is {bound:g} nats"
            )
    return (
        f"losses agree over {len(gaps)} steps: largest difference {max(gaps):.1e} nats, "
        f"bound {bound:g}"
    )


def check_same_loss(model: nn.Module, expected: float, task: Task, what: str) -> None:
    """Raise CheckFailed unless a model has the expected loss on the held-out data."""
    loss = task.held_out_loss(model)
    if not math.isclose(loss, expected, rel_tol=1e-6):
        raise CheckFailed(f"{what}, the model has a held-out loss of {loss}, not {expected}")


def check_adapter(ours: Run, task: Task, path: Path) -> str:
    """Save the adapter and load it into a fresh model; return a line on its size.

    Raises:
        CheckFailed: the fresh model has another loss on the held-out data.

    """
    lora_ext.save_adapter(ours.model, path, modules_to_save=task.modules_to_save)
    fresh = task.build(task.settings.seed + 1)  # another seed: the head must come from the file
    lora_ext.load_adapter(fresh, path)
    use_backend(fresh, task.settings.backend)
    loss = task.held_out_loss(ours.model)
    check_same_loss(fresh, loss, task, f"loaded from {path}")
    # By address: what is tied counts once.
    base = {t.data_ptr(): t.nbytes for name, t in fresh.state_dict().items() if "lora" not in name}
    kib, mib = path.stat().st_size / 2**10, sum(base.values()) / 2**20
    return (
        f"adapter {path}: {kib:.0f} KiB, the model has {mib:.0f} MiB; loaded into a fresh model, "
        f"the held-out loss is the same, {loss:.6f} nats"
    )


def differences(first: Result, second: Result) -> list[float]:
    """Return the absolute difference of two runs' losses at each step, in nats."""
    return [abs(a - b) for a, b in zip(first.losses, second.losses, strict=True)]


def ratios(plain: Result, ours: Result) -> list[float]:
    """Return plain's time over ours at each step, both taken in the same minute."""
    return [p / o for p, o in zip(plain.step_ms, ours.step_ms, strict=True)]


def trust(by_step: Sequence[float]) -> str:
    """Return a line on how far the median of the steps' ratios can be trusted."""
    ends = interval(by_step)
    if ends is None:
        return f"{len(by_step)} steps are too few to say how far the ratio of times can be trusted"
    said = f"ratio of times: from {ends[0]:.2f} to {ends[1]:.2f} at 95 % confidence"
    open_ = ends[0] <= 1 <= ends[1]
    return said + ", so these steps don't tell which is faster" * open_


def rows(results: Sequence[Result], base: Result, task: Task) -> list[list[str]]:
    """Return the table's rows: label, one cell for each run, plain over ours where it tells.

    Losses are compared with those of `base`. What no run has measured has no row.
    """
    by_name = {result.name: result for result in results}
    plain, ours = by_name[PLAIN], by_name[OURS]
    gaps = {r.name: max(differences(base, r)) for r in (plain, ours) if r is not base}
    by_step = f"{median(ratios(plain, ours)):.2f}x"
    if interval(ratios(plain, ours)) is None:
        by_step += f" of {len(plain.step_ms)} steps"
    memory = f"{plain.peak_mib / ours.peak_mib:.2f}x" if plain.peak_mib and ours.peak_mib else ""
    made = []
    for label, values, shown, ratio in (
        (f"{task.metric} before", [r.before for r in results], task.shown, ""),
        (f"{task.metric} after", [r.after for r in results], task.shown, ""),
        ("time a step, median (ms)", [median(r.step_ms) for r in results], "{:.1f}", by_step),
        ("peak memory of a step (MiB)", [r.peak_mib for r in results], "{:.0f}", memory),
        ("parameters and optimizer a rank (MiB)", [r.rank_mib for r in results], "{:.1f}", ""),
        (f"loss difference to {base.name}", map(gaps.get, by_name), "{:.1e}", ""),
        ("trainable parameters", [r.trainable for r in results], "{:,}", ""),
        ("  of all", [r.share for r in results], "{:.2%}", ""),
    ):
        cells = ["-" if value is None else shown.format(value) for value in values]
        if set(cells) != {"-"}:
            made.append([label, *cells, ratio])
    return made


def conditions(run: Run, settings: Settings) -> str:
    """Return a line on the layers and one on what they run on."""
    layers = [m for m in run.model.modules() if isinstance(m, lora_ext.LinearWithLoRA)]
    backend = lora_ext.explain(layers[0]).partition(":")[0]
    return (
        f"{len(layers)} linears with LoRA of rank {RANK}, alpha {ALPHA:g}; backend {backend}, "
        f"seed {settings.seed}\ntorch {torch.__version__}, CPU, threads {settings.threads}, float32"
    )


def finish(
    results: Sequence[Result], base: Result, whole: Run, task: Task, out: Path, log: Log
) -> None:
    """Print the table, draw the plot and save the adapter in the folder `out`, check all of it.

    `whole` is a run in this process that has what ours has learned; for the others see `rows`.

    Raises:
        CheckFailed: by the first check that does not hold.

    """
    from rich.table import Table

    settings, console = task.settings, log.console
    by_name = {result.name: result for result in results}
    plain, ours = by_name[PLAIN], by_name[OURS]
    table = Table("")
    for heading in (*by_name, "plain / ours"):
        table.add_column(heading, justify="right", no_wrap=True)
    for cells in rows(results, base, task):
        table.add_row(*cells)
    console.print(table)
    console.print(trust(ratios(plain, ours)))
    log.stage("plot")
    picture, adapter = (out / f"{settings.task}{end}" for end in (".png", "-adapter.safetensors"))
    draw_steps(plain, ours, picture, f"{task.title}\n{conditions(whole, settings)}")
    console.print(f"plot {picture}", soft_wrap=True)
    log.stage("checks: the losses, and the adapter loaded into a fresh model")
    for compared in (plain, ours):
        if compared is not base:
            console.print(check_losses(base, compared, task.loss_bound))
    console.print(check_adapter(whole, task, adapter), soft_wrap=True)
    # A few steps teach nothing yet, and a number of steps that the user chose is no promise.
    if not settings.quick and settings.steps is None and not task.learned(ours.before, ours.after):
        scores = [task.shown.format(score) for score in (ours.before, ours.after)]
        raise CheckFailed(f"{task.metric} went from {' to '.join(scores)}: it has not learned")
    log.stage("all checks passed")
