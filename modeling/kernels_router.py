"""Routing in one kernel: scores, bias, group-limited top-k and weights of every token, and the gradient of the logits.

Letters: N tokens, E routed experts in groups of S, K experts a token. The eager form, which defines the result, is
moe.route_eager: experts are equal to it in value and order, ties and NaN included; weights are close to it. No
atomics, and a token's result does not depend on the tokens beside it.
"""

import torch
from torch import Tensor

from .kernels_launch import await_kernels, cdiv, differentiable, next_power_of_2, operator, overlapping

try:  # inside `try`, or the Hub loader refuses the whole model where Triton is missing
    import triton
    import triton.language as tl
    from triton.language.extra import libdevice
except ImportError as error:
    message = "The fused router needs Triton: pip install triton, or router_implementation='eager'."
    raise ImportError(message) from error

_INTERPRETED = triton.knobs.runtime.interpret  # the kernels below run in Python, on CPU tensors
_IN_PYTHON = tl.constexpr(_INTERPRETED)
_TILE = 512  # numbers that one warp holds
_MOST = 8192  # numbers that one program can hold


@triton.jit
def _exp(x):
    # the interpreter has no libdevice
    return tl.exp(x) if _IN_PYTHON else libdevice.exp(x)


@triton.jit
def _sigmoid(x):
    # tl.exp is the fast ex2.approx; torch.sigmoid on a GPU is 1 / (1 + expf(-x)) with the vendor's expf and a
    # correctly rounded division: whoever is to choose the same experts has to have the same bits
    return tl.div_rn(1.0, 1.0 + _exp(-x))


@triton.jit
def _rank(x):
    """int32 in the order of torch.sort: NaN is above all and -0 equal to 0. No x has the rank of `_NONE`."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    return tl.where(x != x, 0x7FFFFFFF, tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits))


@triton.jit
def _value(rank):
    """The number of a rank."""
    return tl.where(rank < 0, rank ^ 0x7FFFFFFF, rank).to(tl.float32, bitcast=True)


_NONE = tl.constexpr(-(2**31))  # below the rank of every number: padding, and what is already taken
_SHUT = tl.constexpr(-(2**31) + 0x7FFFFF)  # the rank of -inf


@triton.jit
def _route_kernel(
    logits_ptr, bias_ptr, weights_ptr, experts_ptr, N, scale,
    G: tl.constexpr, S: tl.constexpr, OPEN: tl.constexpr, K: tl.constexpr, SOFTMAX: tl.constexpr, BIAS: tl.constexpr,
    BEST_TWO: tl.constexpr, NORM: tl.constexpr, BLOCK_N: tl.constexpr, GP: tl.constexpr, SP: tl.constexpr,
    KP: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Route BLOCK_N tokens. logits: [N, G * S], bias: [G * S], weights, experts: [N, K]; all contiguous.

    A tile is [BLOCK_N, GP, SP], groups and what is in them padded to powers of two: its columns ascend with the ids.
    """
    await_kernels(PDL)
    n = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    c = tl.arange(0, GP * SP)
    expert = c // SP * S + c % SP
    real = (c // SP < G) & (c % SP < S)
    x = tl.load(logits_ptr + n[:, None] * (G * S) + expert[None, :], mask=(n < N)[:, None] & real[None, :], other=0.0)
    choice = x if SOFTMAX else _sigmoid(x)
    if BIAS:
        choice += tl.load(bias_ptr + expert, mask=real, other=0.0).to(tl.float32)[None, :]
    rank = tl.where(real[None, :], _rank(choice), _NONE)

    if OPEN < G:
        g = tl.arange(0, GP)[None, :]
        grouped = tl.reshape(rank, (BLOCK_N, GP, SP))
        first, at = tl.max(grouped, axis=2, return_indices=True, keep_dims=True)
        if BEST_TWO:
            others = tl.where(tl.arange(0, SP)[None, None, :] == at, _NONE, grouped)
            group = _value(tl.reshape(first, (BLOCK_N, GP))) + _value(tl.max(others, axis=2))
            group = tl.where(g < G, _rank(group), _NONE)
        else:
            group = tl.reshape(first, (BLOCK_N, GP))
        opened = tl.zeros((BLOCK_N, GP), tl.int32)
        for _ in tl.static_range(OPEN):
            best = tl.argmax(group, axis=1, keep_dims=True)  # of equals the first
            opened = tl.where(g == best, 1, opened)
            group = tl.where(g == best, _NONE, group)
        shut = tl.where(opened[:, :, None] > 0, grouped, _SHUT)
        rank = tl.where(real[None, :], tl.reshape(shut, (BLOCK_N, GP * SP)), _NONE)

    k = tl.arange(0, KP)[None, :]
    columns = tl.zeros((BLOCK_N, KP), tl.int32)
    for i in tl.static_range(K):
        best = tl.argmax(rank, axis=1, keep_dims=True)
        columns = tl.where(k == i, best, columns)
        rank = tl.where(c[None, :] == best, _NONE, rank)
    experts = columns // SP * S + columns % SP
    live = (n < N)[:, None] & (k < K)
    at = n[:, None] * K + k
    tl.store(experts_ptr + at, experts.to(tl.int64), mask=live)

    y = tl.load(logits_ptr + n[:, None] * (G * S) + experts, mask=live, other=0.0)
    if SOFTMAX:
        x = tl.where(real[None, :], x, float("-inf"))
        top = tl.max(x, axis=1, keep_dims=True)
        score = _exp(y - top) / tl.sum(_exp(x - top), axis=1, keep_dims=True)
    else:
        score = _sigmoid(y)
    if NORM:
        score /= tl.sum(tl.where(k < K, score, 0.0), axis=1, keep_dims=True) + 1e-20
    tl.store(weights_ptr + at, score * scale, mask=live)


@triton.jit
def _route_gradient_kernel(
    dweights_ptr, logits_ptr, experts_ptr, dlogits_ptr, N, E, scale,
    K: tl.constexpr, SOFTMAX: tl.constexpr, NORM: tl.constexpr, BLOCK_N: tl.constexpr, EP: tl.constexpr,
    KP: tl.constexpr,
):  # fmt: skip
    """dlogits [N, E] of BLOCK_N tokens, every element written once. dweights, experts: [N, K]; all contiguous."""
    n = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    e = tl.arange(0, EP)[None, :]
    k = tl.arange(0, KP)[None, :]
    inside = (n < N)[:, None] & (e < E)
    live = (n < N)[:, None] & (k < K)
    experts = tl.load(experts_ptr + n[:, None] * K + k, mask=live, other=0)
    dscore = tl.load(dweights_ptr + n[:, None] * K + k, mask=live, other=0.0).to(tl.float32) * scale
    y = tl.load(logits_ptr + n[:, None] * E + experts, mask=live, other=0.0)
    if SOFTMAX:
        x = tl.load(logits_ptr + n[:, None] * E + e, mask=inside, other=0.0)
        x = tl.where(e < E, x, float("-inf"))
        top = tl.max(x, axis=1, keep_dims=True)
        all_scores = _exp(x - top)
        total = tl.sum(all_scores, axis=1, keep_dims=True)
        all_scores /= total
        score = _exp(y - top) / total
    else:
        score = _sigmoid(y)
    if NORM:
        chosen = tl.sum(tl.where(k < K, score, 0.0), axis=1, keep_dims=True) + 1e-20
        mean = tl.sum(tl.where(k < K, dscore * score, 0.0), axis=1, keep_dims=True) / chosen
        dscore = (dscore - mean) / chosen
    if SOFTMAX:
        dy = dscore * score
        dx = -all_scores * tl.sum(tl.where(k < K, dy, 0.0), axis=1, keep_dims=True)
    else:
        dy = dscore * score * (1 - score)
        dx = tl.zeros((BLOCK_N, EP), tl.float32)
    for i in tl.static_range(K):
        expert = tl.sum(tl.where(k == i, experts, 0), axis=1, keep_dims=True)
        dx += tl.where(e == expert, tl.sum(tl.where(k == i, dy, 0.0), axis=1, keep_dims=True), 0.0)
    tl.store(dlogits_ptr + n[:, None] * E + e, dx, mask=inside)


@operator("route")
def _route(
    logits: Tensor, bias: Tensor | None, K: int, best_two: bool, n_group: int, topk_group: int, softmax: bool,
    norm_topk_prob: bool, routed_scaling_factor: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """weights [N, K] float32 and experts [N, K] int64."""
    N, E = logits.shape
    weights = logits.new_empty((N, K))
    experts = logits.new_empty((N, K), dtype=torch.int64)
    GP, SP = _padded(E, n_group)
    block, warps = _block(GP * SP)
    if N:
        _route_kernel[(cdiv(N, block),)](
            logits.contiguous(), None if bias is None else bias.contiguous(), weights, experts, N,
            routed_scaling_factor, G=n_group, S=E // n_group, OPEN=topk_group, K=K, SOFTMAX=softmax,
            BIAS=bias is not None, BEST_TWO=best_two, NORM=norm_topk_prob, BLOCK_N=block, GP=GP, SP=SP,
            KP=next_power_of_2(K), num_warps=warps, **overlapping(logits),
        )  # fmt: skip
    return weights, experts


@_route.register_fake
def _(logits, bias, K, best_two, n_group, topk_group, softmax, norm_topk_prob, routed_scaling_factor):
    shape = (logits.shape[0], K)
    return logits.new_empty(shape), logits.new_empty(shape, dtype=torch.int64)


@operator("route_backward")
def _route_backward(
    dweights: Tensor, logits: Tensor, experts: Tensor, softmax: bool, norm_topk_prob: bool,
    routed_scaling_factor: float,
) -> Tensor:  # fmt: skip
    """Gradient of the logits, [N, E] float32."""
    N, E = logits.shape
    K = experts.shape[1]
    dlogits = logits.new_empty((N, E))
    EP = next_power_of_2(E)
    block, warps = _block(EP)
    if N:
        _route_gradient_kernel[(cdiv(N, block),)](
            dweights.contiguous(), logits.contiguous(), experts.contiguous(), dlogits, N, E,
            routed_scaling_factor, K=K, SOFTMAX=softmax, NORM=norm_topk_prob, BLOCK_N=block, EP=EP,
            KP=next_power_of_2(K), num_warps=warps,
        )  # fmt: skip
    return dlogits


@_route_backward.register_fake
def _(dweights, logits, experts, softmax, norm_topk_prob, routed_scaling_factor):
    return logits.new_empty(logits.shape)


def _keep(ctx, inputs, output):
    logits, _, _, _, _, _, *ctx.form = inputs
    ctx.save_for_backward(logits, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _differentiate(ctx, dweights, _dexperts):
    dlogits = None if dweights is None else _route_backward(dweights, *ctx.saved_tensors, *ctx.form)
    return dlogits, *(None,) * 8


_differentiable_route = differentiable(_route, _keep, _differentiate)


def _padded(E: int, n_group: int) -> tuple[int, int]:
    """Groups, and experts a group, padded to powers of two."""
    return next_power_of_2(n_group), next_power_of_2(E // n_group)


def _block(width: int) -> tuple[int, int]:
    """Tokens a program and its warps, for a padded width: the same for every N, so that N does not change a result."""
    return max(_TILE // width, 1), max(width // (2 * _TILE), 1)


def why_not_route(
    logits_NE: Tensor, bias_E: Tensor | None, *, topk_method: str, n_group: int, scoring_func: str, **_
) -> str | None:
    """Why `route` refuses these arguments (it takes the same), or None if it takes them."""
    groups = n_group if topk_method != "greedy" else 1
    GP, SP = _padded(logits_NE.shape[-1], groups)
    if logits_NE.device.type != "cuda" and not _INTERPRETED:
        return f"the logits are on {logits_NE.device.type!r}, and Triton runs on CUDA and ROCm devices"
    if logits_NE.dtype != torch.float32:
        return f"the logits are {logits_NE.dtype}, and the kernel computes in torch.float32"
    if scoring_func == "softmax" and (bias_E is not None or topk_method == "noaux_tc"):
        return (
            f"scoring_func='softmax' with topk_method={topk_method!r} and a correction bias chooses by the rounding "
            "of a sum, which only one implementation can have"
        )
    if GP * SP > _MOST:
        return f"{groups} x {logits_NE.shape[-1] // groups} experts pad to {GP} x {SP}, more than {_MOST}"
    return None


def route(
    logits_NE: Tensor, bias_E: Tensor | None, *, num_experts_per_tok: int, topk_method: str, n_group: int,
    topk_group: int, scoring_func: str, norm_topk_prob: bool, routed_scaling_factor: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Weights and experts of each token; differentiable once, in `logits_NE` only.

    Args:
        logits_NE: [N, E] float32.
        bias_E: correction bias, [E], added for the selection only; None is zero. No gradient.
        num_experts_per_tok, and all that follow: the fields of LamoeConfig, which checks them.

    Returns:
        weights [N, K] float32, and experts [N, K] int64, descending by score + bias, of equals the lowest id first.

    Raises:
        ValueError: `why_not_route` names a reason.
    """
    reason = why_not_route(logits_NE, bias_E, topk_method=topk_method, n_group=n_group, scoring_func=scoring_func)
    if reason:
        raise ValueError(f"The fused router does not run here: {reason}; use router_implementation='eager'.")
    grouped = topk_method != "greedy"
    return _differentiable_route(
        logits_NE, bias_E, num_experts_per_tok, topk_method == "noaux_tc", n_group if grouped else 1,
        topk_group if grouped else 1, scoring_func == "softmax", bool(norm_topk_prob), float(routed_scaling_factor),
    )  # fmt: skip


def weigh_gradient(
    dweights_NK: Tensor, logits_NE: Tensor, experts_NK: Tensor, *, scoring_func: str, norm_topk_prob: bool,
    routed_scaling_factor: float,
) -> Tensor:  # fmt: skip
    """Gradient of the logits [N, E] float32 from that of the weights [N, K], for any experts [N, K] int64."""
    softmax = scoring_func == "softmax"
    return _route_backward(
        dweights_NK, logits_NE, experts_NK, softmax, bool(norm_topk_prob), float(routed_scaling_factor)
    )
