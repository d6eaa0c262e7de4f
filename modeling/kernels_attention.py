"""Decode over latents in Triton: attention of a few new tokens' latent queries over a cache that all heads share.

Letters: B batch, H heads, T new tokens, S slots a sequence may have, C latent rank, R rotary width. The eager form,
which defines the result, is attention.absorbed_attention. A latent tile is loaded once, for all H * T rows of queries,
and is key and value at once; one in float8 is turned into the queries' dtype first, which is exact. The keys of a
sequence are split among programs, each keeps the maximum and the mass of its share, and a second launch merges them.
Grids depend on shapes alone, so that CUDA graphs replay for other lengths. On Hopper kernels_wide.py has the first
launch of more than 16 rows, where Triton has Gluon and the cache is such as it takes.
"""

import functools
import logging
from typing import NamedTuple

import torch
from torch import Tensor

from .float8 import FLOAT8, scales_of
from .kernels_gemm import dot_precision, multiprocessors, row_of
from .kernels_launch import (
    await_kernels,
    await_kernels_alone,
    cdiv,
    is_hopper,
    next_power_of_2,
    operator,
    optional_kernel,
    overlapping,
)

try:  # inside `try`, or the Hub loader refuses the whole model where Triton is missing
    import triton
    import triton.language as tl
    from triton.tools.ragged_tma import create_ragged_descriptor, load_ragged
except ImportError as error:
    raise ImportError(
        "The latent decode kernel needs Triton: pip install triton, or mla_implementation='eager'."
    ) from error

logger = logging.getLogger(__name__)
_INTERPRETED = triton.knobs.runtime.interpret  # the kernels below run in Python, on CPU tensors
_LOG2E = 1.4426950408889634
_MOST_SPLITS = 128
INVARIANT_KEYS = 1024  # keys of a split if the number of splits must not depend on the batch
MOST_TOKENS = 8


class Tile(NamedTuple):
    """How a kernel is cut: rows, keys, warps, pipeline stages; whether keys are the left operand of its products, so
    that a few rows are the narrow side; and whether the copy engine fetches the keys."""

    rows: int
    keys: int
    warps: int
    stages: int
    transposed: bool
    copied: bool = False


@triton.jit
def _share(length, s, splits, SIZE: tl.constexpr, KEYS: tl.constexpr):
    """First key and key behind the last one of split s."""
    if SIZE > 0:
        per = SIZE
    else:
        per = tl.cdiv(tl.cdiv(length, splits), KEYS) * KEYS
    first = tl.minimum(s * per, length)
    return first, tl.minimum(first + per, length)


@triton.jit
def _slots(table_ptr, row, start, last, stride_t, PAGE: tl.constexpr, KEYS: tl.constexpr):
    """Where KEYS keys of a sequence lie: an int64, and an offset of each. `row`: where it, or its table, begins.

    Behind the last key the last one is repeated: what is loaded has always been written.
    """
    i = tl.minimum(tl.arange(0, KEYS), last - 1 - start)
    if PAGE == 0:
        return row + (tl.full((), 0, tl.int64) + start) * stride_t, i * stride_t
    elif PAGE % KEYS == 0:  # tiles begin at multiples of KEYS
        page = tl.load(table_ptr + row + start // PAGE).to(tl.int64)
        return (page * PAGE + start % PAGE) * stride_t, i * stride_t
    else:
        n = start + i
        page = tl.load(table_ptr + row + n // PAGE).to(tl.int64)
        return 0, (page * PAGE + n % PAGE) * stride_t


@triton.jit
def _gather(part_ptr, base, offsets, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    """[keys, PADDED] of one part of the cache, zeros beyond its width."""
    c = tl.arange(0, PADDED)
    at = part_ptr + base + (offsets[:, None] + c[None, :])
    if WIDTH == PADDED:
        return tl.load(at)
    else:
        return tl.load(at, mask=(c < WIDTH)[None, :], other=0.0)


@triton.jit
def _exact(tile, scales, q, PTX: tl.constexpr):
    """Latents [keys, columns] in q's dtype; those in float8, or their bytes, times the scale [keys] of each token.

    PTX: keep the compiler from doing so twice, for each product in a layout of its own, from single bytes.
    """
    if scales is not None:
        if tile.dtype == tl.uint8:  # sign, exponent and mantissa where float32 has them, whose exponent is 120 more
            bits = tile.to(tl.int32)
            bits = ((bits & 0x80) << 24) | ((bits & 0x7F) << 20)
            tile = bits.to(tl.float32, bitcast=True) * 1.329227995784916e36
        tile = (tile.to(tl.float32) * scales[:, None]).to(q.dtype)
        if PTX:
            tile = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [tile], q.dtype, is_pure=False, pack=2)
    return tile


@triton.jit
def _finite(top):
    return tl.where(top == float("-inf"), 0.0, top)


@triton.jit
def _along_rows(x, TRANSPOSED: tl.constexpr):
    """A number for each row, to be broadcast over keys or columns."""
    return x[None, :] if TRANSPOSED else x[:, None]


@triton.jit
def _scores(q, tile, so_far, TRANSPOSED: tl.constexpr, PRECISION: tl.constexpr):
    """so_far + q tile.T, [rows, keys], or its transpose."""
    if q.dtype == tl.float32 and so_far is not None:  # short chains of additions round less
        return so_far + _scores(q, tile, None, TRANSPOSED, PRECISION)
    if TRANSPOSED:
        return tl.dot(tile, tl.trans(q), so_far, input_precision=PRECISION)
    else:
        return tl.dot(q, tl.trans(tile), so_far, input_precision=PRECISION)


@triton.jit
def _sums(weights, tile, so_far, TRANSPOSED: tl.constexpr, PRECISION: tl.constexpr):
    """so_far + weights tile, [rows, columns], or its transpose."""
    if TRANSPOSED:
        return tl.dot(tl.trans(tile), weights, so_far, input_precision=PRECISION)
    else:
        return tl.dot(weights, tile, so_far, input_precision=PRECISION)


@triton.jit(do_not_specialize=["splits", "rows_b", "s_table", "s_seen"])
def _decode_kernel(
    q_ptr, r_ptr, c0_ptr, c1_ptr, k0_ptr, k1_ptr, c0_desc, c1_desc, k0_desc, k1_desc, scales_ptr, table_ptr,
    starts_ptr, lengths_ptr, seen_ptr, out_ptr, lse_ptr, scale, splits, rows_b, sq_h, sq_b, sq_t, sr_h, sr_b, sr_t,
    sc_b, sc_t, sk_b, sk_t, ss_b, ss_t, s_table, s_seen,
    H: tl.constexpr, T: tl.constexpr, CH: tl.constexpr, RH: tl.constexpr, RP: tl.constexpr, K1: tl.constexpr,
    PAGE: tl.constexpr, FLAT: tl.constexpr, SEEN: tl.constexpr, SIZE: tl.constexpr, PARTS: tl.constexpr,
    PRECISION: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, STAGES: tl.constexpr, TRANSPOSED: tl.constexpr,
    COPIED: tl.constexpr, PTX: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One split of ROWS of the H * T rows of a sequence. Scores are [ROWS, KEYS] and sums [ROWS, CH], twice; if
    TRANSPOSED the other way round, so that as few as 16 rows are the narrow side of tensor-core products."""
    await_kernels_alone(PDL)
    s = tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    x = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    h = x % H
    t = x // H
    real = x < H * T
    c = tl.arange(0, CH)
    length = tl.load(lengths_ptr + b).to(tl.int32)
    first, last = _share(length, s, splits, SIZE, KEYS)
    to = ((h * tl.num_programs(2) + b) * T + t) * splits + s
    if first < last:
        q_at = q_ptr + (h.to(tl.int64) * sq_h + b * sq_b + t * sq_t)[:, None] + c[None, :]
        q0 = tl.load(q_at, mask=real[:, None], other=0.0)
        q1 = tl.load(q_at + CH, mask=real[:, None], other=0.0)
        if RH > 0:
            r = tl.arange(0, RP)
            r_at = r_ptr + (h.to(tl.int64) * sr_h + b * sr_b + t * sr_t)[:, None] + r[None, :]
            r_live = real[:, None] & (r < RH)[None, :]
            r0 = tl.load(r_at, mask=r_live, other=0.0)
            if K1:
                r1 = tl.load(r_at + RH, mask=r_live, other=0.0)
        if PAGE == 0:
            row_c = b * sc_b
            row_k = b * sk_b
        else:
            row_c = tl.load(starts_ptr + b).to(tl.int64) if FLAT else b * s_table
            row_k = row_c
        limit = tl.minimum(length - (T - 1) + t, last)
        top = tl.full((ROWS,), float("-inf"), tl.float32)
        mass = tl.zeros((ROWS,), tl.float32)
        acc0 = tl.zeros((CH, ROWS) if TRANSPOSED else (ROWS, CH), tl.float32)
        acc1 = tl.zeros((CH, ROWS) if TRANSPOSED else (ROWS, CH), tl.float32)
        for start in tl.range(first, last, KEYS, num_stages=STAGES):
            if COPIED:
                if PAGE == 0:
                    slot = (b * rows_b + start).to(tl.int32)
                else:
                    slot = (tl.load(table_ptr + row_c + start // PAGE) * PAGE + start % PAGE).to(tl.int32)
                left = tl.minimum(last - start, KEYS)
                c0 = load_ragged(c0_desc, slot, left, [0, 0])
                c1 = load_ragged(c1_desc, slot, left, [0, 0])
            else:
                base, offsets = _slots(table_ptr, row_c, start, last, sc_t, PAGE, KEYS)
                c0 = _gather(c0_ptr, base, offsets, CH, CH)
                c1 = _gather(c1_ptr, base, offsets, CH, CH)
            scales = None
            if scales_ptr is not None:
                base, offsets = _slots(table_ptr, b * ss_b, start, last, ss_t, PAGE, KEYS)
                scales = tl.load(scales_ptr + base + offsets)
            c0 = _exact(c0, scales, q0, PTX)
            c1 = _exact(c1, scales, q1, PTX)
            scores = _scores(q0, c0, None, TRANSPOSED, PRECISION)
            scores = _scores(q1, c1, scores, TRANSPOSED, PRECISION)
            if RH > 0:
                if COPIED:
                    k0 = load_ragged(k0_desc, slot, left, [0, 0])
                else:
                    base, offsets = _slots(table_ptr, row_k, start, last, sk_t, PAGE, KEYS)
                    k0 = _gather(k0_ptr, base, offsets, RH, RP)
                scores = _scores(r0, k0, scores, TRANSPOSED, PRECISION)
                if K1:
                    if COPIED:
                        k1 = load_ragged(k1_desc, slot, left, [0, 0])
                    else:
                        k1 = _gather(k1_ptr, base, offsets, RH, RP)
                    scores = _scores(r1, k1, scores, TRANSPOSED, PRECISION)
            n = start + tl.arange(0, KEYS)
            keys = n[:, None] if TRANSPOSED else n[None, :]
            if SEEN:
                seen = tl.load(seen_ptr + b * s_seen + n, mask=n < last, other=0) != 0
                seen = seen[:, None] if TRANSPOSED else seen[None, :]
                scores = tl.where(seen & (keys < _along_rows(limit, TRANSPOSED)), scores, float("-inf"))
            elif start + KEYS > tl.minimum(last, length - (T - 1)):
                scores = tl.where(keys < _along_rows(limit, TRANSPOSED), scores, float("-inf"))
            higher = tl.maximum(top, tl.max(scores, axis=0 if TRANSPOSED else 1) * scale)
            least = _finite(higher)
            weights = tl.exp2(scores * scale - _along_rows(least, TRANSPOSED))
            fade = tl.exp2(top - least)
            mass = mass * fade + tl.sum(weights, axis=0 if TRANSPOSED else 1)
            weights = weights.to(c0.dtype)
            acc0 = _sums(weights, c0, acc0 * _along_rows(fade, TRANSPOSED), TRANSPOSED, PRECISION)
            acc1 = _sums(weights, c1, acc1 * _along_rows(fade, TRANSPOSED), TRANSPOSED, PRECISION)
            top = higher
        columns = c[:, None] if TRANSPOSED else c[None, :]
        means_at = out_ptr + _along_rows(to.to(tl.int64), TRANSPOSED) * (2 * CH) + columns
        live = _along_rows(real, TRANSPOSED)
        inverse = _along_rows(tl.where(mass > 0, 1.0 / mass, 0.0), TRANSPOSED)
        tl.store(means_at, (acc0 * inverse).to(out_ptr.dtype.element_ty), mask=live)
        tl.store(means_at + CH, (acc1 * inverse).to(out_ptr.dtype.element_ty), mask=live)
        if PARTS:
            tl.store(lse_ptr + 2 * to, top, mask=real)
            tl.store(lse_ptr + 2 * to + 1, mass, mask=real)
        else:
            lse = tl.where(mass > 0, top + tl.log2(mass), float("-inf"))
            tl.store(lse_ptr + to, lse / 1.4426950408889634, mask=real)
    elif PARTS:
        tl.store(lse_ptr + 2 * to, tl.full((ROWS,), float("-inf"), tl.float32), mask=real)
        tl.store(lse_ptr + 2 * to + 1, tl.zeros((ROWS,), tl.float32), mask=real)
    else:
        tl.store(lse_ptr + to, tl.full((ROWS,), float("-inf"), tl.float32), mask=real)
        zeros_at = out_ptr + to.to(tl.int64)[:, None] * (2 * CH) + c[None, :]
        zeros = tl.zeros((ROWS, CH), out_ptr.dtype.element_ty)
        tl.store(zeros_at, zeros, mask=real[:, None])
        tl.store(zeros_at + CH, zeros, mask=real[:, None])


@triton.jit
def _masses(masses_ptr, s, splits):
    """Maxima and masses of splits `s`; -inf and 0 of what is not one."""
    tops = tl.load(masses_ptr + 2 * s, mask=s < splits, other=float("-inf"))
    return tops, tl.load(masses_ptr + 2 * s + 1, mask=s < splits, other=0.0)


@triton.jit
def _shared(parts, tops, masses, top, mass):
    """The sum of the means of splits, each by its share of the mass at `top`; of one alone exactly its mean."""
    shares = tl.div_rn(tl.exp2(tops - _finite(top)) * masses, mass)
    # an empty split has written no mean
    return tl.sum(tl.where(masses[:, None] > 0, parts * shares[:, None], 0.0), axis=0)


@triton.jit
def merged(parts_ptr, masses_ptr, x, splits, c, C: tl.constexpr, AT_ONCE: tl.constexpr):
    """Columns c of the mean of row x's splits, by their masses, each at its own maximum; and maximum and mass of all.
    Of `splits` in order; what is empty behind them changes no bit."""
    parts_ptr += x * splits * C
    masses_ptr += 2 * x * splits
    s = tl.arange(0, AT_ONCE)
    parts = tl.load(parts_ptr + s[:, None] * C + c[None, :], mask=(s < splits)[:, None], other=0.0)
    tops, masses = _masses(masses_ptr, s, splits)
    top = tl.max(tops, axis=0)
    mass = tl.sum(tl.exp2(tops - _finite(top)) * masses)
    for first in tl.range(AT_ONCE, splits, AT_ONCE):
        more_tops, more_masses = _masses(masses_ptr, first + s, splits)
        higher = tl.maximum(top, tl.max(more_tops, axis=0))
        mass = mass * tl.exp2(top - _finite(higher)) + tl.sum(tl.exp2(more_tops - _finite(higher)) * more_masses)
        top = higher
    out = _shared(parts, tops, masses, top, mass)
    for first in tl.range(AT_ONCE, splits, AT_ONCE):
        at = parts_ptr + (first + s)[:, None] * C + c[None, :]
        parts = tl.load(at, mask=(first + s < splits)[:, None], other=0.0)
        tops, masses = _masses(masses_ptr, first + s, splits)
        out += _shared(parts, tops, masses, top, mass)
    return out, top, mass


@triton.jit(do_not_specialize=["splits"])
def _merge_kernel(
    parts_ptr, masses_ptr, out_ptr, lse_ptr, splits, C: tl.constexpr, BLOCK: tl.constexpr, AT_ONCE: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """BLOCK columns of row x, merged, and its log-sum-exp."""
    await_kernels(PDL)
    x = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    out, top, mass = merged(parts_ptr, masses_ptr, x, splits, c, C, AT_ONCE)
    tl.store(out_ptr + x * C + c, out.to(out_ptr.dtype.element_ty))
    if tl.program_id(1) == 0:
        tl.store(lse_ptr + x, tl.where(mass > 0, _finite(top) + tl.log2(mass), float("-inf")) / 1.4426950408889634)


class Tiles(NamedTuple):
    """The tiles of a device: for rows of up to 16, of up to 32 and of more; and for the first where every sequence is
    one program's work, which then reads long runs of keys, or lies in pages."""

    few: Tile
    some: Tile
    many: Tile
    few_long: Tile


def _plain(keys: int, stages: int, many: Tile) -> Tiles:
    few, some = Tile(16, keys, 4, stages, True), Tile(32, keys, 8, stages, True)
    return Tiles(few, some, many, few)


_HOPPER = Tiles(
    # with the shared memory of four stages a multiprocessor takes one program; with that of three it may take two, and
    # leave others idle (278 us, not 210, for eight sequences of 64k)
    few=Tile(16, 32, 4, 4, True, copied=True),
    some=Tile(64, 64, 8, 2, False, copied=True),  # a tile of 32 rows: 430 us, not 210
    many=Tile(64, 64, 8, 2, False, copied=True),
    few_long=Tile(16, 64, 4, 2, True, copied=True),
)
# by the oldest compute capability that a row is for; measured on 90 only
TABLE = {90: _HOPPER, 0: _plain(32, 2, Tile(64, 32, 8, 2, False))}
# latents in float8 take time and registers to be turned
_HOPPER_FLOAT8 = Tiles(
    few=Tile(16, 32, 4, 5, True, copied=True),
    some=Tile(64, 64, 8, 2, False, copied=True),
    many=Tile(64, 64, 8, 2, False, copied=True),
    few_long=Tile(16, 64, 8, 3, True, copied=True),
)
FLOAT8_TABLE = {100: _HOPPER, 90: _HOPPER_FLOAT8, 0: TABLE[0]}
CDNA = _plain(16, 1, Tile(32, 16, 4, 1, True))
FLOAT32 = _plain(16, 1, Tile(16, 16, 4, 1, True))
INTERPRETER = _plain(16, 1, Tile(16, 16, 4, 1, False))


def _device(x: Tensor, float8: bool) -> Tiles:
    return row_of(x, FLOAT8_TABLE if float8 else TABLE, CDNA, FLOAT32, INTERPRETER)


def tile_for(
    x: Tensor, rows: int, B: int, S: int, batch_invariant: bool, float8: bool = False, paged: bool = False
) -> Tile:
    """The tile of `rows` rows of each of `B` sequences of up to `S` keys, on x's device and of its dtype.

    float8: the latents are in float8. paged: they lie in pages that hold a long tile.
    """
    tiles, programs = _device(x, float8), multiprocessors(x)
    if rows <= 16:
        long = paged or (not batch_invariant and programs // max(B, 1) <= 1)
        return tiles.few_long if long else tiles.few
    tile = tiles.many if rows > 32 else tiles.some
    # of many rows a program needs many keys to be worth its start: too few of both leave the device idle
    busy = max(B, 1) * cdiv(rows, tile.rows) * (S // (2 * tile.keys))
    return tile if batch_invariant or tile.rows <= 32 or 2 * busy >= programs else tiles.few


def _splits(x: Tensor, tile: Tile, B: int, rows: int, S: int, batch_invariant: bool) -> int:
    """Programs among which the S slots of a sequence are split: one wave of the device, at least two tiles each."""
    if batch_invariant:
        return max(cdiv(S, INVARIANT_KEYS), 1)
    programs = max(B, 1) * cdiv(rows, tile.rows)
    return max(1, min(multiprocessors(x) // programs, S // (2 * tile.keys), _MOST_SPLITS))


@functools.cache
def _wide(device: torch.device) -> list:
    """`fits` and `launch` of kernels_wide.py on a Hopper; nothing elsewhere, and where Triton has no Gluon for it.

    A list, so that `split_decode` can empty it: Gluon is experimental, and another Triton may not compile the kernel.
    """
    if _INTERPRETED or not is_hopper(device):
        return []
    try:
        from .kernels_wide import fits, launch
    except Exception:
        logger.debug("kernels_wide.py does not load with this Triton; _decode_kernel runs.", exc_info=True)
        return []
    return [fits, launch]


def split_decode(
    q: Tensor, r: Tensor, c0: Tensor, c1: Tensor, k0: Tensor, k1: Tensor | None, lengths: Tensor, seen: Tensor | None,
    table: Tensor | None, starts: Tensor | None, page: int, longest: int, scaling: float, batch_invariant: bool,
) -> tuple[Tensor, Tensor, Tensor, int]:  # fmt: skip
    """Launch the first stage; arguments as `_latent_decode`'s, nothing empty. How many splits there are comes last.

    Of several: their outputs [H, B, T, splits, C] float32, and maximum (base 2) and mass [H, B, T, splits, 2]; the
    third is nothing yet. Of one: the output [H, B, T, C], nothing, and the log-sum-exp [H, B, T].
    """
    H, B, T, C = q.shape
    R, scales, float8 = r.shape[3], None, c0.dtype == FLOAT8
    if float8:
        k0, scales = k0[..., :R], scales_of(k0, R)
        if not converts_float8(q):
            c0, c1 = c0.view(torch.uint8), c1.view(torch.uint8)
    tile = tile_for(q, H * T, B, longest, batch_invariant, float8, page >= 64)
    if R > 64 and tile.rows == 64:  # or they do not fit into shared memory beside latents of 512
        tile = tile._replace(keys=tile.keys // 2)
    splits = _splits(q, tile, B, H * T, longest, batch_invariant)
    lse = q.new_empty((H, B, T), dtype=torch.float32)
    parts = splits > 1
    to = q.new_empty((H, B, T, splits, C), dtype=torch.float32) if parts else q.new_empty((H, B, T, C))
    masses = q.new_empty((H, B, T, splits, 2), dtype=torch.float32) if parts else lse
    RH = R if k1 is None else R // 2
    RP = max(16, next_power_of_2(RH))
    halves = (c0, c1, k0, k1)
    size = INVARIANT_KEYS if batch_invariant else 0
    rows_b = c0.stride(0) // c0.stride(-2) if table is None else 0
    slots = len(c0) if table is not None else (B - 1) * rows_b + c0.shape[1]
    one_grid = tile.copied and _one_grid(halves, rows_b)
    wide = _wide(q.device) if tile.rows == 64 and one_grid and starts is None and R <= 64 else []
    if wide and wide[0](c0.dtype, C, RH, page):
        scale = scaling * _LOG2E
        with optional_kernel("wide", wide.clear, logger):
            wide[1](q, r, halves, slots, table, lengths, seen, to, masses, scale, splits, rows_b, page, size)
            return to, masses, lse, splits
    copied = one_grid and RH in (0, RP) and page % tile.keys == 0
    boxes = [_ragged(half, slots, tile.keys) if copied else None for half in halves]
    _decode_kernel[(cdiv(H * T, tile.rows), splits, B)](
        q, r, *halves, *boxes, scales, table, starts, lengths, seen, to, masses, scaling * _LOG2E, splits, rows_b,
        *q.stride()[:3], *r.stride()[:3], c0.stride(0), c0.stride(-2), k0.stride(0), k0.stride(-2),
        *((0, 0) if scales is None else scales.stride()),
        0 if table is None or starts is not None else table.stride(0), 0 if seen is None else seen.stride(0),
        H=H, T=T, CH=C // 2, RH=RH, RP=RP, K1=k1 is not None, PAGE=page, FLAT=starts is not None,
        SEEN=seen is not None, SIZE=size, PARTS=parts, PRECISION=dot_precision(q.dtype), ROWS=tile.rows,
        KEYS=tile.keys, STAGES=tile.stages, TRANSPOSED=tile.transposed, COPIED=copied,
        PTX=q.itemsize == 2 and has_ptx(q), num_warps=tile.warps, **overlapping(q),
    )  # fmt: skip
    return to, masses, lse, splits


@operator("latent_decode")
def _latent_decode(
    q: Tensor, r: Tensor, c0: Tensor, c1: Tensor, k0: Tensor, k1: Tensor | None, lengths: Tensor, seen: Tensor | None,
    table: Tensor | None, starts: Tensor | None, page: int, longest: int, scaling: float, batch_invariant: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """out [H, B, T, C] and the log-sum-exp [H, B, T] float32, of q [H, B, T, C] and r [H, B, T, R].

    c0, c1, k0, k1: halves of latents and rotated keys, [B, S, ...], or [slots, ...] with `table` [B, pages], or flat
    with the `starts` [B] of each sequence; without k1, k0 is the whole key. In float8 as `latent_decode` has it. No
    sequence has more than `longest` keys.
    """
    if not q.numel():
        return q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=torch.float32)
    arguments = (q, r, c0, c1, k0, k1, lengths, seen, table, starts, page, longest, scaling, batch_invariant)
    to, masses, lse, splits = split_decode(*arguments)
    if splits == 1:
        return to, lse
    out, C = q.new_empty(q.shape), q.shape[3]
    # the order of a sum depends on how many are added at once, and the number of splits on the longest sequence
    at_once = 16 if batch_invariant else next_power_of_2(splits)
    block = min(C, 4096 // at_once)
    _merge_kernel[(lse.numel(), C // block)](
        to, masses, out, lse, splits, C=C, BLOCK=block, AT_ONCE=at_once, **overlapping(q)
    )
    return out, lse


def _one_grid(halves: tuple[Tensor | None, ...], rows_b: int) -> bool:
    """Whether all parts are boxes of flat caches whose sequences begin at the same multiples of a slot."""
    parts = [half for half in halves if half is not None]
    even = all(half.dim() == 2 or half.stride(0) == rows_b * half.stride(1) for half in parts)
    return even and all(half.data_ptr() % 16 == 0 and half.stride(-2) * half.itemsize % 16 == 0 for half in parts)


def _ragged(half: Tensor | None, slots: int, keys: int):
    """A descriptor of `keys` slots of one part of the cache that gives zeros behind a sequence's last."""
    if half is None or not half.shape[-1]:
        return None
    width = half.shape[-1]
    return create_ragged_descriptor(half.as_strided((slots, width), (half.stride(-2), 1)), [keys, width])


@_latent_decode.register_fake
def _(q, r, c0, c1, k0, k1, lengths, seen, table, starts, page, longest, scaling, batch_invariant):
    return q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=torch.float32)


def has_ptx(x: Tensor) -> bool:
    """Whether kernels on x's device may have instructions of NVIDIA's."""
    return x.is_cuda and torch.version.hip is None


def converts_float8(x: Tensor) -> bool:
    """Whether x's device has instructions for float8_e4m3fn; others read its bytes."""
    return not x.is_cuda or (has_ptx(x) and torch.cuda.get_device_capability(x.device) >= (8, 9))


def why_not(T: int, C: int, R: int, dtype: torch.dtype, device: torch.device) -> str | None:
    """Why the kernel cannot take `T` new tokens over a cache of these widths; None if it can."""
    if device.type != "cuda" and not _INTERPRETED:
        return f"the cache is on {device.type!r}, and Triton runs on CUDA and ROCm devices"
    if dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"the cache is {dtype}; the kernel takes bfloat16, float16 and float32"
    if T > MOST_TOKENS:
        return f"{T} new tokens are more than {MOST_TOKENS}"
    if C < 32 or C > 512 or C & (C - 1):
        return f"kv_lora_rank={C} is not a power of two from 32 to 512"
    if R % 2 or R > 128:
        return f"qk_rope_head_dim={R} is not even, or more than 128"
    return None


def latent_decode(
    q_HBTC: Tensor, r_HBTR: Tensor, c_BSC: Tensor, k_BSR: Tensor, lengths_B: Tensor, seen_BS: Tensor | None = None, *,
    scaling: float, batch_invariant: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """softmax(q·cᵀ + r·kᵀ)·c of each sequence's T newest tokens over its own past (DeepSeek-V2, appendix C).

    Not differentiable. Tensors need not be contiguous, their last axes must be.

    Args:
        q_HBTC, r_HBTR: queries after W_UK, and rotated queries; T at most `MOST_TOKENS`.
        c_BSC, k_BSR: latents and rotated keys in the first `lengths` of S slots; what lies behind is not read. Latents
            in float8_e4m3fn come with keys [B, S, R + 8], which have their scales behind them (float8.py).
        lengths_B: int32 or int64, with the T new tokens; the last of them sees all, the one before all but one.
        seen_BS: [B, at least the greatest length], 0 or False at keys that nobody sees (padding); None is none. Of
            int32 it is fetched ahead, of smaller types as it is needed.
        scaling: factor of the scores.
        batch_invariant: a sequence gets the same bits alone as in any batch.

    Returns:
        [H, B, T, C] in q's dtype, zeros for a token that sees nothing; and the natural log-sum-exp of its scores
        [H, B, T] float32, -inf for such a token.

    Raises:
        ValueError: `why_not` names a reason.
    """
    check(q_HBTC, r_HBTR)
    first, second = c_BSC.tensor_split(2, dim=-1)
    return _latent_decode(
        q_HBTC, r_HBTR, first, second, k_BSR, None, lengths_B, seen_BS, None, None, 0, c_BSC.shape[1], scaling,
        batch_invariant,
    )  # fmt: skip


def latent_decode_pages(
    q_HBTC: Tensor, r_HBTR: Tensor, first: Tensor, second: Tensor, table: Tensor, page: int, lengths_B: Tensor, *,
    scaling: float, starts_B: Tensor | None = None, longest: int | None = None, batch_invariant: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`latent_decode` over pages: key n of sequence b lies in slot table[b, n // page] * page + n % page.

    Args:
        first, second: [slots, C/2 + R/2], the first and second halves of a token's latent, each followed by that half
            of its rotated key.
        table: [B, pages] integers; entries behind a sequence's length are not read. Or flat, with `starts_B`.
        starts_B: where in a flat table each sequence begins.
        longest: the most keys that a sequence has; None is what the table has room for.
    """
    check(q_HBTC, r_HBTR)
    C = q_HBTC.shape[3] // 2
    return _latent_decode(
        q_HBTC, r_HBTR, first[:, :C], second[:, :C], first[:, C:], second[:, C:], lengths_B, None, table, starts_B,
        page, table.shape[-1] * page if longest is None else longest, scaling, batch_invariant,
    )  # fmt: skip


def check(q: Tensor, r: Tensor):
    """Raise a ValueError if the kernel cannot take these queries [H, B, T, C] and [H, B, T, R]."""
    reason = why_not(q.shape[2], q.shape[3], r.shape[3], q.dtype, q.device)
    if reason:
        raise ValueError(refusal(reason))


def refusal(reason: str) -> str:
    """What users read who asked for the kernel."""
    return f"The latent decode kernel does not run here: {reason}; use mla_implementation='eager'."
