"""Router logits in float32 of half-precision tokens, on tensor cores, and their gradients.

A float32 number is the sum of three bfloat16 ones, so three products of bfloat16, summed in float32, are as exact as a
product of float32, which has no tensor cores of its own. The eager form, which defines the result, is
recompute.exact_linear. Letters: N tokens, D hidden, E experts.
"""

import torch
from torch import Tensor

try:  # inside `try`, or the Hub loader refuses the whole model where Triton is missing
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("The fused router logits need Triton: pip install triton.") from error

from .kernels_launch import cdiv, operator

_ROWS, _DEPTH, _WIDTH = 64, 64, 64  # tokens, hidden width and experts that a program takes at a time
_BLOCK = 1024  # weights that a program splits
_SPLITS = 64  # programs among which the tokens of a weight's gradient are split
LEAST_ROWS = 64  # for fewer tokens launches count, and cuBLAS has fewer


@triton.jit
def _parts(x, dtype: tl.constexpr):
    """x [...] float32 as a sum of three of the dtype."""
    first = x.to(dtype)
    rest = x - first.to(tl.float32)
    second = rest.to(dtype)
    return first, second, (rest - second.to(tl.float32)).to(dtype)


@triton.jit
def _split_kernel(weight_ptr, parts_ptr, count, BLOCK: tl.constexpr):
    """Three numbers whose sum is the float32 one, `count` each after the other."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    parts = _parts(tl.load(weight_ptr + i, mask=i < count, other=0.0), parts_ptr.dtype.element_ty)
    for part in tl.static_range(3):
        tl.store(parts_ptr + part * count + i, parts[part], mask=i < count)


@triton.jit
def _logits_kernel(
    x_ptr, parts_ptr, out_ptr, N, E, s_x, D: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    """out[n, e] = x[n] · w[e], [N, E] float32, of parts [3, E, D]; each depth is summed by itself, the least first.

    Tensor cores cut off what they add: sums of few terms, added up by the other cores, which round, lose less.
    """
    n = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    e = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    d = tl.arange(0, DEPTH)
    out = tl.zeros((ROWS, WIDTH), tl.float32)
    for first in tl.range(0, D, DEPTH):
        c = first + d
        x = tl.load(x_ptr + n[:, None] * s_x + c[None, :], mask=(n < N)[:, None] & (c < D)[None, :], other=0.0)
        at = parts_ptr + e[None, :] * D + c[:, None]
        inside = (e < E)[None, :] & (c < D)[:, None]
        total = tl.dot(x, tl.load(at + 2 * E * D, mask=inside, other=0.0))
        total = tl.dot(x, tl.load(at + E * D, mask=inside, other=0.0), total)
        out += tl.dot(x, tl.load(at, mask=inside, other=0.0), total)
    tl.store(out_ptr + n[:, None] * E + e[None, :], out, mask=(n < N)[:, None] & (e < E)[None, :])


@triton.jit
def _tokens_gradient_kernel(
    dout_ptr, parts_ptr, dx_ptr, N, E, D: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr, EP: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    """dx[n] = sum over e of dout[n, e] w[e], rounded to half precision: of both factors two parts are enough."""
    n = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    c = tl.program_id(1) * DEPTH + tl.arange(0, DEPTH)
    dx = tl.zeros((ROWS, DEPTH), tl.float32)
    for first in tl.static_range(0, EP, WIDTH):
        e = first + tl.arange(0, WIDTH)
        dout = tl.load(dout_ptr + n[:, None] * E + e[None, :], mask=(n < N)[:, None] & (e < E)[None, :], other=0.0)
        at = parts_ptr + e[:, None] * D + c[None, :]
        inside = (e < E)[:, None] & (c < D)[None, :]
        w = tl.load(at, mask=inside, other=0.0)
        high, low, _ = _parts(dout, w.dtype)
        dx = tl.dot(high, tl.load(at + E * D, mask=inside, other=0.0), dx)
        dx = tl.dot(low, w, dx)
        dx = tl.dot(high, w, dx)
    to = dx_ptr + n[:, None] * D + c[None, :]
    tl.store(to, dx.to(dx_ptr.dtype.element_ty), mask=(n < N)[:, None] & (c < D)[None, :])


@triton.jit
def _router_gradient_kernel(
    dout_ptr, x_ptr, out_ptr, N, E, s_x, rows_a_split, D: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    """out[split, e] = sum over the split's tokens of dout[n, e] x[n], [splits, E, D] float32."""
    c = tl.program_id(0) * DEPTH + tl.arange(0, DEPTH)
    e = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    split = tl.program_id(2).to(tl.int64)
    stop = tl.minimum((split + 1) * rows_a_split, N)
    out = tl.zeros((WIDTH, DEPTH), tl.float32)
    for first in tl.range(split * rows_a_split, stop, ROWS):
        n = first + tl.arange(0, ROWS)
        inside = (n < stop)[:, None]
        x = tl.load(x_ptr + n[:, None] * s_x + c[None, :], mask=inside & (c < D)[None, :], other=0.0)
        dout = tl.load(dout_ptr + n[:, None] * E + e[None, :], mask=inside & (e < E)[None, :], other=0.0)
        high, middle, low = _parts(tl.trans(dout), x.dtype)
        total = tl.dot(low, x)
        total = tl.dot(middle, x, total)
        out += tl.dot(high, x, total)
    to = out_ptr + (split * E + e[:, None]) * D + c[None, :]
    tl.store(to, out, mask=(e < E)[:, None] & (c < D)[None, :])


def _split(weight_ED: Tensor, dtype: torch.dtype) -> Tensor:
    """[3, E, D] of `dtype` whose sum is the float32 weight."""
    parts = torch.empty((3, *weight_ED.shape), dtype=dtype, device=weight_ED.device)
    _split_kernel[(cdiv(weight_ED.numel(), _BLOCK),)](weight_ED, parts, weight_ED.numel(), BLOCK=_BLOCK, num_warps=4)
    return parts


@operator("router_logits")
def router_logits(x_ND: Tensor, weight_ED: Tensor) -> Tensor:
    """x·Wᵀ [N, E] float32. x_ND: half precision, its rows contiguous; weight_ED: float32, contiguous."""
    (N, D), E = x_ND.shape, len(weight_ED)
    out = x_ND.new_empty((N, E), dtype=torch.float32)
    if N:
        _logits_kernel[(cdiv(N, _ROWS), cdiv(E, _WIDTH))](
            x_ND, _split(weight_ED, x_ND.dtype), out, N, E, x_ND.stride(0), D=D, ROWS=_ROWS, DEPTH=_DEPTH,
            WIDTH=_WIDTH, num_warps=4, num_stages=3,
        )  # fmt: skip
    return out


@router_logits.register_fake
def _(x_ND, weight_ED):
    return x_ND.new_empty((len(x_ND), len(weight_ED)), dtype=torch.float32)


@operator("router_tokens_gradient")
def router_tokens_gradient(dout_NE: Tensor, weight_ED: Tensor, like: Tensor) -> Tensor:
    """Gradient of `router_logits` for its tokens, [N, D] in the dtype of `like`. dout_NE: float32, contiguous."""
    (N, E), D = dout_NE.shape, weight_ED.shape[1]
    dx = like.new_empty((N, D))
    if N:
        _tokens_gradient_kernel[(cdiv(N, _ROWS), cdiv(D, _DEPTH))](
            dout_NE, _split(weight_ED, dx.dtype), dx, N, E, D=D, ROWS=_ROWS, DEPTH=_DEPTH,
            EP=cdiv(E, _WIDTH) * _WIDTH, WIDTH=_WIDTH, num_warps=4,
        )  # fmt: skip
    return dx


@router_tokens_gradient.register_fake
def _(dout_NE, weight_ED, like):
    return like.new_empty((len(dout_NE), weight_ED.shape[1]))


@operator("router_gradient")
def router_gradient(dout_NE: Tensor, x_ND: Tensor) -> Tensor:
    """Gradient of `router_logits` for its weight, [E, D] float32, summed in fixed order."""
    (N, E), D = dout_NE.shape, x_ND.shape[1]
    rows = cdiv(cdiv(max(N, 1), _SPLITS), _ROWS) * _ROWS
    splits = cdiv(N, rows)
    parts = dout_NE.new_empty((splits, E, D))
    if N:
        _router_gradient_kernel[(cdiv(D, _DEPTH), cdiv(E, _WIDTH), splits)](
            dout_NE, x_ND, parts, N, E, x_ND.stride(0), rows, D=D, ROWS=_ROWS, DEPTH=_DEPTH, WIDTH=_WIDTH,
            num_warps=8, num_stages=2,
        )  # fmt: skip
    return parts.sum(dim=0)


@router_gradient.register_fake
def _(dout_NE, x_ND):
    return dout_NE.new_empty((dout_NE.shape[1], x_ND.shape[1]))
