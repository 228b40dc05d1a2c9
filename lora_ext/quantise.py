"""quantise_(): linears whose weight is codes, in bitsandbytes' layout and without bitsandbytes."""

import json
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from .call import Weight
from .checks import lines_by_reason
from .codes import DTYPES, FORMATS, VALUES, dequantised, quantised, table
from .functional import adapted

MIB = 2**20


class QuantisedLinear(nn.Linear):
    """Linear layer over a frozen weight of codes: `y = x @ dequantised.T + bias`.

    Its state_dict has the keys, the bytes and the shapes of bitsandbytes' `Linear4bit` (`weight`,
    `weight.absmax`, `weight.quant_map`, `weight.quant_state.bitsandbytes__nf4`) or `Linear8bitLt`
    (`weight`, `SCB`, `weight_format`): checkpoints of either load into the other. The weight is
    never differentiated; what its codes stand for is rounded to x's dtype.

    Args:
        linear: an nn.Linear with a float32, bfloat16 or float16 weight; its bias is shared.
        format: "nf4", "fp4" or "int8".
        block_size: elements that share a scale, of 4 bits; a power of two from 32 to 4096.

    Attributes:
        weight: ((N * K + 1) // 2, 1) uint8, two codes a byte, or (N, K) int8.
        scale: float32, (blocks,) or, of int8, (N,).

    Source:
        Dettmers et al., "QLoRA", arXiv:2305.14314; "LLM.int8()", arXiv:2208.07339.

    """

    def __init__(self, linear: nn.Linear, format: str, block_size: int = 64) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.format, self.block_size = format, block_size
        self.dtype = linear.weight.dtype  # that the weight had
        codes = quantised(linear.weight, format, block_size)
        assert codes.scale is not None
        self.weight = Parameter(codes.data, requires_grad=False)
        self.scale = codes.scale  # no buffer: .bfloat16() would round it
        self.bias = linear.bias

    def codes(self) -> Weight:
        """Return the weight for the kernels."""
        return Weight(self.weight.detach(), self.format, self.scale)

    def dequantised(self) -> Tensor:
        """Return the weight that the codes stand for, (N, K), in the dtype it had."""
        return dequantised(self.codes(), self.out_features, self.in_features, self.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Return `x @ dequantised.T + bias`, (..., out_features)."""
        # As a layer with a low-rank part of zeros: one product and one gradient for both.
        A, B = x.new_zeros(self.in_features, 1), x.new_zeros(1, self.out_features)
        return adapted(x, self.codes(), self.bias, A, B, 0.0)

    def extra_repr(self) -> str:
        """Sizes and format, for print(model)."""
        block = "" if self.format == "int8" else f", block_size={self.block_size}"
        return f"{super().extra_repr()}, format={self.format!r}{block}"

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        result = super()._apply(*args, **kwargs)
        self.scale = self.scale.to(self.weight.device)
        return result

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.format == "int8":
            destination[f"{prefix}SCB"] = self.scale * 127.0
            destination[f"{prefix}weight_format"] = torch.tensor(0, dtype=torch.uint8)
            return
        state = {
            "quant_type": self.format,
            "blocksize": self.block_size,
            "dtype": str(self.dtype).removeprefix("torch."),
            "shape": [self.out_features, self.in_features],
        }
        told = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
        destination[f"{prefix}weight.absmax"] = self.scale
        destination[f"{prefix}weight.quant_map"] = table(self.format, self.scale.device)
        destination[f"{prefix}weight.quant_state.bitsandbytes__{self.format}"] = told
