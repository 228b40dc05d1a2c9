"""A demo task of two small layers with dropout, whose batches don't divide evenly.

`python -m tests.tools.toy_task` is the demo's command line with this task in place of its own.
"""

import sys

import torch
from torch import Tensor, nn

from benchmarks.finetune import __main__ as command
from benchmarks.finetune.tasks import TASKS, Batch, Settings, Task

WIDTH, ROWS = 6, (8, 7, 1, 5)  # of each batch


class Block(nn.Module):
    """A linear with dropout, then attention with dropout among the tokens of a row."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.dropout, self.attention_dropout = nn.Dropout(0.2), nn.Dropout(0.3)

    def forward(self, x):
        x = self.dropout(torch.tanh(self.linear(x)))
        p = self.attention_dropout.p if self.training else 0.0
        mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
        return x + nn.functional.scaled_dot_product_attention(x, x, x, mask, dropout_p=p)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x):
        for block in self.encoder:
            x = block(x)
        return self.head(x.mean(1))


class Toy(Task):
    title, metric, shown = "toy", "accuracy", "{:.3f}"
    adapted, modules_to_save, loss_bound = "encoder", ("head",), 1e-6

    def __init__(self, settings: Settings) -> None:
        self.settings = settings

    def build(self, seed: int) -> nn.Module:
        torch.manual_seed(7)
        encoder = Model().encoder
        torch.manual_seed(seed)
        model = Model()
        model.encoder = encoder
        return model

    def batches(self, seed: int) -> list[Batch]:
        generator = torch.Generator().manual_seed(seed)
        inputs = [torch.randn(rows, 5, WIDTH, generator=generator) for rows in ROWS]
        return [{"input_ids": x, "labels": (x.sum((1, 2)) > 0).long()} for x in inputs]

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return nn.functional.cross_entropy(model(batch["input_ids"]), batch["labels"])

    @torch.no_grad()
    def held_out_loss(self, model: nn.Module) -> float:
        return self.loss(model.eval(), self.batches(9)[0]).item()

    @torch.no_grad()
    def score(self, model: nn.Module) -> float:
        batch = self.batches(9)[0]
        predicted = model.eval()(batch["input_ids"]).argmax(-1)
        return (predicted == batch["labels"]).double().mean().item()

    def learned(self, before: float, after: float) -> bool:
        return True


if __name__ == "__main__":
    TASKS["sms"] = Toy
    sys.exit(command.main())
