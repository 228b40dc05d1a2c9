"""LoRALayer and LinearWithLoRA: the modules. The mathematics is in functional.py."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter, UninitializedParameter
from torch.nn.modules import module as every_module

from .backends import BACKENDS, unsupported_reasons
from .functional import HALF, lora_delta, lora_linear

SCALINGS = {
    "alpha": lambda alpha, rank: alpha,
    "alpha/rank": lambda alpha, rank: alpha / rank,
    "alpha/sqrt(rank)": lambda alpha, rank: alpha / math.sqrt(rank),
}


class LoRALayer(nn.Module):
    """Low-rank part of an adapted linear layer: `scale * (x @ A @ B)`.

    `A` (in_dim, rank) starts kaiming-uniform with a = sqrt(5), `B` (rank, out_dim) at zero, so a
    new layer adds nothing.

    Args:
        in_dim: size of x's last dimension.
        out_dim: size of the result's last dimension.
        rank: inner dimension of the two factors, at least 1.
        alpha: numerator of the scale.
        scaling: the scale's rule: "alpha" (as it is), "alpha/rank", or "alpha/sqrt(rank)".
        dtype: of A and B; None takes torch's default.
        device: of A and B; None takes torch's default.

    Raises:
        TypeError: a rank that is not an integer, an alpha that is not a number.
        ValueError: rank below 1, an unknown scaling.

    Source:
        Hu et al., arXiv:2106.09685; "alpha/sqrt(rank)": Kalajdzievski, arXiv:2312.03732.

    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        rank: int,
        alpha: float,
        *,
        scaling: str = "alpha",
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        check_hyperparameters(rank, alpha, scaling)
        self.A = Parameter(torch.empty(in_dim, rank, dtype=dtype, device=device))
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))
        self.B = Parameter(torch.zeros(rank, out_dim, dtype=dtype, device=device))
        self.alpha = alpha
        self.scaling = scaling
        self.register_forward_pre_hook(_part_of_the_output)

    @property
    def rank(self) -> int:
        """Inner dimension of A and B."""
        return self.A.shape[1]

    @property
    def scale(self) -> float:
        """What x @ A @ B is multiplied by: alpha under this layer's scaling rule."""
        if self.scaling == "alpha":
            return self.alpha
        return SCALINGS[self.scaling](self.alpha, self.A.shape[1])

    def forward(self, x: Tensor) -> Tensor:
        """Return `scale * (x @ A @ B)`, (..., out_dim)."""
        return lora_delta(x, self.A, self.B, self.scale)

    def extra_repr(self) -> str:
        """Sizes and hyperparameters, for print(model)."""
        return (
            f"in_dim={self.A.shape[0]}, out_dim={self.B.shape[1]}, rank={self.rank}, "
            f"alpha={self.alpha}, scaling={self.scaling!r}"
        )


class LinearWithLoRA(nn.Module):
    """Linear layer with a low-rank update: `linear(x) + lora(x)`, computed as one operation.

    Shares `linear`, which is not copied, and answers `weight`, `bias`, `in_features` and
    `out_features` for it. Where the linear is not a plain `nn.Linear` with plain tensors (a
    subclass, a quantised layer, hooks, a parametrization), it is called and the low-rank part is
    added: slower, as exact.

    Args:
        linear: the layer to adapt: an nn.Linear, or a module with its attributes.
        rank: rank of the update, at least 1.
        alpha: scale of the update, or its numerator, see `scaling`.
        scaling: "alpha" (default), "alpha/rank", or "alpha/sqrt(rank)".
        dtype: of A and B; None takes torch's default where the kernels take it over the base's
            dtype (float32 over bfloat16 and float16), else the base's dtype.
        backend: name of the backend to use; None lets each call choose.

    Raises:
        TypeError: `linear` is no linear layer, rank is no integer, alpha is no number.
        ValueError: rank below 1, an unknown scaling or backend.

    """

    def __init__(
        self,
        linear: nn.Module,
        rank: int,
        alpha: float,
        *,
        scaling: str = "alpha",
        dtype: torch.dtype | None = None,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        check_linear(linear)
        if backend is not None and backend not in tuple(BACKENDS):
            known = ", ".join(BACKENDS)
            raise ValueError(f"backend must be None or one of {known}, got {backend!r}")
        weight = linear.weight if isinstance(linear.weight, Tensor) else torch.empty(0)
        # Created on the default device, as the reference does it, and then moved: a seed gives the
        # same A wherever the weight lies.
        self.linear = linear
        self.lora = LoRALayer(
            linear.in_features,
            linear.out_features,
            rank,
            alpha,
            scaling=scaling,
            dtype=_adapter_dtype(weight.dtype) if dtype is None else dtype,
            device="meta" if weight.is_meta else None,
        ).to(weight.device)
        self.backend = backend
        self._unmerged_weight: list[Parameter] = []  # a list, so that it is no parameter of ours

    def forward(self, x: Tensor) -> Tensor:
        """Return `linear(x) + scale * (x @ A @ B)`, (..., out_features)."""
        modules = self._modules  # attribute access on a module would cost 1 us for each name
        linear, lora = modules["linear"], modules["lora"]
        if self._unmerged_weight:
            return linear(x)
        why = why_composed(linear, lora, x)
        if why is None:
            base, low = linear._parameters, lora._parameters
            return lora_linear(
                x,
                base["weight"],
                base["bias"],
                low["A"],
                low["B"],
                lora.scale,
                backend=self.backend,
            )
        if self.backend is not None:
            raise ValueError(f"backend {self.backend!r} can't run this layer: {why}")
        y = linear(x)
        return y + lora(x).to(y.dtype)

    weight = property(lambda self: self.linear.weight, doc="The linear's weight, (out, in).")
    bias = property(lambda self: self.linear.bias, doc="The linear's bias, (out,), or None.")
    in_features = property(lambda self: self.linear.in_features, doc="Size of x's last dimension.")
    out_features = property(lambda self: self.linear.out_features, doc="Size of y's last one.")

    def __setattr__(self, name: str, value: Any) -> None:
        """Assign `weight` and `bias` on the linear, as weight tying does on any linear layer."""
        if name in ("weight", "bias"):
            setattr(self.linear, name, value)
        else:
            super().__setattr__(name, value)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """As nn.Module's; while merged it holds the unmerged weight, which A and B belong to."""
        state = super().state_dict(*args, **kwargs)
        for original in self._unmerged_weight:
            prefix = kwargs.get("prefix", args[1] if len(args) > 1 else "")
            keep = kwargs.get("keep_vars", args[2] if len(args) > 2 else False)
            state[f"{prefix}linear.weight"] = original if keep else original.detach()
        return state

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        if self._unmerged_weight:
            raise RuntimeError("the adapter is merged: call unmerge_(model) before loading a state")
        super()._load_from_state_dict(*args, **kwargs)


def explain(layer: LinearWithLoRA, x: Tensor | None = None) -> str:
    """Say which backend a layer runs on an input, and why each other one does not.

    Args:
        layer: a LinearWithLoRA.
        x: an input for it, (..., in_features); None takes one row of the weight's dtype.

    Returns:
        A line for what runs, then one for each other backend.

    Raises:
        TypeError: `layer` is no LinearWithLoRA.

    """
    if not isinstance(layer, LinearWithLoRA):
        raise TypeError(f"layer must be a LinearWithLoRA, got {type(layer).__name__}")
    weight = layer.weight
    if x is None:
        like = weight if isinstance(weight, Tensor) else layer.lora.A  # quantised: no tensor
        x = like.new_empty(1, layer.in_features)
    if layer._unmerged_weight:
        return "runs linear(x): the adapter is merged into its weight"
    if (why := why_composed(layer.linear, layer.lora, x)) is not None:
        return f"runs linear(x) + lora(x), composed: {why}"
    reasons = unsupported_reasons(x, weight, layer.lora.A)
    chosen = layer.backend or next(name for name, reason in reasons.items() if reason is None)
    lines = [f"{chosen}: {'asked for, but ' + r if (r := reasons.pop(chosen)) else 'runs'}"]
    for name, reason in reasons.items():
        lines.append(f"{name}: {reason or f'can run, comes after {chosen}'}")
    return "\n".join(lines)


def why_composed(linear: nn.Module, lora: LoRALayer, x: Tensor) -> str | None:
    """Say why the layer must call `linear` itself instead of reading its weight; None if not."""
    if type(linear) is not nn.Linear:
        return f"linear is a {type(linear).__name__}, not an nn.Linear"
    if type(lora) is not LoRALayer:
        return f"lora is a {type(lora).__name__}, not a LoRALayer"
    own, lora_own = linear.__dict__, lora.__dict__
    if "forward" in own or "forward" in lora_own:
        return "the forward of linear or lora was replaced"
    parameters, factors = own["_parameters"], lora_own["_parameters"]
    if not (
        type(parameters.get("weight"))
        is type(factors.get("A"))
        is type(factors.get("B"))
        is Parameter
        and type(parameters.get("bias")) in (Parameter, type(None))
    ):
        return "weight, bias, A or B is not a plain Parameter"
    if (
        own["_forward_hooks"]
        or own["_forward_pre_hooks"]
        or own["_backward_hooks"]
        or own["_backward_pre_hooks"]
        or lora_own["_forward_hooks"]
        or len(lora_own["_forward_pre_hooks"]) > 1  # one is ours, see _part_of_the_output
        or lora_own["_backward_hooks"]
        or lora_own["_backward_pre_hooks"]
        or every_module._global_forward_hooks
        or every_module._global_forward_pre_hooks
        or every_module._global_backward_hooks
        or every_module._global_backward_pre_hooks
    ):
        return "hooks are attached to linear or lora"
    if x.is_nested:
        return "x is a nested tensor"
    if torch._C._are_functorch_transforms_active():
        return "a transform of torch.func is active"
    return None


def check_linear(linear: Any) -> None:
    """Raise TypeError unless `linear` has what a linear layer has."""
    needed = ("weight", "in_features", "out_features")
    if not isinstance(linear, nn.Module) or not all(hasattr(linear, name) for name in needed):
        got = type(linear).__name__
        raise TypeError(f"linear must be an nn.Linear or a module with its attributes, got {got}")
    if isinstance(linear, LinearWithLoRA):
        raise TypeError("linear must be the layer to adapt, got a LinearWithLoRA")
    if isinstance(linear.weight, UninitializedParameter):
        got = type(linear).__name__
        raise ValueError(f"linear must have its weight: call the {got} on an input first")


def check_hyperparameters(rank: Any, alpha: Any, scaling: Any) -> None:
    """Raise TypeError or ValueError, naming the argument, unless the three fit a LoRALayer."""
    if not isinstance(rank, int) or isinstance(rank, bool):
        raise TypeError(f"rank must be an integer, got {type(rank).__name__}")
    if rank < 1:
        raise ValueError(f"rank must be at least 1, got {rank}")
    if not isinstance(alpha, (int, float)) or isinstance(alpha, bool):
        raise TypeError(f"alpha must be a number, got {type(alpha).__name__}")
    if not math.isfinite(alpha):
        raise ValueError(f"alpha must be finite, got {alpha}")
    if scaling not in SCALINGS:
        raise ValueError(
            f"scaling must be one of {', '.join(map(repr, SCALINGS))}, got {scaling!r}"
        )


def lora_layers(model: nn.Module) -> Iterable[tuple[str, LinearWithLoRA]]:
    """Yield (name, layer) for each LinearWithLoRA in the model, once each."""
    return ((n, m) for n, m in model.named_modules() if isinstance(m, LinearWithLoRA))


def _adapter_dtype(base: torch.dtype) -> torch.dtype:
    default = torch.get_default_dtype()
    fits = default == base or (base in HALF and default == torch.float32)
    return default if fits or not base.is_floating_point else base


def _part_of_the_output(lora: nn.Module, args: Any) -> None:
    """Do nothing: a hook's presence keeps `nn.TransformerEncoderLayer` off its eval fast path.

    That path reads `linear1.weight` and calls no module, which would lose the low-rank part; it
    stands aside for any submodule with a forward hook. LinearWithLoRA does not call `lora` on its
    fast way, so the hook costs nothing.
    """
