"""Kernels whose programs stay: one an SM, which takes tile after tile of a base product.

They read both operands and write the result by tensor descriptors, start while the launch before
them still runs (programmatic dependent launch), and wait for it only where they need its h or t:
after the first tile's base product. The next tile's loads are under way during a tile's epilogue.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait

from .backward_kernels import strip_product, sum_parts
from .common import add_low_rank, keep_only, load_tile, load_w, offsets, tile_of


@triton.jit(do_not_specialize=["M"])
def lora_linear_fwd_persistent_kernel(
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
    stride_br,
    stride_bn,
    R: tl.constexpr,
    ROW: tl.constexpr,
    SPLITS: tl.constexpr,
    DEPENDENT: tl.constexpr,
    PROGRAMS: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    W_TRANSPOSED: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """Compute y = x @ w + bias + power * scale * h @ b, with h of the launch before.

    x (M, K), w (K, N) and y (M, N) by descriptors, bias (N,), b (R, N), h (SPLITS, M, R) float32,
    its rows ROW elements apart; h_out (M, R) contiguous, the sum of h. At most PROGRAMS programs;
    program p takes the tiles (BLOCK_M, BLOCK_N) p, p + PROGRAMS, ... of y. Float32 accumulator.
    """
    persistent_tiles(
        x, w, bias, b, None, h, h_out, y, scale, power, M, N, K, stride_br, stride_bn, R, ROW,
        SPLITS, DEPENDENT, PROGRAMS, W_TRANSPOSED, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K, BLOCK_R,
        GROUP_M,
    )  # fmt: skip


@triton.jit(do_not_specialize=["M", "parts", "lanes"])
def lora_linear_bwd_dx_persistent_kernel(
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
    lanes,
    stride_dm,
    stride_dn,
    stride_xm,
    stride_xk,
    stride_gk,
    stride_gr,
    stride_br,
    stride_bn,
    stride_ak,
    stride_ar,
    R: tl.constexpr,
    DEPENDENT: tl.constexpr,
    PROGRAMS: tl.constexpr,
    WANT_DA: tl.constexpr,
    WANT_DB: tl.constexpr,
    DB_IN_PARTS: tl.constexpr,
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

    As lora_linear_bwd_dx_kernel, with t and dB_parts of the launch before; dy, w and dx by
    descriptors. At most PROGRAMS programs: each takes tiles (BLOCK_M, BLOCK_N) of dx, then runs of
    dB; and the last `lanes` ones, of which many have a tile less, the strips of dA.
    """
    persistent_tiles(
        dy, w, None, a, keep, t, None, dx, scale_dx, power_dx, M, K, N, stride_ar, stride_ak, R, R,
        1, DEPENDENT, PROGRAMS, W_TRANSPOSED, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K, BLOCK_R,
        GROUP_M,
    )  # fmt: skip
    pid, programs = tl.program_id(0), tl.num_programs(0)
    if WANT_DB:
        if DB_IN_PARTS:
            for run in tl.range(pid, tl.cdiv(R * N, SUM_N), programs):
                sum_parts(dB_parts, dB, scale, run, R, N, parts, SUM_PARTS, SUM_N)
        else:
            for strip in tl.range(pid, tl.cdiv(N, STRIP) * tl.cdiv(R, BLOCK_R), programs):
                strip_product(
                    dy_columns, h, None, dB, scale, strip, M, N, stride_dm, stride_dn,
                    stride_bn, stride_br, R, STRIP, STRIP_M, BLOCK_R, PRECISION,
                )  # fmt: skip
    if WANT_DA:
        lane = programs - 1 - pid
        if lane < lanes:
            for strip in tl.range(lane, tl.cdiv(K, STRIP) * tl.cdiv(R, BLOCK_R), lanes):
                strip_product(
                    x, t, keep, dA, scale, strip, M, K, stride_xm, stride_xk,
                    stride_gk, stride_gr, R, STRIP, STRIP_M, BLOCK_R, PRECISION,
                )  # fmt: skip


@triton.jit
def persistent_tiles(
    x,
    w,
    bias,
    b,
    keep,
    h,
    h_out,
    y,
    scale,
    power,
    M,
    N,
    K,
    stride_br,
    stride_bn,
    R: tl.constexpr,
    ROW: tl.constexpr,
    SPLITS: tl.constexpr,
    DEPENDENT: tl.constexpr,
    PROGRAMS: tl.constexpr,
    W_TRANSPOSED: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """Compute this program's tiles of y = x @ w + bias + keep * power * scale * h @ b.

    The loop over K is part of the one over tiles (flatten), so that loads run ahead across tiles.
    """
    tl.assume(K > 0)  # else a second loop is compiled, for tiles without a product
    tiles = tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N)
    for pid in tl.range(tl.program_id(0), tiles, PROGRAMS, flatten=True):
        m0, n0 = tile_of(pid, M, N, BLOCK_M, BLOCK_N, GROUP_M)
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k0 in range(0, K, BLOCK_K):
            x_tile = x.load([m0, k0])
            w_tile = load_w(w, k0, n0, K, N, 0, 0, BLOCK_K, BLOCK_N, True, W_TRANSPOSED)
            acc = tl.dot(x_tile, w_tile, acc, input_precision=PRECISION)
        if bias is not None:
            offs_n = n0 + tl.arange(0, BLOCK_N)
            acc += tl.load(bias + offs_n, mask=offs_n < N, other=0.0).to(tl.float32)[None, :]
        HALF: tl.constexpr = BLOCK_N // 2
        if keep is None:
            for r0 in tl.static_range(0, R, BLOCK_R):
                b_tile = load_tile(b, r0, n0, R, N, stride_br, stride_bn, BLOCK_R, BLOCK_N)
                if DEPENDENT and r0 == 0:
                    gdc_wait()
                h_tile = sum_of_h(h, h_out, m0, n0, r0, M, R, SPLITS, BLOCK_M, BLOCK_R, ROW)
                acc = add_low_rank(acc, h_tile, b_tile.to(y.dtype), scale, power, PRECISION)
        elif DEPENDENT:
            gdc_wait()
        left, right = tl.split(tl.permute(tl.reshape(acc, (BLOCK_M, 2, HALF)), (0, 2, 1)))
        if keep is not None:
            left += masked_part(
                b, keep, h, y, scale, power, m0, n0, M, N, stride_br, stride_bn, R,
                PRECISION, BLOCK_M, HALF, BLOCK_R,
            )  # fmt: skip
        y.store([m0, n0], left.to(y.dtype))
        if keep is not None:
            right += masked_part(
                b, keep, h, y, scale, power, m0, n0 + HALF, M, N, stride_br, stride_bn, R,
                PRECISION, BLOCK_M, HALF, BLOCK_R,
            )  # fmt: skip
        y.store([m0, n0 + HALF], right.to(y.dtype))


@triton.jit
def masked_part(
    b,
    keep,
    h,
    y,
    scale,
    power,
    m0,
    n0,
    M,
    N,
    stride_br,
    stride_bn,
    R: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Return the float32 tile (BLOCK_M, BLOCK_N) at (m0, n0) of keep * power * scale * h @ b."""
    part = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for r0 in tl.static_range(0, R, BLOCK_R):
        b_tile = load_tile(b, r0, n0, R, N, stride_br, stride_bn, BLOCK_R, BLOCK_N)
        h_tile = sum_of_h(h, None, m0, n0, r0, M, R, 1, BLOCK_M, BLOCK_R, R)
        part = add_low_rank(part, h_tile, b_tile.to(y.dtype), scale, power, PRECISION)
    return keep_only(part, keep, m0, n0, M, N, BLOCK_M, BLOCK_N)


@triton.jit
def sum_of_h(
    h,
    h_out,
    m0,
    n0,
    r0,
    M,
    R: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    ROW: tl.constexpr,
):
    """Return the float32 tile at (m0, r0) of h (SPLITS, M, R), its parts summed first to last.

    ROW elements from one row of h to the next. The first column of tiles writes the sum to h_out
    (M, R), contiguous, where there is one.
    """
    offs, inside = offsets(m0, r0, M, R, ROW, 1, BLOCK_M, BLOCK_R)
    total = tl.load(h + offs, mask=inside, other=0.0).to(tl.float32)
    for s in tl.static_range(1, SPLITS):
        part = h + tl.cast(M, tl.int64) * (s * ROW)
        total += tl.load(part + offs, mask=inside, other=0.0).to(tl.float32)
    if h_out is not None:
        to, _ = offsets(m0, r0, M, R, R, 1, BLOCK_M, BLOCK_R)
        tl.store(h_out + to, total.to(h_out.dtype.element_ty), mask=inside & (n0 == 0))
    return total
