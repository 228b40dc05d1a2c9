"""How the C++ kernels split work among threads, and that a way can be forced and named."""

import itertools

import pytest
import torch

from lora_ext.backends import BACKENDS
from tests.conftest import small_call

WITHOUT_CPP = BACKENDS["cpp"].unsupported(small_call())
pytestmark = pytest.mark.skipif(WITHOUT_CPP is not None, reason=str(WITHOUT_CPP))


def parts(size, most, least, multiple, threads):
    from lora_ext import _C

    part = _C.even_part(size, most, least, multiple, threads)
    assert part % multiple == 0 and part > 0
    return part, -(-size // part)


def test_work_is_split_among_all_threads_that_have_enough():
    """Sizes of the CPU grid: columns of dA, dB and dots, rows of h, columns of dx of few rows."""
    grid = [(size, 512, 32, 16) for size in (384, 576, 768, 1024, 1536, 2048, 3072, 4096)]
    grid += [(size, 128, 32, 16) for size in (768, 2048)]
    grid += [(size, 96, 6, 6) for size in (1, 16, 64, 128, 256, 512, 960, 1024, 2048)]
    grid += [(size, size, 256, 16) for size in (768, 2048, 4096)]
    for (size, most, least, multiple), threads in itertools.product(grid, range(1, 193)):
        part, count = parts(size, most, least, multiple, threads)
        assert part <= max(most + multiple - 1, multiple) and part * (count - 1) < size
        # As many parts as threads, unless they would be smaller than the least and a multiple.
        enough = min(threads, size // (least + multiple - 1))
        assert count >= enough / 2, (size, most, least, multiple, threads, count)
        fewer = parts(size, most, least, multiple, max(threads // 2, 1))[1]
        assert count >= fewer / 2, (size, most, least, multiple, threads, count, fewer)


@pytest.mark.parametrize("threads", [1, 2, 3, 7, 16, 24, 64, 192])
def test_tiles_cover_a_product_and_keep_the_threads_busy(threads):
    from lora_ext import _C

    for rows, cols in ((1, 16), (64, 3072), (128, 768), (960, 768), (2048, 1024), (8192, 4096)):
        tile_rows, tile_cols = _C.tiles(rows, cols, threads)
        assert tile_cols % 16 == 0 and tile_cols <= 256 and 0 < tile_rows <= rows
        tiles = -(-rows // tile_rows) * -(-cols // tile_cols)
        most = max(rows // 24, 1) * max(cols // 80, 1)
        assert tiles >= min(threads, most) * 0.5, (rows, cols, tiles)


def test_a_way_is_forced_and_named():
    from lora_ext import _C

    ops = torch.ops.lora_ext
    x, A, B = torch.randn(40, 64), torch.randn(64, 8), torch.randn(8, 48)
    weight = torch.randn(48, 64)
    want = x.double() @ weight.double().T + x.double() @ A.double() @ B.double()
    dense = torch.randn(40, 48)
    forward, backward = ops.linear_fwd.default, ops.linear_bwd.default
    results = {}
    try:
        for product, ways in _C.ways().items():
            for way in ways:
                _C.force_way(product, way)
                y, h = forward(x, weight, None, A, B, 1.0)
                gradients = backward(dense, x, weight, A, B, h, 1.0, (True,) * 5)
                torch.testing.assert_close(y.double(), want, rtol=1e-4, atol=1e-3)
                results[product, way] = gradients
            _C.force_way(product, None)
    finally:
        for product in _C.ways():
            _C.force_way(product, None)
    first = next(iter(results.values()))
    for gradients in results.values():
        for one, other in zip(gradients, first, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-3)
    with pytest.raises(RuntimeError, match="product must be one of y, dx, .*, got z"):
        _C.force_way("z", "library")
    with pytest.raises(RuntimeError, match="way must be one that gradient goes, got dots"):
        _C.force_way("gradient", "dots")
    with pytest.raises(ValueError, match="dtype must be float32, .*, got int8"):
        _C.route("int8")
