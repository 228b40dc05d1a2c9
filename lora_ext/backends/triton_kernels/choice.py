"""Which regimes and tiles a problem can run with, cheapest first by the cost model."""

from dataclasses import replace
from typing import NamedTuple

from . import configs, cost_model
from .cards import Card
from .configs import Tile
from .cost_model import Problem

# h_first waits for other programs and no GPU has run it: by name only.
AUTOMATIC_FORWARD = ("in_loop", "two_launches", "decode", "torch_base")
AUTOMATIC_BACKWARD = ("two_launches", "torch_base")
FORWARD, BACKWARD = (*AUTOMATIC_FORWARD, "h_first"), AUTOMATIC_BACKWARD
# Backend reference's operators, where every regime would move more bytes than the plain layer: a
# rank beyond the features, over few rows, makes float32 h and t outweigh what a regime saves.
PLAIN = "plain"


class Candidate(NamedTuple):
    """A way to run a problem: regime, tile, and the microseconds the cost model gives it."""

    name: str
    tile: Tile
    time_us: float


def forward_tiles(name: str, p: Problem, card: Card, descriptors: bool) -> tuple[Tile, ...]:
    """Return the tiles with which a forward regime can run; none where it can't."""
    if name == "torch_base":
        return (configs.delta_tile(card),)
    if name == "decode":
        return configs.decode_tiles(card, p.kind, p.M) if p.M <= 64 or card.interpreted else ()
    tiles = _gemm_tiles(p, card, descriptors)
    if name == "in_loop":
        return tuple(t for t in tiles if p.R <= t.max_r)
    if name == "h_first":
        # The 128x256 tile spills beside a float32 A (48 bytes on sm_90): the next one then.
        tiles = tiles[1:] if p.adapter_size > p.size and card.has_descriptors else tiles
        return tiles[:1] if p.R <= configs.MAX_BLOCK_R else ()
    return tiles


def backward_tiles(name: str, p: Problem, card: Card, descriptors: bool) -> tuple[Tile, ...]:
    """Return the tiles with which a backward regime can run dx; none where it can't."""
    return (
        (configs.delta_tile(card),) if name == "torch_base" else _gemm_tiles(p, card, descriptors)
    )


def forward_candidates(p: Problem, card: Card, descriptors: bool) -> list[Candidate]:
    """Return what the library may choose among for a forward, cheapest first.

    Never what moves more bytes than the plain layer: that itself where nothing else is left.
    """
    plain = cost_model.plain_forward(p)
    found = []
    for name in AUTOMATIC_FORWARD:
        for tile in forward_tiles(name, p, card, descriptors):
            splits = decode_splits(p, tile, card) if name == "decode" else 1
            kernels = cost_model.forward(name, p, tile, card, splits)
            if cost_model.bytes_of(kernels) <= cost_model.bytes_of(plain):
                time_us = cost_model.time_us(kernels, card, p.kind)
                found.append(Candidate(name, tile, time_us))
    return sorted(found, key=lambda candidate: candidate.time_us) or [_plain(plain, p, card)]


def backward_candidates(p: Problem, card: Card, descriptors: bool) -> list[Candidate]:
    """Return what the library may choose among for a backward, cheapest first, likewise."""
    plain = cost_model.plain_backward(p)
    found = []
    for name in AUTOMATIC_BACKWARD:
        for tile in backward_tiles(name, p, card, descriptors):
            kernels = cost_model.backward(name, p, tile, card)
            if cost_model.bytes_of(kernels) <= cost_model.bytes_of(plain):
                time_us = cost_model.time_us(kernels, card, p.kind)
                found.append(Candidate(name, tile, time_us))
    return sorted(found, key=lambda candidate: candidate.time_us) or [_plain(plain, p, card)]


def bucketed(p: Problem) -> Problem:
    """Return a problem with M rounded up to the power of two, at least 16, that it is chosen by."""
    return replace(p, M=max(16, 1 << (p.M - 1).bit_length()))


def decode_splits(p: Problem, tile: Tile, card: Card) -> int:
    """Return into how many parts a decode splits K: a program for each SM, at least 4 steps each.

    Fewer where the parts' sums would move more bytes than the plain layer does.
    """
    tiles = -(-p.M // tile.block_m) * -(-p.N // tile.block_n)
    splits = configs.splits(card, tiles, p.K, tile.block_k)
    most = cost_model.bytes_of(cost_model.plain_forward(p))
    while splits > 1:
        if cost_model.bytes_of(cost_model.forward("decode", p, tile, card, splits)) <= most:
            break
        splits -= 1
    return splits


def _plain(kernels: list[cost_model.Kernel], p: Problem, card: Card) -> Candidate:
    return Candidate(PLAIN, configs.delta_tile(card), cost_model.time_us(kernels, card, p.kind))


def _gemm_tiles(p: Problem, card: Card, descriptors: bool) -> tuple[Tile, ...]:
    can = descriptors and card.has_descriptors
    return tuple(t for t in configs.gemm_tiles(card, p.kind) if can or not t.descriptors)
