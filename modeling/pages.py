"""Batches of continuous batching: where Transformers' manager says that keys lie, in each of its two ways.

Letters: B requests, T new tokens of all of them and S keys, one request's after the other's, H heads, C latent rank, R
rotary width. A layer's slots are rows of one tensor, each with a half of a token's [c; k]; a block table names pages
of them. Batches in which every request has one new token come with a table, as far as it reaches, all others with
lists of slots.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from transformers.utils.generic import is_flash_attention_requested

_KIND = "full_attention"  # the only one that latents have
MAX_SHOWN = 2**26  # entries of a mask that are decided at once


class PagedStep(NamedTuple):
    """Where the keys of a step lie in which every request has one new token.

    slots: pages [B, pages] of each request; or flat, the slots of all keys, page 1, where each request `starts` [B].
    written: [B] int64, the slot of each new token, negative for a row that pads the batch.
    longest: the most keys that a request has; None is what the table has room for.
    """

    slots: Tensor
    page: int
    written: Tensor
    starts: Tensor | None = None
    longest: int | None = None


def layer_slots(pages, layer_idx: int) -> tuple[Tensor, Tensor]:
    """First and second halves of the latents of a layer, [slots, ceil((C + R) / 2)] each."""
    first, second = pages.layer_to_allocator[layer_idx].get_cache_for_block_table(layer_idx)
    return first.flatten(0, 1).squeeze(1), second.flatten(0, 1).squeeze(1)


def paged_step(kwargs: dict, T: int) -> tuple[Tensor, PagedStep] | None:
    """Lengths [B] int32 with the new tokens, and the step; None if a request may have several new tokens.

    With a block table nothing here depends on the lengths but on the device: a recorded step holds for others.
    """
    ends, slots = kwargs["cu_seq_lens_k"][_KIND], kwargs["read_index"]
    lengths = ends.diff().to(torch.int32)
    if kwargs.get("block_table") is not None:
        table, page = _table(kwargs)
        return lengths, PagedStep(table, page, _written(table, page, lengths))
    if kwargs["max_length_q"] != 1 or len(lengths) != T or not slots[0].numel():
        return None
    return lengths, PagedStep(slots[0], 1, kwargs["write_index"][0], ends[:-1], kwargs["max_length_k"][_KIND])


def _table(kwargs: dict) -> tuple[Tensor, int]:
    allocator = kwargs["cache"].cache_allocators[_KIND]
    return kwargs["block_table"][allocator.index], allocator.tokens_per_page


def _written(table: Tensor, page: int, lengths: Tensor) -> Tensor:
    """[B] int64, the last slot of each request; -1 where there is no key, which pads the batch."""
    last = lengths.long() - 1
    pages = table.gather(1, (last.clamp(min=0) // page).unsqueeze(1)).squeeze(1)
    return torch.where(last < 0, last, pages * page + last % page)


def listed(kwargs: dict) -> dict:
    """`kwargs` with lists of slots in place of a block table; asks the device for the lengths.

    For what a table cannot be read by: attention that is not the decode kernel's.
    """
    if kwargs.get("block_table") is None:
        return kwargs
    table, page = _table(kwargs)
    lengths = kwargs["cu_seq_lens_k"][_KIND].diff()
    written = _written(table, page, lengths)
    n = torch.arange(int(lengths.max()), device=table.device)
    slots = table[:, : -(-len(n) // page)].long().repeat_interleave(page, dim=1)[:, : len(n)] * page + n % page
    nowhere = kwargs["cache"].cache_allocators[_KIND].write_trash_index
    return {
        **kwargs,
        "block_table": None,
        "read_index": [slots[n < lengths[:, None]]],
        "write_index": [written.masked_fill(written < 0, nowhere)],
        "max_length_k": {_KIND: len(n)},
    }


def batch_mask(config, x_1TD: Tensor, mask: Tensor | None, kwargs: dict) -> Tensor | None:
    """The mask [1, 1, T, S] of a batch whose keys are listed, in x's dtype; as given if there is one.

    A token sees its own request's keys up to itself. Transformers would make it on the host, request by request, of
    decode-only batches too, and hold one of the greatest size. The flash kernels need none.
    """
    if mask is not None or is_flash_attention_requested(config):
        return mask
    T, device = x_1TD.shape[1], x_1TD.device
    S = kwargs["read_index"][0].numel() or T
    ends_q, ends_k = kwargs["cu_seq_lens_q"].long(), kwargs["cu_seq_lens_k"][_KIND].long()
    t, s = torch.arange(T, device=device), torch.arange(S, device=device)
    request = torch.searchsorted(ends_q[1:].contiguous(), t, right=True).clamp_(max=len(ends_q) - 2)
    first, last = ends_k[:-1][request], t + (ends_k - ends_q)[1:][request]
    mask, hidden = x_1TD.new_zeros(T, S), torch.finfo(x_1TD.dtype).min
    rows = max(1, MAX_SHOWN // S)
    for some, low, high in zip(mask.split(rows), first.split(rows), last.split(rows), strict=True):
        some.masked_fill_((s < low[:, None]) | (s > high[:, None]), hidden)
    return mask[None, None]
