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
    x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, alpha: float
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
) -> tuple[Tensor, ...]:
    M, N = dy.shape
    K = x.shape[1] if needs[3] or needs[1] else weight.shape[1] if needs[0] else 0
    R = B.shape[0] if needs[3] else h.shape[1] if needs[4] else 0
    like = ((dy, (M, K)), (dy, (N, K)), (dy, (N,)), (A, (K, R)), (B, (R, N)))
    return tuple(
        t.new_empty(shape if need else (0,)) for need, (t, shape) in zip(needs, like, strict=True)
    )


# An operator takes one kernel a device. For CUDA tensors there are two: Triton's under the first
# name, and under the second the CUDA C++ ones.
for _suffix in ("", "_cuda"):
    for _name, _schema, _fake in (
        (f"lora_linear_fwd{_suffix}", _FWD, _fwd_fake),
        (f"lora_linear_bwd{_suffix}", _BWD, _bwd_fake),
    ):
        _LIBRARY.define(_name + _schema, tags=(torch.Tag.pt2_compliant_tag,))
        torch.library.register_fake(f"lora_ext::{_name}", _fake, lib=_LIBRARY)
