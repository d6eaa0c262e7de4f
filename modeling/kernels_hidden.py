"""The gradient of the experts' hidden rows on Hopper, in Gluon: dA = dy W_down and the activation's gradient, in one
kernel. The same products and formulas as kernels_gemm's two, so the same bits of dh and of the scaled activation; but
dA never leaves the multiprocessor, and the reads and writes of the activation's gradient lie under products.

Letters as in kernels_gemm.py: M routed rows, E experts, X inner width, F expert width. Of three warpgroups two
multiply, 64 rows each of a tile of 128 x 256, and the first of them also copies what both read, a step less ahead than
there are stages. They leave dA in shared memory, from where the third takes it while they are at the next tile.
"""

import torch
from torch import Tensor

from .kernels_gemm import PAD, Tile, activation_and_slope, halves, multiprocessors
from .kernels_launch import cdiv
from .kernels_plan import Plan
from .kernels_up import after, barrier, before, row_tile
from .kernels_up import fits as up_fits
from .kernels_wide import begin_copy, box_layout, reinterpreted

try:  # inside `try`, or the Hub loader refuses the whole model where Triton is missing
    import triton
    import triton.language as tl
    from triton.experimental import gluon
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.language.nvidia.hopper import (
        fence_async_shared,
        mbarrier,
        warpgroup_mma,
        warpgroup_mma_wait,
    )
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
except ImportError as error:
    raise ImportError(
        "The Hopper gradient of hidden rows needs a Triton with Gluon for Hopper: pip install 'triton>=3.6'."
    ) from error

COLUMNS, DEPTH, STAGES = 256, 32, 6
# From this width on a tile without second rows takes as long as others: multiprocessors that run ahead of one another
# read weights from memory that their neighbours have in the L2 cache (V3's width: 3.33 ms, not 2.97).
DEEP = gl.constexpr(4096)
BLOCK, PIECES = 16, gl.constexpr(4)  # rows of dA that the third warpgroup takes at a time, in pieces of 64 columns


@gluon.jit
def _begin_step(a_desc, w_desc, a_s, w_s, full, slot, row, e, column, k, wanted):
    """Begin to copy the rows and weights of one step."""
    ROWS: gl.constexpr = a_s.shape[1]
    bar = full.index(slot)
    mbarrier.expect(bar, (2 * ROWS + w_s.shape[2]) * a_s.shape[2] * 2, wanted)
    begin_copy(a_desc, [row, k], bar, a_s.index(2 * slot), wanted)
    begin_copy(a_desc, [row + ROWS, k], bar, a_s.index(2 * slot + 1), wanted)
    begin_copy(w_desc, [e, k, column], bar, w_s.index(slot), wanted)


@gluon.jit
def _multiply(a_desc, w_desc, a_s, w_s, da_s, full, free, ready, drained, starts_ptr, tile_expert_ptr, tile_row_ptr,
              count, me: gl.constexpr, X: gl.constexpr, ACROSS: gl.constexpr, GROUP: gl.constexpr,
              STAGES: gl.constexpr):  # fmt: skip
    """A warpgroup: 64 rows of each tile of dA. The first copies for both, up to the next tile's first stages; the
    second has nothing to multiply where the expert ends in the first one's rows."""
    ROWS: gl.constexpr = a_s.shape[1]
    DEPTH: gl.constexpr = a_s.shape[2]
    COLUMNS: gl.constexpr = w_s.shape[2]
    STEPS: gl.constexpr = (X + DEPTH - 1) // DEPTH
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLUMNS, 16])
    nth = 0
    across, e, row, end = row_tile(gl.program_id(0), count, starts_ptr, tile_expert_ptr, tile_row_ptr, ACROSS, GROUP)
    if me == 0:
        for i in gl.static_range(STAGES):
            _begin_step(a_desc, w_desc, a_s, w_s, full, i, row, e, across * COLUMNS, i * DEPTH,
                        gl.program_id(0) < count * ACROSS)  # fmt: skip
    for t in range(gl.program_id(0), count * ACROSS, gl.num_programs(0)):
        slot = nth * STEPS % STAGES
        phase = nth * STEPS // STAGES & 1
        more = t + gl.num_programs(0) < count * ACROSS
        next_across, next_e, next_row, next_end = row_tile(
            t + gl.num_programs(0), count, starts_ptr, tile_expert_ptr, tile_row_ptr, ACROSS, GROUP
        )
        acc = gl.full([ROWS, COLUMNS], 0.0, gl.float32, layout=layout)
        steps = STEPS
        if me == 1 and X < DEEP:
            steps = gl.where(row + ROWS < end, STEPS, 0)
        for step in range(steps):
            mbarrier.wait(full.index(slot), phase)
            acc = warpgroup_mma(a_s.index(2 * slot + me), w_s.index(slot), acc, is_async=True)
            acc = warpgroup_mma_wait(1, deps=(acc,))
            done = before(slot, STAGES)
            if me == 0:
                coming = step - 1 + STAGES
                here = coming < STEPS
                wanted = (step > 0) & (here | more)
                mbarrier.wait(free.index(done), gl.where(slot == 0, phase ^ 1, phase), pred=wanted)
                _begin_step(a_desc, w_desc, a_s, w_s, full, done, gl.where(here, row, next_row),
                            gl.where(here, e, next_e), gl.where(here, across, next_across) * COLUMNS,
                            gl.where(here, coming, coming - STEPS) * DEPTH, wanted)  # fmt: skip
            else:
                mbarrier.arrive(free.index(done), count=1, pred=step > 0)
            slot, phase = after(slot, phase, STAGES)
        acc = warpgroup_mma_wait(0, deps=(acc,))
        done = before(slot, STAGES)
        if me == 0:
            mbarrier.wait(free.index(done), gl.where(slot == 0, phase ^ 1, phase), pred=more)
            _begin_step(a_desc, w_desc, a_s, w_s, full, done, next_row, next_e, next_across * COLUMNS,
                        (STAGES - 1) * DEPTH, more)  # fmt: skip
        else:
            mbarrier.arrive(free.index(done), count=1, pred=steps > 0)
            for _ in range(STEPS - steps):  # what it does not need
                mbarrier.wait(full.index(slot), phase)
                barrier()
                mbarrier.arrive(free.index(slot), count=1)
                slot, phase = after(slot, phase, STAGES)
        mbarrier.wait(drained.index(me), (nth & 1) ^ 1)
        left, right = halves(acc.to(da_s.dtype))
        piece0, piece1 = halves(left)
        piece2, piece3 = halves(right)
        da_s.index(PIECES * me).store(piece0)
        da_s.index(PIECES * me + 1).store(piece1)
        da_s.index(PIECES * me + 2).store(piece2)
        da_s.index(PIECES * me + 3).store(piece3)
        barrier()  # one thread announces for all
        mbarrier.arrive(ready.index(me), count=1)
        across = next_across
        e = next_e
        row = next_row
        end = next_end
        nth += 1  # noqa: SIM113 (Gluon has no enumerate)


@gluon.jit
def _pieces(h_ptr, r, end, columns, F: gl.constexpr):
    """Gate and up of rows r, PIECES pieces of columns; zeros behind the expert's last row and behind F."""
    WIDTH: gl.constexpr = columns.shape[0]
    at = h_ptr + (2 * r.to(gl.int64))[:, None] * F + columns[None, :]
    saved = ()
    for piece in gl.static_range(PIECES):
        mask = (r < end)[:, None] & (columns + piece * WIDTH < F)[None, :]
        gate = gl.load(at + piece * WIDTH, mask=mask, other=0.0)
        up = gl.load(at + piece * WIDTH + F, mask=mask, other=0.0)
        saved = saved + (gate, up)  # noqa: RUF005 (Gluon does not unpack)
    return saved


@gluon.jit
def _flat(order_ptr, r, end):
    """The flat index of each row; 0 behind the expert's last."""
    return gl.load(order_ptr + r, mask=r < end, other=0).to(gl.int64)


@gluon.jit
def _differentiate(da_s, ready, drained, h_ptr, weights_ptr, order_ptr, dh_ptr, a_ptr, parts_ptr, starts_ptr,
                   tile_expert_ptr, tile_row_ptr, count, F: gl.constexpr, ACROSS: gl.constexpr, GROUP: gl.constexpr,
                   ACT: gl.constexpr, SCALED: gl.constexpr):  # fmt: skip
    """The warpgroup that makes dh of each tile of dA, a block of rows at a time, with what was saved of the next block
    already on its way, and the indices of the one after that."""
    BLOCK: gl.constexpr = da_s.shape[1]
    WIDTH: gl.constexpr = da_s.shape[2]
    BLOCKS: gl.constexpr = 64 // BLOCK  # of one of the other warpgroups
    dtype: gl.constexpr = dh_ptr.dtype.element_ty
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    i = gl.arange(0, BLOCK, layout=gl.SliceLayout(1, layout))
    c = gl.arange(0, WIDTH, layout=gl.SliceLayout(0, layout))
    nth = 0
    across, _, row, end = row_tile(gl.program_id(0), count, starts_ptr, tile_expert_ptr, tile_row_ptr, ACROSS, GROUP)
    coming = _pieces(h_ptr, row + i, end, across * PIECES * WIDTH + c, F)
    coming_flat = _flat(order_ptr, row + i, end)
    coming_weight = gl.load(weights_ptr + coming_flat, mask=row + i < end, other=0.0)
    later_flat = _flat(order_ptr, row + BLOCK + i, end)  # of the block after the next
    for t in range(gl.program_id(0), count * ACROSS, gl.num_programs(0)):
        next_across, _, next_row, next_end = row_tile(
            t + gl.num_programs(0), count, starts_ptr, tile_expert_ptr, tile_row_ptr, ACROSS, GROUP
        )
        columns = across * PIECES * WIDTH + c
        for block in range(2 * BLOCKS):
            me = block // BLOCKS
            r = row + block * BLOCK + i
            live = r < end
            saved = coming
            flat = coming_flat
            weight = coming_weight.to(gl.float32)[:, None]
            last = block == 2 * BLOCKS - 1
            next_r = gl.where(last, next_row, row + (block + 1) * BLOCK) + i
            r_end = gl.where(last, next_end, end)
            coming = _pieces(h_ptr, next_r, r_end, gl.where(last, next_across, across) * PIECES * WIDTH + c, F)
            coming_flat = later_flat
            coming_weight = gl.load(weights_ptr + coming_flat, mask=next_r < r_end, other=0.0)
            of_next = block >= 2 * BLOCKS - 2
            later_r = gl.where(of_next, next_row - 2 * BLOCKS * BLOCK, row) + (block + 2) * BLOCK + i
            later_flat = _flat(order_ptr, later_r, gl.where(of_next, next_end, end))
            mbarrier.wait(ready.index(me), nth & 1, pred=block % BLOCKS == 0)
            total = gl.full([BLOCK, WIDTH], 0.0, gl.float32, layout=layout)
            for piece in gl.static_range(PIECES):
                da = da_s.index((me * PIECES + piece) * BLOCKS + block % BLOCKS).load(layout).to(gl.float32)
                up = saved[2 * piece + 1].to(gl.float32)
                y, slope = activation_and_slope(saved[2 * piece].to(gl.float32), ACT)
                total += da * y * up
                da *= weight
                mask = live[:, None] & (columns + piece * WIDTH < F)[None, :]
                at = dh_ptr + (2 * r.to(gl.int64))[:, None] * F + (columns + piece * WIDTH)[None, :]
                gl.store(at, (da * up * slope).to(dtype), mask=mask)
                gl.store(at + F, (da * y).to(dtype), mask=mask)
                if SCALED:
                    at = a_ptr + r.to(gl.int64)[:, None] * F + (columns + piece * WIDTH)[None, :]
                    gl.store(at, (weight * y * up).to(dtype), mask=mask)
            if block % BLOCKS == BLOCKS - 1:
                barrier()  # all have read
                mbarrier.arrive(drained.index(me), count=1)
            gl.store(parts_ptr + flat * ACROSS + across, gl.sum(total, axis=1), mask=live)
        across = next_across
        row = next_row
        end = next_end
        nth += 1  # noqa: SIM113


@gluon.jit
def _hidden_kernel(
    a_desc, w_desc, h_ptr, weights_ptr, dh_ptr, a_ptr, parts_ptr, order_ptr, starts_ptr, tile_expert_ptr, tile_row_ptr,
    tiles_ptr, X: gl.constexpr, F: gl.constexpr, ACT: gl.constexpr, SCALED: gl.constexpr, COLUMNS: gl.constexpr,
    DEPTH: gl.constexpr, BLOCK: gl.constexpr, GROUP: gl.constexpr, STAGES: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """dA[r] = a[r] W[expert of r], of a [M, X] and W [E, X, F], and from it dh [M, 2, F], parts [M, ACROSS] of each
    row's <dA, A> by column tile, at the row's flat index, and w * act(gate) * up [M, F] if SCALED; persistent."""
    dtype: gl.constexpr = dh_ptr.dtype.element_ty
    ACROSS: gl.constexpr = (F + COLUMNS - 1) // COLUMNS
    layout: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    a_s = gl.allocate_shared_memory(dtype, [2 * STAGES, 64, DEPTH], gl.NVMMASharedLayout(2 * DEPTH, 16, 2))
    w_s = gl.allocate_shared_memory(dtype, [STAGES, DEPTH, COLUMNS], layout)
    da_s = gl.allocate_shared_memory(dtype, [2 * PIECES, 64, COLUMNS // PIECES], layout)
    blocks = reinterpreted(da_s, [2 * PIECES * 64 // BLOCK, BLOCK, COLUMNS // PIECES], layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    ready = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())  # by warpgroup
    drained = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(free.index(i), count=1)  # by the second warpgroup; the first knows what it has read itself
    for i in gl.static_range(2):
        mbarrier.init(ready.index(i), count=1)
        mbarrier.init(drained.index(i), count=1)
    fence_async_shared()
    count = gl.load(tiles_ptr)
    gl.warp_specialize(
        [
            (_multiply, (a_desc, w_desc, a_s, w_s, da_s, full, free, ready, drained, starts_ptr, tile_expert_ptr,
                         tile_row_ptr, count, 0, X, ACROSS, GROUP, STAGES)),
            (_multiply, (a_desc, w_desc, a_s, w_s, da_s, full, free, ready, drained, starts_ptr, tile_expert_ptr,
                         tile_row_ptr, count, 1, X, ACROSS, GROUP, STAGES)),
            (_differentiate, (blocks, ready, drained, h_ptr, weights_ptr, order_ptr, dh_ptr, a_ptr, parts_ptr,
                              starts_ptr, tile_expert_ptr, tile_row_ptr, count, F, ACROSS, GROUP, ACT, SCALED)),
        ],
        [4, 4],
        [168, 168],
    )  # fmt: skip


@triton.jit
def _finish_kernel(
    parts_ptr, positions_ptr, starts_ptr, dw_ptr, dh_ptr, M, E, ACROSS: tl.constexpr, WIDTH: tl.constexpr,
    PAD: tl.constexpr, BLOCK: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """dw[flat] = the sum of the parts of its row, in order; 0 of a sentinel. The PAD rows of dh [M, WIDTH] behind the
    last one become zeros: weight gradients read them."""
    flat = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    real = tl.load(positions_ptr + flat, mask=flat < M, other=-1) >= 0
    total = tl.zeros((BLOCK,), tl.float32)
    for part in tl.static_range(ACROSS):
        total += tl.load(parts_ptr + flat * ACROSS + part, mask=real, other=0.0)
    tl.store(dw_ptr + flat, total.to(dw_ptr.dtype.element_ty), mask=flat < M)
    row = tl.load(starts_ptr + E).to(tl.int64) + tl.program_id(0)
    if (tl.program_id(0) < PAD) & (row < M):
        for first in tl.range(0, WIDTH, AT_ONCE):
            c = first + tl.arange(0, AT_ONCE)
            tl.store(dh_ptr + row * WIDTH + c, tl.zeros((AT_ONCE,), dh_ptr.dtype.element_ty), mask=c < WIDTH)


def fits(x: Tensor, tile: Tile) -> bool:
    """Whether the kernel may take the place of such a tile of rows [M, X]; that the device is a Hopper, callers have
    seen. A tile must have at least as many steps as there are stages."""
    return up_fits(x, tile) and x.shape[1] > (STAGES - 1) * DEPTH


def hidden_gradient(
    dy_MD: Tensor, down_EDF: Tensor, h: Tensor, top_k_weights: Tensor, plan: Plan, act: str, scaled: bool, tile: Tile
) -> tuple[Tensor, Tensor, Tensor]:
    """As kernels_gemm.plain_rows of packed rows [M, D] and act_gradient of its result, with a tile of 128 x 256 that
    `fits`: dh [M, 2F], the router weights' gradient [N, K], whose sums are cut otherwise, and, if `scaled`,
    w * act(gate) * up [M, F], else [0]."""
    (M, D), (E, _, F) = dy_MD.shape, down_EDF.shape
    a = dy_MD.new_empty((M, F) if scaled else (0,))
    dh, dw = torch.empty_like(h), torch.empty_like(top_k_weights)
    if not M:
        return dh, dw, a
    across = cdiv(F, COLUMNS)
    parts = dy_MD.new_empty((M, across), dtype=torch.float32)
    _hidden_kernel[(multiprocessors(dy_MD),)](
        TensorDescriptor.from_tensor(dy_MD, [64, DEPTH], box_layout(2, DEPTH)),
        TensorDescriptor.from_tensor(down_EDF, [1, DEPTH, COLUMNS], box_layout(3)),
        h, top_k_weights, dh, a, parts, plan.order, plan.starts, plan.tile_expert, plan.tile_row,
        plan.tiles, X=D, F=F, ACT=act, SCALED=scaled, COLUMNS=COLUMNS, DEPTH=DEPTH, BLOCK=BLOCK,
        GROUP=tile.group, STAGES=STAGES, num_warps=4,
    )  # fmt: skip
    _finish_kernel[(max(cdiv(M, 256), PAD),)](
        parts, plan.positions, plan.starts, dw, dh, M, E,
        ACROSS=across, WIDTH=2 * F, PAD=PAD, BLOCK=256, AT_ONCE=1024,
    )  # fmt: skip
    return dh, dw, a
