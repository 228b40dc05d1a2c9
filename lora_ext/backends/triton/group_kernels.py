"""Kernels of several layers of one x: h of all by one pass over x, and dx as one sum of legs.

What differs from layer to layer is a tuple with an element for each, None where a layer has none,
and loops over layers are unrolled. With one layer they compute what the single kernels do.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents

from .backward_kernels import strip_product, sum_parts
from .common import base_product, keep_only, load_tile, low_rank_part, store_tile, tile_of


@triton.jit(do_not_specialize=["M", "splits"])
def lora_linears_shrink_kernel(
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
    COLUMN: tl.constexpr,
    ROW: tl.constexpr,
    STRIDE_AK: tl.constexpr,
    STRIDE_AR: tl.constexpr,
    JOINED: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """h[s] = (keep[g] * x)[:, part s of K] @ a[g][part s of K] for each layer g, side by side.

    x (M, K), a[g] (K, R[g]), keep[g] (M, K) in bits or None, h (splits, M, ROW) contiguous, of
    which layer g has the columns from COLUMN[g] on. Program (i, j, s): rows i * BLOCK_M, and ranks
    j * BLOCK_R of every layer, in a float32 accumulator each. JOINED: the next launch may start at
    once; it waits for h by itself.
    """
    if JOINED:
        gdc_launch_dependents()
    m0 = tl.program_id(0) * BLOCK_M
    r0 = tl.program_id(1) * BLOCK_R
    s = tl.program_id(2)
    steps = tl.cdiv(tl.cdiv(K, BLOCK_K), splits)
    first = s * steps * BLOCK_K
    acc = zeros_of_each(len(R), BLOCK_M, BLOCK_R)
    for k0 in range(first, tl.minimum(first + steps * BLOCK_K, K), BLOCK_K):
        x_tile = load_tile(x, m0, k0, M, K, stride_xm, stride_xk, BLOCK_M, BLOCK_K)
        summed = ()
        for g in tl.static_range(len(R)):
            kept = keep_only(x_tile, keep[g], m0, k0, M, K, BLOCK_M, BLOCK_K)
            a_tile = load_tile(a[g], k0, r0, K, R[g], STRIDE_AK[g], STRIDE_AR[g], BLOCK_K, BLOCK_R)
            a_tile = a_tile.to(kept.dtype)
            sum_g = tl.dot(kept, a_tile, acc[g], input_precision=PRECISION)
            summed = summed + (sum_g,)  # type: ignore[assignment]
        acc = summed
    for g in tl.static_range(len(R)):
        part = h + s.to(tl.int64) * M * ROW + COLUMN[g]
        store_tile(part, acc[g], m0, r0, M, R[g], ROW, 1, BLOCK_M, BLOCK_R)


@triton.jit(do_not_specialize=["M", "parts"])
def lora_linears_bwd_dx_kernel(
    dy_0,
    dy_1,
    dy_2,
    dy_3,
    w_0,
    w_1,
    w_2,
    w_3,
    x,
    dy_columns,
    a,
    keep,
    h,
    t,
    dB_parts,
    dx,
    dA,
    dB,
    scale,
    scale_dx,
    power_dx,
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
    stride_gk,
    stride_gr,
    stride_br,
    stride_bn,
    R: tl.constexpr,
    MOST_R: tl.constexpr,
    MASKED: tl.constexpr,
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
    STRIP: tl.constexpr,
    STRIP_M: tl.constexpr,
    STRIP_R: tl.constexpr,
    SUM_PARTS: tl.constexpr,
    SUM_N: tl.constexpr,
):
    """Compute dx, the sum over layers g of dy[g] @ w[g] + scale[g] * keep[g] * t[g] @ a[g].T.

    And dA[g] = scale[g] * (keep[g] * x).T @ t[g], dB[g] = scale[g] * h[g].T @ dy[g]. Operands are
    as in lora_linear_bwd_dx_kernel; MOST_R is the largest rank, MASKED whether a layer has keep.
    Programs take strips of x's columns for dA of all layers, then each layer's dB, then tiles
    (BLOCK_M, BLOCK_K) of dx, whose legs are summed in one float32 accumulator and rounded once. dx
    (M, K) contiguous, or None. Descriptors are arguments of their own: Triton 3.6 launches none
    inside a tuple.
    """
    pid = tl.program_id(0)
    if x is not None:
        strips = tl.cdiv(K, STRIP) * tl.cdiv(MOST_R, STRIP_R)
        if pid < strips:
            strip_of_each(
                x, t, keep, dA, scale, pid, M, K, stride_xm, stride_xk, stride_gk, stride_gr,
                R, MOST_R, STRIP, STRIP_M, STRIP_R, PRECISION,
            )  # fmt: skip
        pid -= strips
    for g in tl.static_range(len(R)):
        if dB[g] is not None:
            if dB_parts[g] is not None:
                runs = tl.cdiv(R[g] * N[g], SUM_N)
            else:
                runs = tl.cdiv(N[g], STRIP) * tl.cdiv(R[g], BLOCK_R)
            if (pid >= 0) & (pid < runs):
                if dB_parts[g] is not None:
                    sum_parts(
                        dB_parts[g], dB[g], scale[g], pid, R[g], N[g], parts, SUM_PARTS, SUM_N
                    )
                else:
                    strip_product(
                        dy_columns[g], h[g], None, dB[g], scale[g], pid, M, N[g], stride_dm[g],
                        stride_dn[g], stride_bn[g], stride_br[g], R[g], STRIP, STRIP_M, BLOCK_R,
                        PRECISION,
                    )  # fmt: skip
            pid -= runs
    if dx is not None:
        dy, w = (dy_0, dy_1, dy_2, dy_3), (w_0, w_1, w_2, w_3)
        if pid >= 0:
            m0, k0 = tile_of(pid, M, K, BLOCK_M, BLOCK_K, GROUP_M)
            acc = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
            for g in tl.static_range(len(R)):
                acc = base_product(
                    acc, dy[g], w[g], m0, k0, M, K, N[g], stride_dm[g], stride_dn[g],
                    stride_wn[g], stride_wk[g], BLOCK_M, BLOCK_K, BLOCK_N, PRECISION,
                    DESCRIPTORS, W_TRANSPOSED[g],
                )  # fmt: skip
            for g in tl.static_range(len(R)):
                if keep[g] is None:
                    acc = low_rank_part(
                        acc, t[g], a[g], dx, m0, k0, M, K, 1, STRIDE_AR[g], STRIDE_AK[g],
                        scale_dx[g], power_dx[g], R[g], BLOCK_M, BLOCK_K, BLOCK_R, PRECISION, False,
                    )  # fmt: skip
            if MASKED:
                # By halves, so that a masked part is half an accumulator next to the whole one.
                HALF: tl.constexpr = BLOCK_K // 2
                halves = tl.split(tl.permute(tl.reshape(acc, (BLOCK_M, 2, HALF)), (0, 2, 1)))
                for i in tl.static_range(2):
                    half = halves[i]
                    for g in tl.static_range(len(R)):
                        if keep[g] is not None:
                            part = low_rank_part(
                                tl.zeros((BLOCK_M, HALF), tl.float32), t[g], a[g], dx, m0,
                                k0 + i * HALF, M, K, 1, STRIDE_AR[g], STRIDE_AK[g], scale_dx[g],
                                power_dx[g], R[g], BLOCK_M, HALF, BLOCK_R, PRECISION, False,
                            )  # fmt: skip
                            half += keep_only(part, keep[g], m0, k0 + i * HALF, M, K, BLOCK_M, HALF)
                    store_tile(dx, half, m0, k0 + i * HALF, M, K, K, 1, BLOCK_M, HALF)
            else:
                store_tile(dx, acc, m0, k0, M, K, K, 1, BLOCK_M, BLOCK_K)


@triton.jit
def strip_of_each(
    x,
    t,
    keep,
    dA,
    scale,
    pid,
    M,
    K,
    stride_xm,
    stride_xk,
    stride_gk,
    stride_gr,
    R: tl.constexpr,
    MOST_R: tl.constexpr,
    STRIP: tl.constexpr,
    STRIP_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Compute dA[g] = scale[g] * (keep[g] * x).T @ t[g] of each layer that has one.

    For strip `pid` of x's columns and a block of every layer's ranks: as strip_product, with x read
    once for all.
    """
    blocks_r = tl.cdiv(MOST_R, BLOCK_R)
    k0 = pid // blocks_r * STRIP
    r0 = pid % blocks_r * BLOCK_R
    acc = zeros_of_each(len(R), STRIP, BLOCK_R)
    for m0 in range(0, M, STRIP_M):
        x_tile = load_tile(x, m0, k0, M, K, stride_xm, stride_xk, STRIP_M, STRIP)
        summed = ()
        for g in tl.static_range(len(R)):
            if dA[g] is not None:
                kept = keep_only(x_tile, keep[g], m0, k0, M, K, STRIP_M, STRIP)
                t_tile = load_tile(t[g], m0, r0, M, R[g], R[g], 1, STRIP_M, BLOCK_R)
                t_tile = t_tile.to(kept.dtype)
                sum_g = tl.dot(kept.T, t_tile, acc[g], input_precision=PRECISION)
                summed = summed + (sum_g,)  # type: ignore[assignment]
            else:
                summed = summed + (acc[g],)  # type: ignore[assignment]
        acc = summed
    for g in tl.static_range(len(R)):
        if dA[g] is not None:
            store_tile(
                dA[g], scale[g] * acc[g], k0, r0, K, R[g], stride_gk[g], stride_gr[g],
                STRIP, BLOCK_R,
            )  # fmt: skip


@triton.jit
def zeros_of_each(LAYERS: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Return a float32 accumulator (ROWS, COLS) for each layer."""
    acc = ()
    for _ in tl.static_range(LAYERS):
        acc = acc + (tl.zeros((ROWS, COLS), tl.float32),)  # type: ignore[assignment]
    return acc
