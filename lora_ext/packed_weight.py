"""PackedWeight: a frozen CPU weight laid out once for the C++ kernels."""

import torch
from torch import Tensor

from .backends import cpp


class PackedWeight:
    """A CPU weight laid out for the C++ kernels: their panels of weight.T, and of weight for dx.

    Holds the weight it was made of. PyTorch counts no version for a write through `weight.data`,
    NumPy, the storage, or a collective such as `dist.broadcast`: make it anew after those.

    Args:
        weight: (out_features, in_features), frozen; float32, or bfloat16 or float16, whose panels
            are of float32.
        backward: lay it out for dx = dy @ weight too, which takes as much memory again.

    Raises:
        TypeError: `weight` is no tensor, or of a dtype that the kernels don't take.
        ValueError: not a matrix, not on the CPU, or PyTorch's own product, which takes no such
            layout, is the faster one for this dtype on this CPU.

    """

    def __init__(self, weight: Tensor, *, backward: bool = False) -> None:
        if not isinstance(weight, Tensor):
            raise TypeError(f"weight must be a torch.Tensor, got {type(weight).__name__}")
        if weight.dim() != 2:
            shape = tuple(weight.shape)
            raise ValueError(f"weight must have shape (out_features, in_features), got {shape}")
        if (why := cpp.why_not_packed(weight)) is not None:
            raise (TypeError if weight.dtype not in cpp.DTYPES else ValueError)(why)
        # Strong references: an address may come back once it is freed, and torch.utils.swap_tensors
        # refuses a tensor that has weak ones.
        self._weight, self._storage = weight, weight.untyped_storage()
        self._version, self._place = weight._version, _place(weight)
        self.forward = cpp.pack_weight(weight.detach(), transposed=True)
        self.backward = cpp.pack_weight(weight.detach(), transposed=False) if backward else None

    @property
    def nbytes(self) -> int:
        """Bytes that it holds."""
        return self.forward.nbytes + (0 if self.backward is None else self.backward.nbytes)

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
