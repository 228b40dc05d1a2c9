"""What y and the gradients depend on beside the inputs: other rows of x, and the number of threads.

    python -m tests.tools.invariance

For each dtype the share of the elements that differ, and by how much at most: in units of the
dtype's eps times the largest element. Ours and the plain layer, at M, K, N, R = 960, 768, 768, 16.
"""

import argparse
from collections.abc import Callable

import torch
from torch import Tensor

from lora_ext import lora_linear
from lora_ext.testing import NAMES, Case, gradients, make_inputs, plain_linear

CASE = Case((960,), 768, 768, 16)
ROWS = (1, 4, 64)  # of a smaller x
THREADS = (1, 2, 4)


def difference(one: Tensor, other: Tensor) -> tuple[float, float]:
    """Return the share that differs, and the largest difference in eps of the largest element."""
    apart = (one.double() - other.double()).abs()
    unit = torch.finfo(one.dtype).eps * other.double().abs().max()
    return (apart > 0).double().mean().item(), (apart.max() / unit).item()


def by_rows(linear: Callable[..., Tensor], dtype: torch.dtype) -> tuple[float, float]:
    """Compare rows of y with the same rows of a smaller x: the worst of ROWS."""
    case = CASE.but(dtype=dtype)
    x, *rest = (make_inputs(case)[name] for name in NAMES)
    whole = linear(x, *rest, case.alpha)
    return max(difference(linear(x[:m], *rest, case.alpha), whole[:m]) for m in ROWS)


def by_threads(linear: Callable[..., Tensor], dtype: torch.dtype, name: str) -> tuple[float, float]:
    """Compare a result of one thread with that of more: the worst of THREADS."""
    inputs, before, results = make_inputs(CASE.but(dtype=dtype)), torch.get_num_threads(), []
    try:
        for threads in THREADS:
            torch.set_num_threads(threads)
            results.append(gradients(linear, inputs, CASE.alpha)[name])
    finally:
        torch.set_num_threads(before)
    return max(difference(result, results[0]) for result in results[1:])


def main() -> None:
    """Print the table."""
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    print("share that differs, most in eps of the largest:  ours | plain")
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        lines = {"y, fewer rows": lambda f, d=dtype: by_rows(f, d)}
        for name in ("y", "dx", "dweight", "dbias", "dA", "dB"):
            lines[f"{name}, threads"] = lambda f, d=dtype, n=name: by_threads(f, d, n)
        for what, compare in lines.items():
            ours, plain = (
                "{:6.2%} {:5.2f}".format(*compare(f)) for f in (lora_linear, plain_linear)
            )
            print(f"{str(dtype)[6:]:9} {what:17} {ours} | {plain}", flush=True)


if __name__ == "__main__":
    main()
