"""A decoder layer for a few new tokens over a GrowingCache, in nine launches instead of twenty.

The same function as modeling_lamoe.LamoeDecoderLayer, which defines the result: for recorded decode steps, where no
hook looks at what lies in between. Letters as in kernels_step.py.
"""

import torch
from torch import Tensor, nn

from .attention import DecodeView, LamoeAttention, LamoeRMSNorm
from .cache import GrowingLayer
from .moe import LamoeMoE, LamoeTopkRouter
from .projections import unreadable_weight


def fuses(layer: nn.Module, x_BTD: Tensor) -> bool:
    """Whether `layer`, a LamoeDecoderLayer without hooks, can take the new tokens `x_BTD` by `few_tokens_layer`."""
    try:
        from .kernels_step import MOST_ROWS
    except ImportError:
        return False
    attention, dtype = layer.self_attn, x_BTD.dtype
    if x_BTD.shape[0] * x_BTD.shape[1] > MOST_ROWS or type(attention) is not LamoeAttention:
        return False
    projections = [attention.kv_a_proj_with_mqa, attention.kv_b_proj, attention.o_proj]
    norms = [layer.input_layernorm, layer.post_attention_layernorm, attention.kv_a_layernorm]
    if attention.config.q_lora_rank is None:
        projections.append(attention.q_proj)
    else:
        projections += [attention.q_a_proj, attention.q_b_proj]
        norms.append(attention.q_a_layernorm)
    if any(unreadable_weight(projection, x_BTD) or projection.bias is not None for projection in projections):
        return False
    weights = [module.weight for module in (*projections, *norms)]
    return all(type(norm) is LamoeRMSNorm for norm in norms) and all(
        weight.dtype == dtype and weight.is_contiguous() for weight in weights
    )


def few_tokens_layer(
    layer: nn.Module, x_BTD: Tensor, position_embeddings: tuple[Tensor, Tensor], cache: GrowingLayer, view: DecodeView
) -> Tensor:
    """What `layer` makes of `x_BTD`, [B, T, D]; `fuses` says whether it can, and nothing is kept for a gradient.

    Args:
        position_embeddings: cosines and sines [B or 1, T, R/2].
        cache: the layer's; the new latents are written to it.
    """
    B, T, _ = x_BTD.shape
    x_ND = x_BTD.reshape(B * T, -1)
    x_ND = _attend(layer, x_ND, B, position_embeddings, cache, view)
    return _feed(layer, x_ND, B).view(B, T, -1)


def _attend(
    layer, x_ND: Tensor, B: int, angles: tuple[Tensor, Tensor], cache: GrowingLayer, view: DecodeView
) -> Tensor:
    """x + attention(norm(x)), [N, D]."""
    from .kernels_step import decode_values, linear_add, norm_linear, write_latents

    attention, norm, N = layer.self_attn, layer.input_layernorm, len(x_ND)
    q_lora = attention.config.q_lora_rank
    first = attention.q_proj if q_lora is None else attention.q_a_proj
    down = attention.kv_a_proj_with_mqa.weight
    both = norm_linear(x_ND, norm.weight, norm.variance_epsilon, first.weight, down)
    queries, latents = both.split((both.shape[1] - len(down), len(down)), dim=1)
    if q_lora is not None:
        norm = attention.q_a_layernorm
        queries = norm_linear(queries, norm.weight, norm.variance_epsilon, attention.q_b_proj.weight, None)
    q_BTHX = queries.unflatten(1, (-1, sum(attention.query_widths))).unflatten(0, (B, N // B))
    q_BHTP, q_BHTR = q_BTHX.transpose(1, 2).split(attention.query_widths, dim=-1)

    weight_HXC = attention.kv_b_proj.weight.view(q_BHTP.shape[1], sum(attention.expanded_widths), -1)
    up_key_HPC, up_value_HVC = weight_HXC.split(attention.expanded_widths, dim=1)
    c, k = cache.begin_write(N // B)
    norm = attention.kv_a_layernorm
    r_HBTR, q_HBTC = write_latents(
        latents.unflatten(0, (B, N // B)), norm.weight, norm.variance_epsilon, q_BHTR, *angles, view.lengths, c, k,
        attention.config.rope_interleave, q_BHTP, up_key_HPC,
    )  # fmt: skip
    out_BTX = decode_values(q_HBTC, r_HBTR, c, k, view.lengths, view.seen, up_value_HVC, scaling=attention.scaling)
    return linear_add(out_BTX.view(N, -1), attention.o_proj.weight, x_ND)


def _feed(layer, x_ND: Tensor, B: int) -> Tensor:
    """x + feed-forward(norm(x)), [N, D]."""
    mlp, norm = layer.mlp, layer.post_attention_layernorm
    routed = type(mlp) is LamoeMoE and type(mlp.gate) is LamoeTopkRouter
    if not routed or mlp.gate.weight.dtype != torch.float32 or mlp.config.router_nonfinite == "zero":
        fed = mlp(norm(x_ND).view(B, -1, x_ND.shape[1]))
        return x_ND + fed.view_as(x_ND)
    from .kernels_step import norm_router

    normed, logits = norm_router(x_ND, norm.weight, norm.variance_epsilon, mlp.gate.weight)
    weights, experts = mlp.gate.choose(logits)
    return mlp.feed(normed, experts, weights, residual=x_ND)
