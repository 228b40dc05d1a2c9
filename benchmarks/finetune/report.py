"""What is shown of a run: the table, the plot, and checks, a failure of which ends the demo."""

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn

import lora_ext

from .data import DemoError
from .tasks import Settings, Task
from .train import ALPHA, OURS, PLAIN, RANK, Result, Run, use_backend

COLORS, GREY = ("#d1702c", "#1f5fa8"), "#555555"  # of the plain layer and of ours
ROUNDING = 1e-9  # shown instead of an exact zero, which a logarithmic axis can't show
TOP = 2.5  # of the axes of times, over the median: one step that stalls would flatten all others


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


def rows(results: Sequence[Result], base: Result, task: Task) -> list[list[str]]:
    """Return the table's rows: label, one cell for each run, plain over ours where it tells.

    Losses are compared with those of `base`. What no run has measured has no row.
    """
    by_name = {result.name: result for result in results}
    plain, ours = by_name[PLAIN], by_name[OURS]
    gaps = {r.name: max(differences(base, r)) for r in (plain, ours) if r is not base}
    by_step = f"{median(ratios(plain, ours)):.2f}x"
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
    results: Sequence[Result], base: Result, whole: Run, task: Task, out: Path, console: Any
) -> None:
    """Print the table, draw the plot and save the adapter in the folder `out`, check all of it.

    `whole` is a run in this process that has what ours has learned; for the others see `rows`.

    Raises:
        CheckFailed: by the first check that does not hold.

    """
    from rich.table import Table

    settings, by_name = task.settings, {result.name: result for result in results}
    plain, ours = by_name[PLAIN], by_name[OURS]
    table = Table("")
    for heading in (*by_name, "plain / ours"):
        table.add_column(heading, justify="right", no_wrap=True)
    for cells in rows(results, base, task):
        table.add_row(*cells)
    console.print(table)
    picture, adapter = (out / f"{settings.task}{end}" for end in (".png", "-adapter.safetensors"))
    save_plot(plain, ours, picture, f"{task.title}\n{conditions(whole, settings)}")
    console.print(f"plot {picture}", soft_wrap=True)
    for compared in (plain, ours):
        if compared is not base:
            console.print(check_losses(base, compared, task.loss_bound))
    console.print(check_adapter(whole, task, adapter), soft_wrap=True)
    # A few steps teach nothing yet, and a number of steps that the user chose is no promise.
    if not settings.quick and settings.steps is None and not task.learned(ours.before, ours.after):
        scores = [task.shown.format(score) for score in (ours.before, ours.after)]
        raise CheckFailed(f"{task.metric} went from {' to '.join(scores)}: it has not learned")
    console.print("[green]all checks passed[/]")


def save_plot(plain: Result, ours: Result, path: Path, title: str) -> None:
    """Write a PNG: losses and their difference on the left, step times and their ratio right."""
    # Figure and canvas by themselves: no pyplot, so no display and no global state.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(11, 5.8), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, x=0.01, ha="left", fontsize=10)
    panels = figure.subplots(2, 2, sharex=True, height_ratios=(3, 1))
    (losses, times), (gaps, quotients) = panels
    steps = range(1, len(plain.losses) + 1)
    # The curves are on top of each other: a broad line under a thin one shows both.
    for run, color, width, marker in zip((plain, ours), COLORS, (5, 1.5), "os", strict=True):
        style = {"color": color, "alpha": 0.7}
        losses.plot(steps, run.losses, linewidth=width, label=run.name, **style)
        label = f"{run.name}, median {median(run.step_ms):.0f} ms"
        times.plot(steps, run.step_ms, marker, markersize=4, label=label, **style)
    times.set_ylim(0, TOP * median(plain.step_ms))
    shown = [max(gap, ROUNDING) for gap in differences(plain, ours)]
    gaps.semilogy(steps, shown, color=GREY)
    gaps.set_ylim(ROUNDING, max(1e-5, 3 * max(shown)))
    by_step = ratios(plain, ours)
    quotients.plot(steps, by_step, ".", color=GREY)
    quotients.axhline(1, color="black", linewidth=0.8)
    quotients.set_ylim(0, TOP * median(by_step))
    names = ("training loss (nats)", "time of a step (ms)", "|difference|\n(nats)", "plain / ours")
    for axes, name in zip(panels.flat, names, strict=True):
        axes.set_ylabel(name)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="#dddddd", linewidth=0.6)
    for above, below in panels.T:
        below.set_xlabel("step")
        # Above the axes, where no point is under it.
        above.legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 1), ncols=2, fontsize=9)
    figure.savefig(path, dpi=150)
