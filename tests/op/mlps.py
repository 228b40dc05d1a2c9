"""What the tests of MLPs with adapters share: the plain layer, and the error rule of an MLP."""

import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_ext import LinearWithLoRA
from lora_ext.testing import compare

K, HIDDEN, ALPHA = 40, 57, 1.5


def adapted(K: int, N: int, rank: int, dropout: float, bias: bool) -> LinearWithLoRA:
    drawn = {"dropout": dropout, "dropout_mask": "torch"}
    layer = LinearWithLoRA(nn.Linear(K, N, bias=bias), rank, ALPHA, **drawn)
    nn.init.normal_(layer.lora.B, std=0.3)
    return layer


def plain_layer(layer: nn.Module, x: Tensor) -> Tensor:
    """Return what PEFT computes, by PyTorch's own operations."""
    if isinstance(layer, nn.Linear):
        return layer(x)
    lora = layer.lora
    seen = F.dropout(x, lora.dropout) if lora.dropout and lora.training else x
    return layer.linear(x) + lora.alpha * (seen @ lora.A @ lora.B)


def results(mlp, x: Tensor, layers) -> dict[str, Tensor]:
    """Return y and all gradients of the sum of y's squares."""
    torch.manual_seed(7)
    x = x.detach().requires_grad_()
    y = mlp(x, *layers)
    named = {f"d{i}.{n}": p for i, m in enumerate(layers) if m for n, p in m.named_parameters()}
    grads = torch.autograd.grad(y.square().sum(), [x, *named.values()])
    return {"y": y.detach()} | dict(zip(["dx", *named], grads, strict=True))


def broken(
    ours: Callable[..., Tensor],
    plain: Callable[..., Tensor],
    layers_of: Callable[[], list[nn.Module | None]],
    dtype: torch.dtype,
) -> list[str]:
    """Return a line for each result of `ours(x, *layers)` that breaks the error rule.

    `plain` is that MLP by PyTorch's operations: run in dtype, and in float64 as the oracle.
    """
    torch.manual_seed(1)
    layers = [layer and layer.to(dtype) for layer in layers_of()]
    exact_layers = [layer and copy.deepcopy(layer).double() for layer in layers]
    x = torch.randn(3, 11, K).to(dtype)

    def as_one(x: Tensor, *layers: nn.Module | None) -> Tensor:
        y = ours(x, *layers)
        assert "GatedMLP" in type(y.grad_fn).__name__
        return y

    rounded, exact = results(plain, x, layers), results(plain, x.double(), exact_layers)
    # In float64 the oracle is the plain layer itself, whose roundings no term counts.
    eps, lines = (64 if dtype == torch.float64 else 4) * torch.finfo(dtype).eps, []
    for name, got in results(as_one, x, layers).items():
        assert got.dtype == dtype and got.shape == exact[name].shape
        found = compare(name, got, rounded[name], exact[name], lambda n, e=exact[name]: eps * n(e))
        lines += [str(error) for error in found if error.broken]
    return lines


def kept_elements(forward, x: Tensor, layers) -> int:
    """Return how many elements a forward keeps next to x and the parameters."""
    tensors = [x, *(p for layer in layers if layer for p in layer.parameters())]
    known = {t.untyped_storage().data_ptr() for t in tensors}
    kept = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage  # alive, so that its address is not used again
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        forward()
    return sum(storage.nbytes() for storage in kept.values()) // x.element_size()
