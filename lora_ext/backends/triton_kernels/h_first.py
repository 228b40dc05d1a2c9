"""Regime h_first: h = x @ A and the base product in one persistent launch.

No GPU has run it yet, so it is reached by name only: a program here waits for another.
"""

import triton
import triton.language as tl

from .common import add_bias, base_product, load_tile, low_rank_part, store_tile, tile_of


@triton.jit(do_not_specialize=["M"])
def lora_linear_h_first_kernel(
    x,
    w,
    bias,
    a,
    b,
    h,
    ready,
    y,
    alpha,
    scale,
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
    HAS_BIAS: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    W_TRANSPOSED: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """Compute y = x @ w + bias + scale * alpha * h @ b, h = x @ a done first by other programs.

    x (M, K), w (K, N), bias (N,), a (K, R), b (R, N), R <= BLOCK_R; h (M, R) and y (M, N)
    contiguous; ready (cdiv(M, BLOCK_M),) zeros. Program p takes row blocks p, p + P, ... of h,
    raising each one's flag, then tiles p, p + P, ... of y, which wait for the flag of their rows
    after the whole loop over K, when it has long been up. Float32 accumulators. The grid P may not
    exceed what the card holds at once: every program then ends its part of h before it waits.
    """
    first = tl.program_id(0)
    step = tl.num_programs(0)
    tiles_m = tl.cdiv(M, BLOCK_M)
    for pid_m in tl.range(first, tiles_m, step, num_stages=1):
        m0 = pid_m * BLOCK_M
        h_tile = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
        for k0 in range(0, K, BLOCK_K):
            x_tile = load_tile(x, m0, k0, M, K, stride_xm, stride_xk, BLOCK_M, BLOCK_K, DESCRIPTORS)
            a_tile = load_tile(a, k0, 0, K, R, STRIDE_AK, STRIDE_AR, BLOCK_K, BLOCK_R)
            h_tile = tl.dot(x_tile, a_tile.to(x_tile.dtype), h_tile, input_precision=PRECISION)
        store_tile(h, h_tile, m0, 0, M, R, R, 1, BLOCK_M, BLOCK_R)
        tl.debug_barrier()  # every thread's part of h before the one thread's release
        tl.atomic_xchg(ready + pid_m, 1, sem="release")
    for pid in tl.range(first, tiles_m * tl.cdiv(N, BLOCK_N), step, num_stages=1):
        m0, n0 = tile_of(pid, M, N, BLOCK_M, BLOCK_N, GROUP_M)
        acc = base_product(
            x, w, m0, n0, M, N, K, stride_xm, stride_xk, stride_wk, stride_wn,
            BLOCK_M, BLOCK_N, BLOCK_K, PRECISION, DESCRIPTORS, W_TRANSPOSED,
        )  # fmt: skip
        flag = ready + m0 // BLOCK_M
        while tl.atomic_add(flag, 0, sem="acquire") == 0:
            pass
        acc = low_rank_part(
            acc, h, b, h, m0, n0, M, N, 1, stride_br, stride_bn, alpha, scale,
            R, BLOCK_M, BLOCK_N, BLOCK_R, PRECISION, False,
        )  # fmt: skip
        acc = add_bias(acc, bias, n0, N, BLOCK_N, HAS_BIAS)
        store_tile(y, acc, m0, n0, M, N, N, 1, BLOCK_M, BLOCK_N)
