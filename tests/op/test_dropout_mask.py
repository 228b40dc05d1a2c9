"""The mask of the dropout as random numbers: what a hash of places may not show."""

import pytest
import torch

from lora_ext.dropout import keep_mask


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_mask_drops_what_it_should_independently(p):
    """Bernoulli(p), neither rows nor columns nor neighbours nor seeds related."""
    M, K = 512, 768
    seeds = torch.randint(2**31, (3, 2))
    keep = torch.stack([keep_mask(seed, (M, K), p) for seed in seeds]).double()
    centred = keep - (1 - p)
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


def test_one_more_bit_of_the_seed_gives_another_mask():
    seed = torch.tensor([5, 9])
    keep = keep_mask(seed, (64, 64), 0.5)
    assert torch.equal(keep, keep_mask(seed.clone(), (64, 64), 0.5))
    for other in ([4, 9], [5, 8], [9, 5]):
        share = (keep_mask(torch.tensor(other), (64, 64), 0.5) == keep).double().mean()
        assert 0.45 < share < 0.55
