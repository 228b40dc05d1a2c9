"""What a demo run is told (Settings), and what a task gives (Task)."""

from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

from .packages import DemoError

RANK, ALPHA = 8, 16.0
LEARNING_RATE = 1e-4  # falls linearly to zero over the run
# A linear head alone needs larger steps: 49 of them at 1e-4 leave it near chance (64 % on the
# validation part of sms; 93 % at 1e-3 and at 3e-2, 94 % at 1e-1, where the loss swings already).
HEAD_LEARNING_RATE = 3e-2
Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Settings:
    """Choices of the command line that change what is computed."""

    task: str = "sms"
    quick: bool = False
    seed: int = 0
    threads: int = 1
    backend: str | None = None
    steps: int | None = None
    text: str | None = None


class Task(Protocol):
    """Model, data and measure of one fine-tuning."""

    title: str  # one line: what is trained on what
    metric: str  # what `score` is, for the table
    adapted: str  # attribute of the model: the part whose linears get LoRA
    modules_to_save: tuple[str, ...]  # what is trained whole beside the adapters
    loss_bound: float  # largest difference of losses, plain against ours, that is rounding (nats)

    def build(self, seed: int) -> Any:
        """Return the pretrained model, its new parts initialised from the seed."""

    def batches(self, seed: int) -> list[Batch]:
        """Return the training batches, one a step, in the order that the seed gives."""

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the mean cross-entropy, a scalar in nats."""

    def score(self, model: nn.Module) -> float:
        """Return the measure on held-out data."""

    def show(self, score: float) -> str:
        """Return a score as the table prints it."""

    def predictions(self, model: nn.Module) -> Tensor:
        """Return the predicted classes or tokens on held-out data, integers of any shape."""

    def shortfall(self, before: float, after: float) -> str | None:
        """Say what is wrong with the scores of a full run; None if nothing is."""


def make_task(settings: Settings) -> Task:
    """Return the task of the settings; its model and data are read later.

    Raises:
        DemoError: an unknown task, a missing package, a text that can't be read.

    """
    if settings.task == "sms":
        from .sms import Sms

        return Sms(settings)
    if settings.task == "shakespeare":
        from .shakespeare import Shakespeare

        return Shakespeare(settings)
    raise DemoError(f"task must be sms or shakespeare, got {settings.task!r}")
