"""Weights of codes: what they stand for, by plain PyTorch.

"nf4" and "fp4" are bitsandbytes' own layout: two codes a byte, the first in its upper half, over
the (N, K) weight from end to end. A code stands for one of 16 values times the scale of its block;
a block is a power of two of elements, and runs on from one row to the next. "int8" is (N, K) int8,
with a scale a row.

What a code stands for is rounded to x's dtype before it meets x, as bitsandbytes does.
"""

import functools

import torch
from torch import Tensor

from .call import Weight

VALUES = {
    # Quantiles of a normal distribution: Dettmers et al., "QLoRA", arXiv:2305.14314, appendix E.
    "nf4": (
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ),
    # A sign, two bits of exponent and one of mantissa, as bitsandbytes numbers them.
    "fp4": tuple(
        sign * value
        for sign in (1, -1)
        for value in (0.0, 1 / 192, 2 / 3, 1.0, 1 / 3, 0.5, 1 / 6, 0.25)
    ),
}
FORMATS = (*VALUES, "int8")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # of x


@functools.cache
def table(format: str, device: torch.device) -> Tensor:
    """Return the 16 values of a format of 4 bits, float32."""
    return torch.tensor(VALUES[format], dtype=torch.float32, device=device)


def block_size(blocks: int, elements: int) -> int:
    """Return the power of two that cuts so many elements into so many blocks; the least, from 32.

    Raises:
        ValueError: none does.

    """
    size = 32
    while -(-elements // size) > blocks:
        size *= 2
    if -(-elements // size) != blocks:
        raise ValueError(
            "scale must have one value a block of a power of two of the elements, from 32 on, got "
            f"{blocks} for {elements} elements"
        )
    return size


def dequantised(weight: Weight, N: int, K: int, dtype: torch.dtype) -> Tensor:
    """Return the weight that codes stand for, (N, K) of a dtype."""
    data, format, scale = weight
    assert scale is not None
    if format == "int8":
        return (data.to(torch.float32) * scale[:, None]).to(dtype)
    code = torch.stack((data >> 4, data & 15), -1).flatten()[: N * K]
    values = table(format, data.device)[code.int()]
    scales = scale.repeat_interleave(block_size(len(scale), N * K))[: N * K]
    return (values * scales).to(dtype).view(N, K)


def quantised(weight: Tensor, format: str, size: int = 64) -> Weight:
    """Return a weight (N, K) as codes, the bytes that bitsandbytes makes of it on a CPU.

    Args:
        weight: (N, K), float32, bfloat16 or float16.
        format: one of FORMATS.
        size: elements in a block of 4 bits, a power of two from 32 on.

    """
    weight = weight.detach()
    if format == "int8":
        code, most = quantised_rows(weight)
        return Weight(code, format, most * (1 / 127))
    flat = weight.reshape(-1)
    scale = torch.empty(-(-len(flat) // size), dtype=torch.float32, device=weight.device)
    code = torch.empty(len(flat) + len(flat) % 2, dtype=torch.uint8, device=weight.device)
    piece = max(_PIECE // size, 1) * size
    for start in range(0, len(flat), piece):
        some = flat[start : start + piece].float()
        whole = len(some) // size * size
        first, at = start // size, start
        for part, step in ((some[:whole].view(-1, size), whole), (some[whole:][None], None)):
            if part.numel():
                most = part.abs().amax(1)
                least = most.clamp(min=1e-38)[:, None]
                # The last block, where it is not whole, is divided, and the others multiplied.
                unit = part * (1.0 / least) if step else part / least
                end = at + part.numel()
                code[at:end] = _nearest(unit.clamp(-1, 1).flatten(), format)
                scale[first : first + len(most)] = most if step else least[:, 0]
                first, at = first + len(most), end
    if len(flat) % 2:
        code[-1] = _nearest(torch.zeros(1, device=weight.device), format)[0]
    return Weight((code[::2] << 4 | code[1::2])[:, None], format, scale)


def quantised_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return a weight as int8, (N, K), and each row's largest magnitude, which 127 stands for.

    Of the weight in float16, as bitsandbytes does it.
    """
    rows = weight.detach().to(torch.float16)
    most = rows.abs().amax(1).float()
    return torch.round(rows * (127.0 / most[:, None])).nan_to_num(0).to(torch.int8), most


_PIECE = 1 << 22  # elements worked on at a time


def _nearest(unit: Tensor, format: str) -> Tensor:
    values = table(format, unit.device)
    order = torch.argsort(values)
    ends = (values[order[:-1]] + values[order[1:]]) / 2
    return order[torch.bucketize(unit, ends, out_int32=True)].to(torch.uint8)
