"""What Triton's kernels share, by itself, in Triton's interpreter."""

import pytest
import torch

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from lora_ext.backends.triton.common import add_bias, tile_of  # noqa: E402
from tests.conftest import Backend  # noqa: E402
from tests.gpu.launched import run_once  # noqa: E402

ROWS, COLS = 77, 95  # 5 by 3 tiles, of which the last ones are cut
BLOCK_M, BLOCK_N = 16, 32


@triton.jit
def tile_of_each_program(to, rows, cols, M: tl.constexpr, N: tl.constexpr, GROUP: tl.constexpr):
    """Write the first row and column of each program's tile."""
    pid = tl.program_id(0)
    m0, n0 = tile_of(pid, rows, cols, M, N, GROUP)
    tl.store(to + 2 * pid, m0)
    tl.store(to + 2 * pid + 1, n0)


@pytest.mark.parametrize("group", [1, 2, 3, 8])
def test_bands_of_tiles_cover_a_matrix_once(backend: Backend, group, monkeypatch):
    """The last band has fewer rows of tiles than the others, or is the only one."""
    run_once(backend, "triton-in_loop", monkeypatch)
    to = torch.full((15, 2), -1)
    tile_of_each_program[(15,)](to, ROWS, COLS, BLOCK_M, BLOCK_N, group)
    every = [(m0, n0) for m0 in range(0, ROWS, BLOCK_M) for n0 in range(0, COLS, BLOCK_N)]
    assert sorted(map(tuple, to.tolist())) == every
    assert to[: 3 * min(group, 5), 0].max() == BLOCK_M * (min(group, 5) - 1)


@triton.jit
def bias_of_a_tile(to, bias, n0, N, BLOCK: tl.constexpr):
    """Write a tile of nothing but its bias."""
    at = tl.arange(0, 2)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    tl.store(to + at, add_bias(tl.zeros((2, BLOCK), tl.float32), bias, n0, N, BLOCK))


def test_no_bias_is_read_past_its_end(backend: Backend, monkeypatch):
    run_once(backend, "triton-in_loop", monkeypatch)
    bias, to = torch.arange(1.0, 41.0), torch.full((2, 16), torch.nan)
    bias_of_a_tile[(1,)](to, bias, 16, 23, 16)
    assert torch.equal(to, torch.cat((bias[16:23], torch.zeros(9))).expand(2, 16))
