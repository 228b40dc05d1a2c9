"""The choice of regime and tile."""

from . import configs
from .configs import Tile
from .gradients import Backward
from .launch import describable_product
from .regimes import Forward


def tiles_for(call: Forward | Backward, name: str, descriptors: bool | None) -> list[Tile]:
    """Return the tiles that `call` can run regime `name` with."""
    card, kind = call.card, call.kind
    if name == "decode":
        return list(configs.decode_tiles(card, kind, call.M))
    if name == "torch_base" or isinstance(call, Backward) and not call.need_dx:
        return [configs.delta_tile(card)]
    x, w = (call.dy, call.weight) if isinstance(call, Backward) else (call.x, call.w)
    can = card.has_descriptors and describable_product(x, w)
    tiles = [t for t in configs.gemm_tiles(card, kind) if can or not t.descriptors]
    if name == "in_loop":
        tiles = [t for t in tiles if call.R <= t.max_r]
    if name == "h_first":
        tiles = tiles[:1] if call.R <= configs.MAX_BLOCK_R else []
    if descriptors is not None:
        tiles = [t for t in tiles if t.descriptors == descriptors] or tiles
    return tiles


def choose_forward(call: Forward, name: str | None, descriptors: bool | None) -> tuple[str, Tile]:
    if name == "in_loop" and call.R > 64:
        name = "two_launches"
    name = name or "two_launches"
    return name, tiles_for(call, name, descriptors)[0]


def choose_backward(call: Backward, name: str | None, descriptors: bool | None) -> tuple[str, Tile]:
    name = name or "two_launches"
    return name, tiles_for(call, name, descriptors)[0]
