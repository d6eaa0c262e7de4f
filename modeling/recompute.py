"""Operations whose backward keeps fewer bytes than PyTorch's, or goes over them less often: same values.

Letters: N tokens, D hidden, F feed-forward width, E experts. What each saves is in bytes a token at bfloat16.
"""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .projections import unreadable_weight

try:
    from .kernels_gated import gated, gated_gradient
    from .kernels_logits import LEAST_ROWS, router_gradient, router_logits, router_tokens_gradient
    from .kernels_norm import WIDEST, add_norm, norm_gradient, sum_of_three

    MISSING = False
except ImportError:
    MISSING = True  # and none of these is called


def trains_eagerly() -> bool:
    """Whether a backward will follow that no compiler plans: a compiler decides itself what to keep."""
    return torch.is_grad_enabled() and not torch.compiler.is_compiling()


def trains_plain(module: nn.Module, x: Tensor, kind: type = nn.Linear) -> bool:
    """Whether eager training may compute what `module` does without calling it: a `kind` without hooks or a bias."""
    if not trains_eagerly() or unreadable_weight(module, x, kind) is not None:
        return False
    return getattr(module, "bias", None) is None and not (module._backward_hooks or module._backward_pre_hooks)


def gated_linear(gate: Tensor, up: Tensor, projection: nn.Module, act_fn, silu: bool) -> Tensor:
    """`projection(act_fn(gate) * up)`; keeps gate and up alone, not the two products of them (4 F bytes a token less).

    Args:
        gate, up: [..., F], differentiable.
        projection: the layer behind; one that is wrapped, hooked or sharded is called, and then all is kept.
        silu: whether `act_fn` is SiLU; any other activation is computed as ever.
    """
    if not silu or not trains_plain(projection, gate):
        return projection(act_fn(gate) * up)
    return _GatedLinear.apply(gate, up, projection.weight.to(gate.dtype))  # autocast would cast it just so


def _fuses_gate(gate: Tensor, up: Tensor) -> bool:
    plain = gate.is_contiguous() and up.is_contiguous() and gate.dtype == up.dtype != torch.float64
    return not MISSING and gate.is_cuda and plain


class _GatedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up, weight_DF):
        ctx.save_for_backward(gate, up, weight_DF)
        ctx.fused = _fuses_gate(gate, up)
        product = gated(gate, up) if ctx.fused else F.silu(gate) * up
        return F.linear(product, weight_DF)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        gate, up, weight_DF = ctx.saved_tensors
        dgate = dup = dweight = None
        if ctx.fused:
            dgate, dup, product = gated_gradient(dy @ weight_DF, gate, up)
            return dgate, dup, dy.flatten(0, -2).mT @ product.flatten(0, -2) if ctx.needs_input_grad[2] else None
        opened = F.silu(gate)
        if ctx.needs_input_grad[2]:
            dweight = dy.flatten(0, -2).mT @ (opened * up).flatten(0, -2)
        if ctx.needs_input_grad[0] or ctx.needs_input_grad[1]:
            dproduct = dy @ weight_DF
            dup = dproduct * opened
            dgate = torch.ops.aten.silu_backward(dproduct * up, gate)
        return dgate, dup, dweight


def two_linears(x: Tensor, first: nn.Module, second: nn.Module) -> tuple[Tensor, Tensor]:
    """`first(x)` and `second(x)`; where both are plain, x's gradients are added within a product, not by a pass.

    Args:
        x: [..., D], differentiable; kept where a weight needs a gradient, as ever.
    """
    if not trains_plain(first, x) or not trains_plain(second, x) or not _one_dtype(x, first.weight, second.weight):
        return first(x), second(x)
    return _TwoLinears.apply(x, first.weight, second.weight)


def _one_dtype(x: Tensor, *weights: Tensor) -> bool:
    """Whether all are of the dtype that products are computed in."""
    kind = x.device.type
    if x.is_meta or (torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) != x.dtype):
        return False
    return all(weight.dtype == x.dtype for weight in weights)


class _TwoLinears(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, *weights):
        ctx.save_for_backward(x if any(ctx.needs_input_grad[1:]) else None, *weights)
        ctx.set_materialize_grads(False)
        ctx.shape = x.shape
        return tuple(F.linear(x, weight) for weight in weights)

    @staticmethod
    @once_differentiable
    def backward(ctx, *dys):
        x, *weights = ctx.saved_tensors
        of_x, *of_weights = ctx.needs_input_grad
        dx, dweights = None, [None, None]
        for i, (dy, weight) in enumerate(zip(dys, weights, strict=True)):
            if dy is None:
                continue
            rows = dy.flatten(0, -2)
            if of_x:
                dx = rows @ weight if dx is None else dx.addmm_(rows, weight)
            if of_weights[i]:
                dweights[i] = rows.mT @ x.flatten(0, -2)
        return None if dx is None else dx.view(ctx.shape), *dweights


def exact_linear(x_ND: Tensor, weight_ED: Tensor) -> Tensor:
    """x·Wᵀ [N, E] in float32 (float64 for float64 inputs), whatever autocast says.

    Keeps a half-precision `x_ND` as it is, which others keep too, and not its float32 copy (4 D bytes a token less).
    """
    exact = torch.promote_types(x_ND.dtype, torch.float32)
    weight_ED = weight_ED.to(exact)
    if x_ND.dtype == exact or torch.compiler.is_compiling():
        return F.linear(x_ND.to(exact), weight_ED)
    if not torch.is_grad_enabled():
        return _exact_product(x_ND, weight_ED, _on_tensor_cores(x_ND, weight_ED))
    return _ExactLinear.apply(x_ND, weight_ED)


def _on_tensor_cores(x_ND: Tensor, weight_ED: Tensor) -> bool:
    """Whether the kernels have the product: bfloat16 alone has float32's range, which a weight's parts need."""
    if MISSING or not x_ND.is_cuda or len(x_ND) < LEAST_ROWS:
        return False
    plain = {type(x_ND), type(weight_ED)} <= {Tensor, nn.Parameter} and x_ND.stride(-1) == 1
    return plain and x_ND.dtype == torch.bfloat16 and weight_ED.dtype == torch.float32 and weight_ED.is_contiguous()


def _exact_product(x_ND: Tensor, weight_ED: Tensor, fused: bool) -> Tensor:
    return router_logits(x_ND, weight_ED) if fused else F.linear(x_ND.to(weight_ED.dtype), weight_ED)


class _ExactLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_ND, weight_ED):
        ctx.save_for_backward(x_ND, weight_ED)
        ctx.fused = _on_tensor_cores(x_ND, weight_ED)
        return _exact_product(x_ND, weight_ED, ctx.fused)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy_NE):
        x_ND, weight_ED = ctx.saved_tensors
        of_tokens, of_weight = ctx.needs_input_grad
        if ctx.fused:
            dy_NE = dy_NE.contiguous()
            dx = router_tokens_gradient(dy_NE, weight_ED, x_ND) if of_tokens else None
            return dx, router_gradient(dy_NE, x_ND) if of_weight else None
        dx = (dy_NE @ weight_ED).to(x_ND.dtype) if of_tokens else None
        return dx, dy_NE.mT @ x_ND.to(weight_ED.dtype) if of_weight else None


def fuses_norm(x: Tensor, added: Tensor | None, weight: Tensor) -> bool:
    """Whether the kernels have `residual_norm` of these."""
    tensors = (x, weight) if added is None else (x, weight, added)
    plain = all(type(t) in (Tensor, nn.Parameter) and t.is_contiguous() and t.dtype == x.dtype for t in tensors)
    same = added is None or added.shape == x.shape
    return not MISSING and x.is_cuda and plain and same and x.dtype != torch.float64 and x.shape[-1] <= WIDEST


def residual_norm(x: Tensor, added: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """sum = x + added (x itself without `added`) and its RMS norm, both [..., D]; `fuses_norm` must have been asked.

    Keeps the sum and one number a token. Both outputs' gradients meet within the norm's kernel.
    """
    return _ResidualNorm.apply(x, added, weight, eps)


class _ResidualNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, added, weight, eps):
        total, y, rstd = add_norm(x, added, weight, eps)
        total = x if added is None else total
        ctx.save_for_backward(total, weight, rstd)
        ctx.set_materialize_grads(False)
        return total, y

    @staticmethod
    @once_differentiable
    def backward(ctx, dtotal, dy):
        _, of_added, of_weight, _ = ctx.needs_input_grad
        dx, dweight = dtotal, None
        if dy is not None:
            dtotal = None if dtotal is None else dtotal.contiguous()
            dx, dweight = norm_gradient(dy.contiguous(), dtotal, *ctx.saved_tensors, of_weight)
        return dx, dx if of_added else None, dweight if of_weight else None, None


def spread(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x three times; where a kernel has it, the three gradients are summed in one launch in place of two."""
    return _Spread.apply(x) if trains_eagerly() and _fuses_sum(x) else (x, x, x)


def _fuses_sum(x: Tensor) -> bool:
    return not MISSING and x.is_cuda and x.requires_grad and type(x) is Tensor and x.dtype != torch.float64


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.set_materialize_grads(False)
        return x.view_as(x), x.view_as(x), x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx, *dxs):
        given = [dx.contiguous() for dx in dxs if dx is not None]
        return sum_of_three(*given) if len(given) == 3 else functools.reduce(torch.add, given)
