"""The gathered, gated up projection of many rows on Hopper, in Gluon: kernels_gemm's `_rows_kernel` with warps that
only fetch. The same products in the same order, so the same bits; but one warpgroup's activation and stores lie under
the other's products, which Triton has wait for one another.

Letters as in kernels_gemm.py: M routed rows, K experts a token, E experts, X inner width, F expert width. A stage is
DEPTH columns of X: two boxes of 64 gathered rows, and COLUMNS rows of weights, half gate and half up.
"""

import torch
from torch import Tensor

from .kernels_gemm import Tile, activation_and_slope, halves, multiprocessors, new_hidden
from .kernels_plan import Plan
from .kernels_wide import LARGE, begin_copy, begin_reading, box_layout, ragged

try:  # inside `try`, or the Hub loader refuses the whole model where Triton is missing
    from triton.experimental import gluon
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.language.nvidia.hopper import (
        async_copy,
        fence_async_shared,
        mbarrier,
        tma,
        warpgroup_mma,
        warpgroup_mma_wait,
    )
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
except ImportError as error:
    raise ImportError(
        "The Hopper up projection needs a Triton with Gluon for Hopper: pip install 'triton>=3.6'."
    ) from error

begin_store = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global  # renamed after Triton 3.6
barrier = getattr(gl, "thread_barrier", None) or gl.barrier
COLUMNS, DEPTH, STAGES = 256, 64, 4
# Rows of a step are announced so many steps late: until then their copies may be on their way.
LAG = 2


@gluon.jit
def row_tile(t, count, starts_ptr, tile_expert_ptr, tile_row_ptr, ACROSS: gl.constexpr, GROUP: gl.constexpr):
    """Column tile, expert, first row and the row behind the last of item t, or of the last item: GROUP row tiles share
    a weight tile."""
    t = gl.minimum(t, gl.maximum(count * ACROSS - 1, 0))
    first = t // (GROUP * ACROSS) * GROUP
    size = gl.minimum(gl.maximum(count, 1) - first, GROUP)
    tile = first + t % (GROUP * ACROSS) % size
    e = gl.load(tile_expert_ptr + tile, mask=count > 0, other=0)
    row = gl.load(tile_row_ptr + tile, mask=count > 0, other=0)
    return t % (GROUP * ACROSS) // size, e, row, gl.load(starts_ptr + e + 1)


@gluon.jit
def after(slot, phase, STAGES: gl.constexpr):
    last = slot == STAGES - 1
    return gl.where(last, 0, slot + 1), gl.where(last, phase ^ 1, phase)


@gluon.jit
def before(slot, STAGES: gl.constexpr):
    return gl.where(slot == 0, STAGES - 1, slot - 1)


@gluon.jit
def _tokens(order_ptr, row, end, K: gl.constexpr, ROWS: gl.constexpr, LAYOUT: gl.constexpr):
    """The tokens of ROWS rows; behind `end` that of the last row."""
    r = gl.minimum(row + gl.arange(0, ROWS, layout=LAYOUT), end - 1)
    return gl.load(order_ptr + gl.maximum(r, 0)) // K


@gluon.jit
def _begin_rows(place, rows, live, c, X: gl.constexpr):
    """Begin to copy columns c of rows, from pointers to their beginnings; zeros, which take less power to multiply, in
    the place of rows that are not `live`."""
    if X % place.shape[1] == 0:
        begin_reading(place, rows[:, None] + c[None, :], mask=live[:, None])
    else:
        begin_reading(place, rows[:, None] + c[None, :], mask=live[:, None] & (c < X)[None, :])


@gluon.jit
def _fetch(x_ptr, w_desc, a_s, w_s, full, free, order_ptr, starts_ptr, tile_expert_ptr, tile_row_ptr, count,
           X: gl.constexpr, K: gl.constexpr, ACROSS: gl.constexpr, GROUP: gl.constexpr, STAGES: gl.constexpr,
           LAG: gl.constexpr):  # fmt: skip
    """The warpgroup that copies: weights by the copy engine, rows of x by every thread; tokens one tile ahead."""
    ROWS: gl.constexpr = a_s.shape[1]
    DEPTH: gl.constexpr = a_s.shape[2]
    HALF: gl.constexpr = w_s.shape[1] // 2
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    of_rows: gl.constexpr = gl.SliceLayout(1, layout)
    i = gl.arange(0, ROWS, layout=of_rows)
    c = gl.arange(0, DEPTH, layout=gl.SliceLayout(0, layout))
    slot = 0
    phase = 1  # of the round before the first: every stage is free
    nth = 0
    across, e, row, end = row_tile(gl.program_id(0), count, starts_ptr, tile_expert_ptr, tile_row_ptr, ACROSS, GROUP)
    tokens0 = _tokens(order_ptr, row, end, K, ROWS, of_rows)
    tokens1 = _tokens(order_ptr, row + ROWS, end, K, ROWS, of_rows)
    for t in range(gl.program_id(0), count * ACROSS, gl.num_programs(0)):
        rows0 = x_ptr + tokens0.to(gl.int64) * X
        rows1 = x_ptr + tokens1.to(gl.int64) * X
        live0 = row + i < end
        live1 = row + ROWS + i < end
        column = across * HALF
        expert = e
        across, e, row, end = row_tile(
            t + gl.num_programs(0), count, starts_ptr, tile_expert_ptr, tile_row_ptr, ACROSS, GROUP
        )
        tokens0 = _tokens(order_ptr, row, end, K, ROWS, of_rows)
        tokens1 = _tokens(order_ptr, row + ROWS, end, K, ROWS, of_rows)
        for k in range(0, X, DEPTH):
            mbarrier.wait(free.index(slot), phase)
            bar = full.index(slot)
            mbarrier.expect(bar, w_s.shape[1] * DEPTH * 2)
            begin_copy(w_desc, [2 * expert, column, k], bar, w_s.index(slot))
            _begin_rows(a_s.index(2 * slot), rows0, live0, k + c, X)
            _begin_rows(a_s.index(2 * slot + 1), rows1, live1, k + c, X)
            async_copy.commit_group()
            async_copy.wait_group(LAG)
            fence_async_shared()
            barrier()  # one thread announces for all: each has fenced what it wrote
            mbarrier.arrive(full.index((slot + STAGES - LAG) % STAGES), count=1, pred=nth >= LAG)
            slot, phase = after(slot, phase, STAGES)
            nth += 1
    async_copy.wait_group(0)
    fence_async_shared()
    barrier()
    for left in gl.static_range(LAG):
        mbarrier.arrive(full.index((slot + STAGES - LAG + left) % STAGES), count=1, pred=nth >= LAG - left)


@gluon.jit
def _store(x, places, desc, row, end, column):
    """Begin to store rows [row, end), half of the columns through either place, once what was there has been read."""
    ROWS: gl.constexpr = x.shape[0]
    size = gl.maximum(gl.minimum(end - row, ROWS), 0)
    left, right = halves(x.to(places.dtype))
    for part in gl.static_range(2):
        place = places.index(part)
        tma.store_wait(1)
        place.store(left if part == 0 else right)
        fence_async_shared()
        at = [LARGE, row + size, LARGE - size, column + part * left.shape[1]]
        begin_store(desc, at, place)


@gluon.jit
def _multiply(a_s, w_s, places, full, free, ahead, y_desc, gate_desc, up_desc, starts_ptr, tile_expert_ptr,
              tile_row_ptr, count, me: gl.constexpr, X: gl.constexpr, ACROSS: gl.constexpr, GROUP: gl.constexpr,
              STAGES: gl.constexpr, LEAD: gl.constexpr, ACT: gl.constexpr, SAVE: gl.constexpr):  # fmt: skip
    """A warpgroup: 64 rows of each tile. The second begins a tile when the first is LEAD steps into it."""
    ROWS: gl.constexpr = a_s.shape[1]
    STEPS: gl.constexpr = (X + a_s.shape[2] - 1) // a_s.shape[2]
    HALF: gl.constexpr = w_s.shape[1] // 2
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 2 * HALF, 16])
    nth = 0
    for t in range(gl.program_id(0), count * ACROSS, gl.num_programs(0)):
        across, _, row, end = row_tile(t, count, starts_ptr, tile_expert_ptr, tile_row_ptr, ACROSS, GROUP)
        row += me * ROWS
        column = across * HALF
        slot = nth * STEPS % STAGES
        phase = nth * STEPS // STAGES & 1
        acc = gl.full([ROWS, 2 * HALF], 0.0, gl.float32, layout=layout)
        if LEAD > 0 and me == 1:
            mbarrier.wait(ahead, nth & 1)
        for step in range(STEPS):
            mbarrier.wait(full.index(slot), phase)
            if LEAD > 0 and me == 0:
                mbarrier.arrive(ahead, count=1, pred=step == LEAD)
            acc = warpgroup_mma(a_s.index(2 * slot + me), w_s.index(slot).permute((1, 0)), acc, is_async=True)
            acc = warpgroup_mma_wait(1, deps=(acc,))
            mbarrier.arrive(free.index(before(slot, STAGES)), count=1, pred=step > 0)
            slot, phase = after(slot, phase, STAGES)
        acc = warpgroup_mma_wait(0, deps=(acc,))
        mbarrier.arrive(free.index(before(slot, STAGES)), count=1)
        gate, up = halves(acc)
        if SAVE:
            _store(gate, places, gate_desc, row, end, column)
            _store(up, places, up_desc, row, end, column)
        y, _ = activation_and_slope(gate, ACT)
        _store(y * up, places, y_desc, row, end, column)
        nth += 1  # noqa: SIM113 (Gluon has no enumerate)
    tma.store_wait(0)


@gluon.jit
def _up_kernel(
    x_ptr, w_desc, y_desc, gate_desc, up_desc, order_ptr, starts_ptr, tile_expert_ptr, tile_row_ptr, tiles_ptr,
    X: gl.constexpr, F: gl.constexpr, K: gl.constexpr, ACT: gl.constexpr, SAVE: gl.constexpr, COLUMNS: gl.constexpr,
    DEPTH: gl.constexpr, GROUP: gl.constexpr, STAGES: gl.constexpr, LAG: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """y[r] = act(gate) * up of row r, and (gate, up) if SAVE: its token times W [2E, F, X]; persistent."""
    dtype: gl.constexpr = x_ptr.dtype.element_ty
    STEPS: gl.constexpr = (X + DEPTH - 1) // DEPTH
    ACROSS: gl.constexpr = (F + COLUMNS // 2 - 1) // (COLUMNS // 2)
    # a lead of one step must not need a stage that the second warpgroup still holds, and fit into a tile
    LEAD: gl.constexpr = 1 if STEPS > 1 and LAG + 1 < STAGES and STEPS + 1 >= STAGES else 0
    layout: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    a_s = gl.allocate_shared_memory(dtype, [2 * STAGES, 64, DEPTH], layout)
    w_s = gl.allocate_shared_memory(dtype, [STAGES, COLUMNS, DEPTH], layout)
    places0 = gl.allocate_shared_memory(dtype, [2, 64, COLUMNS // 4], layout)
    places1 = gl.allocate_shared_memory(dtype, [2, 64, COLUMNS // 4], layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    ahead = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=2)  # weights and rows
        mbarrier.init(free.index(i), count=2)  # both warpgroups
    mbarrier.init(ahead, count=1)
    fence_async_shared()
    count = gl.load(tiles_ptr)
    gl.warp_specialize(
        [
            (_multiply, (a_s, w_s, places0, full, free, ahead, y_desc, gate_desc, up_desc, starts_ptr, tile_expert_ptr,
                         tile_row_ptr, count, 0, X, ACROSS, GROUP, STAGES, LEAD, ACT, SAVE)),
            (_multiply, (a_s, w_s, places1, full, free, ahead, y_desc, gate_desc, up_desc, starts_ptr, tile_expert_ptr,
                         tile_row_ptr, count, 1, X, ACROSS, GROUP, STAGES, LEAD, ACT, SAVE)),
            (_fetch, (x_ptr, w_desc, a_s, w_s, full, free, order_ptr, starts_ptr, tile_expert_ptr, tile_row_ptr, count,
                      X, K, ACROSS, GROUP, STAGES, LAG)),
        ],
        [4, 4],
        [216, 72],
    )  # fmt: skip


def fits(x: Tensor, tile: Tile) -> bool:
    """Whether the kernel may take the place of such a tile of tokens x; that the device is a Hopper, callers have
    seen."""
    return tile.specialised and x.dtype in (torch.bfloat16, torch.float16)


def up_rows(
    x_ND: Tensor, gate_up_EFD: Tensor, plan: Plan, K: int, act: str, save: bool, tile: Tile
) -> tuple[Tensor, Tensor]:
    """As kernels_gemm.gated_rows, bit for bit, with a tile of 128 x 256 that `fits`."""
    E, F, D = gate_up_EFD.shape[0], gate_up_EFD.shape[1] // 2, x_ND.shape[1]
    a, h = new_hidden(x_ND, plan, F, save)
    if not len(a):
        return a, h
    width = COLUMNS // 4
    weight = TensorDescriptor.from_tensor(gate_up_EFD.view(2 * E, F, D), [2, COLUMNS // 2, DEPTH], box_layout(3))
    y_desc = ragged(a, 64, width)
    h_descs = (ragged(h[:, :F], 64, width), ragged(h[:, F:], 64, width)) if save else (y_desc, y_desc)
    _up_kernel[(multiprocessors(x_ND),)](
        x_ND, weight, y_desc, *h_descs, plan.order, plan.starts, plan.tile_expert, plan.tile_row, plan.tiles,
        X=D, F=F, K=K, ACT=act, SAVE=save, COLUMNS=COLUMNS, DEPTH=DEPTH, GROUP=tile.group, STAGES=STAGES, LAG=LAG,
        num_warps=4,
    )  # fmt: skip
    return a, h
