"""Kernels of the gradients, with t = dy @ B.T: two launches.

(i)  one pass over dy: t, and dB's partial sums over row blocks
(ii) dx = dy @ weight + alpha * t @ A.T; dA = alpha * x.T @ t; dB = alpha * sum of (i)'s parts
"""

import triton
import triton.language as tl

from .common import base_product, load_tile, low_rank_part, store_tile, tile_of


@triton.jit(do_not_specialize=["M"])
def lora_linear_bwd_dy_kernel(
    dy,
    b,
    h,
    t,
    dB_parts,
    M,
    N,
    stride_dm,
    stride_dn,
    stride_br,
    stride_bn,
    R: tl.constexpr,
    WANT_T: tl.constexpr,
    WANT_DB: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """t = dy @ b.T and dB_parts[i] = h[rows i].T @ dy[rows i], in one pass over dy.

    dy (M, N), b (R, N), h (M, R) contiguous, t (M, R) contiguous, dB_parts (cdiv(M, BLOCK_M), R, N)
    float32. Program (i, j): rows i * BLOCK_M, ranks j * BLOCK_R, all of N. Float32 accumulators.
    """
    pid_m = tl.program_id(0)
    m0 = pid_m * BLOCK_M
    r0 = tl.program_id(1) * BLOCK_R
    if WANT_DB:
        h_tile = load_tile(h, m0, r0, M, R, R, 1, BLOCK_M, BLOCK_R)
        part = dB_parts + pid_m.to(tl.int64) * R * N
    if WANT_T:
        t_tile = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for n0 in range(0, N, BLOCK_N):
        dy_tile = load_tile(dy, m0, n0, M, N, stride_dm, stride_dn, BLOCK_M, BLOCK_N)
        if WANT_T:
            b_tile = load_tile(b, r0, n0, R, N, stride_br, stride_bn, BLOCK_R, BLOCK_N)
            b_tile = b_tile.to(dy_tile.dtype)
            t_tile = tl.dot(dy_tile, b_tile.T, t_tile, input_precision=PRECISION)
        if WANT_DB:
            dB_tile = tl.dot(h_tile.T, dy_tile, input_precision=PRECISION)
            store_tile(part, dB_tile, r0, n0, R, N, N, 1, BLOCK_R, BLOCK_N)
    if WANT_T:
        store_tile(t, t_tile, m0, r0, M, R, R, 1, BLOCK_M, BLOCK_R)


@triton.jit(do_not_specialize=["M", "parts"])
def lora_linear_bwd_dx_kernel(
    dy,
    w,
    x,
    a,
    t,
    dB_parts,
    dx,
    dA,
    dB,
    alpha,
    alpha_dx,
    scale_dx,
    M,
    N,
    K,
    parts,
    stride_dm,
    stride_dn,
    stride_wn,
    stride_wk,
    stride_xm,
    stride_xk,
    R: tl.constexpr,
    STRIDE_AK: tl.constexpr,
    STRIDE_AR: tl.constexpr,
    WANT_DX: tl.constexpr,
    WANT_DA: tl.constexpr,
    WANT_DB: tl.constexpr,
    BASE_DONE: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    W_TRANSPOSED: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr,
    DA_M: tl.constexpr,
    DA_K: tl.constexpr,
    SUM_PARTS: tl.constexpr,
    SUM_N: tl.constexpr,
):
    """dx = dy @ w + alpha * t @ a.T; dA = alpha * x.T @ t; dB = alpha * sum of dB_parts.

    dy (M, N), w (N, K), x (M, K), a (K, R), t (M, R) contiguous, dB_parts (parts, R, N) float32;
    dx (M, K), dA (K, R), dB (R, N) contiguous. Programs first take tiles (BLOCK_M, BLOCK_K) of dx,
    then tiles (DA_K, BLOCK_R) of dA, each over all M, then runs of SUM_N elements of dB: the last
    two fill the SMs that dx's last wave leaves idle. Float32 accumulators. BASE_DONE: dx already
    holds dy @ w.
    """
    pid = tl.program_id(0)
    if WANT_DX:
        tiles_dx = tl.cdiv(M, BLOCK_M) * tl.cdiv(K, BLOCK_K)
        if pid < tiles_dx:
            m0, k0 = tile_of(pid, M, K, BLOCK_M, BLOCK_K, GROUP_M)
            if BASE_DONE:
                acc = load_tile(dx, m0, k0, M, K, K, 1, BLOCK_M, BLOCK_K).to(tl.float32)
            else:
                acc = base_product(
                    dy, w, m0, k0, M, K, N, stride_dm, stride_dn, stride_wn, stride_wk,
                    BLOCK_M, BLOCK_K, BLOCK_N, PRECISION, DESCRIPTORS, W_TRANSPOSED,
                )  # fmt: skip
            acc = low_rank_part(
                acc, t, a, t, m0, k0, M, K, 1, STRIDE_AR, STRIDE_AK,
                alpha_dx, scale_dx, R, BLOCK_M, BLOCK_K, BLOCK_R, PRECISION, False,
            )  # fmt: skip
            store_tile(dx, acc, m0, k0, M, K, K, 1, BLOCK_M, BLOCK_K)
        pid -= tiles_dx
    if WANT_DA:
        tiles_r = tl.cdiv(R, BLOCK_R)
        tiles_dA = tl.cdiv(K, DA_K) * tiles_r
        if (pid >= 0) & (pid < tiles_dA):
            k0 = pid // tiles_r * DA_K
            r0 = pid % tiles_r * BLOCK_R
            dA_tile = tl.zeros((DA_K, BLOCK_R), tl.float32)
            for m0 in range(0, M, DA_M):
                x_tile = load_tile(x, m0, k0, M, K, stride_xm, stride_xk, DA_M, DA_K)
                t_tile = load_tile(t, m0, r0, M, R, R, 1, DA_M, BLOCK_R)
                dA_tile = tl.dot(x_tile.T, t_tile, dA_tile, input_precision=PRECISION)
            store_tile(dA, alpha * dA_tile, k0, r0, K, R, R, 1, DA_K, BLOCK_R)
        pid -= tiles_dA
    if WANT_DB:
        if pid >= 0:
            size = tl.cast(R, tl.int64) * N
            first = pid.to(tl.int64) * SUM_N
            sum_parts(dB_parts, dB, alpha, first, size, parts, SUM_PARTS, SUM_N)


@triton.jit
def sum_parts(
    parts, total, alpha, first, size, count, SUM_PARTS: tl.constexpr, SUM_N: tl.constexpr
):
    """total[first : first + SUM_N] = alpha * sum of parts (count, size), in a fixed order, float32.

    SUM_PARTS parts a step: independent loads, where one part a step would wait for each.
    """
    offs = first + tl.arange(0, SUM_N)
    acc = tl.zeros((SUM_N,), tl.float32)
    for s0 in tl.range(0, count, SUM_PARTS, num_stages=1):
        part = s0 + tl.arange(0, SUM_PARTS)
        inside = (part < count)[:, None] & (offs < size)[None, :]
        at = part.to(tl.int64)[:, None] * size + offs[None, :]
        acc += tl.sum(tl.load(parts + at, mask=inside, other=0.0), axis=0)
    tl.store(total + offs, (alpha * acc).to(total.dtype.element_ty), mask=offs < size)
