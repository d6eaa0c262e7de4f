"""Queries and keys of the expanded form from their projections in one launch: rotary turn, copies, and back.

Letters: N tokens (B sequences of T), H heads, P plain and R rotary width of a query-key head, V value width. The eager
forms, which define the result, are attention.rotate_pairs and concatenation.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

try:  # inside `try`, or the Hub loader refuses the whole model where Triton is missing
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("The fused heads need Triton: pip install triton.") from error

from .kernels_launch import next_power_of_2, operator

_HEADS = 16  # that a program takes at a time


@triton.jit
def _angles(cos_ptr, sin_ptr, n, T, s_b, s_t, R: tl.constexpr, RP: tl.constexpr):
    """Cosines and sines of a token, [RP]; cos, sin: [B or 1, T, R/2]."""
    i = tl.arange(0, RP)
    at = n // T * s_b + n % T * s_t + i
    return tl.load(cos_ptr + at, mask=i < R // 2, other=0.0), tl.load(sin_ptr + at, mask=i < R // 2, other=0.0)


@triton.jit
def turn(pairs, other: tl.constexpr, cos, sin, to0, to1, mask):
    """Rotate pairs, whose second numbers lie `other` further, to their first halves and to their second ones."""
    first = tl.load(pairs, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(pairs + other, mask=mask, other=0.0).to(tl.float32)
    tl.store(to0, (first * cos - second * sin).to(to0.dtype.element_ty), mask=mask)
    tl.store(to1, (second * cos + first * sin).to(to1.dtype.element_ty), mask=mask)


@triton.jit
def _heads_kernel(
    q_ptr, kv_ptr, k_ptr, cos_ptr, sin_ptr, query_ptr, key_ptr, T, s_k_b, s_k_t, s_cos_b, s_cos_t,
    H: tl.constexpr, P: tl.constexpr, R: tl.constexpr, V: tl.constexpr, INTERLEAVED: tl.constexpr,
    HEADS: tl.constexpr, PP: tl.constexpr, RP: tl.constexpr,
):  # fmt: skip
    """One token: query[h] = [q plain; turned q] of q [N, H, P+R], key[h] = [kv plain; turned k] of kv [N, H, P+V]."""
    n = tl.program_id(0).to(tl.int64)
    cos, sin = _angles(cos_ptr, sin_ptr, n, T, s_cos_b, s_cos_t, R, RP)
    step: tl.constexpr = 2 if INTERLEAVED else 1
    other: tl.constexpr = 1 if INTERLEAVED else R // 2
    half: tl.constexpr = R // 2
    p = tl.arange(0, PP)
    i = tl.arange(0, RP)
    pair = k_ptr + n // T * s_k_b + n % T * s_k_t + step * i
    k0 = tl.load(pair, mask=i < half, other=0.0).to(tl.float32)
    k1 = tl.load(pair + other, mask=i < half, other=0.0).to(tl.float32)
    first = (k0 * cos - k1 * sin).to(key_ptr.dtype.element_ty)[None, :]
    second = (k1 * cos + k0 * sin).to(key_ptr.dtype.element_ty)[None, :]
    for start in tl.range(0, H, HEADS):
        h = start + tl.arange(0, HEADS)
        row = (n * H + h)[:, None]
        plain = (h < H)[:, None] & (p < P)[None, :]
        turned = (h < H)[:, None] & (i < half)[None, :]
        q = tl.load(q_ptr + row * (P + R) + p[None, :], mask=plain, other=0.0)
        tl.store(query_ptr + row * (P + R) + p[None, :], q, mask=plain)
        kv = tl.load(kv_ptr + row * (P + V) + p[None, :], mask=plain, other=0.0)
        tl.store(key_ptr + row * (P + R) + p[None, :], kv, mask=plain)
        rotary = row * (P + R) + P
        to = rotary + i[None, :]
        turn(
            q_ptr + rotary + step * i[None, :], other, cos[None, :], sin[None, :], query_ptr + to,
            query_ptr + to + half, turned,
        )  # fmt: skip
        tl.store(key_ptr + to, tl.broadcast_to(first, (HEADS, RP)), mask=turned)
        tl.store(key_ptr + to + half, tl.broadcast_to(second, (HEADS, RP)), mask=turned)


@triton.jit
def _heads_gradient_kernel(
    dquery_ptr, dkey_ptr, dvalue_ptr, cos_ptr, sin_ptr, dq_ptr, dkv_ptr, dk_ptr, T, s_cos_b, s_cos_t,
    H: tl.constexpr, P: tl.constexpr, R: tl.constexpr, V: tl.constexpr, INTERLEAVED: tl.constexpr,
    HEADS: tl.constexpr, PP: tl.constexpr, RP: tl.constexpr, VP: tl.constexpr,
):  # fmt: skip
    """One token, the other way: turned back, heads of the shared key summed in order. dvalue: [N, H, V]."""
    n = tl.program_id(0).to(tl.int64)
    cos, sin = _angles(cos_ptr, sin_ptr, n, T, s_cos_b, s_cos_t, R, RP)
    step: tl.constexpr = 2 if INTERLEAVED else 1
    other: tl.constexpr = 1 if INTERLEAVED else R // 2
    half: tl.constexpr = R // 2
    p = tl.arange(0, PP)
    i = tl.arange(0, RP)
    v = tl.arange(0, VP)
    k0 = tl.zeros((RP,), tl.float32)
    k1 = tl.zeros((RP,), tl.float32)
    for start in tl.range(0, H, HEADS):
        h = start + tl.arange(0, HEADS)
        row = (n * H + h)[:, None]
        plain = (h < H)[:, None] & (p < P)[None, :]
        turned = (h < H)[:, None] & (i < half)[None, :]
        values = (h < H)[:, None] & (v < V)[None, :]
        dq = tl.load(dquery_ptr + row * (P + R) + p[None, :], mask=plain, other=0.0)
        tl.store(dq_ptr + row * (P + R) + p[None, :], dq, mask=plain)
        dk = tl.load(dkey_ptr + row * (P + R) + p[None, :], mask=plain, other=0.0)
        tl.store(dkv_ptr + row * (P + V) + p[None, :], dk, mask=plain)
        dv = tl.load(dvalue_ptr + row * V + v[None, :], mask=values, other=0.0)
        tl.store(dkv_ptr + row * (P + V) + P + v[None, :], dv, mask=values)
        rotary = row * (P + R) + P
        at = rotary + i[None, :]
        to = dq_ptr + rotary + step * i[None, :]
        turn(dquery_ptr + at, half, cos[None, :], -sin[None, :], to, to + other, turned)
        k0 += tl.sum(tl.load(dkey_ptr + at, mask=turned, other=0.0).to(tl.float32), axis=0)
        k1 += tl.sum(tl.load(dkey_ptr + at + half, mask=turned, other=0.0).to(tl.float32), axis=0)
    to = dk_ptr + n * R + step * i
    tl.store(to, (k0 * cos + k1 * sin).to(dk_ptr.dtype.element_ty), mask=i < half)
    tl.store(to + other, (k1 * cos - k0 * sin).to(dk_ptr.dtype.element_ty), mask=i < half)


def _sizes(P: int, R: int) -> dict[str, int]:
    return {"HEADS": _HEADS, "PP": next_power_of_2(P), "RP": next_power_of_2(max(R // 2, 1))}


@operator("heads")
def _heads(q: Tensor, kv: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    """query and key [B, T, H, P + R]."""
    B, T, H, width = q.shape
    R = k.shape[-1]
    P, V = width - R, kv.shape[-1] - width + R
    query, key = torch.empty_like(q), torch.empty_like(q)
    if B * T:
        _heads_kernel[(B * T,)](
            q, kv, k, cos, sin, query, key, T, *k.stride()[:2], 0 if len(cos) == 1 else cos.stride(0),
            cos.stride(1),
            H=H, P=P, R=R, V=V, INTERLEAVED=interleaved, num_warps=4, **_sizes(P, R),
        )  # fmt: skip
    return query, key


@_heads.register_fake
def _(q, kv, k, cos, sin, interleaved):
    return torch.empty_like(q), torch.empty_like(q)


@operator("heads_gradient")
def _heads_gradient(
    dquery: Tensor, dkey: Tensor, dvalue: Tensor, cos: Tensor, sin: Tensor, R: int, interleaved: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """dq [B, T, H, P + R], dkv [B, T, H, P + V] and dk [B, T, R]."""
    B, T, H, width = dquery.shape
    P, V = width - R, dvalue.shape[-1]
    dq, dkv = torch.empty_like(dquery), dquery.new_empty((B, T, H, P + V))
    dk = dquery.new_empty((B, T, R))
    if B * T:
        _heads_gradient_kernel[(B * T,)](
            dquery, dkey, dvalue, cos, sin, dq, dkv, dk, T, 0 if len(cos) == 1 else cos.stride(0), cos.stride(1),
            H=H, P=P, R=R, V=V, INTERLEAVED=interleaved, VP=next_power_of_2(V), num_warps=4,
            **_sizes(P, R),
        )  # fmt: skip
    return dq, dkv, dk


@_heads_gradient.register_fake
def _(dquery, dkey, dvalue, cos, sin, R, interleaved):
    B, T, H, width = dquery.shape
    dkv = dquery.new_empty((B, T, H, width - R + dvalue.shape[-1]))
    return torch.empty_like(dquery), dkv, dquery.new_empty((B, T, R))


class _Heads(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, kv, k, cos, sin, interleaved):
        ctx.save_for_backward(cos, sin)
        ctx.interleaved, ctx.R = interleaved, k.shape[-1]
        query, key = _heads(q, kv, k, cos, sin, interleaved)
        return query, key, kv[..., q.shape[-1] - ctx.R :]

    @staticmethod
    @once_differentiable
    def backward(ctx, dquery, dkey, dvalue):
        grads = (dquery.contiguous(), dkey.contiguous(), dvalue.contiguous())
        dq, dkv, dk = _heads_gradient(*grads, *ctx.saved_tensors, ctx.R, ctx.interleaved)
        return dq, dkv, dk, None, None, None


def expanded_heads(
    q_BTHX: Tensor, kv_BTHX: Tensor, k_BTR: Tensor, cos: Tensor, sin: Tensor, interleaved: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries and keys [B, T, H, P + R] with turned rotary parts, and values [B, T, H, V], a view of `kv_BTHX`.

    Differentiable once, in the first three.

    Args:
        q_BTHX: [B, T, H, P + R]; kv_BTHX: [B, T, H, P + V], plain keys and values.
        k_BTR: the rotary key that all heads share; strided.
        cos, sin: [B or 1, T, R/2] float32, as LamoeRotaryEmbedding gives them.
        interleaved: whether pair i is (x[2i], x[2i + 1]); pairs come back as (y[i], y[R/2 + i]).
    """
    dtype = q_BTHX.dtype  # under autocast a projection may be wrapped in something that has another
    return _Heads.apply(
        q_BTHX.contiguous(), kv_BTHX.to(dtype).contiguous(), k_BTR.to(dtype), cos.float(), sin.float(), interleaved
    )
