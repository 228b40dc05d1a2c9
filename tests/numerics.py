"""The one error rule of the tests, and the inputs, oracle and plain layer that it compares with.

    err(ours) <= 2 * err(plain) + floor,    for y, dx, dweight, dbias, dA and dB

err is taken against the same formula in float64 on the CPU, under two norms: the largest element
(one wrong element shows) and the root mean square (a small error in all of them shows). `plain` is
the project's reference classes, run in the dtype of x.

    floor = luck * (u * |exact| + u_acc * |sum of the magnitudes|)
    luck  = 1 + 1 / sqrt(min(M * R, elements of the result))

The floor is what no implementation is blamed for: storing the exact value costs u = eps / 2 of x's
dtype, relative to it, and summing up costs u_acc = eps / 2 of the accumulator (float32 for halves)
of what is summed; the magnitudes are the same formula over absolute values. The plain layer can be
lucky too, when the few numbers that all hangs on, the result's own or the M * R of h and t, happen
to round well: with one number that is worth one rounding more, over many it averages out. In
float64 the oracle is the plain layer itself: its error, unseen, is in both terms, so the floor
counts four times. In float32 it is about 1e-6 of the result, in bfloat16 0.4 %.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.func import functional_call

from tests.reference import LinearWithLoRA as PlainLinearWithLoRA

Linear = Callable[[Tensor, Tensor, Tensor | None, Tensor, Tensor, float], Tensor]
NAMES = ("x", "weight", "bias", "A", "B")
SHORT = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
SHORT[torch.float64] = "fp64"


@dataclass(frozen=True)
class Case:
    """A problem: x (*lead, K), weight (N, K), rank R, and how the tensors lie in memory."""

    lead: tuple[int, ...]
    K: int
    N: int
    R: int
    dtype: torch.dtype = torch.float32
    adapter_dtype: torch.dtype | None = None
    bias: bool = True
    layout: str = "contiguous"
    alpha: float = 1.7

    def __str__(self) -> str:
        """As a test id: M37-K96-N160-R8-bf16."""
        parts = [f"M{'x'.join(map(str, self.lead)) or 'vector'}-K{self.K}-N{self.N}-R{self.R}"]
        parts.append(SHORT[self.dtype])
        if self.adapter_dtype is not None:
            parts.append(f"AB{SHORT[self.adapter_dtype]}")
        if not self.bias:
            parts.append("nobias")
        if self.layout != "contiguous":
            parts.append(self.layout)
        if self.alpha != 1.7:
            parts.append(f"alpha{self.alpha:g}")
        return "-".join(parts)

    def but(self, **changes: object) -> "Case":
        """Return the same problem with some fields changed."""
        return replace(self, **changes)


# A layout: the tensor it lays out anew, and how; the values stay.
LAYOUTS: dict[str, tuple[str, Callable[[Tensor], Tensor]]] = {
    "contiguous": ("x", lambda t: t),
    "x_every_other_row": ("x", lambda t: t.repeat_interleave(2, 0)[::2]),
    "x_every_other_column": ("x", lambda t: t.repeat_interleave(2, -1)[..., ::2]),
    "x_transposed": ("x", lambda t: t.mT.contiguous().mT),
    "x_unaligned": ("x", lambda t: _unaligned(t)),
    "x_expanded": ("x", lambda t: t[..., :1, :].expand_as(t)),
    "weight_transposed": ("weight", lambda t: t.T.contiguous().T),
    "weight_sliced": ("weight", lambda t: torch.cat((t, t), 1)[:, : t.shape[1]]),
    "weight_unaligned": ("weight", lambda t: _unaligned(t)),
    "A_transposed": ("A", lambda t: t.T.contiguous().T),
    "B_transposed": ("B", lambda t: t.T.contiguous().T),
    "bias_strided": ("bias", lambda t: t.repeat_interleave(2)[::2]),
    "dy_expanded": ("dy", lambda t: t.flatten()[0].expand_as(t)),
    "dy_row_expanded": ("dy", lambda t: t[..., :1, :].expand_as(t)),
    "dy_transposed": ("dy", lambda t: t.mT.contiguous().mT),
}


def _unaligned(t: Tensor) -> Tensor:
    """Move by one element: a load that assumes an aligned pointer faults or reads the wrong one."""
    return torch.cat((t.new_zeros(1), t.flatten()))[1:].view(t.shape)


def make_inputs(case: Case, seed: int = 0) -> dict[str, Tensor | None]:
    """Return x, weight, bias, A, B and dy; each part of y has a variance of about 1.

    On torch's default device, the same values on each.
    """
    g = torch.Generator("cpu").manual_seed(seed)
    device = torch.get_default_device()

    def randn(*shape: int, scale: float = 1.0, dtype: torch.dtype = case.dtype) -> Tensor:
        values = torch.randn(*shape, generator=g, dtype=torch.float64, device="cpu")
        return (values * scale).to(device, dtype)

    K, N, R = case.K, case.N, case.R
    adapter = {"dtype": case.adapter_dtype or case.dtype}
    inputs = {
        "x": randn(*case.lead, K),
        "weight": randn(N, K, scale=K**-0.5),
        "bias": randn(N) if case.bias else None,
        "A": randn(K, R, scale=K**-0.5, **adapter),
        "B": randn(R, N, scale=R**-0.5, **adapter),  # never zero: it would hide dA and dx
        "dy": randn(*case.lead, N),
    }
    name, lay_out = LAYOUTS[case.layout]
    if inputs[name] is not None:
        inputs[name] = lay_out(inputs[name])
    return inputs


def gradients(linear: Linear, inputs: dict[str, Tensor | None], alpha: float) -> dict[str, Tensor]:
    """Return y and the gradient of every input, as `linear` computes them."""
    leaves = {n: t.detach().requires_grad_() for n in NAMES if (t := inputs[n]) is not None}
    y = linear(*(leaves.get(n) for n in NAMES), alpha)
    grads = torch.autograd.grad(y, list(leaves.values()), inputs["dy"])
    return {"y": y.detach()} | {f"d{n}": g for n, g in zip(leaves, grads, strict=True)}


def plain_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, alpha: float
) -> Tensor:
    """Run the reference classes on these tensors; A and B in x's dtype."""
    N, K = weight.shape
    layer = nn.Linear(K, N, bias=bias is not None, device="meta")
    layer = PlainLinearWithLoRA(layer, A.shape[1], alpha)
    state = {"linear.weight": weight, "lora.A": A.to(x.dtype), "lora.B": B.to(x.dtype)}
    if bias is not None:
        state["linear.bias"] = bias
    return functional_call(layer, state, (x,))


@dataclass(frozen=True)
class Expected:
    """What a result is compared with: each a dict from "y", "dx", ... to a tensor."""

    inputs: dict[str, Tensor | None]
    exact: dict[str, Tensor]  # in float64
    magnitude: dict[str, Tensor]  # in float64: the formula over absolute values
    plain: dict[str, Tensor]


@lru_cache(maxsize=512)
def expected(case: Case) -> Expected:
    """Return the inputs, the oracle and the plain layer's results for a case."""
    inputs = make_inputs(case)
    exact = {n: None if t is None else t.cpu().double() for n, t in inputs.items()}
    magnitude = {n: None if t is None else t.abs() for n, t in exact.items()}
    return Expected(
        inputs,
        gradients(plain_linear, exact, case.alpha),
        gradients(plain_linear, magnitude, abs(case.alpha)),
        gradients(plain_linear, inputs, case.alpha),
    )


NORMS: dict[str, Callable[[Tensor], float]] = {
    "max": lambda t: t.abs().max().item() if t.numel() else 0.0,
    "rms": lambda t: t.square().mean().sqrt().item() if t.numel() else 0.0,
}


def broken_rules(got: dict[str, Tensor], want: Expected) -> list[str]:
    """Return a line for each of `got` that breaks the rule; an empty list when none does."""
    dtype = want.inputs["x"].dtype
    u = torch.finfo(dtype).eps / 2
    u_acc = min(u, torch.finfo(torch.float32).eps / 2)
    M, R = want.inputs["dy"][..., 0].numel(), want.inputs["A"].shape[1]
    lines = []
    for name, result in got.items():
        exact, like = want.exact[name], want.inputs.get(name[1:], want.inputs["x"])
        if result.shape != exact.shape or result.dtype != like.dtype:
            lines.append(f"{name}: {tuple(result.shape)} {result.dtype}, not {tuple(exact.shape)}")
            continue
        error = result.cpu().double() - exact
        plain_error = want.plain[name].cpu().double() - exact
        luck = 1 + 1 / math.sqrt(max(min(M * R, exact.numel()), 1))
        luck *= 4 if dtype == torch.float64 else 1
        for norm_name, norm in NORMS.items():
            ours, plain = norm(error), norm(plain_error)
            floor = luck * (u * norm(exact) + u_acc * norm(want.magnitude[name]))
            if not (ours <= 2 * plain + floor or math.isnan(plain)):  # a NaN of ours fails
                lines.append(
                    f"{name}: {norm_name} error {ours:.3g} > 2 * {plain:.3g} + {floor:.3g}"
                )
    return lines


def check(linear: Linear, case: Case) -> None:
    """Assert that `linear`, a callable like `lora_linear`, keeps the rule on a case."""
    want = expected(case)
    lines = broken_rules(gradients(linear, want.inputs, case.alpha), want)
    assert not lines, f"{case}:\n" + "\n".join(lines)


def assert_same_up_to_rounding(got: Tensor, want: Tensor) -> None:
    """Assert that two computations of one thing, in the same dtype, round differently at most.

    For modules with few features, where no oracle is at hand: each may be off by two roundings of
    the largest value.
    """
    assert got.shape == want.shape and got.dtype == want.dtype, (got.dtype, want.dtype)
    if got.numel():
        bound = 4 * torch.finfo(want.dtype).eps * want.abs().max().item()
        assert (got.double() - want.double()).abs().max().item() <= bound
