"""What the kernels share: tile order, loads, stores, dropout's mask, products, the epilogue.

M rows, K in, N out, R rank; a tile is (BLOCK_M, BLOCK_N) of the result. R is a constant, and so are
A's strides, which follow from it: loads of A and h are then as wide as R allows. Offsets are
64-bit: a row index times a stride passes 2^31 elements from (M, N) = (2^17, 2^14) on. Products
accumulate in float32.
"""

import triton
import triton.language as tl


@triton.jit
def tile_of(pid, rows, cols, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """Return (m0, n0), the first row and column of tile `pid`, in bands of GROUP_M tiles of rows.

    Programs that run together then share GROUP_M row blocks and few column blocks, both in L2.
    """
    tiles_m = tl.cdiv(rows, BLOCK_M)
    tiles_n = tl.cdiv(cols, BLOCK_N)
    band = pid // (GROUP_M * tiles_n)
    first_m = band * GROUP_M
    band_m = tl.minimum(tiles_m - first_m, GROUP_M)
    within = pid % (GROUP_M * tiles_n)
    return (first_m + within % band_m) * BLOCK_M, (within // band_m) * BLOCK_N


@triton.jit
def offsets(
    row, col, rows, cols, stride_row, stride_col, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr
):
    """Return the offsets (BLOCK_ROWS, BLOCK_COLS) of a tile and the mask of those inside."""
    offs_row = row + tl.arange(0, BLOCK_ROWS)
    offs_col = col + tl.arange(0, BLOCK_COLS)
    inside = (offs_row < rows)[:, None] & (offs_col < cols)[None, :]
    at_row = offs_row.to(tl.int64)[:, None] * stride_row
    return at_row + offs_col.to(tl.int64)[None, :] * stride_col, inside


@triton.jit
def load_tile(
    matrix,
    row,
    col,
    rows,
    cols,
    stride_row,
    stride_col,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    DESCRIPTOR: tl.constexpr = False,
):
    """Return the tile (BLOCK_ROWS, BLOCK_COLS) at (row, col), zero outside (rows, cols).

    `matrix` is a pointer, or a tensor descriptor whose block is the tile.
    """
    if DESCRIPTOR:
        tile = matrix.load([row, col])
    else:
        offs, inside = offsets(row, col, rows, cols, stride_row, stride_col, BLOCK_ROWS, BLOCK_COLS)
        tile = tl.load(matrix + offs, mask=inside, other=0.0)
    return tile


@triton.jit
def store_tile(
    matrix,
    tile,
    row,
    col,
    rows,
    cols,
    stride_row,
    stride_col,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    """Store what of `tile` is inside (rows, cols), in the matrix's dtype."""
    offs, inside = offsets(row, col, rows, cols, stride_row, stride_col, BLOCK_ROWS, BLOCK_COLS)
    tl.store(matrix + offs, tile.to(matrix.dtype.element_ty), mask=inside)


@triton.jit
def keep_only(tile, keep, row, col, rows, cols, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr):
    """Return the tile at (row, col) of a matrix (rows, cols) with zeros where `keep`'s bit is 0.

    `keep` is None, for the tile as it is, or (rows, cdiv(cols, BITS)) words, contiguous: the bit of
    column k is k % BITS, the least significant first, of word k // BITS.
    """
    if keep is not None:
        BITS: tl.constexpr = keep.dtype.element_ty.primitive_bitwidth
        words = tl.cdiv(cols, BITS)
        word = load_tile(
            keep, row, col // BITS, rows, words, words, 1, BLOCK_ROWS, BLOCK_COLS // BITS
        )
        bits = (word[:, :, None] >> tl.arange(0, BITS)[None, None, :]) & 1
        tile = tl.where(tl.reshape(bits, (BLOCK_ROWS, BLOCK_COLS)) != 0, tile, 0.0)
    return tile


@triton.jit
def base_product(
    acc,
    x,
    w,
    m0,
    n0,
    M,
    N,
    K,
    stride_xm,
    stride_xk,
    stride_wk,
    stride_wn,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    W_TRANSPOSED: tl.constexpr,
):
    """Return acc + x @ w, the float32 tile (BLOCK_M, BLOCK_N) at (m0, n0): x (M, K), w (K, N).

    W_TRANSPOSED: w is a descriptor of its transpose (N, K), as weight is stored.
    """
    for k0 in range(0, K, BLOCK_K):
        x_tile = load_tile(x, m0, k0, M, K, stride_xm, stride_xk, BLOCK_M, BLOCK_K, DESCRIPTORS)
        w_tile = load_w(
            w, k0, n0, K, N, stride_wk, stride_wn, BLOCK_K, BLOCK_N, DESCRIPTORS, W_TRANSPOSED
        )
        acc = tl.dot(x_tile, w_tile, acc, input_precision=PRECISION)
    return acc


@triton.jit
def load_w(
    w,
    k0,
    n0,
    K,
    N,
    stride_wk,
    stride_wn,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    W_TRANSPOSED: tl.constexpr,
):
    """Return the tile (BLOCK_K, BLOCK_N) of w (K, N), which memory may hold as (N, K)."""
    if DESCRIPTORS and W_TRANSPOSED:
        tile = w.load([n0, k0]).T
    else:
        tile = load_tile(w, k0, n0, K, N, stride_wk, stride_wn, BLOCK_K, BLOCK_N, DESCRIPTORS)
    return tile


@triton.jit
def add_low_rank(acc, h, b, scale, power, PRECISION: tl.constexpr):
    """Return acc + power * scale * h @ b: acc (BLOCK_M, BLOCK_N) and h (BLOCK_M, BLOCK_R) float32.

    The factor goes into h while that is float32. In float16, whose range ends at 65504, it is split
    in two, |scale| in [0.5, 1) times a power of two `power` (else 1): dividing acc by it and
    multiplying it back is exact, and scale * h overflows no sooner than h.
    """
    scaled = (h * scale).to(b.dtype)
    if b.dtype == tl.float16:
        acc = tl.dot(scaled, b, acc * (1.0 / power), input_precision=PRECISION) * power
    else:
        acc = tl.dot(scaled, b, acc, input_precision=PRECISION)
    return acc


@triton.jit
def low_rank_part(
    acc,
    h,
    b,
    h_out,
    m0,
    n0,
    M,
    N,
    splits,
    stride_br,
    stride_bn,
    scale,
    power,
    R: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
    STORE_H: tl.constexpr,
    row=None,
):
    """Return acc + power * scale * h @ b, h (splits, M, R), b (R, N), BLOCK_R at a time.

    STORE_H: the first column of tiles writes the summed h to h_out (M, R), contiguous. `row` as in
    load_h.
    """
    for r0 in tl.range(0, R, BLOCK_R, num_stages=1):
        h_tile = load_h(h, m0, r0, M, R, splits, BLOCK_M, BLOCK_R, row)
        if STORE_H:
            if n0 == 0:
                store_tile(h_out, h_tile, m0, r0, M, R, R, 1, BLOCK_M, BLOCK_R)
        b_tile = load_tile(b, r0, n0, R, N, stride_br, stride_bn, BLOCK_R, BLOCK_N)
        b_tile = b_tile.to(h_out.dtype.element_ty)
        acc = add_low_rank(acc, h_tile, b_tile, scale, power, PRECISION)
    return acc


@triton.jit
def load_h(
    h,
    m0,
    r0,
    M,
    R,
    splits,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    row=None,
):
    """Return the float32 tile at (m0, r0) of h (splits, M, R), its parts summed first to last.

    `row`: elements from one row of h to the next where h is R columns of a wider one, else None.
    """
    stride = R if row is None else row
    offs, inside = offsets(m0, r0, M, R, stride, 1, BLOCK_M, BLOCK_R)
    total = tl.load(h + offs, mask=inside, other=0.0).to(tl.float32)
    for s in tl.range(1, splits, num_stages=1):
        part = h + tl.cast(s, tl.int64) * M * stride
        total += tl.load(part + offs, mask=inside, other=0.0).to(tl.float32)
    return total


@triton.jit
def add_bias(acc, bias, n0, N, BLOCK_N: tl.constexpr):
    """Return acc + bias, (BLOCK_M, BLOCK_N); bias (N,) or None."""
    if bias is not None:
        offs_n = n0 + tl.arange(0, BLOCK_N)
        acc += tl.load(bias + offs_n, mask=offs_n < N, other=0.0).to(tl.float32)[None, :]
    return acc


@triton.jit
def part_product(
    x,
    a,
    keep,
    m0,
    r0,
    s,
    splits,
    M,
    K,
    R,
    stride_xm,
    stride_xk,
    stride_ak,
    stride_ar,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Return the float32 tile (BLOCK_M, BLOCK_R) at (m0, r0) of part s of (keep * x) @ a.

    x (M, K), a (K, R). A part is a run of whole BLOCK_K steps, the last one shorter.
    """
    steps = tl.cdiv(tl.cdiv(K, BLOCK_K), splits)
    first = s * steps * BLOCK_K
    acc = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for k0 in range(first, tl.minimum(first + steps * BLOCK_K, K), BLOCK_K):
        x_tile = load_tile(x, m0, k0, M, K, stride_xm, stride_xk, BLOCK_M, BLOCK_K)
        x_tile = keep_only(x_tile, keep, m0, k0, M, K, BLOCK_M, BLOCK_K)
        a_tile = load_tile(a, k0, r0, K, R, stride_ak, stride_ar, BLOCK_K, BLOCK_R)
        acc = tl.dot(x_tile, a_tile.to(x_tile.dtype), acc, input_precision=PRECISION)
    return acc
