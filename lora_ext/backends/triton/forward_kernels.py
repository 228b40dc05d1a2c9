"""Kernels of the forward, y = x @ weight.T + bias + scale * h @ B, with h = (keep * x) @ A.

`keep` is dropout's mask, a bit an element of x, or None: x is masked as h reads it, and nowhere
else.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents

from .common import (
    add_bias,
    add_low_rank,
    base_product,
    keep_only,
    load_tile,
    load_w,
    low_rank_part,
    part_product,
    store_tile,
    tile_of,
)


@triton.jit(do_not_specialize=["M", "splits"])
def lora_linear_fwd_kernel(
    x,
    w,
    bias,
    b,
    h,
    h_out,
    y,
    scale,
    power,
    M,
    N,
    K,
    splits,
    stride_xm,
    stride_xk,
    stride_wk,
    stride_wn,
    stride_br,
    stride_bn,
    R: tl.constexpr,
    ROW: tl.constexpr,
    BASE_DONE: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    W_TRANSPOSED: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """Compute y = x @ w + bias + power * scale * h @ b, with h at hand.

    x (M, K), w (K, N), bias (N,), b (R, N), h (splits, M, R) float32, its rows ROW elements apart;
    y (M, N) contiguous, h_out (M, R) contiguous, the sum of h. A program a tile (BLOCK_M, BLOCK_N)
    of y; float32 accumulator. BASE_DONE: y already holds x @ w + bias, and only the low-rank part
    is added.
    """
    m0, n0 = tile_of(tl.program_id(0), M, N, BLOCK_M, BLOCK_N, GROUP_M)
    if BASE_DONE:
        acc = load_tile(y, m0, n0, M, N, N, 1, BLOCK_M, BLOCK_N).to(tl.float32)
    else:
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        acc = base_product(
            acc, x, w, m0, n0, M, N, K, stride_xm, stride_xk, stride_wk, stride_wn,
            BLOCK_M, BLOCK_N, BLOCK_K, PRECISION, DESCRIPTORS, W_TRANSPOSED,
        )  # fmt: skip
    acc = low_rank_part(
        acc, h, b, h_out, m0, n0, M, N, splits,
        stride_br, stride_bn, scale, power, R, BLOCK_M, BLOCK_N, BLOCK_R, PRECISION, True, ROW,
    )  # fmt: skip
    acc = add_bias(acc, bias, n0, N, BLOCK_N)
    store_tile(y, acc, m0, n0, M, N, N, 1, BLOCK_M, BLOCK_N)


@triton.jit(do_not_specialize=["M"])
def lora_linear_fwd_in_loop_kernel(
    x,
    w,
    bias,
    a,
    b,
    keep,
    h_out,
    y,
    scale,
    power,
    M,
    N,
    K,
    stride_xm,
    stride_xk,
    stride_wk,
    stride_wn,
    stride_br,
    stride_bn,
    R: tl.constexpr,
    STRIDE_AK: tl.constexpr,
    STRIDE_AR: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    W_TRANSPOSED: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """Compute y = x @ w + bias + power * scale * h @ b, h = (keep * x) @ a in the same loop.

    x (M, K), w (K, N), bias (N,), a (K, R), b (R, N) with R <= BLOCK_R; y (M, N) and h_out (M, R)
    contiguous. A program a tile (BLOCK_M, BLOCK_N) of y; its h (BLOCK_M, BLOCK_R) is recomputed by
    each of the N / BLOCK_N tiles of a row block, and stored by the first. Float32 accumulators.
    """
    m0, n0 = tile_of(tl.program_id(0), M, N, BLOCK_M, BLOCK_N, GROUP_M)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    h = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for k0 in range(0, K, BLOCK_K):
        x_tile = load_tile(x, m0, k0, M, K, stride_xm, stride_xk, BLOCK_M, BLOCK_K, DESCRIPTORS)
        w_tile = load_w(
            w, k0, n0, K, N, stride_wk, stride_wn, BLOCK_K, BLOCK_N, DESCRIPTORS, W_TRANSPOSED
        )
        a_tile = load_tile(a, k0, 0, K, R, STRIDE_AK, STRIDE_AR, BLOCK_K, BLOCK_R)
        acc = tl.dot(x_tile, w_tile, acc, input_precision=PRECISION)
        kept = keep_only(x_tile, keep, m0, k0, M, K, BLOCK_M, BLOCK_K)
        h = tl.dot(kept, a_tile.to(kept.dtype), h, input_precision=PRECISION)
    if n0 == 0:
        store_tile(h_out, h, m0, 0, M, R, R, 1, BLOCK_M, BLOCK_R)
    b_tile = load_tile(b, 0, n0, R, N, stride_br, stride_bn, BLOCK_R, BLOCK_N)
    acc = add_low_rank(acc, h, b_tile.to(y.dtype.element_ty), scale, power, PRECISION)
    acc = add_bias(acc, bias, n0, N, BLOCK_N)
    store_tile(y, acc, m0, n0, M, N, N, 1, BLOCK_M, BLOCK_N)


@triton.jit(do_not_specialize=["M", "splits"])
def lora_shrink_kernel(
    x,
    a,
    keep,
    h,
    M,
    K,
    splits,
    stride_xm,
    stride_xk,
    R: tl.constexpr,
    STRIDE_AK: tl.constexpr,
    STRIDE_AR: tl.constexpr,
    JOINED: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """h[s] = (keep * x)[:, part s of K] @ a[part s of K]; what reads h sums the parts in order.

    x (M, K), a (K, R), h (splits, M, R) contiguous. Program (i, j, s): the tile
    (BLOCK_M, BLOCK_R) at (i, j) of part s, in a float32 accumulator. JOINED: the next launch may
    start at once; it waits for h by itself.
    """
    if JOINED:
        gdc_launch_dependents()
    m0 = tl.program_id(0) * BLOCK_M
    r0 = tl.program_id(1) * BLOCK_R
    s = tl.program_id(2)
    h_tile = part_product(
        x, a, keep, m0, r0, s, splits, M, K, R, stride_xm, stride_xk, STRIDE_AK, STRIDE_AR,
        PRECISION, BLOCK_M, BLOCK_K, BLOCK_R,
    )  # fmt: skip
    part = h + s.to(tl.int64) * M * R
    store_tile(part, h_tile, m0, r0, M, R, R, 1, BLOCK_M, BLOCK_R)
