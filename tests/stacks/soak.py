"""Train for hours, and see that nothing drifts, grows or leaks.

    python -m tests.stacks.soak --seconds 3600

Each round trains a fresh model of mixed layers next to the plain layer in the same dtype and in
float64: float32 and bfloat16, recomputed activations, prepacked weights, saving and loading in
between, threads that infer at the same time, and calls that raise.
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
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lora_ext import (
    LinearWithLoRA,
    load_adapter,
    load_peft_adapter,
    lora_linear,
    mark_only_lora_as_trainable,
    merge_,
    prepack_,
    replace_linear_with_lora,
    save_adapter,
    save_peft_adapter,
    unmerge_,
)
from lora_ext.testing import compare
from lora_ext.testing import replace_linear_with_lora as replace_plain

SIZES = ((24, 40), (40, 33), (33, 8))
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


def models(dtype: torch.dtype, seed: int) -> dict[str, nn.Module]:
    """Return one adapted model as ours, plain and plain in float64."""
    torch.manual_seed(seed)
    plain = nn.Sequential(*(nn.Linear(*size) for size in SIZES))
    ours = copy.deepcopy(plain)
    replace_linear_with_lora(ours, 4, 0.5)
    replace_plain(plain, 4, 0.5)
    for module in ours.modules():
        if isinstance(module, LinearWithLoRA):
            nn.init.normal_(module.lora.B, std=0.2)
    plain.load_state_dict(ours.state_dict())
    mark_only_lora_as_trainable(ours)
    for name, parameter in plain.named_parameters():
        parameter.requires_grad_(".lora." in name)
    plain.to(dtype)
    return {"ours": ours.to(dtype), "plain": plain, "exact": copy.deepcopy(plain).double()}


def train(model: nn.Module, batches: list[tuple[Tensor, Tensor]], recompute: bool) -> None:
    """Take a step of SGD a batch; its state is the weights alone, so that errors stay theirs."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.SGD(trained, lr=0.01)
    for x, target in batches:
        x, target = x.to(trained[0].dtype), target.to(trained[0].dtype)
        y = checkpoint(model, x, use_reentrant=False) if recompute else model(x)
        nn.functional.mse_loss(y, target).backward()
        optimiser.step()
        optimiser.zero_grad()


def a_round(number: int, folder: Path) -> None:
    """Train, save, load, merge and infer once."""
    chance = random.Random(number)
    dtype = chance.choice((torch.float32, torch.bfloat16))
    trio = models(dtype, number)
    rows = chance.choice((1, 3, 16, 70))
    batches = [(torch.randn(rows, 24), torch.randn(rows, 8)) for _ in range(6)]
    ours = trio["ours"]
    if chance.random() < 0.5:
        prepack_(ours, backward=chance.random() < 0.5)
    for name, model in trio.items():
        train(model, batches, name == "ours" and chance.random() < 0.5)
    eps = torch.finfo(dtype).eps
    states = [dict(trio[name].named_parameters()) for name in ("ours", "plain", "exact")]
    for key, exact in states[2].items():
        got, plain = states[0][key].detach(), states[1][key].detach()
        exact = exact.detach()
        floor = lambda norm, e=exact: 12 * eps * norm(e)  # noqa: E731  six steps, two roundings each
        for error in compare(key, got, plain, exact, floor):
            assert not error.broken, f"round {number}: {error}"

    x = batches[0][0].to(dtype)
    with torch.no_grad(), ThreadPoolExecutor(3) as pool:
        want = ours(x)
        assert all(torch.equal(y, want) for y in pool.map(ours, [x] * 12)), f"round {number}"
    fresh = nn.Sequential(*(copy.deepcopy(layer.linear) for layer in ours))
    save_adapter(ours, folder / "a")
    load_adapter(fresh, folder / "a")
    assert torch.equal(fresh(x), want), f"round {number}"
    fresh = nn.Sequential(*(copy.deepcopy(layer.linear) for layer in ours))
    save_peft_adapter(ours, folder / "peft")
    load_peft_adapter(fresh, folder / "peft")
    merge_(ours)
    unmerge_(ours)
    assert torch.equal(ours(x), want), f"round {number}"
    for wrong in (x[:, :5], x.long(), None):
        try:
            lora_linear(wrong, ours[0].weight, None, ours[0].lora.A, ours[0].lora.B, 1.0)
        except (TypeError, ValueError):
            continue
        raise AssertionError(f"round {number}: no error")


def soak(seconds: float, rounds: int | None = None) -> tuple[int, Use, Use]:
    """Run rounds for so long; return their number, and what was held early on and at the end."""
    end, number, early = time.monotonic() + seconds, 0, Use.now()
    with tempfile.TemporaryDirectory() as folder:
        while time.monotonic() < end and number != rounds:
            a_round(number, Path(folder))
            number += 1
            if number == SETTLED:
                early = Use.now()
        assert sorted(os.listdir(folder)) == ["a", "peft"], "temporary files are left"
    return number, early, Use.now()


def main() -> None:
    """Soak, and print what was found."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=3600)
    seconds = parser.parse_args().seconds
    number, early, late = soak(seconds)
    print(f"{number} rounds, early {early}, late {late}")
    check(early, late)


def check(early: Use, late: Use) -> None:
    """Raise AssertionError if the process holds more than it did."""
    assert late.descriptors <= early.descriptors, "file descriptors leak"
    assert late.threads <= early.threads, "threads leak"
    assert late.mib - early.mib < GROWTH_MIB, "memory grows"


if __name__ == "__main__":
    main()
