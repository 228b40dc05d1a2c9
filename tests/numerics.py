"""Two computations of one thing compared, where no oracle is at hand (else: lora_ext.testing)."""

import torch
from torch import Tensor


def assert_same_up_to_rounding(got: Tensor, want: Tensor) -> None:
    """Assert that two computations of one thing, in the same dtype, round differently at most.

    For modules with few features: each may be off by two roundings of the largest value.
    """
    assert got.shape == want.shape and got.dtype == want.dtype, (got.dtype, want.dtype)
    if got.numel():
        bound = 4 * torch.finfo(want.dtype).eps * want.abs().max().item()
        assert (got.double() - want.double()).abs().max().item() <= bound
