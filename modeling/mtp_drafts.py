"""Drafts of the multi-token-prediction layers for speculative generation (mtp_generation.py), recorded on a GPU.

Letters: B rows, A columns of tokens that a round added, D hidden, W vocabulary.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from .cache import GrowingCache, GrowingLayer
from .decode_graph import STEPS_BEFORE, replayed


class Drafter:
    """The prediction layers, their caches and what they have to remember of a round.

    The layer of depth k joins the state of place i with token i + k. With N tokens known it has final entries for the
    places up to N - 1 - k, and makes further ones with drafts; those are cropped and made anew in the next round. Of
    the states of depth k - 1, depth k needs those of the round and one from the round before.
    """

    def __init__(self, model):
        self.model = model
        self.depths = len(model.model.mtp_layers)
        self.caches = [_one_layer() for _ in range(self.depths)]
        self.seen: list[Tensor | None] = [None] * self.depths
        self.before: list[Tensor | None] = [None] * self.depths
        self.prompt, self.masked = True, False

    def draft(
        self,
        states: Tensor,
        tokens: Tensor,
        kept: Tensor,
        first: Tensor,
        start: Tensor,
        longest: int,
        drafts: int,
        recorded: bool,
        choose: Callable[[Tensor, list[Tensor]], Tensor] | None,
    ) -> list[Tensor]:
        """So many `drafts` for each row, [B] each, behind the tokens that the last round kept.

        Args:
            states: the model's [B, A, D], after its last norm, at the places one before those of `tokens`.
            tokens: [B, A], which the last round added; of a row the first `kept` [B]. The prompt is the first round.
            first: position of the first of `tokens`, [B].
            start: positions before this one [B] are padding.
            longest: the greatest of `kept`.
            recorded: let CUDA graphs do it; A and `drafts` are then the same in each round.
            choose: a draft [B] from a depth's logits [B, W] and the drafts before it; None takes the likeliest.
        """
        B, A = tokens.shape
        if self.prompt:
            self.masked = B > 1 or self.depths > A
        ids = F.pad(tokens, (0, drafts - 1)) if drafts > 1 else tokens
        found: list[Tensor] = []
        for depth in range(1, drafts + 1):
            if depth > 1:
                ids.scatter_(1, (kept + (depth - 2)).unsqueeze(1), found[-1].to(ids.device).unsqueeze(1))
                before = torch.zeros_like(states[:, :1]) if self.prompt else self.before[depth - 1]
                self.before[depth - 1] = _at(states, (kept - 1).clamp(min=0)).unsqueeze(1)
                states = torch.cat((before, states), dim=1)
            # columns count from the place `depth` before the first of `tokens`; the prompt has nothing there
            outside = depth - 1 if self.prompt else 0
            inputs = ids[:, outside : A + depth - 1], states[:, outside:], kept, first
            fresh, logits, likeliest = self._run(depth, outside, inputs, start, longest, recorded and not self.prompt)
            states = torch.cat((states[:, :outside], fresh), dim=1) if outside else fresh
            found.append(likeliest if choose is None else choose(logits, found))
        self.prompt = False
        return found

    def _run(self, depth: int, outside: int, inputs: tuple[Tensor, ...], start: Tensor, longest: int, recorded: bool):
        """`_step` over the columns from `outside` on; those that are final stay cached.

        A row's dead columns come last, so that no other column sees them in this round; later ones must not.
        """
        ids, _, kept, first = inputs
        T, cache, seen = ids.shape[1], self.caches[depth - 1], self.seen[depth - 1]
        mask = None
        if self.masked:
            columns = torch.arange(outside, outside + T, device=ids.device)
            shown = (first - depth).unsqueeze(1) + columns >= start.unsqueeze(1)
            mask = shown if seen is None else torch.cat((seen, shown), dim=1)
        step = partial(self._step, depth, outside)
        out = replayed(self.model, step, inputs, mask, cache, depth) if recorded else None
        if out is None:
            out = step(*inputs, mask)
        stay = max(longest - outside, 0)
        cache.crop(stay - T)
        if self.masked:
            settled = (shown & (columns < kept.unsqueeze(1)))[:, :stay]
            self.seen[depth - 1] = settled if seen is None else torch.cat((seen, settled), dim=1)
        return out

    def _step(self, depth: int, outside: int, ids: Tensor, states: Tensor, kept: Tensor, first: Tensor, mask):
        """Of the layer of `depth`: states [B, T, D], logits [B, W] behind the last live column, the likeliest [B]."""
        model = self.model.model
        columns = torch.arange(outside, outside + ids.shape[1], device=ids.device)
        positions = ((first - depth).unsqueeze(1) + columns).clamp(min=0)
        embeds = model.mtp_embeds(depth, ids)
        cache = self.caches[depth - 1]
        out = model.mtp_step(depth, embeds, states, mask, positions, past_key_values=cache, use_cache=True)
        last = (kept - 1).clamp(min=0) + (depth - 1 - outside)
        logits = self.model.mtp_head(depth)(_at(out, last))
        return out, logits, logits.argmax(dim=-1)


def _at(x: Tensor, places: Tensor) -> Tensor:
    """[B, D] of `x` [B, T, D] at each row's place, [B]."""
    return x.gather(1, places.view(-1, 1, 1).expand(-1, 1, x.shape[2])).squeeze(1)


def _one_layer() -> GrowingCache:
    cache = GrowingCache()
    cache.layers.append(GrowingLayer())
    cache.steps = STEPS_BEFORE  # a draft is recorded as soon as the model's own steps are
    return cache
