"""The operators of `lora_ext`: schema and shape rule here, a kernel per device in the backends.

All are functional (nothing is written into an argument) and take `x` as a matrix, so that a
device file has one shape to serve. M rows, K in, N out, R rank.
"""

import torch
from torch import Tensor

_LIBRARY = torch.library.Library("lora_ext", "DEF")
_FWD = (
    "(Tensor x, Tensor weight, Tensor? bias, Tensor A, Tensor B, float alpha)"
    " -> (Tensor y, Tensor h)"
)
# A gradient that `needs` (dx, dweight, dbias, dA, dB) does not ask for comes back with no elements,
# and an input that only it would read may be a stand-in: a tensor with the dtype and no elements.
_BWD = (
    "(Tensor dy, Tensor x, Tensor weight, Tensor A, Tensor B, Tensor h, float alpha,"
    " bool[5] needs) -> (Tensor dx, Tensor dweight, Tensor dbias, Tensor dA, Tensor dB)"
)


def _fwd_fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    alpha: float,
    packed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    M = x.shape[0]
    return x.new_empty(M, weight.shape[0]), x.new_empty(M, A.shape[1])


def _bwd_fake(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    A: Tensor,
    B: Tensor,
    h: Tensor,
    alpha: float,
    needs: list[bool],
    packed: Tensor | None = None,
) -> tuple[Tensor, ...]:
    M, N = dy.shape
    K = x.shape[1] if needs[3] or needs[1] else weight.shape[1] if needs[0] else 0
    R = B.shape[0] if needs[3] else h.shape[1] if needs[4] else 0
    like = ((dy, (M, K)), (dy, (N, K)), (dy, (N,)), (A, (K, R)), (B, (R, N)))
    return tuple(
        t.new_empty(shape if need else (0,)) for need, (t, shape) in zip(needs, like, strict=True)
    )


def _pack_fake(weight: Tensor, transposed: bool) -> Tensor:
    depth, cols = reversed(weight.shape) if transposed else weight.shape
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    panel = 64 // dtype.itemsize  # a row of a panel is a cache line
    return weight.new_empty(depth * ((cols + panel - 1) // panel * panel), dtype=dtype)


# An operator takes one kernel a device. For CUDA tensors there are two: Triton's under the first
# name, and under "_cuda" the CUDA C++ ones. "_packed" reads a weight that pack_weight has laid out
# (transposed for the forward), on the CPU.
for _name, _schema, _fake in (
    ("lora_linear_fwd", _FWD, _fwd_fake),
    ("lora_linear_bwd", _BWD, _bwd_fake),
    ("lora_linear_fwd_cuda", _FWD, _fwd_fake),
    ("lora_linear_bwd_cuda", _BWD, _bwd_fake),
    ("lora_linear_fwd_packed", _FWD.replace(") ->", ", Tensor? packed) ->"), _fwd_fake),
    ("lora_linear_bwd_packed", _BWD.replace(") ->", ", Tensor? packed) ->"), _bwd_fake),
    ("pack_weight", "(Tensor weight, bool transposed) -> Tensor", _pack_fake),
):
    _LIBRARY.define(_name + _schema, tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.register_fake(f"lora_ext::{_name}", _fake, lib=_LIBRARY)
