"""LoRALayer and LinearWithLoRA: the modules. The mathematics is in functional.py."""

import math
import warnings
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from .backends import NAMES
from .bases import base_of, parameter_of, why_not_low, why_not_now
from .call import Weight
from .called import add_low_rank, call_base, lora_delta
from .checks import (
    HALF,
    SCALINGS,
    adapter_dtype,
    check_backend,
    check_dropout,
    check_hyperparameters,
    check_linear,
)
from .conv1d import sizes_of
from .functional import adapted
from .panels import Panels


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
        dropout: probability with which an element of x is taken as zero in training, see
            `lora_linear`.
        dropout_mask: "hash" or "torch", see `lora_linear`.

    Raises:
        TypeError: a rank that is not an integer, an alpha or dropout that is not a number.
        ValueError: rank below 1, an unknown scaling or dropout_mask, a dropout below 0 or above 1.

    Source:
        Hu et al., arXiv:2106.09685; "alpha/sqrt(rank)": Kalajdzievski, arXiv:2312.03732.

    """

    dropout: float = 0.0
    dropout_mask: str = "hash"

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
        dropout: float = 0.0,
        dropout_mask: str = "hash",
    ) -> None:
        super().__init__()
        check_hyperparameters(rank, alpha, scaling)
        check_dropout(dropout, dropout_mask)
        self.A = Parameter(torch.empty(in_dim, rank, dtype=dtype, device=device))
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))
        self.B = Parameter(torch.zeros(rank, out_dim, dtype=dtype, device=device))
        self.alpha = alpha
        self.scaling = scaling
        self.dropout = dropout
        self.dropout_mask = dropout_mask
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
        dropout = self.dropout if self.training else 0.0
        mask = self.dropout_mask
        return lora_delta(x, self.A, self.B, self.scale, dropout=dropout, mask=mask)

    def extra_repr(self) -> str:
        """Sizes and hyperparameters, for print(model)."""
        return (
            f"in_dim={self.A.shape[0]}, out_dim={self.B.shape[1]}, rank={self.rank}, "
            f"alpha={self.alpha}, scaling={self.scaling!r}"
            + (f", dropout={self.dropout}" if self.dropout else "")
        )


class LinearWithLoRA(nn.Module):
    """Linear layer with a low-rank update: `linear(x) + lora(x)`, computed as one operation.

    Shares `linear`, which is not copied, and answers `weight`, `bias`, `in_features` and
    `out_features` for it. Where the linear is not a plain `nn.Linear` with plain tensors (a
    subclass, a quantised layer, hooks, a parametrization), it is called and the low-rank part is
    added: slower, as exact. transformers' Conv1D, whose weight is (in, out), is read as it is.

    Args:
        linear: the layer to adapt: an nn.Linear, a Conv1D, or a module with its attributes.
        rank: rank of the update, at least 1.
        alpha: scale of the update, or its numerator, see `scaling`.
        scaling: "alpha" (default), "alpha/rank", or "alpha/sqrt(rank)".
        dtype: of A and B; None takes torch's default where the kernels take it over the base's
            dtype (float32 over bfloat16 and float16), else the base's dtype.
        backend: name of the backend to use; None lets each call choose.
        dropout: of the low-rank part's input, in training only, see `lora_linear`.
        dropout_mask: "hash" or "torch", see `lora_linear`.

    Raises:
        TypeError: `linear` is no linear layer, rank is no integer, alpha or dropout is no number.
        ValueError: rank below 1, an unknown scaling, backend or dropout_mask, a dropout out of
            range.

    """

    linear: nn.Linear  # or any module with its attributes
    lora: LoRALayer
    # Of the class, so that no state has them.
    _panels: Panels | None = None  # by prepack_
    _parallel: Any = None  # by distributed.py: how it is split over ranks, and run then

    def __init__(
        self,
        linear: nn.Module,
        rank: int,
        alpha: float,
        *,
        scaling: str = "alpha",
        dtype: torch.dtype | None = None,
        backend: str | None = None,
        dropout: float = 0.0,
        dropout_mask: str = "hash",
    ) -> None:
        super().__init__()
        check_linear(linear)
        if isinstance(linear, LinearWithLoRA):
            raise TypeError("linear must be the layer to adapt, got a LinearWithLoRA")
        check_backend(backend, NAMES)
        self.linear = cast(nn.Linear, linear)
        weight = linear.weight if isinstance(linear.weight, Tensor) else torch.empty(0)
        # Created on the default device, as the reference does it, and then moved: a seed gives the
        # same A wherever the weight is. From meta nothing moves.
        meta = weight.is_meta or torch.get_default_device().type == "meta"
        self.lora = LoRALayer(
            *sizes_of(linear),
            rank,
            alpha,
            scaling=scaling,
            dtype=adapter_dtype(weight.dtype) if dtype is None else dtype,
            device=weight.device if meta else None,
            dropout=dropout,
            dropout_mask=dropout_mask,
        ).to(weight.device)
        self.backend = backend
        self._unmerged_weight: list[Parameter] = []  # a list, so that it is no parameter of ours

    def forward(self, x: Tensor) -> Tensor:
        """Return `linear(x) + scale * (x @ A @ B)`, (..., out_features)."""
        modules: dict[str, Any] = self._modules  # by attribute each would cost 1 us
        linear, lora = modules["linear"], modules["lora"]
        if self._unmerged_weight:
            return linear(x)
        if self._parallel is not None:
            return self._parallel(self, x)
        weight = self._weight_for(x)
        if type(weight) is str:
            if self.backend is not None:
                raise ValueError(f"backend {self.backend!r} can't run this layer: {weight}")
            return self._composed(x)
        bias, low = linear._parameters["bias"], lora._parameters
        dropout = lora.dropout if lora.training else 0.0
        panels = None if self._panels is None else self._fresh_panels()
        options = (lora.scale, self.backend, dropout, lora.dropout_mask, panels)
        return adapted(x, weight, bias, low["A"], low["B"], *options)  # type: ignore[arg-type]

    def _weight_for(self, x: Tensor) -> Tensor | Weight | str:
        """Return the linear's weight (out, in), a Weight if of codes, or why it is called for x."""
        modules: dict[str, Any] = self._modules
        linear, over_codes = modules["linear"], None
        weight: Any = parameter_of(linear) if type(linear) is nn.Linear else ""
        if type(weight) is str:
            weight = base_of(linear, x=x)
            if type(weight) is Weight and weight.scale is None:
                weight = weight.data
            elif type(weight) is Weight:
                over_codes = self._why_not_over_codes(x)
        if type(weight) is str:
            return f"linear {weight}"
        return why_not_low(modules["lora"], LoRALayer) or why_not_now(x) or over_codes or weight

    def _why_not_over_codes(self, x: Tensor) -> str | None:
        A = self.lora._parameters.get("A")
        if A is None or x.dtype is A.dtype or torch.is_autocast_enabled("cpu"):
            return None
        if A.dtype is torch.float32 and x.dtype in HALF:
            return None
        return f"lora has an A of {A.dtype} for an x of {x.dtype} over a weight of codes"

    def _composed(self, x: Tensor) -> Tensor:
        """Call the linear, and add what the low-rank part gives."""
        y, fresh = call_base(self.linear, x)
        lora = self.lora
        if why_not_low(lora, LoRALayer) is not None or why_not_now(x) is not None:
            return y + lora(x).to(y.dtype)
        dropout = lora.dropout if lora.training else 0.0
        drawn: Any = {"dropout": dropout, "mask": lora.dropout_mask}
        return add_low_rank(y, x, lora.A, lora.B, lora.scale, fresh=fresh, **drawn)

    weight = property(lambda self: self.linear.weight, doc="The linear's weight, as it holds it.")
    bias = property(lambda self: self.linear.bias, doc="The linear's bias, (out,), or None.")
    in_features = property(lambda self: sizes_of(self.linear)[0], doc="Size of x's last dimension.")
    out_features = property(lambda self: sizes_of(self.linear)[1], doc="Size of y's last one.")

    def __setattr__(self, name: str, value: Any) -> None:
        """Assign `weight` and `bias` on the linear, as weight tying does on any linear layer."""
        if name in ("weight", "bias"):
            setattr(self.linear, name, value)
        else:
            super().__setattr__(name, value)

    def _fresh_panels(self) -> Panels | None:
        """Return what prepack_ laid out; if the weight has changed since, drop it and say so."""
        panels = self._panels
        if panels is None or torch.compiler.is_compiling():
            return None
        if (why := panels.why_stale(self.weight)) is None:
            return panels
        self._panels = None
        warnings.warn(f"a prepacked weight is dropped: {why}; prepack_ again", stacklevel=2)
        return None

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        result = super()._apply(*args, **kwargs)  # .to(), .double(), ...
        if self._panels is not None:
            self._fresh_panels()
        return result

    def __getstate__(self) -> dict[str, Any]:
        """What a copy or a pickle takes along: all but the layout of `prepack_`."""
        return {key: value for key, value in self.__dict__.items() if key != "_panels"}

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
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


def why_composed(linear: nn.Module, lora: LoRALayer, *, kind: type = Parameter) -> str | None:
    """Say why the layer must call `linear` itself instead of reading its weight; None if not.

    Args:
        linear: the base.
        lora: the low-rank part.
        kind: the class that all parameters must have, see `bases.base_of`.

    """
    if type(base := base_of(linear, kind=kind)) is str:
        return f"linear {base}"
    return why_not_low(lora, LoRALayer, kind=kind)


def _part_of_the_output(lora: nn.Module, args: Any) -> None:
    """Do nothing: a hook's presence keeps `nn.TransformerEncoderLayer` off its eval fast path.

    That path reads `linear1.weight` and calls no module, which would lose the low-rank part; it
    stands aside for any submodule with a forward hook. LinearWithLoRA does not call `lora` on its
    fast way, so the hook costs nothing.
    """
