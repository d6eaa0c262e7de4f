"""The experts' weight gradients on Hopper, in Gluon: kernels_gemm's `_weight_gradient_kernel` with a warpgroup that
only copies, ahead over the borders of tiles, where Triton's loop runs dry and fills again. The same products in the
same order, so the same bits.

Letters as in kernels_gemm.py: M routed rows, E experts; dW is [E, H, W]. Of three warpgroups one copies, and two
multiply, 64 rows of H each of a tile of 128 x 256. A stage is DEPTH routed rows. A tile of 256 x 128 is the transpose
of one of 128 x 256: a and b change places, and pieces are transposed on their way through shared memory. A gradient
that is added to comes by the copy engine behind the tile's last stage, in the place of some stages.
"""

from torch import Tensor

from .kernels_gemm import Tile, halves, multiprocessors
from .kernels_plan import Plan
from .kernels_up import after, barrier, before, begin_store
from .kernels_wide import LARGE, begin_copy, box_layout, ragged

try:  # inside `try`, or the Hub loader refuses the whole model where Triton is missing
    from triton.experimental import gluon
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.language.nvidia.hopper import (
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

COLUMNS, DEPTH = 256, 32
STAGES, STAGES_ADDING = 8, 5


@gluon.jit
def _tile(t, starts_ptr, DOWN: gl.constexpr, ACROSS: gl.constexpr):
    """Expert, tile down and across, first row and the row behind the last of item t."""
    e = t // (DOWN * ACROSS)
    i = t % (DOWN * ACROSS) // ACROSS
    return e, i, t % ACROSS, gl.load(starts_ptr + e), gl.load(starts_ptr + e + 1)


@gluon.jit
def _piece(e, i, j, nth: gl.constexpr, place, TURNED: gl.constexpr):
    """Where in dW the nth of a tile's eight pieces begins, each of the size of `place`: four of the first 64 rows,
    four of the others."""
    row = (2 * i + nth // 4) * place.shape[0]
    column = (4 * j + nth % 4) * place.shape[1]
    return [e, column, row] if TURNED else [e, row, column]


@gluon.jit
def _begin_rows(desc, k, size, column, bar, to, ZEROS: gl.constexpr):
    """Begin to copy rows from k on, and what lies behind `size` of them as it is, or as zeros."""
    begin_copy(desc, [LARGE, k + size, LARGE - size, column] if ZEROS else [k, column], bar, to)


@gluon.jit
def _copy(a_desc, b_desc, dw_desc, a_s, b_s, old_s, full, free, old_full, old_free, starts_ptr, E,
          DOWN: gl.constexpr, ACROSS: gl.constexpr, ADD: gl.constexpr, TURNED: gl.constexpr,
          STAGES: gl.constexpr):  # fmt: skip
    """The warpgroup that copies: a as it is, zeros behind the expert's last row of b; if TURNED, the other way round:
    only the operand that is copied as it is must be finite behind the last expert's rows. If ADD, also the old dW."""
    DEPTH: gl.constexpr = a_s.shape[1]
    HALF: gl.constexpr = a_s.shape[2]
    COLUMNS: gl.constexpr = b_s.shape[2]
    slot = 0
    phase = 1  # of the round before the first: every stage is free
    old_phase = 1
    for t in range(gl.program_id(0), E * DOWN * ACROSS, gl.num_programs(0)):
        e, i, j, start, end = _tile(t, starts_ptr, DOWN, ACROSS)
        for k in range(start, end, DEPTH):
            mbarrier.wait(free.index(slot), phase)
            bar = full.index(slot)
            mbarrier.expect(bar, (2 * HALF + COLUMNS) * DEPTH * 2)
            size = gl.minimum(end - k, DEPTH)
            _begin_rows(a_desc, k, size, 2 * i * HALF, bar, a_s.index(2 * slot), TURNED)
            _begin_rows(a_desc, k, size, (2 * i + 1) * HALF, bar, a_s.index(2 * slot + 1), TURNED)
            _begin_rows(b_desc, k, size, j * COLUMNS, bar, b_s.index(slot), not TURNED)
            slot, phase = after(slot, phase, STAGES)
        if ADD:
            mbarrier.wait(old_free, old_phase)
            mbarrier.expect(old_full, 2 * HALF * COLUMNS * 2)
            for nth in gl.static_range(8):
                place = old_s.index(nth)
                begin_copy(dw_desc, _piece(e, i, j, nth, place, TURNED), old_full, place)
            old_phase ^= 1


@gluon.jit
def _store(x, old_s, place, desc, e, i, j, nth: gl.constexpr, ADD: gl.constexpr, TURNED: gl.constexpr):
    """Begin to store a tile's nth piece, added to what it was if ADD, through a place, once what was there has been
    read."""
    at = _piece(e, i, j, nth, place, TURNED)
    if ADD:
        old = old_s.index(nth)
        x += (old.permute((1, 0)) if TURNED else old).load(x.type.layout).to(gl.float32)
    tma.store_wait(1)
    (place.permute((1, 0)) if TURNED else place).store(x.to(place.dtype))
    fence_async_shared()
    begin_store(desc, at, place)


@gluon.jit
def _multiply(a_s, b_s, old_s, places, full, free, old_full, old_free, dw_desc, starts_ptr, E, me: gl.constexpr,
              DOWN: gl.constexpr, ACROSS: gl.constexpr, ADD: gl.constexpr, TURNED: gl.constexpr,
              STAGES: gl.constexpr):  # fmt: skip
    """A warpgroup: 64 rows of each tile."""
    HALF: gl.constexpr = a_s.shape[2]
    COLUMNS: gl.constexpr = b_s.shape[2]
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLUMNS, 16])
    slot = 0
    phase = 0
    old_phase = 0
    for t in range(gl.program_id(0), E * DOWN * ACROSS, gl.num_programs(0)):
        e, i, j, start, end = _tile(t, starts_ptr, DOWN, ACROSS)
        acc = gl.full([HALF, COLUMNS], 0.0, gl.float32, layout=layout)
        for k in range(start, end, a_s.shape[1]):
            mbarrier.wait(full.index(slot), phase)
            acc = warpgroup_mma(a_s.index(2 * slot + me).permute((1, 0)), b_s.index(slot), acc, is_async=True)
            acc = warpgroup_mma_wait(1, deps=(acc,))
            mbarrier.arrive(free.index(before(slot, STAGES)), count=1, pred=k > start)
            slot, phase = after(slot, phase, STAGES)
        acc = warpgroup_mma_wait(0, deps=(acc,))
        mbarrier.arrive(free.index(before(slot, STAGES)), count=1, pred=end > start)
        if ADD:
            mbarrier.wait(old_full, old_phase)
        left, right = halves(acc)
        for side in gl.static_range(2):
            first, second = halves(left if side == 0 else right)
            _store(first, old_s, places.index(0), dw_desc, e, i, j, 4 * me + 2 * side, ADD, TURNED)
            _store(second, old_s, places.index(1), dw_desc, e, i, j, 4 * me + 2 * side + 1, ADD, TURNED)
        if ADD:
            barrier()  # one thread announces for all: each has read
            mbarrier.arrive(old_free, count=1)
            old_phase ^= 1
    tma.store_wait(0)


@gluon.jit
def _weight_kernel(
    a_desc, b_desc, dw_desc, starts_ptr, E, H: gl.constexpr, W: gl.constexpr, ADD: gl.constexpr, TURNED: gl.constexpr,
    COLUMNS: gl.constexpr, DEPTH: gl.constexpr, STAGES: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """dW[e] = a[rows of e].T b[rows of e], of a [M, H] and b [M, W], or its transpose if TURNED, added to dW if ADD;
    zeros where e has no rows; persistent."""
    dtype: gl.constexpr = dw_desc.dtype
    DOWN: gl.constexpr = (H + 127) // 128
    ACROSS: gl.constexpr = (W + COLUMNS - 1) // COLUMNS
    layout: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    a_s = gl.allocate_shared_memory(dtype, [2 * STAGES, DEPTH, 64], layout)
    b_s = gl.allocate_shared_memory(dtype, [STAGES, DEPTH, COLUMNS], layout)
    places0 = gl.allocate_shared_memory(dtype, [2, 64, COLUMNS // 4], layout)
    places1 = gl.allocate_shared_memory(dtype, [2, 64, COLUMNS // 4], layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(free.index(i), count=2)  # both warpgroups
    if ADD:
        old_s = gl.allocate_shared_memory(dtype, [8, 64, COLUMNS // 4], layout)
        old_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
        old_free = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
        mbarrier.init(old_full, count=1)
        mbarrier.init(old_free, count=2)
    else:  # nothing of which is used
        old_s, old_full, old_free = places0, full, free
    fence_async_shared()
    gl.warp_specialize(
        [
            (_multiply, (a_s, b_s, old_s, places0, full, free, old_full, old_free, dw_desc, starts_ptr, E, 0, DOWN,
                         ACROSS, ADD, TURNED, STAGES)),
            (_multiply, (a_s, b_s, old_s, places1, full, free, old_full, old_free, dw_desc, starts_ptr, E, 1, DOWN,
                         ACROSS, ADD, TURNED, STAGES)),
            (_copy, (a_desc, b_desc, dw_desc, a_s, b_s, old_s, full, free, old_full, old_free, starts_ptr, E, DOWN,
                     ACROSS, ADD, TURNED, STAGES)),
        ],
        [4, 4],
        [216, 72],
    )  # fmt: skip


def weight_gradient_ahead(
    a: Tensor, b: Tensor, plan: Plan, E: int, into: Tensor | None, turn: bool, tile: Tile
) -> Tensor:
    """As kernels_gemm.weight_gradient, bit for bit, with a tile of 128 x 256 that kernels_up.fits, or with one of
    256 x 128 if `turn`: the transpose, from b.T a, is stored transposed."""
    H, W = a.shape[1], b.shape[1]
    if not len(a):
        return a.new_zeros((E, H, W)) if into is None else into
    dw = a.new_empty((E, H, W)) if into is None else into
    if turn:
        descriptors = ragged(b, DEPTH, 64), TensorDescriptor.from_tensor(a, [DEPTH, COLUMNS], box_layout(2))
        H, W = W, H
    else:
        descriptors = TensorDescriptor.from_tensor(a, [DEPTH, 64], box_layout(2)), ragged(b, DEPTH, COLUMNS)
    _weight_kernel[(multiprocessors(a),)](
        *descriptors, TensorDescriptor.from_tensor(dw, [1, 64, COLUMNS // 4], box_layout(3)), plan.starts, E,
        H=H, W=W, ADD=into is not None, TURNED=turn, COLUMNS=COLUMNS, DEPTH=DEPTH,
        STAGES=STAGES if into is None else STAGES_ADDING, num_warps=4,
    )  # fmt: skip
    return dw
