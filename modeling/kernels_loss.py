"""Cross entropy of logits that are held, in two passes over them: one for the loss, one that writes the gradient.

Letters: X targets, W vocabulary. The eager form, which defines the result, is token_loss.py's for processors.
"""

import torch
from torch import Tensor

try:  # inside `try`, or the Hub loader refuses the whole model where Triton is missing
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("The fused loss needs Triton: pip install triton.") from error

from .kernels_launch import operator

_BLOCK = 4096


@triton.jit
def _loss_kernel(logits_ptr, target_ptr, loss_ptr, mass_ptr, W, ignored, BLOCK: tl.constexpr):
    """loss[x] = logsumexp(logits[x]) - logits[x, target[x]], 0 where the target is ignored; mass[x]: the former.

    NaN for a target that is no column.
    """
    x = tl.program_id(0).to(tl.int64)
    top = tl.full((BLOCK,), float("-inf"), tl.float32)
    mass = tl.zeros((BLOCK,), tl.float32)
    for first in tl.range(0, W, BLOCK):
        c = first + tl.arange(0, BLOCK)
        logit = tl.load(logits_ptr + x * W + c, mask=c < W, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(top, logit)
        base = tl.where(higher == float("-inf"), 0.0, higher)
        mass = mass * tl.exp(top - base) + tl.exp(logit - base)
        top = higher
    best = tl.max(top, axis=0)
    base = tl.where(best == float("-inf"), 0.0, best)
    total = base + tl.log(tl.sum(mass * tl.exp(top - base), axis=0))
    target = tl.load(target_ptr + x)
    real = target != ignored
    inside = (target >= 0) & (target < W)
    chosen = tl.load(logits_ptr + x * W + tl.where(inside, target, 0)).to(tl.float32)
    tl.store(loss_ptr + x, tl.where(real, tl.where(inside, total - chosen, float("nan")), 0.0))
    tl.store(mass_ptr + x, total)


@triton.jit
def _loss_gradient_kernel(
    logits_ptr, target_ptr, mass_ptr, scale_ptr, out_ptr, W, ignored, BLOCK: tl.constexpr
):  # fmt: skip
    """out[x] = scale · (softmax(logits[x]) - onehot(target[x])), zeros where the target is ignored."""
    x = tl.program_id(0).to(tl.int64)
    target = tl.load(target_ptr + x)
    mass = tl.load(mass_ptr + x)
    scale = tl.load(scale_ptr).to(tl.float32)
    for first in tl.range(0, W, BLOCK):
        c = first + tl.arange(0, BLOCK)
        logit = tl.load(logits_ptr + x * W + c, mask=c < W, other=0.0).to(tl.float32)
        slope = (tl.exp(logit - mass) - tl.where(c == target, 1.0, 0.0)) * scale
        slope = tl.where(target != ignored, slope, 0.0)
        tl.store(out_ptr + x * W + c, slope.to(out_ptr.dtype.element_ty), mask=c < W)


@operator("losses")
def losses(logits_XW: Tensor, target_X: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    """Each row's cross entropy, 0 for ignored targets, and its log-sum-exp: two of [X] float32.

    Args:
        logits_XW: contiguous. target_X: int64, contiguous, each in [0, W) or `ignore_index`; others make the loss NaN.
    """
    X, W = logits_XW.shape
    loss, mass = (logits_XW.new_empty(X, dtype=torch.float32) for _ in range(2))
    if X:
        _loss_kernel[(X,)](logits_XW, target_X, loss, mass, W, ignore_index, BLOCK=_BLOCK, num_warps=8)
    return loss, mass


@losses.register_fake
def _(logits_XW, target_X, ignore_index):
    return tuple(logits_XW.new_empty(len(logits_XW), dtype=torch.float32) for _ in range(2))


@operator("losses_gradient")
def losses_gradient(scale: Tensor, logits_XW: Tensor, target_X: Tensor, mass_X: Tensor, ignore_index: int) -> Tensor:
    """Gradient of the sum of `losses` times `scale` [] with respect to the logits, in their dtype."""
    X, W = logits_XW.shape
    out = torch.empty_like(logits_XW)
    if X:
        _loss_gradient_kernel[(X,)](
            logits_XW, target_X, mass_X, scale, out, W, ignore_index, BLOCK=_BLOCK, num_warps=8
        )
    return out


@losses_gradient.register_fake
def _(scale, logits_XW, target_X, mass_X, ignore_index):
    return torch.empty_like(logits_XW)
