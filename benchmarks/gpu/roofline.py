"""Estimate, without a GPU, what each way to run an adapted layer moves and computes on each card.

Bytes and FLOPs are those of costs.py: a tensor counts once for each kernel that reads or writes
it, FLOPs with the padding of tiles. A floor is what follows from the card's data sheet alone: each
kernel takes at least the longer of its bytes at peak bandwidth and of its FLOPs at peak rate. No
figure here is a measurement.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from lora_ext.backends.triton import costs, regimes
from lora_ext.backends.triton.cards import KNOWN, Card
from lora_ext.backends.triton.costs import Kernel, Problem
from lora_ext.backends.triton.regimes import REGIMES

from .. import GRIDS, Shape

# PyTorch's dtype as the model sees it: kind of product, bytes an element.
DTYPES = {"bf16": ("half", 2), "fp16": ("half", 2), "tf32": ("tf32", 4), "fp32": ("fp32", 4)}


def main(argv: Sequence[str] | None = None) -> int:
    """Print a table for each card and direction; return 0."""
    args = _parse(argv)
    rows = [
        row
        for card in args.cards
        for direction in REGIMES
        for shape in GRIDS["cuda"]["standard"]
        for row in estimate(shape, card, args.dtype, direction)
    ]
    console = Console()
    if not console.is_terminal:
        console = Console(width=260)
    for card in args.cards:
        for direction in REGIMES:
            console.print(_table(rows, card, args.dtype, direction))
    console.print(
        "* picked by the library   MB moved / GFLOP / floor in µs / predicted time over "
        "that of the base product alone; estimated, not measured"
    )
    if args.json:
        args.json.write_text(json.dumps({"dtype": args.dtype, "rows": rows}, indent=1) + "\n")
    return 0


def estimate(shape: Shape, card: str, dtype: str, direction: str) -> Iterator[dict[str, Any]]:
    """Yield a row for the plain layer and for each regime that can run a shape.

    Args:
        shape: M, K, N, R.
        card: a name of cards.KNOWN.
        dtype: of DTYPES; A and B have it too.
        direction: "forward", or "backward" for dx, dA and dB.

    Returns:
        `card`, `direction`, M, K, N, R, `regime`, `tile` ([BLOCK_M, BLOCK_N, BLOCK_K], None for the
        plain layer), `bytes`, `flops`, `launches`, `floor_us`, `model_us` (what its cost comes
        to), `over_bare` (that over the base product's alone, PyTorch's) and whether the library
        `picked` it. Of a regime's tiles, the one that it would choose.

    """
    kind, size = DTYPES[dtype]
    p = Problem(*shape, kind, size, size, has_bias=direction == "forward")
    c = KNOWN[card]
    picked = regimes.candidates(direction, p.bucketed(), c)[0]
    for name, regime in REGIMES[direction].items():
        ways = [(regime.cost(p, tile, c), tile) for tile in regime.tiles(p, c)]
        if not ways:
            continue
        if name == picked.name:
            kernels, tile = next(way for way in ways if way[1] == picked.tile)
        else:
            kernels, tile = min(ways, key=lambda way: costs.time_us(way[0], c, kind))
        yield {
            "card": card,
            "direction": direction,
            **shape._asdict(),
            "regime": name,
            "tile": [tile.block_m, tile.block_n, tile.block_k] if name != "plain" else None,
            "bytes": costs.bytes_of(kernels),
            "flops": sum(kernel.flops for kernel in kernels),
            "launches": len(kernels),
            "floor_us": round(floor_us(kernels, c, kind), 3),
            "model_us": round(costs.time_us(kernels, c, kind), 3),
            "over_bare": round(costs.time_us(kernels, c, kind) / bare_us(p, c, direction), 3),
            "picked": name == picked.name,
        }


def bare_us(p: Problem, card: Card, direction: str) -> float:
    """Return what the cost model gives F.linear, or a backward's dx = dy @ weight, alone."""
    of = p.bytes
    moved = of.x + of.weight + of.y + (of.bias if direction == "forward" else 0)
    return Kernel(moved, 2 * p.M * p.N * p.K).time_us(card, p.kind)


def floor_us(kernels: list[Kernel], card: Card, kind: str) -> float:
    """Return the microseconds that kernels take at least, at the data sheet's two peaks.

    Joined kernels run at the same time: their bytes and FLOPs are one kernel's.
    """
    bytes_per_us = card.bandwidth_gbs * 1e3
    flops_per_us = card.flops_per_us(kind) / card.reached_flops
    together = costs.together(kernels)
    return sum(max(k.bytes / bytes_per_us, k.flops / flops_per_us) for k in together)


def _table(rows: Sequence[dict[str, Any]], card: str, dtype: str, direction: str) -> Table:
    table = Table(title=f"{KNOWN[card].name}, {dtype}, {direction}", title_justify="left")
    columns = tuple(REGIMES[direction])
    table.add_column("M,K,N,R", no_wrap=True)
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    cells: dict[Shape, dict[str, str]] = {}
    for row in rows:
        if (row["card"], row["direction"]) == (card, direction):
            shape = Shape(*(row[name] for name in Shape._fields))
            mark = "* " if row["picked"] else ""
            megabytes, gigaflops = row["bytes"] / 1e6, row["flops"] / 1e9
            text = f"{mark}{megabytes:.4g} / {gigaflops:.4g} / {row['floor_us']:.4g}"
            text += f" / {row['over_bare']:.3f}"
            cells.setdefault(shape, {})[row["regime"]] = text
    for shape, texts in cells.items():
        table.add_row(str(shape), *(texts.get(name, "-") for name in columns))
    return table


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu.roofline", description=__doc__.partition("\n")[0]
    )
    add = parser.add_argument
    add("--cards", type=_cards, default=list(KNOWN), metavar="NAME,...", help=", ".join(KNOWN))
    add("--dtype", choices=tuple(DTYPES), default="bf16")
    add("--json", type=Path, metavar="FILE", help="write the rows there")
    return parser.parse_args(argv)


def _cards(text: str) -> list[str]:
    names = text.split(",")
    if unknown := [name for name in names if name not in KNOWN]:
        raise argparse.ArgumentTypeError(f"no card {unknown[0]!r}, there are: {', '.join(KNOWN)}")
    return names


if __name__ == "__main__":
    sys.exit(main())
