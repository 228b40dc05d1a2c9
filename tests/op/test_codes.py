"""Weights of codes: bitsandbytes' bytes, and what they stand for, bit for bit."""

import pytest
import torch

from lora_ext import codes as module
from lora_ext.backends import BACKENDS
from lora_ext.call import Call, LowRank
from lora_ext.codes import DTYPES, FORMATS, VALUES, block_size, dequantised, quantised
from tests.conftest import Backend

SHAPES = [(64, 128), (7, 66), (5, 33), (1, 1), (3, 64), (9, 7), (40, 96)]
BLOCKS = [32, 64, 128, 4096]
OF_X = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@OF_X
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_codes_are_the_bytes_that_bitsandbytes_makes(shape, dtype, monkeypatch):
    bnb = pytest.importorskip("bitsandbytes", reason="needs the package bitsandbytes")
    for piece, scale in ((1 << 22, 1.0), (200, 1.0), (1 << 22, 1e-39), (1 << 22, 0.0)):
        monkeypatch.setattr(module, "_PIECE", piece)
        weight = (scale * torch.randn(shape)).to(dtype)
        weight[:1] *= 0 if len(weight) > 1 else 1
        for format in VALUES:
            for size in BLOCKS:
                ours = quantised(weight, format, size)
                code, state = bnb.functional.quantize_4bit(
                    weight, blocksize=size, quant_type=format
                )
                assert torch.equal(ours.data, code) and torch.equal(ours.scale, state.absmax)
                assert torch.equal(module.table(format, code.device), state.code)
        ours = quantised(weight, "int8")
        code, most, _ = bnb.functional.int8_vectorwise_quant(weight.half())
        assert torch.equal(ours.data, code) and torch.equal(ours.scale, most.mul(1 / 127))


@pytest.mark.parametrize("format", FORMATS)
def test_codes_stand_for_the_nearest_values(format):
    weight = torch.randn(48, 96)
    near = dequantised(quantised(weight, format), *weight.shape, torch.float32)
    assert (near - weight).norm() < (0.01 if format == "int8" else 0.13) * weight.norm()
    again = dequantised(quantised(near, format), *weight.shape, torch.float32)
    torch.testing.assert_close(again, near, rtol=1e-3, atol=1e-3)


@OF_X
@pytest.mark.parametrize("format", FORMATS)
def test_kernels_multiply_by_what_codes_stand_for_bit_for_bit(backend: Backend, format, dtype):
    """A row of an identity matrix has the product of one weight, which is not rounded again."""
    if backend.name not in ("cpp", "reference"):
        pytest.skip(f"{backend} takes a plain weight")
    run = BACKENDS[backend.name]
    for (N, K), size in (((70, 128), 64), ((33, 96), 64), ((9, 35), 32), ((17, 192), 32)):
        weight = quantised(torch.randn(N, K), format, size)
        want = dequantised(weight, N, K, dtype)
        low = LowRank(torch.zeros(K, 1, dtype=dtype), torch.zeros(1, N, dtype=dtype), 1.0)
        for rows in (1, 2, 5, 16, K):
            x = torch.eye(K, dtype=dtype)[:rows]
            y, _ = run.forward(Call(x, weight, None, low))
            assert torch.equal(y, want.T[:rows])
        dy = torch.eye(N, dtype=dtype)
        needs = (True, False, False, False, False)
        assert torch.equal(run.backward(dy, Call(None, weight, None, low), None, needs)[0], want)


@pytest.mark.parametrize("elements, size", [(1, 32), (64, 32), (65, 32), (96, 64), (8192, 4096)])
def test_block_size_is_told_by_the_number_of_blocks(elements, size):
    assert -(-elements // block_size(-(-elements // size), elements)) == -(-elements // size)
    assert block_size(-(-elements // size), elements) == size or elements <= size


def test_blocks_that_fit_no_size_are_refused():
    with pytest.raises(ValueError, match="one value a block .* got 3 for 200 elements"):
        block_size(3, 200)
    with pytest.raises(ValueError, match="got 8 for 200 elements"):
        block_size(8, 200)


def test_operators_have_a_shape_rule_for_codes():
    weight = quantised(torch.randn(10, 64), "nf4")
    x, A, B = torch.randn(3, 64), torch.randn(64, 2), torch.randn(2, 10)
    given = {"format": "nf4", "weight_scale": weight.scale}
    ops = torch.ops.lora_ext
    torch.library.opcheck(ops.linear_fwd.default, (x, weight.data, None, A, B, 1.0), given)
    arguments = (torch.randn(3, 10), x, weight.data, A, B, torch.randn(3, 2), 1.0)
    needs = [True, False, True, True, True]
    torch.library.opcheck(ops.linear_bwd.default, (*arguments, needs), given)
