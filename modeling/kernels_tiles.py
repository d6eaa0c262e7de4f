"""How the kernels of the experts are cut, by device and by rows an expert.

The figures behind `TABLE` come from `lamoe benchmark --suite tune`, which times the candidates on the device at hand.
A device that is not in it takes the row of the nearest older one; float32 takes the small tiles its registers allow.
"""

from typing import NamedTuple

from torch import Tensor

from .kernels_decode import SwappedTile, VectorTile
from .kernels_gemm import Tile, row_of


class Tiles(NamedTuple):
    """The tiles of one call. All products of rows have the same number of rows, which the plan needs."""

    up: Tile  # gathered, gated, without the pre-activation
    up_saving: Tile
    down: Tile  # also dA, where it is gathered
    da: Tile
    dx: Tile
    dw: Tile


class Swapped(NamedTuple):
    """Swapped operands, for at most `rows` rows an expert of at least `size` elements a projection."""

    rows: int
    size: int
    up: SwappedTile
    down: SwappedTile


class Few(NamedTuple):
    """The ways of few rows: matrix-vector products while hardly two rows share an expert, then swapped operands."""

    vector_up: VectorTile
    vector_up_wide: VectorTile  # from a hidden width of 4096 on
    vector_down: VectorTile
    swapped: tuple[Swapped, ...]


class Device(NamedTuple):
    """`tiles`: (rows an expert and hidden width from which on, tiles), most rows first, then the widest."""

    tiles: tuple[tuple[int, int, Tiles], ...]
    few: Few


_VECTOR = Few(VectorTile(2, 1024, 4), VectorTile(8, 512, 4), VectorTile(2, 512, 2), ())
_MANY = Tiles(
    up=Tile(128, 256, 64, 8, 3, group=16, flatten=True, specialised=True),
    up_saving=Tile(128, 256, 64, 8, 4, group=16, specialised=True),
    down=Tile(128, 256, 64, 8, 3, flatten=True),
    da=Tile(128, 256, 64, 8, 3, flatten=True, specialised=True),
    dx=Tile(128, 256, 64, 8, 3, flatten=True),
    dw=Tile(128, 256, 64, 8, 3, specialised=True),
)
# V3's width: row tiles of about one expert share a weight tile. An H100, each way alone until its power has settled:
# forward 9.47 ms, 9.80 with 16 row tiles, 10.01 by Triton's kernel; Mixtral's 4.76, 4.65, 4.72
_MANY_WIDE = _MANY._replace(up=_MANY.up._replace(group=8), up_saving=_MANY.up_saving._replace(group=8))
# at 64 rows an expert half of them have more than one tile of 64 (Mixtral's 256 tokens: 750 us, not 732)
_SOME_WIDE = _MANY._replace(
    up=Tile(128, 256, 64, 8, 4, group=32),
    up_saving=Tile(128, 256, 64, 8, 3, group=32, flatten=True),
    down=Tile(128, 256, 64, 8, 3, group=32),
)
_SOME = Tiles(
    up=Tile(64, 256, 64, 4, 4, group=32, flatten=True),
    up_saving=Tile(64, 128, 64, 4, 4, blocks=2),
    down=Tile(64, 128, 128, 4, 4, group=32, flatten=True),
    da=Tile(64, 256, 64, 4, 4, group=32),
    dx=Tile(64, 256, 64, 4, 4, group=32),
    dw=_MANY.dw,
)
_HOPPER = Device(
    ((96, 6144, _MANY_WIDE), (96, 0, _MANY), (64, 4096, _SOME_WIDE), (0, 0, _SOME)),
    _VECTOR._replace(
        swapped=(
            Swapped(8, 0, SwappedTile(64, 16, 128, 4, 3), SwappedTile(128, 16, 128, 4, 3)),
            Swapped(20, 2**25, SwappedTile(64, 32, 128, 4, 4), SwappedTile(128, 32, 128, 4, 3)),
            # 64 experts of V3's widths, 16 and 32 rows each: 1,305 and 1,336 us where row tiles take 1,314 and 1,359;
            # 8 of Mixtral's, 32 rows: 664 and 668 (H200); fine-grained experts would lose 8 to 13 %
            Swapped(40, 2**23, SwappedTile(128, 64, 64, 8, 4), SwappedTile(128, 64, 64, 4, 4)),
        )
    ),
)


def _plain(tile: Tile, dw: Tile, swapped: SwappedTile) -> Device:
    few = _VECTOR._replace(swapped=(Swapped(8, 0, swapped, swapped),))
    return Device(((0, 0, Tiles(tile, tile, tile, tile, tile, dw)),), few)


# by the oldest compute capability that a row is for; measured on 90 only
_AMPERE = _plain(Tile(128, 128, 32, 8, 3, blocks=2), Tile(128, 64, 32, 8, 3, blocks=2), SwappedTile(64, 16, 64, 4, 4))
TABLE = {90: _HOPPER, 0: _AMPERE}
CDNA = _plain(Tile(128, 128, 32, 8, 2, blocks=2), Tile(128, 64, 32, 8, 2, blocks=2), SwappedTile(64, 16, 64, 4, 2))
FLOAT32 = _plain(Tile(64, 64, 16, 8, 2, blocks=2), Tile(64, 64, 16, 8, 2, blocks=2), SwappedTile(64, 16, 16, 4, 2))
INTERPRETER = Device(
    _plain(Tile(16, 32, 16, 4, 2), Tile(16, 32, 16, 4, 2), SwappedTile(16, 16, 16, 1, 2)).tiles,
    Few(
        VectorTile(8, 16, 1),
        VectorTile(8, 16, 1),
        VectorTile(8, 16, 1),
        (Swapped(4, 0, SwappedTile(16, 16, 16, 1, 2), SwappedTile(32, 16, 16, 1, 2)),),
    ),
)


def tiles_for(x: Tensor, M: int, E: int, D: int = 0) -> Tiles:
    """The tiles of `M` rows over `E` experts, of x's device and dtype; D: the hidden width, 0 for products of any."""
    return next(tiles for rows, wide, tiles in _device(x).tiles if rows * E <= M and wide <= D)


def invariant_tiles(x: Tensor) -> Tiles:
    """Tiles that do not depend on the number of rows."""
    return _device(x).tiles[-1][2]


def few_rows(
    x: Tensor, M: int, E: int, D: int, F: int
) -> tuple[VectorTile, VectorTile] | tuple[SwappedTile, SwappedTile] | None:
    """The tiles of both projections if `M` rows are few for `E` experts of D x F; None if they are not."""
    few = _device(x).few
    if 4 * M <= E:
        return few.vector_up_wide if D >= 4096 else few.vector_up, few.vector_down
    for way in few.swapped:
        if way.rows * E >= M and way.size <= D * F:
            return way.up, way.down
    return None


def _device(x: Tensor) -> Device:
    return row_of(x, TABLE, CDNA, FLOAT32, INTERPRETER)
