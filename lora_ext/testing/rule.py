"""The error rule, and the oracle and plain layer that it compares with.

    err(ours) <= 2 * err(plain) + floor,    for y, dx, dweight, dbias, dA and dB

err is taken against the same formula in float64, under two norms: the largest element (one wrong
element shows) and the root mean square (a small error in all of them shows). `plain` is the plain
layer, run in the dtype of x.

    floor = luck * (u * |exact| + u_acc * |sum of the magnitudes|)
    luck  = 1 + 1 / sqrt(min(M * R, elements of the result))

The floor is what no implementation is blamed for: storing the exact value costs u = eps / 2 of x's
dtype, relative to it, and summing up costs u_acc = eps / 2 of the accumulator (float32 for halves)
of what is summed; the magnitudes are the same formula over absolute values. The plain layer can be
lucky too, when the few numbers that all hangs on, the result's own or the M * R of h and t, happen
to round well: with one number that is worth one rounding more, over many it averages out. In
float32 it is about 1e-6 of the result, in bfloat16 0.4 %.

In float64 the oracle is the plain layer itself, whose error is unseen: it is taken to be that of
the plain layer in float32, scaled by 2 ** -29, and the floor counts four times.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..call import Weight
from ..dropout import unpack_bits
from .cases import NAMES, Case, make_inputs
from .plain import LinearWithLoRA

# Called like `lora_linear`: (x, weight, bias, A, B, alpha), and by name `keep` and `codes`, the
# weight's, where there are.
Linear = Callable[..., Tensor]
Inputs = dict[str, Any]
Norm = Callable[[Tensor], float]

NORMS: dict[str, Norm] = {
    "max": lambda t: t.abs().max().item() if t.numel() else 0.0,
    "rms": lambda t: t.square().mean().sqrt().item() if t.numel() else 0.0,
}


class Error(NamedTuple):
    """How far one result is off under one norm, and how far it may be."""

    result: str  # "y", "dx", ...
    norm: str  # of NORMS
    ours: float
    plain: float
    floor: float

    @property
    def limit(self) -> float:
        """The largest error allowed."""
        return 2 * self.plain + self.floor

    @property
    def share(self) -> float:
        """The error as a share of the limit."""
        return self.ours / self.limit if self.limit else math.inf if self.ours else 0.0

    @property
    def broken(self) -> bool:
        """Whether the rule is; a NaN of ours breaks it, unless the plain layer has one too."""
        return not (self.ours <= self.limit or math.isnan(self.plain))

    def __str__(self) -> str:
        """As in `dA: max error 0.1 > 2 * 0.01 + 0.001`."""
        than = ">" if self.broken else "<="
        error = f"{self.result}: {self.norm} error {self.ours:.3g}"
        return f"{error} {than} 2 * {self.plain:.3g} + {self.floor:.3g}"


def compare(
    result: str, ours: Tensor, plain: Tensor, exact: Tensor, floor: Callable[[Norm], float]
) -> list[Error]:
    """Return the error of one result under each norm; `floor` gives what a norm allows beyond."""
    error, plain_error = (t.to(exact.device, exact.dtype) - exact for t in (ours, plain))
    return [
        Error(result, name, norm(error), norm(plain_error), floor(norm))
        for name, norm in NORMS.items()
    ]


def plain_linear(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    alpha: float,
    *,
    keep: Tensor | None = None,
    codes: Weight | None = None,
) -> Tensor:
    """Run the plain layer on these tensors; A and B in x's dtype.

    With `keep` its low-rank part gets keep * x, without a weight it is the low-rank part alone.
    `weight` is what `codes` stand for.
    """
    K, R = A.shape
    with torch.device("meta"):
        layer = LinearWithLoRA(nn.Linear(K, B.shape[1], bias=bias is not None), R, alpha)
    if keep is not None:
        kept = unpack_bits(keep, K).reshape(x.shape)
        layer.lora.register_forward_pre_hook(lambda _, inputs: inputs[0] * kept)
    A, B = A.to(x.dtype), B.to(x.dtype)
    if weight is None:
        return functional_call(layer.lora, {"A": A, "B": B}, (x,))
    state = {"linear.weight": weight, "lora.A": A, "lora.B": B}
    if bias is not None:
        state["linear.bias"] = bias
    return functional_call(layer, state, (x,))


def gradients(
    linear: Linear, inputs: Inputs, alpha: float, of: Sequence[str] = NAMES
) -> dict[str, Tensor]:
    """Return y and the gradients of the inputs named in `of`, as `linear` computes them."""
    frozen = ("weight",) if "codes" in inputs else ()
    leaves = {
        n: t.detach().requires_grad_(n in of and n not in frozen)
        for n in NAMES
        if (t := inputs[n]) is not None
    }
    more = {n: inputs[n] for n in ("keep", "codes") if inputs.get(n) is not None}
    y = linear(*(leaves.get(n) for n in NAMES), alpha, **more)
    wanted = {n: t for n, t in leaves.items() if t.requires_grad}
    grads = torch.autograd.grad(y, list(wanted.values()), inputs["dy"]) if wanted else ()
    return {"y": y.detach()} | {f"d{n}": g for n, g in zip(wanted, grads, strict=True)}


@dataclass(frozen=True)
class Expected:
    """What a result is compared with: each a dict from "y", "h", "dx", ... to a tensor."""

    inputs: Inputs
    exact: dict[str, Tensor]  # in float64
    magnitude: dict[str, Tensor]  # in float64: the formula over absolute values
    plain: dict[str, Tensor]


def expect(
    inputs: Inputs,
    alpha: float,
    of: Sequence[str] = NAMES,
    device: torch.device | str = "cpu",
) -> Expected:
    """Return the oracle, computed on `device`, and the plain layer's results for some inputs.

    Args:
        inputs: x, weight, bias, A, B, dy and, for dropout, keep; as `make_inputs` gives them.
        alpha: factor of the low-rank part.
        of: the inputs whose gradients are wanted; none for y alone.
        device: where the float64 products run.

    """
    as_given = ("keep", "codes")
    exact = {
        n: t if t is None or n == "codes" else t.detach().to(device) for n, t in inputs.items()
    }
    exact = {n: t if t is None or n in as_given else t.double() for n, t in exact.items()}
    magnitude = {n: t if t is None or n in as_given else t.abs() for n, t in exact.items()}
    want = Expected(
        inputs,
        _plain_results(exact, alpha, of),
        _plain_results(magnitude, abs(alpha), of),
        _plain_results(inputs, alpha, of),
    )
    if inputs["x"].dtype == torch.float64:
        rounded = {n: t if t is None or n in as_given else t.float() for n, t in inputs.items()}
        for name, result in _plain_results(rounded, alpha, of).items():
            there, exactly = want.plain[name], want.exact[name].to(result.device)
            error = (result.double() - exactly).nan_to_num(0.0, 0.0, 0.0)  # past float32's range
            want.plain[name] = (there + error * 2.0**-29).to(there.dtype)
    return want


def _plain_results(inputs: Inputs, alpha: float, of: Sequence[str]) -> dict[str, Tensor]:
    """Return the plain layer's y and gradients, and h = (keep * x) @ A, which a backend keeps."""
    x, A, keep = inputs["x"], inputs["A"], inputs.get("keep")
    assert x is not None and A is not None
    rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    seen = rows if keep is None else rows * unpack_bits(keep, A.shape[0])
    return gradients(plain_linear, inputs, alpha, of) | {"h": seen.detach() @ A.to(x.dtype)}


@lru_cache(maxsize=512)
def expected(case: Case) -> Expected:
    """Return the inputs, the oracle and the plain layer's results for a case."""
    return expect(make_inputs(case), case.alpha)


def errors(got: dict[str, Tensor], want: Expected) -> list[Error]:
    """Return the error of each of `got`, of the right shape and dtype, under each norm."""
    x, A, dy = (want.inputs[name] for name in ("x", "A", "dy"))
    assert x is not None and A is not None and dy is not None
    u = torch.finfo(x.dtype).eps / 2
    u_acc = min(u, torch.finfo(torch.float32).eps / 2)
    M, R = dy[..., 0].numel(), A.shape[1]
    found = []
    for name, result in got.items():
        exact, magnitude = want.exact[name], want.magnitude[name]
        luck = 1 + 1 / math.sqrt(max(min(M * R, exact.numel()), 1))
        luck *= 4 if x.dtype == torch.float64 else 1

        def floor(norm: Norm, luck=luck, exact=exact, magnitude=magnitude) -> float:
            return luck * (u * norm(exact) + u_acc * norm(magnitude))

        found += compare(name, result, want.plain[name], exact, floor)
    return found


def broken_rules(got: dict[str, Tensor], want: Expected) -> list[str]:
    """Return a line for each of `got` that breaks the rule; an empty list when none does."""
    lines, fitting = [], {}
    for name, result in got.items():
        plain, like = want.plain[name], want.inputs.get(name[1:], want.inputs["x"])
        assert like is not None
        if result.shape == plain.shape and result.dtype == like.dtype:
            fitting[name] = result
        else:
            lines.append(
                f"{name}: {tuple(result.shape)} {result.dtype}, "
                f"not {tuple(plain.shape)} {like.dtype}"
            )
    return lines + [str(error) for error in errors(fitting, want) if error.broken]


def check(linear: Linear, case: Case) -> None:
    """Raise AssertionError unless `linear` keeps the rule on a case.

    Args:
        linear: a function called like `lora_linear`, and with `keep` if the case has dropout.
        case: the problem.

    """
    want = expected(case)
    lines = broken_rules(gradients(linear, want.inputs, case.alpha), want)
    if lines:
        raise AssertionError(f"{case}:\n" + "\n".join(lines))
