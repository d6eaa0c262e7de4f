"""How the kernels of the experts are cut, by device and by rows an expert.

`TABLE` is made by `lamoe benchmark --suite tune`, which times the candidates on the device at hand and prints the
best. What it does not know takes the nearest older device, and float32 the small tiles that its registers allow.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .kernels_decode import SwappedTile, VectorTile
from .kernels_gemm import Tile


class Tiles(NamedTuple):
    """The tiles of one call. All products of rows have the same number of rows, which the plan needs."""

    up: Tile  # gathered, gated, without the pre-activation
    up_saving: Tile
    down: Tile  # also dA, gathered
    dx: Tile
    dw: Tile


class Few(NamedTuple):
    """When few rows take another way (`vector_rows` in all, `swapped_rows` an expert), and its tiles."""

    vector_rows: int
    vector_up: VectorTile
    vector_down: VectorTile
    swapped_rows: int
    swapped_up: SwappedTile
    swapped_down: SwappedTile


_HOPPER_WIDE = Tiles(
    up=Tile(128, 256, 64, 8, 3),
    up_saving=Tile(128, 256, 64, 8, 3),
    down=Tile(128, 256, 64, 8, 3, flatten=True),
    dx=Tile(128, 256, 64, 8, 3, flatten=True),
    dw=Tile(128, 256, 64, 8, 3),
)
_HOPPER_NARROW = Tiles(
    up=Tile(64, 128, 64, 4, 4, blocks=2),
    up_saving=Tile(64, 128, 64, 4, 4, blocks=2),
    down=Tile(64, 128, 64, 4, 4, blocks=2),
    dx=Tile(64, 128, 64, 4, 4, blocks=2),
    dw=Tile(128, 128, 64, 4, 3, blocks=2),
)
_HOPPER_FEW = Few(
    vector_rows=16,
    vector_up=VectorTile(8, 512, 4),
    vector_down=VectorTile(8, 512, 4),
    swapped_rows=32,
    swapped_up=SwappedTile(64, 16, 128, 4, 4),
    swapped_down=SwappedTile(64, 16, 128, 4, 4),
)
_AMPERE = Tiles(*(Tile(128, 128, 32, 8, 3, blocks=2) for _ in range(5)))
_AMPERE_FEW = _HOPPER_FEW._replace(
    swapped_up=SwappedTile(64, 16, 64, 4, 4), swapped_down=SwappedTile(64, 16, 64, 4, 4)
)
_CDNA = Tiles(*(Tile(128, 128, 32, 8, 2, blocks=2) for _ in range(5)))
_CDNA_FEW = _HOPPER_FEW._replace(swapped_up=SwappedTile(64, 16, 64, 4, 2), swapped_down=SwappedTile(64, 16, 64, 4, 2))
_FLOAT32 = Tiles(*(Tile(64, 64, 32, 8, 2, blocks=2) for _ in range(5)))
_FLOAT32_FEW = _HOPPER_FEW._replace(
    swapped_up=SwappedTile(64, 16, 32, 4, 2), swapped_down=SwappedTile(64, 16, 32, 4, 2)
)
_INTERPRETER = Tiles(*(Tile(16, 32, 16, 4, 2) for _ in range(5)))
_INTERPRETER_FEW = Few(8, VectorTile(8, 16, 1), VectorTile(8, 16, 1), 4, SwappedTile(16, 16, 16, 1, 2), SwappedTile(32, 16, 16, 1, 2))  # fmt: skip

# oldest compute capability that a row is for: (rows an expert from which on, tiles), most rows first; few rows
TABLE = {
    90: (((96, _HOPPER_WIDE), (0, _HOPPER_NARROW)), _HOPPER_FEW),
    0: (((0, _AMPERE),), _AMPERE_FEW),
}


def tiles_for(x: Tensor, M: int, E: int) -> Tiles:
    """The tiles of `M` rows over `E` experts, of x's device and dtype."""
    return next(tiles for rows, tiles in _device_rows(x)[0] if rows == 0 or M >= rows * E)


def few_rows(x: Tensor) -> Few:
    """When x's device and dtype take the ways for few rows, and how."""
    return _device_rows(x)[1]


def invariant_tiles(x: Tensor) -> Tiles:
    """Tiles that do not depend on the number of rows."""
    return _device_rows(x)[0][-1][1]


def _device_rows(x: Tensor):
    if not x.is_cuda:
        return ((0, _INTERPRETER),), _INTERPRETER_FEW
    if x.dtype == torch.float32:
        return ((0, _FLOAT32),), _FLOAT32_FEW
    if torch.version.hip is not None:
        return ((0, _CDNA),), _CDNA_FEW
    major, minor = torch.cuda.get_device_capability(x.device)
    return TABLE[max(key for key in TABLE if key <= 10 * major + minor)]
