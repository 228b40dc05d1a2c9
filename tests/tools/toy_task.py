"""A demo task of two small layers with dropout, whose batches don't divide evenly.

`python -m tests.tools.toy_task` is the demo's command line with this task in place of its own.
"""

import sys

import torch
from torch import Tensor, nn

from benchmarks.finetune import cli, compare_sharded
from benchmarks.finetune.task import Batch

WIDTH, ROWS = 6, (8, 7, 1, 5)  # of each batch


class Block(nn.Module):
    """A linear with dropout, then attention with dropout among the tokens of a row."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.dropout = nn.Dropout(0.2)

    def forward(self, x):
        x = self.dropout(torch.tanh(self.linear(x)))
        p = 0.3 if self.training else 0.0
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


class Toy:
    """See benchmarks.finetune.task.Task."""

    title, metric = "toy", "accuracy"
    adapted, modules_to_save, loss_bound = "encoder", ("head",), 1e-6

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
    def predictions(self, model: nn.Module) -> Tensor:
        model.eval()
        return model(self.batches(9)[0]["input_ids"]).argmax(-1)

    def score(self, model: nn.Module) -> float:
        return (self.predictions(model) == self.batches(9)[0]["labels"]).double().mean().item()

    def show(self, score: float) -> str:
        return f"{score:.3f}"


if __name__ == "__main__":
    compare_sharded.make_task = lambda settings: Toy()
    sys.exit(cli.main())
