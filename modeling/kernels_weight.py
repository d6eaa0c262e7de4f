"""The experts' weight gradients on Hopper, in Gluon: kernels_gemm's `_weight_gradient_kernel` with warps that only
fetch, so that a tile's stores lie under the next one's products. The same products in the same order, so the same
bits. One of the operands may be tokens, fetched by the rows' order: no packed copy of them is made.

Letters as in kernels_gemm.py: M routed rows, K experts a token, E experts; dW is [E, H, W]. Of three warpgroups one
fetches, and two multiply, 64 rows of H each of a tile of 128 x 256. A stage is DEPTH routed rows.
"""

import torch
from torch import Tensor

from .kernels_gemm import Tile, halves, multiprocessors
from .kernels_plan import Plan
from .kernels_up import _begin_store, after, barrier, before
from .kernels_wide import LARGE, begin_copy, begin_reading, ragged

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
        "The Hopper weight gradient needs a Triton with Gluon for Hopper: pip install 'triton>=3.6'."
    ) from error

COLUMNS, DEPTH, STAGES = 256, 64, 4
# Gathered rows of a step are announced so many steps late: until then their copies may be on their way.
LAG = 1


@gluon.jit
def _tile(t, starts_ptr, DOWN: gl.constexpr, ACROSS: gl.constexpr):
    """Expert, tile down and across, first row and the row behind the last of item t."""
    e = t // (DOWN * ACROSS)
    i = t % (DOWN * ACROSS) // ACROSS
    return e, i, t % ACROSS, gl.load(starts_ptr + e), gl.load(starts_ptr + e + 1)


@gluon.jit
def _tokens(order_ptr, rows, end, K: gl.constexpr):
    return gl.load(order_ptr + rows, mask=rows < end, other=0) // K


@gluon.jit
def _fetch(a_desc, b_desc, b_ptr, a_s, b_s, full, free, order_ptr, starts_ptr, E, W: gl.constexpr, K: gl.constexpr,
           DOWN: gl.constexpr, ACROSS: gl.constexpr, STAGES: gl.constexpr, LAG: gl.constexpr,
           GATHER: gl.constexpr):  # fmt: skip
    """The warpgroup that copies: rows by the copy engine, tokens by every thread, their numbers a step ahead."""
    DEPTH: gl.constexpr = a_s.shape[1]
    HALF: gl.constexpr = a_s.shape[2]
    COLUMNS: gl.constexpr = b_s.shape[2]
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [1, 32], [4, 1], [1, 0])
    d = gl.arange(0, DEPTH, layout=gl.SliceLayout(1, layout))
    c = gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, layout))
    slot = 0
    phase = 1  # of the round before the first: every stage is free
    nth = 0
    for t in range(gl.program_id(0), E * DOWN * ACROSS, gl.num_programs(0)):
        e, i, j, start, end = _tile(t, starts_ptr, DOWN, ACROSS)
        if GATHER:
            tokens = _tokens(order_ptr, start + d, end, K)
        for k in range(start, end, DEPTH):
            if GATHER:
                at = b_ptr + tokens.to(gl.int64)[:, None] * W + (j * COLUMNS + c)[None, :]
                tokens = _tokens(order_ptr, k + DEPTH + d, end, K)
            mbarrier.wait(free.index(slot), phase)
            bar = full.index(slot)
            mbarrier.expect(bar, (2 * HALF + (0 if GATHER else COLUMNS)) * DEPTH * 2)
            begin_copy(a_desc, [k, i * (2 * HALF)], bar, a_s.index(2 * slot))
            begin_copy(a_desc, [k, i * (2 * HALF) + HALF], bar, a_s.index(2 * slot + 1))
            if GATHER:
                inside = (k + d < end)[:, None] & (j * COLUMNS + c < W)[None, :]
                begin_reading(b_s.index(slot), at, mask=inside)
                async_copy.commit_group()
                async_copy.wait_group(LAG)
                fence_async_shared()
                barrier()  # one thread announces for all: each has fenced what it wrote
                mbarrier.arrive(full.index((slot + STAGES - LAG) % STAGES), count=1, pred=nth >= LAG)
            else:
                size = gl.minimum(end - k, DEPTH)
                begin_copy(b_desc, [LARGE, k + size, LARGE - size, j * COLUMNS], bar, b_s.index(slot))
            slot, phase = after(slot, phase, STAGES)
            nth += 1
    if GATHER:
        async_copy.wait_group(0)
        fence_async_shared()
        barrier()
        for left in gl.static_range(LAG):
            mbarrier.arrive(full.index((slot + STAGES - LAG + left) % STAGES), count=1, pred=nth >= LAG - left)


@gluon.jit
def _multiply(a_s, b_s, places, full, free, ahead, dw_desc, starts_ptr, E, me: gl.constexpr, DOWN: gl.constexpr,
              ACROSS: gl.constexpr, STAGES: gl.constexpr, LEAD: gl.constexpr):  # fmt: skip
    """A warpgroup: 64 rows of each tile. The second begins a long tile when the first is LEAD steps into it."""
    DEPTH: gl.constexpr = a_s.shape[1]
    HALF: gl.constexpr = a_s.shape[2]
    COLUMNS: gl.constexpr = b_s.shape[2]
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLUMNS, 16])
    led = 0
    slot = 0
    phase = 0
    for t in range(gl.program_id(0), E * DOWN * ACROSS, gl.num_programs(0)):
        e, i, j, start, end = _tile(t, starts_ptr, DOWN, ACROSS)
        steps = (end - start + DEPTH - 1) // DEPTH
        leads = steps > STAGES  # else the first could be two tiles ahead
        acc = gl.full([HALF, COLUMNS], 0.0, gl.float32, layout=layout)
        if LEAD > 0 and me == 1:
            mbarrier.wait(ahead, led, pred=leads)
        for step in range(steps):
            mbarrier.wait(full.index(slot), phase)
            if LEAD > 0 and me == 0:
                mbarrier.arrive(ahead, count=1, pred=leads & (step == LEAD))
            acc = warpgroup_mma(a_s.index(2 * slot + me).permute((1, 0)), b_s.index(slot), acc, is_async=True)
            acc = warpgroup_mma_wait(1, deps=(acc,))
            mbarrier.arrive(free.index(before(slot, STAGES)), count=1, pred=step > 0)
            slot, phase = after(slot, phase, STAGES)
        acc = warpgroup_mma_wait(0, deps=(acc,))
        mbarrier.arrive(free.index(before(slot, STAGES)), count=1, pred=steps > 0)
        led = gl.where(leads, led ^ 1, led)
        left, right = halves(acc.to(places.dtype))
        for side in gl.static_range(2):
            first, second = halves(left if side == 0 else right)
            for part in gl.static_range(2):
                place = places.index(part)
                tma.store_wait(1)  # what was there has been read
                place.store(first if part == 0 else second)
                fence_async_shared()
                column = j * COLUMNS + (2 * side + part) * (COLUMNS // 4)
                _begin_store(dw_desc, [e, (2 * i + me) * HALF, column], place)
    tma.store_wait(0)


@gluon.jit
def _weight_kernel(
    a_desc, b_desc, b_ptr, dw_desc, order_ptr, starts_ptr, E, H: gl.constexpr, W: gl.constexpr, K: gl.constexpr,
    GATHER: gl.constexpr, COLUMNS: gl.constexpr, DEPTH: gl.constexpr, STAGES: gl.constexpr, LAG: gl.constexpr,
    LEAD: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """dW[e] = a[rows of e].T b[rows of e], of a [M, H] and b [M, W], or [N, W] gathered by order // K; persistent."""
    dtype: gl.constexpr = b_ptr.dtype.element_ty
    DOWN: gl.constexpr = (H + 127) // 128
    ACROSS: gl.constexpr = (W + COLUMNS - 1) // COLUMNS
    layout: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    a_s = gl.allocate_shared_memory(dtype, [2 * STAGES, DEPTH, 64], layout)
    b_s = gl.allocate_shared_memory(dtype, [STAGES, DEPTH, COLUMNS], layout)
    places0 = gl.allocate_shared_memory(dtype, [2, 64, COLUMNS // 4], layout)
    places1 = gl.allocate_shared_memory(dtype, [2, 64, COLUMNS // 4], layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    ahead = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=2 if GATHER else 1)
        mbarrier.init(free.index(i), count=2)  # both warpgroups
    mbarrier.init(ahead, count=1)
    fence_async_shared()
    gl.warp_specialize(
        [
            (_multiply, (a_s, b_s, places0, full, free, ahead, dw_desc, starts_ptr, E, 0, DOWN, ACROSS, STAGES, LEAD)),
            (_multiply, (a_s, b_s, places1, full, free, ahead, dw_desc, starts_ptr, E, 1, DOWN, ACROSS, STAGES, LEAD)),
            (_fetch, (a_desc, b_desc, b_ptr, a_s, b_s, full, free, order_ptr, starts_ptr, E, W, K, DOWN, ACROSS,
                      STAGES, LAG, GATHER)),
        ],
        [4, 4],
        [192, 120],
    )  # fmt: skip


def fits(a: Tensor, tile: Tile) -> bool:
    """Whether the kernel may take the place of such a tile of rows [M, H]; that the device is a Hopper, callers have
    seen."""
    return (tile.rows, tile.columns, tile.depth) == (128, 256, 64) and a.dtype in (torch.bfloat16, torch.float16)


def weight_gradient(a: Tensor, b: Tensor, plan: Plan, E: int, K: int, gather: bool, lead: int = 1) -> Tensor:
    """As kernels_gemm.weight_gradient, bit for bit, with a tile that `fits`; b is tokens [N, W] if `gather`."""
    H, W = a.shape[1], b.shape[1]
    if not len(a):
        return a.new_zeros((E, H, W))
    dw = a.new_empty((E, H, W))
    _weight_kernel[(multiprocessors(a),)](
        TensorDescriptor.from_tensor(a, [DEPTH, 64], gl.NVMMASharedLayout(128, 16, 2)), ragged(b, DEPTH, COLUMNS), b,
        TensorDescriptor.from_tensor(dw, [1, 64, COLUMNS // 4], gl.NVMMASharedLayout(128, 16, 3)),
        plan.order, plan.starts, E, H=H, W=W, K=K, GATHER=gather, COLUMNS=COLUMNS, DEPTH=DEPTH, STAGES=STAGES,
        LAG=LAG, LEAD=lead, num_warps=4,
    )  # fmt: skip
    return dw
