"""The search behind modeling/kernels_tiles.py: every stage of the experts, timed with every candidate tile."""

from collections.abc import Callable

import torch

from lamoe.kernels_decode import SwappedTile, VectorTile, swapped_experts, vector_experts
from lamoe.kernels_gemm import PAD, Tile, plain_rows
from lamoe.kernels_moe import expert_gradient, gated_gradient, gated_up
from lamoe.kernels_plan import make_plan, pack, unpack
from lamoe.scripts.expert_speed import Layer, settled_milliseconds

ROW_TILES = (
    Tile(128, 256, 64, 8, 3),
    Tile(128, 256, 64, 8, 3, flatten=True),
    Tile(128, 256, 64, 8, 3, group=16),
    Tile(128, 128, 64, 4, 3, blocks=2),
    Tile(128, 128, 32, 8, 3, blocks=2),
    Tile(64, 256, 64, 8, 4),
    Tile(64, 128, 64, 4, 4, blocks=2),
)
GATED_TILES = (*ROW_TILES, *(Tile(128, 256, 64, 8, 3, group=group, specialised=True) for group in (8, 16, 32)))
WEIGHT_TILES = (
    Tile(128, 256, 64, 8, 3, specialised=True),
    Tile(128, 256, 64, 8, 3),
    Tile(128, 256, 64, 8, 3, flatten=True),
    Tile(128, 128, 64, 4, 3, blocks=2),
    Tile(128, 128, 32, 8, 3, blocks=2),
)
VECTOR_TILES = (VectorTile(2, 1024, 4), VectorTile(2, 512, 2), VectorTile(8, 512, 4), VectorTile(16, 256, 4))
SWAPPED_TILES = tuple(
    SwappedTile(rows, tokens, depth, 4, stages)
    for tokens in (16, 32)
    for rows, depth, stages in ((64, 128, 4), (64, 128, 3), (64, 64, 5), (128, 128, 3), (128, 64, 4))
)


def best_tiles(shape: str) -> list[dict]:
    """Milliseconds of the best three tiles of every stage of one of the benchmark's shapes, bfloat16."""
    layer = Layer(shape, "uniform", "cuda", torch.bfloat16)
    gate_up, down = (parameter.detach() for parameter in layer.experts.parameters())
    x, index, K, E, M = layer.x, layer.index, layer.K, layer.E, layer.N * layer.K
    plans = {rows: unpack(make_plan(index, E, rows, kept=True), M, E) for rows in {tile.rows for tile in ROW_TILES}}
    plan = plans[128]
    a, h = gated_up(x, gate_up, plan, K, "silu", True, ROW_TILES[0])
    rows = pack(x, plan, E, K, PAD, x.new_empty((M, layer.D)))
    plain = {"gather": False, "transposed": False}
    gated = {
        "up": lambda t: gated_up(x, gate_up, plans[t.rows], K, "silu", False, t),
        "up_saving": lambda t: gated_up(x, gate_up, plans[t.rows], K, "silu", True, t),
        "da": lambda t: gated_gradient(rows, down, h, layer.weights, plans[t.rows], "silu", True, t),
    }
    stages = {
        "down": lambda t: plain_rows(a, down, plans[t.rows], K, t, **plain),
        "dx": lambda t: plain_rows(h, gate_up, plans[t.rows], K, t, gather=False, transposed=True),
    }
    found = [row for stage, call in gated.items() for row in fastest(shape, stage, call, GATED_TILES)]
    found += [row for stage, call in stages.items() for row in fastest(shape, stage, call, ROW_TILES)]
    found += fastest(shape, "dw", lambda t: expert_gradient(h, rows, plan, E, None, t), WEIGHT_TILES)
    few = (x[:1], index[:1], layer.weights[:1], gate_up, down, "silu", None)
    found += fastest(shape, "vector_up", lambda t: vector_experts(*few, t, VECTOR_TILES[1]), VECTOR_TILES)
    found += fastest(shape, "vector_down", lambda t: vector_experts(*few, VECTOR_TILES[0], t), VECTOR_TILES)
    some = (x[:64], index[:64], layer.weights[:64], gate_up, down, "silu", None)
    for tokens in (16, 32):
        tiles = [tile for tile in SWAPPED_TILES if tile.tokens == tokens]
        found += fastest(shape, "swapped_up", lambda t, f=tiles[0]: swapped_experts(*some, t, f), tiles)
        found += fastest(shape, "swapped_down", lambda t, f=tiles[0]: swapped_experts(*some, f, t), tiles)
    return found


def fastest(shape: str, stage: str, call: Callable, tiles) -> list[dict]:
    """The three fastest tiles; those that the device has no room for are left out."""
    times = {}
    for tile in tiles:
        try:
            times[tile] = settled_milliseconds(lambda tile=tile: call(tile))
        except RuntimeError as reason:  # too much shared memory, or too many registers
            print(f"{shape} {stage} {tile}: {reason}")
    best = sorted(times, key=times.get)[:3]
    return [{"shape": shape, "stage": stage, "tile": str(tile), "ms": times[tile]} for tile in best]
