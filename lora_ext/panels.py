"""Panels: a frozen CPU weight laid out once for the C++ kernels, and whether it still holds."""

import torch
from torch import Tensor

from .backends import cpp

# Up to so many rows the kernels stream the weight itself faster than its panels: a row of
# 2048 x 2048 in float32 takes 0.55 ms for 0.83 (Zen 4).
_FEW_ROWS = 2


class Panels:
    """The panels of weight.T that the forward reads, and of weight for dx.

    Holds the weight it was made of. PyTorch counts no version for a write through `weight.data`,
    NumPy, the storage, or a collective such as `dist.broadcast`: make it again after those.

    Args:
        weight: (out_features, in_features), frozen, for which `cpp.why_not_packed` has no reason.
        backward: lay it out for dx = dy @ weight too, which takes as much memory again.

    """

    def __init__(self, weight: Tensor, *, backward: bool = False) -> None:
        # Strong references: an address may come back once it is freed, and torch.utils.swap_tensors
        # refuses a tensor that has weak ones.
        self._weight, self._storage = weight, weight.untyped_storage()
        self._version, self._place = weight._version, _place(weight)
        self.forward = cpp.pack_weight(weight.detach(), transposed=True)
        self.backward = cpp.pack_weight(weight.detach(), transposed=False) if backward else None

    def for_input(self, x: Tensor) -> "Panels | None":
        """Return itself where x, (..., in_features), has rows enough for panels to pay."""
        return self if x.numel() > _FEW_ROWS * x.shape[-1] else None

    @property
    def nbytes(self) -> int:
        """Bytes that it holds."""
        layouts = (self.forward, self.backward)
        return sum(layout.data.nbytes for layout in layouts if layout is not None)

    def why_stale(self, weight: Tensor) -> str | None:
        """Say why it no longer stands for `weight`; None while it does."""
        if self._weight is not weight:
            return "it was made of another weight"
        if weight._version != self._version:
            return "the weight was written to"
        if _place(weight) != self._place:
            return "the weight was moved or replaced"
        return "the weight requires grad" if weight.requires_grad else None


def _place(weight: Tensor) -> tuple[int, torch.dtype, torch.Size, tuple[int, ...]]:
    return weight.data_ptr(), weight.dtype, weight.shape, weight.stride()
