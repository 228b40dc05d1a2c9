"""Simulate a training step of a decoder over thousands of ranks: memory by kind, bytes sent.

A decoder of Llama-70B's shape with LoRA on every linear is laid out by FSDP2 x tensor parallelism
over fake ranks and one step of one rank is traced, with fake tensors: nothing is computed or sent,
and no figure is a measurement. Blocks are alike: three and two of them are traced, and the rest
follow by their difference.
"""

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks import positive, writable
from benchmarks.report import wide_console
from benchmarks.runs import make_header

from .decoder import DecoderShape
from .trace import KINDS, LAYERS, Trace, Traffic, simulate_step

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
RANKS = (8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
CHECKPOINTING = {"none": False, "blocks": True}
TRACED_BLOCKS = 3
# Of an H100 SXM in a DGX H100, from NVIDIA's data sheets: 989 TFLOP/s dense in bf16; NVLink 900
# GB/s, half of it each way; one 400 Gb/s InfiniBand port for each GPU.
FLOPS_PER_MS = 989e9
BYTES_PER_MS = {"tensor": 450e6, "data": 50e6}
LINKS = {"tensor": "nvlink", "data": "infiniband"}
Row = dict[str, Any]


def main(argv: Sequence[str] | None = None) -> int:
    """Trace, print a table with and one without checkpointing; return 0, or 1 if it can't run."""
    argv = sys.argv[1:] if argv is None else argv
    args = _parse(argv)
    header = make_header("cpu", f"python -m benchmarks.scaling {shlex.join(argv)}".rstrip())
    console = wide_console()
    console.print(", ".join(f"{k} {v}" for k, v in header.items() if k != "command"))
    traced = args.shape.layers if args.trace_all else min(TRACED_BLOCKS, args.shape.layers)
    document = {
        "header": header,
        "shape": asdict(args.shape),
        "tp": args.tp,
        "batch": args.batch,
        "sequence": args.sequence,
        "dtype": args.dtype,
        "traced_blocks": traced,
        "rows": [],
    }
    for name, checkpointing in CHECKPOINTING.items():
        rows: list[Row] = []
        for ranks in args.ranks:
            for layer in LAYERS:
                try:
                    trace = step(args, layer, ranks, checkpointing)
                except RuntimeError as error:
                    print(f"simulate: {error}", file=sys.stderr)
                    return 1
                floors = floors_ms(args.shape, args.tp, args.batch, args.sequence, trace, name)
                rows.append(make_row(layer, name, ranks, trace, floors))
        console.print(table(rows, f"activation checkpointing: {name}"))
        document["rows"] += rows
    _print_legend(console, args, traced)
    if args.json:
        args.json.write_text(json.dumps(document, indent=1) + "\n")
    if args.plot:
        from .plot import draw

        draw(document, args.plot)
    return 0


def step(args: argparse.Namespace, layer: str, ranks: int, checkpointing: bool) -> Trace:
    """Return the step of the whole decoder, all its blocks traced or the rest extrapolated."""

    def trace(blocks: int) -> Trace:
        shape = replace(args.shape, layers=blocks)
        sizes = ranks, args.tp, args.batch, args.sequence, DTYPES[args.dtype]
        return simulate_step(shape, layer, *sizes, checkpointing)

    blocks = args.shape.layers
    if args.trace_all or blocks <= TRACED_BLOCKS:
        return trace(blocks)
    return extrapolate(trace(TRACED_BLOCKS - 1), trace(TRACED_BLOCKS), blocks - TRACED_BLOCKS)


def extrapolate(fewer: Trace, more: Trace, blocks: int) -> Trace:
    """Return what `blocks` further blocks make of a trace.

    The first block differs from the others: its input needs no gradient.

    Args:
        fewer: of a decoder with at least two blocks.
        more: of the same with one block more.
        blocks: how many to add to `more`, each by the difference of the two.

    """

    def line(a: int, b: int) -> int:
        return b + blocks * (b - a)

    memory = {kind: line(fewer.memory[kind], size) for kind, size in more.memory.items()}
    traffic = {}
    for key, b in more.traffic.items():
        pairs = zip(asdict(fewer.traffic[key]).values(), asdict(b).values(), strict=True)
        traffic[key] = Traffic(*(line(x, y) for x, y in pairs))
    return Trace(memory, traffic)


def floors_ms(
    shape: DecoderShape, tp: int, batch: int, sequence: int, trace: Trace, checkpointing: str
) -> dict[str, float]:
    """Return the milliseconds that each of three resources needs at least, at its peak.

    Returns:
        `compute` (the arithmetic of one rank at the data sheet's FLOP/s), `nvlink` (what it sends
        to its tensor-parallel group) and `infiniband` (to its data-parallel group), in ms.

    """
    floors = {"compute": step_flops(shape, batch, sequence, checkpointing) / tp / FLOPS_PER_MS}
    for dimension, link in LINKS.items():
        sent = sum(t.sent_bytes for (_, d), t in trace.traffic.items() if d == dimension)
        floors[link] = sent / BYTES_PER_MS[dimension]
    return {name: round(ms, 3) for name, ms in floors.items()}


def step_flops(shape: DecoderShape, batch: int, sequence: int, checkpointing: str) -> int:
    """Return the FLOPs of a step on one data-parallel replica: products and causal attention.

    Frozen weights are multiplied with twice (y and dx), adapters three times (dA and dB too);
    attention's backward is 2.5 times its forward. Checkpointing runs the blocks' forward again.
    """
    tokens = batch * sequence
    embedding = shape.vocabulary * shape.hidden
    frozen = shape.base_parameters - embedding
    forward = 2 * tokens * (frozen + shape.adapter_parameters)
    attention = 2 * shape.layers * batch * sequence**2 * shape.hidden
    total = 2 * forward + 2 * tokens * shape.adapter_parameters + 7 * attention // 2
    if CHECKPOINTING[checkpointing]:
        head = embedding + shape.rank * (shape.hidden + shape.vocabulary)
        total += forward - 2 * tokens * head + attention
    return total


def make_row(
    layer: str, checkpointing: str, ranks: int, trace: Trace, floors: dict[str, float]
) -> Row:
    """Return one row: bytes of one rank, milliseconds of the floors."""
    return {
        "layer": layer,
        "checkpointing": checkpointing,
        "ranks": ranks,
        "memory_bytes": trace.memory,
        "traffic": [
            {"collective": collective, "dimension": dimension, **asdict(traffic)}
            for (collective, dimension), traffic in sorted(trace.traffic.items())
        ],
        "floor_ms": floors,
    }


def table(rows: Sequence[Row], title: str) -> Table:
    """Lay out a line for each number of ranks and layer: MiB held, MiB sent, floors."""
    lines = Table(title=title, title_justify="left")
    pairs = dict.fromkeys((t["collective"], t["dimension"]) for row in rows for t in row["traffic"])
    memory = [*KINDS, "gathered", "peak"]
    headings = [f"{kind}\nMiB" for kind in memory]
    headings += [f"{collective}\n{dimension}, MiB" for collective, dimension in pairs]
    headings += [f"{name}\nfloor ms" for name in rows[0]["floor_ms"]]
    lines.add_column("ranks", justify="right")
    lines.add_column("layer", no_wrap=True)
    for heading in headings:
        lines.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        sent = {(t["collective"], t["dimension"]): t["sent_bytes"] for t in row["traffic"]}
        sizes = [row["memory_bytes"][kind] for kind in memory] + [sent.get(p, 0) for p in pairs]
        cells = [f"{size / 2**20:,.1f}" for size in sizes]
        cells += [f"{ms:,.0f}" for ms in row["floor_ms"].values()]
        lines.add_row(f"{row['ranks']:,}", row["layer"], *cells)
    return lines


def _print_legend(console: Console, args: argparse.Namespace, traced: int) -> None:
    blocks = args.shape.layers
    how = "all traced" if traced == blocks else f"{traced - 1} and {traced} traced, rest linear"
    for line in (
        f"{blocks} blocks ({how}); {args.ranks[0]} to {args.ranks[-1]} ranks, tensor parallel "
        f"{args.tp}; {args.batch} x {args.sequence} tokens on a data-parallel rank; {args.dtype}",
        "memory of one rank; peak: the most held at any time, with what is gathered and temporary",
        "collectives: bytes that one rank sends over a ring, (n - 1) / n of the message, twice "
        "that for all_reduce",
        "floors: arithmetic and bytes at an H100 data sheet's peaks; calculated, not measured",
    ):
        console.print(line, highlight=False)


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.scaling", description=__doc__.partition("\n")[0]
    )
    add, count, llama = parser.add_argument, positive(int), DecoderShape()
    add("--ranks", type=_ranks, default=list(RANKS), metavar="N,...", help="default: 8 to 4096")
    add("--tp", type=count, default=8, metavar="N", help="tensor-parallel ranks (default 8)")
    for name, size in asdict(llama).items():
        option = f"--{name.replace('_', '-')}"
        add(option, type=count, default=size, metavar="N", help=f"default {size}")
    add("--sequence", type=count, default=4096, metavar="N", help="tokens (default 4096)")
    add("--batch", type=count, default=1, metavar="N", help="sequences on each data rank")
    add("--dtype", choices=tuple(DTYPES), default="bf16")
    add("--trace-all", action="store_true", help="trace every block, extrapolate none")
    add("--json", type=writable, metavar="FILE", help="write the rows there")
    add("--plot", type=writable, metavar="FILE", help="write a PNG there")
    args = parser.parse_args(argv)
    args.shape = DecoderShape(**{name: getattr(args, name) for name in asdict(llama)})
    if args.hidden % args.heads:
        parser.error(f"--hidden must be a multiple of --heads {args.heads}, got {args.hidden}")
    if args.heads % args.kv_heads:
        parser.error(f"--heads must be a multiple of --kv-heads {args.kv_heads}, got {args.heads}")
    for name in ("heads", "kv_heads", "ffn", "vocabulary", "sequence", "ranks"):
        sizes = getattr(args, name)
        for size in sizes if name == "ranks" else [sizes]:
            if size % args.tp:
                option = f"--{name.replace('_', '-')}"
                parser.error(f"{option} must be a multiple of --tp {args.tp}, got {size}")
    return args


def _ranks(text: str) -> list[int]:
    return sorted(set(map(positive(int), text.split(","))))
