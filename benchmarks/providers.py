"""What is timed, by name: a provider turns a case into a step (step.py).

All providers share the case's tensors. A new one is a function here, or in peers.py where it is not
ours, and its name in `PROVIDERS`.
"""

import os
from collections.abc import Callable

import torch
from torch import Tensor, nn

import lora_ext
from lora_ext.backends import BACKENDS
from lora_ext.backends.triton import regime
from lora_ext.backends.triton.regimes import REGIMES, Problem
from lora_ext.call import Call, LowRank, Weight

from . import Case
from .bases import Unavailable, frozen_linear, own_quantised_linear, quantised_linear
from .peers import PEERS
from .step import Step, hash_mask, step_of, torch_mask


def _lora_ext(case: Case) -> Step:
    return _adapted(case)[0]


def _torch_draw(case: Case) -> Step:
    if not case.dropout:
        raise Unavailable("torch_draw is lora_ext with dropout's other draw: give --dropout")
    return _adapted(case, "torch")[0]._replace(mask=torch_mask)


def _lora_ext_plain(case: Case) -> Step:
    if case.base == "plain":
        raise Unavailable("lora_ext_plain is lora_ext over what codes stand for: give --base")
    return _adapted(case, base=frozen_linear(case))[0]


def _lora_ext_quantise(case: Case) -> Step:
    if case.unquantised is None:
        raise Unavailable("lora_ext_quantise is lora_ext after quantise_: give --base")
    return _adapted(case, base=own_quantised_linear(case))[0]


def _adapted(
    case: Case, draw: str = "hash", base: nn.Module | None = None
) -> tuple[Step, lora_ext.LinearWithLoRA]:
    drawn = {"dropout": case.dropout, "dropout_mask": draw}
    layer = lora_ext.LinearWithLoRA(
        base or quantised_linear(case), case.shape.R, case.alpha, dtype=case.A.dtype, **drawn
    )
    with torch.no_grad():
        layer.lora.A.copy_(case.A)
        layer.lora.B.copy_(case.B)
    step = step_of(case, layer, {"dx": case.x, "dA": layer.lora.A, "dB": layer.lora.B})
    return step._replace(mask=hash_mask), layer


def _prepacked(case: Case) -> Step:
    step, layer = _adapted(case)
    report = lora_ext.prepack_(layer, backward=case.training)
    if report.left:
        raise Unavailable(next(iter(report.left.values())))
    return step


def _backend(name: str) -> Callable[[Case], Step]:
    def build(case: Case) -> Step:
        keep = hash_mask(case) if case.dropout else None
        low = LowRank(case.A, case.B, case.alpha, keep)
        reason = BACKENDS[name].unsupported(Call(case.x, Weight(case.weight), case.bias, low))
        if reason is not None:
            raise Unavailable(reason)
        weight, bias, A, B, alpha = case.weight, case.bias, case.A, case.B, case.alpha
        options = {"backend": name} | ({"dropout": case.dropout} if case.dropout else {})
        step = step_of(
            case,
            lambda x: lora_ext.lora_linear(x, weight, bias, A, B, alpha, **options),
            {"dx": case.x, "dA": A, "dB": B},
        )
        return step._replace(mask=hash_mask)

    return build


def _own_base(case: Case) -> Step:
    """The backend "cpp" on a GPU with the base product by its own kernels, see csrc/cuda."""
    if not case.x.is_cuda or case.x.dtype == torch.float32:
        raise Unavailable("cpp.own_base is a way of the CUDA kernels with 16-bit dtypes")
    step = _backend("cpp")(case)

    def run() -> tuple[Tensor, ...]:
        os.environ["LORA_EXT_CUDA_BASE"] = "own"
        try:
            return step.run()
        finally:
            del os.environ["LORA_EXT_CUDA_BASE"]

    return step._replace(run=run)


def _regime(name: str) -> Callable[[Case], Step]:
    """Return a provider: the backend "triton", its regime forced by name, forward and backward."""

    def build(case: Case) -> Step:
        step = _backend("triton")(case)
        from lora_ext.backends.triton.cards import card_of
        from lora_ext.backends.triton.tuning import describable, kind_of

        problem = Problem(
            *case.shape,
            kind_of(case.x.dtype),
            case.x.element_size(),
            case.A.element_size(),
            descriptors=describable(case.x) and describable(case.weight),
            masked=case.dropout > 0,
        )
        if not REGIMES["forward"][name].tiles(problem, card_of(case.x.device)):
            raise Unavailable(f"regime {name} does not take these sizes in {case.x.dtype}")
        forced = {"forward": name, "backward": name if name in REGIMES["backward"] else None}

        def run() -> tuple[Tensor, ...]:
            with regime(**forced):
                return step.run()

        return step._replace(run=run)

    return build


PROVIDERS: dict[str, Callable[[Case], Step]] = {
    **PEERS,
    "lora_ext": _lora_ext,
    "lora_ext_plain": _lora_ext_plain,
    "lora_ext_quantise": _lora_ext_quantise,
    "torch_draw": _torch_draw,
    "prepacked": _prepacked,
}
# Each backend under its own name; the backend "reference" yields that name to the plain classes.
PROVIDERS |= {n if n not in PROVIDERS else f"lora_ext.{n}": _backend(n) for n in BACKENDS}
PROVIDERS["cpp.own_base"] = _own_base
PROVIDERS |= {f"triton.{name}": _regime(name) for name in REGIMES["forward"]}
DEFAULT = ("linear", "reference", "lora_ext")
