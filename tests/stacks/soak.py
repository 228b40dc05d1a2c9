"""Train for hours, and see that nothing drifts, grows or leaks.

    python -m tests.stacks.soak --seconds 3600

Each round trains a fresh model of mixed layers next to the plain layer in the same dtype and in
float64: float32 and bfloat16, recomputed activations, dropout, groups, prepacked weights or weights
of codes, saving and loading in between, threads that infer at the same time, and calls that raise.

Of thousands of rounds some break the error rule by the plain layer's luck. A fault is there at
other values too: a round that breaks it has to do so again at one of four other draws.
"""

import argparse
import copy
import gc
import os
import random
import resource
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lora_ext import (
    LinearWithLoRA,
    group_,
    load_adapter,
    load_peft_adapter,
    lora_linear,
    mark_only_lora_as_trainable,
    merge_,
    prepack_,
    quantise_,
    replace_linear_with_lora,
    save_adapter,
    save_peft_adapter,
    ungroup_,
    unmerge_,
)
from lora_ext.codes import FORMATS
from lora_ext.testing import compare
from lora_ext.testing import replace_linear_with_lora as replace_plain

SETTLED = 10  # rounds after which the allocators have what they need
GROWTH_MIB = 48  # a leak of one small tensor a call would be more within minutes


@dataclass
class Use:
    """What the process holds."""

    mib: float
    descriptors: int
    threads: int

    @classmethod
    def now(cls) -> "Use":
        """Return what it holds now."""
        gc.collect()
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        mib = pages * resource.getpagesize() / 2**20
        return cls(mib, len(os.listdir("/proc/self/fd")), threading.active_count())


class Attention(nn.Module):
    """Three siblings over one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(24, 40) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.q(x).tanh() * self.k(x) + self.v(x)


class MLP(nn.Module):
    """A gated MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(40, 66), nn.Linear(40, 66)
        self.down = nn.Linear(66, 40)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(nn.functional.silu(self.gate(x)) * self.up(x))


@dataclass
class Plan:
    """What a round does, drawn from its number."""

    dtype: torch.dtype
    rows: int
    dropout: float  # a half, whose factor is exact, or none
    codes: str | None
    prepack: bool | None  # for the backward too; None for not at all
    group: bool
    recompute: bool

    @classmethod
    def of(cls, number: int) -> "Plan":
        """Return a round's plan."""
        chance = random.Random(number)
        return cls(
            dtype=chance.choice((torch.float32, torch.bfloat16)),
            rows=chance.choice((1, 3, 16, 70)),
            dropout=chance.choice((0.0, 0.0, 0.5)),
            codes=chance.choice((None, None, *FORMATS)),
            prepack=chance.choice((None, True, False)),
            group=chance.random() < 0.5,
            recompute=chance.random() < 0.5,
        )


def adapted(model: nn.Module) -> list[nn.Module]:
    """Return the layers with a low-rank part, ours or plain."""
    return [module for module in model.modules() if hasattr(module, "lora")]


def models(plan: Plan, seed: int) -> dict[str, nn.Module]:
    """Return one adapted model as ours, plain and plain in float64."""
    torch.manual_seed(seed)
    plain = nn.Sequential(Attention(), MLP(), nn.Linear(40, 8))
    ours = copy.deepcopy(plain)
    replace_linear_with_lora(ours, 4, 0.5, dropout=plan.dropout, dropout_mask="torch")
    replace_plain(plain, 4, 0.5)
    for layer in adapted(ours):
        nn.init.normal_(layer.lora.B, std=0.2)
    plain.load_state_dict(ours.state_dict())
    ours.to(plan.dtype)
    plain.to(plan.dtype)
    if plan.codes is not None:
        quantise_(ours, plan.codes)
        for mine, layer in zip(adapted(ours), adapted(plain), strict=True):
            layer.linear.weight.data = mine.linear.dequantised()
    elif plan.prepack is not None:
        prepack_(ours, backward=plan.prepack)
    mark_only_lora_as_trainable(ours)
    for name, parameter in plain.named_parameters():
        parameter.requires_grad_(".lora." in name)
    exact = copy.deepcopy(plain).double()
    for layer in (*adapted(plain), *adapted(exact)):
        layer.lora.register_forward_pre_hook(partial(dropped, plan=plan))
    if plan.group:
        group_(ours)
    return {"ours": ours, "plain": plain, "exact": exact}


def dropped(lora: nn.Module, inputs: tuple[Tensor], plan: Plan) -> Tensor:
    """Drop from the low-rank part's x by a mask that every dtype draws alike."""
    ones = torch.ones_like(inputs[0], dtype=plan.dtype)
    return inputs[0] * nn.functional.dropout(ones, plan.dropout, lora.training)


def train(
    model: nn.Module, batches: list[tuple[Tensor, Tensor]], recompute: bool, seed: int
) -> None:
    """Take a step of SGD a batch; its state is the weights alone, so that errors stay theirs."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.SGD(trained, lr=0.01)
    torch.manual_seed(seed)
    for x, target in batches:
        x, target = x.to(trained[0].dtype), target.to(trained[0].dtype)
        y = checkpoint(model, x, use_reentrant=False) if recompute else model(x)
        nn.functional.mse_loss(y, target).backward()
        optimiser.step()
        optimiser.zero_grad()


def without_adapters(model: nn.Module) -> nn.Module:
    """Return a copy with the linears alone."""
    fresh = copy.deepcopy(model)
    for parent in list(fresh.modules()):
        for name, child in parent._modules.items():
            if isinstance(child, LinearWithLoRA):
                parent._modules[name] = child.linear
    return fresh


def trained(plan: Plan, seed: int) -> tuple[nn.Module, Tensor, list[str]]:
    """Train the three; return ours, an x, and what breaks the error rule."""
    trio = models(plan, seed)
    batches = [(torch.randn(plan.rows, 24), torch.randn(plan.rows, 8)) for _ in range(6)]
    for name, model in trio.items():
        train(model, batches, name == "ours" and plan.recompute, seed)
    eps = torch.finfo(plan.dtype).eps
    states = [dict(trio[name].named_parameters()) for name in ("ours", "plain", "exact")]
    lines = []
    for key, exact in states[2].items():
        if ".lora." in key:
            got, plain = states[0][key].detach(), states[1][key].detach()
            exact = exact.detach()
            # Six steps, two roundings each.
            floor = lambda norm, e=exact: 12 * eps * norm(e)  # noqa: E731
            lines += [str(e) for e in compare(key, got, plain, exact, floor) if e.broken]
    return trio["ours"], batches[0][0].to(plan.dtype), lines


def a_round(number: int, folder: Path) -> bool:
    """Train, save, load, merge and infer once; return whether luck broke the error rule."""
    plan = Plan.of(number)
    ours, x, lines = trained(plan, number)
    again = [trained(plan, number + k * 10**6)[2] for k in range(1, 5)] if lines else []
    assert not any(again), f"round {number}: {plan} {lines} {again}"

    ours.eval()
    infer = torch.no_grad()(ours)  # the mode is a thread's own
    with ThreadPoolExecutor(3) as pool:
        want = infer(x)
        assert all(torch.equal(y, want) for y in pool.map(infer, [x] * 12)), f"round {number}"
    ungroup_(ours)
    want = ours(x)
    fresh = without_adapters(ours)
    save_adapter(ours, folder / "a")
    load_adapter(fresh, folder / "a")
    assert torch.equal(fresh.eval()(x), want), f"round {number}: {plan}"
    fresh = without_adapters(ours)
    save_peft_adapter(ours, folder / "peft")
    load_peft_adapter(fresh, folder / "peft")
    if plan.codes is None:
        merge_(ours)
        unmerge_(ours)
    assert torch.equal(ours(x), want), f"round {number}: {plan}"
    head = ours[2]
    for wrong in (x[:, :5], x.long(), None):
        try:
            lora_linear(wrong, torch.zeros(8, 40), None, head.lora.A, head.lora.B, 1.0)
        except (TypeError, ValueError):
            continue
        raise AssertionError(f"round {number}: no error")
    return bool(lines)


def soak(seconds: float, rounds: int | None = None) -> tuple[int, int, Use, Use]:
    """Run rounds for so long.

    Returns their number, how many of them luck broke, and what was held early on and at the end.
    """
    end, number, luck, early = time.monotonic() + seconds, 0, 0, Use.now()
    with tempfile.TemporaryDirectory() as folder:
        while time.monotonic() < end and number != rounds:
            luck += a_round(number, Path(folder))
            number += 1
            if number == SETTLED:
                early = Use.now()
        assert sorted(os.listdir(folder)) == ["a", "peft"], "temporary files are left"
    return number, luck, early, Use.now()


def main() -> None:
    """Soak, and print what was found."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=3600)
    seconds = parser.parse_args().seconds
    number, luck, early, late = soak(seconds)
    print(f"{number} rounds, {luck} broken by luck alone, early {early}, late {late}")
    check(early, late)


def check(early: Use, late: Use) -> None:
    """Raise AssertionError if the process holds more than it did."""
    assert late.descriptors <= early.descriptors, "file descriptors leak"
    assert late.threads <= early.threads, "threads leak"
    assert late.mib - early.mib < GROWTH_MIB, "memory grows"


if __name__ == "__main__":
    main()
