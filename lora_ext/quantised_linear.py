"""QuantisedLinear: a linear whose weight is codes, with bitsandbytes' state_dict."""

import json
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from .call import Weight
from .codes import dequantised, quantised, quantised_rows, table
from .functional import adapted


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
        scale: float32, a block's largest magnitude, (blocks,), or of int8 a row's, (N,).

    Source:
        Dettmers et al., "QLoRA", arXiv:2305.14314; "LLM.int8()", arXiv:2208.07339.

    """

    def __init__(self, linear: nn.Linear, format: str, block_size: int = 64) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.format, self.block_size = format, block_size
        self.dtype = linear.weight.dtype  # that the weight had
        if format == "int8":
            data, self.scale = quantised_rows(linear.weight)  # no buffer: .bfloat16() rounds those
        else:
            data, _, scale = quantised(linear.weight, format, block_size)
            self.scale = cast(Tensor, scale)
        self.weight = Parameter(data, requires_grad=False)
        self.register_parameter("bias", linear.bias)

    def codes(self) -> Weight:
        """Return the weight for the kernels."""
        own: dict[str, Any] = self.__dict__  # by attribute the weight alone would cost 1 us
        scale, data = own["scale"], own["_parameters"]["weight"].detach()
        if own["format"] != "int8":
            return Weight(data, own["format"], scale)
        # Where writes are not counted: another process' neither.
        if torch.compiler.is_compiling() or scale.is_inference() or _is_shared(scale):
            return Weight(data, "int8", scale * (1 / 127))
        of, version, unit = own.get("_unit", (None, 0, None))
        if of is not scale or version != scale._version:
            unit = scale * (1 / 127)
            self._unit = (scale, scale._version, unit)
        return Weight(data, "int8", unit)

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
        if _is_shared(self.weight):  # by share_memory()
            self.scale.share_memory_()
        return result

    def __getstate__(self) -> dict[str, Any]:
        """What a copy or a pickle takes along: the scales count their writes from 0 there."""
        return {key: value for key, value in self.__dict__.items() if key != "_unit"}

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.format == "int8":
            destination[f"{prefix}SCB"] = self.scale
            destination[f"{prefix}weight_format"] = torch.tensor(0, dtype=torch.uint8, device="cpu")
            return
        state: dict[str, Any] = {
            "quant_type": self.format,
            "blocksize": self.block_size,
            "dtype": str(self.dtype).removeprefix("torch."),
            "shape": [self.out_features, self.in_features],
        }
        told = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8, device="cpu")
        destination[f"{prefix}weight.absmax"] = self.scale
        destination[f"{prefix}weight.quant_map"] = table(self.format, self.scale.device)
        destination[f"{prefix}weight.quant_state.bitsandbytes__{self.format}"] = told

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        own = {k[len(prefix) :]: v for k, v in state_dict.items() if k.startswith(prefix)}
        wanted = "SCB" if self.format == "int8" else "weight.absmax"
        told = f"weight.quant_state.bitsandbytes__{self.format}"
        needed = ["weight", wanted] if self.format == "int8" else ["weight", wanted, told]
        missing = [name for name in needed if name not in own]
        if missing:  # a plain linear's, say: its weight may not be cast to codes
            missing_keys += [prefix + name for name in missing]
            return
        try:
            self._load_scale(own, told, local_metadata.get("assign_to_params_buffers", False))
        except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
            error_msgs.append(f"{prefix}weight is not one of this layer: {error}")
            return
        others: list[str] = []
        args = (local_metadata, strict, missing_keys, others, error_msgs)
        super()._load_from_state_dict(state_dict, prefix, *args)
        mine = ("SCB", "weight_format") if self.format == "int8" else ("weight.",)
        unexpected_keys += [k for k in others if not k[len(prefix) :].startswith(mine)]

    def _load_scale(self, own: dict[str, Tensor], told: str, assign: bool) -> None:
        """Take the scales of a state_dict, nested ones as what they stand for; check what it says.

        Into the memory of those that are there where other processes share it, unless `assign`.

        Raises:
            ValueError: they are of another shape, and nothing is changed.

        """
        weight, mine = own["weight"], self.weight
        if weight.dtype != mine.dtype or weight.shape != mine.shape:
            expected, got = (f"{tuple(t.shape)} {t.dtype}" for t in (mine, weight))
            raise ValueError(f"weight must be {expected}, got {got}")
        if self.format == "int8":
            scale = own["SCB"].float()
            if scale.shape != (self.out_features,):
                raise ValueError(f"SCB must have shape ({self.out_features},), got {scale.shape}")
            self._set_scale(scale, assign)
            return
        state = json.loads(bytes(own[told].tolist()).decode())
        if tuple(state["shape"]) != (self.out_features, self.in_features):
            shape = (self.out_features, self.in_features)
            raise ValueError(f"shape must be {shape}, got {tuple(state['shape'])}")
        scale = own["weight.absmax"]
        if "weight.nested_absmax" in own:
            second = own["weight.nested_absmax"].repeat_interleave(state["nested_blocksize"])
            scale = own["weight.nested_quant_map"][scale.int()] * second[: len(scale)]
            scale = scale + state["nested_offset"]
        elements = self.out_features * self.in_features
        if scale.shape != (-(-elements // state["blocksize"]),):
            raise ValueError(f"absmax has {len(scale)} values in blocks of {state['blocksize']}")
        self._set_scale(scale.float(), assign)
        self.block_size, self.dtype = state["blocksize"], getattr(torch, state["dtype"])

    def _set_scale(self, scale: Tensor, assign: bool) -> None:
        if not assign and _is_shared(self.scale) and self.scale.shape == scale.shape:
            self.scale.copy_(scale)
        else:
            self.scale = scale.to(self.weight.device)


def _is_shared(tensor: Tensor) -> bool:
    return tensor.is_cpu and tensor.untyped_storage().is_shared()
