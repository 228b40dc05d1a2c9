"""The runs that are compared, and their training in lockstep."""

import copy
import time
from collections.abc import Callable, Sequence

import torch
from torch import nn

import lora_ext

from . import plain
from .report import Result
from .task import ALPHA, HEAD_LEARNING_RATE, LEARNING_RATE, RANK, Batch, Settings, Task

HEAD_ONLY, PLAIN, OURS = "head only", "plain LoRA", "lora_ext"


class Run:
    """A model in training: the model, its optimizer, and what was measured so far.

    Args:
        kind: HEAD_ONLY, PLAIN or OURS: what is put into the model.
        task: the task.
        base: the pretrained model; it is copied.
        settings: seed and backend.

    """

    def __init__(self, kind: str, task: Task, base: nn.Module, settings: Settings) -> None:
        self.result = Result(kind)
        self.model = copy.deepcopy(base)
        part = getattr(self.model, task.adapted)
        torch.manual_seed(settings.seed)  # the same seed: plain and ours start from the same A
        if kind == PLAIN:
            plain.replace_linear_with_lora(part, RANK, ALPHA)
        elif kind == OURS:
            lora_ext.replace_linear_with_lora(part, RANK, ALPHA)
            use_backend(self.model, settings.backend)
        # One rule for all runs: the adapters and the new head train, the pretrained rest is frozen.
        for name, parameter in self.model.named_parameters():
            new = name.partition(".")[0] in task.modules_to_save
            parameter.requires_grad_(new or ".lora." in name)
        trainable = [p for p in self.model.parameters() if p.requires_grad]
        self.result.trainable = sum(p.numel() for p in trainable)
        self.result.total = sum(p.numel() for p in self.model.parameters())
        self.learning_rate = HEAD_LEARNING_RATE if kind == HEAD_ONLY else LEARNING_RATE
        self.optimizer = torch.optim.AdamW(trainable, lr=self.learning_rate)

    def step(self, task: Task, batch: Batch, seed: int, decay: float = 1.0) -> None:
        """Take one training step and note its loss and its time (forward, backward, update)."""
        self.model.train()
        for group in self.optimizer.param_groups:
            group["lr"] = decay * self.learning_rate
        torch.manual_seed(seed)  # the same dropout in every run
        begin = time.perf_counter()
        loss = task.loss(self.model, batch)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.result.step_s.append(time.perf_counter() - begin)
        self.result.losses.append(loss.item())


def train_in_lockstep(
    runs: Sequence[Run],
    task: Task,
    batches: Sequence[Batch],
    seed: int,
    after_step: Callable[[int], None] = lambda step: None,
) -> None:
    """Train all runs on the same batches, step by step in turn.

    A machine that slows down for a while then slows all of them, and every step's losses can be
    compared. Who goes first changes each step, since the second finds the batch in the caches.
    """
    for step, batch in enumerate(batches):
        decay = 1 - step / len(batches)
        for run in runs if step % 2 == 0 else reversed(runs):
            run.step(task, batch, seed * 1_000_003 + step, decay)
        after_step(step)


def use_backend(model: nn.Module, backend: str | None) -> None:
    """Make every layer of ours in the model use a backend; None leaves the choice to each call."""
    for module in model.modules():
        if isinstance(module, lora_ext.LinearWithLoRA):
            module.backend = backend
