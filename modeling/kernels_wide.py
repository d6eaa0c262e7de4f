"""Decode over latents for more than 16 rows of heads and tokens, on Hopper, in Gluon: kernels_attention's
`_decode_kernel` with the order of copies and products laid down by hand.

Triton orders the copy of the next keys behind the products of these, and splits a chain of products differently from
the last of it. Here the copy begins as soon as the tile before the last is done with, and a chain is one. That is
`_wide_kernel`, for the rows of one program. `_seesaw_kernel` is for more of them: several programs then read the same
keys, most from the L2 cache, and products, no longer memory, are what a step waits for.

Letters as in kernels_attention.py, which decides what runs; CH and RH are the widths of the parts of latents and
rotated keys, of which there are two (K1) or one.
"""

import functools

import torch
from torch import Tensor

from .kernels_launch import await_kernels_alone, cdiv, overlapping

try:  # inside `try`, or the Hub loader refuses the whole model where Triton is missing
    from triton.experimental import gluon
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.language.nvidia.hopper import (
        async_copy,
        fence_async_shared,
        mbarrier,
        tma,
        warpgroup_mma,
        warpgroup_mma_init,
        warpgroup_mma_wait,
    )
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
except ImportError as error:
    raise ImportError(
        "The wide decode kernel needs a Triton with Gluon for Hopper: pip install 'triton>=3.6'."
    ) from error

begin_copy = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared  # renamed after Triton 3.6
begin_reading = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared
_REINTERPRETS = gl.constexpr(hasattr(gl.shared_memory_descriptor, "reinterpret"))
ROWS, KEYS = 64, 64
LARGE, _LARGER = gl.constexpr(2**30), 0x7FFF0000


@gluon.jit
def reinterpreted(place, SHAPE: gl.constexpr, LAYOUT: gl.constexpr):
    """The same shared memory in another shape."""
    if _REINTERPRETS:
        return place.reinterpret(place.dtype, SHAPE, LAYOUT)
    else:
        return place._reinterpret(place.dtype, SHAPE, LAYOUT)


@gluon.jit
def _share(lengths_ptr, b, s, splits, SIZE: gl.constexpr, STEP: gl.constexpr):
    """Keys of the sequence; the first key of split s, and the key behind its last. Shares are whole steps."""
    length = gl.load(lengths_ptr + b).to(gl.int32)
    per = SIZE if SIZE > 0 else (((length + splits - 1) // splits) + STEP - 1) // STEP * STEP
    first = gl.minimum(s * per, length)
    return length, first, gl.minimum(first + per, length)


@gluon.jit
def _outputs(x, b, s, splits, H: gl.constexpr, T: gl.constexpr):
    """Which of the outputs [H, B, T, splits] is that of row x, one of H * T."""
    return ((x % H * gl.num_programs(2) + b) * T + x // H) * splits + s


@gluon.jit
def _slot(table_ptr, row, start, PAGE: gl.constexpr):
    """Where the keys from `start` on lie; `row`: where the sequence, or its table, begins."""
    if PAGE == 0:
        return row + start
    else:
        return gl.load(table_ptr + row + start // PAGE).to(gl.int32) * PAGE + start % PAGE


@gluon.jit
def _begin_queries(q_ptr, at, real, WIDTH: gl.constexpr, SWIZZLE: gl.constexpr, LAYOUT: gl.constexpr):
    """Begin to copy [ROWS, WIDTH] of queries to shared memory."""
    columns = gl.arange(0, WIDTH, layout=gl.SliceLayout(0, LAYOUT))
    to = gl.allocate_shared_memory(q_ptr.dtype.element_ty, [at.shape[0], WIDTH], gl.NVMMASharedLayout(SWIZZLE, 16, 2))
    begin_reading(to, q_ptr + at[:, None] + columns[None, :], mask=real[:, None])
    return to


@gluon.jit
def _queries(q_ptr, r_ptr, first_row, b, sq_h, sq_b, sq_t, sr_h, sr_b, sr_t, H: gl.constexpr, T: gl.constexpr,
             CH: gl.constexpr, RH: gl.constexpr, K1: gl.constexpr, ROWS: gl.constexpr,
             num_warps: gl.constexpr):  # fmt: skip
    """Both parts of ROWS queries, and of their rotated parts, in shared memory; behind the last row lies anything."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [num_warps, 1], [1, 0])
    x = first_row + gl.arange(0, ROWS, layout=gl.SliceLayout(1, layout))
    h = (x % H).to(gl.int64)
    t = x // H
    at = h * sq_h + b.to(gl.int64) * sq_b + t * sq_t
    q0 = _begin_queries(q_ptr, at, x < H * T, CH, min(128, 2 * CH), layout)
    q1 = _begin_queries(q_ptr + CH, at, x < H * T, CH, min(128, 2 * CH), layout)
    at = h * sr_h + b.to(gl.int64) * sr_b + t * sr_t
    r0 = q0
    r1 = q0
    if RH > 0:
        r0 = _begin_queries(r_ptr, at, x < H * T, RH, min(128, 2 * RH), layout)
    if K1:
        r1 = _begin_queries(r_ptr + RH, at, x < H * T, RH, min(128, 2 * RH), layout)
    async_copy.commit_group()
    async_copy.wait_group(0)
    fence_async_shared()
    return q0, q1, r0, r1


@gluon.jit
def _or_zero(top):
    return gl.where(top == float("-inf"), 0.0, top)


@gluon.jit
def _store_means(sums, mass, to, real, out_ptr, C: gl.constexpr, LAYOUT: gl.constexpr):
    """Store a part of the columns of rows `to`, over their mass."""
    of_rows: gl.constexpr = gl.SliceLayout(1, LAYOUT)
    inverse = gl.where(mass > 0, 1.0 / mass, 0.0)
    sums = sums * gl.convert_layout(inverse, of_rows)[:, None]
    c = gl.arange(0, sums.shape[1], layout=gl.SliceLayout(0, LAYOUT))
    at = out_ptr + gl.convert_layout(to, of_rows).to(gl.int64)[:, None] * C + c[None, :]
    gl.store(at, sums.to(out_ptr.dtype.element_ty), mask=gl.convert_layout(real, of_rows)[:, None])


@gluon.jit
def _store_mass(top, mass, to, real, lse_ptr, PARTS: gl.constexpr):
    """Store the maximum and the mass of one of several splits, else the log-sum-exp."""
    if PARTS:
        gl.store(lse_ptr + 2 * to, top, mask=real)
        gl.store(lse_ptr + 2 * to + 1, mass, mask=real)
    else:
        lse = gl.where(mass > 0, top + gl.log2(mass), float("-inf"))
        gl.store(lse_ptr + to, lse / 1.4426950408889634, mask=real)


@gluon.jit
def _store_nothing(first_row, b, s, splits, out_ptr, lse_ptr, H: gl.constexpr, T: gl.constexpr, CH: gl.constexpr,
                   PARTS: gl.constexpr, ROWS: gl.constexpr, num_warps: gl.constexpr):  # fmt: skip
    """What a split without keys stores: no mass, and zeros if it is the only one."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [num_warps, 1], [1, 0])
    x = first_row + gl.arange(0, ROWS, layout=gl.SliceLayout(1, layout))
    to = _outputs(x, b, s, splits, H, T)
    nothing = gl.full([ROWS], 0.0, gl.float32, layout=gl.SliceLayout(1, layout))
    _store_mass(nothing - float("inf"), nothing, to, x < H * T, lse_ptr, PARTS)
    if not PARTS:
        sums = gl.full([ROWS, CH], 0.0, gl.float32, layout=layout)
        for part in gl.static_range(2):
            _store_means(sums, nothing, to, x < H * T, out_ptr + part * CH, 2 * CH, layout)


@gluon.jit
def _copy(c0_desc, c1_desc, k0_desc, k1_desc, c0, c1, k0, k1, arrived, buffer, slot, left, wanted,
          CH: gl.constexpr, RH: gl.constexpr, K1: gl.constexpr):  # fmt: skip
    """Begin to copy KEYS keys from `slot` on, of which `left` are real: the others become zeros."""
    bar = arrived.index(buffer)
    parts: gl.constexpr = 2 if K1 else 1
    mbarrier.expect(bar, c0.shape[1] * (2 * CH + parts * RH) * 2, wanted)
    at = [LARGE, slot + left, LARGE - left, 0]
    begin_copy(c0_desc, at, bar, c0.index(buffer), wanted)
    if RH > 0:
        begin_copy(k0_desc, at, bar, k0.index(buffer), wanted)
    if K1:
        begin_copy(k1_desc, at, bar, k1.index(buffer), wanted)
    begin_copy(c1_desc, at, bar, c1.index(buffer), wanted)


@gluon.jit(do_not_specialize=["splits", "rows_b", "s_table", "s_seen"])
def _wide_kernel(
    q_ptr, r_ptr, c0_desc, c1_desc, k0_desc, k1_desc, table_ptr, lengths_ptr, seen_ptr, out_ptr, lse_ptr, scale,
    splits, rows_b, sq_h, sq_b, sq_t, sr_h, sr_b, sr_t, s_table, s_seen, H: gl.constexpr, T: gl.constexpr,
    CH: gl.constexpr, RH: gl.constexpr, K1: gl.constexpr, PAGE: gl.constexpr, SEEN: gl.constexpr, SIZE: gl.constexpr,
    PARTS: gl.constexpr, ROWS: gl.constexpr, KEYS: gl.constexpr, PDL: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """One split of ROWS of the H * T rows of a sequence; outputs as `_decode_kernel`'s."""
    groups: gl.constexpr = num_warps // 4
    scores_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, groups], [16, KEYS // groups, 16])
    sums_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, groups], [16, CH // groups, 16])
    of_rows: gl.constexpr = gl.SliceLayout(1, scores_layout)
    of_sums: gl.constexpr = gl.SliceLayout(1, sums_layout)
    swizzle: gl.constexpr = min(128, 2 * CH)
    narrow: gl.constexpr = min(128, 2 * RH) if RH > 0 else 32
    dtype: gl.constexpr = q_ptr.dtype.element_ty

    await_kernels_alone(PDL)
    s = gl.program_id(1)
    b = gl.program_id(2)
    first_row = gl.program_id(0) * ROWS
    length, first, last = _share(lengths_ptr, b, s, splits, SIZE, KEYS)
    if first < last:
        row = b * rows_b if PAGE == 0 else b * s_table
        c0_s = gl.allocate_shared_memory(dtype, [2, KEYS, CH], gl.NVMMASharedLayout(swizzle, 16, 2))
        c1_s = gl.allocate_shared_memory(dtype, [2, KEYS, CH], gl.NVMMASharedLayout(swizzle, 16, 2))
        k0_s = gl.allocate_shared_memory(dtype, [2, KEYS, max(RH, 16)], gl.NVMMASharedLayout(narrow, 16, 2))
        k1_s = k0_s
        if K1:
            k1_s = gl.allocate_shared_memory(dtype, [2, KEYS, RH], gl.NVMMASharedLayout(narrow, 16, 2))
        arrived = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
        mbarrier.init(arrived.index(0), count=1)
        mbarrier.init(arrived.index(1), count=1)
        fence_async_shared()
        slot = _slot(table_ptr, row, first, PAGE)
        _copy(c0_desc, c1_desc, k0_desc, k1_desc, c0_s, c1_s, k0_s, k1_s, arrived, 0, slot,
              gl.minimum(last - first, KEYS), True, CH, RH, K1)  # fmt: skip
        q0, q1, r0, r1 = _queries(q_ptr, r_ptr, first_row, b, sq_h, sq_b, sq_t, sr_h, sr_b, sr_t, H, T, CH, RH, K1,
                                  ROWS, num_warps)  # fmt: skip

        x = first_row + gl.arange(0, ROWS, layout=of_rows)
        limit = gl.minimum(length - (T - 1) + x // H, last)
        top = gl.full([ROWS], float("-inf"), gl.float32, layout=of_rows)
        mass = gl.full([ROWS], 0.0, gl.float32, layout=of_rows)
        nothing = gl.full([ROWS, KEYS], 0.0, gl.float32, layout=scores_layout)
        acc0 = warpgroup_mma_init(gl.full([ROWS, CH], 0.0, gl.float32, layout=sums_layout))
        acc1 = warpgroup_mma_init(gl.full([ROWS, CH], 0.0, gl.float32, layout=sums_layout))
        keys = gl.arange(0, KEYS, layout=gl.SliceLayout(0, scores_layout))
        turn = 0
        for start in range(first, last, KEYS):
            # All at once: with some left in flight ptxas would run every product by itself.
            sums0, sums1 = warpgroup_mma_wait(0, deps=(acc0, acc1))
            coming = start + KEYS
            more = coming < last
            slot = _slot(table_ptr, row, gl.minimum(coming, last - 1) if PAGE > 0 else coming, PAGE)
            _copy(c0_desc, c1_desc, k0_desc, k1_desc, c0_s, c1_s, k0_s, k1_s, arrived, 1 - turn % 2, slot,
                  gl.minimum(last - coming, KEYS), more, CH, RH, K1)  # fmt: skip
            buffer = turn % 2
            mbarrier.wait(arrived.index(buffer), turn // 2 % 2)
            c0 = c0_s.index(buffer)
            c1 = c1_s.index(buffer)
            products = warpgroup_mma(q0, c0.permute((1, 0)), nothing, use_acc=False, is_async=True)
            if RH > 0:
                products = warpgroup_mma(r0, k0_s.index(buffer).permute((1, 0)), products, is_async=True)
            if K1:
                products = warpgroup_mma(r1, k1_s.index(buffer).permute((1, 0)), products, is_async=True)
            products = warpgroup_mma(q1, c1.permute((1, 0)), products, is_async=True)
            scores = warpgroup_mma_wait(0, deps=(products,)) * scale
            n = start + keys
            shown = n[None, :] < limit[:, None]
            if SEEN:
                seen = gl.load(seen_ptr + b.to(gl.int64) * s_seen + n, mask=n < last, other=0) != 0
                shown = shown & seen[None, :]
            scores = gl.where(shown, scores, float("-inf"))
            higher = gl.maximum(top, gl.max(scores, axis=1))
            weights = gl.exp2(scores - _or_zero(higher)[:, None])
            fade = gl.exp2(top - _or_zero(higher))
            mass = mass * fade + gl.sum(weights, axis=1)
            top = higher
            left = gl.convert_layout(weights.to(dtype), gl.DotOperandLayout(0, sums_layout, 2))
            faded = gl.convert_layout(fade, of_sums)[:, None]
            sums0 = sums0 * faded
            sums1 = sums1 * faded
            acc0 = warpgroup_mma(left, c0, sums0, is_async=True)
            acc1 = warpgroup_mma(left, c1, sums1, is_async=True)
            turn += 1  # noqa: SIM113 (Gluon has no enumerate)
        sums0, sums1 = warpgroup_mma_wait(0, deps=(acc0, acc1))
        to = _outputs(x, b, s, splits, H, T)
        _store_means(sums0, mass, to, x < H * T, out_ptr, 2 * CH, sums_layout)
        _store_means(sums1, mass, to, x < H * T, out_ptr + CH, 2 * CH, sums_layout)
        _store_mass(top, mass, to, x < H * T, lse_ptr, PARTS)
    else:
        _store_nothing(first_row, b, s, splits, out_ptr, lse_ptr, H, T, CH, PARTS, ROWS, num_warps)


# The schedule of `_seesaw_kernel` is that of FlashMLA (its notes of April 2025): tiles come in pairs, each of two
# warpgroups scores one of them and sums one part of both, so that one weighs its scores while the other multiplies; a
# ninth warp fetches for them.


@gluon.jit
def _slots(table_ptr, row, start, last, PAGE: gl.constexpr, KEYS: gl.constexpr):
    """Where both tiles of the pair from `start` on lie; what is behind the last key may lie anywhere."""
    if PAGE == 0:
        return row + start, row + start + KEYS
    else:
        slot = _slot(table_ptr, row, gl.minimum(start, last - 1), PAGE)
        return slot, _slot(table_ptr, row, gl.minimum(start + KEYS, last - 1), PAGE)


@gluon.jit
def _fetch_tile(c0_desc, c1_desc, k0_desc, k1_desc, c0, c1, k, full, free, tile: gl.constexpr, slot, left, phase,
                AGAIN: gl.constexpr, CH: gl.constexpr, RH: gl.constexpr, K1: gl.constexpr):  # fmt: skip
    """Begin to copy one `tile` of a pair, `left` of its keys real; each part when its last reader has freed its place.

    Rotated keys come with the other warpgroup's part: it is the one that reads the weights which take their place.
    """
    at = [LARGE, slot + left, LARGE - left, 0]
    for part in gl.static_range(2):
        bar = full.index(2 * tile + part)
        if AGAIN:
            mbarrier.wait(free.index(2 * tile + part), phase)
        mbarrier.expect(bar, c0.shape[1] * (CH + (RH * (2 if K1 else 1) if part != tile else 0)) * 2)
        if part == 0:
            begin_copy(c0_desc, at, bar, c0.index(tile))
        else:
            begin_copy(c1_desc, at, bar, c1.index(tile))
        if part != tile:
            if K1:
                begin_copy(k0_desc, at, bar, k.index(2 * tile))
                begin_copy(k1_desc, at, bar, k.index(2 * tile + 1))
            elif RH > 0:
                begin_copy(k0_desc, at, bar, k.index(tile))


@gluon.jit
def _fetch_pair(c0_desc, c1_desc, k0_desc, k1_desc, c0, c1, k, full, free, slot0, slot1, left, phase,
                AGAIN: gl.constexpr, CH: gl.constexpr, RH: gl.constexpr, K1: gl.constexpr):  # fmt: skip
    """Begin to copy the pair of tiles at `slot0` and `slot1`, `left` of whose keys are real."""
    KEYS: gl.constexpr = c0.shape[1]
    _fetch_tile(c0_desc, c1_desc, k0_desc, k1_desc, c0, c1, k, full, free, 0, slot0, gl.minimum(left, KEYS), phase,
                AGAIN, CH, RH, K1)  # fmt: skip
    left = gl.maximum(gl.minimum(left - KEYS, KEYS), 0)
    _fetch_tile(c0_desc, c1_desc, k0_desc, k1_desc, c0, c1, k, full, free, 1, slot1, left, phase, AGAIN, CH, RH, K1)


@gluon.jit
def _fetch(c0_desc, c1_desc, k0_desc, k1_desc, c0, c1, k, full, free, table_ptr, row, first, last, PAGE: gl.constexpr,
           CH: gl.constexpr, RH: gl.constexpr, K1: gl.constexpr):  # fmt: skip
    """The warp that copies: all pairs but the first. Page numbers are read one pair ahead."""
    KEYS: gl.constexpr = c0.shape[1]
    phase = 0
    slot0, slot1 = _slots(table_ptr, row, first + 2 * KEYS, last, PAGE, KEYS)
    for start in range(first + 2 * KEYS, last, 2 * KEYS):
        next0, next1 = _slots(table_ptr, row, start + 2 * KEYS, last, PAGE, KEYS)
        _fetch_pair(c0_desc, c1_desc, k0_desc, k1_desc, c0, c1, k, full, free, slot0, slot1, last - start, phase, True,
                    CH, RH, K1)  # fmt: skip
        slot0 = next0
        slot1 = next1
        phase ^= 1


@gluon.jit
def _scores(q0, q1, r0, r1, c0, c1, k, full, tile: gl.constexpr, phase, scale, start, limit, seen_ptr, last,
            RH: gl.constexpr, K1: gl.constexpr, SEEN: gl.constexpr, LAYOUT: gl.constexpr):  # fmt: skip
    """Scores [ROWS, KEYS] of a tile, -inf where a row does not see a key. What comes first is read first."""
    ROWS: gl.constexpr = q0.shape[0]
    KEYS: gl.constexpr = c0.shape[1]
    products = gl.full([ROWS, KEYS], 0.0, gl.float32, layout=LAYOUT)
    mbarrier.wait(full.index(3 * tile), phase)
    if tile == 0:
        products = warpgroup_mma(q0, c0.index(0).permute((1, 0)), products, use_acc=False, is_async=True)
        mbarrier.wait(full.index(1), phase)
        products = warpgroup_mma(q1, c1.index(0).permute((1, 0)), products, is_async=True)
    else:
        products = warpgroup_mma(q1, c1.index(1).permute((1, 0)), products, use_acc=False, is_async=True)
        mbarrier.wait(full.index(2), phase)
        products = warpgroup_mma(q0, c0.index(1).permute((1, 0)), products, is_async=True)
    if K1:
        products = warpgroup_mma(r0, k.index(2 * tile).permute((1, 0)), products, is_async=True)
        products = warpgroup_mma(r1, k.index(2 * tile + 1).permute((1, 0)), products, is_async=True)
    elif RH > 0:
        products = warpgroup_mma(r0, k.index(tile).permute((1, 0)), products, is_async=True)
    scores = warpgroup_mma_wait(0, deps=(products,)) * scale
    n = start + gl.arange(0, KEYS, layout=gl.SliceLayout(0, LAYOUT))
    shown = n[None, :] < limit[:, None]
    if SEEN:
        shown = shown & (gl.load(seen_ptr + n, mask=n < last, other=0) != 0)[None, :]
    return gl.where(shown, scores, float("-inf"))


@gluon.jit
def _or_zero(top):
    return gl.where(top == float("-inf"), 0.0, top)


@gluon.jit
def _tell(shares, top, tops, weights, told, me: gl.constexpr):
    """Hand the weights of one's tile, and the maximum that they are relative to, to the other warpgroup."""
    tops.index(me).store(top)
    weights.index(me).store(shares)
    fence_async_shared()
    mbarrier.arrive(told.index(me), count=1)


@gluon.jit
def _sum_part(q0, q1, r0, r1, c0, c1, k, weights, full, free, told, done, tops, masses, scale, length, first, last,
              first_row, seen_ptr, out_ptr, lse_ptr, b, s, splits, me: gl.constexpr, H: gl.constexpr, T: gl.constexpr,
              CH: gl.constexpr, RH: gl.constexpr, K1: gl.constexpr, SEEN: gl.constexpr,
              PARTS: gl.constexpr):  # fmt: skip
    """A warpgroup: scores of tile `me` of each pair, and sums of part `me` of the latents over both."""
    ROWS: gl.constexpr = q0.shape[0]
    KEYS: gl.constexpr = c0.shape[1]
    scores_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 16])
    sums_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, CH, 16])
    of_rows: gl.constexpr = gl.SliceLayout(1, scores_layout)
    of_sums: gl.constexpr = gl.SliceLayout(1, sums_layout)
    mine = c0 if me == 0 else c1
    x = first_row + gl.arange(0, ROWS, layout=of_rows)
    limit = gl.minimum(length - (T - 1) + x // H, last)
    top = gl.full([ROWS], float("-inf"), gl.float32, layout=of_rows)
    mass = gl.full([ROWS], 0.0, gl.float32, layout=of_rows)
    sums = gl.full([ROWS, CH], 0.0, gl.float32, layout=sums_layout)
    phase = 0
    for start in range(first, last, 2 * KEYS):
        scores = _scores(q0, q1, r0, r1, c0, c1, k, full, me, phase, scale, start + me * KEYS, limit, seen_ptr, last,
                         RH, K1, SEEN, scores_layout)  # fmt: skip
        highest = gl.max(scores, axis=1)
        if me == 0:
            middle = gl.maximum(top, highest)
            weight = gl.exp2(scores - _or_zero(middle)[:, None])
            shares = weight.to(c0.dtype)
            _tell(shares, middle, tops, weights, told, 0)
            fade = gl.exp2(top - _or_zero(middle))
            mass = mass * fade + gl.sum(weight, axis=1)
            sums = sums * gl.convert_layout(fade, of_sums)[:, None]
            left = gl.convert_layout(shares, gl.DotOperandLayout(0, sums_layout, 2))
            acc = warpgroup_mma(left, mine.index(0), sums, is_async=True)
            mbarrier.wait(told.index(1), phase)
            top = tops.index(1).load(of_rows)
            fade = gl.exp2(middle - _or_zero(top))
            mass = mass * fade
            sums = warpgroup_mma_wait(0, deps=(acc,))
            mbarrier.arrive(free.index(0), count=1)
            sums = sums * gl.convert_layout(fade, of_sums)[:, None]
            acc = warpgroup_mma(weights.index(1), mine.index(1), sums, is_async=True)
        else:
            mbarrier.wait(told.index(0), phase)
            middle = tops.index(0).load(of_rows)
            fade = gl.exp2(top - _or_zero(middle))
            mass = mass * fade
            sums = sums * gl.convert_layout(fade, of_sums)[:, None]
            acc = warpgroup_mma(weights.index(0), mine.index(0), sums, is_async=True)
            top = gl.maximum(middle, highest)
            weight = gl.exp2(scores - _or_zero(top)[:, None])
            shares = weight.to(c0.dtype)
            _tell(shares, top, tops, weights, told, 1)
            fade = gl.exp2(middle - _or_zero(top))
            mass = mass * fade + gl.sum(weight, axis=1)
            left = gl.convert_layout(shares, gl.DotOperandLayout(0, sums_layout, 2))
            sums = warpgroup_mma_wait(0, deps=(acc,))
            mbarrier.arrive(free.index(1), count=1)
            sums = sums * gl.convert_layout(fade, of_sums)[:, None]
            acc = warpgroup_mma(left, mine.index(1), sums, is_async=True)
        sums = warpgroup_mma_wait(0, deps=(acc,))
        mbarrier.arrive(free.index(2 + me), count=1)
        phase ^= 1
    masses.index(me).store(mass)
    mbarrier.arrive(done.index(me), count=1)
    mbarrier.wait(done.index(1 - me), 0)
    mass += masses.index(1 - me).load(of_rows)
    to = _outputs(x, b, s, splits, H, T)
    _store_means(sums, mass, to, x < H * T, out_ptr + me * CH, 2 * CH, sums_layout)
    if me == 0:
        _store_mass(top, mass, to, x < H * T, lse_ptr, PARTS)


@gluon.jit(do_not_specialize=["splits", "rows_b", "s_table", "s_seen"])
def _seesaw_kernel(
    q_ptr, r_ptr, c0_desc, c1_desc, k0_desc, k1_desc, table_ptr, lengths_ptr, seen_ptr, out_ptr, lse_ptr, scale,
    splits, rows_b, sq_h, sq_b, sq_t, sr_h, sr_b, sr_t, s_table, s_seen, H: gl.constexpr, T: gl.constexpr,
    CH: gl.constexpr, RH: gl.constexpr, K1: gl.constexpr, PAGE: gl.constexpr, SEEN: gl.constexpr, SIZE: gl.constexpr,
    PARTS: gl.constexpr, ROWS: gl.constexpr, KEYS: gl.constexpr, PDL: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """As `_wide_kernel`. Pointers and descriptors that are not needed are others of their kind: no warp takes None."""
    dtype: gl.constexpr = q_ptr.dtype.element_ty
    await_kernels_alone(PDL)
    s = gl.program_id(1)
    b = gl.program_id(2)
    first_row = gl.program_id(0) * ROWS
    length, first, last = _share(lengths_ptr, b, s, splits, SIZE, 2 * KEYS)
    if first < last:
        row = b * rows_b if PAGE == 0 else b * s_table
        parts: gl.constexpr = 2 if K1 else 1
        narrow: gl.constexpr = min(128, 2 * RH) if RH > 0 else 32
        c0 = gl.allocate_shared_memory(dtype, [2, KEYS, CH], gl.NVMMASharedLayout(min(128, 2 * CH), 16, 2))
        c1 = gl.allocate_shared_memory(dtype, [2, KEYS, CH], gl.NVMMASharedLayout(min(128, 2 * CH), 16, 2))
        k = gl.allocate_shared_memory(dtype, [2 * parts, KEYS, max(RH, 16)], gl.NVMMASharedLayout(narrow, 16, 2))
        # The weights of a tile take the place of its rotated keys, which nobody reads any more: there is no other.
        of_weights: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
        if parts * RH != KEYS:
            weights = gl.allocate_shared_memory(dtype, [2, ROWS, KEYS], of_weights)
        else:
            weights = reinterpreted(k, [2, ROWS, KEYS], of_weights)
        of_row: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, order=[0])
        tops = gl.allocate_shared_memory(gl.float32, [2, ROWS], of_row)
        masses = gl.allocate_shared_memory(gl.float32, [2, ROWS], of_row)
        full = gl.allocate_shared_memory(gl.int64, [4, 1], mbarrier.MBarrierLayout())  # by tile and part
        free = gl.allocate_shared_memory(gl.int64, [4, 1], mbarrier.MBarrierLayout())
        told = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())  # by warpgroup
        done = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
        for i in gl.static_range(4):
            mbarrier.init(full.index(i), count=1)
            mbarrier.init(free.index(i), count=1)
        for i in gl.static_range(2):
            mbarrier.init(told.index(i), count=1)
            mbarrier.init(done.index(i), count=1)
        fence_async_shared()
        slot0, slot1 = _slots(table_ptr, row, first, last, PAGE, KEYS)
        _fetch_pair(c0_desc, c1_desc, k0_desc, k1_desc, c0, c1, k, full, free, slot0, slot1, last - first, 0, False,
                    CH, RH, K1)  # fmt: skip
        q0, q1, r0, r1 = _queries(q_ptr, r_ptr, first_row, b, sq_h, sq_b, sq_t, sr_h, sr_b, sr_t, H, T, CH, RH, K1,
                                  ROWS, num_warps)  # fmt: skip
        if SEEN:
            seen_ptr += b.to(gl.int64) * s_seen
        gl.warp_specialize(
            [
                (_sum_part, (q0, q1, r0, r1, c0, c1, k, weights, full, free, told, done, tops, masses, scale, length,
                             first, last, first_row, seen_ptr, out_ptr, lse_ptr, b, s, splits, 0, H, T, CH, RH, K1,
                             SEEN, PARTS)),
                (_sum_part, (q0, q1, r0, r1, c0, c1, k, weights, full, free, told, done, tops, masses, scale, length,
                             first, last, first_row, seen_ptr, out_ptr, lse_ptr, b, s, splits, 1, H, T, CH, RH, K1,
                             SEEN, PARTS)),
                (_fetch, (c0_desc, c1_desc, k0_desc, k1_desc, c0, c1, k, full, free, table_ptr, row, first, last, PAGE,
                          CH, RH, K1)),
            ],
            [4, 1],
            [232, 24],
        )  # fmt: skip
    else:
        _store_nothing(first_row, b, s, splits, out_ptr, lse_ptr, H, T, CH, PARTS, ROWS, num_warps)


def fits(dtype: torch.dtype, C: int, RH: int, page: int) -> bool:
    """Whether the kernel takes such a cache; that the device is a Hopper and the parts one grid, callers have seen."""
    return dtype in (torch.bfloat16, torch.float16) and C >= 128 and RH in (0, 16, 32, 64) and page % KEYS == 0


def ragged(rows: Tensor, box_rows: int, box_columns: int) -> TensorDescriptor:
    """A descriptor of rows [X, width] as triton.tools.ragged_tma makes it: boxes keep within a run of rows, and bring
    zeros behind its last."""
    width, stride = rows.shape[1], rows.stride(0)
    shape, strides = [_LARGER, _LARGER, 2**30, width], [2**34 - stride, stride, stride, 1]
    return TensorDescriptor(rows, shape, strides, [1, 1, box_rows, box_columns], box_layout(4, box_columns))


@functools.cache
def box_layout(dimensions: int, width: int = 64) -> gl.NVMMASharedLayout:
    """How boxes of rows of `width` columns lie in shared memory."""
    return gl.NVMMASharedLayout(min(128, 2 * width), 16, dimensions)


def _boxes(half: Tensor | None, slots: int) -> TensorDescriptor | None:
    """KEYS slots of one part of a cache a box."""
    if half is None or not half.shape[-1]:
        return None
    width = half.shape[-1]
    return ragged(half.as_strided((slots, width), (half.stride(-2), 1)), KEYS, width)


def launch(
    q: Tensor, r: Tensor, halves: tuple[Tensor | None, ...], slots: int, table: Tensor | None, lengths: Tensor,
    seen: Tensor | None, out: Tensor, masses: Tensor, scale: float, splits: int, rows_b: int, page: int, size: int,
):  # fmt: skip
    """As kernels_attention.split_decode launches its kernel, on q's device.

    Args:
        halves: two of latents, one or two (the last is None) of rotated keys, of flat caches of `slots` slots.
        out, masses: written; of one split the output and the log-sum-exp, else sums, and maxima and masses.
        scale: factor of the scores, to base 2.
        rows_b: slots between the beginnings of two sequences, without a `table`.
        size: keys of a split, 0 for an equal share of a sequence's keys.
    """
    H, B, T, C = q.shape
    RH = halves[2].shape[-1]
    grid = cdiv(H * T, ROWS), splits, B
    boxes, read = [_boxes(half, slots) for half in halves], (table, lengths, seen)
    numbers = (
        scale, splits, rows_b, *q.stride()[:3], *r.stride()[:3], 0 if table is None else table.stride(0),
        0 if seen is None else seen.stride(0),
    )  # fmt: skip
    options = {
        "H": H, "T": T, "CH": C // 2, "RH": RH, "K1": RH > 0 and halves[3] is not None, "PAGE": page,
        "SEEN": seen is not None, "SIZE": size, "PARTS": splits > 1, "ROWS": ROWS, "KEYS": KEYS, **overlapping(q),
    }  # fmt: skip
    if grid[0] == 1:
        _wide_kernel[grid](q, r, *boxes, *read, out, masses, *numbers, num_warps=8, **options)
        return
    boxes = [box or boxes[0] for box in boxes]
    read = [lengths if tensor is None else tensor for tensor in read]
    _seesaw_kernel[grid](q, r, *boxes, *read, out, masses, *numbers, num_warps=4, **options)  # and five more warps
