"""Who goes where: a stable counting sort of routed rows by expert on the device, and the sum that undoes it.

Letters: N tokens, K experts a token, M = N * K routed rows, E experts, D hidden. Ids of E and above are sentinels of
expert parallelism: they get no row, and contribute exactly nothing. No host synchronisation, no atomics.
"""

from typing import NamedTuple

import torch
from torch import Tensor

try:  # inside `try`, or the Hub loader refuses the whole model where Triton is missing
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError(
        "The fused experts need Triton: pip install triton, or experts_implementation='eager'."
    ) from error

from .kernels_launch import await_kernels, cdiv, next_power_of_2, overlapping

SMALLEST_TILE = 16
_IDS = 128  # ids that a program counts and places
_FEW = 2048  # so many are placed in one launch


class Plan(NamedTuple):
    """Views of one packed int32 buffer; all int32.

    order: [M], the flat index n * K + k of each row, experts ascending, stable; positions: [M], its inverse, -1 for
    sentinels; starts: [E + 1], first row of each expert; tile_expert, tile_row: the tiles of `tile_rows` rows, of
    which tiles: [1] are used.
    """

    order: Tensor
    positions: Tensor
    starts: Tensor
    tile_expert: Tensor
    tile_row: Tensor
    tiles: Tensor


def plan_size(M: int, E: int) -> int:
    """Length of the packed buffer of `M` rows and `E` experts."""
    return 2 * _even(M) + _even(E + 2) + 2 * _even(most_tiles(M, E, SMALLEST_TILE))


def unpack(packed: Tensor, M: int, E: int) -> Plan:
    """The parts of a packed plan."""
    tiles = _even(most_tiles(M, E, SMALLEST_TILE))
    starts, order, positions, expert, row = packed.split([_even(E + 2), _even(M), _even(M), tiles, tiles])
    return Plan(order[:M], positions[:M], starts[: E + 1], expert, row, starts[E + 1 : E + 2])


def most_tiles(M: int, E: int, tile_rows: int) -> int:
    """Tiles of `tile_rows` rows that `M` rows over `E` experts can need."""
    return M // tile_rows + min(M, E)


def _even(length: int) -> int:
    return (length + 3) // 4 * 4  # parts begin at multiples of 16 bytes


@triton.jit
def tile_of(tile, tile_expert_ptr, tile_row_ptr, starts_ptr):
    """Expert, first row and row behind the last one of a tile."""
    e = tl.load(tile_expert_ptr + tile)
    return e, tl.load(tile_row_ptr + tile), tl.load(starts_ptr + e + 1)


@triton.jit
def _read(ids_ptr, i, end, E):
    """Ids i as int32; E for what lies outside [0, E), ids or places."""
    ids = tl.load(ids_ptr + i, mask=i < end, other=E)
    return tl.where((ids >= 0) & (ids < E), ids, E).to(tl.int32)


@triton.jit
def _store_tiles(totals, group, starts_ptr, tile_expert_ptr, tile_row_ptr, E, TILE, GROUP: tl.constexpr):
    """Starts and tiles of the GROUP experts of one group; totals: the rows of every expert, then anything."""
    experts = group * GROUP + tl.arange(0, GROUP)
    every = tl.arange(0, totals.shape[0])
    totals = tl.where(every < E, totals, 0)
    each = (totals + TILE - 1) // TILE
    lower = every[None, :] < experts[:, None]
    same = every[None, :] == experts[:, None]
    start = tl.sum(tl.where(lower, totals[None, :], 0), axis=1)
    tile = tl.sum(tl.where(lower, each[None, :], 0), axis=1)
    tiles = tl.sum(tl.where(same, each[None, :], 0), axis=1)
    tl.store(starts_ptr + experts, start, mask=experts < E)
    if group == 0:
        tl.store(starts_ptr + E, tl.sum(totals))
        tl.store(starts_ptr + E + 1, tl.sum(each))
    for j in tl.range(0, tl.max(tiles)):
        tl.store(tile_expert_ptr + tile + j, experts, mask=j < tiles)
        tl.store(tile_row_ptr + tile + j, start + j * TILE, mask=j < tiles)


@triton.jit
def _store_places(order_ptr, positions_ptr, i, ids, row, end, E):
    real = (i < end) & (ids < E)
    tl.store(order_ptr + row, i, mask=real)
    tl.store(positions_ptr + i, tl.where(real, row, -1), mask=i < end)


@triton.jit(do_not_specialize=["M", "TILE"])
def _place_few_kernel(
    ids_ptr, order_ptr, positions_ptr, starts_ptr, tile_expert_ptr, tile_row_ptr, M, E, TILE, MOST: tl.constexpr,
    IDS: tl.constexpr, READ: tl.constexpr, EP: tl.constexpr, GROUP: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The whole plan of up to MOST ids in one launch: the first programs write the tiles of GROUP experts each, the
    others place IDS ids, each behind all that are less, and those equal to it that come sooner.

    What depends on the number of rows is no constant, or each new number would compile anew.
    """
    await_kernels(PDL)
    groups = tl.cdiv(E, GROUP)
    if tl.program_id(0) < groups:
        every = tl.arange(0, MOST)
        totals = tl.histogram(_read(ids_ptr, every, M, E), EP, mask=every < M)
        _store_tiles(totals, tl.program_id(0), starts_ptr, tile_expert_ptr, tile_row_ptr, E, TILE, GROUP)
    else:
        i = (tl.program_id(0) - groups) * IDS + tl.arange(0, IDS)
        ids = _read(ids_ptr, i, M, E)
        row = tl.zeros((IDS,), tl.int32)
        for first in tl.range(0, M, READ):
            j = first + tl.arange(0, READ)
            others = _read(ids_ptr, j, M, E)[:, None]
            sooner = (others < ids[None, :]) | ((others == ids[None, :]) & (j[:, None] < i[None, :]))
            row += tl.sum(sooner.to(tl.int32), axis=0)
        _store_places(order_ptr, positions_ptr, i, ids, row, M, E)


@triton.jit(do_not_specialize=["M"])
def _count_kernel(ids_ptr, read_ptr, counts_ptr, M, E, IDS: tl.constexpr, EP: tl.constexpr):
    """counts[s, e]: rows of expert e among ids [s * IDS, (s + 1) * IDS); that of E and above counts for
    nobody. And the ids as `_read` has them."""
    s = tl.program_id(0)
    i = s * IDS + tl.arange(0, IDS)
    ids = _read(ids_ptr, i, M, E)
    tl.store(read_ptr + i, ids, mask=i < M)
    tl.store(counts_ptr + s * EP + tl.arange(0, EP), tl.histogram(ids, EP))


@triton.jit(do_not_specialize=["SPLITS"])
def _scan_kernel(counts_ptr, totals_ptr, SPLITS, AT_ONCE: tl.constexpr, EP: tl.constexpr, GROUP: tl.constexpr):
    """counts[s, e] becomes the sum over the splits before s, and totals[e] that over all; of GROUP experts."""
    e = tl.program_id(0) * GROUP + tl.arange(0, GROUP)
    total = tl.zeros((GROUP,), tl.int32)
    for first in tl.range(0, SPLITS, AT_ONCE):
        split = first + tl.arange(0, AT_ONCE)
        at = counts_ptr + split[:, None] * EP + e[None, :]
        live = (split < SPLITS)[:, None]
        counts = tl.load(at, mask=live, other=0)
        tl.store(at, total[None, :] + tl.cumsum(counts, axis=0) - counts, mask=live)
        total += tl.sum(counts, axis=0)
    tl.store(totals_ptr + e, total)


@triton.jit(do_not_specialize=["M", "TILE"])
def _place_kernel(
    read_ptr, counts_ptr, totals_ptr, order_ptr, positions_ptr, starts_ptr, tile_expert_ptr, tile_row_ptr,
    M, E, TILE, IDS: tl.constexpr, READ: tl.constexpr, EP: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Place the rows of one split; behind the splits come programs that write the tiles of GROUP experts each."""
    splits = tl.cdiv(M, IDS)
    s = tl.program_id(0)
    totals = tl.load(totals_ptr + tl.arange(0, EP))
    if s >= splits:
        _store_tiles(totals, s - splits, starts_ptr, tile_expert_ptr, tile_row_ptr, E, TILE, GROUP)
    else:
        i = s * IDS + tl.arange(0, IDS)
        ids = tl.load(read_ptr + i, mask=i < M, other=E)
        row = tl.load(counts_ptr + s * EP + ids) + tl.gather(tl.cumsum(totals, axis=0) - totals, ids, 0)
        for first in tl.range(s * IDS, (s + 1) * IDS, READ):
            j = first + tl.arange(0, READ)
            others = tl.load(read_ptr + j)[:, None]  # those behind the last precede nobody
            row += tl.sum(((others == ids[None, :]) & (j[:, None] < i[None, :])).to(tl.int32), axis=0)
        _store_places(order_ptr, positions_ptr, i, ids, row, M, E)


@triton.jit
def _combine_kernel(
    y_ptr, positions_ptr, weights_ptr, shared_ptr, out_ptr, D,
    K: tl.constexpr, WEIGHTED: tl.constexpr, SHARED: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """out[n] = sum over k of weights[n, k] y[positions[n, k]] (+ shared[n]), float32, k ascending."""
    await_kernels(PDL)
    n = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = d < D
    total = tl.zeros((BLOCK,), tl.float32)
    for k in tl.static_range(K):
        row = tl.load(positions_ptr + n * K + k).to(tl.int64)
        # a sentinel's row and weight are never read: NaN times zero is NaN
        y = tl.load(y_ptr + row * D + d, mask=d < tl.where(row >= 0, D, 0), other=0.0).to(tl.float32)
        if WEIGHTED:
            y *= tl.load(weights_ptr + n * K + k, mask=row >= 0, other=0.0).to(tl.float32)
        total += y
    if SHARED:
        total += tl.load(shared_ptr + n * D + d, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + n * D + d, total.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _pack_kernel(
    x_ptr, positions_ptr, starts_ptr, y_ptr, N, M, D, E, K: tl.constexpr, PAD: tl.constexpr, BLOCK: tl.constexpr
):
    """y[positions[n, k]] = x[n]: each token is read once. The PAD rows behind the last one become zeros."""
    n = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    if n < N:
        x = tl.load(x_ptr + n * D + d, mask=d < D, other=0.0)
        for k in tl.static_range(K):
            row = tl.load(positions_ptr + n * K + k).to(tl.int64)
            tl.store(y_ptr + row * D + d, x, mask=d < tl.where(row >= 0, D, 0))
    if n < PAD:
        row = tl.load(starts_ptr + E) + n
        zeros = tl.zeros((BLOCK,), y_ptr.dtype.element_ty)
        tl.store(y_ptr + row * D + d, zeros, mask=d < tl.where(row < M, D, 0))


@triton.jit
def _spread_kernel(
    dout_ptr, y_ptr, positions_ptr, weights_ptr, dy_ptr, dw_ptr, D, K: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dy[positions[n, k]] = weights[n, k] dout[n], dw[n, k] = <dout[n], y[positions[n, k]]>; sentinels: dw = 0."""
    n = tl.program_id(0).to(tl.int64)
    k = tl.program_id(1)
    row = tl.load(positions_ptr + n * K + k).to(tl.int64)
    total = tl.zeros((BLOCK,), tl.float32)
    if row >= 0:
        weight = tl.load(weights_ptr + n * K + k).to(tl.float32)
        for first in tl.range(0, D, BLOCK):
            d = first + tl.arange(0, BLOCK)
            dout = tl.load(dout_ptr + n * D + d, mask=d < D, other=0.0).to(tl.float32)
            total += dout * tl.load(y_ptr + row * D + d, mask=d < D, other=0.0).to(tl.float32)
            tl.store(dy_ptr + row * D + d, (dout * weight).to(dy_ptr.dtype.element_ty), mask=d < D)
    tl.store(dw_ptr + n * K + k, tl.sum(total).to(dw_ptr.dtype.element_ty))


@triton.jit
def _expert_sums_kernel(y_ptr, starts_ptr, out_ptr, D, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """out[e] = sum of the rows of expert e."""
    e = tl.program_id(0)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    start = tl.load(starts_ptr + e)
    end = tl.load(starts_ptr + e + 1)
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    for first in tl.range(start, end, ROWS):
        r = first + tl.arange(0, ROWS)
        mask = (r < end)[:, None] & (d < D)[None, :]
        total += tl.load(y_ptr + r.to(tl.int64)[:, None] * D + d[None, :], mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + e.to(tl.int64) * D + d, tl.sum(total, axis=0).to(out_ptr.dtype.element_ty), mask=d < D)


def early(x: Tensor, M: int) -> dict[str, bool]:
    """`overlapping`, where so few rows are on their way that the borders of launches count.

    256 tokens of decode gain 1 to 1.5 % on an H200; training steps of V2-Lite and Qwen3 would lose 1 to 2 %.
    """
    return overlapping(x) if M <= _FEW else {"PDL": False}


def make_plan(top_k_index: Tensor, E: int, tile_rows: int, *, kept: bool) -> Tensor:
    """The packed plan of `top_k_index` [N, K], int64 or int32 and contiguous, for tiles of `tile_rows` rows.

    One that is `kept` has zeros in its unused places, so that two of them can be compared.
    """
    M = top_k_index.numel()
    make = torch.zeros if kept else torch.empty
    packed = make(plan_size(M, E), dtype=torch.int32, device=top_k_index.device)
    plan = unpack(packed, M, E)
    EP, groups = next_power_of_2(E + 1), cdiv(E, 16)
    parts = (plan.order, plan.positions, plan.starts, plan.tile_expert, plan.tile_row)
    if M <= _FEW:
        _place_few_kernel[(groups + cdiv(M, 32),)](
            top_k_index, *parts, M, E, tile_rows, MOST=_FEW, IDS=32, READ=1024, EP=EP, GROUP=16, num_warps=8,
            **early(top_k_index, M),
        )  # fmt: skip
        return packed
    splits = cdiv(M, _IDS)
    read, counts, totals = (packed.new_empty(length) for length in (splits * _IDS, splits * EP, EP))
    _count_kernel[(splits,)](top_k_index, read, counts, M, E, IDS=_IDS, EP=EP)
    group = min(8, EP)
    _scan_kernel[(EP // group,)](counts, totals, splits, AT_ONCE=512, EP=EP, GROUP=group, num_warps=8)
    _place_kernel[(splits + groups,)](
        read, counts, totals, *parts, M, E, tile_rows, IDS=_IDS, READ=32, EP=EP, GROUP=16
    )
    return packed


def combine(y: Tensor, plan: Plan, top_k_weights: Tensor | None, shared: Tensor | None, K: int, out: Tensor) -> Tensor:
    """Sum of each token's rows of y [M, D], weighted if [N, K] weights are given, plus `shared` [N, D]: `out` [N, D].

    In float32, k ascending. Sentinels add nothing.
    """
    N, D = out.shape
    if N:
        block = min(next_power_of_2(D), 1024)
        _combine_kernel[(N, cdiv(D, block))](
            y, plan.positions, top_k_weights, shared, out, D,
            K=K, WEIGHTED=top_k_weights is not None, SHARED=shared is not None, BLOCK=block, num_warps=4,
            **early(y, N * K),
        )  # fmt: skip
    return out


def pack(x: Tensor, plan: Plan, E: int, K: int, pad: int, out: Tensor) -> Tensor:
    """The token of each row: `out` [M, D]; the `pad` rows behind the last expert's are zeros."""
    N, D = x.shape
    M = len(out)
    if M:
        block = min(next_power_of_2(D), 1024)
        _pack_kernel[(max(N, pad), cdiv(D, block))](
            x, plan.positions, plan.starts, out, N, M, D, E, K=K, PAD=pad, BLOCK=block, num_warps=4
        )
    return out


def spread(dout: Tensor, y: Tensor, plan: Plan, top_k_weights: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of `combine` by y [M, D] (zeros where no expert has the row) and by the weights [N, K]."""
    N, K = top_k_weights.shape
    dy, dw = torch.zeros_like(y), torch.empty_like(top_k_weights)
    if N:
        block = min(next_power_of_2(y.shape[1]), 1024)
        _spread_kernel[(N, K)](dout, y, plan.positions, top_k_weights, dy, dw, y.shape[1], K=K, BLOCK=block)
    return dy, dw


def expert_sums(y: Tensor, plan: Plan, E: int) -> Tensor:
    """Sum of each expert's rows of y [M, D], in order: [E, D]."""
    D = y.shape[1]
    out = y.new_empty((E, D))
    _expert_sums_kernel[(E, cdiv(D, 64))](y, plan.starts, out, D, ROWS=16, BLOCK=64)
    return out
