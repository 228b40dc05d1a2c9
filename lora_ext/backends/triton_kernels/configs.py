"""Which tile sizes a card may be given: few, and each compiled and inspected by the tests.

tests/gpu/test_triton_codegen.py compiles every entry for its card: no stack, no spills, shared memory
within the card, matrix instructions in the loop. What failed there is not here.
"""

from dataclasses import dataclass

from .cards import KIB, Card


@dataclass(frozen=True)
class Tile:
    """Tile sizes of a kernel: a product (block_m, block_n), summed block_k a step.

    Attributes:
        block_m: rows of the result.
        block_n: columns of the result.
        block_k: elements of the summed dimension a step.
        warps: warps a program.
        stages: depth of the load pipeline.
        max_r: largest BLOCK_R with which h fits beside the accumulator (regime in_loop).
        descriptors: loads x and weight by tensor descriptors.

    """

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int
    max_r: int = 64
    descriptors: bool = False


# Larger ranks go through a kernel this many columns at a time; through the epilogue of a base
# product, whose accumulator leaves few registers, by fewer: with 64 at once the 128x256 tile of dx
# spills on sm_90.
MAX_BLOCK_R = 64
EPILOGUE_R = 32

_SMALL = Tile(64, 64, 64, 4, 3)
_SMALL_99K = Tile(
    64, 64, 64, 4, 3, max_r=32
)  # 64 float32 ranks spill 4 bytes on sm_86, 12 on sm_120
_HOPPER = (
    Tile(128, 256, 64, 8, 3, descriptors=True),
    Tile(64, 128, 64, 4, 4, descriptors=True),
    Tile(128, 128, 64, 8, 3),
)
_GEMM = {
    "sm_80": (Tile(128, 128, 32, 8, 4), _SMALL),
    "sm_86": (Tile(128, 128, 32, 8, 3), _SMALL_99K),
    "sm_89": (Tile(128, 128, 32, 8, 3), _SMALL_99K),
    "sm_90": _HOPPER,
    "sm_100": (
        Tile(128, 128, 64, 8, 4, descriptors=True),
        Tile(64, 128, 64, 4, 4, descriptors=True),
        Tile(128, 128, 64, 8, 3),
    ),
    "sm_120": (Tile(128, 128, 32, 8, 3), _SMALL_99K),
    "gfx942": (Tile(128, 128, 64, 8, 2), Tile(64, 64, 64, 4, 2)),
}
# tf32: twice the bytes an element. fp32 has no matrix units, and none here: the base product is
# PyTorch's, see tuning.py; the interpreter runs it with its own tiles.
_TF32 = (Tile(64, 64, 32, 4, 3),)
# Large enough to be quick where a program costs 10 ms, small enough for the tests to cross.
_INTERPRETER = (Tile(64, 64, 64, 4, 2), Tile(32, 64, 64, 4, 2, descriptors=True))
_BY_WARPGROUP = ("sm_90", "sm_100")  # matrix instructions of 64 rows and 4 warps


def gemm_tiles(card: Card, kind: str) -> tuple[Tile, ...]:
    """Return the tiles for the base product with its epilogue; kind is half, tf32 or fp32."""
    if card.interpreted:
        return _INTERPRETER
    return {"half": _GEMM[card.family], "tf32": _TF32, "fp32": ()}[kind]


def decode_tiles(card: Card, kind: str, M: int) -> tuple[Tile, ...]:
    """Return the tiles for the base product of few rows, split over K."""
    if card.interpreted:
        return (Tile(64, 64, 32, 4, 2),)
    block_m = 16 if M <= 16 else 64
    if kind != "half":
        return (Tile(block_m, 32, 32, 4, 3),) if kind == "tf32" else ()
    if card.family == "gfx942":
        return (Tile(block_m, 32, 128, 8, 2), Tile(block_m, 64, 64, 4, 2))
    # 48 KB a stage with 64 ranks of a float32 A: two stages of loads fit in 99 KB, three do not.
    stages = 3 if card.shared_bytes < 128 * KIB else 4
    return (Tile(block_m, 32, 128, 8, stages), Tile(block_m, 64, 64, 4, 4))


def delta_tile(card: Card) -> Tile:
    """Return the tile for y += alpha * h @ B: bound by memory, no loop over K."""
    return Tile(64, 64, 64, 4, 2) if card.interpreted else Tile(64, 128, 32, 8, 1)


def shrink_tile(card: Card, kind: str, M: int) -> Tile:
    """Return the tile for h = x @ A; its columns are BLOCK_R."""
    if card.interpreted:
        return Tile(64, 0, 32, 4, 2)
    block_m = 16 if M <= 16 else 64
    if kind != "half":
        return Tile(block_m, 0, 32, 4, 2)
    warps = 4 if card.family in _BY_WARPGROUP or M <= 16 else 8
    return Tile(block_m, 0, 64, warps, 2 if card.family == "gfx942" else 4)


def dy_tile(card: Card, kind: str, M: int) -> Tile:
    """Return the tile for the pass over dy: block_m rows a part of dB, block_n columns a step.

    About 64 parts where M allows it: fewer programs leave SMs idle, more write more parts.
    """
    if card.interpreted:
        return Tile(32, 64, 0, 4, 2)
    if kind == "fp32":  # without matrix units a product holds more of its tiles in registers
        return Tile(32 if M <= 2048 else 64, 32, 0, 4, 2)
    if kind == "tf32":
        return Tile(32 if M <= 2048 else 64, 64, 0, 4, 2)
    block_m = 32 if M <= 2048 else 64 if M <= 4096 else 128
    warps = 8 if block_m == 128 else 4
    return Tile(block_m, 64, 0, warps, 2 if card.family == "gfx942" else 3)


def strip_tile(card: Card) -> Tile:
    """Return the tile for dA = alpha * x.T @ t: block_k columns of x, block_m rows a step."""
    return Tile(64, 0, 64, 4, 2) if card.interpreted else Tile(64, 0, 64, 4, 2)


def dB_parts(card: Card, kind: str, M: int, R: int, element_size: int) -> int:
    """Return into how many parts a pass over dy sums dB, 0 where reading dy again moves less.

    A part is R * N floats, written and read: 8 bytes against an element of dy's block_m rows.
    """
    parts = -(-M // dy_tile(card, kind, M).block_m)
    return parts if 8 * parts * R < M * element_size else 0


def splits(card: Card, tiles: int, size: int, block: int) -> int:
    """Return into how many parts `tiles` programs' sums over `size` are split.

    A program for each SM, in parts of at least 4 steps: shorter ones are all start and end.
    """
    steps = 1 if card.interpreted else 4
    return max(1, min(card.sms // tiles, size // (steps * block)))


def block_r(R: int, most: int = MAX_BLOCK_R) -> int:
    """Return the rank padded to a power of two: at least 16, a matrix instruction's, at most."""
    return min(max(16, 1 << (R - 1).bit_length()), most)
