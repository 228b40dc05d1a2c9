"""DoRA in training with a small dropout: the weight meets x and the dropped x, in one product.

    plain = x @ weight.T;  dropped = (keep * x) @ weight.T / (1 - p)
          = (plain - gone @ weight.T) / (1 - p),  gone = x where it is dropped: few elements, sparse
    dx = (d_plain + d_dropped / (1 - p)) @ weight where x is kept, d_plain @ weight where it is not

What is dropped is summed by sparse products, so that of two products of x's size in each direction
one is left. Where p is larger, or the sparse products are slow, the caller takes two.
"""

import functools
import warnings

import torch
from torch import Tensor
from torch.nn import Parameter

from .backends import reference
from .dropout import unpack_bits

# From where two products are as fast, and below what calling sparse ones costs more than it saves.
_MOST = 0.1
_LEAST_ROWS = 64


def is_few(x: Tensor, weight: Tensor, p: float) -> bool:
    """Whether `both_products` computes x's two products here, and faster than by themselves.

    Args:
        x: (..., K).
        weight: (N, K).
        p: probability with which an element of x is dropped.

    """
    return (
        0 < p <= _MOST
        and x.is_cpu
        and x.dtype is weight.dtype
        and x.dtype in (torch.float32, torch.float64)
        and type(x) in (Tensor, Parameter)
        and x.numel() >= _LEAST_ROWS * x.shape[-1] > 0
        and not weight.requires_grad
        and torch.backends.mkl.is_available()
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
    )


def both_products(x: Tensor, weight: Tensor, keep: Tensor, p: float) -> tuple[Tensor, Tensor]:
    """Return `x @ weight.T` and `(keep * x) @ weight.T / (1 - p)`, (M, N), differentiable in x.

    Args:
        x: (M, K), float32 or float64.
        weight: (N, K), which needs no gradient.
        keep: the mask as bits, (M, ceil(K / 8)) uint8.
        p: what an element was dropped with, below 1.

    """
    return _BothProducts.apply(x, weight, keep, p)


class _BothProducts(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, keep, p):
        ctx.save_for_backward(weight, keep)
        ctx.p = p
        index, crow, column = _dropped(keep, x.shape[1])
        gone = torch.sparse_csr_tensor(
            crow, column, x.reshape(-1)[index], x.shape, check_invariants=False
        )
        plain = x @ weight.T
        dropped = gone @ weight.T
        return plain, torch.sub(plain, dropped, out=dropped).mul_(1 / (1 - p))

    @staticmethod
    def backward(ctx, d_plain, d_dropped):
        weight, keep = ctx.saved_tensors
        scale = 1 / (1 - ctx.p)
        if torch.is_grad_enabled():  # under create_graph: by differentiable operations
            low = reference.masked(scale * (d_dropped @ weight), keep)
            return d_plain @ weight + low, None, None, None
        dx = torch.add(d_plain, d_dropped, alpha=scale) @ weight
        index, crow, column = _dropped(keep, dx.shape[1])
        at = torch.sparse_csr_tensor(
            crow, column, dx.new_zeros(len(index)), dx.shape, check_invariants=False
        )
        sums = torch.sparse.sampled_addmm(at, d_plain.contiguous(), weight, beta=0.0)
        dx.view(-1)[index] = sums.values()
        return dx, None, None, None


def _dropped(keep: Tensor, K: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return where a mask is 0: the places in (M, K) end to end, and as rows and columns of CSR."""
    _say_beta_once()
    gone = ~unpack_bits(keep, K)
    (index,) = gone.view(-1).nonzero(as_tuple=True)
    crow = torch.zeros(len(keep) + 1, dtype=torch.int32, device=keep.device)
    torch.cumsum(gone.sum(1, dtype=torch.int32), 0, dtype=torch.int32, out=crow[1:])
    return index, crow, (index % K).to(torch.int32)


@functools.cache
def _say_beta_once() -> None:
    """Have PyTorch say now, unheard, that sparse CSR is in beta: it says so once a process."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.zeros(1, 1, device="cpu").to_sparse_csr()
