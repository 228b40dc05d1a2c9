"""A decoder of Llama's shape with LoRA on every linear, and its layout on a mesh of ranks."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    PrepareModuleInput,
    RowwiseParallel,
    parallelize_module,
)

import lora_ext
from lora_ext import LinearWithLoRA, testing
from lora_ext.distributed import LoRAColwiseParallel, LoRARowwiseParallel
from lora_ext.inject import linears


@dataclass(frozen=True)
class DecoderShape:
    """Sizes of a decoder; the default is Llama-70B's."""

    layers: int = 80
    hidden: int = 8192
    ffn: int = 28672
    heads: int = 64
    kv_heads: int = 8
    vocabulary: int = 128256
    rank: int = 16

    @property
    def base_parameters(self) -> int:
        """Elements of the frozen weights: linears, embedding, norms."""
        kv = self.hidden * self.kv_heads // self.heads
        linear = 2 * self.hidden * (self.hidden + kv) + 3 * self.hidden * self.ffn
        layers = self.layers * (linear + 2 * self.hidden)
        return layers + 2 * self.vocabulary * self.hidden + self.hidden

    @property
    def adapter_parameters(self) -> int:
        """Elements of all A (in, rank) and B (rank, out)."""
        kv = self.hidden * self.kv_heads // self.heads
        sides = 2 * (2 * self.hidden + self.hidden + kv) + 3 * (self.hidden + self.ffn)
        return self.rank * (self.layers * sides + self.hidden + self.vocabulary)


class PlainLinearWithLoRA(LinearWithLoRA):
    """The plain classes' own `lora` and `forward`, in a type that our parallel styles take.

    ColwiseParallel and RowwiseParallel take an nn.Linear, which the plain layer's `lora` is not; so
    its parameters are placed as ours are, and PyTorch's operators run on them one by one.
    """

    def __init__(self, linear: nn.Linear, rank: int, alpha: float) -> None:
        super().__init__(linear, rank, alpha)
        self.lora = testing.LoRALayer(linear.in_features, linear.out_features, rank, alpha)

    def forward(self, x: Tensor) -> Tensor:
        """Return `linear(x) + lora(x)`; an x that comes plain is made a DTensor first."""
        if self._parallel is not None and not isinstance(x, DTensor):
            mesh = self.linear.weight.device_mesh
            x = DTensor.from_local(x, mesh, (self._parallel.takes,), run_check=False)
        return testing.LinearWithLoRA.forward(self, x)


class RMSNorm(nn.Module):
    """RMSNorm computed in float32, of which x and one number a row are kept for the backward."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden))

    def forward(self, x: Tensor) -> Tensor:
        """Return x, (..., hidden), over its root mean square, times the weight."""
        return torch.ops.aten._fused_rms_norm(x, self.weight.shape, self.weight, 1e-5)[0]


class Attention(nn.Module):
    """Causal attention with grouped heads, without rotation."""

    def __init__(self, shape: DecoderShape) -> None:
        super().__init__()
        self.head_size = shape.hidden // shape.heads
        kv = shape.kv_heads * self.head_size
        self.q = nn.Linear(shape.hidden, shape.hidden, bias=False)
        self.k = nn.Linear(shape.hidden, kv, bias=False)
        self.v = nn.Linear(shape.hidden, kv, bias=False)
        self.o = nn.Linear(shape.hidden, shape.hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return (batch, sequence, hidden), as x."""
        q, k, v = (
            projection(x).unflatten(-1, (-1, self.head_size)).transpose(1, 2)
            for projection in (self.q, self.k, self.v)
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.o(y.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """Gated feed-forward part: down(silu(gate(x)) * up(x))."""

    def __init__(self, shape: DecoderShape) -> None:
        super().__init__()
        self.gate = nn.Linear(shape.hidden, shape.ffn, bias=False)
        self.up = nn.Linear(shape.hidden, shape.ffn, bias=False)
        self.down = nn.Linear(shape.ffn, shape.hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return (batch, sequence, hidden), as x."""
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    """One layer of the decoder: attention and feed-forward, each behind a norm and added to x."""

    def __init__(self, shape: DecoderShape) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(shape.hidden)
        self.attention = Attention(shape)
        self.mlp_norm = RMSNorm(shape.hidden)
        self.mlp = MLP(shape)

    def forward(self, x: Tensor) -> Tensor:
        """Return (batch, sequence, hidden), as x."""
        x = x + self.attention(self.attention_norm(x))
        return x + self.mlp(self.mlp_norm(x))


class Decoder(nn.Module):
    """Embedding, blocks, norm and head; tokens (batch, sequence) -> the mean loss of the next."""

    def __init__(self, shape: DecoderShape) -> None:
        super().__init__()
        self.embedding = nn.Embedding(shape.vocabulary, shape.hidden)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.norm = RMSNorm(shape.hidden)
        self.head = nn.Linear(shape.hidden, shape.vocabulary, bias=False)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Return the mean cross-entropy in nats, a scalar."""
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.norm(x))
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def adapted_decoder(shape: DecoderShape, plain_layer: bool, dtype: torch.dtype) -> Decoder:
    """Return a frozen decoder of one dtype with a LoRA layer on every linear, plain or ours.

    Adapters have the same dtype. Under `torch.device("meta")` it takes no memory.
    """
    with _default_dtype(dtype):
        model = Decoder(shape).requires_grad_(False)
        if plain_layer:
            for parent, attribute, _, linear in list(linears(model)):
                setattr(parent, attribute, PlainLinearWithLoRA(linear, shape.rank, 1.0))
        else:
            lora_ext.replace_linear_with_lora(model, shape.rank, 1.0)
    return model


def lay_out(model: Decoder, mesh: DeviceMesh, checkpointing: bool) -> Decoder:
    """Spread a decoder over a mesh with dimensions "data" (FSDP2) and "tensor", in place.

    Between the linears activations are split along the sequence over "tensor" (Megatron's sequence
    parallelism); one block is one unit of FSDP2, and is gathered again for its backward.

    Args:
        model: as `adapted_decoder` gives it.
        mesh: two-dimensional.
        checkpointing: keep of each block its input alone, and run its forward again.

    """
    tensor = mesh["tensor"]
    whole, split = Replicate(), Shard(1)
    gather = PrepareModuleInput(input_layouts=split, desired_input_layouts=whole)
    columns, rows = LoRAColwiseParallel, LoRARowwiseParallel
    for i, block in enumerate(model.blocks):
        plan = {"attention": gather, "mlp": gather}
        plan |= {f"attention.{name}": columns() for name in "qkv"}
        plan |= {f"mlp.{name}": columns() for name in ("gate", "up")}
        plan |= {name: rows(output_layouts=split) for name in ("attention.o", "mlp.down")}
        parallelize_module(block, tensor, plan)
        if checkpointing:
            model.blocks[i] = checkpoint_wrapper(block)
        fully_shard(model.blocks[i], mesh=mesh["data"])
    head = columns(input_layouts=split, use_local_output=False)
    embedding = RowwiseParallel(input_layouts=whole, output_layouts=split)
    parallelize_module(model, tensor, {"embedding": embedding, "head": head})
    fully_shard(model, mesh=mesh["data"])
    return model


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
