"""The Triton kernels of the fused LoRA linear layer, and what launches them.

    common.py      what every kernel shares: tile order, loads, products, the low-rank epilogue
    forward.py     kernels of y = x @ weight.T + bias + alpha * h @ B, and of h = x @ A
    decode.py      kernels for few rows: split over K, summed in a fixed order
    h_first.py     the persistent kernel, by name only
    backward.py    kernels of the gradients
    regimes.py     the named ways to run a forward: which kernels, in which order
    gradients.py   the same for a backward
    configs.py     which tile sizes a card may be given
    cards.py       what is known of a card: its limits and its speeds
    cost_model.py  bytes, FLOPs and launches of each regime, and the times that follow
    choice.py      which regimes and tiles a problem can run with, cheapest first
    tuning.py      measuring a handful of candidates once, and remembering which won
    launch.py      from tensors to launches
    entry.py       the way in
    interpreter.py mends two faults of Triton's interpreter, for the tests

Nothing here is imported before a tensor needs it: `import triton` costs 0.3 s and may be missing.
"""
