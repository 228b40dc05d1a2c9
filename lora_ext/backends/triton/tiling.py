"""The tile sizes of each card, and how sums are split over its programs.

They are few, and tests/gpu/test_triton_codegen.py compiles each for its card: no stack, no spills,
shared memory within the card, matrix instructions in the loop. What failed there is not here.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .cards import BY_WARPGROUP, KIB, Card


@dataclass(frozen=True)
class Tile:
    """Tile sizes of a kernel: a product (block_m, block_n), summed block_k a step.

    Attributes:
        block_m: rows of the result.
        block_n: columns of the result.
        block_k: elements of the summed dimension a step.
        warps: warps a program.
        stages: depth of the load pipeline.
        max_r: largest BLOCK_R with which h fits next to the accumulator (regime in_loop).
        descriptors: loads x and weight by tensor descriptors.
        group_m: tiles of rows in a band, see common.tile_of.

    """

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int
    max_r: int = 64
    descriptors: bool = False
    group_m: int = 8

    def options(self, *, w_transposed: bool = False) -> dict[str, Any]:
        """Return the options by which every kernel around a base product gets its tile.

        `w_transposed`: w is a descriptor of its transpose.
        """
        return {
            "DESCRIPTORS": self.descriptors,
            "W_TRANSPOSED": w_transposed,
            "BLOCK_M": self.block_m,
            "BLOCK_N": self.block_n,
            "BLOCK_K": self.block_k,
            "GROUP_M": self.group_m,
            "num_warps": self.warps,
            "num_stages": self.stages,
        }


# Larger ranks go through a kernel this many columns at a time; through the epilogue of a base
# product, whose accumulator leaves few registers, by fewer: with 64 at once the 128x256 tile of dx
# spills on sm_90.
MAX_BLOCK_R = 64
EPILOGUE_R = 32
# Columns of all sums next to each other, of several layers: in a shrink, and in dA's strips, which
# run with the warps of a tile of dx.
SHRINK_COLUMNS = 128
STRIP_COLUMNS = 64
# Next to a masked part of dx, several layers' sum takes a smaller tile, so many elements a warp,
# and fewer ranks at once: with a 128x256 tile 664 bytes spill on sm_90, with 32 ranks 144 on sm_80.
MOST_MASKED = 2048
MASKED_R = 16
MAX_SPLITS = 4

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
# PyTorch's; the interpreter runs it with its own tiles.
_TF32 = (Tile(64, 64, 32, 4, 3),)
# Large enough to be quick where a program costs 10 ms, small enough for the tests to cross.
_INTERPRETER = (Tile(64, 64, 64, 4, 2), Tile(32, 64, 64, 4, 2, descriptors=True))


def gemm_tiles(card: Card, kind: str) -> tuple[Tile, ...]:
    """Return the tiles for the base product with its epilogue; kind is half, tf32 or fp32."""
    if card.interpreted:
        return _INTERPRETER
    return {"half": _GEMM[card.family], "tf32": _TF32, "fp32": ()}[kind]


# With bands of 16 tiles a wave of 128x256 reads 17 MB of x and as much of weight; with bands of 8,
# 8 and 34. Ranks above 64 spill next to the wide tile.
_PERSISTENT = {
    "sm_90": (
        Tile(128, 256, 64, 8, 3, descriptors=True, group_m=16),
        Tile(128, 128, 64, 8, 4, max_r=128, descriptors=True, group_m=16),
    ),
    "sm_100": (Tile(128, 128, 64, 8, 4, max_r=128, descriptors=True, group_m=16),),
}


def persistent_tiles(card: Card, kind: str, R: int) -> tuple[Tile, ...]:
    """Return the tiles of programs that stay for the tiles of a base product."""
    if card.interpreted:
        return (Tile(32, 64, 64, 4, 2, max_r=128, descriptors=True, group_m=2),)
    tiles = _PERSISTENT.get(card.family, ()) if kind == "half" else ()
    return tuple(tile for tile in tiles if R <= tile.max_r)


def persistent_r(card: Card, R: int) -> int:
    """Return the ranks at a time of a persistent epilogue: of 64 next to 4 parts of h some spill.

    On sm_100, and with Triton 3.6 on sm_90: 72 bytes.
    """
    return block_r(R, EPILOGUE_R)


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
    """Return the tile for y += scale * h @ B: bound by memory, no loop over K.

    Its stages are for the strips of dA and dB next to it.
    """
    if card.interpreted:
        return Tile(64, 64, 64, 4, 2)
    return Tile(64, 128, 32, 8, 2 if card.family == "gfx942" else 3)


def shrink_tile(card: Card, kind: str, M: int, *, joined: bool = False) -> Tile:
    """Return the tile for h = x @ A; its columns are BLOCK_R.

    `joined`: with shared memory left for a program of the next launch on the same SM.
    """
    if card.interpreted:
        return Tile(64, 0, 32, 4, 2)
    block_m = 16 if M <= 16 else 64
    if kind != "half":
        return Tile(block_m, 0, 32, 4, 2)
    warps = 4 if card.family in BY_WARPGROUP or M <= 16 else 8
    stages = 2 if card.family == "gfx942" else 3 if joined else 4
    return Tile(block_m, 0, 64, warps, stages)


def dy_tile(card: Card, kind: str, M: int, *, joined: bool = False) -> Tile:
    """Return the tile for the pass over dy: block_m rows a part of dB, block_n columns a step.

    Of as many rows as leave nearly half of the SMs a part: fewer leave SMs idle and t in parts,
    more write more of dB. `joined`: with registers and shared memory left for a program of the next
    launch on the same SM.
    """
    if card.interpreted:
        return Tile(32, 64, 0, 4, 2)
    if kind == "fp32":  # without matrix units a product holds more of its tiles in registers
        return Tile(32 if M <= 2048 else 64, 32, 0, 4, 2)
    if kind == "tf32":
        return Tile(32 if M <= 2048 else 64, 64, 0, 4, 2)
    block_m = next((rows for rows in (128, 64) if 2 * -(-M // rows) >= 0.9 * card.sms), 32)
    if joined and block_m == 128:
        return Tile(block_m, 32, 0, 4, 3)
    warps = 8 if block_m == 128 else 4
    return Tile(block_m, 64, 0, warps, 2 if card.family == "gfx942" else 3)


def dy_splits(card: Card, kind: str, M: int, N: int, R: int) -> int:
    """Return into how many parts of N a pass over dy sums t, as `splits` says."""
    tile = dy_tile(card, kind, M)
    return splits(card, -(-M // tile.block_m) * -(-R // block_r(R)), N, tile.block_n)


def strip_tile(card: Card, kind: str) -> Tile:
    """Return the tile for dA = scale * x.T @ t: block_k columns of x, block_m rows a step.

    Its warps and stages are for the strips alone; next to dx they run with those of dx.
    """
    if card.interpreted or kind != "half":
        return Tile(64, 0, 64, 4, 2)
    return Tile(128, 0, 64, 4, 2 if card.family == "gfx942" else 4)


def dB_parts(card: Card, kind: str, M: int, R: int, element_size: int) -> int:
    """Return into how many parts a pass over dy sums dB, 0 where reading dy again moves less.

    A part is R * N floats, written and read: 8 bytes against an element of dy's block_m rows.
    """
    parts = -(-M // dy_tile(card, kind, M).block_m)
    return parts if 8 * parts * R < M * element_size else 0


def splits(card: Card, tiles: int, size: int, block: int) -> int:
    """Return into how many parts `tiles` programs' sums over `size` are split: 4 at most.

    Where nearly half of the SMs have a program it is one: those draw the whole bandwidth.
    Else a program for each SM, in parts of at least 4 steps: shorter ones are all start and end.
    What reads the parts sums them in each of its tiles.
    """
    if 2 * tiles >= 0.9 * card.sms:
        return 1
    steps = 1 if card.interpreted else 4
    return max(1, min(card.sms // tiles, size // (steps * block), MAX_SPLITS))


def block_r(R: int, most: int = MAX_BLOCK_R) -> int:
    """Return the rank padded to a power of two: at least 16, a matrix instruction's, at most."""
    return min(max(16, 1 << (R - 1).bit_length()), most)


def block_r_of_each(ranks: Sequence[int], columns: int, most: int) -> int:
    """Return block_r for layers that are summed next to each other, in `columns` columns in all."""
    return block_r(max(ranks), min(most, 1 << (columns // len(ranks)).bit_length() - 1))
