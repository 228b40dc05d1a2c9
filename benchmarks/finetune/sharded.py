"""Runs that several processes train together: FSDP2, each process on its rows of every batch.

What one process computes is reproduced to rounding: the losses are weighted by rows, and dropout
draws the whole batch's mask on every rank and keeps the rank's rows of it.
"""

import time
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.overrides import TorchFunctionMode

from .task import Batch, Settings, Task
from .train import Run


class ShardedRun(Run):
    """A run whose parameters, gradients and optimizer state are spread over the ranks.

    Args:
        kind: as for Run.
        task: the task.
        base: the pretrained model, the same on all ranks; it is copied.
        settings: seed and backend.

    """

    def __init__(self, kind: str, task: Task, base: nn.Module, settings: Settings) -> None:
        super().__init__(kind, task, base, settings)
        for block in blocks(self.model):
            fully_shard(block)
        fully_shard(self.model)
        trainable = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trainable, lr=self.learning_rate)

    def step(self, task: Task, batch: Batch, seed: int, decay: float = 1.0) -> None:
        """Take one training step; the loss noted is the whole batch's, in nats."""
        self.model.train()
        for group in self.optimizer.param_groups:
            group["lr"] = decay * self.learning_rate
        torch.manual_seed(seed)
        total = len(batch["input_ids"])
        rows, weight = share(total, dist.get_rank(), dist.get_world_size())
        part = {name: value[rows] for name, value in batch.items()}
        begin = time.perf_counter()
        with DropoutOfWholeBatch(rows, total):
            loss = weight * task.loss(self.model, part)
        # FSDP takes the mean of the ranks' gradients, and the batch's is the sum of the shares'.
        (loss * dist.get_world_size()).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.result.step_s.append(time.perf_counter() - begin)
        whole = loss.detach().clone()
        dist.all_reduce(whole)
        self.result.losses.append(whole.item())

    def trained(self) -> dict[str, Tensor]:
        """Return every trained parameter whole, by name; all ranks must call it together."""
        _reshard(self.model)
        parameters = self.model.named_parameters()
        return {
            name: p.full_tensor()
            for name, p in parameters
            if isinstance(p, DTensor) and p.requires_grad
        }


def local_mib(run: Run) -> float:
    """Return the size of a run's parameters and optimizer state in this process, in MiB."""
    if isinstance(run, ShardedRun):
        _reshard(run.model)
    kept: list[Any] = list(run.model.parameters())
    kept += [t for state in run.optimizer.state.values() for t in state.values()]
    tensors = (t.to_local() if isinstance(t, DTensor) else t for t in kept)
    return sum(t.numel() * t.element_size() for t in tensors) / 2**20


def _reshard(model: Any) -> None:
    model.reshard()  # the root, whose parameters stay gathered after a forward


def blocks(model: nn.Module) -> list[nn.Module]:
    """Return the layers of a model, that is of its longest nn.ModuleList; none if it has none."""
    lists = [list(m) for m in model.modules() if isinstance(m, nn.ModuleList)]
    return max(lists, key=len, default=[])


def share(total: int, rank: int, world: int) -> tuple[slice, float]:
    """Return the rows of a batch that a rank takes, and the weight of their mean in the batch's.

    The tasks' losses are means over rows that weigh the same. A rank for which no row is left takes
    the first one with weight zero, since all ranks have to take part in a step.

    Args:
        total: rows of the batch, at least 1.
        rank: of this process, from 0.
        world: number of processes.

    """
    start, stop = total * rank // world, total * (rank + 1) // world
    if start == stop:
        return slice(0, 1), 0.0
    return slice(start, stop), (stop - start) / total


class DropoutOfWholeBatch(TorchFunctionMode):
    """Make dropout drop in a part of a batch what it would drop there in the whole batch.

    Covers F.dropout and scaled_dot_product_attention with a mask, of tensors whose first dimension
    is the batch's.

    Args:
        rows: which rows the part is.
        total: rows of the whole batch.

    Raises:
        NotImplementedError: attention with dropout that is causal or has grouped heads.

    """

    def __init__(self, rows: slice, total: int) -> None:
        super().__init__()
        self.rows, self.total = rows, total

    def __torch_function__(self, func, types, args=(), kwargs=None):
        """Call a torch function, or its replacement here."""
        kwargs = kwargs or {}
        if func is F.dropout:
            return self._dropout(*args, **kwargs)
        if func is F.scaled_dot_product_attention and kwargs.get("dropout_p"):
            return self._attention(*args, **kwargs)
        return func(*args, **kwargs)

    def _dropout(
        self, x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
    ) -> Tensor:
        if not training or p == 0:
            return x
        ones = x.new_ones(self.total, *x.shape[1:])
        return x * F.dropout(ones, p)[self.rows]

    def _attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        if is_causal or enable_gqa:
            raise NotImplementedError(
                "dropout in attention must be without is_causal and enable_gqa, "
                f"got is_causal={is_causal}, enable_gqa={enable_gqa}"
            )
        scores = q @ k.transpose(-2, -1) * (q.shape[-1] ** -0.5 if scale is None else scale)
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            scores = scores.masked_fill(~attn_mask, float("-inf"))
        elif attn_mask is not None:
            scores = scores + attn_mask
        return self._dropout(scores.softmax(-1), dropout_p) @ v
