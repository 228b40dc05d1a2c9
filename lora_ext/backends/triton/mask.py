"""Dropout's mask as bits on a GPU, a launch each: drawn from a seed's hash, or packed from a draw.

The bits are those of lora_ext/dropout.py and csrc/cpu/keep.cpp. Rows of whole 32-bit words are
written as such, others byte by byte.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import offsets
from .launches import Launch

# Columns of a program: enough rows share the hash of a column, 20 operations in place of 8.
_ROWS, _COLS = 32, 1024
# 128 bits a load of bytes, and a kilobyte in flight for each of 8 rows.
_PACKED_ROWS, _PACKED_COLS = 8, 1024


def draw_keep(seed: Tensor, rows: int, cols: int, p: float, first_column: int = 0) -> Tensor:
    """Return keep (rows, ceil(cols / 8)) uint8 from a seed (2,) int64 on the device."""
    bits = seed.new_empty(rows, triton.cdiv(cols, 8), dtype=torch.uint8)
    if bits.numel():
        words = _words(bits, cols)
        kernel = Launch(
            lora_draw_keep_kernel,
            _grid(rows, cols, _ROWS, _COLS),
            **dict(BLOCK_M=_ROWS, BLOCK_W=_COLS // (8 * words.element_size()), num_warps=4),
        )
        threshold = min(round(p * 2**32), 2**32 - 1) - 2**31
        kernel(
            seed=seed.contiguous(), bits=words, M=rows, K=cols, first_column=first_column,
            threshold=threshold,
        )  # fmt: skip
    return bits


def pack_keep(mask: Tensor) -> Tensor:
    """Return a mask (M, K), zero or not in any dtype and by any strides, as bits."""
    M, K = mask.shape
    bits = mask.new_empty(M, triton.cdiv(K, 8), dtype=torch.uint8)
    if bits.numel():
        kernel = Launch(
            lora_pack_keep_kernel,
            _grid(M, K, _PACKED_ROWS, _PACKED_COLS),
            **dict(BLOCK_M=_PACKED_ROWS, BLOCK_K=_PACKED_COLS, num_warps=4),
        )
        if mask.dtype == torch.bool:
            mask = mask.view(torch.uint8)
        stride_mm, stride_mk = mask.stride()
        kernel(mask=mask, bits=_words(bits, K), M=M, K=K, stride_mm=stride_mm, stride_mk=stride_mk)
    return bits


def _words(bits: Tensor, cols: int) -> Tensor:
    return bits.view(torch.int32) if cols % 32 == 0 else bits


def _grid(rows: int, cols: int, block_rows: int, block_cols: int) -> tuple[int]:
    return (triton.cdiv(rows, block_rows) * triton.cdiv(cols, block_cols),)


@triton.jit(do_not_specialize=["M", "K", "first_column", "threshold"])
def lora_draw_keep_kernel(
    seed, bits, M, K, first_column, threshold, BLOCK_M: tl.constexpr, BLOCK_W: tl.constexpr
):
    """Bit k % BITS of bits[m, k // BITS] = the hash of (seed, m, first_column + k) >= threshold.

    seed (2,) int64, bits (M, cdiv(K, BITS)) contiguous words of BITS bits; bits past column K are
    0. A program a tile (BLOCK_M, BLOCK_W) of words. Rows and columns are hashed by themselves, in
    int64; an element from the two, in int32, where products wrap.
    """
    BITS: tl.constexpr = bits.dtype.element_ty.primitive_bitwidth
    words = tl.cdiv(K, BITS)
    across = tl.cdiv(words, BLOCK_W)
    pid = tl.program_id(0)
    m0 = (pid // across).to(tl.int64) * BLOCK_M
    w0 = pid % across * BLOCK_W
    first, second = tl.load(seed), tl.load(seed + 1)
    rows = m0 + tl.arange(0, BLOCK_M)
    row = mix(mix((rows & 0xFFFFFFFF) ^ first) ^ (rows >> 32) ^ second).to(tl.int32)
    word = (w0 + tl.arange(0, BLOCK_W)).to(tl.int64)
    total = tl.zeros((BLOCK_M, BLOCK_W), tl.int32)
    for bit in tl.static_range(BITS):
        k = word * BITS + bit
        column = mix(mix((first_column + k) ^ second) ^ first).to(tl.int32)
        n = (row[:, None] ^ column[None, :]) * 0x21F0AAAD
        n = (n ^ (n >> 15)) * 0x735A2D97
        kept = (n >= threshold) & (k < K)[None, :]
        total |= kept.to(tl.int32) << bit
    offs, inside = offsets(m0, w0, M, words, words, 1, BLOCK_M, BLOCK_W)
    tl.store(bits + offs, total.to(bits.dtype.element_ty), mask=inside)


@triton.jit
def mix(n):
    """Hash 32-bit numbers held in int64, as _mix in lora_ext/dropout.py."""
    n = ((n ^ (n >> 16)) * 0x21F0AAAD) & 0xFFFFFFFF
    n = ((n ^ (n >> 15)) * 0x735A2D97) & 0xFFFFFFFF
    return n ^ (n >> 15)


@triton.jit(do_not_specialize=["M"])
def lora_pack_keep_kernel(
    mask, bits, M, K, stride_mm, stride_mk, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr
):
    """Bit k % BITS of bits[m, k // BITS] = mask[m, k] != 0.

    mask (M, K) of any dtype, bits (M, cdiv(K, BITS)) contiguous words; bits past column K are 0. A
    program a tile (BLOCK_M, BLOCK_K) of the mask.
    """
    BITS: tl.constexpr = bits.dtype.element_ty.primitive_bitwidth
    BLOCK_W: tl.constexpr = BLOCK_K // BITS
    words = tl.cdiv(K, BITS)
    across = tl.cdiv(K, BLOCK_K)
    pid = tl.program_id(0)
    m0 = (pid // across).to(tl.int64) * BLOCK_M
    k0 = pid % across * BLOCK_K
    offs, inside = offsets(m0, k0, M, K, stride_mm, stride_mk, BLOCK_M, BLOCK_K)
    kept = (tl.load(mask + offs, mask=inside, other=0) != 0).to(tl.int32)
    each = tl.reshape(kept, (BLOCK_M, BLOCK_W, BITS)) << tl.arange(0, BITS)[None, None, :]
    word = tl.sum(each, axis=2)
    offs, inside = offsets(m0, k0 // BITS, M, words, words, 1, BLOCK_M, BLOCK_W)
    tl.store(bits + offs, word.to(bits.dtype.element_ty), mask=inside)
