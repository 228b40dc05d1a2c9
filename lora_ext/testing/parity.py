"""PEFT's LoRA layers on our operation, held to PEFT's own by the error rule.

    err(ours) <= 2 * err(PEFT's, same dtype) + floor

err is taken against PEFT's own layer in float64, over y and the gradients of x and of every trained
tensor, under the norms of `rule`; the floor is some roundings of the result. All run from one seed,
so dropout's masks are the same. Over a quantised base PEFT's layer gets the plain weight that the
base stands for.
"""

import copy
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .bases import BASES, NEEDS, SIZES
from .rule import compare

ROWS = (3, 5)
NO_DORA = ("torchao int4", "transformers FineGrainedFP8")  # PEFT can't make one
_FIRST = {"r": 3, "lora_alpha": 7}
_SECOND = {"r": 5, "lora_alpha": 2}
# The LoraConfig of each adapter of a layer; all are active.
FEATURES: dict[str, list[dict[str, Any]]] = {
    "LoRA": [_FIRST],
    "rsLoRA": [_FIRST | {"use_rslora": True}],
    "rank_pattern, alpha_pattern": [
        {"rank_pattern": {"layer": 4}, "alpha_pattern": {"layer": 9}, **_FIRST}
    ],
    "lora_bias": [_FIRST | {"lora_bias": True}],
    "several adapters": [_FIRST, _SECOND, _SECOND | {"use_rslora": True}],
    "several adapters, lora_bias": [_FIRST | {"lora_bias": True}, _SECOND],
    "DoRA": [_FIRST | {"use_dora": True}],
    "several adapters, DoRA": [_FIRST, _SECOND | {"use_dora": True}],
}


class Parity(NamedTuple):
    """One check.

    Attributes:
        feature: of FEATURES.
        base: "nn.Linear", "Conv1D", or of `bases.BASES`.
        dtype: of the base and x; adapters are float32 over halves, as PEFT keeps them.
        dropout: lora_dropout, in training.
        autocast: whether the layer runs under autocast to bfloat16.

    """

    feature: str
    base: str = "nn.Linear"
    dtype: torch.dtype = torch.float32
    dropout: float = 0.0
    autocast: bool = False

    def __str__(self) -> str:
        """As in `DoRA over nn.Linear, float32, dropout 0.3`."""
        parts = [f"{self.feature} over {self.base}", str(self.dtype).removeprefix("torch.")]
        parts += [f"dropout {self.dropout}"] * bool(self.dropout) + ["autocast"] * self.autocast
        return ", ".join(parts)


def every_parity() -> Iterator[Parity]:
    """Yield what `python -m lora_ext.testing` runs."""
    for feature in FEATURES:
        for dropout in (0.0, 0.3):
            yield Parity(feature, dropout=dropout)
            yield Parity(feature, dtype=torch.bfloat16, dropout=dropout)
        yield Parity(feature, dtype=torch.float64)
        yield Parity(feature, "Conv1D")
    yield Parity("LoRA", autocast=True)
    for base in BASES:
        yield Parity("LoRA", base)
        yield Parity("LoRA", base, dtype=torch.bfloat16)
        yield Parity("LoRA", base, dropout=0.3)
        yield Parity("LoRA", base, autocast=True)
        yield Parity("several adapters", base)
        if base not in NO_DORA:
            yield Parity("DoRA", base)
            yield Parity("DoRA", base, dropout=0.3)


def why_skipped(case: Parity) -> str | None:
    """Say which package a check needs that is not here; None if it can run."""
    needs = ["peft", {"Conv1D": "transformers"}.get(case.base, NEEDS.get(case.base, "torch"))]
    lost = [name for name in needs if find_spec(name) is None]
    return f"needs {', '.join(lost)}" if lost else None


def check_parity(case: Parity) -> None:
    """Raise AssertionError unless our layer keeps the rule next to PEFT's."""
    from ..integrations.peft import accelerate

    ours, plain = make_models(case)
    exact = copy.deepcopy(plain).double()
    report = accelerate(ours)
    assert report.accelerated and not report.left, report
    want = results(exact, case._replace(autocast=False))
    mine, others = results(ours, case), results(plain, case)
    if case.dtype == torch.float64:  # PEFT's error is unseen there: see `rule`
        single = results(copy.deepcopy(plain).float(), case._replace(dtype=torch.float32))
        others = {n: want[n] + (t.double() - want[n]) * 2.0**-29 for n, t in single.items()}
    lines = []
    for name, value in want.items():
        eps = torch.finfo(torch.bfloat16 if case.autocast else case.dtype).eps
        got = mine.get(name)
        # Under autocast some quantised linears answer in x's dtype, and plain ones do not.
        dtype = case.dtype if case.autocast and case.base in BASES else others[name].dtype
        fits = got is not None and got.dtype in (dtype, others[name].dtype)
        if got is None or got.shape != value.shape or not fits:
            lines.append(f"{name}: {got if got is None else (got.shape, got.dtype)}")
            continue
        floor: Callable[..., float] = lambda norm, v=value, e=eps: 4 * e * norm(v)  # noqa: E731
        found = compare(name, got, others[name], value, floor)
        lines += [str(error) for error in found if error.broken]
    assert not lines, f"{case}:\n" + "\n".join(lines)


def sizes_of(case: Parity) -> tuple[int, int]:
    """Return in_features and out_features; no multiples of a vector where the base takes such."""
    return SIZES.get(case.base, (91, 70))


def make_models(case: Parity) -> tuple[nn.Module, nn.Module]:
    """Return a layer with PEFT's adapters over the base, and over the plain one it stands for."""
    torch.manual_seed(0)
    K, N = sizes_of(case)
    linear: Any = nn.Linear(K, N).to(case.dtype)
    base: nn.Module = linear
    if case.base in BASES:
        base, weight = BASES[case.base](copy.deepcopy(linear))
        linear.weight.data = weight.to(case.dtype)
    elif case.base == "Conv1D":
        from transformers.pytorch_utils import Conv1D

        linear = Conv1D(N, K).to(case.dtype)
        base = copy.deepcopy(linear)
    ours, plain = (_with_adapters(one, case) for one in (base, linear))
    state = {n: p for n, p in plain.named_parameters() if "lora_" in n}
    for name, parameter in ours.named_parameters():
        if "lora_" in name:
            parameter.data = state[name].detach().clone()
    return ours.train(), plain.train()


def _with_adapters(base: nn.Module, case: Parity) -> nn.Module:
    import peft

    model: Any = nn.ModuleDict({"layer": base})
    model.forward = lambda x: None
    model.is_loaded_in_4bit = "4" in case.base
    model.is_loaded_in_8bit = case.base == "bitsandbytes int8"
    for i, options in enumerate(FEATURES[case.feature]):
        config = peft.LoraConfig(
            target_modules=["layer"],
            init_lora_weights=False,
            lora_dropout=case.dropout,
            fan_in_fan_out=case.base == "Conv1D",
            **options,
        )
        if i:
            model.add_adapter(f"adapter{i}", config)
        else:
            model = peft.get_peft_model(model, config)
    names = ["default", *(f"adapter{i}" for i in range(1, len(FEATURES[case.feature])))]
    model.base_model.set_adapter(names)
    layer = model.base_model.model["layer"]
    g = torch.Generator().manual_seed(1)
    for name, parameter in layer.named_parameters():
        parameter.requires_grad_("lora_" in name)
        if "magnitude" in name:
            parameter.data *= torch.rand(parameter.shape, generator=g) + 0.5
        elif "lora_" in name:
            parameter.data = (0.2 * torch.randn(parameter.shape, generator=g)).to(parameter.dtype)
    return layer


def results(layer: nn.Module, case: Parity) -> dict[str, Tensor]:
    """Return y and every gradient of a step from one seed."""
    g = torch.Generator().manual_seed(2)
    wide = all(p.dtype == torch.float64 for p in layer.parameters())
    dtype = torch.float64 if wide else case.dtype
    x, dy = (torch.randn(*ROWS, n, generator=g).to(case.dtype).to(dtype) for n in sizes_of(case))
    x.requires_grad_()
    torch.manual_seed(3)
    with torch.autocast("cpu", torch.bfloat16, enabled=case.autocast):
        y = layer(x)
    y.backward(dy.to(y.dtype))
    assert x.grad is not None
    grads = {n: p.grad for n, p in layer.named_parameters() if p.grad is not None}
    return {"y": y.detach(), "dx": x.grad, **grads}
