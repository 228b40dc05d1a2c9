"""The kernel of few rows: y, with the sum over K split between programs, and h, in one launch.

No program waits. Each adds one to a counter when what it computed is in memory, and the program
that thereby finds all others of a tile arrived finishes the tile: it sums the parts first to last,
so that the bits do not depend on who comes last.
"""

import triton
import triton.language as tl

from .common import add_bias, load_h, low_rank_part, part_product, store_tile


@triton.jit(do_not_specialize=["M", "splits", "h_splits"])
def lora_linear_decode_kernel(
    x,
    w,
    bias,
    a,
    b,
    keep,
    arrived,
    y_parts,
    h_parts,
    h_out,
    y,
    scale,
    power,
    M,
    N,
    K,
    splits,
    h_splits,
    stride_xm,
    stride_xk,
    stride_wk,
    stride_wn,
    stride_br,
    stride_bn,
    R: tl.constexpr,
    STRIDE_AK: tl.constexpr,
    STRIDE_AR: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    COUNTERS: tl.constexpr,
):
    """Compute y = x @ w + bias + power * scale * h @ b and h = (keep * x) @ a.

    x (M, K), w (K, N), bias (N,), a (K, R), b (R, N); y (M, N) and h_out (M, R) contiguous. Scratch
    in float32: y_parts (splits, M, N), h_parts (h_splits + 1, M, R), of which the last is the sum.
    arrived: zeros, a counter for h of each row block, then one for each tile of y. The first
    programs take parts of h, which then is there for the tiles; the others a part of a tile
    (BLOCK_M, BLOCK_N) of y each. Float32 accumulators.
    """
    tiles_m, tiles_n, blocks_r = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), tl.cdiv(R, BLOCK_R)
    h_sum = h_parts + tl.cast(h_splits, tl.int64) * M * R
    tiles = arrived + tiles_m
    pid = tl.program_id(0)
    of_h = tiles_m * blocks_r * h_splits
    if pid >= of_h:
        pid -= of_h
        tile, s = pid // splits, pid % splits
        m0, n0 = tile // tiles_n * BLOCK_M, tile % tiles_n * BLOCK_N
        acc = part_product(
            x, w, None, m0, n0, s, splits, M, K, N, stride_xm, stride_xk, stride_wk, stride_wn,
            PRECISION, BLOCK_M, BLOCK_K, BLOCK_N,
        )  # fmt: skip
        done = 0
        if splits == 1:
            done = tl.atomic_add(tiles + tile, 0)  # 1 where h is there: acc need not leave
        if done == 0:
            part = y_parts + s.to(tl.int64) * M * N
            store_tile(part, acc, m0, n0, M, N, N, 1, BLOCK_M, BLOCK_N)
            tl.debug_barrier()  # all of the program's threads have stored
            if tl.atomic_add(tiles + tile, 1) == splits:  # all other parts, and h
                acc = load_h(y_parts, m0, n0, M, N, splits, BLOCK_M, BLOCK_N)
                done = 1
        if done == 1:
            finish_tile(
                acc, h_sum, b, bias, y, m0, n0, M, N, stride_br, stride_bn, scale, power, R,
                BLOCK_M, BLOCK_N, BLOCK_R, PRECISION,
            )  # fmt: skip
    else:
        row, s = pid // h_splits, pid % h_splits
        m, r0 = row // blocks_r, row % blocks_r * BLOCK_R
        m0 = m * BLOCK_M
        h = part_product(
            x, a, keep, m0, r0, s, h_splits, M, K, R, stride_xm, stride_xk, STRIDE_AK, STRIDE_AR,
            PRECISION, BLOCK_M, BLOCK_K, BLOCK_R,
        )  # fmt: skip
        h_part = h_parts + s.to(tl.int64) * M * R
        store_tile(h_part, h, m0, r0, M, R, R, 1, BLOCK_M, BLOCK_R)
        tl.debug_barrier()
        if tl.atomic_add(arrived + m, 1) == blocks_r * h_splits - 1:
            for r in tl.range(0, R, BLOCK_R, num_stages=1):
                h = load_h(h_parts, m0, r, M, R, h_splits, BLOCK_M, BLOCK_R)
                store_tile(h_sum, h, m0, r, M, R, R, 1, BLOCK_M, BLOCK_R)
                store_tile(h_out, h, m0, r, M, R, R, 1, BLOCK_M, BLOCK_R)
            tl.debug_barrier()
            for n in tl.range(0, tiles_n, COUNTERS, num_stages=1):
                # Parts of y take longer than those of h: hardly ever is a tile left for this.
                at = n + tl.arange(0, COUNTERS)
                before = tl.atomic_add(tiles + m * tiles_n + at, 1, mask=at < tiles_n)
                left = ((at < tiles_n) & (before == splits)).to(tl.int32)
                if tl.sum(left) > 0:
                    for i in tl.range(n, tl.minimum(n + COUNTERS, tiles_n), num_stages=1):
                        if tl.sum(tl.where(at == i, left, 0)) > 0:
                            n0 = i * BLOCK_N
                            acc = load_h(y_parts, m0, n0, M, N, splits, BLOCK_M, BLOCK_N)
                            finish_tile(
                                acc, h_sum, b, bias, y, m0, n0, M, N, stride_br, stride_bn,
                                scale, power, R, BLOCK_M, BLOCK_N, BLOCK_R, PRECISION,
                            )  # fmt: skip


@triton.jit
def finish_tile(
    acc,
    h,
    b,
    bias,
    y,
    m0,
    n0,
    M,
    N,
    stride_br,
    stride_bn,
    scale,
    power,
    R: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Store acc + power * scale * h @ b + bias, the tile (BLOCK_M, BLOCK_N) of y at (m0, n0)."""
    acc = low_rank_part(
        acc, h, b, y, m0, n0, M, N, 1, stride_br, stride_bn, scale, power, R,
        BLOCK_M, BLOCK_N, BLOCK_R, PRECISION, False,
    )  # fmt: skip
    acc = add_bias(acc, bias, n0, N, BLOCK_N)
    store_tile(y, acc, m0, n0, M, N, N, 1, BLOCK_M, BLOCK_N)
