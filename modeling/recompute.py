"""Operations that keep less for their backward than PyTorch would, and make the rest again: same values, fewer bytes.

Letters: N tokens, D hidden, F feed-forward width, E experts. What each saves is in bytes a token at bfloat16.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .projections import unreadable_weight


def trains_eagerly() -> bool:
    """Whether a backward will follow that no compiler plans: a compiler decides itself what to keep."""
    return torch.is_grad_enabled() and not torch.compiler.is_compiling()


def gated_linear(gate: Tensor, up: Tensor, projection: nn.Module, act_fn, silu: bool) -> Tensor:
    """`projection(act_fn(gate) * up)`; keeps gate and up alone, not the two products of them (4 F bytes a token less).

    Args:
        gate, up: [..., F], differentiable.
        projection: the layer behind; one that is wrapped, hooked or sharded is called, and then all is kept.
        silu: whether `act_fn` is SiLU; any other activation is computed as ever.
    """
    plain = silu and trains_eagerly() and unreadable_weight(projection, gate) is None
    if not plain or projection.bias is not None or projection._backward_hooks or projection._backward_pre_hooks:
        return projection(act_fn(gate) * up)
    return _GatedLinear.apply(gate, up, projection.weight.to(gate.dtype))  # autocast would cast it just so


class _GatedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up, weight_DF):
        ctx.save_for_backward(gate, up, weight_DF)
        return F.linear(F.silu(gate) * up, weight_DF)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        gate, up, weight_DF = ctx.saved_tensors
        dgate = dup = dweight = None
        opened = F.silu(gate)
        if ctx.needs_input_grad[2]:
            dweight = dy.flatten(0, -2).mT @ (opened * up).flatten(0, -2)
        if ctx.needs_input_grad[0] or ctx.needs_input_grad[1]:
            dproduct = dy @ weight_DF
            dup = dproduct * opened
            dgate = torch.ops.aten.silu_backward(dproduct * up, gate)
        return dgate, dup, dweight


def exact_linear(x_ND: Tensor, weight_ED: Tensor) -> Tensor:
    """x·Wᵀ [N, E] in float32 (float64 for float64 inputs), whatever autocast says.

    Keeps a half-precision `x_ND` as it is, which others keep too, and not its float32 copy (4 D bytes a token less).
    """
    exact = torch.promote_types(x_ND.dtype, torch.float32)
    if x_ND.dtype == exact or not trains_eagerly():
        return F.linear(x_ND.to(exact), weight_ED.to(exact))
    return _ExactLinear.apply(x_ND, weight_ED.to(exact))


class _ExactLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_ND, weight_ED):
        ctx.save_for_backward(x_ND, weight_ED)
        return F.linear(x_ND.to(weight_ED.dtype), weight_ED)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy_NE):
        x_ND, weight_ED = ctx.saved_tensors
        dx = (dy_NE @ weight_ED).to(x_ND.dtype) if ctx.needs_input_grad[0] else None
        return dx, dy_NE.mT @ x_ND.to(weight_ED.dtype) if ctx.needs_input_grad[1] else None
