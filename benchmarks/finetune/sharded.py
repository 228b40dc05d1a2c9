"""The demo under torchrun: plain LoRA and ours with FSDP2, next to ours in one process.

Each process takes its rows of every batch, and the losses are weighted by rows. All models train
without dropout: several processes would draw other masks than one.
"""

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from .log import Log
from .report import check_same_loss, check_same_start, conditions, finish
from .tasks import Batch, Task
from .train import OURS, PLAIN, Run, train_and_score


class ShardedRun(Run):
    """A run whose parameters, gradients and optimizer state are spread over the ranks; see Run."""

    def __init__(self, kind: str, task: Task, base: nn.Module) -> None:
        super().__init__(kind, task, base)
        for block in blocks(self.model):
            fully_shard(block)
        fully_shard(self.model)
        self.optimizer = torch.optim.AdamW(self.trainable(), lr=self.learning_rate)

    def backward(self, task: Task, batch: Batch) -> Tensor:
        """Compute the gradients of a batch, of which each rank takes a share; return its loss."""
        world = dist.get_world_size()
        rows, weight = share(len(batch["input_ids"]), dist.get_rank(), world)
        loss = weight * task.loss(self.model.train(), {name: t[rows] for name, t in batch.items()})
        # FSDP takes the mean of the ranks' gradients, and the batch's is the sum of the shares'.
        (loss * world).backward()
        whole = loss.detach().clone()
        dist.all_reduce(whole)
        return whole

    def trained(self) -> dict[str, Any]:
        """Return every trained parameter whole, by name; all ranks must call it together."""
        self.model.reshard()  # the root, whose parameters stay gathered after a forward
        parameters = self.model.named_parameters()
        return {name: p.full_tensor() for name, p in parameters if p.requires_grad}


def local_mib(run: Run) -> float:
    """Return the size of a run's parameters and optimizer state in this process, in MiB."""
    if isinstance(run, ShardedRun):
        run.model.reshard()
    kept = [*run.model.parameters()]
    kept += [t for state in run.optimizer.state.values() for t in state.values()]
    return sum((t.to_local() if isinstance(t, DTensor) else t).nbytes for t in kept) / 2**20


def blocks(model: nn.Module) -> list[nn.Module]:
    """Return the layers of a model, that is of its longest nn.ModuleList; none if it has none."""
    lists = [list(m) for m in model.modules() if isinstance(m, nn.ModuleList)]
    return max(lists, key=len, default=[])


def share(total: int, rank: int, world: int) -> tuple[slice, float]:
    """Return the rows of a batch that a rank takes, and the weight of their mean in the batch's.

    The tasks' losses are means over rows that weigh the same. A rank for which no row is left takes
    the first one with weight zero, since all ranks have to take part in a step.
    """
    start, stop = total * rank // world, total * (rank + 1) // world
    if start == stop:
        return slice(0, 1), 0.0
    return slice(start, stop), (stop - start) / total


def without_dropout(model: nn.Module) -> nn.Module:
    """Set the probability of each dropout module to zero, in place."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def compare_sharded(task: Task, out: Path, console: Any) -> None:
    """Train the plain layer and ours on all ranks, and ours on rank 0, which shows the results."""
    dist.init_process_group("gloo")
    seed = task.settings.seed
    base, batches = without_dropout(task.build(seed)), task.batches(seed)
    one = Run(OURS, task, base)
    one.result.name = f"{OURS}, 1 process"
    plain, ours = (ShardedRun(kind, task, base) for kind in (PLAIN, OURS))
    check_same_start(plain.model, ours.model)
    results = [run.result for run in (plain, ours, one)]
    log = Log(task, results, out, console)
    console.print(f"FSDP2 over {dist.get_world_size()} processes (gloo)")
    console.print(conditions(one, task.settings))
    train_and_score([plain, ours], task, batches, seed, log)
    loss, trained, rank = task.held_out_loss(ours.model), ours.trained(), dist.get_rank()
    dist.destroy_process_group()
    if rank > 0:
        return
    train_and_score([one], task, batches, seed, log)
    for run in (plain, ours, one):
        run.result.rank_mib = local_mib(run)
    whole = Run(OURS, task, base)
    whole.model.load_state_dict(trained, strict=False)
    check_same_loss(whole.model, loss, task, "gathered from the ranks")
    finish(results, one.result, whole, task, out, log)
