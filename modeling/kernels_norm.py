"""The residual stream in training: a sum and its RMS norm in one pass, their gradients in another, sums of gradients.

Letters: N tokens, D hidden. The eager form, which defines the result, is attention.LamoeRMSNorm behind an addition.
Gradients are float32 within a launch and round once, where autograd rounds after the norm and after each addition.
"""

import torch
from torch import Tensor

from .kernels_gemm import multiprocessors
from .kernels_launch import cdiv, next_power_of_2, operator

try:  # inside `try`, or the Hub loader refuses the whole model where Triton is missing
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("The fused norms need Triton: pip install triton.") from error

_BLOCK = 2048
_WARPS = 32  # of a multiprocessor, that share the rows of a gradient: with 64 registers a thread all run at once
WIDEST = 8192  # row that a program holds


@triton.jit
def _norm_kernel(
    x_ptr, added_ptr, weight_ptr, sum_ptr, y_ptr, rstd_ptr, eps, D: tl.constexpr, DP: tl.constexpr, ADDS: tl.constexpr
):
    """One row: sum = x + added, rounded as it is stored; rstd = 1 / rms(sum), [N] float32; y = sum · rstd · weight."""
    n = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, DP)
    x = tl.load(x_ptr + n * D + d, mask=d < D, other=0.0).to(tl.float32)
    if ADDS:
        x += tl.load(added_ptr + n * D + d, mask=d < D, other=0.0).to(tl.float32)
        rounded = x.to(sum_ptr.dtype.element_ty)
        tl.store(sum_ptr + n * D + d, rounded, mask=d < D)
        x = rounded.to(tl.float32)
    weight = tl.load(weight_ptr + d, mask=d < D, other=0.0).to(tl.float32)
    rstd = tl.rsqrt(tl.sum(x * x, axis=0) / D + eps)
    tl.store(rstd_ptr + n, rstd)
    tl.store(y_ptr + n * D + d, (x * rstd * weight).to(y_ptr.dtype.element_ty), mask=d < D)


@triton.jit
def _norm_gradient_kernel(
    dy_ptr, dsum_ptr, x_ptr, weight_ptr, rstd_ptr, dx_ptr, parts_ptr, N, D: tl.constexpr, DP: tl.constexpr,
    ADDS: tl.constexpr, OF_WEIGHT: tl.constexpr,
):  # fmt: skip
    """Rows program, program + programs, …: dx = dsum + the norm's gradient; parts[program] [D] is their dweight."""
    program = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, DP)
    weight = tl.load(weight_ptr + d, mask=d < D, other=0.0).to(tl.float32)
    part = tl.zeros((DP,), tl.float32)
    for n in tl.range(program, N, tl.num_programs(0), num_stages=2):
        rstd = tl.load(rstd_ptr + n)
        normed = tl.load(x_ptr + n * D + d, mask=d < D, other=0.0).to(tl.float32) * rstd
        dnormed = tl.load(dy_ptr + n * D + d, mask=d < D, other=0.0).to(tl.float32)
        if OF_WEIGHT:
            part += dnormed * normed
        dnormed *= weight
        dx = (dnormed - normed * (tl.sum(dnormed * normed, axis=0) / D)) * rstd
        if ADDS:
            dx += tl.load(dsum_ptr + n * D + d, mask=d < D, other=0.0).to(tl.float32)
        tl.store(dx_ptr + n * D + d, dx.to(dx_ptr.dtype.element_ty), mask=d < D)
    if OF_WEIGHT:
        tl.store(parts_ptr + program * D + d, part, mask=d < D)


@triton.jit
def _sum_kernel(a_ptr, b_ptr, c_ptr, out_ptr, count, BLOCK: tl.constexpr):
    """out = a + b + c, element by element."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    out = tl.load(a_ptr + i, mask=i < count, other=0.0).to(tl.float32)
    out += tl.load(b_ptr + i, mask=i < count, other=0.0).to(tl.float32)
    out += tl.load(c_ptr + i, mask=i < count, other=0.0).to(tl.float32)
    tl.store(out_ptr + i, out.to(out_ptr.dtype.element_ty), mask=i < count)


def _sizes(D: int) -> dict[str, int]:
    width = next_power_of_2(D)
    return {"D": D, "DP": width, "num_warps": min(max(width // 256, 1), 16)}  # 16 bytes a thread up to D = 4096


@operator("add_norm")
def add_norm(x: Tensor, added: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """sum = x + added and its norm y, both [..., D], and rstd [...] float32; without `added` the first is empty.

    All contiguous and of one dtype; weight: [D].
    """
    total, y = x.new_empty(0) if added is None else torch.empty_like(x), torch.empty_like(x)
    rstd = x.new_empty(x.shape[:-1], dtype=torch.float32)
    if x.numel():
        _norm_kernel[(rstd.numel(),)](
            x, added, weight, total, y, rstd, eps, ADDS=added is not None, **_sizes(x.shape[-1])
        )
    return total, y, rstd


@add_norm.register_fake
def _(x, added, weight, eps):
    total = x.new_empty(0) if added is None else torch.empty_like(x)
    return total, torch.empty_like(x), x.new_empty(x.shape[:-1], dtype=torch.float32)


@operator("norm_gradient")
def norm_gradient(
    dy: Tensor, dsum: Tensor | None, x: Tensor, weight: Tensor, rstd: Tensor, of_weight: bool
) -> tuple[Tensor, Tensor]:
    """Of a norm's input x [..., D], which goes on beside it with the gradient `dsum`, and of its weight [D].

    The latter is summed in fixed order in float32, and empty unless `of_weight`. dy, dsum, x: contiguous.
    """
    dx, N, sizes = torch.empty_like(x), rstd.numel(), _sizes(x.shape[-1])
    programs = min(N, multiprocessors(x) * max(_WARPS // sizes["num_warps"], 1))
    parts = x.new_empty((programs, x.shape[-1]) if of_weight else 0, dtype=torch.float32)
    if N:
        _norm_gradient_kernel[(programs,)](
            dy, dsum, x, weight, rstd, dx, parts, N, ADDS=dsum is not None, OF_WEIGHT=of_weight, **sizes
        )
    return dx, (parts.sum(dim=0) if of_weight else parts).to(weight.dtype)


@norm_gradient.register_fake
def _(dy, dsum, x, weight, rstd, of_weight):
    return torch.empty_like(x), torch.empty_like(weight) if of_weight else weight.new_empty(0)


@operator("sum_of_three")
def sum_of_three(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """a + b + c of one shape and dtype, contiguous."""
    out = torch.empty_like(a)
    if out.numel():
        _sum_kernel[(cdiv(out.numel(), _BLOCK),)](a, b, c, out, out.numel(), BLOCK=_BLOCK, num_warps=4)
    return out


@sum_of_three.register_fake
def _(a, b, c):
    return torch.empty_like(a)
