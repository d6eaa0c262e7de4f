"""Speculative generation with the multi-token-prediction layers: `generate(..., use_mtp=True)`, any batch size.

A round drafts a token with each depth, runs the model once over the last token and the drafts, and keeps the drafts
that the model agrees with and one token of its own. Greedy tokens are those without drafts, up to the rounding of
several tokens at once; sampled ones have the same distribution (arXiv 2211.17192, algorithm 1).

Rows of a batch keep different numbers of tokens, and caches have one length. So caches keep what the longest row of a
round kept, and a mask hides what the other rows did not: every cache can crop its end, and every attention takes a
mask, while caches of one length a row would need kernels and classes of their own. A batch of one has no such holes.

Letters: B rows, P tokens of the prompt, D hidden, W vocabulary, n drafts of a round.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer
from transformers.generation import (
    EosTokenCriteria,
    GenerateDecoderOnlyOutput,
    MaxLengthCriteria,
    PrefixConstrainedLogitsProcessor,
    SynthIDTextWatermarkLogitsProcessor,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
)

from .cache import GrowingCache, GrowingLayer

# Processors that keep a state from step to step, which a rejected draft would spoil.
_STATEFUL = (UnbatchedClassifierFreeGuidanceLogitsProcessor, SynthIDTextWatermarkLogitsProcessor)
_OWN_KWARGS = ("attention_mask", "position_ids", "past_key_values", "use_cache", "logits_to_keep", "inputs_embeds")


@dataclass
class Speculation:
    """What a generation with drafts did. Lists are by depth: how many drafts were checked, how many were kept."""

    rounds: int = 0
    drafted: list[int] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)

    @property
    def acceptance_rate(self) -> float:
        """Kept share of all drafts; 0 without drafts."""
        return sum(self.accepted) / max(sum(self.drafted), 1)

    def count(self, drafts: int, kept: int):
        """Add a row's round: `kept` of its `drafts`, in order of depth."""
        missing = drafts - len(self.drafted)
        self.drafted.extend([0] * missing)
        self.accepted.extend([0] * missing)
        for depth in range(drafts):
            self.drafted[depth] += 1
            self.accepted[depth] += depth < kept


def verify_greedily(scores: Tensor, drafts: Tensor) -> tuple[Tensor, Tensor]:
    """Likeliest tokens [B, n + 1] of `scores` [B, n + 1, W], and how many of `drafts` [B, n] agree with them, [B]."""
    chosen = scores.argmax(dim=-1)
    return chosen, (chosen[:, :-1] == drafts).cumprod(dim=-1).sum(dim=-1)


def verify_by_sampling(scores: Tensor, drafts: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens distributed as if each were drawn from softmax(scores) (arXiv 2211.17192, algorithm 1).

    A draft is kept with probability min(1, p/q); in the place of the first that is not stands a token drawn from what
    p has above q, and behind a row of kept drafts one drawn from p.

    Args:
        scores: [B, n + 1, W]. drafts: [B, n], drawn from q [B, n, W].

    Returns:
        tokens [B, n + 1], of which those behind the drawn one mean nothing; and how many drafts are kept, [B].
    """
    n, p = drafts.shape[1], scores.softmax(dim=-1)
    p_of, q_of = (x[:, :n].gather(2, drafts.unsqueeze(2)).squeeze(2) for x in (p, q))
    kept = (torch.rand_like(q_of) * q_of < p_of).cumprod(dim=-1).sum(dim=-1)
    rows = torch.arange(len(p), device=p.device)
    p_end = p[rows, kept]
    above = (p_end - torch.cat((q, torch.zeros_like(p[:, :1])), dim=1)[rows, kept]).clamp(min=0)
    above = torch.where(above.sum(dim=-1, keepdim=True) > 0, above, p_end)  # p is q but for rounding
    tokens = torch.cat((drafts, drafts.new_zeros(len(p), 1)), dim=1)
    tokens[rows, kept] = torch.multinomial(above, 1).squeeze(1)
    return tokens, kept


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
        drafts: int,
        choose: Callable[[Tensor, list[Tensor]], Tensor],
    ) -> list[Tensor]:
        """So many `drafts` for each row, [B] each, behind the tokens that the last round kept.

        Args:
            states: the model's [B, A, D], after its last norm, at the places one before those of `tokens`.
            tokens: [B, A], which the last round added; of a row the first `kept` [B]. The prompt is the first round.
            first: position of the first of `tokens`, [B].
            start: positions before this one [B] are padding.
            choose: a draft [B] from a depth's logits [B, W] and the drafts before it.
        """
        B, A = tokens.shape
        if self.prompt:
            self.masked = B > 1 or self.depths > A
        rows, last = torch.arange(B, device=tokens.device), (kept - 1).clamp(min=0)
        ids = torch.cat((tokens, tokens.new_zeros(B, drafts)), dim=1)
        found: list[Tensor] = []
        for depth in range(1, drafts + 1):
            if depth > 1:
                before = torch.zeros_like(states[:, :1]) if self.prompt else self.before[depth - 1]
                self.before[depth - 1] = states[rows, last].unsqueeze(1)
                states = torch.cat((before, states), dim=1)
            # columns count from the place `depth` before the first of `tokens`; the prompt has nothing there
            outside = depth - 1 if self.prompt else 0
            fresh = self._run(depth, states[:, outside:], ids, outside, kept, first, start)
            states = torch.cat((states[:, :outside], fresh), dim=1)
            logits = self.model.mtp_head(depth)(states[rows, last + depth - 1])
            found.append(choose(logits, found))
            ids[rows, kept + depth - 1] = found[-1].to(ids.device)
        self.prompt = False
        return found

    def _run(self, depth, states, ids, outside: int, kept, first, start) -> Tensor:
        """The layer of `depth` over `states` [B, T, D] of the columns from `outside` on; final ones stay cached."""
        T = states.shape[1]
        columns = torch.arange(outside, outside + T, device=ids.device)
        positions = (first - depth).unsqueeze(1) + columns
        live = (columns < (kept + depth - 1).unsqueeze(1)) & (positions >= start.unsqueeze(1))
        cache, seen = self.caches[depth - 1], self.seen[depth - 1]
        mask = None
        if self.masked:
            mask = live if seen is None else torch.cat((seen, live), dim=1)
        model = self.model.model
        out = model.mtp_step(
            depth, model.mtp_embeds(depth, ids[:, columns]), states, mask, positions.clamp(min=0),
            past_key_values=cache, use_cache=True,
        )  # fmt: skip
        stay = max(T - (depth - 1), 0)
        cache.crop(stay - T)
        if self.masked:
            settled = (live & (columns < kept.unsqueeze(1)))[:, :stay]
            self.seen[depth - 1] = settled if seen is None else torch.cat((seen, settled), dim=1)
        return out


def _one_layer() -> GrowingCache:
    cache = GrowingCache()
    cache.layers.append(GrowingLayer())
    return cache


class _Rows:
    """The tokens of each row, and when it stops."""

    def __init__(self, input_ids: Tensor, stopping_criteria, pad_token_id: int | None):
        self.criteria = [c for c in stopping_criteria if not isinstance(c, EosTokenCriteria | MaxLengthCriteria)]
        ends = [c.eos_token_id for c in stopping_criteria if isinstance(c, EosTokenCriteria)]
        self.ends = {token for tokens in ends for token in tokens.flatten().tolist()}
        self.pads = bool(ends)  # as Transformers has it: without an end token a stopped row goes on beside the others
        self.longest = stopping_criteria.max_length
        B, self.prompt = input_ids.shape
        self.tokens = input_ids.new_full((B, self.longest), 0 if pad_token_id is None else pad_token_id)
        self.tokens[:, : self.prompt] = input_ids
        self.counts = [0] * B  # generated tokens
        self.stops: list[int | None] = [None] * B  # after how many of them the row stops

    def add(self, tokens: Tensor, offered: list[int]) -> list[int]:
        """Add of each row of `tokens` [B, n + 1] the first `offered`, or fewer where it stops; how many they were."""
        host, added = tokens.tolist(), []
        for row, words in enumerate(host):
            begin = self.counts[row]
            for word in words[: offered[row]]:
                if self.is_done(row):
                    break
                self._add(row, word)
            added.append(self.counts[row] - begin)
        return added

    def _add(self, row: int, word: int):
        width = self.prompt + self.counts[row] + 1
        self.tokens[row, width - 1] = word
        self.counts[row] += 1
        if self.stops[row] is None:
            whole = self.tokens[row : row + 1, :width]
            stops = word in self.ends or width >= self.longest
            if stops or any(bool(criterion(whole, None).all()) for criterion in self.criteria):
                self.stops[row] = self.counts[row]

    def is_done(self, row: int) -> bool:
        """Whether the row needs no more tokens."""
        if self.stops[row] is None:
            return False
        if self.pads or self.prompt + self.counts[row] >= self.longest:
            return True
        return None not in self.stops and self.counts[row] >= max(self.stops)

    def left(self) -> int:
        """The most tokens that a row may still need."""
        open_rows = [row for row in range(len(self.counts)) if not self.is_done(row)]
        return max((self.longest - self.prompt - self.counts[row] for row in open_rows), default=0)

    def sequences(self) -> Tensor:
        """What `generate` returns, [B, prompt + tokens of the longest row]."""
        return self.tokens[:, : self.prompt + max(self.stops)]


class _Recorded:
    """What `generate` was asked to return beside the tokens."""

    def __init__(self, generation_config, batch: int):
        self.whole = bool(generation_config.return_dict_in_generate)
        wanted = (generation_config.output_scores, generation_config.output_logits)
        self.steps = [[[] for _ in range(batch)] if self.whole and want else None for want in wanted]

    def add(self, scores: Tensor, logits: Tensor, added: list[int]):
        """Keep what chose the `added` tokens of each row: two of [B, n + 1, W]."""
        for steps, values in zip(self.steps, (scores, logits.to(scores)), strict=True):
            for row, count in enumerate(added if steps is not None else ()):
                steps[row].extend(values[row, :count])

    def output(self, sequences: Tensor, cache, new_tokens: int):
        """The tokens, or Transformers' output with them."""
        if not self.whole:
            return sequences
        scores, logits = (None if steps is None else self._stacked(steps, new_tokens) for steps in self.steps)
        return GenerateDecoderOnlyOutput(sequences=sequences, scores=scores, logits=logits, past_key_values=cache)

    @staticmethod
    def _stacked(steps: list[list[Tensor]], count: int) -> tuple[Tensor, ...]:
        nothing = torch.zeros_like(steps[0][0])
        return tuple(torch.stack([row[i] if i < len(row) else nothing for row in steps]) for i in range(count))


@contextmanager
def _states_of(model) -> Iterator[list[Tensor]]:
    """A list to which each forward adds its states after the last norm, those of a prompt in chunks too."""
    states: list[Tensor] = []
    hook = model.model.norm.register_forward_hook(lambda module, inputs, output: states.append(output))
    try:
        yield states
    finally:
        hook.remove()


def _hide(mask: Tensor | None, cached: int, kept: Tensor) -> Tensor | None:
    """The mask [B, cached] after a round, of whose columns, the last ones, each row has the first `kept` [B]."""
    added = int(kept.max())
    shown = torch.arange(added, device=kept.device) < kept.unsqueeze(1)
    if mask is None and bool(shown.all()):
        return None
    if mask is None:
        mask = shown.new_ones(len(kept), cached - added, dtype=torch.int64)
    return torch.cat((mask[:, : cached - added], shown.to(mask.dtype)), dim=1)


def _close_holes(cache, mask: Tensor | None, prompt: int, length: int):
    """Give the cache the `length` that it has without drafts: each row's tokens behind the `prompt` without holes.

    Behind the end of a row stands what nobody reads, as ever.
    """
    if mask is not None:
        order = (mask[:, prompt:] == 0).sort(dim=1, stable=True).indices + prompt
        order = torch.cat((torch.arange(prompt, device=mask.device).expand(len(mask), -1), order), dim=1)
        for layer in cache.layers:
            index = order.to(layer.keys.device)[:, None, :length, None]
            layer.keys, layer.values = (
                x.gather(2, index.expand(-1, x.shape[1], -1, x.shape[3])) for x in (layer.keys, layer.values)
            )
    cache.crop(min(length - cache.get_seq_length(), 0))


def _refuse(model, B: int, logits_processor, config, streamer, kwargs: dict):
    """Raise a ValueError for what drafts cannot do."""
    cache = kwargs.get("past_key_values")
    plain = cache is not None and all(type(layer) in (DynamicLayer, GrowingLayer) for layer in cache.layers)
    processors = (*_STATEFUL, PrefixConstrainedLogitsProcessor) if B > 1 else _STATEFUL
    refused = [type(x).__name__ for x in logits_processor if isinstance(x, processors)]
    others = ("prompt_lookup_num_tokens", "assistant_early_exit")
    other = [name for name in others if getattr(config, name, None) is not None]
    for wrong, reason in (
        (not model.model.mtp_layers, "the model has no multi-token-prediction layers (num_nextn_predict_layers=0)"),
        (other, f"{', '.join(other)} asks for other drafts; choose one"),
        (kwargs.get("inputs_embeds") is not None, "drafts need the prompt's ids: pass input_ids, not inputs_embeds"),
        (cache is None, "drafts need a cache: leave use_cache=True"),
        (not plain, f"what a {type(cache).__name__} holds of rejected drafts cannot be taken out; use a DynamicCache"),
        (B > 1 and streamer is not None, f"a streamer takes one row, and there are {B}"),
        (refused, f"{', '.join(refused)} cannot look at drafts that may be rejected, or at rows of several lengths"),
        (
            config.return_dict_in_generate and (config.output_attentions or config.output_hidden_states),
            "output_attentions and output_hidden_states are per step, and a round is several; ask the model's forward",
        ),
    ):
        if wrong:
            raise ValueError(f"use_mtp=True: {reason}.")


def speculate(
    model, input_ids: Tensor, logits_processor, stopping_criteria, generation_config, streamer=None, **kwargs
):
    """Transformers' decoding method for `use_mtp=True`: greedy or sampled, with drafts by `model`'s own layers.

    `model.speculation` tells afterwards how many drafts were kept. Stopping criteria see one row at a time; logits
    processors see the batch once for each length that rows have, and count for the rows of that length.

    Args:
        input_ids: [B, P], the prompt, padded on the left.
        kwargs: what `generate` passes to `forward`, the cache among it.

    Returns:
        [B, P + tokens], or with `return_dict_in_generate` Transformers' output; `scores` and `logits` of rows that had
        stopped are zeros.

    Raises:
        ValueError: the model has no prediction layers, or something was asked for that drafts cannot do; the message
            says which, and the way out.
    """
    B, P = input_ids.shape
    _refuse(model, B, logits_processor, generation_config, streamer, kwargs)
    cache, mask = kwargs["past_key_values"], kwargs.get("attention_mask")
    rows = _Rows(input_ids, stopping_criteria, generation_config._pad_token_tensor)
    drafter, speculation = Drafter(model), Speculation()
    model.speculation = speculation
    recorded = _Recorded(generation_config, B)
    sample = generation_config.do_sample

    def process(logits: Tensor, drafts: list[Tensor]) -> Tensor:
        """Scores of the token behind the rows' own and the first `drafts`, from `logits` [B, W]."""
        logits = logits.to(dtype=torch.float32, device=input_ids.device, copy=True)
        if not len(logits_processor):
            return logits
        ahead = torch.stack(drafts, dim=1) if drafts else input_ids[:, :0]
        scores = torch.empty_like(logits)
        for count in set(rows.counts):  # whole batches, since a processor may know rows by their place
            prefixes = torch.cat((rows.tokens[:, : P + count], ahead), dim=1)
            mine = [row for row in range(B) if rows.counts[row] == count]
            scores[mine] = logits_processor(prefixes, logits)[mine]
        return scores

    with _states_of(model) as states:
        outputs = model._prefill(input_ids, generation_config, kwargs)
        hidden_states, logits = torch.cat(states, dim=1), outputs.logits[:, -1:]
        states.clear()
        forwarded = {name: value for name, value in kwargs.items() if name not in _OWN_KWARGS}
        begin = kwargs["position_ids"][:, -1].expand(B) + 1  # position of the first new token
        start = (begin - hidden_states.shape[1]).clamp(min=0)
        prompt = input_ids[:, P - hidden_states.shape[1] + 1 :]
        drafts: list[Tensor] = []
        q: list[Tensor] = []
        while True:
            scores = torch.stack([process(logits[:, i], drafts[:i]) for i in range(len(drafts) + 1)], dim=1)
            drafted = torch.stack(drafts, dim=1) if drafts else input_ids[:, :0]
            if sample:
                tokens, matches = verify_by_sampling(scores, drafted, torch.stack(q, 1) if q else scores[:, :0])
            else:
                tokens, matches = verify_greedily(scores, drafted)
            matches, before, open_rows = matches.tolist(), list(rows.counts), [not rows.is_done(b) for b in range(B)]
            added = rows.add(tokens, [match + 1 for match in matches])
            for row in (row for row in range(B) if open_rows[row] and drafts):
                speculation.count(len(drafts), min(matches[row], added[row]))
            recorded.add(scores, logits, added)
            if streamer is not None:
                for token in tokens[0, : added[0]].cpu().split(1):
                    streamer.put(token)

            kept, A = torch.tensor(added, device=input_ids.device), max(added)
            if prompt is None:
                cache.crop(A - len(drafts) - 1)
                mask = _hide(mask, cache.get_seq_length(), kept)
                hidden_states, tokens, first = hidden_states[:, :A], tokens[:, :A], begin + begin.new_tensor(before)
            else:
                cached = cache.get_seq_length()
                tokens, kept = torch.cat((prompt, tokens), dim=1), kept + prompt.shape[1]
                first, prompt = begin - prompt.shape[1], None
            if not rows.left():
                break

            number, q = min(drafter.depths, rows.left() - 1), []

            def choose(logits: Tensor, drafts: list[Tensor], q=q) -> Tensor:
                scores = process(logits, drafts)
                if not sample:
                    return scores.argmax(dim=-1)
                q.append(scores.softmax(dim=-1))
                return torch.multinomial(q[-1], 1).squeeze(1)

            places = (x.to(hidden_states.device) for x in (tokens, kept, first, start))
            drafts = drafter.draft(hidden_states, *places, number, choose)
            counts = begin.new_tensor(rows.counts)
            last = rows.tokens.gather(1, (P + counts - 1).unsqueeze(1))
            feed = torch.cat((last, *(draft.unsqueeze(1) for draft in drafts)), dim=1)
            ahead = torch.arange(feed.shape[1], device=feed.device)
            if mask is not None:
                mask = torch.cat((mask, mask.new_ones(feed.shape)), dim=1)
            outputs = model(
                input_ids=feed, attention_mask=mask, position_ids=(begin + counts - 1).unsqueeze(1) + ahead,
                past_key_values=cache, use_cache=True, return_dict=True, **forwarded,
            )  # fmt: skip
            hidden_states, logits = states.pop(), outputs.logits
            speculation.rounds += 1

    if streamer is not None:
        streamer.end()
    sequences = rows.sequences()
    new_tokens = sequences.shape[1] - P
    if B > 1 and (recorded.whole or getattr(cache, "_is_user_defined", False)):
        _close_holes(cache, mask, cached, cached + new_tokens - 1)
    return recorded.output(sequences, cache, new_tokens)
