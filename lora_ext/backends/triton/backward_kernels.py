"""Kernels of the gradients, with t = dy @ B.T: two launches.

(i)  one pass over dy: t, and dB's partial sums over row blocks
(ii) dx = dy @ weight + scale * keep * t @ A.T; dA = scale * (keep * x).T @ t; dB = scale * the sum
     of (i)'s parts. `keep` is dropout's mask, a bit an element of x, or None.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents

from .common import (
    base_product,
    keep_only,
    load_h,
    load_tile,
    low_rank_part,
    store_tile,
    tile_of,
)


@triton.jit(do_not_specialize=["M", "splits"])
def lora_linear_bwd_dy_kernel(
    dy,
    b,
    h,
    t,
    t_parts,
    arrived,
    dB_parts,
    M,
    N,
    splits,
    stride_dm,
    stride_dn,
    stride_br,
    stride_bn,
    stride_gr,
    stride_gn,
    R: tl.constexpr,
    WANT_T: tl.constexpr,
    WANT_DB: tl.constexpr,
    JOINED: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """T = dy @ b.T and dB_parts[i] = h[rows i].T @ dy[rows i] at once.

    dy (M, N), b (R, N), h (M, R) and t (M, R) contiguous, dB_parts (cdiv(M, BLOCK_M), R, N)
    float32, a part laid out as dB. Program (i, j, s): rows i * BLOCK_M, ranks j * BLOCK_R, part s
    of N. Float32 accumulators. t_parts (splits, M, R) float32 where N is split, with `arrived`, a
    zero for each (i, j): who arrives there last sums them first to last. JOINED: the next launch
    may start at once; it waits for t and dB_parts by itself.
    """
    if JOINED:
        gdc_launch_dependents()
    pid_m = tl.program_id(0)
    m0 = pid_m * BLOCK_M
    r0 = tl.program_id(1) * BLOCK_R
    s = tl.program_id(2)
    steps = tl.cdiv(tl.cdiv(N, BLOCK_N), splits)
    first = s * steps * BLOCK_N
    if WANT_DB:
        h_tile = load_tile(h, m0, r0, M, R, R, 1, BLOCK_M, BLOCK_R)
        part = dB_parts + pid_m.to(tl.int64) * R * N
    if WANT_T:
        t_tile = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for n0 in range(first, tl.minimum(first + steps * BLOCK_N, N), BLOCK_N):
        dy_tile = load_tile(dy, m0, n0, M, N, stride_dm, stride_dn, BLOCK_M, BLOCK_N)
        if WANT_T:
            b_tile = load_tile(b, r0, n0, R, N, stride_br, stride_bn, BLOCK_R, BLOCK_N)
            b_tile = b_tile.to(dy_tile.dtype)
            t_tile = tl.dot(dy_tile, b_tile.T, t_tile, input_precision=PRECISION)
        if WANT_DB:
            dB_tile = tl.dot(h_tile.T, dy_tile, input_precision=PRECISION)
            store_tile(part, dB_tile, r0, n0, R, N, stride_gr, stride_gn, BLOCK_R, BLOCK_N)
    if WANT_T:
        if t_parts is not None:
            t_part = t_parts + s.to(tl.int64) * M * R
            store_tile(t_part, t_tile, m0, r0, M, R, R, 1, BLOCK_M, BLOCK_R)
            tl.debug_barrier()  # all of the program's threads have stored
            at = pid_m * tl.num_programs(1) + tl.program_id(1)
            if tl.atomic_add(arrived + at, 1) == splits - 1:
                t_tile = load_h(t_parts, m0, r0, M, R, splits, BLOCK_M, BLOCK_R)
                store_tile(t, t_tile, m0, r0, M, R, R, 1, BLOCK_M, BLOCK_R)
        else:
            store_tile(t, t_tile, m0, r0, M, R, R, 1, BLOCK_M, BLOCK_R)


@triton.jit(do_not_specialize=["M", "parts"])
def lora_linear_bwd_dx_kernel(
    dy,
    w,
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
    STRIDE_AK: tl.constexpr,
    STRIDE_AR: tl.constexpr,
    WANT_DX: tl.constexpr,
    WANT_DA: tl.constexpr,
    WANT_DB: tl.constexpr,
    DB_IN_PARTS: tl.constexpr,
    BASE_DONE: tl.constexpr,
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
    SUM_PARTS: tl.constexpr,
    SUM_N: tl.constexpr,
):
    """Compute dx = dy @ w + scale * keep * t @ a.T; dA = scale * (keep * x).T @ t; dB.

    dB = scale * h.T @ dy. dy (M, N), w (N, K), x (M, K), a (K, R), keep (M, K) in bits, h (M, R),
    t (M, R), dB_parts (parts, R, N); dx (M, K) contiguous, dA (K, R) and dB (R, N) by
    their strides; dy_columns is dy, never by descriptor. Programs take strips of
    STRIP columns of x for dA, then of dy for dB (or runs of SUM_N elements of its parts' sum,
    DB_IN_PARTS), then tiles (BLOCK_M, BLOCK_K) of dx: the strips take longest, and come first so
    that tiles fill the SMs around them to the end. Float32 accumulators. BASE_DONE: dx already
    holds dy @ w.
    """
    pid = tl.program_id(0)
    if WANT_DA:
        strips = tl.cdiv(K, STRIP) * tl.cdiv(R, BLOCK_R)
        if pid < strips:
            strip_product(
                x, t, keep, dA, scale, pid, M, K, stride_xm, stride_xk,
                stride_gk, stride_gr, R, STRIP, STRIP_M, BLOCK_R, PRECISION,
            )  # fmt: skip
        pid -= strips
    if WANT_DB:
        if DB_IN_PARTS:
            runs = tl.cdiv(R * N, SUM_N)
        else:
            runs = tl.cdiv(N, STRIP) * tl.cdiv(R, BLOCK_R)
        if (pid >= 0) & (pid < runs):
            if DB_IN_PARTS:
                sum_parts(dB_parts, dB, scale, pid, R, N, parts, SUM_PARTS, SUM_N)
            else:
                strip_product(
                    dy_columns, h, None, dB, scale, pid, M, N, stride_dm, stride_dn,
                    stride_bn, stride_br, R, STRIP, STRIP_M, BLOCK_R, PRECISION,
                )  # fmt: skip
        pid -= runs
    if WANT_DX:
        if pid >= 0:
            m0, k0 = tile_of(pid, M, K, BLOCK_M, BLOCK_K, GROUP_M)
            acc = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
            if keep is not None:
                # The low-rank part first: masked while the accumulator holds nothing else.
                acc = low_rank_part(
                    acc, t, a, dx, m0, k0, M, K, 1, STRIDE_AR, STRIDE_AK,
                    scale_dx, power_dx, R, BLOCK_M, BLOCK_K, BLOCK_R, PRECISION, False,
                )  # fmt: skip
                acc = keep_only(acc, keep, m0, k0, M, K, BLOCK_M, BLOCK_K)
            if BASE_DONE:
                base = load_tile(dx, m0, k0, M, K, K, 1, BLOCK_M, BLOCK_K).to(tl.float32)
                acc = base if keep is None else acc + base
            else:
                acc = base_product(
                    acc, dy, w, m0, k0, M, K, N, stride_dm, stride_dn, stride_wn, stride_wk,
                    BLOCK_M, BLOCK_K, BLOCK_N, PRECISION, DESCRIPTORS, W_TRANSPOSED,
                )  # fmt: skip
            if keep is None:
                acc = low_rank_part(
                    acc, t, a, dx, m0, k0, M, K, 1, STRIDE_AR, STRIDE_AK,
                    scale_dx, power_dx, R, BLOCK_M, BLOCK_K, BLOCK_R, PRECISION, False,
                )  # fmt: skip
            store_tile(dx, acc, m0, k0, M, K, K, 1, BLOCK_M, BLOCK_K)


@triton.jit
def strip_product(
    x,
    t,
    keep,
    out,
    scale,
    pid,
    M,
    K,
    stride_xm,
    stride_xk,
    stride_ok,
    stride_or,
    R: tl.constexpr,
    STRIP: tl.constexpr,
    STRIP_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Compute out = scale * (keep * x).T @ t for strip `pid` of x's columns, a block of ranks.

    x (M, K), t (M, R), out (K, R) by its strides. All M rows, STRIP_M a step, in order;
    float32 accumulator (STRIP, BLOCK_R), multiplied by scale once.
    """
    blocks_r = tl.cdiv(R, BLOCK_R)
    k0 = pid // blocks_r * STRIP
    r0 = pid % blocks_r * BLOCK_R
    acc = tl.zeros((STRIP, BLOCK_R), tl.float32)
    for m0 in range(0, M, STRIP_M):
        x_tile = load_tile(x, m0, k0, M, K, stride_xm, stride_xk, STRIP_M, STRIP)
        x_tile = keep_only(x_tile, keep, m0, k0, M, K, STRIP_M, STRIP)
        t_tile = load_tile(t, m0, r0, M, R, R, 1, STRIP_M, BLOCK_R).to(x_tile.dtype)
        acc = tl.dot(x_tile.T, t_tile, acc, input_precision=PRECISION)
    store_tile(out, scale * acc, k0, r0, K, R, stride_ok, stride_or, STRIP, BLOCK_R)


@triton.jit
def sum_parts(parts, out, scale, pid, R, N, count, SUM_PARTS: tl.constexpr, SUM_N: tl.constexpr):
    """Compute SUM_N elements of out = scale * sum of parts (count, R, N), in a fixed order.

    Float32; out is laid out as a part is. SUM_PARTS parts a step: independent loads, where one a
    step would wait for each.
    """
    size = tl.cast(N, tl.int64) * R
    offs = tl.cast(pid, tl.int64) * SUM_N + tl.arange(0, SUM_N)
    acc = tl.zeros((SUM_N,), tl.float32)
    for s0 in tl.range(0, count, SUM_PARTS, num_stages=1):
        part = s0 + tl.arange(0, SUM_PARTS)
        inside = (part < count)[:, None] & (offs < size)[None, :]
        at = part.to(tl.int64)[:, None] * size + offs[None, :]
        acc += tl.sum(tl.load(parts + at, mask=inside, other=0.0), axis=0)
    tl.store(out + offs, (scale * acc).to(out.dtype.element_ty), mask=offs < size)
