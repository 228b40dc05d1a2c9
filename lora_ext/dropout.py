"""Dropout on the low-rank branch: the mask, as bits, that a Call carries as `low.keep`.

    y = x @ weight.T + bias + scale / (1 - p) * ((keep * x) @ A @ B)

keep (M, K) is 0 with probability p. An element of it is a hash of a seed, its row and its column,
so it is the same on every device and however the rows are split; or it is the draw of `F.dropout`.
One bit an element is kept for the backward.
"""

import functools
import math
import os
import threading
from collections.abc import Callable
from importlib import import_module

import torch
from torch import Tensor
from torch.nn import Parameter

from . import ops

_MASK = 0xFFFFFFFF
# Of a thread that has left the interpreter for a draw of PyTorch's, until that holds the generator:
# about one.
_WAIT_US = 5.0
_drawing = threading.Lock()  # of our own draws; PyTorch's lock of a generator is not to be had
_alone = True  # no other thread has been seen to draw


def draw_keep(
    x: Tensor, p: float, mask: str = "hash", columns: tuple[int, int] | None = None
) -> Tensor:
    """Draw a new mask for x (..., K) from torch's default generator, as bits (M, ceil(K / 8)).

    Args:
        x: (..., K), a plain tensor.
        p: probability of a zero, from 0 to 1.
        mask: "hash" draws a seed alone, the fast way; "torch" draws the very mask that `F.dropout`
            would apply to x on a CPU, and leaves the generator as that does.
        columns: where x is a part of a wider tensor's columns, the first one and how many that has:
            the mask is then this part of the mask that the whole would get.

    Raises:
        ValueError: x is nested or sharded.

    """
    _require_plain(x)
    *lead, K = x.shape
    M = math.prod(lead)
    first, of_all = columns or (0, K)
    if p == 1:  # F.dropout draws nothing then
        return torch.zeros(M, -(-K // 8), dtype=torch.uint8, device=x.device)
    if mask == "torch" and of_all != K:
        keep = torch.empty(M, of_all, dtype=torch.bool, device=x.device).bernoulli_(1 - p)
        return torch.ops.lora_ext.pack_keep.default(keep[:, first : first + K])
    if mask == "torch":
        if not torch.compiler.is_compiling() and _in_generators_order(x) and _draws_as_torch():
            bits = _draw_bernoulli(torch.default_generator, M, K, 1 - p)
            if bits is not None:
                return bits
        # Of x's own strides: the draw follows the order of memory.
        keep = torch.empty_like(x, dtype=torch.bool).bernoulli_(1 - p)
        return torch.ops.lora_ext.pack_keep.default(keep.reshape(M, K))
    return torch.ops.lora_ext.draw_keep.default(draw_seed(x), M, K, p, first)


def _in_generators_order(x: Tensor) -> bool:
    return x.is_cpu and type(x) in (Tensor, Parameter) and x.is_contiguous()


def _draw_bernoulli(generator: torch.Generator, M: int, K: int, p: float) -> Tensor | None:
    """Return as bits what `bernoulli_(p, generator=generator)` gives, five times as fast.

    None, and the generator as it is, where another thread has drawn from it meanwhile; and from
    then on at once, since that thread may draw again: `bernoulli_` holds the generator's own lock.
    """
    global _alone
    if not _alone:
        return None
    with _drawing:
        before = generator.get_state()
        after = before.clone()
        bits = torch.ops.lora_ext.draw_bernoulli.default(after, M, K, p)
        wait_us = _WAIT_US if threading.active_count() > 1 else 0.0
        _alone = _step_generator()(generator, before, after, wait_us)
        return bits if _alone else None


@functools.cache
def _step_generator() -> Callable[..., bool]:
    return import_module("lora_ext._C").step_generator


def _renew_lock() -> None:
    """Give a forked process a lock that no thread of its parent's holds."""
    global _drawing
    _drawing = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_lock)


@functools.cache
def _draws_as_torch() -> bool:
    """Whether the kernel's numbers are those of this PyTorch, which may change how it draws."""
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    if not has_kernel("lora_ext::draw_bernoulli", "CPU"):
        return False
    ours, theirs = torch.Generator("cpu"), torch.Generator("cpu")
    for generator in (ours, theirs):
        generator.manual_seed(1)
        torch.empty(1, device="cpu").uniform_(generator=generator)  # one word: an odd place
    drawn = torch.empty(3, 700, dtype=torch.bool, device="cpu").bernoulli_(0.9, generator=theirs)
    bits = _draw_bernoulli(ours, 3, 700, 0.9)
    same_bits = bits is not None and torch.equal(bits, pack_bits(drawn))
    return same_bits and torch.equal(ours.get_state(), theirs.get_state())


def draw_seed(x: Tensor) -> Tensor:
    """Draw a seed, (2,) int64 on x's device, from torch's default generator there."""
    return torch.randint(2**31, (2,), device=x.device)


def keep_mask(seed: Tensor, shape: tuple[int, int], p: float, first_column: int = 0) -> Tensor:
    """Return keep, (M, K) bool: False with probability p, each element by itself.

    Of a wider mask it may be the K columns from `first_column` on.

    Rows and columns are hashed one by one; an element is a multiply-xorshift-multiply of the two
    hashes, in int32, where products wrap. Multipliers: C. Wellons, hash-prospector.
    """
    M, K = shape
    rows = torch.arange(M, device=seed.device)
    columns = torch.arange(first_column, first_column + K, device=seed.device)
    row = _mix(_mix((rows & _MASK) ^ seed[0]) ^ (rows >> 32) ^ seed[1])  # (M,)
    column = _mix(_mix(columns ^ seed[1]) ^ seed[0])  # (K,)
    n = (_signed(row)[:, None] ^ _signed(column)) * 0x21F0AAAD  # (M, K)
    n = (n ^ (n >> 15)) * 0x735A2D97
    return n >= min(round(p * 2**32), 2**32 - 1) - 2**31


def scale_of(p: float) -> float:
    """Return what dropout multiplies the low-rank part by: 1 / (1 - p), and 1 where all is zero."""
    return 1 / (1 - p) if p < 1 else 1.0


def _mix(n: Tensor) -> Tensor:
    """Hash 32-bit numbers held in int64, where no product overflows."""
    n = (n ^ (n >> 16)) * 0x21F0AAAD & _MASK
    n = (n ^ (n >> 15)) * 0x735A2D97 & _MASK
    return n ^ (n >> 15)


def _signed(n: Tensor) -> Tensor:
    return (n - 2**31).to(torch.int32)


def pack_bits(mask: Tensor) -> Tensor:
    """Return a mask (M, K), zero or not, as bits (M, ceil(K / 8)) uint8, the lowest bit first."""
    M, K = mask.shape
    kept = (mask != 0).to(torch.uint8)
    whole = torch.nn.functional.pad(kept, (0, -K % 8)).view(M, -(-K // 8), 8)
    places = torch.arange(8, dtype=torch.uint8, device=mask.device)
    return (whole << places).sum(2, dtype=torch.uint8)


def draw_bits(seed: Tensor, rows: int, cols: int, p: float, first_column: int = 0) -> Tensor:
    """Return `keep_mask` as bits, by PyTorch's operations."""
    return pack_bits(keep_mask(seed, (rows, cols), p, first_column))


# Where neither C++ nor Triton has a kernel for a device.
ops.LIBRARY.impl("pack_keep", pack_bits, "CompositeExplicitAutograd")
ops.LIBRARY.impl("draw_keep", draw_bits, "CompositeExplicitAutograd")


def unpack_bits(bits: Tensor, K: int) -> Tensor:
    """Return bits (M, ceil(K / 8)) as the mask (M, K) bool that `pack_bits` took."""
    places = torch.arange(8, dtype=torch.uint8, device=bits.device)
    return (bits[:, :, None] >> places & 1).flatten(1)[:, :K].bool()


def drop(x: Tensor, p: float) -> Tensor:
    """Return keep * x, not scaled, for a new mask, by PyTorch's own operations.

    For what has no hand-written gradient: under transforms of torch.func, in tests.

    Args:
        x: (..., K), a plain tensor.
        p: probability of a zero, from 0 to 1.

    Raises:
        ValueError: x is nested or sharded.

    """
    _require_plain(x)
    if p == 1:
        return torch.zeros_like(x)
    seed, K = draw_seed(x), x.shape[-1]
    mask = keep_mask(seed, (math.prod(x.shape[:-1]), K), p)
    return x.masked_fill(~mask.view(x.shape), 0)


def _require_plain(x: Tensor) -> None:
    if x.is_nested or hasattr(x, "device_mesh"):
        got = "a nested tensor" if x.is_nested else f"a {type(x).__name__}"
        raise ValueError(f"x must be a plain tensor where dropout is on, got {got}")
