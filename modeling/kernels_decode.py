"""Triton experts for few tokens, where the weights' bytes are all that counts: each is read once, as a stream.

Letters: N tokens, K experts a token, M = N * K routed rows, E experts, D hidden, F expert width. A handful of rows
goes through matrix-vector kernels that need no plan; more of them through tensor cores with the operands swapped,
weights as the long side. Both take two launches (after the plan), with the sum over a token's experts fused.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .kernels_gemm import activation_and_slope, dot_precision, load_columns
from .kernels_launch import await_kernels, cdiv, overlapping
from .kernels_plan import make_plan, most_tiles, tile_of, unpack

try:  # inside `try`, or the Hub loader refuses the whole model where Triton is missing
    import triton
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError as error:
    raise ImportError(
        "The fused experts need Triton: pip install triton, or experts_implementation='eager'."
    ) from error


# Wider tiles of tokens do not load those that are not there: most of their reads would be copies of the last one, and
# weights wait behind them (V3's widths, 32 rows an expert: 1,404 us, not 1,534; tiles of 16 lose 1 % to the masks).
MASKED = tl.constexpr(16)


class VectorTile(NamedTuple):
    """Weight rows and inner depth that a block of a matrix-vector kernel reads at a time, and its warps."""

    rows: int
    depth: int
    warps: int


class SwappedTile(NamedTuple):
    """Weight rows, tokens and inner depth of a block with swapped operands, its warps and pipeline stages."""

    rows: int
    tokens: int
    depth: int
    warps: int
    stages: int


@triton.jit
def _vector_up_kernel(
    x_ptr, w_ptr, ids_ptr, s_gate_ptr, s_up_ptr, a_ptr, M, E, D: tl.constexpr, F: tl.constexpr, K: tl.constexpr,
    S: tl.constexpr, ACT: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """a[m] = act(gate) * up of routed row m: ROWS elements of it. x: [N, D], w: [E, 2F, D], a: [M, F].

    Behind the routed rows: each token's shared expert [S, D], in pieces of F.
    """
    PIECES: tl.constexpr = (S + F - 1) // F
    await_kernels(PDL)
    m = tl.program_id(1)
    f = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    e = tl.load(ids_ptr + tl.minimum(m, M - 1)).to(tl.int64)
    live = (e >= 0) & (e < E)
    n = m // K
    gates = w_ptr + tl.where(live, e, 0) * (2 * F * D)
    ups = gates + F * D
    width = tl.where(live, F, 0)
    if PIECES > 0:  # noqa: SIM102 (a constant, or the branch is compiled)
        if m >= M:
            n = (m - M) // PIECES
            piece = (m - M) % PIECES * F
            gates = s_gate_ptr + piece.to(tl.int64) * D
            ups = s_up_ptr + piece.to(tl.int64) * D
            width = tl.minimum(S - piece, F)
    if tl.program_id(0) * ROWS < width:
        d = tl.arange(0, DEPTH)
        rows = f.to(tl.int64)[:, None] * D
        inside = (f < width)[:, None]
        gate = tl.zeros((ROWS, DEPTH), tl.float32)
        up = tl.zeros((ROWS, DEPTH), tl.float32)
        for first in tl.range(0, D, DEPTH):
            c = first + d
            x = tl.load(x_ptr + n.to(tl.int64) * D + c, mask=c < D, other=0.0).to(tl.float32)[None, :]
            mask = inside if D % DEPTH == 0 else inside & (c < D)[None, :]
            gate += tl.load(gates + rows + c[None, :], mask=mask, other=0.0).to(tl.float32) * x
            up += tl.load(ups + rows + c[None, :], mask=mask, other=0.0).to(tl.float32) * x
        y, _ = activation_and_slope(tl.sum(gate, axis=1), ACT)
        a = y * tl.sum(up, axis=1)
        tl.store(a_ptr + m.to(tl.int64) * F + f, a.to(a_ptr.dtype.element_ty), mask=f < width)


@triton.jit
def _vector_product(a_row, w_rows, width, row_inside, ROWS: tl.constexpr, DEPTH: tl.constexpr, F: tl.constexpr):
    """Elementwise products of ROWS weight rows with a, summed over steps of DEPTH: [ROWS, DEPTH]."""
    f = tl.arange(0, DEPTH)
    part = tl.zeros((ROWS, DEPTH), tl.float32)
    for first in tl.range(0, F, DEPTH):
        c = first + f
        a = tl.load(a_row + c, mask=c < width, other=0.0).to(tl.float32)[None, :]
        mask = row_inside[:, None] & (c < width)[None, :]
        part += tl.load(w_rows + c[None, :], mask=mask, other=0.0).to(tl.float32) * a
    return part


@triton.jit
def _vector_down_kernel(
    a_ptr, w_ptr, ids_ptr, weights_ptr, s_down_ptr, shared_ptr, out_ptr, M, E, D: tl.constexpr, F: tl.constexpr,
    K: tl.constexpr, S: tl.constexpr, SHARED: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """out[n] = sum over k of weights[n, k] W[e] a[n, k] (+ shared[n]): ROWS elements of it. w: [E, D, F].

    S: and the shared expert [D, S] of the pieces behind the routed rows of a.
    """
    PIECES: tl.constexpr = (S + F - 1) // F
    await_kernels(PDL)
    n = tl.program_id(1).to(tl.int64)
    d = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    total = tl.zeros((ROWS, DEPTH), tl.float32)
    for k in tl.range(K):
        e = tl.load(ids_ptr + n * K + k).to(tl.int64)
        if (e >= 0) & (e < E):
            weight = tl.load(weights_ptr + n * K + k).to(tl.float32)
            w_rows = w_ptr + e * (D * F) + d.to(tl.int64)[:, None] * F
            total += _vector_product(a_ptr + (n * K + k) * F, w_rows, F, d < D, ROWS, DEPTH, F) * weight
    for j in tl.static_range(PIECES):
        w_rows = s_down_ptr + d.to(tl.int64)[:, None] * S + j * F
        width = min(F, S - j * F)
        total += _vector_product(a_ptr + (M + n * PIECES + j) * F, w_rows, width, d < D, ROWS, DEPTH, F)
    out = tl.sum(total, axis=1)
    if SHARED:
        out += tl.load(shared_ptr + n * D + d, mask=d < D, other=0.0).to(tl.float32)
    tl.store(out_ptr + n * D + d, out.to(out_ptr.dtype.element_ty), mask=d < D)


@triton.jit
def _swapped_up_kernel(
    x_ptr, w_desc, a_ptr, done_ptr, order_ptr, starts_ptr, tile_expert_ptr, tile_row_ptr, tiles_ptr,
    D: tl.constexpr, F: tl.constexpr, K: tl.constexpr, ACT: tl.constexpr, PRECISION: tl.constexpr, ROWS: tl.constexpr,
    TOKENS: tl.constexpr, DEPTH: tl.constexpr, STAGES: tl.constexpr, COLUMNS: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """a.T = act(Wgate x.T) * (Wup x.T) for ROWS rows of both weights and the rows of one tile of TOKENS.

    The first program also clears done [COLUMNS], which the next kernel counts with.
    """
    await_kernels(PDL)
    ACROSS: tl.constexpr = (F + ROWS - 1) // ROWS
    tile = tl.program_id(0) // ACROSS
    f = tl.program_id(0) % ACROSS * ROWS
    if tl.program_id(0) == 0:
        for first in tl.static_range(0, COLUMNS, 128):
            c = first + tl.arange(0, 128)
            tl.store(done_ptr + c, tl.zeros((128,), tl.int32), mask=c < COLUMNS)
    if tile < tl.load(tiles_ptr):
        e, row, end = tile_of(tile, tile_expert_ptr, tile_row_ptr, starts_ptr)
        rows = row + tl.arange(0, TOKENS)
        tokens = tl.load(order_ptr + tl.minimum(rows, end - 1)) // K
        x_rows = x_ptr + tokens.to(tl.int64)[:, None] * D
        live = (rows < end)[:, None] if TOKENS > MASKED else None
        gate = tl.zeros((ROWS, TOKENS), tl.float32)
        up = tl.zeros((ROWS, TOKENS), tl.float32)
        for k in tl.range(0, D, DEPTH, num_stages=STAGES):
            x = load_columns(x_rows, k, D, DEPTH, live)
            gate = tl.dot(w_desc.load([e * (2 * F) + f, k]), x.T, gate, input_precision=PRECISION)
            up = tl.dot(w_desc.load([e * (2 * F) + F + f, k]), x.T, up, input_precision=PRECISION)
        y, _ = activation_and_slope(gate, ACT)
        fs = f + tl.arange(0, ROWS)
        at = a_ptr + rows.to(tl.int64)[None, :] * F + fs[:, None]
        tl.store(at, (y * up).to(a_ptr.dtype.element_ty), mask=(rows < end)[None, :] & (fs < F)[:, None])


@triton.jit
def _swapped_down_kernel(
    a_ptr, w_desc, y_ptr, positions_ptr, weights_ptr, shared_ptr, out_ptr, done_ptr,
    starts_ptr, tile_expert_ptr, tile_row_ptr, tiles_ptr, N, D: tl.constexpr, F: tl.constexpr, K: tl.constexpr,
    SHARED: tl.constexpr, PRECISION: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr, DEPTH: tl.constexpr,
    STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """y.T = W a.T for ROWS rows of W and one tile; who ends last for these ROWS sums up every token, k ascending."""
    await_kernels(PDL)
    ACROSS: tl.constexpr = (D + ROWS - 1) // ROWS
    tile = tl.program_id(0) // ACROSS
    column = tl.program_id(0) % ACROSS
    tiles = tl.load(tiles_ptr)
    last = (tiles == 0) & (tile == 0)
    ds = column * ROWS + tl.arange(0, ROWS)
    if tile < tiles:
        e, row, end = tile_of(tile, tile_expert_ptr, tile_row_ptr, starts_ptr)
        rows = row + tl.arange(0, TOKENS)
        a_rows = a_ptr + tl.minimum(rows, end - 1).to(tl.int64)[:, None] * F
        live = (rows < end)[:, None] if TOKENS > MASKED else None
        acc = tl.zeros((ROWS, TOKENS), tl.float32)
        for k in tl.range(0, F, DEPTH, num_stages=STAGES):
            a = load_columns(a_rows, k, F, DEPTH, live)
            acc = tl.dot(w_desc.load([e * D + column * ROWS, k]), a.T, acc, input_precision=PRECISION)
        at = y_ptr + rows.to(tl.int64)[None, :] * D + ds[:, None]
        tl.store(at, acc.to(y_ptr.dtype.element_ty), mask=(rows < end)[None, :] & (ds < D)[:, None])
        tl.debug_barrier()  # every thread's rows are stored before this block counts as done
        last = tl.atomic_add(done_ptr + column, 1, sem="acq_rel") == tiles - 1
    if last:
        for first in tl.range(0, N, TOKENS):
            n = first + tl.arange(0, TOKENS)
            at = n.to(tl.int64)[:, None] * D + ds[None, :]
            inside = (n < N)[:, None] & (ds < D)[None, :]
            total = tl.zeros((TOKENS, ROWS), tl.float32)
            for k in tl.static_range(K):
                r = tl.load(positions_ptr + n * K + k, mask=n < N, other=-1).to(tl.int64)
                weight = tl.load(weights_ptr + n * K + k, mask=(n < N) & (r >= 0), other=0.0).to(tl.float32)
                mask = inside & (r >= 0)[:, None]
                y = tl.load(y_ptr + r[:, None] * D + ds[None, :], mask=mask, other=0.0, cache_modifier=".cg")
                total += y.to(tl.float32) * weight[:, None]
            if SHARED:
                total += tl.load(shared_ptr + at, mask=inside, other=0.0).to(tl.float32)
            tl.store(out_ptr + at, total.to(out_ptr.dtype.element_ty), mask=inside)


def vector_experts(
    x: Tensor, top_k_index: Tensor, top_k_weights: Tensor, gate_up: Tensor, down: Tensor, act: str,
    shared: Tensor | None, up_tile: VectorTile, down_tile: VectorTile,
    shared_weights: tuple[Tensor, Tensor, Tensor] | None = None,
) -> Tensor:  # fmt: skip
    """The experts of a handful of tokens, row by row: [N, D]. Best where hardly two rows share an expert.

    `shared_weights`: gate [S, D], up [S, D] and down [D, S] of an expert that every token has, with weight one.
    """
    N, K = top_k_index.shape
    E, D, F = down.shape
    M = N * K
    s_gate, s_up, s_down = shared_weights or (None, None, None)
    S = 0 if s_gate is None else len(s_gate)
    rows = M + N * cdiv(S, F)
    a, out = x.new_empty((rows, F)), torch.empty_like(x)
    _vector_up_kernel[(cdiv(F, up_tile.rows), rows)](
        x, gate_up, top_k_index, s_gate, s_up, a, M, E,
        D=D, F=F, K=K, S=S, ACT=act, ROWS=up_tile.rows, DEPTH=up_tile.depth, num_warps=up_tile.warps,
        **overlapping(x),
    )  # fmt: skip
    _vector_down_kernel[(cdiv(D, down_tile.rows), N)](
        a, down, top_k_index, top_k_weights, s_down, shared, out, M, E, D=D, F=F, K=K, S=S, SHARED=shared is not None,
        ROWS=down_tile.rows, DEPTH=down_tile.depth, num_warps=down_tile.warps, **overlapping(x),
    )  # fmt: skip
    return out


def swapped_experts(
    x: Tensor, top_k_index: Tensor, top_k_weights: Tensor, gate_up: Tensor, down: Tensor, act: str,
    shared: Tensor | None, up_tile: SwappedTile, down_tile: SwappedTile,
) -> Tensor:  # fmt: skip
    """The experts of some hundreds of rows, grouped by expert: [N, D]. Both tiles have the same `tokens`."""
    N, K = top_k_index.shape
    E, D, F = down.shape
    M = N * K
    plan = unpack(make_plan(top_k_index, E, up_tile.tokens, kept=False), M, E)
    most = most_tiles(M, E, up_tile.tokens)
    across = cdiv(D, down_tile.rows)
    a, y, out = x.new_empty((M, F)), x.new_empty((M, D)), torch.empty_like(x)
    done = plan.starts.new_empty(across)
    tiles = (plan.starts, plan.tile_expert, plan.tile_row, plan.tiles)
    precision = dot_precision(x.dtype)
    _swapped_up_kernel[(most * cdiv(F, up_tile.rows),)](
        x, TensorDescriptor.from_tensor(gate_up.view(-1, D), [up_tile.rows, up_tile.depth]), a, done, plan.order,
        *tiles, D=D, F=F, K=K, ACT=act, PRECISION=precision, ROWS=up_tile.rows, TOKENS=up_tile.tokens,
        DEPTH=up_tile.depth, STAGES=up_tile.stages, COLUMNS=across, num_warps=up_tile.warps, **overlapping(x),
    )  # fmt: skip
    _swapped_down_kernel[(most * across,)](
        a, TensorDescriptor.from_tensor(down.view(-1, F), [down_tile.rows, down_tile.depth]), y,
        plan.positions, top_k_weights, shared, out, done, *tiles, N, D=D, F=F, K=K, SHARED=shared is not None,
        PRECISION=precision, ROWS=down_tile.rows, TOKENS=down_tile.tokens, DEPTH=down_tile.depth,
        STAGES=down_tile.stages, num_warps=down_tile.warps, **overlapping(x),
    )  # fmt: skip
    return out
