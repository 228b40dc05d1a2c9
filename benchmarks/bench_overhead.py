"""Host time of small calls: by layer of the stack, and by way of calling, with the Python it takes.

The first table's lines each do what the one above does and add their own layer: an operator that
gets no rows (dispatch, its check of the arguments, its results), the kernel, the functional call,
the module. The second counts the frames of lora_ext that a call goes through, and their files.
Both use what is public alone, so that one program measures two versions of the library.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from rich.table import Table
from torch import Tensor, nn

import lora_ext

from .report import wide_console
from .runs import make_header
from .timing import cpu_timer, interleave, summarize

PEERS = ("F.linear", "plain layer")
ALPHA = 0.75
SMALL = (1, 64, 64, 8)  # M, K, N, R: 17,000 operations, 0.3 us: what is measured is not arithmetic
PARALLEL = (16, 64, 64, 8)
MODES = ("fwd", "fwd_bwd")
PACKAGE = os.path.dirname(lora_ext.__file__) + os.sep
Run = Callable[[], Any]
Row = dict[str, Any]


class Inputs(NamedTuple):
    """x (M, K), weight (N, K), bias (N,), A (K, R), B (R, N), dy (M, N)."""

    x: Tensor
    weight: Tensor
    bias: Tensor
    A: Tensor
    B: Tensor
    dy: Tensor


def make_inputs(
    shape: Sequence[int] = SMALL, learns: bool = True, dtype: torch.dtype = torch.float32
) -> Inputs:
    """Draw the inputs; x, A and B require a gradient if one `learns`."""
    M, K, N, R = shape
    g = torch.Generator().manual_seed(0)
    shapes = ((M, K), (N, K), (N,), (K, R), (R, N), (M, N))
    drawn = Inputs(*((torch.randn(*size, generator=g) / 8).to(dtype) for size in shapes))
    for t in (drawn.x, drawn.A, drawn.B):
        t.requires_grad_(learns)
    return drawn


def layers(mode: str, shape: Sequence[int] = SMALL) -> dict[str, Run]:
    """Return a call by name: the peers, then the layers of the stack from the inside out."""
    inputs = make_inputs(shape, learns=mode == "fwd_bwd")
    x, weight, bias, A, B, _ = inputs
    layer = make_layer(inputs)
    plain = lambda: F.linear(x, weight, bias) + ALPHA * (x @ A @ B)  # noqa: E731
    return {
        "F.linear": _step(lambda: F.linear(x, weight, bias), (x,), inputs.dy),
        "plain layer": _step(plain, (x, A, B), inputs.dy),
        "dispatch": _operators(inputs, rows=0),
        "kernel": _operators(inputs, rows=len(x)),
        "functional": _step(
            lambda: lora_ext.lora_linear(x, weight, bias, A, B, ALPHA), (x, A, B), inputs.dy
        ),
        "module": _step(lambda: layer(x), (x, layer.lora.A, layer.lora.B), inputs.dy),
    }


def make_layer(inputs: Inputs, **options: Any) -> lora_ext.LinearWithLoRA:
    """Return the layer of these inputs, its base frozen."""
    (N, K), R, dtype = inputs.weight.shape, len(inputs.B), inputs.x.dtype
    linear = nn.Linear(K, N, dtype=dtype).requires_grad_(False)
    layer = lora_ext.LinearWithLoRA(linear, R, ALPHA, dtype=dtype, **options)
    own = (linear.weight, linear.bias, layer.lora.A, layer.lora.B)
    for parameter, value in zip(own, inputs[1:5], strict=True):
        parameter.data = value.detach().clone()
    return layer


def _step(forward: Callable[[], Tensor], wanted: Sequence[Tensor], dy: Tensor) -> Run:
    """Return the forward, and where a gradient is wanted the backward."""
    if not wanted[0].requires_grad:
        return forward
    return lambda: torch.autograd.grad(forward(), wanted, dy)


def _operators(inputs: Inputs, rows: int) -> Run:
    ops = torch.ops.lora_ext  # the older version names them otherwise
    old = hasattr(ops, "lora_linear_fwd")
    fwd, bwd = (
        (ops.lora_linear_fwd, ops.lora_linear_bwd) if old else (ops.linear_fwd, ops.linear_bwd)
    )
    x, weight, bias, A, B, dy = (t.detach() for t in inputs)
    x, dy, h, needs = x[:rows], dy[:rows], (x @ A)[:rows], (True, False, False, True, True)
    if not inputs.x.requires_grad:
        return lambda: fwd.default(x, weight, bias, A, B, ALPHA)

    @torch.no_grad()
    def both() -> Sequence[Tensor]:
        fwd.default(x, weight, bias, A, B, ALPHA)
        dx, _, _, dA, dB = bwd.default(dy, x, weight, A, B, h, ALPHA, needs)
        return dx, dA, dB

    return both


def ways() -> Iterator[tuple[str, Run]]:
    """Yield the ways of calling by name, each ready to run."""
    inputs = make_inputs()
    x, dy, layer = inputs.x, inputs.dy, make_layer(inputs)
    low = (x, layer.lora.A, layer.lora.B)
    yield "forward", _forward(torch.float32)
    yield "step", _step(lambda: layer(x), low, dy)

    def autocast() -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            y = layer(x)
        return torch.autograd.grad(y, low, half)

    half = dy.bfloat16()
    yield "autocast step", autocast
    dropped = make_layer(inputs, dropout=0.1)
    wanted = (x, dropped.lora.A, dropped.lora.B)
    yield "dropout step", _step(lambda: dropped(x), wanted, dy)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):  # what is prepacked here
        if (run := _forward(dtype, prepacked=True)) is not None:
            yield f"prepacked forward, {str(dtype).removeprefix('torch.')}", run
            break
    yield "PEFT step", _peft_step(inputs)
    yield "tensor-parallel forward", _parallel(learns=False)
    yield "tensor-parallel step", _parallel(learns=True)


def _forward(dtype: torch.dtype, *, prepacked: bool = False) -> Run | None:
    """Return a forward of which nothing needs a gradient; None if the weight is left as it is."""
    inputs = make_inputs(learns=False, dtype=dtype)
    layer = make_layer(inputs).requires_grad_(False)
    if prepacked and lora_ext.prepack_(layer).left:
        return None
    return lambda: layer(inputs.x)


def _peft_step(inputs: Inputs) -> Run:
    import peft

    from lora_ext.integrations.peft import accelerate

    _, K, N, R = SMALL
    config = peft.LoraConfig(r=R, lora_alpha=ALPHA * R, target_modules=["0"])
    model = peft.get_peft_model(nn.Sequential(nn.Linear(K, N)), config)
    accelerate(model)
    layer = model.base_model.model[0]
    wanted = (inputs.x, layer.lora_A["default"].weight, layer.lora_B["default"].weight)
    return _step(lambda: layer(inputs.x), wanted, inputs.dy)


def _parallel(*, learns: bool) -> Run:
    from torch.distributed.tensor.parallel import parallelize_module

    from lora_ext.distributed import LoRAColwiseParallel

    inputs = make_inputs(PARALLEL, learns)
    mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
    layer = parallelize_module(make_layer(inputs), mesh, LoRAColwiseParallel())
    if not learns:
        layer.requires_grad_(False)
    wanted = (inputs.x, layer.lora.A, layer.lora.B)
    return _step(lambda: layer(inputs.x), wanted, inputs.dy)


def count(run: Run) -> dict[str, Any]:
    """Return what Python of lora_ext a call goes through.

    Returns:
        `calls` (frames entered, those of comprehensions too before Python 3.12), `deepest` (of them
        inside each other), and the `files` that they are in.

    """
    files: dict[str, None] = {}
    calls = depth = deepest = 0

    def profile(frame: FrameType, event: str, _: Any) -> None:
        nonlocal calls, depth, deepest
        path = frame.f_code.co_filename
        if event in ("call", "return") and path.startswith(PACKAGE):
            depth += 1 if event == "call" else -1
            if event == "call":
                files[path.removeprefix(PACKAGE)] = None
                calls, deepest = calls + 1, max(deepest, depth)

    sys.setprofile(profile)
    try:
        run()
    finally:
        sys.setprofile(None)
    return {"calls": calls, "deepest": deepest, "files": list(files)}


def measure(runs: dict[str, Run], budget_s: float) -> dict[str, dict[str, float]]:
    """Time calls, interleaved; by name the median, p20 and p80 in microseconds."""
    for run in runs.values():
        run()
    samples = interleave({name: cpu_timer(run) for name, run in runs.items()}, budget_s)
    return {
        name: {f"us_{key}": round(1e3 * ms, 2) for key, ms in summarize(of)._asdict().items()}
        for name, of in samples.items()
    }


def table_of_layers(rows: Sequence[Row], title: str) -> Table:
    """Lay out the rows of a mode; "added" is what a layer of the stack adds to the one inside."""
    lines = _table(title, "", "us", "p20 to p80", "added")
    inside = None
    for row in rows:
        own = "" if inside is None else f"{row['us_median'] - inside:+.1f}"
        lines.add_row(row["layer"], *_times(row), own)
        inside = None if row["layer"] in PEERS else row["us_median"]
    return lines


def table_of_ways(rows: Sequence[Row]) -> Table:
    """Lay out a line a way: its Python files and calls, and its time."""
    title = f"M,K,N,R {SMALL}, tensor parallel {PARALLEL}, float32 but where said"
    lines = _table(title, "", "files", "calls", "deepest", "us", "p20 to p80")
    for row in rows:
        counts = (len(row["files"]), row["calls"], row["deepest"])
        lines.add_row(row["way"], *map(str, counts), *_times(row))
    return lines


def _table(title: str, *headings: str) -> Table:
    lines = Table(title=title, title_justify="left")
    for heading in headings:
        lines.add_column(heading, justify="right" if heading else "left", no_wrap=True)
    return lines


def _shape(text: str) -> tuple[int, ...]:
    sizes = tuple(int(part) for part in text.split(",") if part.strip().isdecimal())
    if len(sizes) != 4 or min(sizes) < 1:
        raise argparse.ArgumentTypeError(f"must be four integers M,K,N,R, got {text!r}")
    return sizes


def _times(row: Row) -> tuple[str, str]:
    return f"{row['us_median']:.1f}", f"{row['us_p20']:.1f} to {row['us_p80']:.1f}"


def main(argv: Sequence[str] | None = None) -> int:
    """Print, and with --json write, both tables; return 0."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.bench_overhead", description=__doc__.partition("\n")[0]
    )
    help_ = "of the layers (default 1,64,64,8); the ways have fixed ones"
    parser.add_argument("--shape", type=_shape, default=SMALL, metavar="M,K,N,R", help=help_)
    parser.add_argument("--seconds", type=float, default=5.0, help="for each table (default 5)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    header = make_header("cpu", "python -m benchmarks.bench_overhead")
    header.setdefault("instruction_set", torch.backends.cpu.get_cpu_capability())
    if forced := os.environ.get("LORA_EXT_CPU_ISA"):
        header["LORA_EXT_CPU_ISA"] = forced
    console, rows = wide_console(), []
    console.print(", ".join(f"{k} {v}" for k, v in header.items() if k != "command"))
    for mode in MODES:
        with torch.set_grad_enabled(mode == "fwd_bwd"):
            times = measure(layers(mode, args.shape), args.seconds)
        sizes = dict(zip("MKNR", args.shape, strict=True))
        shown = [{"mode": mode, **sizes, "layer": name} | by for name, by in times.items()]
        console.print(table_of_layers(shown, f"{mode} {args.shape} float32, us a call"))
        rows += shown
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    runs = dict(ways())
    times = measure(runs, args.seconds)
    by_way = [{"way": name} | count(run) | times[name] for name, run in runs.items()]
    dist.destroy_process_group()
    console.print(table_of_ways(by_way))
    if args.json:
        document = {"header": header, "rows": rows, "ways": by_way}
        args.json.write_text(json.dumps(document, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
