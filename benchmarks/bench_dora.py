"""A step of one layer of PEFT's with DoRA next to one without: ours and PEFT's, in turns.

    python -m benchmarks.bench_dora [--dropout 0.05]

Prints milliseconds, the least of some runs each, on one thread.
"""

import argparse
import time
from typing import Any

import torch
from torch import Tensor, nn

SHAPES = [(960, 768, 768), (960, 768, 3072), (512, 2048, 2048)]  # rows, in, out
LAYERS = [(ours, dora) for ours in (True, False) for dora in (False, True)]


def make(K: int, N: int, dropout: float, *, ours: bool, dora: bool) -> nn.Module:
    """Return a LoRA layer of PEFT in training, rank 16, float32."""
    import peft

    from lora_ext.integrations.peft import accelerate

    torch.manual_seed(0)
    config = peft.LoraConfig(
        r=16, target_modules=["layer"], init_lora_weights=False, use_dora=dora, lora_dropout=dropout
    )
    model: Any = peft.get_peft_model(nn.ModuleDict({"layer": nn.Linear(K, N)}), config)
    if ours:
        accelerate(model)
    return model.base_model.model["layer"].train()


def times(layers: list[nn.Module], x: Tensor, dy: Tensor, runs: int) -> list[float]:
    """Return the least time of a step of each layer, ms."""
    best = [float("inf")] * len(layers)
    for _ in range(runs):
        for i, layer in enumerate(layers):
            start = time.perf_counter()
            layer(x).backward(dy)
            best[i] = min(best[i], 1e3 * (time.perf_counter() - start))
    return best


def main() -> None:
    """Print a line for each shape."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--runs", type=int, default=7)
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(f"dropout {args.dropout}: ms of our LoRA, our DoRA, PEFT's LoRA, PEFT's DoRA")
    for M, K, N in SHAPES:
        layers = [make(K, N, args.dropout, ours=ours, dora=dora) for ours, dora in LAYERS]
        x, dy = torch.randn(M, K, requires_grad=True), torch.randn(M, N)
        ms = times(layers, x, dy, args.runs)
        print(f"{M},{K},{N}: " + ", ".join(f"{t:.1f}" for t in ms))


if __name__ == "__main__":
    main()
