"""Take one training step of every way apart: its kernels' times, then the host's.

The kernels are named by torch.profiler, in microseconds a step. The host's time is that of a small
layer, whose kernels take less than their launches. With --device cpu and TRITON_INTERPRET=1 the
same code runs without a GPU, over PyTorch's operators; its times then mean nothing.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from .. import DTYPES, MODES, Shape, device_here, make_case, names_of, positive, shape, writable
from ..bases import Unavailable
from ..providers import PROVIDERS

WAYS = [name for name in PROVIDERS if name.startswith("triton.")]
WAYS = ["linear", "reference", "addmm", "lora_ext", "cpp", "cpp.own_base", *WAYS]
_PROFILED = Shape(8192, 4096, 4096, 16)
_SMALL = Shape(16, 256, 256, 16)
_STEPS = 5
_SHOWN = 12  # kernels of a step
Row = dict[str, Any]


def main(argv: Sequence[str] | None = None) -> int:
    """Print both parts for each provider; return 0, or 1 if one failed."""
    args = _parse(argv)
    rows: list[Row] = []
    for name in args.providers:
        for part in args.parts:
            try:
                found = list(PARTS[part](name, args))
            except Unavailable as reason:
                found = [{"provider": name, "part": part, "not_here": str(reason)}]
            except Exception as error:  # of whatever kind: the other ways are measured
                reason = f"{type(error).__name__}: {error}".partition("\n")[0]
                found = [{"provider": name, "part": part, "failed": reason}]
            for row in found:
                rows.append(row)
                print(_line(row), flush=True)
            if args.json:
                args.json.write_text(json.dumps({"rows": rows}, indent=1) + "\n")
    return int(any("failed" in row for row in rows))


def kernels(name: str, args: argparse.Namespace) -> Iterator[Row]:
    """Yield the microseconds a step of each kernel, the longest first, and how often it runs."""
    case = make_case(args.shape, args.device, DTYPES[args.dtype], "fwd_bwd")
    step = PROVIDERS[name](case)
    for _ in range(2):
        step.run()  # compiled, and measured where it measures
    on_gpu = args.device == "cuda"
    activity = ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU
    if on_gpu:
        torch.cuda.synchronize()
    with profile(activities=[activity]) as profiler:
        for _ in range(_STEPS):
            step.run()
        if on_gpu:
            torch.cuda.synchronize()
    used = [
        (event.self_device_time_total if on_gpu else event.self_cpu_time_total, event)
        for event in profiler.key_averages()
    ]
    used.sort(key=lambda pair: -pair[0])
    yield {"provider": name, "part": "kernels", "us": sum(us for us, _ in used) / _STEPS}
    for us, event in used[:_SHOWN]:
        if us > 0:
            row = {"provider": name, "part": "kernels", "kernel": event.key}
            yield row | {"us": us / _STEPS, "times": event.count / _STEPS}


def host(name: str, args: argparse.Namespace) -> Iterator[Row]:
    """Yield the microseconds from one call to the next of a small layer, which runs eagerly."""
    for mode in MODES:
        case = make_case(args.small, args.device, DTYPES[args.dtype], mode)
        run = PROVIDERS[name](case).run
        with torch.set_grad_enabled(case.training):
            best = float("inf")
            for _ in range(6):  # the first warms, and the best of the others counts
                start = time.perf_counter()
                for _ in range(args.calls):
                    run()
                best = min(best, (time.perf_counter() - start) / args.calls)
                if args.device == "cuda":
                    torch.cuda.synchronize()
        yield {"provider": name, "part": "host", "mode": mode, "us": best * 1e6}


PARTS = {"kernels": kernels, "host": host}


def _line(row: Row) -> str:
    if why := row.get("failed") or row.get("not_here"):
        return f"{row['provider']:20} {row['part']:8} {why}"
    if "kernel" in row:
        return f"  {row['us']:12.1f} us  {row['times']:4.3g} times  {row['kernel'][:120]}"
    return (
        f"{row['provider']:20} {row['part']:8} {row.get('mode', 'a step'):8} {row['us']:10.1f} us"
    )


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu.steps", description=__doc__.partition("\n")[0]
    )
    add = parser.add_argument
    add("--device", type=device_here, choices=("cpu", "cuda"), default="cuda")
    add("--dtype", choices=tuple(DTYPES), default="bf16")
    add("--shape", type=shape, default=_PROFILED, metavar="M,K,N,R", help=f"default {_PROFILED}")
    add("--small", type=shape, default=_SMALL, metavar="M,K,N,R", help="the host's, see above")
    add("--calls", type=positive(int), default=100, metavar="N", help="of the host's time")
    add("--parts", type=names_of("part", PARTS), default=list(PARTS), metavar="NAME,...")
    add("--providers", type=names_of("provider", PROVIDERS), default=WAYS, metavar="NAME,...")
    add("--json", type=writable, metavar="FILE", help="write the rows there")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
