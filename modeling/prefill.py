"""Long prompts in bounded memory, without gradients: attention some heads at a time, feed-forward some tokens.

Letters: B batch, T new tokens, S cached + new, D hidden, H heads, C latent rank, P plain and R rotary width of a
query-key head, V value width. The result is that of attention.LamoeAttention's expanded form.

Expanded, a prompt takes B H (S (2P + R + V) + T (P + R + 2V)) numbers: 14 GiB in bfloat16 for 64k tokens at
DeepSeek-V3's widths. Heads do not know of each other, so they are taken in groups of at most MAX_EXPANDED numbers:
a group's rows of the query projection and of kv_b_proj, then its attention, then its columns of o_proj. That keeps the
fast causal kernels, which PyTorch has for T = S alone, and needs no merging of softmaxes. Where a mask is unavoidable
(padding, a filled cache, packed documents), a block of its rows at a time is made, and only keys up to the last of
these rows are looked at.

At 64k tokens of DeepSeek-V3 in bfloat16 a layer then holds, in GiB, beside weights and cache: in its attention its
input, the normed input and the output, 0.88 each, latent queries 0.19, attended heads 0.25, a group of heads 0.44, 3.5
together; in its feed-forward its input and the sum with the attention's output, 0.88 each, and 1.5 for some tokens.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.masking_utils import find_packed_sequence_indices
from transformers.utils.generic import is_flash_attention_requested

from .projections import effective_weight, uncomputable_weight

# Numbers held at once: queries, keys, values and outputs of a group of heads; outputs of several groups before they go
# through o_proj; scores that a mask is made for (of all heads where attention is eager and holds them).
MAX_EXPANDED, MAX_ATTENDED, MAX_MASKED = 2**28, 2**27, 2**26
# Numbers that a feed-forward holds at once; with fewer tokens the experts' weights would be read too often.
MAX_FED = 3 * 2**28


class Prompt(NamedTuple):
    """What the attention of a long prompt has to know, the same for all layers.

    cached: keys before the new ones; a cache may return more than these and the new.
    seen: [B, S], False at padding; None if there is none.
    documents: [B, T], the number of each token's document in packed rows; None if they are not packed.
    ready: the attention's own mask applies, as it is; `seen` and `documents` are None then.
    """

    cached: int
    seen: Tensor | None = None
    documents: Tensor | None = None
    ready: bool = False

    def mask(self, start: int, stop: int, device: torch.device) -> Tensor:
        """What the queries `start` to `stop` see of the keys up to their last, [B or 1, 1, stop - start, keys]."""
        keys = self.cached + stop
        last = torch.arange(self.cached + start, keys, device=device)
        mask = (torch.arange(keys, device=device) <= last[:, None])[None, None]
        if self.seen is not None:
            mask = mask & self.seen[:, None, None, :keys]
        if self.documents is not None:
            mask = mask & (self.documents[:, None, start:stop, None] == self.documents[:, None, None, :stop])
        return mask


def prompt_view(
    config, x_BTD: Tensor, mask: Tensor | None, past, positions: Tensor | None, form: str | None, kwargs: dict
) -> Prompt | None:
    """The view of this call if its attention is to run by groups of heads, else None.

    It is if that saves memory: the expanded form would take more than MAX_EXPANDED numbers, or the cache is static and
    would be expanded to its whole length.

    Args:
        mask: as the model got it: None, [B, S] with 0 at padding, or a ready one.
        past: the cache before the step, or None.
        positions: as the model got them, [B, T] or None; without a cache and a mask they may tell of packing.
    """
    form, name = form or config.mla_form, config._attn_implementation
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or form == "absorbed":
        return None
    if kwargs.get("cache") is not None or kwargs.get("output_attentions", config.output_attentions):
        return None
    if kwargs.get("is_causal") is False or not getattr(config, "is_causal", True) or not _known(mask):
        return None
    flash = is_flash_attention_requested(config)
    if not flash and name not in ("sdpa", "eager"):
        return None
    B, T, _ = x_BTD.shape
    cached = 0 if past is None else past.get_seq_length()
    if T == 1 or (form == "auto" and config.absorb_limit >= T and not (isinstance(cached, int) and cached == 0)):
        return None
    if isinstance(cached, Tensor):  # of a static cache; create_causal_mask would wait for it, too
        if cached.is_cuda and torch.cuda.is_current_stream_capturing():
            return None
        cached = int(cached)
    S = cached + T
    returned = S if past is None else past.get_mask_sizes(T, 0)[0]
    if returned > S and (flash or (form == "auto" and config.absorb_limit >= T)):
        return None
    rows = B * config.num_attention_heads * T * S if name == "eager" else 0
    if returned == S and max(rows, B * config.num_attention_heads * _numbers(config, T, S)) <= MAX_EXPANDED:
        return None
    if mask is not None and mask.dim() == 4:
        return Prompt(cached, ready=True) if mask.shape[-1] >= S else None
    if flash:
        return Prompt(cached, ready=True)
    if mask is not None:
        if mask.shape[1] < S:
            return None
        seen = mask[:, :S].to(x_BTD.device, torch.bool)
        return Prompt(cached, None if seen.all() else seen)
    documents = None
    if past is None and positions is not None:
        documents = find_packed_sequence_indices(positions.expand(B, -1))
    return Prompt(cached, None, documents)


def _known(mask) -> bool:
    return mask is None or (isinstance(mask, Tensor) and mask.dim() in (2, 4))


def _numbers(config, T: int, S: int) -> int:
    """What a head holds of one row: key and what it is cut from, value; query, output, and a copy of that."""
    P, R, V = config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim
    return S * (2 * P + R + V) + T * (P + R + 2 * V)


def _evenly(count: int, most: int) -> int:
    """The size of as few equal pieces of `count` as have at most `most`, or one."""
    pieces = -(-count // max(most, 1))
    return -(-count // max(pieces, 1))


class _Heads:
    """Heads of what a projection makes of x [B, L, in]: by its rows, or at once if nobody but itself knows these."""

    def __init__(self, projection: nn.Module, x: Tensor, width: int):
        known = uncomputable_weight(projection, x) is None and projection.bias is None
        self.x, self.width = x, width
        self.weight = effective_weight(projection) if known else None
        self.whole = None if known else projection(x)
        self.count = (self.weight.shape[0] if known else self.whole.shape[-1]) // width  # fewer under TP

    def __call__(self, start: int, stop: int) -> Tensor:
        """[B, stop - start, L, width]."""
        rows = slice(start * self.width, stop * self.width)
        out = self.whole[..., rows] if self.weight is None else F.linear(self.x, self.weight[rows])
        return out.unflatten(-1, (-1, self.width)).transpose(1, 2)


def attention_by_heads(
    config, prompt: Prompt, mask: Tensor | None, query: tuple[nn.Module, Tensor], key: tuple[nn.Module, Tensor],
    k_B1SR: Tensor, output: nn.Module, turn: Callable[[Tensor], Tensor], attend: Callable,
) -> Tensor:  # fmt: skip
    """Output [B, T, D] of the attention, without gradient.

    Args:
        mask: what applies if `prompt.ready`: [B or 1, 1, T, S] is cut to rows, anything else goes to `attend` whole.
        query: the projection to the queries of all heads, and its input [B, T, ...].
        key: the projection to the plain keys and values of all heads, and its input [B, S, C].
        k_B1SR: rotated keys that all heads share.
        output: the projection from all heads' values.
        turn: rotates queries [B, heads, T, R].
        attend: query, key, value [B, heads, ...] and mask to [B, T, heads, V].
    """
    P, R, V = config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim
    queries, keys = _Heads(*query, P + R), _Heads(*key, P + V)
    (B, T), S, H = query[1].shape[:2], k_B1SR.shape[2], queries.count
    at_once = _evenly(H, MAX_ATTENDED // (B * T * V))
    if uncomputable_weight(output, query[1]) is not None:
        at_once = H
    group = _evenly(at_once, MAX_EXPANDED // (B * _numbers(config, T, S)))
    weight, out = None, None
    for first in range(0, H, at_once):
        last = min(first + at_once, H)
        attended = None
        for start in range(first, last, group):
            stop = min(start + group, last)
            plain, turned = queries(start, stop).split((P, R), dim=-1)
            q = torch.cat((plain, turn(turned)), dim=-1)
            del plain, turned
            plain, value = keys(start, stop).split((P, V), dim=-1)
            k = torch.cat((plain, k_B1SR.expand(-1, stop - start, -1, -1)), dim=-1)
            del plain
            if attended is None:
                attended = q.new_empty(B, T, last - first, V)
            for rows, seen, size in _blocks(config, prompt, mask, stop - start, B, T, S, q.device):
                piece = attend(q[:, :, rows], k[:, :, :size], value[:, :, :size], seen)
                attended[:, rows, start - first : stop - first] = piece
            del q, k, value, piece
        if at_once >= H:
            return output(attended.flatten(2))
        weight = effective_weight(output).to(attended.dtype) if weight is None else weight
        columns = weight[:, first * V : last * V]
        if out is None:
            out = F.linear(attended.flatten(2), columns, output.bias)
        else:  # rounded once a part, as sums over tensor-parallel ranks are
            out.view(B * T, -1).addmm_(attended.view(B * T, -1), columns.mT)
    return out


def _blocks(
    config, prompt: Prompt, mask: Tensor | None, heads: int, B: int, T: int, S: int, device: torch.device
) -> Iterator[tuple[slice, Tensor | None, int]]:
    """Rows of queries, their mask, and how many keys that is for; the causal mask of attention itself is None."""
    eager = config._attn_implementation == "eager"
    dense = mask is not None and mask.dim() == 4
    plain = not prompt.cached and prompt.seen is None and prompt.documents is None
    if not dense and (prompt.ready or (plain and not eager)):
        yield slice(0, T), mask, S
        return
    rows = max(1, MAX_MASKED // (B * S * (heads if eager else 1)))
    for start in range(0, T, rows):
        stop = min(start + rows, T)
        if dense:
            yield slice(start, stop), mask[..., start:stop, :S], S
        else:
            yield slice(start, stop), prompt.mask(start, stop, device), prompt.cached + stop


def tokens_at_once(x_BTD: Tensor, feed: nn.Module, recorded: bool) -> int:
    """How many tokens go through a feed-forward at a time: all, unless that takes more than MAX_FED numbers.

    Args:
        feed: has `numbers_a_token`, what it holds for each token.
        recorded: somebody collects what its modules return, a call a layer.
    """
    N = x_BTD.shape[0] * x_BTD.shape[1]
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or feed.training or recorded:
        return N
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return N  # experts of other ranks wait for as many calls
    return _evenly(N, MAX_FED // feed.numbers_a_token)


def feed_by_tokens(x_BTD: Tensor, norm: nn.Module, feed: nn.Module, tokens: int) -> Tensor:
    """x + feed(norm(x)) for so many `tokens` at a time; `x_BTD` is written over.

    A router's checksum is then that of all tokens.
    """
    router, checksum = getattr(feed, "gate", None), None
    x_BTD = x_BTD.contiguous()
    for x_1ND in x_BTD.view(1, -1, x_BTD.shape[-1]).split(tokens, dim=1):
        x_1ND += feed(norm(x_1ND))
        found = getattr(router, "checksum", None)
        if found is not None:
            checksum = found.sum() if checksum is None else checksum + found.sum()
    if router is not None:
        router.checksum = checksum
    return x_BTD
