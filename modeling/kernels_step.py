"""Triton kernels of a decode step of a few tokens, where launches and the weights' bytes are all that counts.

Letters: N tokens (B sequences of T), D width, H heads, C latent rank, P plain and R rotary width of a query head, V
value width. Each weight row is read as a stream, with the norm before the product, the residual behind it, the cache's
write or the merge of the attention's splits in the same launch. The eager forms, which define the results, are
attention.LamoeRMSNorm, torch.nn.functional.linear and attention.LamoeAttention.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .float8 import FLOAT8, largest_of, scales_of
from .kernels_attention import check, merged, split_decode
from .kernels_heads import turn
from .kernels_launch import await_kernels, cdiv, next_power_of_2, operator, overlapping

try:  # inside `try`, or the Hub loader refuses the whole model where Triton is missing
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError(
        "The latent decode kernel needs Triton: pip install triton, or mla_implementation='eager'."
    ) from error

MOST_ROWS = 4  # tokens; each reads the weights for itself, from the L2 cache but for the first


class RowsTile(NamedTuple):
    """Weight rows and inner depth that a block reads at a time, and its warps."""

    rows: int
    depth: int
    warps: int


INTERPRETER = RowsTile(8, 16, 1)


def streaming_tile(width: int, itemsize: int) -> RowsTile:
    """The tile for rows of `width` numbers of `itemsize` bytes on a GPU; the best of 40 on an H100."""
    if itemsize == 4:
        return RowsTile(2, min(2048, next_power_of_2(width)), 8)
    return RowsTile(1, 4096, 8) if width >= 8192 else RowsTile(1, min(1024, next_power_of_2(width)), 4)


@triton.jit
def _linear_kernel(
    x_ptr, norm_ptr, w0_ptr, w1_ptr, add_ptr, out_ptr, normed_ptr, s_x, eps, D: tl.constexpr, R0: tl.constexpr,
    R1: tl.constexpr, ADD: tl.constexpr, NORM: tl.constexpr, KEEP: tl.constexpr, ROWS: tl.constexpr,
    DEPTH: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """ROWS columns of out[n] = W norm(x[n]) + add[n], [N, R0 + R1] of W0 [R0, D] and W1 [R1, D], one after the other.

    The norm's factor of a token comes last: one pass over x and W. KEEP: program 0 writes the normed x [N, D].
    """
    BLOCKS0: tl.constexpr = (R0 + ROWS - 1) // ROWS
    n = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * ROWS
    w_ptr = w0_ptr
    width = R0
    column = 0
    if R1 > 0:  # noqa: SIM102 (a constant, or the branch is compiled)
        if tl.program_id(0) >= BLOCKS0:
            row = (tl.program_id(0) - BLOCKS0) * ROWS
            w_ptr = w1_ptr
            width = R1
            column = R0
    rows = row + tl.arange(0, ROWS)
    w_rows = w_ptr + rows.to(tl.int64)[:, None] * D
    inside = (rows < width)[:, None]
    d = tl.arange(0, DEPTH)
    products = tl.zeros((ROWS, DEPTH), tl.float32)
    squares = tl.zeros((DEPTH,), tl.float32)
    next_w = tl.load(w_rows + d[None, :], mask=inside & (d < D)[None, :], other=0.0)
    await_kernels(PDL)
    for first in tl.range(0, D, DEPTH):
        c = first + d
        w = next_w
        next_w = tl.load(w_rows + (c + DEPTH)[None, :], mask=inside & (c + DEPTH < D)[None, :], other=0.0)
        x = tl.load(x_ptr + n * s_x + c, mask=c < D, other=0.0).to(tl.float32)
        if NORM:
            squares += x * x
            x *= tl.load(norm_ptr + c, mask=c < D, other=0.0).to(tl.float32)
        products += w.to(tl.float32) * x[None, :]
    y = tl.sum(products, axis=1)
    if NORM:
        factor = tl.rsqrt(tl.sum(squares, axis=0) / D + eps)
        y *= factor
        if KEEP:  # noqa: SIM102
            if tl.program_id(0) == 0:
                for first in tl.range(0, D, DEPTH):
                    c = first + d
                    x = tl.load(x_ptr + n * s_x + c, mask=c < D, other=0.0).to(tl.float32) * factor
                    x *= tl.load(norm_ptr + c, mask=c < D, other=0.0).to(tl.float32)
                    tl.store(normed_ptr + n * D + c, x.to(normed_ptr.dtype.element_ty), mask=c < D)
    if ADD:
        y += tl.load(add_ptr + n * R0 + rows, mask=rows < width, other=0.0).to(tl.float32)
    tl.store(out_ptr + n * (R0 + R1) + column + rows, y.to(out_ptr.dtype.element_ty), mask=rows < width)


def _launch_linear(x, norm, eps, w0, w1, add, out, normed):
    N, D = x.shape
    tile = streaming_tile(D, w0.itemsize) if x.is_cuda else INTERPRETER
    blocks = cdiv(len(w0), tile.rows) + (0 if w1 is None else cdiv(len(w1), tile.rows))
    if N:
        _linear_kernel[(blocks, N)](
            x, norm, w0, w1, add, out, normed, x.stride(0), eps, D=D, R0=len(w0), R1=0 if w1 is None else len(w1),
            ADD=add is not None, NORM=norm is not None, KEEP=normed is not None, ROWS=tile.rows, DEPTH=tile.depth,
            num_warps=tile.warps, **overlapping(x),
        )  # fmt: skip


@operator("norm_linear")
def norm_linear(x_ND: Tensor, norm_D: Tensor, eps: float, w0: Tensor, w1: Tensor | None) -> Tensor:
    """Products of the normed x with both weights, beside each other: [N, R0 + R1] in x's dtype.

    Args:
        x_ND: strided rows. norm_D: weight of the norm. w0, w1: [R0, D] and [R1, D], contiguous, of one dtype.
    """
    out = x_ND.new_empty((len(x_ND), len(w0) + (0 if w1 is None else len(w1))))
    _launch_linear(x_ND, norm_D, eps, w0, w1, None, out, None)
    return out


@norm_linear.register_fake
def _(x_ND, norm_D, eps, w0, w1):
    return x_ND.new_empty((len(x_ND), len(w0) + (0 if w1 is None else len(w1))))


@operator("norm_router")
def norm_router(x_ND: Tensor, norm_D: Tensor, eps: float, weight_ED: Tensor) -> tuple[Tensor, Tensor]:
    """The normed x [N, D] in its dtype, and the router's logits of it [N, E] float32, of a float32 weight."""
    out, normed = weight_ED.new_empty((len(x_ND), len(weight_ED))), x_ND.new_empty(x_ND.shape)
    _launch_linear(x_ND, norm_D, eps, weight_ED, None, None, out, normed)
    return normed, out


@norm_router.register_fake
def _(x_ND, norm_D, eps, weight_ED):
    return x_ND.new_empty(x_ND.shape), weight_ED.new_empty((len(x_ND), len(weight_ED)))


@operator("linear_add")
def linear_add(x_ND: Tensor, weight: Tensor, residual: Tensor) -> Tensor:
    """residual + x Wᵀ, [N, R], rounded once. weight: [R, D]; residual: [N, R], contiguous."""
    out = torch.empty_like(residual)
    _launch_linear(x_ND, None, 0.0, weight, None, residual, out, None)
    return out


@linear_add.register_fake
def _(x_ND, weight, residual):
    return torch.empty_like(residual)


@triton.jit
def _float8_bytes(x):
    """Bytes of x in float8_e4m3fn, to the nearest, or nearest even one; |x| at most 448."""
    size = tl.abs(x)
    bits = size.to(tl.int32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - (120 << 3)  # whose exponent is 120 less
    small = (size + 16384.0).to(tl.int32, bitcast=True) - 0x46800000  # multiples of 2^-9, the last bit of 2^14
    sign = (x.to(tl.int32, bitcast=True) >> 24) & 0x80
    return (tl.where(size < 0.015625, small, normal) | sign).to(tl.uint8)


@triton.jit(do_not_specialize=["room", "T"])
def _write_kernel(
    kv_ptr, norm_ptr, q_ptr, plain_ptr, up_ptr, cos_ptr, sin_ptr, at_ptr, c0_ptr, c1_ptr, k0_ptr, k1_ptr, scales_ptr,
    r_ptr, absorbed_ptr, eps, room, B, T, s_kv_b, s_kv_t, sq_b, sq_t, sq_h, sp_b, sp_t, sp_h, s_up, s_cos_b, s_cos_t,
    s_c, s_k, s_scales, limit,
    H: tl.constexpr, C: tl.constexpr, R: tl.constexpr, P: tl.constexpr, INTERLEAVED: tl.constexpr,
    SLOTS: tl.constexpr, HEADS: tl.constexpr, TURNS: tl.constexpr, CP: tl.constexpr, PAIRS: tl.constexpr,
    PP: tl.constexpr, COLUMNS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Of one token: program 0 norms the latent, rotates the key and writes both; the next TURNS rotate HEADS queries
    each; the others, if P > 0, take COLUMNS of a head's plain query [P] times its up-projection [P, C].

    at: lengths [B] of sequences with `room` slots each; if SLOTS the slot of each token, negative for none. With
    `scales` latents are written as bytes of float8, and must not pass `limit`: float8.quantised is the eager form.
    """
    token = tl.program_id(0)
    b = token // T
    t = token % T
    if tl.program_id(1) > TURNS:
        if P > 0:
            h = (tl.program_id(1) - 1 - TURNS) // (C // COLUMNS)
            c = (tl.program_id(1) - 1 - TURNS) % (C // COLUMNS) * COLUMNS + tl.arange(0, COLUMNS)
            p = tl.arange(0, PP)
            at = up_ptr + h.to(tl.int64) * s_up + p[:, None] * C + c[None, :]
            w = tl.load(at, mask=(p < P)[:, None], other=0.0)
            await_kernels(PDL)
            x = tl.load(plain_ptr + b.to(tl.int64) * sp_b + t * sp_t + h * sp_h + p, mask=p < P, other=0.0)
            y = tl.sum(w.to(tl.float32) * x.to(tl.float32)[:, None], axis=0)
            to = absorbed_ptr + ((h * B + b).to(tl.int64) * T + t) * C + c
            tl.store(to, y.to(absorbed_ptr.dtype.element_ty))
    else:
        await_kernels(PDL)
        i = tl.arange(0, PAIRS)
        half: tl.constexpr = R // 2
        real = i < half
        step: tl.constexpr = 2 if INTERLEAVED else 1
        other: tl.constexpr = 1 if INTERLEAVED else R // 2
        cos = tl.load(cos_ptr + b * s_cos_b + t * s_cos_t + i, mask=real, other=0.0).to(tl.float32)
        sin = tl.load(sin_ptr + b * s_cos_b + t * s_cos_t + i, mask=real, other=0.0).to(tl.float32)
        if tl.program_id(1) == 0:
            if SLOTS:
                slot = tl.load(at_ptr + token).to(tl.int64)
            else:
                slot = b.to(tl.int64) * room + tl.load(at_ptr + b) - T + t
            if slot >= 0:
                row = kv_ptr + b.to(tl.int64) * s_kv_b + t * s_kv_t
                column = tl.arange(0, CP)
                latent = tl.load(row + column, mask=column < C, other=0.0).to(tl.float32)
                latent *= tl.rsqrt(tl.sum(latent * latent, axis=0) / C + eps)
                latent *= tl.load(norm_ptr + column, mask=column < C, other=0.0).to(tl.float32)
                latent = latent.to(k0_ptr.dtype.element_ty)
                if scales_ptr is not None:
                    exact = latent.to(tl.float32)
                    finite = tl.sum(exact * 0.0, axis=0) == 0.0  # of a maximum NaN is no part
                    largest = tl.max(tl.abs(exact), axis=0)
                    exponent = tl.maximum(((largest.to(tl.int32, bitcast=True) + 0x1FFFFF) >> 23) - 8, 1)
                    exact = tl.minimum(tl.maximum(exact, -limit), limit)
                    latent = _float8_bytes(exact * ((254 - exponent) << 23).to(tl.float32, bitcast=True))
                    scale = (exponent << 23).to(tl.float32, bitcast=True)
                    tl.store(scales_ptr + slot * s_scales, tl.where(finite, scale, float("nan")))
                tl.store(c0_ptr + slot * s_c + column, latent, mask=column < C // 2)
                behind = column - C // 2
                tl.store(c1_ptr + slot * s_c + behind, latent, mask=(behind >= 0) & (column < C))
                key = slot * s_k + i
                turn(row + C + step * i, other, cos, sin, k0_ptr + key, k1_ptr + key, real)
        else:
            heads = (tl.program_id(1) - 1) * HEADS + tl.arange(0, HEADS)
            pairs = q_ptr + (b.to(tl.int64) * sq_b + t * sq_t + heads * sq_h)[:, None] + step * i[None, :]
            turned = r_ptr + ((heads * B + b).to(tl.int64) * T + t)[:, None] * R + i[None, :]
            inside = (heads < H)[:, None] & real[None, :]
            turn(pairs, other, cos[None, :], sin[None, :], turned, turned + half, inside)


@operator("write_latents", mutates_args=("c", "k"))
def write_latents(
    kv: Tensor, norm: Tensor, eps: float, q: Tensor, cos: Tensor, sin: Tensor, lengths: Tensor, c: Tensor, k: Tensor,
    interleaved: bool, plain: Tensor | None = None, up_key: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Norm the latents of T new tokens, rotate their keys and queries, and write what is cached, in one launch.

    The eager form is LamoeRMSNorm and attention.rotate_pairs. Tensors are contiguous but for kv, queries and angles.

    Args:
        kv: [B, T, C + R], strided, latents and keys as kv_a_proj_with_mqa gives them.
        norm: [C], weight of the norm.
        q: [B, H, T, R], strided. cos, sin: [B or 1, T, R/2].
        lengths: [B], with the new tokens, which are the last ones.
        c, k: [B, room, C] and [B, room, R]; written. Latents in float8_e4m3fn with keys [B, room, R + 8] are rounded,
            and their scales written behind the keys.
        plain, up_key: plain queries [B, H, T, P], strided, and W_UK [H, P, C] with contiguous heads, to absorb the
            latter into the former; for a few tokens.

    Returns:
        the rotated queries [H, B, T, R], and the latent ones [H, B, T, C] or, without `up_key`, [0]; contiguous.
    """
    scales, R = None, q.shape[3]
    if c.dtype == FLOAT8:
        c, k, scales = c.view(torch.uint8), k[..., :R], scales_of(k, R)
    halves = (*c.tensor_split(2, dim=-1), *k.tensor_split(2, dim=-1))
    return _launch_write(kv, norm, eps, q, cos, sin, lengths, halves, c.shape[1], interleaved, plain, up_key, scales)


def _launch_write(
    kv, norm, eps, q, cos, sin, at, halves, room, interleaved, plain, up_key, scales=None
) -> tuple[Tensor, Tensor]:
    """halves: of latents and of keys, the numbers of a slot side by side; `at` are slots if there is no `room`.

    scales: [B, room], of latents that are written as bytes of float8.
    """
    B, H, T, R = q.shape
    C = norm.shape[0]
    r = q.new_empty((H, B, T, R))
    absorbed = q.new_empty(0 if up_key is None else (H, B, T, C))
    P = 0 if up_key is None else up_key.shape[1]
    heads, columns = 16, min(C, 64)
    turns = cdiv(H, heads) * (R > 0)
    if B * T:
        _write_kernel[(B * T, 1 + turns + (H * (C // columns) if P else 0))](
            kv, norm, q, plain, up_key, cos, sin, at, *halves, scales, r, absorbed, eps, room or 0, B, T,
            *kv.stride()[:2], q.stride(0), q.stride(2), q.stride(1),
            *((plain.stride(0), plain.stride(2), plain.stride(1), up_key.stride(0)) if P else (0, 0, 0, 0)),
            0 if len(cos) == 1 else cos.stride(0), cos.stride(1), halves[0].stride(-2), halves[2].stride(-2),
            0 if scales is None else scales.stride(1), largest_of(q.dtype),
            H=H, C=C, R=R, P=P, INTERLEAVED=interleaved, SLOTS=room is None, HEADS=heads, TURNS=turns,
            CP=next_power_of_2(C), PAIRS=next_power_of_2(max(R // 2, 1)),
            PP=next_power_of_2(max(P, 1)), COLUMNS=columns, num_warps=4, **overlapping(q),
        )  # fmt: skip
    return r, absorbed


@write_latents.register_fake
def _(kv, norm, eps, q, cos, sin, lengths, c, k, interleaved, plain=None, up_key=None):
    B, H, T, R = q.shape
    return q.new_empty((H, B, T, R)), q.new_empty(0 if up_key is None else (H, B, T, len(norm)))


@operator("write_pages", mutates_args=("first", "second"))
def write_pages(
    kv: Tensor, norm: Tensor, eps: float, q: Tensor, cos: Tensor, sin: Tensor, written: Tensor, first: Tensor,
    second: Tensor, interleaved: bool,
) -> Tensor:  # fmt: skip
    """`write_latents` to the slots of a paged cache: rotated queries [H, B, T, R].

    Args:
        written: [B * T] int64, the slot of each new token; of a negative one nothing is written.
        first, second: [slots, C/2 + R/2], as kernels_attention.latent_decode_pages reads them; written.
    """
    half = norm.shape[0] // 2
    halves = (first[:, :half], second[:, :half], first[:, half:], second[:, half:])
    return _launch_write(kv, norm, eps, q, cos, sin, written, halves, None, interleaved, None, None)[0]


@write_pages.register_fake
def _(kv, norm, eps, q, cos, sin, written, first, second, interleaved):
    B, H, T, R = q.shape
    return q.new_empty((H, B, T, R))


@triton.jit(do_not_specialize=["splits"])
def _values_kernel(
    parts_ptr, masses_ptr, up_ptr, out_ptr, splits, B, T, s_up, H: tl.constexpr, V: tl.constexpr, C: tl.constexpr,
    PARTS: tl.constexpr, ROWS: tl.constexpr, AT_ONCE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """ROWS values of a head of one token: its up-projection [V, C] times the merged mean of all splits."""
    BLOCKS: tl.constexpr = (V + ROWS - 1) // ROWS
    h = tl.program_id(0) // BLOCKS
    v = tl.program_id(0) % BLOCKS * ROWS + tl.arange(0, ROWS)
    n = tl.program_id(1)
    x = h.to(tl.int64) * B * T + n
    c = tl.arange(0, C)
    w = tl.load(up_ptr + h.to(tl.int64) * s_up + v[:, None] * C + c[None, :], mask=(v < V)[:, None], other=0.0)
    await_kernels(PDL)
    if PARTS:
        total, _, _ = merged(parts_ptr, masses_ptr, x, splits, c, C, AT_ONCE)
    else:
        total = tl.load(parts_ptr + x * C + c).to(tl.float32)
    y = tl.sum(w.to(tl.float32) * total[None, :], axis=1)
    tl.store(out_ptr + n.to(tl.int64) * (H * V) + h * V + v, y.to(out_ptr.dtype.element_ty), mask=v < V)


@operator("decode_values")
def _decode_values(
    q: Tensor, r: Tensor, c: Tensor, k: Tensor, lengths: Tensor, seen: Tensor | None, up_value: Tensor, scaling: float
) -> Tensor:
    """[B, T, H V] of q [H, B, T, C], r [H, B, T, R] and W_UV [H, V, C]."""
    H, B, T, C = q.shape
    V = up_value.shape[1]
    out = q.new_empty((B, T, H * V))
    if not out.numel():
        return out
    c0, c1 = c.tensor_split(2, dim=-1)
    parts, masses, _, splits = split_decode(
        q, r, c0, c1, k, None, lengths, seen, None, None, 0, c.shape[1], scaling, False
    )
    rows = 16
    _values_kernel[(H * cdiv(V, rows), B * T)](
        parts, masses, up_value, out, splits, B, T, up_value.stride(0), H=H, V=V, C=C, PARTS=splits > 1, ROWS=rows,
        AT_ONCE=8, num_warps=4, **overlapping(q),
    )  # fmt: skip
    return out


@_decode_values.register_fake
def _(q, r, c, k, lengths, seen, up_value, scaling):
    return q.new_empty((q.shape[1], q.shape[2], q.shape[0] * up_value.shape[1]))


def decode_values(
    q_HBTC: Tensor, r_HBTR: Tensor, c_BSC: Tensor, k_BSR: Tensor, lengths_B: Tensor, seen_BS: Tensor | None,
    up_value_HVC: Tensor, *, scaling: float,
) -> Tensor:  # fmt: skip
    """`kernels_attention.latent_decode` and each head's values of it, o·W_UVᵀ: [B, T, H V], for a few tokens.

    Args:
        up_value_HVC: heads may be strided; each is contiguous.
    """
    check(q_HBTC, r_HBTR)
    return _decode_values(q_HBTC, r_HBTR, c_BSC, k_BSR, lengths_B, seen_BS, up_value_HVC, scaling)
