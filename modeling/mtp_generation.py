"""Speculative generation with the multi-token-prediction layers: `generate(..., use_mtp=True)`, any batch size.

A round drafts a token with each depth, runs the model once over the last token and the drafts, and keeps the drafts
that the model agrees with and one token of its own. Greedy tokens are those without drafts, up to the rounding of
several tokens at once; sampled ones have the same distribution (arXiv 2211.17192, algorithm 1).

Rows of a batch keep different numbers of tokens, and caches have one length. So caches keep what the longest row of a
round kept, and a mask hides what the other rows did not: every cache can crop its end, and every attention takes a
mask, while caches of one length a row would need kernels and classes of their own. A batch of one has no such holes.

Where steps can be recorded (decode_graph.py), the model's forward of a round is one CUDA graph and each depth another;
so that one recording serves, the last rounds then draft as many tokens as the others and drop what is too much. The
host waits once a round, for the tokens and how many are kept.

Letters: B rows, P tokens of the prompt, D hidden, W vocabulary, n drafts of a round.
"""

from collections.abc import Iterator
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

from .cache import GrowingLayer
from .decode_graph import replayed_tokens, settle
from .float8 import as_bytes
from .mtp_drafts import Drafter

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


class _Rows:
    """The tokens of each row, and when it stops."""

    def __init__(self, input_ids: Tensor, stopping_criteria, pad_token_id: int | None):
        self.criteria = [c for c in stopping_criteria if not isinstance(c, EosTokenCriteria | MaxLengthCriteria)]
        ends = [c.eos_token_id for c in stopping_criteria if isinstance(c, EosTokenCriteria)]
        self.ends = {token for tokens in ends for token in tokens.flatten().tolist()}
        self.pads = bool(ends)  # as Transformers has it: without an end token a stopped row goes on beside the others
        self.longest = stopping_criteria.max_length
        B, self.prompt = input_ids.shape
        self.words: list[list[int]] = [[] for _ in range(B)]  # generated tokens
        self.stops: list[int | None] = [None] * B  # after how many of them the row stops
        self._tokens = input_ids.new_full((B, self.longest), 0 if pad_token_id is None else pad_token_id)
        self._tokens[:, : self.prompt] = input_ids
        self._written = [0] * B

    def counts(self) -> list[int]:
        """How many tokens each row has generated."""
        return [len(words) for words in self.words]

    def tokens(self) -> Tensor:
        """[B, longest]: prompts, generated tokens, and padding behind them."""
        for row, words in enumerate(self.words):
            begin, self._written[row] = self._written[row], len(words)
            if begin < len(words):
                new = self._tokens.new_tensor(words[begin:])
                self._tokens[row, self.prompt + begin : self.prompt + len(words)] = new
        return self._tokens

    def add(self, words: list[list[int]], offered: list[int]) -> list[int]:
        """Add of each row's `words` the first `offered`, or fewer where it stops; how many they were."""
        before = self.counts()
        for row, count in enumerate(offered):
            for word in words[row][:count]:
                if self.is_done(row):
                    break
                self._add(row, word)
        return [len(words) - begin for words, begin in zip(self.words, before, strict=True)]

    def _add(self, row: int, word: int):
        self.words[row].append(word)
        if self.stops[row] is None:
            width = self.prompt + len(self.words[row])
            stops = word in self.ends or width >= self.longest
            if stops or any(bool(c(self.tokens()[row : row + 1, :width], None).all()) for c in self.criteria):
                self.stops[row] = len(self.words[row])

    def is_done(self, row: int) -> bool:
        """Whether the row needs no more tokens."""
        if self.stops[row] is None:
            return False
        if self.pads or self.prompt + len(self.words[row]) >= self.longest:
            return True
        return None not in self.stops and len(self.words[row]) >= max(self.stops)

    def left(self) -> int:
        """The most tokens that a row may still need."""
        lengths = [self.prompt + len(words) for row, words in enumerate(self.words) if not self.is_done(row)]
        return max((self.longest - length for length in lengths), default=0)

    def sequences(self) -> Tensor:
        """What `generate` returns, [B, prompt + tokens of the longest row]."""
        return self.tokens()[:, : self.prompt + max(self.stops)]


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


def _verified(
    model, ids: Tensor, mask: Tensor | None, positions: Tensor, cache, arguments: dict, recorded: bool
) -> tuple[Tensor, Tensor]:
    """The model's states after the last norm [B, n + 1, D] and logits [B, n + 1, W]; by a CUDA graph if it may be."""
    found = replayed_tokens(model, ids, mask, positions, cache, arguments) if recorded else None
    if found is not None:
        return found[0], found[1].clone()
    with _states_of(model) as states:
        outputs = model(
            input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True,
            return_dict=True, **arguments,
        )  # fmt: skip
    return states.pop(), outputs.logits


def _hide(mask: Tensor | None, cached: int, kept: Tensor, added: list[int]) -> Tensor | None:
    """The mask [B, cached] after a round, of whose columns, the last ones, each row has the first `kept` [B].

    Args:
        added: the same numbers for the host.
    """
    longest = max(added)
    if mask is None and min(added) == longest:
        return None
    shown = torch.arange(longest, device=kept.device) < kept.unsqueeze(1)
    if mask is None:
        mask = shown.new_ones(len(kept), cached - longest, dtype=torch.int64)
    return torch.cat((mask[:, : cached - longest], shown.to(mask.dtype)), dim=1)


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
                as_bytes(x).gather(2, index.expand(-1, x.shape[1], -1, x.shape[3])).view(x.dtype)
                for x in (layer.keys, layer.values)
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

    def process(logits: Tensor, drafts: Tensor) -> Tensor:
        """Scores of the token behind the rows' own and `drafts` [B, i], from `logits` [B, W]."""
        logits = logits.to(dtype=torch.float32, device=input_ids.device, copy=True)
        if not len(logits_processor):
            return logits
        scores, counts = torch.empty_like(logits), rows.counts()
        for count in set(counts):  # whole batches, since a processor may know rows by their place
            prefixes = torch.cat((rows.tokens()[:, : P + count], drafts), dim=1)
            mine = [row for row in range(B) if counts[row] == count]
            scores[mine] = logits_processor(prefixes, logits)[mine]
        return scores

    with _states_of(model) as states:
        outputs = model._prefill(input_ids, generation_config, kwargs)
    if getattr(cache, "recorded", None) is False:
        cache.recorded = None  # a prompt of one token met the hook above, which says nothing of the rounds
    hidden_states, logits = torch.cat(states, dim=1), outputs.logits[:, -1:]
    del states, outputs
    if B == 1 and mask is not None and mask.dim() == 2 and bool(mask.all()):
        mask = None  # it would only cost launches
    forwarded = {name: value for name, value in kwargs.items() if name not in _OWN_KWARGS}
    begin = kwargs["position_ids"][:, -1].expand(B) + 1  # position of the first token that a round adds
    start = (begin - hidden_states.shape[1]).clamp(min=0)
    ahead = torch.arange(drafter.depths + 1, device=begin.device)
    prompt = input_ids[:, P - hidden_states.shape[1] + 1 :]
    cached = cache.get_seq_length()
    drafts, q = input_ids[:, :0], []
    while True:
        n, steady = drafts.shape[1], bool(getattr(cache, "recorded", None))
        if len(logits_processor):
            scores = torch.stack([process(logits[:, i], drafts[:, :i]) for i in range(n + 1)], dim=1)
        else:
            scores = logits.to(dtype=torch.float32, device=input_ids.device)
        if sample:
            tokens, matches = verify_by_sampling(scores, drafts, torch.stack(q, 1) if q else scores[:, :0])
        else:
            tokens, matches = verify_greedily(scores, drafts)
        host = torch.cat((tokens, matches.unsqueeze(1)), dim=1).tolist()  # all that the host waits for
        offered, open_rows = [row[-1] + 1 for row in host], [not rows.is_done(b) for b in range(B)]
        needed = min(n, rows.left() - 1)
        added = rows.add(host, offered)
        for row in (row for row in range(B) if open_rows[row] and needed):
            speculation.count(needed, min(offered[row] - 1, added[row], needed))
        recorded.add(scores, logits, added)
        if streamer is not None:
            for token in torch.tensor(host[0][: added[0]]).split(1):
                streamer.put(token)

        kept = matches + 1 if added == offered else matches.new_tensor(added)
        first, longest, begin = begin, max(added), begin + kept.to(begin.device)
        if prompt is None:
            cache.crop(longest - n - 1)
            mask = _hide(mask, cache.get_seq_length(), kept, added)
            if not steady:
                hidden_states, tokens = hidden_states[:, :longest], tokens[:, :longest]
        else:
            length = prompt.shape[1]
            tokens, kept, longest = torch.cat((prompt, tokens), dim=1), kept + length, longest + length
            first, prompt = first - length, None
        if not rows.left():
            break

        q = []

        def choose(logits: Tensor, drafts: list[Tensor], q=q) -> Tensor:
            scores = process(logits, torch.stack(drafts, dim=1) if drafts else input_ids[:, :0])
            if not sample:
                return scores.argmax(dim=-1)
            q.append(scores.softmax(dim=-1))
            return torch.multinomial(q[-1], 1).squeeze(1)

        number = drafter.depths if steady else min(drafter.depths, rows.left() - 1)
        places = (x.to(hidden_states.device) for x in (tokens, kept, first, start))
        likeliest = not sample and not len(logits_processor)
        found = drafter.draft(hidden_states, *places, longest, number, steady, None if likeliest else choose)
        last = tokens.gather(1, (kept - 1).clamp(min=0).unsqueeze(1))
        feed = torch.cat((last, *(draft.to(last.device).unsqueeze(1) for draft in found)), dim=1)
        drafts = feed[:, 1:]
        if mask is not None:
            mask = torch.cat((mask, mask.new_ones(feed.shape)), dim=1)
        positions = (begin - 1).unsqueeze(1) + ahead[: number + 1]
        full = number == drafter.depths
        hidden_states, logits = _verified(model, feed, mask, positions, cache, forwarded, full)
        speculation.rounds += 1

    settle(model, cache)
    if streamer is not None:
        streamer.end()
    sequences = rows.sequences()
    new_tokens = sequences.shape[1] - P
    if B > 1 and (recorded.whole or getattr(cache, "_is_user_defined", False)):
        _close_holes(cache, mask, cached, cached + new_tokens - 1)
    return recorded.output(sequences, cache, new_tokens)
