"""Time the host side of the Triton backend, its launches dropped: no GPU is asked.

python -m tests.gpu.host_time prints, for each regime, the microseconds of a warm forward and
backward in our own Python, and with Triton's own part of a launch up to its compiled launcher.
"""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from unittest import mock

import torch
from triton.compiler.compiler import CompiledKernel
from triton.runtime import driver

from lora_ext.backends import triton as backend
from lora_ext.backends.triton import cards, launches, operators, tuning
from lora_ext.backends.triton.costs import Problem
from lora_ext.backends.triton.regimes import REGIMES
from tests.gpu.codegen import StandInDriver

H100 = cards.KNOWN["H100"]
NEEDS = (True, False, False, True, True)
SHAPES = ((16, 4096, 4096, 16), (2048, 4096, 4096, 16))


@contextlib.contextmanager
def stand_in(with_triton: bool) -> Iterator[None]:
    """Meta tensors take the way of an H100's: no launch, or none but Triton's own part of it."""
    with contextlib.ExitStack() as stack:
        for where, name, value in (
            (tuning, "card_of", lambda device: H100),
            (tuning, "may_measure", lambda: True),
            (operators, "current", lambda device: contextlib.nullcontext()),
            (driver, "_active", StandInDriver("sm_90")),
            (CompiledKernel, "run", property(lambda self: lambda *arguments: None)),
            (CompiledKernel, "_init_handles", lambda self: None),
        ):
            stack.enter_context(mock.patch.object(where, name, value))
        if not with_triton:
            stack.enter_context(
                mock.patch.object(launches, "launch", lambda kernel, grid, arguments: None)
            )
        yield


def calls(M: int, K: int, N: int, R: int) -> tuple[Callable[[], object], Callable[[], object]]:
    """Return a forward and a backward of meta tensors, as the operators' kernels run them."""

    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.bfloat16, device="meta")

    x, weight, bias, A, B = empty(M, K), empty(N, K), empty(N), empty(K, R), empty(R, N)
    dy, h = empty(M, N), empty(M, R)
    return (
        lambda: operators.linear_fwd(x, weight, bias, A, B, 0.5),
        lambda: operators.linear_bwd(dy, x, weight, A, B, h, 0.5, NEEDS),
    )


def time_us(run: Callable[[], object], calls: int = 400, rounds: int = 9) -> float:
    """Return the microseconds of a warm call: the best of rounds, which other work only adds to."""
    for _ in range(50):
        run()
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        for _ in range(calls):
            run()
        times.append((time.perf_counter() - start) / calls)
    return 1e6 * min(times)


def main() -> int:
    """Print a line a shape and regime; return 0."""
    torch.set_num_threads(1)
    print(f"{'M,K,N,R':18} {'direction':9} {'regime':13} {'ours':>6} {'with Triton':>12}  us")
    for shape in SHAPES:
        for i, direction in enumerate(("forward", "backward")):
            for name in REGIMES[direction]:
                # PyTorch's products, shape rules of their own for meta tensors, would be timed too.
                if name in ("torch_base", "addmm", "plain"):
                    continue
                if not REGIMES[direction][name].tiles(Problem(*shape), H100):
                    continue
                figures = []
                for with_triton in (False, True):
                    with stand_in(with_triton), backend.regime(**{direction: name}):
                        figures.append(time_us(calls(*shape)[i]))
                sizes = ",".join(map(str, shape))
                print(f"{sizes:18} {direction:9} {name:13} {figures[0]:6.1f} {figures[1]:12.1f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
