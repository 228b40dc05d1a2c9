"""Trace one training step of one rank among many: memory by kind, bytes by collective.

The process group may be a fake one, whose collectives do nothing, and the tensors fake ones, which
have shapes and no data: then a step of 4,096 ranks is traced in one process. Over a real group the
same step is traced as it runs.
"""

import time
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed._tools.fake_collectives import CollectiveOp, collective_ops, sync_ops
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._sharding_prop import ShardingPropagator
from torch.distributed.tensor.parallel import loss_parallel
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from lora_ext import LinearWithLoRA, bases
from lora_ext.backends import cpp

from .decoder import DecoderShape, adapted_decoder, lay_out

LAYERS = ("plain", "composed", "lora_ext")
KINDS = ("weights", "adapters", "gradients", "optimizer", "activations")
DIMENSIONS = ("data", "tensor")
# Steps of a ring: (n - 1) / n of the message for each, by what an operator's name has in it.
_RING_PASSES = {"all_gather": 1, "reduce_scatter": 1, "all_reduce": 2}
_NAMES = {"allgather": "all_gather", "allreduce": "all_reduce"}


@dataclass
class Traffic:
    """What one rank's collectives of one kind over one dimension of the mesh amount to.

    Attributes:
        calls: how many.
        message_bytes: of the whole tensor: all_gather's output, reduce_scatter's input,
            all_reduce's tensor.
        sent_bytes: what the rank sends, and receives, if each runs over a ring: (n - 1) / n of the
            message, and twice that for all_reduce.

    """

    calls: int = 0
    message_bytes: int = 0
    sent_bytes: int = 0


@dataclass
class Trace:
    """One rank's step.

    Attributes:
        memory: bytes of each of KINDS: `weights` (frozen) and `adapters` as they are sharded,
            `gradients` and `optimizer` of the adapters, `activations` that are kept between forward
            and backward; with them `gathered`, parameters whole at the end of the forward, and
            `peak`, the most that is held at any time, all of it included.
        traffic: by (collective, dimension of the mesh).

    """

    memory: dict[str, int]
    traffic: dict[tuple[str, str], Traffic] = field(default_factory=dict)


class Collectives(TorchDispatchMode):
    """Count the calls and bytes of each collective that runs inside.

    Args:
        mesh: whose dimensions name the groups.

    Raises:
        RuntimeError: a collective that is none of all_gather, reduce_scatter and all_reduce.

    """

    def __init__(self, mesh: DeviceMesh) -> None:
        super().__init__()
        names = mesh.mesh_dim_names or ()
        self._dimensions = {mesh.get_group(name).group_name: name for name in names}
        self.traffic: dict[tuple[str, str], Traffic] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """Run an operator, and note it if it is a collective."""
        if any(kind is DTensor for kind in types):
            return NotImplemented  # DTensor calls the operators of its own parts
        result = func(*args, **(kwargs or {}))
        if func in collective_ops - sync_ops:
            self._note(func, result, args, kwargs)
        return result

    def _note(self, func: Any, result: Any, args: Any, kwargs: Any) -> None:
        operator = func.name().partition("::")[2]
        for short, name in _NAMES.items():
            operator = operator.replace(short, name)
        kind = next((kind for kind in _RING_PASSES if kind in operator), None)
        if kind is None:
            raise RuntimeError(f"no rule for the bytes of the collective {func.name()}")
        group = CollectiveOp.get_process_group(func, args)
        message = CollectiveOp.get_comm_tensor_size(func, result, args, kwargs)
        key = kind, self._dimensions[group.group_name]
        traffic = self.traffic.setdefault(key, Traffic())
        traffic.calls += 1
        traffic.message_bytes += message
        traffic.sent_bytes += _RING_PASSES[kind] * message * (group.size() - 1) // group.size()


def simulate_step(
    shape: DecoderShape,
    layer: str,
    ranks: int,
    tp: int,
    batch: int,
    sequence: int,
    dtype: torch.dtype = torch.bfloat16,
    checkpointing: bool = False,
) -> Trace:
    """Trace rank 0's step of a decoder on a mesh of fake ranks; no memory is taken.

    Args:
        shape: sizes of the decoder; heads, kv_heads, ffn and vocabulary multiples of `tp`.
        layer: of LAYERS: "plain"; "lora_ext", whose operators run; or "composed", what lora_ext
            does where a weight may not be read: the base is called, the low-rank part added.
        ranks: of the world, a multiple of `tp`.
        tp: ranks that share each linear; the others share parameters by FSDP2.
        batch: sequences on each data-parallel rank.
        sequence: tokens of each, a multiple of `tp`.
        dtype: of weights, adapters and activations.
        checkpointing: keep of each block its input alone.

    Raises:
        RuntimeError: "lora_ext" without its extension, or with a process group already there.

    """
    if layer == "lora_ext" and cpp._not_loaded is not None:
        raise RuntimeError(cpp._not_loaded)
    with _fake_ranks(ranks), ExitStack() as stack:
        mesh = init_device_mesh("cpu", (ranks // tp, tp), mesh_dim_names=DIMENSIONS)
        with torch.device("meta"):
            model = adapted_decoder(shape, layer == "plain", dtype)
        lay_out(model, mesh, checkpointing)
        if layer == "composed":  # as over a base with a hook, which may not be read
            for module in filter(lambda m: isinstance(m, LinearWithLoRA), model.modules()):
                module.linear.register_forward_hook(lambda *_: None)
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        if layer == "lora_ext":  # fake tensors run the operators' shape rules
            stack.enter_context(mock.patch.object(cpp, "_PLAIN", (*cpp._PLAIN, FakeTensor)))
        model.to_empty(device="cpu")
        tokens = torch.zeros(batch, sequence, dtype=torch.long)
        return trace_step(model, mesh, tokens)


def trace_step(model: nn.Module, mesh: DeviceMesh, tokens: Tensor) -> Trace:
    """Trace one step, AdamW on the adapters, of a decoder laid out on a mesh.

    Args:
        model: as `decoder.lay_out` gives it.
        mesh: the one it was laid out on.
        tokens: (batch, sequence), input and target at once.

    """
    parameters = dict(model.named_parameters())
    trained = {name: p for name, p in parameters.items() if p.requires_grad}
    optimizer = torch.optim.AdamW(trained.values())
    for parameter in trained.values():  # as in the middle of training: there is optimizer state
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    tracker = FSDPMemTracker(model, optimizer)
    tracker.track_inputs((tokens,))
    collectives = Collectives(mesh)
    with ExitStack() as stack:
        for context in (_propagation_unseen(), _hooks_that_look_on(), loss_parallel()):
            stack.enter_context(context)
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", "Full backward hook")  # tokens need no gradient
        stack.enter_context(collectives)
        stack.enter_context(tracker)
        loss = model(tokens, tokens)
        if dist.get_backend() != "fake":
            time.sleep(0.5)  # gloo's threads let go of a result some time after its wait returned
        held = tracker.get_tracker_snapshot()[tokens.device]
        loss.backward()
        gradients = _bytes(p.grad for p in trained.values())
        optimizer.step()
    states = (t for state in optimizer.state.values() for t in state.values())
    memory = {
        "weights": _bytes(p for name, p in parameters.items() if name not in trained),
        "adapters": _bytes(trained.values()),
        "gradients": gradients,
        "optimizer": _bytes(states),
        "activations": held["Activation"],
        "gathered": held["Unsharded Param"],
        "peak": tracker.get_tracker_snapshot("peak")[tokens.device]["Total"],
    }
    return Trace(memory, collectives.traffic)


def _bytes(tensors: Any) -> int:
    """Sum the sizes of this rank's parts."""
    parts = (t.to_local() if isinstance(t, DTensor) else t for t in tensors)
    return sum(part.numel() * part.element_size() for part in parts)


@contextmanager
def _fake_ranks(world: int) -> Iterator[None]:
    """Be rank 0 of `world` ranks whose collectives do nothing."""
    if dist.is_initialized():
        raise RuntimeError("a process group is already there: simulate in a process of its own")
    dist.init_process_group("fake", rank=0, world_size=world, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


def _hooks_that_look_on() -> AbstractContextManager[Any]:
    """Let lora_ext's layer run as it does without the tracker.

    It calls its parts one by one where hooks are on every module, in case one of them changes a
    result; the tracker's do not.
    """
    kinds = ("forward_hooks", "forward_pre_hooks", "backward_hooks", "backward_pre_hooks")
    none = SimpleNamespace(**{f"_global_{kind}": {} for kind in kinds})
    return mock.patch.object(bases, "every_module", none)


@contextmanager
def _propagation_unseen() -> Iterator[None]:
    """Hide from the tracker what DTensor runs on whole fake tensors to learn a result's shape.

    It takes the fake mode that is there, and the tracker, which knows such calls by another mode,
    would count tensors that no rank ever holds.
    """
    name = "_propagate_tensor_meta_non_cached"
    propagate = getattr(ShardingPropagator, name)

    def unseen(self: ShardingPropagator, schema: Any) -> Any:
        with _disable_current_modes():
            return propagate(self, schema)

    with mock.patch.object(ShardingPropagator, name, unseen):
        yield
