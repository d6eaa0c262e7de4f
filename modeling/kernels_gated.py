"""The gated product of a feed-forward, silu(gate) · up, in one launch, and all that its backward needs in another.

Both round once, where the eager form in recompute.py, which defines the result, rounds after each operation.
"""

import torch
from torch import Tensor

try:  # inside `try`, or the Hub loader refuses the whole model where Triton is missing
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("The fused gate needs Triton: pip install triton.") from error

from .kernels_launch import cdiv, operator

_BLOCK = 2048


@triton.jit
def _gated_kernel(gate_ptr, up_ptr, out_ptr, count, BLOCK: tl.constexpr):
    """out = silu(gate) · up, element by element."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    gate = tl.load(gate_ptr + i, mask=i < count, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + i, mask=i < count, other=0.0).to(tl.float32)
    tl.store(out_ptr + i, (gate * tl.sigmoid(gate) * up).to(out_ptr.dtype.element_ty), mask=i < count)


@triton.jit
def _gated_gradient_kernel(dout_ptr, gate_ptr, up_ptr, dgate_ptr, dup_ptr, out_ptr, count, BLOCK: tl.constexpr):
    """dgate and dup of dout, and out anew."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    dout = tl.load(dout_ptr + i, mask=i < count, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + i, mask=i < count, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + i, mask=i < count, other=0.0).to(tl.float32)
    share = tl.sigmoid(gate)
    opened = gate * share
    dgate = dout * up * (share + opened * (1.0 - share))
    tl.store(dgate_ptr + i, dgate.to(dgate_ptr.dtype.element_ty), mask=i < count)
    tl.store(dup_ptr + i, (dout * opened).to(dup_ptr.dtype.element_ty), mask=i < count)
    tl.store(out_ptr + i, (opened * up).to(out_ptr.dtype.element_ty), mask=i < count)


@operator("gated")
def gated(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) · up of two tensors of one shape, contiguous, in their dtype."""
    out = torch.empty_like(gate)
    if out.numel():
        _gated_kernel[(cdiv(out.numel(), _BLOCK),)](gate, up, out, out.numel(), BLOCK=_BLOCK, num_warps=4)
    return out


@gated.register_fake
def _(gate, up):
    return torch.empty_like(gate)


@operator("gated_gradient")
def gated_gradient(dout: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of gate and up for `dout`, and the product itself, which the gradient of a weight behind it needs."""
    dgate, dup, out = (torch.empty_like(gate) for _ in range(3))
    if out.numel():
        _gated_gradient_kernel[(cdiv(out.numel(), _BLOCK),)](
            dout, gate, up, dgate, dup, out, out.numel(), BLOCK=_BLOCK, num_warps=4
        )
    return dgate, dup, out


@gated_gradient.register_fake
def _(dout, gate, up):
    return tuple(torch.empty_like(gate) for _ in range(3))
