"""What must hold at the end of a demo run; each failure ends it with a non-zero exit."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

import lora_ext

from .packages import DemoError
from .report import Result, largest_difference
from .task import Settings, Task
from .train import Run, use_backend


class CheckFailed(DemoError):
    """The demo ran, and what it shows is wrong; the message says what."""


def check_same_start(plain: nn.Module, ours: nn.Module) -> None:
    """Raise CheckFailed unless both models have the same parameters, bit for bit."""
    first, second = plain.state_dict(), ours.state_dict()
    if first.keys() != second.keys():
        odd = sorted(first.keys() ^ second.keys())
        raise CheckFailed(f"the models have other parameters: {', '.join(odd[:4])}")
    for name, value in first.items():
        if not torch.equal(value, second[name]):
            raise CheckFailed(f"the models start from another {name}")


def check_losses(plain: Result, ours: Result, bound: float) -> str:
    """Return a line on the losses; raise CheckFailed if they differ by more than `bound` nats."""
    largest = largest_difference(plain, ours)
    # Written so that a NaN fails too.
    if not largest <= bound:
        gaps = [abs(a - b) for a, b in zip(plain.losses, ours.losses, strict=True)]
        first = next(i for i, gap in enumerate(gaps, 1) if not gap <= bound)
        pair = f"{plain.losses[first - 1]:.6f} and {ours.losses[first - 1]:.6f}"
        raise CheckFailed(
            f"the losses of {plain.name} and {ours.name} diverge: {pair} at step {first}, "
            f"the bound is {bound:g} nats"
        )
    return (
        f"losses agree over {len(plain.losses)} steps: largest difference {largest:.1e} nats, "
        f"bound {bound:g}"
    )


def check_adapter(ours: Run, task: Task, settings: Settings, path: Path) -> str:
    """Save the adapter, load it into a fresh model, and compare what the two predict.

    Returns:
        A line with the sizes and the outcome.

    Raises:
        CheckFailed: a prediction differs.

    """
    lora_ext.save_adapter(ours.model, path, modules_to_save=task.modules_to_save)
    expected = task.predictions(ours.model)
    fresh = task.build(settings.seed + 1)  # another seed: the head must come from the file
    lora_ext.load_adapter(fresh, path)
    use_backend(fresh, settings.backend)
    wrong = (task.predictions(fresh) != expected).sum().item()
    if wrong:
        raise CheckFailed(
            f"the adapter loaded from {path} predicts otherwise for {wrong} of {expected.numel()}"
        )
    kib, mib = path.stat().st_size / 2**10, _bytes(fresh.state_dict()) / 2**20
    return (
        f"adapter {path}: {kib:.0f} KiB, the model has {mib:.0f} MiB; "
        f"loaded into a fresh model, all {expected.numel()} predictions are the same"
    )


def _bytes(state: Mapping[str, Tensor]) -> int:
    """Size of a state_dict without its adapters; what is tied counts once."""
    base = {t.data_ptr(): t.numel() * t.element_size() for k, t in state.items() if "lora" not in k}
    return sum(base.values())
