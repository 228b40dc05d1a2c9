"""Print a lower bound on each shape's time on this CPU, and how near each provider came.

    bound = the longer of FLOPs / GEMM rate and bytes / read rate, plus the host's time for a call

The GEMM rate is the best that PyTorch reaches here on square matrices of the run's dtype, the read
rate that of a sum over as many bytes as the weight has. FLOPs are those of the adapted layer,
bytes those of the weight, once a product. The host's time is that of PyTorch's least operator on
one element, for forward and backward as an autograd step: the thread that pays it is the one that
computes. No layer of this arithmetic can take less on this machine unless its GEMM beats that
rate, so plain / bound is the most that plain / ours can come to.
"""

import argparse
import sys
from collections.abc import Sequence
from typing import Any

import torch
from rich.table import Table

from . import DTYPES, Shape, flops, positive
from .report import OURS, PLAIN, by_shape, geometric_mean, wide_console
from .runs import FLOOR, Row, earlier_run
from .timing import cpu_timer, interleave, summarize

GEMM_SIZES = (256, 384, 512, 768, 1024)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure the two rates, print the table, return 0."""
    args = _parse(sys.argv[1:] if argv is None else argv)
    run = args.run
    header, rows = run["header"], run["rows"]
    torch.set_num_threads(header["threads"])
    dtype = DTYPES[rows[0]["dtype"]]
    cells = by_shape(rows)
    rate = gemm_gflops(dtype, args.seconds)
    host = host_ms(rows[0]["mode"], args.seconds)
    sizes = {K * N * dtype.itemsize for _, K, N, _ in cells}
    reads = {nbytes: read_gbs(nbytes, args.seconds) for nbytes in sizes}
    console = wide_console()
    console.print(
        f"{header['command']}\n{rows[0]['dtype']} {rows[0]['mode']}, threads {header['threads']}: "
        f"GEMM at best {rate:.1f} GFLOP/s, reads at {min(reads.values()):.1f} to "
        f"{max(reads.values()):.1f} GB/s, a call takes {1e3 * host:.1f} us; times of the run, on "
        f"{header['device']}"
    )
    bounds = {shape: bound_ms(shape, rows[0]["mode"], dtype, rate, reads, host) for shape in cells}
    console.print(_table(cells, bounds))
    return 0


def gemm_gflops(dtype: torch.dtype, budget_s: float) -> float:
    """Return the best rate of `torch.mm` over GEMM_SIZES, GFLOP/s."""
    best = 0.0
    for size in GEMM_SIZES:
        a, b, c = (torch.ones(size, size, dtype=dtype) for _ in range(3))
        ms = _ms(lambda a=a, b=b, c=c: torch.mm(a, b, out=c), budget_s)
        best = max(best, 2 * size**3 / ms / 1e6)
    return best


def read_gbs(nbytes: int, budget_s: float) -> float:
    """Return the rate at which a tensor of so many bytes is summed up, GB/s."""
    data = torch.ones(nbytes // 4)
    return nbytes / _ms(data.sum, budget_s) / 1e6


def host_ms(mode: str, budget_s: float) -> float:
    """Return the milliseconds of a call that computes next to nothing: `neg` of one element.

    For "fwd_bwd" with its gradient, by the one autograd node that a layer has at least.
    """
    x = torch.ones(1, requires_grad=mode != "fwd")
    if mode == "fwd":
        return _ms(x.neg, budget_s)
    dy = torch.ones(1)
    return _ms(lambda: torch.autograd.grad(x.neg(), x, dy), budget_s)


def bound_ms(
    shape: Shape,
    mode: str,
    dtype: torch.dtype,
    gflops: float,
    reads: dict[int, float],
    host: float,
) -> float:
    """Return the milliseconds that the adapted layer takes at least.

    Args:
        shape: M, K, N, R.
        mode: "fwd", or "fwd_bwd", which has a second product with the weight.
        dtype: of the weight.
        gflops: rate of products.
        reads: GB/s by the bytes of a weight.
        host: of a call, see `host_ms`.

    """
    products = 1 if mode == "fwd" else 2
    nbytes = shape.K * shape.N * dtype.itemsize
    bytes_ms = products * nbytes / reads[nbytes] / 1e6
    return max(flops(shape, mode, lora=True) / gflops / 1e6, bytes_ms) + host


def _ms(run: Any, budget_s: float) -> float:
    run()
    return summarize(interleave({"": cpu_timer(run)}, budget_s)[""]).p20


def _table(cells: dict[Shape, dict[str, Row]], bounds: dict[Shape, float]) -> Table:
    columns = [
        ("plain / bound", PLAIN, None),
        ("plain / ours", PLAIN, OURS),
        ("bound / linear", None, FLOOR),
        ("ours / linear", OURS, FLOOR),
        ("ours / bound", OURS, None),
    ]
    table = Table("M,K,N,R", "bound ms", *(name for name, _, _ in columns))
    means: list[list[float]] = [[] for _ in columns]
    for shape, by_name in cells.items():
        times = {name: row["ms_median"] for name, row in by_name.items()} | {None: bounds[shape]}
        ratios = [times[over] / times[under] for _, over, under in columns]
        for values, ratio in zip(means, ratios, strict=True):
            values.append(ratio)
        table.add_row(str(shape), f"{bounds[shape]:.3g}", *(f"{ratio:.2f}" for ratio in ratios))
    table.add_section()
    table.add_row("geometric mean", "", *(f"{geometric_mean(values):.2f}" for values in means))
    return table


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.lower_bound", description=__doc__.partition("\n")[0]
    )
    parser.add_argument(
        "run", type=earlier_run, metavar="FILE", help="a bench_linear --json of this CPU"
    )
    parser.add_argument(
        "--seconds", type=positive(float), default=1.0, help="for each rate (default 1)"
    )
    args = parser.parse_args(argv)
    if args.run["rows"][0]["device"] != "cpu":
        parser.error(f"FILE must be a run on a CPU, got one on {args.run['rows'][0]['device']}")
    names = {row["provider"] for row in args.run["rows"]}
    if missing := [name for name in (FLOOR, PLAIN, OURS) if name not in names]:
        parser.error(f"FILE must have the providers {FLOOR}, {PLAIN} and {OURS}: no {missing[0]}")
    return args


if __name__ == "__main__":
    sys.exit(main())
