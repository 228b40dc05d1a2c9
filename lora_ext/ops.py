"""The operators of `lora_ext`: schema and shape rule here, a kernel per device in the backends.

Both are functional (nothing is written into an argument) and take `x` as a matrix, so that a
device file has one shape to serve. M rows, K in, N out, R rank.
"""

import torch
from torch import Tensor

_LIBRARY = torch.library.Library("lora_ext", "DEF")
_LIBRARY.define(
    "lora_linear_fwd(Tensor x, Tensor weight, Tensor? bias, Tensor A, Tensor B, float alpha)"
    " -> (Tensor y, Tensor h)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
# A gradient that `needs` (dx, dweight, dbias, dA, dB) does not ask for comes back with no elements,
# and an input that only it would read may be a stand-in: a tensor with the dtype and no elements.
_LIBRARY.define(
    "lora_linear_bwd(Tensor dy, Tensor x, Tensor weight, Tensor A, Tensor B, Tensor h, float alpha,"
    " bool[5] needs) -> (Tensor dx, Tensor dweight, Tensor dbias, Tensor dA, Tensor dB)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
# The same over a weight that pack_weight has laid out (transposed for the forward), on the CPU.
_LIBRARY.define(
    "lora_linear_fwd_packed(Tensor x, Tensor weight, Tensor? bias, Tensor A, Tensor B, float alpha,"
    " Tensor? packed) -> (Tensor y, Tensor h)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_LIBRARY.define(
    "lora_linear_bwd_packed(Tensor dy, Tensor x, Tensor weight, Tensor A, Tensor B, Tensor h,"
    " float alpha, bool[5] needs, Tensor? packed)"
    " -> (Tensor dx, Tensor dweight, Tensor dbias, Tensor dA, Tensor dB)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_LIBRARY.define(
    "pack_weight(Tensor weight, bool transposed) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,)
)


@torch.library.register_fake("lora_ext::lora_linear_fwd", lib=_LIBRARY)
@torch.library.register_fake("lora_ext::lora_linear_fwd_packed", lib=_LIBRARY)
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


@torch.library.register_fake("lora_ext::lora_linear_bwd", lib=_LIBRARY)
@torch.library.register_fake("lora_ext::lora_linear_bwd_packed", lib=_LIBRARY)
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


@torch.library.register_fake("lora_ext::pack_weight", lib=_LIBRARY)
def _pack_fake(weight: Tensor, transposed: bool) -> Tensor:
    depth, cols = reversed(weight.shape) if transposed else weight.shape
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    panel = 64 // dtype.itemsize  # a row of a panel is a cache line
    return weight.new_empty(depth * ((cols + panel - 1) // panel * panel), dtype=dtype)
