"""Measure what a card reaches, then climb from cuBLAS to our forward, a step of the work at a time.

What a first minute on a GPU should tell: the rate of a copy and of a product with the clocks under
them, and how much each part of a Triton forward adds to the bare product. Each line is printed as
soon as it is measured. With --device cpu and TRITON_INTERPRET=1 the same code runs without a GPU;
its times then mean nothing.
"""

import argparse
import json
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F

from lora_ext.backends import triton as backend
from lora_ext.backends.triton import operators
from lora_ext.backends.triton.regimes import REGIMES

from .. import DTYPES, Case, Shape, device_here, flops, make_case, positive, shape, writable
from ..timing import measure

_FIRST = Shape(8192, 4096, 4096, 16)
_COPIED_BYTES = 1 << 30
_CLOCKS = "clocks.sm,clocks.max.sm,clocks.mem,power.draw,temperature.gpu"
# What makes a launch start while the one before it runs; without it they run one after the other.
_JOINED = ("launch_pdl", "DEPENDENT")
Run = Callable[[], object]
Row = dict[str, Any]


def main(argv: Sequence[str] | None = None) -> int:
    """Print the rates and the ladder; return 0, or 1 if a rung could not be measured."""
    args = _parse(argv)
    rows: list[Row] = []
    for row in (*_stages(args),):
        for found in row():
            rows.append(found)
            print(_line(found), flush=True)
            if args.json:
                document = {"device": _name(args.device), "rows": rows}
                args.json.write_text(json.dumps(document, indent=1) + "\n")
    return int(any("failed" in row for row in rows))


def _stages(args: argparse.Namespace) -> list[Callable[[], Iterator[Row]]]:
    case = make_case(args.shape, args.device, DTYPES[args.dtype], "fwd")
    return [
        partial(rates, case, args.device, args.seconds),
        partial(ladder, case, args.device, args.seconds),
    ]


def rates(case: Case, device: str, seconds: float) -> Iterator[Row]:
    """Yield a copy's GB/s and a product's TFLOP/s, and the clocks (MHz), W and °C under each."""
    size = _COPIED_BYTES if device == "cuda" else 1 << 20
    source, target = (torch.empty(size, dtype=torch.int8, device=device) for _ in range(2))
    M, K, N, _ = case.shape
    for name, run, rate in (
        ("copy", partial(target.copy_, source), lambda ms: {"gb_s": 2 * size / ms / 1e6}),
        (
            "cuBLAS",
            partial(F.linear, case.x, case.weight),
            lambda ms: {"tflops": 2 * M * K * N / ms / 1e9},
        ),
    ):
        run()
        with _Clocks(device) as clocks:
            times, failed = measure({name: run}, device, seconds)
        if name in times:
            ms = times[name].median
            yield {"rate": name, "ms": ms, **rate(ms), **clocks.seen}
        else:
            yield {"rate": name, "failed": failed[name]}


def ladder(case: Case, device: str, seconds: float) -> Iterator[Row]:
    """Yield the time of each rung, ms, and over that of the bare product; all take turns."""
    ready: dict[str, Run] = {}
    for name, make in rungs(case):
        try:
            run = make()
            if run is None:
                continue
            run()
            ready[name] = run
        except Exception as error:  # of whatever kind: the other rungs are measured
            yield {"rung": name, "failed": f"{type(error).__name__}: {error}".partition("\n")[0]}
    times, failed = measure(ready, device, seconds * len(ready))
    yield from ({"rung": name, "failed": reason} for name, reason in failed.items())
    for name, time in times.items():
        over = time.median / times["F.linear"].median
        rate = flops(case.shape, "fwd", lora="no LoRA" not in name and name != "F.linear")
        tflops = rate / time.median / 1e9
        yield {"rung": name, "ms": time.median, "over": over, "tflops": tflops}


def rungs(case: Case) -> Iterator[tuple[str, Callable[[], Run | None]]]:
    """Yield the rungs' names, and what makes each; None where this card has no such way.

    Of a regime with a launch of h before its base product: that launch without the low-rank part
    (R = 0), with it but not h's, all launches one after the other, and as the regime has them.
    """
    x, weight, bias, A, B, alpha = case.x, case.weight, case.bias, case.A, case.B, case.alpha
    yield "F.linear", lambda: lambda: F.linear(x, weight, bias)
    yield (
        "F.linear, then addmm_",
        lambda: lambda: F.linear(x, weight, bias).addmm_(x @ A, B, alpha=alpha),
    )
    if find_spec("triton") is None:
        return
    for name in ("two_launches", "persistent"):
        if name not in REGIMES["forward"]:
            continue
        launched: list[tuple] = []
        for rung, part in (
            ("our GEMM, no LoRA", _without_lora),
            ("with the epilogue", _last),
            ("with h's launch, one after the other", _serial),
            ("as it is", _joined),
        ):
            yield f"{name}: {rung}", partial(_of_regime, name, case, launched, part)
    for name in ("in_loop", "torch_base"):
        if name in REGIMES["forward"]:
            yield name, partial(_of_regime, name, case, [], _joined)


def _of_regime(
    name: str, case: Case, launched: list[tuple], part: Callable[[list[tuple]], list[tuple] | None]
) -> Run | None:
    """Return a part of a regime's launches; with what they allocate, they are recorded once."""
    if not _takes(name, case):
        return None
    whole = partial(_forward, name, case)
    if not launched:
        launched += recorded(whole)
    chosen = part(launched)
    if chosen is None:
        return None
    if chosen is launched:
        return whole
    launch = _launches().launch

    def run() -> None:
        for one in chosen:
            launch(*one)

    return run


def recorded(run: Run) -> list[tuple]:
    """Return the Triton launches of a call, which is run: (kernel, grid, arguments) of each."""
    found: list[tuple] = []
    launch = _launches().launch

    def record(*one: Any) -> None:
        found.append(one)
        launch(*one)

    with mock.patch.object(_launches(), "launch", record):
        run()
    return found


def _without_lora(launched: list[tuple]) -> list[tuple]:
    kernel, grid, arguments = _serial(launched)[-1]
    return [(kernel, grid, arguments | {"R": 0})]


def _last(launched: list[tuple]) -> list[tuple]:
    return _serial(launched)[-1:]


def _serial(launched: list[tuple]) -> list[tuple]:
    return [
        (kernel, grid, arguments | {name: False for name in _JOINED if name in arguments})
        for kernel, grid, arguments in launched
    ]


def _joined(launched: list[tuple]) -> list[tuple]:
    return launched


def _forward(name: str, case: Case) -> object:
    with backend.regime(forward=name):
        return operators.linear_fwd(case.x, case.weight, case.bias, case.A, case.B, case.alpha)


def _takes(name: str, case: Case) -> bool:
    tuning = import_module("lora_ext.backends.triton.tuning")
    call = tuning.Forward(case.x, case.weight, case.bias, case.A, case.B, case.alpha, None)
    card = tuning.card_of(case.x.device)
    return bool(REGIMES["forward"][name].tiles(tuning.forward_problem(call), card))


def _launches() -> Any:
    """Return the module that all Triton launches pass."""
    return import_module("lora_ext.backends.triton.launches")


class _Clocks:
    """What nvidia-smi says while a block runs, the highest of each: it falls when a load ends."""

    def __init__(self, device: str):
        self.seen: dict[str, float] = {}
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._watched = device == "cuda"

    def __enter__(self) -> "_Clocks":
        if self._watched:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        if self._watched:
            self._thread.join(5)

    def _watch(self) -> None:
        command = ["nvidia-smi", f"--query-gpu={_CLOCKS}", "--format=csv,noheader,nounits"]
        while not self._ended.wait(0.1):
            try:
                said = subprocess.run(command, capture_output=True, text=True, timeout=4).stdout
                for name, value in zip(
                    _CLOCKS.split(","), said.split("\n")[0].split(","), strict=True
                ):
                    self.seen[name] = max(self.seen.get(name, 0.0), float(value))
            except (OSError, ValueError, subprocess.SubprocessError):
                return  # no nvidia-smi, or one that knows less


def _line(row: Row) -> str:
    name = row.get("rung") or row["rate"]
    figures = [f"{k} {v:.4g}" for k, v in row.items() if isinstance(v, float)]
    return f"{name:55} {row.get('failed') or '   '.join(figures)}"


def _name(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else "cpu"


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu.ladder", description=__doc__.partition("\n")[0]
    )
    add = parser.add_argument
    add("--device", type=device_here, choices=("cpu", "cuda"), default="cuda")
    add("--dtype", choices=tuple(DTYPES), default="bf16")
    add("--shape", type=shape, default=_FIRST, metavar="M,K,N,R", help=f"default {_FIRST}")
    add("--seconds", type=positive(float), default=1.0, metavar="S", help="of each figure")
    add("--json", type=writable, metavar="FILE", help="write the rows there")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
