"""Kernels whose programs stay: one an SM, which takes tile after tile of a base product.

They read both operands and write the result by tensor descriptors, start while the launch before
them still runs (programmatic dependent launch), and wait for it only where they need its h or t:
after the first tile's base product. The next tile's loads are under way during a tile's epilogue.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait

from .common import add_low_rank, load_tile, load_w, offsets, tile_of


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

    x (M, K), w (K, N) and y (M, N) by descriptors, bias (N,), b (R, N), h (SPLITS, M, R) float32;
    h_out (M, R) contiguous, the sum of h. At most PROGRAMS programs; program p takes the tiles
    (BLOCK_M, BLOCK_N) p, p + PROGRAMS, ... of y. Float32 accumulator.
    """
    persistent_tiles(
        x, w, bias, b, h, h_out, y, scale, power, M, N, K, stride_br, stride_bn, R, SPLITS,
        DEPENDENT, PROGRAMS, W_TRANSPOSED, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K, BLOCK_R, GROUP_M,
    )  # fmt: skip


@triton.jit
def persistent_tiles(
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
    """Compute this program's tiles of y = x @ w + bias + power * scale * h @ b.

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
        for r0 in tl.static_range(0, R, BLOCK_R):
            b_tile = load_tile(b, r0, n0, R, N, stride_br, stride_bn, BLOCK_R, BLOCK_N)
            if DEPENDENT and r0 == 0:
                gdc_wait()
            h_tile = sum_of_h(h, h_out, m0, n0, r0, M, R, SPLITS, BLOCK_M, BLOCK_R)
            acc = add_low_rank(acc, h_tile, b_tile.to(y.dtype), scale, power, PRECISION)
        HALF: tl.constexpr = BLOCK_N // 2
        left, right = tl.split(tl.permute(tl.reshape(acc, (BLOCK_M, 2, HALF)), (0, 2, 1)))
        y.store([m0, n0], left.to(y.dtype))
        y.store([m0, n0 + HALF], right.to(y.dtype))


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
):
    """Return the float32 tile at (m0, r0) of h (SPLITS, M, R), its parts summed first to last.

    The first column of tiles writes it to h_out (M, R), where there is one.
    """
    offs, inside = offsets(m0, r0, M, R, R, 1, BLOCK_M, BLOCK_R)
    total = tl.load(h + offs, mask=inside, other=0.0).to(tl.float32)
    for s in tl.static_range(1, SPLITS):
        part = h + tl.cast(M, tl.int64) * (s * R)
        total += tl.load(part + offs, mask=inside, other=0.0).to(tl.float32)
    if h_out is not None:
        tl.store(h_out + offs, total.to(h_out.dtype.element_ty), mask=inside & (n0 == 0))
    return total
