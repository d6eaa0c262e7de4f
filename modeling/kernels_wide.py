"""Decode over latents for more than 32 rows of heads and tokens, on Hopper, in Gluon: kernels_attention's
`_decode_kernel` with the order of copies and products laid down by hand.

Triton orders the copy of the next keys behind the products of these, and splits a chain of products differently from
the last of it. Here the copy begins as soon as the tile before the last is done with, and a chain is one. Letters as
in kernels_attention.py, which decides what runs; CH and RH are the widths of the parts of latents and rotated keys.
"""

import functools

import torch
from torch import Tensor

try:  # inside `try`, or the Hub loader refuses the whole model where Triton is missing
    import triton
    from triton.experimental import gluon
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.language.nvidia.hopper import (
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

_begin_copy = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared  # renamed after Triton 3.6
ROWS, KEYS, WARPS = 64, 64, 8
_LARGE, _LARGER = gl.constexpr(2**30), 0x7FFF0000


@gluon.jit
def _copy(c0_desc, c1_desc, k0_desc, k1_desc, c0, c1, k0, k1, arrived, buffer, slot, left, wanted,
          CH: gl.constexpr, RH: gl.constexpr, K1: gl.constexpr):  # fmt: skip
    """Begin to copy KEYS keys from `slot` on, of which `left` are real: the others become zeros."""
    bar = arrived.index(buffer)
    parts: gl.constexpr = 2 if K1 else 1
    mbarrier.expect(bar, c0.shape[1] * (2 * CH + parts * RH) * 2, wanted)
    at = [_LARGE, slot + left, _LARGE - left, 0]
    _begin_copy(c0_desc, at, bar, c0.index(buffer), wanted)
    if RH > 0:
        _begin_copy(k0_desc, at, bar, k0.index(buffer), wanted)
    if K1:
        _begin_copy(k1_desc, at, bar, k1.index(buffer), wanted)
    _begin_copy(c1_desc, at, bar, c1.index(buffer), wanted)


@gluon.jit
def _slot(table_ptr, row, start, PAGE: gl.constexpr):
    """Where the keys from `start` on lie; `row`: where the sequence, or its table, begins."""
    if PAGE == 0:
        return row + start
    else:
        return gl.load(table_ptr + row + start // PAGE).to(gl.int32) * PAGE + start % PAGE


@gluon.jit
def _queries(q_ptr, at, real, WIDTH: gl.constexpr, SWIZZLE: gl.constexpr, ROWS: gl.constexpr, LAYOUT: gl.constexpr):
    columns = gl.arange(0, WIDTH, layout=gl.SliceLayout(0, LAYOUT))
    """[ROWS, WIDTH] of queries in shared memory, zeros behind the last row."""
    x = gl.load(q_ptr + at[:, None] + columns[None, :], mask=real[:, None], other=0.0)
    return gl.allocate_shared_memory(x.dtype, [ROWS, WIDTH], gl.NVMMASharedLayout(SWIZZLE, 16, 2), x)


@gluon.jit(do_not_specialize=["splits", "rows_b", "s_table", "s_seen"])
def _wide_kernel(
    q_ptr, r_ptr, c0_desc, c1_desc, k0_desc, k1_desc, table_ptr, lengths_ptr, seen_ptr, out_ptr, lse_ptr, scale,
    splits, rows_b, sq_h, sq_b, sq_t, sr_h, sr_b, sr_t, s_table, s_seen, H: gl.constexpr, T: gl.constexpr,
    CH: gl.constexpr, RH: gl.constexpr, K1: gl.constexpr, PAGE: gl.constexpr, SEEN: gl.constexpr, SIZE: gl.constexpr,
    PARTS: gl.constexpr, ROWS: gl.constexpr, KEYS: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """One split of ROWS of the H * T rows of a sequence; outputs as `_decode_kernel`'s."""
    groups: gl.constexpr = num_warps // 4
    scores_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, groups], [16, KEYS // groups, 16])
    sums_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, groups], [16, CH // groups, 16])
    of_rows: gl.constexpr = gl.SliceLayout(1, scores_layout)
    load_layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [num_warps, 1], [1, 0])
    swizzle: gl.constexpr = min(128, 2 * CH)
    narrow: gl.constexpr = min(128, 2 * RH) if RH > 0 else 32
    dtype: gl.constexpr = q_ptr.dtype.element_ty

    s = gl.program_id(1)
    b = gl.program_id(2)
    first_row = gl.program_id(0) * ROWS
    length = gl.load(lengths_ptr + b).to(gl.int32)
    per = SIZE if SIZE > 0 else (((length + splits - 1) // splits) + KEYS - 1) // KEYS * KEYS
    first = gl.minimum(s * per, length)
    last = gl.minimum(first + per, length)
    x = first_row + gl.arange(0, ROWS, layout=of_rows)
    to = ((x % H * gl.num_programs(2) + b) * T + x // H) * splits + s
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

        y = first_row + gl.arange(0, ROWS, layout=gl.SliceLayout(1, load_layout))
        h = (y % H).to(gl.int64)
        t = y // H
        at = h * sq_h + b.to(gl.int64) * sq_b + t * sq_t
        q0 = _queries(q_ptr, at, y < H * T, CH, swizzle, ROWS, load_layout)
        q1 = _queries(q_ptr + CH, at, y < H * T, CH, swizzle, ROWS, load_layout)
        at = h * sr_h + b.to(gl.int64) * sr_b + t * sr_t
        r0 = q0
        r1 = q0
        if RH > 0:
            r0 = _queries(r_ptr, at, y < H * T, RH, narrow, ROWS, load_layout)
        if K1:
            r1 = _queries(r_ptr + RH, at, y < H * T, RH, narrow, ROWS, load_layout)
        fence_async_shared()

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
            least = gl.where(higher == float("-inf"), 0.0, higher)
            weights = gl.exp2(scores - least[:, None])
            fade = gl.exp2(top - least)
            mass = mass * fade + gl.sum(weights, axis=1)
            top = higher
            left = gl.convert_layout(weights.to(dtype), gl.DotOperandLayout(0, sums_layout, 2))
            faded = gl.convert_layout(fade, gl.SliceLayout(1, sums_layout))[:, None]
            sums0 = sums0 * faded
            sums1 = sums1 * faded
            acc0 = warpgroup_mma(left, c0, sums0, is_async=True)
            acc1 = warpgroup_mma(left, c1, sums1, is_async=True)
            turn += 1  # noqa: SIM113 (Gluon has no enumerate)
        sums0, sums1 = warpgroup_mma_wait(0, deps=(acc0, acc1))
        if not PARTS:
            inverse = gl.where(mass > 0, 1.0 / mass, 0.0)
            inverse = gl.convert_layout(inverse, gl.SliceLayout(1, sums_layout))[:, None]
            sums0 = sums0 * inverse
            sums1 = sums1 * inverse
        z = gl.convert_layout(x, gl.SliceLayout(1, sums_layout))
        to_z = gl.convert_layout(to, gl.SliceLayout(1, sums_layout)).to(gl.int64)
        c = gl.arange(0, CH, layout=gl.SliceLayout(0, sums_layout))
        sums_at = out_ptr + to_z[:, None] * (2 * CH) + c[None, :]
        live = (z < H * T)[:, None]
        gl.store(sums_at, sums0.to(out_ptr.dtype.element_ty), mask=live)
        gl.store(sums_at + CH, sums1.to(out_ptr.dtype.element_ty), mask=live)
        if PARTS:
            gl.store(lse_ptr + 2 * to, top, mask=x < H * T)
            gl.store(lse_ptr + 2 * to + 1, mass, mask=x < H * T)
        else:
            lse = gl.where(mass > 0, top + gl.log2(mass), float("-inf"))
            gl.store(lse_ptr + to, lse / 1.4426950408889634, mask=x < H * T)
    else:
        empty = gl.full([ROWS], float("-inf"), gl.float32, layout=of_rows)
        if PARTS:
            gl.store(lse_ptr + 2 * to, empty, mask=x < H * T)
            gl.store(lse_ptr + 2 * to + 1, gl.full([ROWS], 0.0, gl.float32, layout=of_rows), mask=x < H * T)
        else:
            gl.store(lse_ptr + to, empty, mask=x < H * T)
            u = first_row + gl.arange(0, ROWS, layout=gl.SliceLayout(1, load_layout))
            to_y = gl.convert_layout(to, gl.SliceLayout(1, load_layout)).to(gl.int64)
            d = gl.arange(0, CH, layout=gl.SliceLayout(0, load_layout))
            zeros = gl.full([ROWS, CH], 0.0, out_ptr.dtype.element_ty, layout=load_layout)
            gl.store(out_ptr + to_y[:, None] * (2 * CH) + d[None, :], zeros, mask=(u < H * T)[:, None])
            gl.store(out_ptr + to_y[:, None] * (2 * CH) + CH + d[None, :], zeros, mask=(u < H * T)[:, None])


def fits(dtype: torch.dtype, C: int, RH: int, page: int) -> bool:
    """Whether the kernel takes such a cache; that the device is a Hopper and the parts one grid, callers have seen."""
    return dtype in (torch.bfloat16, torch.float16) and C >= 128 and RH in (0, 16, 32, 64) and page % KEYS == 0


@functools.cache
def _layout(width: int) -> gl.NVMMASharedLayout:
    return gl.NVMMASharedLayout(min(128, 2 * width), 16, 4)


def _ragged(half: Tensor | None, slots: int) -> TensorDescriptor | None:
    """A descriptor as triton.tools.ragged_tma makes it: KEYS slots of one part, zeros behind a sequence's last."""
    if half is None or not half.shape[-1]:
        return None
    width, stride = half.shape[-1], half.stride(-2)
    flat = half.as_strided((slots, width), (stride, 1))
    shape, strides = [_LARGER, _LARGER, 2**30, width], [2**34 - stride, stride, stride, 1]
    return TensorDescriptor(flat, shape, strides, [1, 1, KEYS, width], _layout(width))


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
    _wide_kernel[(triton.cdiv(H * T, ROWS), splits, B)](
        q, r, *(_ragged(half, slots) for half in halves), table, lengths, seen, out, masses, scale, splits, rows_b,
        *q.stride()[:3], *r.stride()[:3], 0 if table is None else table.stride(0),
        0 if seen is None else seen.stride(0), H=H, T=T, CH=C // 2, RH=RH, K1=RH > 0 and halves[3] is not None,
        PAGE=page, SEEN=seen is not None, SIZE=size, PARTS=splits > 1, ROWS=ROWS, KEYS=KEYS, num_warps=WARPS,
    )  # fmt: skip
