"""The correctness gate: a provider is timed only after its results agree with an fp64 oracle.

The rule is the project's: err <= 2 * err(plain PyTorch, same dtype) + floor, err = max abs against
the oracle, for y and every gradient. The floor is what rounding does to a correct result in another
order of summation, at the result's largest value s and the longest sum n = max(M, K, N):
s * (eps(dtype) + sqrt(n) * eps(fp32)). Without the second term peft's dA at 1,2048,2048,16 in fp32
counts as wrong for 12 of 20 seeds: 1e-6 of s, but more than twice the plain layer's.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from .cases import Case

Results = Mapping[str, Tensor]


class Wrong(Exception):
    """A provider's result is not the operation's; the message says which and by how much."""


class Gate:
    """Oracle and error limits of one case.

    Args:
        case: the inputs.
        plain: y (and dx, dA, dB in "fwd_bwd") of the plain PyTorch layer, in the case's dtype.

    Raises:
        Wrong: the plain layer is itself off by more than a tenth, so it can't be the yardstick.

    """

    def __init__(self, case: Case, plain: Results) -> None:
        self._names = ("y", "dx", "dA", "dB") if case.training else ("y",)
        self._adapted = _oracle(case, lora=True)
        self._base = _oracle(case, lora=False)
        longest = max(case.shape.M, case.shape.K, case.shape.N)
        eps = torch.finfo(case.x.dtype).eps
        eps += math.sqrt(longest) * torch.finfo(torch.float32).eps
        self._limits: dict[str, float] = {}
        for name in self._names:
            scale = self._adapted[name].abs().max().item()
            err = _err(plain[name], self._adapted[name])
            if not err <= 0.1 * scale:
                raise Wrong(
                    f"the plain layer's {name} is off by {err:.1e} at a scale of {scale:.1e}"
                )
            self._limits[name] = 2 * err + eps * scale

    def check(self, results: Results, *, lora: bool = True) -> None:
        """Raise Wrong unless every result agrees with the oracle and no gradient is zero.

        Args:
            results: "y" and, in "fwd_bwd", "dx", "dA", "dB" (without the last two if not `lora`).
            lora: whether the low-rank part belongs to the result, or the base layer alone.

        """
        oracle = self._adapted if lora else self._base
        for name in self._names:
            if name not in oracle:
                continue
            got = results.get(name)
            if got is None or got.shape != oracle[name].shape:
                shape = None if got is None else tuple(got.shape)
                raise Wrong(f"{name} must have shape {tuple(oracle[name].shape)}, got {shape}")
            if not got.any():
                raise Wrong(f"{name} is zero everywhere")
            err, limit = _err(got, oracle[name]), self._limits[name]
            if not err <= limit:  # so written that a NaN fails
                raise Wrong(f"{name} is off by {err:.1e}, allowed {limit:.1e}")


def _err(got: Tensor, oracle: Tensor) -> float:
    return (got.detach().double() - oracle).abs().max().item()


@torch.no_grad()
def _oracle(case: Case, *, lora: bool) -> dict[str, Tensor]:
    """Return y (and gradients) in fp64, by the equations; on the case's device, for its size."""
    x, dy, weight, bias, A, B = (
        t.detach().double() for t in (case.x, case.dy, case.weight, case.bias, case.A, case.B)
    )
    h = x @ A  # (M, R)
    y = x @ weight.T + bias
    results = {"y": y + case.alpha * (h @ B) if lora else y}
    if case.training:
        t = dy @ B.T  # (M, R)
        dx = dy @ weight
        results["dx"] = dx + case.alpha * (t @ A.T) if lora else dx
        if lora:
            results["dA"] = case.alpha * (x.T @ t)
            results["dB"] = case.alpha * (h.T @ dy)
    return results
