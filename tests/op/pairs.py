"""Products of bfloat16 by pairs or by floats, whichever this CPU's table says."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

BF16 = torch.bfloat16


@contextmanager
def forced_pairs(pairs: bool) -> Iterator[None]:
    """Have the CPU kernels multiply bfloat16 by pairs, or not, meanwhile.

    Without the instruction for it they take the one written out, on every instruction set.
    """
    from lora_ext import _C

    _C.force_pairs(pairs)
    try:
        yield
    finally:
        _C.force_pairs(None)


def the_other_kind() -> bool:
    """Return what the table does not say for this CPU: all other tests run what it says."""
    from lora_ext import _C

    return not _C.route("bfloat16")["pairs"]
