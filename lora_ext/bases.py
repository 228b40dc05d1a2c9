"""The one judge of modules: whether a layer's weight may be read, or it must be called.

Asked by LinearWithLoRA, PEFT's layers, merge_, prepack_ and the parallel styles alike.
"""

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.nn.modules import module as every_module

from .call import Weight
from .conv1d import is_conv1d
from .integrations import bitsandbytes, torchao
from .quantised_linear import QuantisedLinear


def base_of(module: nn.Module, *, kind: type = Parameter, x: Tensor | None = None) -> Weight | str:
    """Return a linear's weight for the kernels, or why the module must be called instead.

    What may be attached to a module (hooks, a parametrization, a forward of its own, a subclass's)
    is never read past.

    Args:
        module: any module.
        kind: the class its weight and bias must have: DTensor once a parallel style has split it.
        x: the input, from readers that take a weight of codes too (codes.py): what is quantised
            may be read for one x and must be called for another.

    Returns:
        The weight as (out, in), whichever way it is stored; or the reason.

    """
    if x is not None and (codes := _codes_of(module, x, kind)) is not None:
        return hooks_of(module.__dict__, 0) or codes
    weight = parameter_of(module, kind=kind)
    if type(weight) is str:
        return weight
    data: Any = weight
    return Weight(data if type(module) is nn.Linear else data.T)  # a Conv1D's is (in, out)


def parameter_of(module: nn.Module, *, kind: type = Parameter) -> Tensor | str:
    """Return the weight of a plain linear as it is stored, or why the module must be called.

    Args:
        module: any module.
        kind: see `base_of`.

    """
    if type(module) is not nn.Linear and not (kind is Parameter and is_conv1d(module)):
        return f"is a {type(module).__name__}, not an nn.Linear"
    own = module.__dict__
    parameters: dict[str, Any] = own["_parameters"]
    weight, bias = parameters.get("weight"), parameters.get("bias")
    if type(weight) is not kind:
        return f"has a weight that is a {type(weight).__name__}, not a {kind.__name__}"
    if bias is not None and type(bias) is not kind:
        return f"has a bias that is a {type(bias).__name__}, not a {kind.__name__}"
    why, data = hooks_of(own, 0), cast(Tensor, weight)
    return data if why is None else why


def _codes_of(module: nn.Module, x: Tensor, kind: type) -> Weight | str | None:
    if type(module) is nn.Linear:
        weight = module._parameters.get("weight")
        return None if type(weight) is kind else torchao.codes_of(module, x)
    if type(module) is QuantisedLinear:
        return module.codes()
    return bitsandbytes.codes_of(module, x)


def why_not_low(lora: nn.Module, layer: type, *, kind: type = Parameter) -> str | None:
    """Say why the A and B of a low-rank part may not be read; None if they may.

    Args:
        lora: the low-rank part.
        layer: the class it must be, LoRALayer; not a subclass, which may compute otherwise.
        kind: see `base_of`.

    """
    if type(lora) is not layer:
        return f"lora is a {type(lora).__name__}, not a {layer.__name__}"
    own = lora.__dict__
    factors = own["_parameters"]
    if type(factors.get("A")) is not kind or type(factors.get("B")) is not kind:
        return f"lora has an A or B that is not a {kind.__name__}"
    if (why := hooks_of(own, 1)) is not None:  # its one pre-hook is layers._part_of_the_output
        return f"lora {why}"
    return None


def hooks_of(own: dict[str, Any], expected_pre_hooks: int) -> str | None:
    """Say what is attached to a module that reading it would skip; None for nothing.

    Args:
        own: the module's `__dict__`.
        expected_pre_hooks: how many forward pre-hooks are there by construction.

    """
    if (
        own["_forward_hooks"]
        or len(own["_forward_pre_hooks"]) > expected_pre_hooks
        or own["_backward_hooks"]
        or own["_backward_pre_hooks"]
    ):
        return "has hooks"
    return "has a forward of its own" if "forward" in own else None


def why_not_now(x: Tensor) -> str | None:
    """Say why no module may be read during this call; None if they may."""
    if (
        every_module._global_forward_hooks
        or every_module._global_forward_pre_hooks
        or every_module._global_backward_hooks
        or every_module._global_backward_pre_hooks
    ):
        return "global module hooks are set"
    try:
        nested = x.is_nested
    except AttributeError:
        raise TypeError(f"x must be a torch.Tensor, got {type(x).__name__}") from None
    if nested is not False:  # torch.fx passes a Proxy, whose attributes are Proxies
        return "x is a nested tensor" if nested is True else "torch.fx records what x goes through"
    if torch._C._are_functorch_transforms_active():
        return "a transform of torch.func is active"
    return None
