"""Triton GEMMs over rows that are sorted by expert, with gathers, activations and their gradients fused in.

Letters: N tokens, K experts a token, M = N * K routed rows, E experts, X inner width, Y output width, F expert width.
One persistent template serves every product whose rows are ragged (`_rows_kernel`), one every product whose inner
dimension is (`_weight_gradient_kernel`). The eager form, which defines the results, is moe.LamoeExperts.forward.
"""

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from .kernels_plan import Plan, early, tile_of

try:  # inside `try`, or the Hub loader refuses the whole model where Triton is missing
    import triton
    import triton.language as tl
    from triton.tools.ragged_tma import create_ragged_descriptor, load_ragged, store_ragged
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError as error:
    raise ImportError(
        "The fused experts need Triton: pip install triton, or experts_implementation='eager'."
    ) from error

from .kernels_launch import await_kernels, cdiv, next_power_of_2

PAD = 128  # rows behind the last expert's that a weight gradient may read
_CACHED = 2**23  # bytes that stay in the L2 cache while tiles are made of them


class Tile(NamedTuple):
    """How a kernel is cut: rows, columns and inner depth of a tile, warps, pipeline stages, blocks a multiprocessor,
    row tiles that share a weight tile, whether the next tile's loads begin before this one is stored, and whether
    kernels_up.py, kernels_hidden.py or kernels_weight.py may take its place on a Hopper."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int
    blocks: int = 1
    group: int = 8
    flatten: bool = False
    specialised: bool = False


@triton.jit
def halves(x):
    """The left and the right half of a tile's columns; both stay in the registers of the thread that holds them."""
    ROWS: tl.constexpr = x.shape[0]
    HALF: tl.constexpr = x.shape[1] // 2
    return tl.split(tl.permute(tl.reshape(x, (ROWS, 2, HALF)), (0, 2, 1)))


@triton.jit
def activation_and_slope(g, ACT: tl.constexpr):
    """act(g) and its derivative, float32."""
    if ACT == "silu":
        s = tl.sigmoid(g)
        y = g * s
        d = s * (1.0 + g * (1.0 - s))
    elif ACT == "gelu":
        c = 0.5 * (1.0 + tl.erf(g * 0.7071067811865476))
        y = g * c
        d = c + g * 0.3989422804014327 * tl.exp(-0.5 * g * g)
    elif ACT == "gelu_tanh":
        t = 2.0 * tl.sigmoid(1.5957691216057308 * (g + 0.044715 * g * g * g)) - 1.0
        y = 0.5 * g * (1.0 + t)
        d = 0.5 * (1.0 + t) + 0.5 * g * (1.0 - t * t) * 0.7978845608028654 * (1.0 + 0.134145 * g * g)
    else:
        tl.static_assert(ACT == "relu")
        y = tl.maximum(g, 0.0)
        d = tl.where(g > 0, 1.0, 0.0)
    return y, d


@triton.jit
def _store_rows(
    desc, ptr, value, row, end, plane, column, WIDTH: tl.constexpr, PLANES: tl.constexpr, RAGGED: tl.constexpr
):
    """Store a tile at rows [row, end) and columns [column, WIDTH) of one plane of y [M, PLANES, WIDTH]."""
    ROWS: tl.constexpr = value.shape[0]
    COLUMNS: tl.constexpr = value.shape[1]
    if RAGGED:
        store_ragged(desc, row, tl.minimum(end - row, ROWS), [0, column], value.to(desc.dtype))
    else:
        r = row + tl.arange(0, ROWS)
        c = column + tl.arange(0, COLUMNS)
        at = (r.to(tl.int64) * PLANES + plane)[:, None] * WIDTH + c[None, :]
        tl.store(ptr + at, value.to(ptr.dtype.element_ty), mask=(r < end)[:, None] & (c < WIDTH)[None, :])


@triton.jit
def _load_rows(
    desc, ptr, row, end, column, ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr, RAGGED: tl.constexpr
):
    """A tile of y [M, WIDTH] at rows [row, end) and columns [column, WIDTH); zeros outside."""
    if RAGGED:
        return load_ragged(desc, row, tl.minimum(end - row, ROWS), [0, column])
    else:
        r = row + tl.arange(0, ROWS)
        c = column + tl.arange(0, COLUMNS)
        at = r.to(tl.int64)[:, None] * WIDTH + c[None, :]
        return tl.load(ptr + at, mask=(r < end)[:, None] & (c < WIDTH)[None, :], other=0.0)


@triton.jit
def load_columns(rows, first, WIDTH: tl.constexpr, DEPTH: tl.constexpr, live=None):
    """DEPTH columns from `first` on of rows that are WIDTH wide, from pointers [n, 1] to their beginnings; zeros of
    rows that are not `live` [n, 1]."""
    c = first + tl.arange(0, DEPTH)
    if live is not None:
        return tl.load(rows + c[None, :], mask=live if WIDTH % DEPTH == 0 else live & (c < WIDTH)[None, :], other=0.0)
    elif WIDTH % DEPTH == 0:
        return tl.load(rows + c[None, :])
    else:
        return tl.load(rows + c[None, :], mask=(c < WIDTH)[None, :], other=0.0)


@triton.jit
def _rows_kernel(
    a_ptr, a_desc, w_desc, y_desc, y_ptr, h_ptr, bias_ptr,
    order_ptr, starts_ptr, tile_expert_ptr, tile_row_ptr, tiles_ptr,
    X: tl.constexpr, Y: tl.constexpr, K: tl.constexpr, GATHER: tl.constexpr, TRANSPOSED: tl.constexpr,
    GATED: tl.constexpr, ACT: tl.constexpr, SAVE: tl.constexpr, BIAS: tl.constexpr, RAGGED: tl.constexpr,
    PRECISION: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr,
    STAGES: tl.constexpr, PROGRAMS: tl.constexpr, FLATTEN: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """y[r] = a[r] W[expert of r] for the rows of one tile after the other; persistent.

    a: [M, X] packed, or [N, X] gathered by order // K. W: [E, Y, X]; [E, X, Y] if TRANSPOSED; [E, 2 Y, X] if GATED.
    y: [M, Y]; GATED: act(gate) * up, and h = (gate, up) [M, 2, Y] if SAVE; BIAS: [E, Y], added.
    """
    WIDE: tl.constexpr = COLUMNS // 2 if GATED else COLUMNS
    ACROSS: tl.constexpr = (Y + WIDE - 1) // WIDE
    await_kernels(PDL)
    count = tl.load(tiles_ptr)
    for t in tl.range(tl.program_id(0), count * ACROSS, PROGRAMS, flatten=FLATTEN):
        first = t // (GROUP * ACROSS) * GROUP
        size = tl.minimum(count - first, GROUP)
        tile = first + t % (GROUP * ACROSS) % size
        column = t % (GROUP * ACROSS) // size * WIDE
        e, row, end = tile_of(tile, tile_expert_ptr, tile_row_ptr, starts_ptr)
        if GATHER:
            tokens = tl.load(order_ptr + tl.minimum(row + tl.arange(0, ROWS), end - 1)) // K
            a_rows = a_ptr + tokens.to(tl.int64)[:, None] * X
        acc = tl.zeros((ROWS, COLUMNS), tl.float32)
        for k in tl.range(0, X, DEPTH, num_stages=STAGES):
            if GATHER:
                a = load_columns(a_rows, k, X, DEPTH)
            else:
                a = a_desc.load([row, k])
            if TRANSPOSED:
                w = tl.reshape(w_desc.load([e, k, column]), (DEPTH, COLUMNS))
            elif GATED:
                w = tl.reshape(w_desc.load([2 * e, column, k]), (COLUMNS, DEPTH)).T
            else:
                w = tl.reshape(w_desc.load([e, column, k]), (COLUMNS, DEPTH)).T
            acc = tl.dot(a, w, acc, input_precision=PRECISION)
        if GATED:
            gate, up = halves(acc)
            if SAVE:
                _store_rows(None, h_ptr, gate, row, end, 0, column, Y, 2, False)
                _store_rows(None, h_ptr, up, row, end, 1, column, Y, 2, False)
            y, _ = activation_and_slope(gate, ACT)
            _store_rows(y_desc, y_ptr, y * up, row, end, 0, column, Y, 1, RAGGED)
        else:
            if BIAS:
                cols = column + tl.arange(0, COLUMNS)
                bias = tl.load(bias_ptr + e.to(tl.int64) * Y + cols, mask=cols < Y, other=0.0)
                acc += bias.to(tl.float32)[None, :]
            _store_rows(y_desc, y_ptr, acc, row, end, 0, column, Y, 1, RAGGED)


@triton.jit
def _weight_gradient_kernel(
    a_ptr, a_desc, b_ptr, b_desc, dw_desc, starts_ptr, H: tl.constexpr, W: tl.constexpr, E,
    ACCUMULATE: tl.constexpr, RAGGED: tl.constexpr, PRECISION: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr, STAGES: tl.constexpr, PROGRAMS: tl.constexpr, FLATTEN: tl.constexpr,
):  # fmt: skip
    """dW[e] = a[rows of e].T b[rows of e]: [E, H, W], for packed a [M, H] and b [M, W]; zeros where e has no rows.

    The rows behind an expert's last one come as zeros from b and, where RAGGED, as they are from a: a must be finite.
    """
    DOWN: tl.constexpr = (H + ROWS - 1) // ROWS
    ACROSS: tl.constexpr = (W + COLUMNS - 1) // COLUMNS
    for t in tl.range(tl.program_id(0), E * DOWN * ACROSS, PROGRAMS, flatten=FLATTEN):
        e = t // (DOWN * ACROSS)
        i = t % (DOWN * ACROSS) // ACROSS * ROWS
        j = t % ACROSS * COLUMNS
        start = tl.load(starts_ptr + e)
        end = tl.load(starts_ptr + e + 1)
        acc = tl.zeros((ROWS, COLUMNS), tl.float32)
        for k in tl.range(start, end, DEPTH, num_stages=STAGES):
            if RAGGED:
                # two-dimensional: a reshaped left operand goes through registers, and Triton 3.6 then lets the next
                # copy overwrite a stage that other warps still read (wrong k-steps, about 1 in 2,000 tiles)
                a = a_desc.load([k, i])
            else:
                a = _load_rows(a_desc, a_ptr, k, end, i, DEPTH, ROWS, H, False)
            b = _load_rows(b_desc, b_ptr, k, end, j, DEPTH, COLUMNS, W, RAGGED)
            acc = tl.dot(tl.trans(a), b, acc, input_precision=PRECISION)
        if ACCUMULATE:
            acc += tl.reshape(dw_desc.load([e, i, j]), (ROWS, COLUMNS)).to(tl.float32)
        dw_desc.store([e, i, j], tl.reshape(acc.to(dw_desc.dtype), (1, ROWS, COLUMNS)))


@triton.jit
def _act_gradient_kernel(
    da_ptr, h_ptr, weights_ptr, order_ptr, starts_ptr, dh_ptr, dw_ptr, E,
    F: tl.constexpr, ACT: tl.constexpr, SCALED: tl.constexpr, PAD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Of each row, from dA before its router weight w: dh [2, F] and dw = <dA, A>.

    If SCALED, w * act(gate) * up takes the place of dA.

    The PAD rows behind the last one become zeros: weight gradients read them.
    """
    r = tl.program_id(0).to(tl.int64)
    rows = tl.load(starts_ptr + E)
    f = tl.arange(0, BLOCK)
    if r < rows:
        flat = tl.load(order_ptr + r).to(tl.int64)
        w = tl.load(weights_ptr + flat).to(tl.float32)
        total = tl.zeros((BLOCK,), tl.float32)
        for first in tl.static_range(0, F, BLOCK):
            c = first + f
            da = tl.load(da_ptr + r * F + c, mask=c < F, other=0.0).to(tl.float32)
            g = tl.load(h_ptr + 2 * r * F + c, mask=c < F, other=0.0).to(tl.float32)
            u = tl.load(h_ptr + (2 * r + 1) * F + c, mask=c < F, other=0.0).to(tl.float32)
            y, slope = activation_and_slope(g, ACT)
            total += da * y * u
            da *= w
            tl.store(dh_ptr + 2 * r * F + c, (da * u * slope).to(dh_ptr.dtype.element_ty), mask=c < F)
            tl.store(dh_ptr + (2 * r + 1) * F + c, (da * y).to(dh_ptr.dtype.element_ty), mask=c < F)
            if SCALED:
                tl.store(da_ptr + r * F + c, (w * y * u).to(da_ptr.dtype.element_ty), mask=c < F)
        tl.store(dw_ptr + flat, tl.sum(total).to(dw_ptr.dtype.element_ty))
    elif r < rows + PAD:
        zeros = tl.zeros((BLOCK,), dh_ptr.dtype.element_ty)
        for first in tl.static_range(0, F, BLOCK):
            c = first + f
            tl.store(dh_ptr + 2 * r * F + c, zeros, mask=c < F)
            tl.store(dh_ptr + (2 * r + 1) * F + c, zeros, mask=c < F)


def _ragged(rows: Tensor, tile_rows: int, tile_columns: int):
    """A descriptor of [M, width] that keeps within the rows of an expert; the tensor itself where there is no TMA."""
    return create_ragged_descriptor(rows, [tile_rows, tile_columns]) if has_tma(rows) else rows


def has_tma(x: Tensor) -> bool:
    """Whether tiles are moved by Hopper's copy engine; elsewhere descriptors become plain loads."""
    return x.is_cuda and torch.version.hip is None and torch.cuda.get_device_capability(x.device)[0] >= 9


def multiprocessors(x: Tensor) -> int:
    """Blocks that run at once; two where there is no GPU."""
    return torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 2


def row_of(x: Tensor, table: dict, cdna, float32, interpreter):
    """What x's device takes: of `table` the row of the newest compute capability that it has, or one of the others."""
    if not x.is_cuda:
        return interpreter
    if x.dtype == torch.float32:
        return float32
    if torch.version.hip is not None:
        return cdna
    major, minor = torch.cuda.get_device_capability(x.device)
    return table[max(key for key in table if key <= 10 * major + minor)]


def dot_precision(dtype: torch.dtype) -> str:
    """How float32 is multiplied: as `torch.set_float32_matmul_precision` says."""
    return "ieee" if dtype != torch.float32 or torch.get_float32_matmul_precision() == "highest" else "tf32"


def new_hidden(x_ND: Tensor, plan: Plan, F: int, save: bool) -> tuple[Tensor, Tensor]:
    """Room for what `gated_rows` returns."""
    M = plan.order.shape[0]
    return x_ND.new_empty((M, F)), x_ND.new_empty((M, 2 * F) if save else (0,))


def gated_rows(
    x_ND: Tensor, gate_up_EFD: Tensor, plan: Plan, K: int, act: str, save: bool, tile: Tile
) -> tuple[Tensor, Tensor]:
    """act(gate) * up of each row [M, F] and, if `save`, the pre-activation (gate, up) [M, 2F], else [0]."""
    E, F, D = gate_up_EFD.shape[0], gate_up_EFD.shape[1] // 2, x_ND.shape[1]
    a, h = new_hidden(x_ND, plan, F, save)
    weight = TensorDescriptor.from_tensor(gate_up_EFD.view(2 * E, F, D), [2, tile.columns // 2, tile.depth])
    _launch_rows(x_ND, x_ND, weight, a, tile.columns // 2, plan, K, tile, gather=True, act=act, h=h if save else None)
    return a, h


def plain_rows(
    a: Tensor, weight: Tensor, plan: Plan, K: int, tile: Tile, *, gather: bool, transposed: bool,
    bias: Tensor | None = None, out: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """y[r] = a[r] W[e] + bias[e]: [M, Y] of packed a [M, X], or of a [N, X] if `gather`.

    `weight` is [E, Y, X], or [E, X, Y] if `transposed`; `bias` [E, Y]; the result goes to `out` if given.
    """
    M, Y = plan.order.shape[0], weight.shape[2 if transposed else 1]
    y = a.new_empty((M, Y)) if out is None else out
    box = [1, tile.depth, tile.columns] if transposed else [1, tile.columns, tile.depth]
    a_desc = a if gather or not M else TensorDescriptor.from_tensor(a, [tile.rows, tile.depth])
    descriptor = TensorDescriptor.from_tensor(weight, box)
    _launch_rows(
        a, a_desc, descriptor, y, tile.columns, plan, K, tile, gather=gather, transposed=transposed, bias=bias
    )
    return y


def _launch_rows(
    a: Tensor, a_desc, w_desc, y: Tensor, wide: int, plan: Plan, K: int, tile: Tile, *, gather: bool,
    transposed: bool = False, act: str | None = None, h: Tensor | None = None, bias: Tensor | None = None,
):  # fmt: skip
    if not plan.order.shape[0]:
        return
    programs = multiprocessors(a) * tile.blocks
    _rows_kernel[(programs,)](
        a, a_desc, w_desc, _ragged(y, tile.rows, wide), y, h, bias,
        plan.order, plan.starts, plan.tile_expert, plan.tile_row, plan.tiles,
        X=a.shape[1], Y=y.shape[1], K=K, GATHER=gather, TRANSPOSED=transposed, GATED=act is not None, ACT=act,
        SAVE=h is not None, BIAS=bias is not None, RAGGED=has_tma(a), PRECISION=dot_precision(a.dtype), ROWS=tile.rows,
        COLUMNS=tile.columns, DEPTH=tile.depth, GROUP=tile.group, STAGES=tile.stages, PROGRAMS=programs,
        FLATTEN=tile.flatten, num_warps=tile.warps, **early(a, len(plan.order)),
    )  # fmt: skip


@functools.cache
def turned(H: int, W: int, tile: Tile) -> Tile:
    """The tile, or the tile with rows and columns exchanged where less of that lies outside [H, W].

    1408 columns are no multiple of 256, but one of 128: the gradient of V2-Lite's `down` on an H100 takes 1.72 ms, not
    1.92.
    """

    def covered(tile: Tile) -> int:
        return cdiv(H, tile.rows) * tile.rows * cdiv(W, tile.columns) * tile.columns

    return min(tile, tile._replace(rows=tile.columns, columns=tile.rows), key=covered)


def in_cache(a: Tensor, b: Tensor, E: int) -> bool:
    """Whether an expert's rows of both stay in the L2 cache while dW is made of them.

    Then Hopper's own kernel is the faster with a turned tile, too: V2-Lite's `down` on an H100, each way alone until
    its clock has settled, 0.50 ms, not 0.57, at 768 rows an expert; but 1.93, not 1.84, at 3,072.
    """
    return len(a) * (a.shape[1] + b.shape[1]) * a.element_size() <= E * _CACHED


def weight_gradient(a: Tensor, b: Tensor, plan: Plan, E: int, into: Tensor | None, tile: Tile) -> Tensor:
    """dW [E, H, W] = a[rows of e].T b[rows of e], of packed a [M, H] and b [M, W]; added to `into` if given.

    The `PAD` rows of `a` behind the last expert's must be finite.
    """
    H, W = a.shape[1], b.shape[1]
    if not len(a):
        return a.new_zeros((E, H, W)) if into is None else into
    tile = turned(H, W, tile)
    dw = a.new_empty((E, H, W)) if into is None else into
    programs = multiprocessors(a) * tile.blocks
    tma = has_tma(a)
    _weight_gradient_kernel[(programs,)](
        a, TensorDescriptor.from_tensor(a, [tile.depth, tile.rows]) if tma else a,
        b, _ragged(b, tile.depth, tile.columns),
        TensorDescriptor.from_tensor(dw, [1, tile.rows, tile.columns]), plan.starts, H=H, W=W, E=E,
        ACCUMULATE=into is not None, RAGGED=tma, PRECISION=dot_precision(a.dtype), ROWS=tile.rows,
        COLUMNS=tile.columns, DEPTH=tile.depth, STAGES=tile.stages, PROGRAMS=programs, FLATTEN=tile.flatten,
        num_warps=tile.warps,
    )  # fmt: skip
    return dw


def act_gradient(
    da: Tensor, h: Tensor, top_k_weights: Tensor, plan: Plan, E: int, act: str, scaled: bool
) -> tuple[Tensor, Tensor]:
    """dh [M, 2F], and the gradient [N, K] of the router weights; sentinels get zero.

    `da` [M, F] is the gradient of act(gate) * up before the router weight; if `scaled`, it is overwritten with
    w * act(gate) * up.
    """
    M, F = da.shape
    dh = torch.empty_like(h)
    dw = torch.zeros_like(top_k_weights)
    if M:
        block = min(next_power_of_2(F), 512)
        _act_gradient_kernel[(M,)](
            da, h, top_k_weights, plan.order, plan.starts, dh, dw, E,
            F=F, ACT=act, SCALED=scaled, PAD=PAD, BLOCK=block, num_warps=2,
        )  # fmt: skip
    return dh, dw
