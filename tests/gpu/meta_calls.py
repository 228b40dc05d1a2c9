"""Calls of the Triton backend over meta tensors, as an H100 would get them."""

import torch

from lora_ext.backends.triton import cards, tuning
from lora_ext.backends.triton.backward_launches import Backward
from lora_ext.backends.triton.forward_launches import Forward

H100 = cards.KNOWN["H100"]


def forward_of(M, K, N, R=16, scale=0.5, dtype=torch.bfloat16) -> Forward:
    sizes = ((M, K), (N, K), (N,), (K, R), (R, N))
    tensors = (torch.empty(s, dtype=dtype, device="meta") for s in sizes)
    return Forward(*tensors, scale, None)


def backward_of(M, K, N, R=16, scale=0.5, needs=(True, True, True)) -> Backward:
    f = forward_of(M, K, N, R)
    dy, h = f.x.new_empty(M, N), f.x.new_empty(M, R)
    return Backward(dy, f.x, f.weight if needs[0] else None, f.A, f.B, h, scale, needs, None)


def choice_of(call: Forward | Backward) -> tuning.Choice:
    """Return the regime and tile that a call is run with on an H100."""
    if isinstance(call, Forward):
        return tuning.choose("forward", call, tuning.forward_problem(call), H100)
    return tuning.choose("backward", call, tuning.backward_problem(call), H100)
