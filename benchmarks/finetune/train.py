"""The runs that are compared: their training in lockstep, and what is measured of each."""

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

import lora_ext
from lora_ext import testing

from .log import Log
from .tasks import Batch, Task

RANK, ALPHA = 8, 16.0
LEARNING_RATE = 1e-4  # falls linearly to zero over the run
# A linear head alone needs larger steps: 49 of them at 1e-4 leave it near chance (64 % on the
# validation part of sms; 93 % at 1e-3 and at 3e-2, 94 % at 1e-1, where the loss swings already).
HEAD_LEARNING_RATE = 3e-2
HEAD_ONLY, PLAIN, OURS = "head only", "plain LoRA", "lora_ext"


@dataclass
class Result:
    """What was measured of one run: losses in nats, times in milliseconds, memory in MiB."""

    name: str
    losses: list[float] = field(default_factory=list)
    step_ms: list[float] = field(default_factory=list)
    before: float | None = None
    after: float | None = None
    peak_mib: float | None = None
    rank_mib: float | None = None  # parameters and optimizer in one of several processes
    trainable: int = 0
    share: float = 0.0  # of all parameters, those that train


class Run:
    """A copy of the model in training: HEAD_ONLY, or with the adapters of PLAIN or OURS."""

    def __init__(self, kind: str, task: Task, base: nn.Module) -> None:
        self.result = Result(kind)
        self.model = copy.deepcopy(base)
        part = getattr(self.model, task.adapted)
        torch.manual_seed(task.settings.seed)  # the same seed: plain and ours start from the same A
        if kind == PLAIN:
            testing.replace_linear_with_lora(part, RANK, ALPHA)
        elif kind == OURS:
            lora_ext.replace_linear_with_lora(part, RANK, ALPHA)
            use_backend(self.model, task.settings.backend)
        # One rule for all runs: the adapters and the new head train, the pretrained rest is frozen.
        for name, parameter in self.model.named_parameters():
            new = name.partition(".")[0] in task.modules_to_save
            parameter.requires_grad_(new or ".lora." in name)
        self.result.trainable = sum(p.numel() for p in self.trainable())
        total = sum(p.numel() for p in self.model.parameters())
        self.result.share = self.result.trainable / total
        self.learning_rate = HEAD_LEARNING_RATE if kind == HEAD_ONLY else LEARNING_RATE
        self.optimizer = torch.optim.AdamW(self.trainable(), lr=self.learning_rate)

    def trainable(self) -> list[nn.Parameter]:
        """Return the parameters that train."""
        return [p for p in self.model.parameters() if p.requires_grad]

    def step(self, task: Task, batch: Batch, seed: int, decay: float = 1.0) -> None:
        """Take one training step and note its loss and its time (forward, backward, update)."""
        for group in self.optimizer.param_groups:
            group["lr"] = decay * self.learning_rate
        torch.manual_seed(seed)  # the same dropout in every run
        begin = time.perf_counter()
        loss = self.backward(task, batch)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.result.step_ms.append(1e3 * (time.perf_counter() - begin))
        self.result.losses.append(loss.item())

    def backward(self, task: Task, batch: Batch) -> Tensor:
        """Compute the gradients of a batch; return its loss."""
        loss = task.loss(self.model.train(), batch)
        loss.backward()
        return loss


def use_backend(model: nn.Module, backend: str | None) -> None:
    """Make every layer of ours in the model use a backend; None leaves the choice to each call."""
    for module in model.modules():
        if isinstance(module, lora_ext.LinearWithLoRA):
            module.backend = backend


def train_in_lockstep(
    runs: Sequence[Run],
    task: Task,
    batches: Sequence[Batch],
    seed: int,
    after_step: Callable[[], None] = lambda: None,
) -> None:
    """Train all runs on the same batches, step by step in turn.

    A machine that slows down for a while then slows all of them, and every step's losses can be
    compared. Who goes first changes each step, since the second finds the batch in the caches.
    """
    for step, batch in enumerate(batches):
        decay = 1 - step / len(batches)
        for run in runs if step % 2 == 0 else reversed(runs):
            run.step(task, batch, seed * 1_000_003 + step, decay)
        after_step()


def train_and_score(
    runs: Sequence[Run], task: Task, batches: Sequence[Batch], seed: int, log: Log
) -> None:
    """Score the runs, train them in lockstep under a progress bar, and score them again."""
    from rich.progress import Progress

    names = " and ".join(run.result.name for run in runs)
    log.stage(f"{names}: {task.metric} before")
    for run in runs:
        run.result.before = task.score(run.model)
    log.stage(f"{names}: {len(batches)} training steps")
    with Progress(console=log.console) as progress:
        bar = progress.add_task(names, total=len(batches))

        def advance() -> None:
            losses = "  ".join(f"{run.result.losses[-1]:.4f}" for run in runs)
            progress.update(bar, advance=1, description=f"{names}, loss {losses}")
            log.save()

        train_in_lockstep(runs, task, batches, seed, advance)
    log.stage(f"{names}: {task.metric} after")
    for run in runs:
        run.result.after = task.score(run.model)
