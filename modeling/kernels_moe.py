"""Fused experts: the operators, their gradients, and the functions that check and call them.

Letters: N tokens, K experts a token, M = N * K routed rows, E experts, D hidden, F expert width. The eager form, which
defines the result, is moe.LamoeExperts.forward. The backward keeps x, the pre-activation and the plan, nothing else:
the gradient of a router weight is <dA, A> of its row, so that no down-projected row need be stored. Sums have a fixed
order: two runs are equal bit for bit.
"""

import functools
import logging
from collections.abc import Callable

import torch
from torch import Tensor

from .kernels_decode import VectorTile, swapped_experts, vector_experts
from .kernels_gemm import PAD, Tile, act_gradient, gated_rows, in_cache, plain_rows, turned, weight_gradient
from .kernels_launch import differentiable, is_hopper, operator, optional_kernel
from .kernels_plan import Plan, combine, expert_sums, make_plan, pack, plan_size, spread, unpack
from .kernels_tiles import few_rows, invariant_tiles, tiles_for

logger = logging.getLogger(__name__)

ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu")


@functools.cache
def _hopper(device: torch.device) -> dict[str, tuple[Callable, Callable]]:
    """By name, whether a kernel in Gluon fits and the kernel, on a Hopper; nothing elsewhere, and where Triton has no
    Gluon for it.

    `_specialised` takes out what fails: Gluon is experimental, and another Triton may not compile a kernel.
    """
    if not is_hopper(device):
        return {}
    try:
        from .kernels_hidden import fits as hidden_fits
        from .kernels_hidden import hidden_gradient
        from .kernels_up import fits, up_rows
        from .kernels_weight import weight_gradient_ahead
    except Exception:
        logger.debug("The kernels in Gluon do not load with this Triton; kernels_gemm.py's run.", exc_info=True)
        return {}
    return {"up": (fits, up_rows), "hidden": (hidden_fits, hidden_gradient), "weight": (fits, weight_gradient_ahead)}


def _kernel(name: str, tile: Tile, x: Tensor) -> Callable | None:
    """The kernel of that name, where there is one for x and the tile."""
    fits, run = _hopper(x.device).get(name, (None, None))
    return run if fits is not None and fits(x, tile) else None


def _specialised(name: str, tile: Tile, x: Tensor, *rest) -> Tensor | tuple[Tensor, ...] | None:
    """What the kernel of that name makes of x and the rest; None where it does not run."""
    run = _kernel(name, tile, x)
    if run is None:
        return None
    with optional_kernel(name, lambda: _hopper(x.device).pop(name, None), logger):
        return run(x, *rest, tile)
    return None


def gated_up(
    x: Tensor, gate_up: Tensor, plan: Plan, K: int, act: str, save: bool, tile: Tile
) -> tuple[Tensor, Tensor]:
    """`gated_rows`, by whichever kernel is the faster."""
    quick = _specialised("up", tile, x, gate_up, plan, K, act, save)
    return gated_rows(x, gate_up, plan, K, act, save, tile) if quick is None else quick


def gated_gradient(
    rows: Tensor, down: Tensor, h: Tensor, top_k_weights: Tensor, plan: Plan, act: str, scaled: bool, tile: Tile
) -> tuple[Tensor, Tensor, Tensor]:
    """Of packed output gradients [M, D]: dh [M, 2F], the router weights' gradient and, if `scaled`,
    w * act(gate) * up [M, F], else [0].

    By whichever kernels are the faster.
    """
    quick = _specialised("hidden", tile, rows, down, h, top_k_weights, plan, act, scaled)
    if quick is not None:
        return quick
    da = plain_rows(rows, down, plan, top_k_weights.shape[1], tile, gather=False, transposed=True)
    return *act_gradient(da, h, top_k_weights, plan, len(down), act, scaled), da if scaled else da.new_empty(0)


def expert_gradient(a: Tensor, b: Tensor, plan: Plan, E: int, into: Tensor | None, tile: Tile) -> Tensor:
    """`weight_gradient`, by whichever kernel is the faster."""
    quick = None
    turn = turned(a.shape[1], b.shape[1], tile) != tile
    if not turn or in_cache(a, b, E):
        quick = _specialised("weight", tile, a, b, plan, E, into, turn)
    return weight_gradient(a, b, plan, E, into, tile) if quick is None else quick


@operator("experts")
def _experts(
    x: Tensor, top_k_index: Tensor, top_k_weights: Tensor, gate_up: Tensor, down: Tensor, shared: Tensor | None,
    act: str, train: bool, recompute: bool, batch_invariant: bool, accumulate: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """out [N, D]; what `train` needs: the pre-activation [M, 2F] unless `recompute`, and the packed plan; else [0]."""
    N, K = top_k_index.shape
    M, E, D = N * K, len(down), x.shape[1]
    gate_up, down = _aligned(gate_up), _aligned(down)
    if not (train or batch_invariant):
        few = few_rows(x, M, E, *down.shape[1:])
        if few is not None:
            way = vector_experts if isinstance(few[0], VectorTile) else swapped_experts
            out = way(x, top_k_index, top_k_weights, gate_up, down, act, shared, *few)
            return out, x.new_empty(0), top_k_index.new_empty(0, dtype=torch.int32)
    tiles = invariant_tiles(x) if batch_invariant else tiles_for(x, M, E, D)
    packed = make_plan(top_k_index, E, tiles.up.rows, kept=train)
    plan = unpack(packed, M, E)
    save = train and not recompute
    a, h = gated_up(x, gate_up, plan, K, act, save, tiles.up_saving if save else tiles.up)
    y = plain_rows(a, down, plan, K, tiles.down, gather=False, transposed=False)
    del a
    out = combine(y, plan, top_k_weights, shared, K, torch.empty_like(x))
    return out, h, packed if train else packed.new_empty(0)


@_experts.register_fake
def _(x, top_k_index, top_k_weights, gate_up, down, shared, act, train, recompute, batch_invariant, accumulate):
    N, K = top_k_index.shape
    h = x.new_empty((N * K, gate_up.shape[1]) if train and not recompute else (0,))
    length = plan_size(N * K, down.shape[0]) if train else 0
    return torch.empty_like(x), h, top_k_index.new_empty(length, dtype=torch.int32)


def _backward(
    dy: Tensor, x: Tensor, top_k_weights: Tensor, gate_up: Tensor, down: Tensor, h: Tensor, packed: Tensor,
    gate_up_into: Tensor | None, down_into: Tensor | None, act: str, batch_invariant: bool,
    need_x: bool, need_gate_up: bool, need_down: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x [N, D], top_k_weights [N, K], gate_up and down; [0] for what is not needed or was accumulated.

    That of top_k_weights may be summed in another order if that of `down` is not needed.
    """
    N, K = top_k_weights.shape
    M, E, D = N * K, len(down), x.shape[1]
    gate_up, down = _aligned(gate_up), _aligned(down)
    tiles = invariant_tiles(x) if batch_invariant else tiles_for(x, M, E, D)
    plan = unpack(packed, M, E)
    if not len(h):
        h = gated_up(x, gate_up, plan, K, act, True, tiles.up_saving)[1]
    dx = torch.empty_like(x) if need_x else x.new_empty(0)
    d_gate_up = d_down = None
    rows = x.new_empty((M, D))  # in turn: each row's output gradient, its token, its token's gradient
    # the weight gradient needs them packed, and then the copy engine fetches them faster than a gather; for that alone
    # packing pays with V2-Lite's experts and Mixtral's (2.84 -> 2.73 ms, 2.06 -> 1.79), not with Qwen3's of 2048 x 768
    # (1.90 -> 1.96)
    if need_down or (2 * down.shape[2] > D and _kernel("hidden", tiles.da, dy) is not None):
        packed_dy = pack(dy, plan, E, K, PAD, rows)
        dh, dw, a = gated_gradient(packed_dy, down, h, top_k_weights, plan, act, need_down, tiles.da)
    else:
        da = plain_rows(dy, down, plan, K, tiles.down, gather=True, transposed=True)
        dh, dw = act_gradient(da, h, top_k_weights, plan, E, act, False)
        del da
    del h
    if need_down:
        d_down = expert_gradient(rows, a, plan, E, down_into, tiles.dw)
        del a
    if need_gate_up:
        d_gate_up = expert_gradient(dh, pack(x, plan, E, K, PAD, rows), plan, E, gate_up_into, tiles.dw)
    if need_x:
        dx_rows = plain_rows(dh, gate_up, plan, K, tiles.dx, gather=False, transposed=True, out=rows)
        combine(dx_rows, plan, None, None, K, dx)
    return (
        dx,
        dw,
        x.new_empty(0) if d_gate_up is None or gate_up_into is not None else d_gate_up,
        x.new_empty(0) if d_down is None or down_into is not None else d_down,
    )


@operator("experts_backward")
def _experts_backward(
    dy: Tensor, x: Tensor, top_k_weights: Tensor, gate_up: Tensor, down: Tensor, h: Tensor, packed: Tensor,
    act: str, batch_invariant: bool, need_x: bool, need_gate_up: bool, need_down: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """`_backward` into new memory."""
    needs = need_x, need_gate_up, need_down
    return _backward(dy, x, top_k_weights, gate_up, down, h, packed, None, None, act, batch_invariant, *needs)


@_experts_backward.register_fake
def _(dy, x, top_k_weights, gate_up, down, h, packed, act, batch_invariant, need_x, need_gate_up, need_down):
    return _gradients_like(x, top_k_weights, need_x, gate_up if need_gate_up else None, down if need_down else None)


# an operator of its own: one that mutates costs the host 0.15 ms more
_experts_backward_into = operator("experts_backward_into", mutates_args=("gate_up_into", "down_into"))(_backward)


@_experts_backward_into.register_fake
def _(
    dy, x, top_k_weights, gate_up, down, h, packed, gate_up_into, down_into,
    act, batch_invariant, need_x, need_gate_up, need_down,
):  # fmt: skip
    gate_up = gate_up if need_gate_up and gate_up_into is None else None
    return _gradients_like(x, top_k_weights, need_x, gate_up, down if need_down and down_into is None else None)


def _gradients_like(
    x: Tensor, top_k_weights: Tensor, need_x: bool, gate_up: Tensor | None, down: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What a backward returns, [0] for what is None."""
    dx, *rest = (x.new_empty(0) if t is None else torch.empty_like(t) for t in (x if need_x else None, gate_up, down))
    return dx, torch.empty_like(top_k_weights), *rest


def _keep(ctx, inputs, output):
    x, _, top_k_weights, gate_up, down, _, ctx.act, _, _, ctx.batch_invariant, ctx.accumulate = inputs
    _, h, packed = output
    ctx.save_for_backward(x, top_k_weights, gate_up, down, h, packed)
    ctx.mark_non_differentiable(h, packed)
    ctx.set_materialize_grads(False)


def _differentiate(ctx, dy, _dh, _dplan):
    need_x, _, need_weights, need_gate_up, need_down, need_shared, *_ = ctx.needs_input_grad
    if dy is None:
        return (None,) * 11
    x, top_k_weights, gate_up, down, h, packed = ctx.saved_tensors
    into = [_grad_of(w) if ctx.accumulate else None for w in (gate_up, down)]
    backward, into_them = (_experts_backward, ()) if into == [None, None] else (_experts_backward_into, into)
    dx, dw, d_gate_up, d_down = backward(
        dy.contiguous(), x, top_k_weights, gate_up, down, h, packed, *into_them, ctx.act, ctx.batch_invariant,
        need_x, need_gate_up, need_down,
    )  # fmt: skip
    return (
        dx if need_x else None,
        None,
        dw if need_weights else None,
        d_gate_up if need_gate_up and into[0] is None else None,
        d_down if need_down and into[1] is None else None,
        dy if need_shared else None,
        *(None,) * 5,
    )


_differentiable_experts = differentiable(_experts, _keep, _differentiate)


def _grad_of(weight: Tensor) -> Tensor | None:
    """The gradient that a kernel can add to in place; None if there is none, or none that it can."""
    grad = weight.grad if weight.is_leaf else None
    return grad if grad is not None and grad.is_contiguous() and grad.data_ptr() % 16 == 0 else None


def _aligned(x: Tensor) -> Tensor:
    """The copy engine wants tensors to begin at multiples of 16 bytes, which a view into a flat buffer may not do."""
    return x if x.data_ptr() % 16 == 0 else x.clone()


@operator("plan")
def _plan(top_k_index: Tensor, num_experts: int, x: Tensor) -> Tensor:
    """The packed plan for products of rows like x."""
    M = top_k_index.numel()
    return make_plan(top_k_index, num_experts, tiles_for(x, M, num_experts).up.rows, kept=True)


@_plan.register_fake
def _(top_k_index, num_experts, x):
    return top_k_index.new_empty(plan_size(top_k_index.numel(), num_experts), dtype=torch.int32)


@operator("grouped_linear")
def _grouped_linear(
    a: Tensor, packed: Tensor, weight: Tensor, bias: Tensor | None, K: int, gather: bool, transposed: bool
) -> Tensor:
    """The linear layer of each row's expert [M, Y]: of packed rows [M, X], or of tokens [N, X] if `gather`."""
    M, E = len(a) * (K if gather else 1), len(weight)
    y = a.new_zeros((M, weight.shape[2 if transposed else 1]))
    return plain_rows(
        _aligned(a), _aligned(weight), unpack(packed, M, E), K, tiles_for(a, M, E).down,
        gather=gather, transposed=transposed, bias=bias, out=y,
    )  # fmt: skip


@_grouped_linear.register_fake
def _(a, packed, weight, bias, K, gather, transposed):
    return a.new_empty((a.shape[0] * (K if gather else 1), weight.shape[2 if transposed else 1]))


@operator("grouped_linear_backward")
def _grouped_linear_backward(
    dy: Tensor, a: Tensor, packed: Tensor, weight: Tensor, K: int, gather: bool, transposed: bool,
    need_a: bool, need_weight: bool, need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of a, weight and bias; [0] for what is not needed."""
    M, E = len(dy), len(weight)
    plan, tiles = unpack(packed, M, E), tiles_for(a, M, E)
    dy, a = _aligned(dy), _aligned(a)
    da, dw, db = (a.new_empty(0) for _ in range(3))
    if need_a:
        da = plain_rows(
            dy, _aligned(weight), plan, K, tiles.down,
            gather=False, transposed=not transposed, out=a.new_zeros((M, a.shape[1])),
        )  # fmt: skip
        if gather:
            da = combine(da, plan, None, None, K, torch.empty_like(a))
    if need_weight:
        rows = pack(a, plan, E, K, PAD, a.new_empty((M, a.shape[1]))) if gather else a
        dw = expert_gradient(*((rows, dy) if transposed else (dy, rows)), plan, E, None, tiles.dw)
    if need_bias:
        db = expert_sums(dy, plan, E)
    return da, dw, db


@_grouped_linear_backward.register_fake
def _(dy, a, packed, weight, K, gather, transposed, need_a, need_weight, need_bias):
    return (
        torch.empty_like(a) if need_a else a.new_empty(0),
        torch.empty_like(weight) if need_weight else a.new_empty(0),
        dy.new_empty((weight.shape[0], dy.shape[1]) if need_bias else (0,)),
    )


def _keep_linear(ctx, inputs, output):
    a, packed, weight, _, *ctx.how = inputs
    ctx.save_for_backward(a, packed, weight)


def _differentiate_linear(ctx, dy):
    need_a, _, need_weight, need_bias, *_ = ctx.needs_input_grad
    da, dw, db = _grouped_linear_backward(
        dy.contiguous(), *ctx.saved_tensors, *ctx.how, need_a, need_weight, need_bias
    )
    grads = [grad if need else None for grad, need in ((da, need_a), (dw, need_weight), (db, need_bias))]
    return grads[0], None, *grads[1:], None, None, None


_differentiable_linear = differentiable(_grouped_linear, _keep_linear, _differentiate_linear)


@operator("weighted_sum")
def _weighted_sum(y: Tensor, packed: Tensor, top_k_weights: Tensor, num_experts: int) -> Tensor:
    """The weighted sum [N, D] of each token's rows of y [M, D]."""
    N, K = top_k_weights.shape
    plan = unpack(packed, len(y), num_experts)
    return combine(y, plan, top_k_weights, None, K, y.new_empty((N, y.shape[1])))


@_weighted_sum.register_fake
def _(y, packed, top_k_weights, num_experts):
    return y.new_empty((top_k_weights.shape[0], y.shape[1]))


@operator("weighted_sum_backward")
def _weighted_sum_backward(
    dout: Tensor, y: Tensor, packed: Tensor, top_k_weights: Tensor, num_experts: int
) -> tuple[Tensor, Tensor]:
    return spread(dout, y, unpack(packed, len(y), num_experts), top_k_weights)


@_weighted_sum_backward.register_fake
def _(dout, y, packed, top_k_weights, num_experts):
    return torch.empty_like(y), torch.empty_like(top_k_weights)


def _keep_sum(ctx, inputs, output):
    *tensors, ctx.num_experts = inputs
    ctx.save_for_backward(*tensors)


def _differentiate_sum(ctx, dout):
    dy, dw = _weighted_sum_backward(dout.contiguous(), *ctx.saved_tensors, ctx.num_experts)
    return dy, None, dw, None


_differentiable_sum = differentiable(_weighted_sum, _keep_sum, _differentiate_sum)


def why_not(x: Tensor, *weights: Tensor) -> str | None:
    """Why the kernels cannot take `x` [N, D] with these expert weights; None if they can."""
    for weight in weights:
        if type(weight) not in (Tensor, torch.nn.Parameter):
            return f"a weight is a {type(weight).__name__}, not a plain tensor"
        if weight.dtype not in (torch.bfloat16, torch.float16, torch.float32):
            return f"the weights are {weight.dtype}; the kernels take bfloat16, float16 and float32"
        if weight.dtype != weights[0].dtype:
            return "the weights differ in dtype"
        if not weight.is_contiguous():
            return "the weights are not contiguous"
    dtype = _product_dtype(x, weights[0])
    for width in (width for weight in weights for width in weight.shape[1:]):
        if width * dtype.itemsize % 16:
            return f"a width of {width} is not a multiple of 16 bytes in {dtype}"
    return None


def fused_experts(
    hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor, gate_up_proj: Tensor, down_proj: Tensor, *,
    activation: str = "silu", shared: Tensor | None = None, recompute: bool = False, batch_invariant: bool = False,
    accumulate: bool = False,
) -> Tensor:  # fmt: skip
    """Sum of each token's gated experts, weighted: out[n] = sum_k w[n, k] W_down (act(W_gate x) * W_up x) + shared[n].

    Differentiable in hidden_states, top_k_weights, both projections and `shared`. Under autocast the products run in
    autocast's dtype, else in the weights'; sums, activations and router weights in float32.

    Args:
        hidden_states: [N, D].
        top_k_index: [N, K] integers; ids of E and above are sentinels of expert parallelism and add exactly zero.
        top_k_weights: [N, K].
        gate_up_proj: [E, 2F, D], gate first. down_proj: [E, D, F]. Contiguous; D and F multiples of 16 bytes.
        activation: one of `ACTIVATIONS`, of the gate.
        shared: [N, D], added in the last sum.
        recompute: keep no pre-activation for the backward; it is computed again there (a quarter more arithmetic).
        batch_invariant: a token gets the same bits alone as in any batch; slower for few tokens.
        accumulate: the backward adds the weights' gradients to their `.grad` where there is one, without a copy of
            their size; hooks on these parameters then see nothing.

    Returns:
        [N, D] in `hidden_states`' dtype.

    Raises:
        ValueError: shapes that do not fit, an unknown activation, or weights that the kernels cannot take.
    """
    E, wide, D = gate_up_proj.shape
    F = wide // 2
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation={activation!r} is not one of {', '.join(ACTIVATIONS)}.")
    if hidden_states.ndim != 2 or hidden_states.shape[1] != D:
        raise ValueError(f"hidden_states {tuple(hidden_states.shape)} is not [N, {D}], which gate_up_proj asks for.")
    if top_k_index.ndim != 2 or top_k_index.shape != top_k_weights.shape or len(top_k_index) != len(hidden_states):
        raise ValueError(
            f"top_k_index {tuple(top_k_index.shape)} and top_k_weights {tuple(top_k_weights.shape)} are not both "
            f"[{len(hidden_states)}, K]."
        )
    if wide % 2 or down_proj.shape != (E, D, F):
        raise ValueError(f"down_proj {tuple(down_proj.shape)} is not [{E}, {D}, {F}], which gate_up_proj asks for.")
    if shared is not None and shared.shape != hidden_states.shape:
        raise ValueError(f"shared {tuple(shared.shape)} is not {tuple(hidden_states.shape)}, as hidden_states is.")
    reason = why_not(hidden_states, gate_up_proj, down_proj)
    if reason:
        raise ValueError(f"The fused experts do not run here: {reason}; use experts_implementation='grouped_mm'.")
    x, (gate_up, down) = in_one_dtype(hidden_states, gate_up_proj, down_proj)
    needs_grad = [t.requires_grad for t in (x, top_k_weights, gate_up, down)] + [
        shared is not None and shared.requires_grad
    ]
    out, _, _ = _differentiable_experts(
        x.contiguous(), top_k_index.contiguous(), top_k_weights.contiguous(), gate_up, down,
        None if shared is None else shared.to(x.dtype).contiguous(), activation,
        torch.is_grad_enabled() and any(needs_grad), recompute, batch_invariant, accumulate,
    )  # fmt: skip
    return out.to(hidden_states.dtype)


@operator("few_experts")
def _few_experts(
    x: Tensor, top_k_index: Tensor, top_k_weights: Tensor, gate_up: Tensor, down: Tensor, shared_gate: Tensor,
    shared_up: Tensor, shared_down: Tensor, residual: Tensor | None, act: str,
) -> Tensor:  # fmt: skip
    """Routed and shared experts of a handful of tokens [N, D], and a residual [N, D]."""
    few = few_rows(x, top_k_index.numel(), len(down), *down.shape[1:])
    shared = (shared_gate, shared_up, shared_down)
    return vector_experts(x, top_k_index, top_k_weights, gate_up, down, act, residual, *few, shared_weights=shared)


@_few_experts.register_fake
def _(x, top_k_index, top_k_weights, gate_up, down, shared_gate, shared_up, shared_down, residual, act):
    return torch.empty_like(x)


def few_experts(
    hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor, gate_up_proj: Tensor, down_proj: Tensor,
    shared_weights: tuple[Tensor, Tensor, Tensor], activation: str, residual: Tensor | None = None,
) -> Tensor | None:  # fmt: skip
    """`fused_experts` of so few tokens that weights are read row by row, with the shared expert in the same launches.

    Args:
        shared_weights: gate [S, D], up [S, D] and down [D, S]; contiguous, of the experts' dtype.
        residual: [N, D] contiguous, of that dtype, added in the last sum.

    Returns:
        [N, D]; None if there are too many tokens, gradients are wanted, or dtypes differ.
    """
    x, tensors = hidden_states, (gate_up_proj, down_proj, *shared_weights)
    few = few_rows(x, top_k_index.numel(), *down_proj.shape)
    plain = all(type(t) in (Tensor, torch.nn.Parameter) and t.dtype == x.dtype and t.is_contiguous() for t in tensors)
    autocast = torch.is_autocast_enabled(x.device.type)
    if few is None or not isinstance(few[0], VectorTile) or torch.is_grad_enabled() or not plain or autocast:
        return None
    index, weights = top_k_index.contiguous(), top_k_weights.contiguous()
    return _few_experts(x.contiguous(), index, weights, *tensors, residual, activation)


def in_one_dtype(x: Tensor, *weights: Tensor) -> tuple[Tensor, list[Tensor]]:
    """`x` and the weights in autocast's dtype where that is on, else in the weights'."""
    dtype = _product_dtype(x, weights[0])
    return x.to(dtype), [weight.to(dtype) for weight in weights]


def _product_dtype(x: Tensor, weight: Tensor) -> torch.dtype:
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype


class GroupedRows:
    """Linear layers over routed rows, for experts that are not two gated projections; each step is differentiable.

    `linear` of tokens or rows, any function of rows in between, then `sum` back to tokens. The rows of sentinels are
    zeros, and functions in between must keep them finite, in their gradients too.
    """

    def __init__(self, hidden_states: Tensor, top_k_index: Tensor, num_experts: int):
        """Sort `top_k_index` [N, K] for `hidden_states` [N, D], which are not kept."""
        self.num_experts = num_experts
        self.dtype = hidden_states.dtype
        self.K = top_k_index.shape[1]
        self.packed = _plan(top_k_index.contiguous(), num_experts, hidden_states)

    def linear(
        self, x: Tensor, weight: Tensor, bias: Tensor | None = None, *, tokens: bool = False, transposed: bool = False
    ) -> Tensor:
        """Rows [M, Y] of x: rows [M, X], or `tokens` [N, X]; weight [E, Y, X], or [E, X, Y] if `transposed`.

        Raises:
            ValueError: x or the weight has another dtype than the tokens that the rows were sorted for.
        """
        if x.dtype != self.dtype or weight.dtype != self.dtype:
            raise ValueError(f"x is {x.dtype} and weight {weight.dtype}; these rows were sorted for {self.dtype}.")
        return _differentiable_linear(x.contiguous(), self.packed, weight, bias, self.K, tokens, transposed)

    def sum(self, rows: Tensor, top_k_weights: Tensor) -> Tensor:
        """The tokens' sums [N, D] of rows [M, D], weighted by [N, K], in float32, in order."""
        return _differentiable_sum(rows.contiguous(), self.packed, top_k_weights.contiguous(), self.num_experts)
