"""Quantised linears for the parity checks, each with the plain linear that it stands for."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def _bitsandbytes(bits: int, **options: Any) -> Callable[[nn.Linear], tuple[nn.Module, Tensor]]:
    def make(linear: nn.Linear) -> tuple[nn.Module, Tensor]:
        import bitsandbytes as bnb

        sizes = (linear.in_features, linear.out_features, linear.bias is not None)
        made: Any
        if bits == 8:
            made = bnb.nn.Linear8bitLt(*sizes, has_fp16_weights=False)
        else:
            made = bnb.nn.Linear4bit(*sizes, compute_dtype=linear.weight.dtype, **options)
        made.load_state_dict({n: p.detach().clone() for n, p in linear.named_parameters()})
        made = made.to("cpu").requires_grad_(False)
        weight = made.weight
        if bits == 8:
            return made, weight.CB.float() * (weight.SCB / 127)[:, None]
        return made, bnb.functional.dequantize_4bit(weight.data, weight.quant_state).float()

    return make


def _torchao(config: str) -> Callable[[nn.Linear], tuple[nn.Module, Tensor]]:
    def make(linear: nn.Linear) -> tuple[nn.Module, Tensor]:
        from torchao import quantization

        quantization.quantize_(linear, getattr(quantization, config)())
        return linear, linear.weight.dequantize().float()

    return make


def _torchao_int4(linear: nn.Linear) -> tuple[nn.Module, Tensor]:
    from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig
    from torchao.quantization import quantize_

    quantize_(linear, PrototypeInt4WeightOnlyConfig(group_size=32, set_inductor_config=False))
    with torch.no_grad():  # y of each unit vector is a column of the weight
        unit = torch.eye(linear.in_features, dtype=linear.weight.dtype)
        columns = torch.nn.functional.linear(unit, linear.weight)
    return linear, columns.T.float().contiguous()


def _torchao_int4_unpacked(linear: nn.Linear) -> tuple[nn.Module, Tensor]:
    from torchao.quantization import IntxWeightOnlyConfig, quantize_
    from torchao.quantization.granularity import PerGroup

    quantize_(linear, IntxWeightOnlyConfig(torch.int4, PerGroup(32)))  # type: ignore[attr-defined]
    return linear, linear.weight.dequantize().float()


def _fp8(linear: nn.Linear) -> tuple[nn.Module, Tensor]:
    from transformers.integrations.finegrained_fp8 import FP8Linear

    from ..fp8 import dequantised

    N, K = linear.weight.shape
    made: Any = FP8Linear(K, N, block_size=(16, 32), has_bias=True)
    made.weight_scale_inv.data = torch.rand(-(-N // 16), -(-K // 32)) + 0.5
    made.weight.data = (linear.weight.detach() * 8).to(torch.float8_e4m3fn)
    made.bias.data = linear.bias.detach().clone()
    made.requires_grad_(False)
    return made, dequantised(made.weight, made.weight_scale_inv, (16, 32), torch.float32)


# Each makes of a linear (out, in) the quantised one, and the weight that it stands for, float32.
BASES: dict[str, Callable[[nn.Linear], tuple[nn.Module, Tensor]]] = {
    "bitsandbytes nf4": _bitsandbytes(4, quant_type="nf4", compress_statistics=False),
    "bitsandbytes nf4, nested": _bitsandbytes(4, quant_type="nf4", compress_statistics=True),
    "bitsandbytes fp4": _bitsandbytes(4, quant_type="fp4", compress_statistics=False),
    "bitsandbytes int8": _bitsandbytes(8),
    "torchao int8": _torchao("Int8WeightOnlyConfig"),
    "torchao float8": _torchao("Float8WeightOnlyConfig"),
    "torchao int4": _torchao_int4,
    "torchao int4, unpacked": _torchao_int4_unpacked,
    "transformers FineGrainedFP8": _fp8,
}
# Sizes in and out: no multiple of a block nor of a vector, but where a package takes no others.
SIZES = {name: (96, 80) if "int4" in name else (91, 70) for name in BASES}
NEEDS = {name: name.split()[0] for name in BASES}  # the package
