"""Kernels for few rows, where reading weight is everything: K is split over programs.

Two launches: partial sums of x @ weight.T and of h = x @ A side by side, so that A is read once;
then their sums in a fixed order, the low-rank part and the bias.
"""

import triton
import triton.language as tl

from .common import add_bias, load_h, low_rank_part, store_tile
from .forward import shrink_tile


@triton.jit(do_not_specialize=["M", "splits"])
def lora_linear_decode_kernel(
    x,
    w,
    a,
    y_parts,
    h_parts,
    M,
    N,
    K,
    splits,
    stride_xm,
    stride_xk,
    stride_wk,
    stride_wn,
    R: tl.constexpr,
    STRIDE_AK: tl.constexpr,
    STRIDE_AR: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """y_parts[s] = x @ w and h_parts[s] = x @ a over part s of K.

    x (M, K), w (K, N), a (K, R); y_parts (splits, M, N) and h_parts (splits, M, R), float32.
    Program (i, j, s): rows i * BLOCK_M; columns j * BLOCK_N of y, and for j beyond them columns
    of h. Float32 accumulators.
    """
    m0 = tl.program_id(0) * BLOCK_M
    pid_n = tl.program_id(1)
    s = tl.program_id(2)
    tiles_n = tl.cdiv(N, BLOCK_N)
    if pid_n < tiles_n:
        n0 = pid_n * BLOCK_N
        acc = shrink_tile(
            x, w, m0, n0, s, splits, M, K, N, stride_xm, stride_xk, stride_wk, stride_wn,
            PRECISION, BLOCK_M, BLOCK_K, BLOCK_N,
        )  # fmt: skip
        part = y_parts + s.to(tl.int64) * M * N
        store_tile(part, acc, m0, n0, M, N, N, 1, BLOCK_M, BLOCK_N)
    else:
        r0 = (pid_n - tiles_n) * BLOCK_R
        h = shrink_tile(
            x, a, m0, r0, s, splits, M, K, R, stride_xm, stride_xk, STRIDE_AK, STRIDE_AR,
            PRECISION, BLOCK_M, BLOCK_K, BLOCK_R,
        )  # fmt: skip
        h_part = h_parts + s.to(tl.int64) * M * R
        store_tile(h_part, h, m0, r0, M, R, R, 1, BLOCK_M, BLOCK_R)


@triton.jit(do_not_specialize=["M", "splits"])
def lora_linear_decode_sum_kernel(
    y_parts,
    h_parts,
    bias,
    b,
    h_out,
    y,
    alpha,
    scale,
    M,
    N,
    splits,
    stride_br,
    stride_bn,
    R: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Compute y = sum of y_parts + bias + scale * alpha * h @ b and h = sum of h_parts.

    y_parts (splits, M, N) and h_parts (splits, M, R) float32, b (R, N), bias (N,); y (M, N) and
    h_out (M, R) contiguous. Program (i, j): the tile (BLOCK_M, BLOCK_N) of y; float32 throughout,
    parts summed first to last.
    """
    m0 = tl.program_id(0) * BLOCK_M
    n0 = tl.program_id(1) * BLOCK_N
    acc = load_h(y_parts, m0, n0, M, N, splits, BLOCK_M, BLOCK_N)
    acc = low_rank_part(
        acc, h_parts, b, h_out, m0, n0, M, N, splits,
        stride_br, stride_bn, alpha, scale, R, BLOCK_M, BLOCK_N, BLOCK_R, PRECISION, True,
    )  # fmt: skip
    acc = add_bias(acc, bias, n0, N, BLOCK_N, HAS_BIAS)
    store_tile(y, acc, m0, n0, M, N, N, 1, BLOCK_M, BLOCK_N)
