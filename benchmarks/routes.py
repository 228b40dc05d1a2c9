"""Time every way that each product of the CPU kernels can go, and name what the table has wrong.

csrc/cpu/route.cpp has a line for an instruction set, a kind of CPU and a dtype: ours or PyTorch's,
and how. This measures that line on the machine it runs on, at shapes of the CPU grid. For each
product the operator that makes it is run by each of its ways in turn, all else by the table. The
table's own way is timed twice: what the two differ by is the noise, and a way must be faster by
more than that, and by 3 %, to make the table's entry wrong. Times are minima of interleaved calls;
with one thread they are that thread's, and other processes matter little.
"""

import argparse
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import NamedTuple

import torch
from rich.table import Table

from lora_ext import _C

from . import DTYPES, GRIDS, Case, Shape, make_case, names_of, positive, shape
from .report import wide_console
from .runs import instruction_set
from .timing import interleave

# A minute: decoding, few rows, a short batch, square and wide layers, a high rank.
SHORT = tuple(GRIDS["cpu"]["standard"][i] for i in (0, 2, 3, 5, 6, 9, 10))
SAMPLE_MS = 0.2  # a shorter call is repeated within a sample
FEW = 64  # rows up to which the ways of few rows are tried
LEAST_GAIN = 1.03
AGAIN = "by the table, again"
_FWD = torch.ops.lora_ext.linear_fwd.default
_BWD = torch.ops.lora_ext.linear_bwd.default


class Result(NamedTuple):
    """One product at one shape: milliseconds by way, the table's way, and the noise as a ratio."""

    dtype: str
    product: str
    shape: Shape
    chosen: str
    ms: dict[str, float]
    noise: float

    @property
    def best(self) -> str:
        """The fastest way."""
        return min(self.ms, key=self.ms.__getitem__)

    @property
    def gain(self) -> float:
        """What the fastest way would gain over the table's, as a ratio."""
        return self.ms[self.chosen] / self.ms[self.best]

    @property
    def wrong(self) -> bool:
        """Whether the table's way loses by more than the noise."""
        return self.gain > max(LEAST_GAIN, self.noise)

    @property
    def entry(self) -> str:
        """The field of the table's line that decides between the two ways."""
        for way, field in (("dots", "dot_rows"), ("stream", "stream_rows")):
            if way in (self.chosen, self.best):
                return field
        return "library_base" if self.product in ("y", "dx") else f"library_{self.product}"


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print the tables and the entries that are wrong; return their number, 9 at most."""
    args = _parse(sys.argv[1:] if argv is None else argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    console = wide_console()
    console.print(
        f"{instruction_set()}, kernels {_C.build_info()['cpu_isa']}, "
        f"threads {torch.get_num_threads()}",
        highlight=False,
    )
    lines = []
    for name in args.dtype:
        shapes = args.shape or (GRIDS["cpu"]["standard"] if args.full else SHORT)
        results = [r for s in shapes for r in measure(s, name, args.seconds, args.products)]
        console.print(_table(results, name))
        lines += wrong_entries(results)
    for line in lines or ["no entry of the table is wrong here"]:
        console.print(line, highlight=False)
    return min(len(lines), 9)


def measure(
    shape: Shape, dtype: str, budget_s: float, products: Sequence[str] | None = None
) -> Iterator[Result]:
    """Time the products of one shape, each by all its ways.

    Args:
        shape: of the layer.
        dtype: of DTYPES.
        budget_s: seconds for a product.
        products: of `_C.ways()`; None takes all.

    Yields:
        A result for each product that has more than one way at this shape.

    """
    case = make_case(shape, "cpu", DTYPES[dtype], "fwd")
    long_name = str(DTYPES[dtype]).removeprefix("torch.")
    for product, ways in _C.ways().items():
        if products is not None and product not in products:
            continue
        if shape.M > FEW:
            ways = [way for way in ways if way not in ("dots", "stream")]
        run, depth = _operator(product, case)
        with run:
            chosen = _C.way(product, long_name, shape.M, depth, shape.R)
            timers = {way: _timer(product, way, run.call) for way in ways}
            if chosen not in timers:
                continue
            timers[AGAIN] = _timer(product, chosen, run.call)
            samples = interleave(timers, budget_s)
        ms = {way: min(values) for way, values in samples.items()}
        again = ms.pop(AGAIN)
        noise = max(again, ms[chosen]) / min(again, ms[chosen])
        ms[chosen] = min(again, ms[chosen])
        yield Result(dtype, product, shape, chosen, ms, noise)


def wrong_entries(results: Sequence[Result]) -> list[str]:
    """Return a line for each entry of the table that some shape shows to be wrong."""
    found: dict[tuple[str, str], list[Result]] = {}
    for result in results:
        if result.wrong:
            found.setdefault((result.dtype, result.entry), []).append(result)
    lines = []
    for (dtype, entry), wrong in found.items():
        worst = max(wrong, key=lambda result: result.gain)
        value = _C.route(str(DTYPES[dtype]).removeprefix("torch."))[entry]
        alike = [r for r in results if r.dtype == dtype and r.product == worst.product]
        lines.append(
            f"{dtype}: {entry} is {value}, but {worst.product} at {worst.shape} is "
            f"{worst.gain:.2f} times as fast by {worst.best} as by {worst.chosen} "
            f"({len(wrong)} of {len(alike)} shapes)"
        )
    return lines


class _Operator:
    """A call that makes one product, and what is forced around it."""

    def __init__(self, call: Callable[[], object], forced: dict[str, str]) -> None:
        self.call = call
        self._forced = forced
        self._stack = ExitStack()

    def __enter__(self) -> "_Operator":
        for product, way in self._forced.items():
            self._stack.enter_context(forced(product, way))
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()


def _operator(product: str, case: Case) -> tuple[_Operator, int]:
    """Return the operator that makes a product, and what the product sums over."""
    M, K, N, R = case.shape
    x, weight, A, B, dy = case.x, case.weight, case.A, case.B, case.dy
    h, scale = x @ A, case.alpha

    def backward(dx: bool, dweight: bool, adapters: bool) -> Callable[[], object]:
        needs = [dx, dweight, False, adapters, adapters]
        return lambda: _BWD(dy, x, weight, A, B, h, scale, needs)

    forward = lambda: _FWD(x, weight, case.bias, A, B, scale)  # noqa: E731
    alone = lambda: _FWD(x, None, None, A, B, scale)  # noqa: E731
    return {
        "y": (_Operator(forward, {}), K),
        "dx": (_Operator(backward(True, False, False), {}), N),
        "shrink": (_Operator(alone, {}), K),
        "expand": (_Operator(forward, {"y": "library"}), R),
        "gradient": (_Operator(backward(False, False, True), {}), M),
        "dweight": (_Operator(backward(False, True, False), {}), M),
    }[product]


@contextmanager
def forced(product: str, way: str) -> Iterator[None]:
    """Make a product go one way meanwhile."""
    _C.force_way(product, way)
    try:
        yield
    finally:
        _C.force_way(product, None)


def _timer(product: str, way: str, call: Callable[[], object]) -> Callable[[], float]:
    # One thread's own time leaves out what other processes take.
    clock = time.thread_time_ns if torch.get_num_threads() == 1 else time.perf_counter_ns

    def sample_ms(calls: int) -> float:
        with forced(product, way):
            start = clock()
            for _ in range(calls):
                call()
            return (clock() - start) / calls / 1e6

    sample_ms(1)  # the first call is cold
    calls = max(1, math.ceil(SAMPLE_MS / max(sample_ms(1), 1e-3)))
    return lambda: sample_ms(calls)


def _table(results: Sequence[Result], dtype: str) -> Table:
    ways = list(dict.fromkeys(way for result in results for way in result.ms))
    table = Table(title=f"{dtype}: ms by way, the table's with a star")
    for heading in ("product", "M,K,N,R"):
        table.add_column(heading)
    for heading in (*ways, "gain", "noise"):
        table.add_column(heading, justify="right")
    for result in results:
        cells = [
            f"{result.ms[way]:.4f}{'*' if way == result.chosen else ' '}"
            if way in result.ms
            else ""
            for way in ways
        ]
        gain = f"{result.gain:.2f}" if result.gain > 1 else ""
        table.add_row(
            result.product,
            str(result.shape),
            *cells,
            gain,
            f"{result.noise:.2f}",
            style="red" if result.wrong else None,
        )
    return table


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.routes",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--dtype",
        type=names_of("dtype", DTYPES),
        default=["fp32", "bf16"],
        metavar="NAME,...",
        help="of fp32, bf16 and fp16, or all (default fp32,bf16)",
    )
    parser.add_argument("--full", action="store_true", help="the whole CPU grid, some minutes")
    parser.add_argument("--shape", type=shape, action="append", metavar="M,K,N,R")
    parser.add_argument(
        "--products",
        type=names_of("product", _C.ways()),
        metavar="NAME,...",
        help=f"of {', '.join(_C.ways())} (default all)",
    )
    parser.add_argument("--threads", type=positive(int), metavar="N")
    parser.add_argument(
        "--seconds", type=positive(float), default=0.5, help="a product and shape (default 0.5)"
    )
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
