"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1), eager: this file is the specification.

Letters: B batch, T new tokens, S cached + new, D hidden, H heads, C latent rank, P plain and R rotary width of a
query-key head, V value width. What is cached is the normalised latent c [B, 1, S, C] and the rotated key k
[B, 1, S, R] that all heads share; keys and values are never cached. Two forms of the same function:

- expanded (many new tokens): keys and values are made from c, and Transformers' attention interface does the rest; a
  long prompt goes through it a few heads at a time (prefill.py);
- absorbed (few new tokens): W_UK goes into the query and W_UV into the output, and attention runs over c and k.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, dynamic_rope_update
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import logging
from transformers.utils.generic import is_flash_attention_requested

from .attention_choice import sdpa_attention
from .cache import GrowingCache, GrowingLayer
from .pages import PagedStep, layer_slots, paged_step
from .precision import KeepsFloat32
from .prefill import Prompt, attention_by_heads
from .projections import effective_weight, uncomputable_weight
from .recompute import fuses_norm, residual_norm, trains_eagerly, trains_plain, two_linears

logger = logging.get_logger(__name__)

# Scores that the absorbed form holds at once, over all batch rows, heads and tokens. Longer contexts are taken in
# chunks of keys and merged by their log-sum-exp, so that peak memory grows with neither H nor S. A GPU gets larger
# chunks, since each costs it some launches: 16 MiB in float32; the caches of a processor hold 256 KiB.
MAX_SCORES, MAX_SCORES_CPU = 2**22, 2**16


class LamoeRMSNorm(nn.Module):
    """x / rms(x) * weight over the last axis; the mean square in float32 (float64 for a float64 model)."""

    def __init__(self, hidden_size: int, eps: float = 1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.variance_epsilon = eps

    def forward(self, hidden_states: Tensor) -> Tensor:
        dtype = torch.promote_types(hidden_states.dtype, self.weight.dtype)  # they differ under autocast
        x, weight = hidden_states.to(dtype), self.weight.to(dtype)
        return F.rms_norm(x, weight.shape, weight, self.variance_epsilon).to(hidden_states.dtype)

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, eps={self.variance_epsilon}"


def add_and_norm(norm: nn.Module, x: Tensor, added: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """`x + added`, or x, and `norm` of that, both [..., D]."""
    if trains_plain(norm, x, LamoeRMSNorm) and fuses_norm(x, added, norm.weight):
        return residual_norm(x, added, norm.weight, norm.variance_epsilon)
    total = x if added is None else x + added
    return total, norm(total)


class LamoeRotaryEmbedding(KeepsFloat32, nn.Module):
    """Angles of the rotary pairs: every rope type of Transformers, YaRN's magnitude included."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.max_seq_len_cached = config.max_position_embeddings
        self.original_max_seq_len = config.max_position_embeddings
        self.rope_type = config.rope_parameters["rope_type"]
        inv_freq, self.attention_scaling = self.rope_init_fn(config)
        self.inv_freq = nn.Buffer(inv_freq, persistent=False)
        self.original_inv_freq = nn.Buffer(inv_freq.clone(), persistent=False)

    @property
    def rope_init_fn(self) -> Callable:
        """The function config -> (inverse frequencies [R/2] float32, magnitude)."""
        if self.rope_type == "default":
            return self.compute_default_rope_parameters
        return ROPE_INIT_FUNCTIONS[self.rope_type]

    @staticmethod
    def compute_default_rope_parameters(config, device=None, **kwargs) -> tuple[Tensor, float]:
        """theta^(-2i/R) for pair i (arXiv 2104.09864, eq. 15)."""
        width = config.qk_rope_head_dim
        powers = torch.arange(0, width, 2, dtype=torch.float, device=device) / max(width, 1)
        return 1.0 / config.rope_parameters["rope_theta"] ** powers, 1.0

    @torch.no_grad()
    @dynamic_rope_update
    def forward(self, hidden_states: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines of `position_ids` [B, T]: two of [B, T, R/2], float32 (float64 for a float64 model)."""
        dtype = torch.promote_types(hidden_states.dtype, torch.float32)
        angles = position_ids[..., None].float() * self.inv_freq.to(hidden_states.device)
        return (angles.cos() * self.attention_scaling).to(dtype), (angles.sin() * self.attention_scaling).to(dtype)


def rotate_pairs(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Turn each rotary pair of `x` by its token's angle (arXiv 2104.09864, eq. 34).

    Args:
        x: [B, H, T, R]; pair i is (x[2i], x[2i + 1]) if `interleaved`, else (x[i], x[R/2 + i]).
        cos, sin: [B, T, R/2].

    Returns:
        [B, H, T, R] in `x`'s dtype, computed in that of `cos`; pair i comes back as (y[i], y[R/2 + i]) in both cases,
        which no score can tell, since queries and keys agree.
    """
    exact = x.to(cos.dtype)
    first, second = (exact[..., 0::2], exact[..., 1::2]) if interleaved else exact.chunk(2, dim=-1)
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    turned = (torch.addcmul(first * cos, second, sin, value=-1), torch.addcmul(second * cos, first, sin))
    return torch.cat(turned, dim=-1).to(x.dtype)


def attention_scale(config) -> float:
    """1/sqrt(P + R), times YaRN's squared magnitude where `mscale_all_dim` asks for it (DeepSeek-V2, 3.1.4)."""
    scale = config.qk_head_dim**-0.5
    rope = config.rope_parameters
    if rope["rope_type"] != "default" and rope.get("mscale_all_dim") and rope.get("factor", 1) > 1:
        scale *= (0.1 * rope["mscale_all_dim"] * math.log(rope["factor"]) + 1.0) ** 2
    return scale


def eager_attention_forward(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
    """Plain attention over expanded heads, the form that can return its weights.

    Args:
        query: [B, H, T, P + R]; key: [B, H, S, P + R]; value: [B, H, S, V].
        attention_mask: [B or 1, 1, T, S], additive or boolean (True is seen), or None.

    Returns:
        [B, T, H, V], and the weights [B, H, T, S].
    """
    scores = _masked(torch.matmul(query, key.transpose(2, 3)) * scaling, attention_mask)
    weights = torch.softmax(scores, dim=-1, dtype=torch.promote_types(query.dtype, torch.float32)).to(query.dtype)
    weights = F.dropout(weights, p=dropout, training=module.training)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), weights


def _masked(scores: Tensor, mask: Tensor | None) -> Tensor:
    """Scores with what a mask hides made as small as can be; finite, so that a row of padding gives no NaN."""
    if mask is None:
        return scores
    if mask.dtype == torch.bool:
        return scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    return scores + mask


def absorbed_attention(
    q_BHTC: Tensor,
    q_BHTR: Tensor,
    c_BSC: Tensor,
    k_BSR: Tensor,
    mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    return_weights: bool = False,
    max_scores: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Attention of latent queries over the latent cache, softmax(q·cᵀ + q_rot·kᵀ)·c (DeepSeek-V2, appendix C).

    Args:
        q_BHTC, q_BHTR: queries after W_UK [B, H, T, C], and rotated queries [B, H, T, R].
        c_BSC, k_BSR: latents [B, S, C] and rotated keys [B, S, R] of all tokens.
        mask: [B or 1, 1, T, S], boolean (True is seen) or additive; None lets every token see every key.
        dropout: share of the weights that is dropped; the caller passes 0 outside training.
        max_scores: how many scores may be held at once, None for the device's default; longer contexts are taken in
            chunks of keys.

    Returns:
        [B, H, T, C] in `q_BHTC`'s dtype, and the weights [B, H, T, S] if `return_weights`.
    """
    B, H, T, C = q_BHTC.shape
    S = c_BSC.shape[1]
    rows_BXC, rows_BXR = q_BHTC.reshape(B, H * T, C), q_BHTR.reshape(B, H * T, -1)
    exact = torch.promote_types(q_BHTC.dtype, torch.float32)

    def scores(start: int, stop: int) -> Tensor:
        plain = torch.bmm(rows_BXC, c_BSC[:, start:stop].mT)
        both = torch.baddbmm(plain, rows_BXR, k_BSR[:, start:stop].mT, beta=scaling, alpha=scaling)
        both = both.view(B, H, T, stop - start)
        return _masked(both, None if mask is None else mask[..., start:stop])

    if max_scores is None:
        max_scores = MAX_SCORES_CPU if q_BHTC.device.type == "cpu" else MAX_SCORES
    chunk = max(256, max_scores // max(B * H * T, 1))
    if chunk >= S or return_weights:
        weights = torch.softmax(scores(0, S), dim=-1, dtype=exact).to(q_BHTC.dtype)
        weights = F.dropout(weights, dropout, training=dropout > 0)
        out = torch.bmm(weights.view(B, H * T, S), c_BSC).view(B, H, T, C)
        return out, weights if return_weights else None

    top = q_BHTC.new_full((B, H, T, 1), torch.finfo(exact).min, dtype=exact)  # finite: -inf - -inf is NaN
    mass = q_BHTC.new_zeros((B, H, T, 1), dtype=exact)
    out = q_BHTC.new_zeros((B, H, T, C), dtype=exact)
    for start in range(0, S, chunk):
        stop = min(start + chunk, S)
        s = scores(start, stop).to(exact)
        higher = torch.maximum(top, s.amax(-1, keepdim=True))
        weights = torch.exp(s - higher)
        fade = torch.exp(top - higher)
        mass = mass * fade + weights.sum(-1, keepdim=True)
        weights = F.dropout(weights.to(q_BHTC.dtype), dropout, training=dropout > 0)
        out = out * fade + torch.bmm(weights.view(B, H * T, stop - start), c_BSC[:, start:stop]).view(B, H, T, C)
        top = higher
    return (out / mass).to(q_BHTC.dtype), None


class DecodeView(NamedTuple):
    """What the decode kernel has to know of a step, the same for all layers.

    lengths: [B] int32, keys of each sequence with the new ones; seen: [B, S] int32, 0 at keys that nobody sees, None
    if there are none.
    growing: the cache's layers are GrowingLayers with room, which a kernel may write itself.
    recorded: such a step, which a CUDA graph records; nobody's hooks are in the model.
    paged: of a paged cache, where keys lie.
    """

    lengths: Tensor
    seen: Tensor | None
    growing: bool = False
    recorded: bool = False
    paged: PagedStep | None = None


def kernel_refusal(config, dtype: torch.dtype, device: torch.device) -> str | None:
    """Why the decode kernel cannot run for a model of this configuration, dtype and device; None if it can."""
    try:
        from .kernels_attention import refusal, why_not
    except ImportError as error:
        return str(error)
    reason = why_not(1, config.kv_lora_rank, config.qk_rope_head_dim, dtype, device)
    return refusal(reason) if reason else None


def kernel_decodes(config, x: Tensor, form: str) -> bool:
    """Whether decode steps of x's dtype and device, in this form, are the Triton kernel's.

    Raises:
        ValueError: config.mla_implementation is "triton" and the kernel does not run here; the message says why.
    """
    implementation = config.mla_implementation
    if implementation == "eager" or form == "expanded" or (implementation == "auto" and not x.is_cuda):
        return False
    reason = kernel_refusal(config, x.dtype, x.device)
    if reason and implementation == "triton":
        raise ValueError(reason)
    return reason is None


def decode_view(config, x_BTD: Tensor, mask: Tensor | None, past, form: str | None, kwargs: dict) -> DecodeView | None:
    """The view of this step if the Triton kernel runs it, else None.

    Args:
        mask: as the model got it: None, [B, S] with 0 at padding, or [B, 1, T, S] with True at what is seen.
        past: the cache before the step; None without one, or with a paged one in `kwargs`.

    Raises:
        ValueError: as `kernel_decodes` does.
    """
    form, pages = form or config.mla_form, kwargs.get("cache")
    if (past is None and pages is None) or torch.is_grad_enabled() or not kernel_decodes(config, x_BTD, form):
        return None
    B, T, _ = x_BTD.shape
    if kwargs.get("output_attentions", config.output_attentions):
        return None
    if pages is not None:
        step = paged_step(kwargs, T)
        return step and DecodeView(step[0], None, paged=step[1])
    if kwargs.get("is_causal") is False:
        return None
    from .kernels_attention import MOST_TOKENS

    if min(MOST_TOKENS, config.absorb_limit) < T or not isinstance(mask, Tensor | None):
        return None
    cached = past.get_seq_length()
    if isinstance(cached, int) and cached == 0 and form == "auto":
        return None
    seen = None
    if mask is not None:
        if mask.dim() == 2 and (isinstance(cached, Tensor) or mask.shape[1] == cached + T):
            seen = mask.to(torch.int32)  # four bytes each, or the kernel could not fetch them ahead
        elif mask.dim() == 4 and T == 1 and mask.dtype == torch.bool:
            seen = mask[:, 0, 0].to(torch.int32).expand(B, -1)
        else:
            return None
    growing = type(past) is GrowingCache and all(
        type(layer) is GrowingLayer and layer.holds(x_BTD) for layer in past.layers
    )
    if isinstance(cached, Tensor):
        recorded = growing and past.cursor is not None
        return DecodeView((cached + T).to(torch.int32).repeat(B), seen, growing, recorded)
    return DecodeView(torch.full((B,), cached + T, dtype=torch.int32, device=x_BTD.device), seen, growing)


class LamoeAttention(nn.Module):
    """Latent attention of one decoder layer, with DeepSeek's parameter names."""

    def __init__(self, config, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.kv_lora_rank = config.kv_lora_rank
        self.query_widths = (config.qk_nope_head_dim, config.qk_rope_head_dim)
        self.latent_widths = (config.kv_lora_rank, config.qk_rope_head_dim)
        self.expanded_widths = (config.qk_nope_head_dim, config.v_head_dim)
        self.scaling = attention_scale(config)
        self.attention_dropout = config.attention_dropout
        self.num_key_value_groups = 1
        self.is_causal = True

        hidden, heads, bias = config.hidden_size, config.num_attention_heads, config.attention_bias
        if config.q_lora_rank is None:
            self.q_proj = nn.Linear(hidden, heads * config.qk_head_dim, bias=False)
        else:
            self.q_a_proj = nn.Linear(hidden, config.q_lora_rank, bias=bias)
            self.q_a_layernorm = LamoeRMSNorm(config.q_lora_rank)
            self.q_b_proj = nn.Linear(config.q_lora_rank, heads * config.qk_head_dim, bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(hidden, sum(self.latent_widths), bias=bias)
        self.kv_a_layernorm = LamoeRMSNorm(config.kv_lora_rank)
        self.kv_b_proj = nn.Linear(config.kv_lora_rank, heads * sum(self.expanded_widths), bias=False)
        self.o_proj = nn.Linear(heads * config.v_head_dim, hidden, bias=bias)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values=None,
        mla_form: str | None = None,
        view: DecodeView | None = None,
        prompt: Prompt | None = None,
        **kwargs,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend from `hidden_states` [B, T, D] over the cache and itself: ([B, T, D], weights or None).

        Args:
            position_embeddings: cosines and sines [B, T, R/2].
            attention_mask: as the attention implementation of the configuration wants it; for "sdpa" also the
                `Documents` of the batch.
            past_key_values: a Transformers cache; or None, with a paged cache as the keyword `cache`.
            mla_form: overrides `config.mla_form`.
            view: lets the Triton kernel do it, whatever the mask; None is for the other forms.
            prompt: lets groups of heads do it one after the other.
        """
        if prompt is not None:
            out = self._by_heads(hidden_states, position_embeddings, attention_mask, past_key_values, prompt, kwargs)
            return out, None
        queries, latents = self._queries_and_latents(hidden_states)
        q_BHTP, q_BHTR = queries.split(self.query_widths, dim=-1)
        if view is not None and (view.growing or view.paged):
            written = self._write(latents, q_BHTR, position_embeddings, past_key_values, view, kwargs.get("cache"))
            return self.o_proj(self._decode(q_BHTP, *written, view)), None
        c, k = latents.split(self.latent_widths, dim=-1)
        if past_key_values is None and "cache" not in kwargs and self._trains_fused(queries, mla_form):
            out, weights = self._expanded_for_training(queries, c, k, position_embeddings, attention_mask, kwargs)
            return self.o_proj(out.flatten(2)), weights
        c, k = self.kv_a_layernorm(c).unsqueeze(1), k.unsqueeze(1)
        both = torch.cat((q_BHTR, k), dim=1)  # one turn for queries and key: at decode each launch counts
        q_BHTR, k = rotate_pairs(both, *position_embeddings, self.config.rope_interleave).tensor_split([-1], dim=1)

        pages = kwargs.pop("cache", None)
        if pages is not None:
            c, k = self._update_pages(c, k, pages, kwargs)
        elif past_key_values is not None:
            c, k = past_key_values.update(c, k, self.layer_idx)
        if view is not None:
            return self.o_proj(self._decode(q_BHTP, q_BHTR.transpose(0, 1), c.squeeze(1), k.squeeze(1), view)), None

        weight = self._absorbable(mla_form or self.config.mla_form, hidden_states, c, attention_mask, pages)
        if weight is None:
            out, weights = self._expanded(q_BHTP, q_BHTR, c, k, attention_mask, kwargs)
        else:
            out, weights = self._absorbed(q_BHTP, q_BHTR, c, k, weight, attention_mask, kwargs)
        return self.o_proj(out.flatten(2)), weights

    def _query_projection(self, hidden_states: Tensor) -> tuple[nn.Module, Tensor]:
        """What makes the queries of all heads, and of what."""
        if self.config.q_lora_rank is None:
            return self.q_proj, hidden_states
        return self.q_b_proj, self.q_a_layernorm(self.q_a_proj(hidden_states))

    def _queries_and_latents(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """Queries [B, H, T, P + R], and what latents and rotary keys are cut from, [B, T, C + R]."""
        if self.config.q_lora_rank is None:
            queries, latents = two_linears(hidden_states, self.q_proj, self.kv_a_proj_with_mqa)
        else:
            queries, latents = two_linears(hidden_states, self.q_a_proj, self.kv_a_proj_with_mqa)
            queries = self.q_b_proj(self.q_a_layernorm(queries))
        # heads are fewer under TP
        return queries.unflatten(-1, (-1, sum(self.query_widths))).transpose(1, 2), latents

    def _update_pages(self, c: Tensor, k: Tensor, pages, kwargs) -> tuple[Tensor, Tensor]:
        """Continuous batching: a half of c and of k lies in the pages' key slots, the others in their value slots."""
        first, second = pages.update(*self._halves(c, k), self.layer_idx, kwargs)
        latent = torch.cat((first, second), dim=-1)
        c0, k0, c1, k1, _ = latent.split(self._half_widths(latent.shape[-1]), dim=-1)
        return torch.cat((c0, c1), dim=-1), torch.cat((k0, k1), dim=-1)

    def _halves(self, c: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        (c0, c1), (k0, k1) = (x.split((x.shape[-1] // 2, x.shape[-1] - x.shape[-1] // 2), dim=-1) for x in (c, k))
        latent = torch.cat((c0, k0, c1, k1), dim=-1)
        first, second = F.pad(latent, (0, latent.shape[-1] % 2)).chunk(2, dim=-1)
        return first, second

    def _half_widths(self, total: int) -> list[int]:
        C, R = self.latent_widths
        return [C // 2, R // 2, C - C // 2, R - R // 2, total - C - R]

    def _write(self, latents, q_BHTR, position_embeddings, past, view, pages) -> tuple[Tensor, Tensor, Tensor]:
        """Write to the cache in place: rotated queries [H, B, T, R], and latents and keys as `_decode` takes them."""
        from .kernels_step import write_latents, write_pages

        norm, interleaved = self.kv_a_layernorm, self.config.rope_interleave
        new = latents, norm.weight, norm.variance_epsilon, q_BHTR, *position_embeddings
        if view.paged:
            slots = layer_slots(pages, self.layer_idx)
            return write_pages(*new, view.paged.written, *slots, interleaved), *slots
        c, k = past.layers[self.layer_idx].begin_write(latents.shape[1])
        r_HBTR, _ = write_latents(*new, view.lengths, c, k, interleaved)
        return r_HBTR, c, k

    def _decode(self, q_BHTP: Tensor, r_HBTR: Tensor, c: Tensor, k: Tensor, view: DecodeView) -> Tensor:
        """[B, T, H V] by the Triton kernel. c, k: latents and rotated keys [B, S, ...]; or `layer_slots`.

        Heads come first, so that W_UK and W_UV, strided views of kv_b_proj's weight, are read in place.
        """
        from .kernels_attention import latent_decode, latent_decode_pages

        B, H, T, _ = q_BHTP.shape
        weight = effective_weight(self.kv_b_proj).to(q_BHTP.dtype).view(H, -1, self.kv_lora_rank)
        up_key_HPC, up_value_HVC = weight.split(self.expanded_widths, dim=1)
        rows_HXP = q_BHTP.transpose(0, 1).reshape(H, B * T, -1)
        q_HBTC = torch.bmm(rows_HXP, up_key_HPC).view(H, B, T, -1)
        if view.paged:  # one row of requests, each with one token
            q_HBTC, r_HBTR, at = q_HBTC.transpose(1, 2), r_HBTR.transpose(1, 2), view.paged
            out, _ = latent_decode_pages(
                q_HBTC, r_HBTR, c, k, at.slots, at.page, view.lengths, starts_B=at.starts, longest=at.longest,
                scaling=self.scaling,
            )  # fmt: skip
        else:
            out, _ = latent_decode(q_HBTC, r_HBTR, c, k, view.lengths, view.seen, scaling=self.scaling)
        out_HXV = torch.bmm(out.view(H, B * T, -1), up_value_HVC.mT)
        return out_HXV.view(H, B, T, -1).permute(1, 2, 0, 3).flatten(2)

    def _expanded(self, q_BHTP, q_BHTR, c, k, attention_mask, kwargs) -> tuple[Tensor, Tensor | None]:
        expanded = self.kv_b_proj(c.squeeze(1)).unflatten(-1, (-1, sum(self.expanded_widths))).transpose(1, 2)
        key_BHSP, value_BHSV = expanded.split(self.expanded_widths, dim=-1)
        key = _side_by_side(key_BHSP, k.expand(-1, key_BHSP.shape[1], -1, -1))
        return self._attend(_side_by_side(q_BHTP, q_BHTR), key, value_BHSV, attention_mask, **kwargs)

    def _trains_fused(self, queries: Tensor, form: str | None) -> bool:
        """Whether one kernel makes queries and keys: with gradients, on a GPU with Triton, in the expanded form."""
        if not trains_eagerly() or not queries.is_cuda or queries.dtype == torch.float64:
            return False
        if (form or self.config.mla_form) == "absorbed":
            return False
        try:
            from .kernels_heads import expanded_heads  # noqa: F401 (whether it is there)
        except ImportError:
            return False
        return True

    def _expanded_for_training(self, q_BHTX, c_BTC, k_BTR, angles, attention_mask, kwargs):
        """`_expanded` without a cache, from what the projections give: [B, T, H, V], and the weights or None."""
        from .kernels_heads import expanded_heads

        kv_BTHX = self.kv_b_proj(self.kv_a_layernorm(c_BTC)).unflatten(-1, (-1, sum(self.expanded_widths)))
        heads = expanded_heads(q_BHTX.transpose(1, 2), kv_BTHX, k_BTR, *angles, self.config.rope_interleave)
        query, key, value = (x.transpose(1, 2) for x in heads)
        return self._attend(query, key, value, attention_mask, **kwargs)

    def _attend(self, query, key, value, attention_mask, **kwargs) -> tuple[Tensor, Tensor | None]:
        """Transformers' attention of this name."""
        name, attend = self.config._attn_implementation, sdpa_attention
        if name != "sdpa":
            name = "eager" if name == "paged|eager" else name
            attend = ALL_ATTENTION_FUNCTIONS.get_interface(name, eager_attention_forward)
        dropout = self.attention_dropout if self.training else 0.0
        return attend(self, query, key, value, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs)

    def _by_heads(self, hidden_states, position_embeddings, attention_mask, past, prompt: Prompt, kwargs) -> Tensor:
        """`forward` of a long prompt, [B, T, D]: expanded, a group of heads at a time."""
        c, k = self.kv_a_proj_with_mqa(hidden_states).split(self.latent_widths, dim=-1)

        def turn(x: Tensor) -> Tensor:
            return rotate_pairs(x, *position_embeddings, self.config.rope_interleave)

        c, k = self.kv_a_layernorm(c).unsqueeze(1), turn(k.unsqueeze(1))
        if past is not None:
            c, k = past.update(c, k, self.layer_idx)
        written = prompt.cached + hidden_states.shape[1]  # a static cache returns its whole length
        c, k = c[:, 0, :written], k[:, :, :written]

        def attend(query, key, value, mask):
            return self._attend(query, key, value, mask, **kwargs)[0]

        query = self._query_projection(hidden_states)
        return attention_by_heads(
            self.config, prompt, attention_mask, query, (self.kv_b_proj, c), k, self.o_proj, turn, attend
        )

    def _absorbable(self, form: str, hidden_states: Tensor, c: Tensor, mask, pages) -> Tensor | None:
        """The weight [H, P + V, C] of `kv_b_proj` if this call is to be absorbed, else None."""
        T, S = hidden_states.shape[1], c.shape[2]
        if form == "expanded" or (form == "auto" and (S == T or self.config.absorb_limit < T)):
            return None
        if mask is None and T > 1 and is_flash_attention_requested(self.config):
            return None  # causality and sequence borders are the flash kernels' own business
        reason = uncomputable_weight(self.kv_b_proj, hidden_states)
        if reason:
            if not torch.compiler.is_compiling():
                logger.warning_once(
                    f"kv_b_proj {reason}, so its weight cannot be absorbed: each step expands the whole context."
                    " Merge the adapter or dequantise kv_b_proj to decode without expansion."
                )
            return None
        return effective_weight(self.kv_b_proj).view(-1, sum(self.expanded_widths), self.kv_lora_rank)

    def _absorbed(self, q_BHTP, q_BHTR, c, k, weight, attention_mask, kwargs) -> tuple[Tensor, Tensor | None]:
        up_key_HPC, up_value_HVC = weight.to(q_BHTP.dtype).split(self.expanded_widths, dim=1)
        T, S = q_BHTP.shape[2], c.shape[2]
        causal = kwargs.get("is_causal")
        mask = _dense_mask(attention_mask, T, S, q_BHTP.device, self.is_causal if causal is None else causal)
        out_BHTC, weights = absorbed_attention(
            torch.matmul(q_BHTP, up_key_HPC),
            q_BHTR,
            c.squeeze(1),
            k.squeeze(1),
            mask,
            self.scaling,
            self.attention_dropout if self.training else 0.0,
            kwargs.get("output_attentions", self.config.output_attentions),
        )
        return torch.matmul(out_BHTC, up_value_HVC.mT).transpose(1, 2), weights


def _side_by_side(plain_BHTP: Tensor, rotary_BHTR: Tensor) -> Tensor:
    """Both widths of each head, with heads beside each other in memory: so comes the output, and needs no copy."""
    return torch.cat((plain_BHTP.transpose(1, 2), rotary_BHTR.transpose(1, 2)), dim=-1).transpose(1, 2)


def _dense_mask(mask, T: int, S: int, device, causal: bool) -> Tensor | None:
    """Any mask that Transformers makes, as [B or 1, 1, T, S] (boolean or additive), or None if all is seen."""
    if hasattr(mask, "mask_mod"):  # flex_attention's BlockMask
        from torch.nn.attention.flex_attention import create_mask

        return create_mask(mask.mask_mod, mask.shape[0], 1, T, S, device=device)
    if mask is not None and mask.dim() == 4:
        return mask[..., :S]
    if not causal or T == 1:
        past_and_self = None
    else:
        # Without any mask the first new token is the first of the cache, as for SDPA's is_causal; with a padding mask
        # (flash attention) the last new token is the last of the cache.
        shift = 0 if mask is None else mask.shape[-1] - T
        past_and_self = torch.ones(T, S, dtype=torch.bool, device=device).tril(shift)[None, None]
    if mask is None:
        return past_and_self
    seen = F.pad(mask.bool(), (0, S - mask.shape[-1]))[:, None, None]
    return seen if past_and_self is None else seen & past_and_self
