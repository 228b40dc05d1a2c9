"""Every (kernel, configuration) that the library can launch on a card, compiled and inspected.

No GPU is asked: see codegen.py. What is wrong with a kernel is `faults_of`.
"""

from collections.abc import Callable, Iterable, Iterator
from functools import cache, partial
from typing import Any, NamedTuple

import pytest
import torch

from lora_ext.backends.triton import cards, group_costs, group_launches, tiling, tuning
from lora_ext.backends.triton.backward_launches import Backward
from lora_ext.backends.triton.forward_launches import Forward
from lora_ext.backends.triton.regimes import REGIMES
from tests.gpu import codegen
from tests.gpu.launched import launches_of

BASE_KERNELS = (
    "lora_linear_decode_kernel",
    "lora_linear_fwd_kernel",
    "lora_linear_fwd_in_loop_kernel",
    "lora_linear_fwd_persistent_kernel",
    "lora_linear_bwd_dx_kernel",
    "lora_linear_bwd_dx_persistent_kernel",
    "lora_linears_bwd_dx_kernel",
)
N = K = 4096


class Types(NamedTuple):
    """What a set of launches has in common, and over which numbers of rows it is drawn."""

    dtype: torch.dtype
    adapter: torch.dtype
    R: int
    kind: str = "half"
    masked: bool = False
    loops: bool = True  # whether to read them
    rows: tuple[int, ...] = (16, 64, 512, 2048, 4096, 8192)


# Registers and shared memory grow with the rank, of which a kernel takes at most 64 at once, and
# float16 has the longer epilogue: the second is the hardest of the halves. The first is drawn where
# it alone takes other kernels (dB in parts), and float32 A and B where most is in flight; both have
# the second's loops over x and weight. Without tf32 a float32 base product is PyTorch's.
DTYPES = {
    "bf16-R16": Types(torch.bfloat16, torch.bfloat16, 16, loops=False, rows=(8192,)),
    "fp16-R64": Types(torch.float16, torch.float16, 64),
    "fp16-R64-fp32-AB": Types(torch.float16, torch.float32, 64, loops=False, rows=(64, 8192)),
    "fp16-R64-keep": Types(torch.float16, torch.float16, 64, masked=True, loops=False),
    "tf32-R64": Types(torch.float32, torch.float32, 64, "tf32", rows=(16, 8192)),
    "fp32-R64": Types(torch.float32, torch.float32, 64, "fp32", loops=False, rows=(16, 8192)),
}
Launch = tuple[Any, tuple, dict]


class Inspected(NamedTuple):
    """One kernel of one card: what was compiled, and what came of it."""

    kernel: str
    tile: str
    types: str
    rows: int  # of a tile
    wide: int  # 128-bit loads that one step of a base product takes; 0 where none is read
    waiting: int  # loops that may multiply without loading ahead
    counts: bool  # whether parts are summed by who comes last
    machine: codegen.Machine | str  # or the compiler's complaint

    def __str__(self) -> str:
        return f"{self.kernel:31} {self.tile:22} {self.types:17}"

    def figures(self) -> str:
        """Return the rest of its line in the table."""
        m = self.machine
        if isinstance(m, str):
            return m
        figures = f"{m.registers:4} {m.shared / 1024:6.1f}K"
        return figures + f"  {m.matrix}, {m.wide} wide loads, {m.narrow} others" * (self.wide > 0)


class Way(NamedTuple):
    """One way that the library offers for a problem: a regime with a tile, and what launches it."""

    regime: str
    tile: str
    run: Callable[[], object]


def problems(family: str, dtypes: str) -> Iterator[Way]:
    """Yield every way that a card is offered."""
    card = next(card for card in cards.KNOWN.values() if card.family == family)
    dtype, adapter, R, _, masked, _, rows = DTYPES[dtypes]

    def empty(*shape: int, of: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=of, device="meta")

    A, B = empty(K, R, of=adapter), empty(R, N, of=adapter)
    weight, bias = empty(N, K), empty(N)
    for M in rows:
        keep = empty(M, K // 32, of=torch.int32) if masked else None
        call = Forward(empty(M, K), weight, bias, A, B, 0.5, keep)
        yield from ways("forward", call, tuning.forward_problem(call), card)
        dy, x, h = empty(M, N), empty(M, K), empty(M, R)
        for need_dx in (True, False):
            needs = (need_dx, True, True)
            back = Backward(dy, x, weight if need_dx else None, A, B, h, 0.5, needs, keep)
            yield from ways("backward", back, tuning.backward_problem(back), card)


def ways(direction: str, call, p, card) -> Iterator[Way]:
    """Yield those of one call that launch kernels of ours."""
    for name, regime in REGIMES[direction].items():
        for tile in regime.tiles(p, card) if name not in ("addmm", "plain") else ():
            run = tuning.planned(direction, name, call, p, tile, card)
            yield Way(f"{direction} {name}", label_of(tile), partial(run, call))


def joint_ways(family: str, types: str, layers: int) -> Iterator[Way]:
    """Yield every way that a card is offered to run layers of one x jointly."""
    card = next(card for card in cards.KNOWN.values() if card.family == family)
    dtype, adapter, R, _, masked, *_ = DTYPES[types]

    def empty(*shape: int, of: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=of, device="meta")

    M = 8192
    x, keep = empty(M, K), empty(M, K // 32, of=torch.int32) if masked else None
    calls, backs = [], []
    for n in (N, 1024, 1024)[:layers]:
        low = empty(K, R, of=adapter), empty(R, n, of=adapter)
        calls.append(Forward(x, empty(n, K), empty(n), *low, 0.5, keep))
        own = empty(n, K), *low, empty(M, R), 0.5, (True, True, True), keep
        backs.append(Backward(empty(M, n), x, *own))
    problems = list(map(tuning.forward_problem, calls))
    for name in group_costs.WITH_SHRINK:
        way = group_costs.joint_forward(problems, card, lambda regime, _, name=name: regime == name)
        if way is not None:
            run = group_launches.forward(calls, problems, way.choices, card)
            yield Way(name, label_of(way.choices[0][1]), partial(run, calls))
    problems = list(map(tuning.backward_problem, backs))
    for tile in group_costs.tiles_of_dx(problems, card):
        run = group_launches.backward(backs, problems, tile, card)
        yield Way("backward", label_of(tile), partial(run, backs))


def label_of(tile: tiling.Tile) -> str:
    """Return a tile's sizes, warps and stages, as in the tables."""
    loads = " tma" if tile.descriptors else ""
    return f"{tile.block_m}x{tile.block_n}x{tile.block_k} {tile.warps}w {tile.stages}s{loads}"


@cache
def distinct(family: str, dtypes: str) -> list[tuple[str, Launch]]:
    """Return a label and the launch for each different kernel that the problems end in."""
    return distinct_of(problems(family, dtypes), DTYPES[dtypes].kind)


def distinct_of(offered: Iterable[Way], kind: str) -> list[tuple[str, Launch]]:
    """Return the same of some ways, with products of one kind."""
    found: dict[str, tuple[str, Launch]] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tuning, "kind_of", lambda dtype: kind)
        for way in offered:
            for launch in launches_of(way.run):
                kernel, _, arguments = launch
                params = {param.name: param for param in kernel.params}
                kinds = {n: specialised(a, params.get(n)) for n, a in sorted(arguments.items())}
                found.setdefault(repr((kernel.__name__, kinds)), (way.tile, launch))
    return list(found.values())


def offered(family: str, types: str) -> list[tuple[str, Launch]]:
    """Return the same of a layer, and of three layers of one x where those are run jointly."""
    jointly = joint_ways(family, types, 3) if DTYPES[types].R == 64 and types[:4] == "fp16" else ()
    return [*distinct(family, types), *distinct_of(jointly, DTYPES[types].kind)]


def configurations(family: str) -> set[tuple[str, str]]:
    """Return (kernel, configuration) of every launch that a card is offered."""
    launched = (launch for types in DTYPES for _, launch in offered(family, types))
    return {(kernel.__name__, configuration_of(options)) for kernel, _, options in launched}


def configuration_of(options: dict) -> str:
    """Return a launch's block sizes M, N, K and R, its warps and stages, and how it loads."""
    sizes = "x".join(str(options.get(f"BLOCK_{size}", 0)) for size in "MNKR")
    loads = " tma" if options.get("DESCRIPTORS") else ""
    return f"{sizes} {options['num_warps']}w {options['num_stages']}s{loads}"


def specialised(argument: object, param: Any) -> object:
    """Return what of an argument makes Triton compile again; `param` None is an option."""
    if param is None or param.is_constexpr:
        return argument
    if isinstance(argument, tuple):
        return tuple(specialised(of_layer, param) for of_layer in argument)
    if isinstance(argument, torch.Tensor):
        return argument.dtype
    if hasattr(argument, "block_shape"):
        return argument.base.dtype, tuple(argument.block_shape)
    if type(argument) is int and not param.do_not_specialize:
        return argument == 1, argument % 16 == 0
    return type(argument)


def inspect(family: str, types: str, launches: list[tuple[str, Launch]]) -> list[Inspected]:
    """Compile launches and read them."""
    results = [compiled(family, launch) for _, launch in launches]
    if DTYPES[types].loops and family != "gfx942":
        codegen.machine_code([one for one in results if not isinstance(one, str)])
    return [
        read(family, types, tile, launch, result)
        for (tile, launch), result in zip(launches, results, strict=True)
    ]


def compiled(family: str, launch: Launch) -> Any:
    """Return what Triton compiles, or its complaint: the table shows what any stage says."""
    try:
        return codegen.compile_launch(family, *launch)
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def read(family: str, types: str, tile: str, launch: Launch, result: Any) -> Inspected:
    """Read what one launch was compiled to."""
    kernel, _, options = launch
    rows = options["BLOCK_M"]
    wide = 0
    if DTYPES[types].loops:
        wide = wide_loads(kernel.__name__, options, family, DTYPES[types].dtype.itemsize)
    machine: codegen.Machine | str = result
    if not isinstance(result, str):
        try:
            machine = codegen.read(result, loops=DTYPES[types].loops)
        except Exception as error:
            machine = f"{type(error).__name__}: {error}"
    # The epilogue's loop over ranks, whose operands are small, of each layer and under masks each
    # half of a tile; and decode's loop over tiles that were there before h: hardly any.
    ranks = options["R"] if isinstance(options["R"], tuple) else (options["R"],)
    waiting = sum(R > options["BLOCK_R"] for R in ranks) * (1 + options.get("MASKED", False))
    waiting += "decode" in kernel.__name__
    counts = options.get("arrived") is not None
    return Inspected(kernel.__name__, tile, types, rows, wide, waiting, counts, machine)


def wide_loads(kernel: str, options: dict, family: str, size: int) -> int:
    """Return how many 128-bit loads a thread needs for one step's tiles of x and weight.

    Two where the copy engine loads a tile at once; none where no base product is ours.
    """
    if kernel not in BASE_KERNELS or options.get("BASE_DONE") or not options.get("WANT_DX", True):
        return 0
    if options.get("DESCRIPTORS"):
        return 2
    m, n, k = (options[f"BLOCK_{name}"] for name in "MNK")
    if "dx" in options:
        n, k = k, n
    threads = options["num_warps"] * (64 if family == "gfx942" else 32)
    return max(1, m * k * size // (threads * 16)) + max(1, n * k * size // (threads * 16))


def faults_of(row: Inspected, family: str) -> Iterator[str]:
    """Yield what is wrong with a kernel."""
    machine, amd = row.machine, family == "gfx942"
    if isinstance(machine, str):
        yield machine
        return
    shared = next(c for c in cards.KNOWN.values() if c.family == family).shared_bytes
    if machine.stack:
        yield f"stack of {machine.stack} bytes, so registers spill"
    if machine.shared > shared:
        yield f"{machine.shared} bytes of shared memory, {shared} there"
    if machine.atomics:  # their order changes from run to run
        yield f"{machine.atomics} atomics"
    if (machine.counts > 0) != row.counts:
        yield f"{machine.counts} counters"
    if machine.waiting > row.waiting:
        yield f"{machine.waiting} loops multiply and load nothing ahead, not {row.waiting}"
    if not row.wide:
        return
    expected = {"sm_90": "HGMMA", "sm_100": "UTC", "gfx942": "v_mfma"}.get(family, "HMMA")
    # wgmma and tcgen05 take 64 rows at least.
    if not machine.matrix.startswith(expected if row.rows >= 64 or amd else "HMMA"):
        yield f"{machine.matrix or 'no matrix instruction'} in its loop"
    if machine.wide < row.wide:
        yield f"{machine.wide} 128-bit loads in its loop, not {row.wide}"
