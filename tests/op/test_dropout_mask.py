"""The mask of the dropout as random numbers: what a hash of places may not show."""

import functools

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lora_ext import LinearWithLoRA, functional
from lora_ext.dropout import draw_keep, keep_mask, pack_bits, unpack_bits
from tests.op.test_mutants import changed

M, K = 512, 768


def check_random(keep: Tensor, p: float) -> None:
    """Assert that masks (3, M, K) are Bernoulli(p), and nothing in them is related.

    Neither rows nor columns nor neighbours nor one mask and the next.
    """
    centred = keep.double() - (1 - p)
    bound = 5 * (p * (1 - p)) ** 0.5  # five standard deviations of what follows
    n = M * K
    assert centred.mean((1, 2)).abs().max() < bound / n**0.5
    assert centred.mean(1).abs().max() < bound / M**0.5 and centred.mean(1).std() > 0
    assert centred.mean(2).abs().max() < bound / K**0.5
    pair = 5 * p * (1 - p) / n**0.5
    for a, b in (
        (centred[0], centred[1]),
        (centred[:, 1:], centred[:, :-1]),
        (centred[..., 1:], centred[..., :-1]),
        (centred[..., 64:], centred[..., :-64]),
        (centred[:, 1:, 1:], centred[:, :-1, :-1]),
    ):
        assert (a * b).mean().abs() < 1.1 * pair
    # Rows by columns: a structure like row ^ column would show in the spectrum of the matrix.
    values = torch.linalg.svdvals(centred[0]) / (p * (1 - p)) ** 0.5
    assert values.max() < 1.1 * (M**0.5 + K**0.5)


@pytest.mark.parametrize("p", [0.05, 0.1, 0.5, 0.9])
def test_mask_drops_what_it_should_independently(p):
    seeds = torch.randint(2**31, (3, 2))
    check_random(torch.stack([keep_mask(seed, (M, K), p) for seed in seeds]), p)


PLACE = "(_signed(row)[:, None] ^ _signed(column)) * 0x21F0AAAD"
BROKEN_HASHES = {
    "xor_alone": (
        f"{PLACE}  # (M, K)\n    n = (n ^ (n >> 15)) * 0x735A2D97",
        "_signed(row)[:, None] ^ _signed(column)",
    ),
    "sum_of_rows_and_columns": (PLACE, "(rows[:, None] + columns).int() * 0x21F0AAAD"),
    "no_row": (PLACE, PLACE.replace("_signed(row)[:, None] ^", "0 * rows.int()[:, None] ^")),
    "no_column": (PLACE, PLACE.replace("^ _signed(column)", "^ 0 * columns.int()")),
    "one_seed_for_all": ("M, K = shape", "M, K = shape; seed = seed * 0"),
    "a_percent_too_many": ("p * 2**32", "1.01 * p * 2**32"),
}


@pytest.mark.parametrize("name", BROKEN_HASHES)
def test_a_broken_hash_is_refused(monkeypatch, name):
    from lora_ext import dropout

    monkeypatch.setattr(dropout.ops.LIBRARY, "impl", lambda *_: None)  # the right one has them
    hashed = changed("dropout.py", BROKEN_HASHES[name]).keep_mask
    seeds = torch.randint(2**31, (3, 2))
    with pytest.raises(AssertionError):
        check_random(torch.stack([hashed(seed, (M, K), 0.5) for seed in seeds]), 0.5)


def test_one_more_bit_of_the_seed_gives_another_mask():
    seed = torch.tensor([5, 9])
    keep = keep_mask(seed, (64, 64), 0.5)
    assert torch.equal(keep, keep_mask(seed.clone(), (64, 64), 0.5))
    for other in ([4, 9], [5, 8], [9, 5]):
        share = (keep_mask(torch.tensor(other), (64, 64), 0.5) == keep).double().mean()
        assert 0.45 < share < 0.55


def hash_of(numbers: tuple[int, int], row: int, column: int) -> int:
    """Return the hash of one place, by Python's integers."""
    full = 0xFFFFFFFF

    def mix(n: int) -> int:
        n = (n ^ n >> 16) * 0x21F0AAAD & full
        n = (n ^ n >> 15) * 0x735A2D97 & full
        return n ^ n >> 15

    first, second = numbers
    rows = mix(mix(row & full ^ first) ^ row >> 32 ^ second)
    n = (rows ^ mix(mix(column ^ second) ^ first)) * 0x21F0AAAD & full
    shifted = n >> 15 | (0x1FFFF << 17 if n >> 31 else 0)  # keeps the sign
    return (n ^ shifted) * 0x735A2D97 & full ^ 0x80000000  # 0 is the smallest int32


def test_each_place_has_the_hash_that_python_gives():
    numbers = (123456789, 987654321)
    keep = keep_mask(torch.tensor(numbers), (20, 30), 0.3)
    part = keep_mask(torch.tensor(numbers), (20, 10), 0.3, 17)
    assert torch.equal(keep[:, 17:27], part)
    for row in range(20):
        for column in range(30):
            assert keep[row, column] == (hash_of(numbers, row, column) >= round(0.3 * 2**32))


@pytest.mark.slow
def test_more_than_2_to_the_31_elements_are_drawn():
    numbers, rows, cols = (5, 6), 2**18 + 3, 2**13 + 5
    bits = torch.ops.lora_ext.draw_keep(torch.tensor(numbers), rows, cols, 0.3)
    assert bits.shape == (rows, (cols + 7) // 8) and rows * cols > 2**31
    for row in (0, 2**17, rows - 1):
        for column in (0, 1, 4095, cols - 1):
            kept = hash_of(numbers, row, column) >= round(0.3 * 2**32)
            assert bool(bits[row, column // 8] >> column % 8 & 1) == kept


def check_layers(draw: str) -> None:
    """Assert that two layers, and two calls of one, drop nothing that is related."""
    layers = [LinearWithLoRA(torch.nn.Linear(K, 4), 2, 1.0, dropout=0.5) for _ in range(2)]
    drawn, own = [], functional.draw_keep

    def recorded(x, *others):
        drawn.append(unpack_bits(own(x, *others), K))
        return drawn[-1]

    x = torch.ones(M, K)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(functional, "draw_keep", lambda *given: pack_bits(recorded(*given)))
        for layer in layers:
            layer.lora.dropout_mask = draw
        for layer in (*layers, layers[0]):
            layer(x)
    check_random(torch.stack(drawn), 0.5)
    assert ((drawn[0] == drawn[2]).double().mean() - 0.5).abs() < 5 * 0.5 / (M * K) ** 0.5


def check_recompute(draw: str) -> None:
    """Assert that checkpointing recomputes under the mask of the forward."""
    layer = LinearWithLoRA(torch.nn.Linear(16, 8), 4, 1.0, dropout=0.5, dropout_mask=draw)
    torch.nn.init.normal_(layer.lora.B)
    x = torch.randn(9, 16)
    results = []
    for run in (layer, lambda x: checkpoint(layer, x, use_reentrant=False)):
        torch.manual_seed(3)
        results.append(torch.autograd.grad(run(x).sum(), (layer.lora.A, layer.lora.B)))
    assert all(map(torch.equal, *results))


CHECKS = pytest.mark.parametrize("check", [check_layers, check_recompute])


@CHECKS
@pytest.mark.parametrize("draw", ["hash", "torch"])
def test_masks_of_layers_calls_and_recomputes(check, draw):
    check(draw)


own_numbers = torch.Generator()


@functools.cache
def the_mask() -> Tensor:
    return draw_keep(torch.ones(M, K), 0.5)


def one_for_all(x, p, draw):
    return the_mask()


def from_another_generator(x, p, draw):
    return pack_bits(torch.rand(x.shape, generator=own_numbers) >= p)


@pytest.mark.parametrize(
    ("wrong", "check"),
    [(one_for_all, check_layers), (from_another_generator, check_recompute)],
)
def test_a_shared_mask_and_another_recompute_are_refused(monkeypatch, wrong, check):
    monkeypatch.setattr(functional, "draw_keep", wrong)
    with pytest.raises(AssertionError):
        check("hash")


@pytest.mark.parametrize("draw", ["hash", "torch"])
def test_nothing_of_a_draw_is_read_on_the_host(draw):
    """A CUDA graph replays a draw only where its seed stays on the device: meta has no values."""
    keep = draw_keep(torch.empty(3, 20, device="meta"), 0.3, draw)
    assert keep.is_meta and keep.shape == (3, 3)
    mask = keep_mask(torch.empty(2, dtype=torch.int64, device="meta"), (3, 20), 0.3)
    assert pack_bits(mask).is_meta


@pytest.mark.parametrize("mask", ["hash", "torch"])
def test_mask_of_some_columns_is_a_part_of_the_whole_ones(mask):
    torch.manual_seed(3)
    whole = unpack_bits(draw_keep(torch.empty(7, 40), 0.4, mask, (0, 40)), 40)
    for first, count in ((0, 16), (8, 13), (27, 13)):
        torch.manual_seed(3)
        part = draw_keep(torch.empty(7, count), 0.4, mask, (first, 40))
        assert torch.equal(unpack_bits(part, count), whole[:, first : first + count])
