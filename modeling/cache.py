"""The cache of `generate` by default: Transformers' DynamicCache, without a copy of everything at each step."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

# A buffer that is full is replaced by one with room for a quarter more, and at least so many tokens.
ROOM = 256


class GrowingLayer(DynamicLayer):
    """One layer: `keys` and `values` are the written beginnings of buffers with room for more tokens.

    Whoever sets them (reordering, offloading) need not know: what is set has no room, and the next update moves it to
    buffers that have. What was cropped away is overwritten.
    """

    def __init__(self, *args, **kwargs):
        self._buffers: list[Tensor | None] = [None, None]
        self._length = 0
        self.least_room = 0  # tokens for which buffers are made from the start
        self.version = 0  # counts replaced buffers
        self.cursor: Tensor | None = None  # [1]; see GrowingCache.cursor_at
        super().__init__(*args, **kwargs)

    @property
    def keys(self) -> Tensor | None:
        """[B, 1, S, C], or None before the first update."""
        return self._written(0)

    @keys.setter
    def keys(self, states: Tensor | None):
        self._replace(0, states)

    @property
    def values(self) -> Tensor | None:
        """[B, 1, S, R], or None before the first update."""
        return self._written(1)

    @values.setter
    def values(self, states: Tensor | None):
        self._replace(1, states)

    def _written(self, which: int) -> Tensor | None:
        buffer = self._buffers[which]
        return buffer if buffer is None else buffer[..., : self._length, :]

    def _replace(self, which: int, states: Tensor | None):
        self._buffers[which] = states
        self._length = 0 if states is None else states.shape[-2]
        self.version += 1

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor):
        """Begin without tokens."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values = (states[..., :0, :] for states in (key_states, value_states))
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Append [B, 1, T, ...] to both: in place where there is room, but by a copy where autograd may need them."""
        new = (key_states, value_states)
        if self.cursor is not None:
            at = self.cursor + torch.arange(key_states.shape[-2], device=key_states.device)
            first, second = (b.index_copy_(2, at, x) for b, x in zip(self._buffers, new, strict=True))
            return first, second
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if torch.is_grad_enabled() and (key_states.requires_grad or self.keys.requires_grad):
            return super().update(key_states, value_states)
        S, T = self._length, key_states.shape[-2]
        self.make_room(T)
        for buffer, states in zip(self._buffers, new, strict=True):
            buffer[..., S : S + T, :] = states
        self.advance(T)
        return self.keys, self.values

    def holds(self, x: Tensor) -> bool:
        """Whether the layer has tokens of x's [B, T, D] batch size, dtype and device, in whole buffers."""
        return all(
            b is not None
            and b.shape[0] == len(x)
            and b.dtype == x.dtype
            and b.device == x.device
            and b.is_contiguous()
            for b in self._buffers
        )

    def begin_write(self, tokens: int) -> tuple[Tensor, Tensor]:
        """Both buffers [B, room, C] and [B, room, R], for a kernel that writes so many `tokens` behind the last."""
        if self.cursor is None:
            self.make_room(tokens)
            self.advance(tokens)
        return self._buffers[0].squeeze(1), self._buffers[1].squeeze(1)

    @property
    def room(self) -> int:
        """Tokens that the buffers can hold."""
        return self._buffers[0].shape[-2]

    def make_room(self, tokens: int):
        """Move to longer buffers unless there is room for so many more `tokens`."""
        S = self._length
        if self.room >= S + tokens:
            return
        room = max(S + tokens + max(ROOM, S // 4), self.least_room)
        for which, old in enumerate(self._buffers):
            longer = old.new_empty((*old.shape[:2], room, old.shape[-1]))
            longer[..., :S, :] = old[..., :S, :]
            self._buffers[which] = longer
        self.version += 1

    def advance(self, tokens: int):
        """Count `tokens` that were written behind the last one."""
        self._length += tokens

    def get_seq_length(self) -> int:
        """Tokens in the cache."""
        return self._length

    def crop(self, tokens_to_remove: int):
        """Forget the last tokens; a negative number, as Transformers has it."""
        if tokens_to_remove > 0:
            super().crop(tokens_to_remove)  # says what it thinks of that
        self._length -= min(-tokens_to_remove, self._length)


class GrowingCache(DynamicCache):
    """A DynamicCache whose full-attention layers grow in place: a step writes its own tokens and nothing else.

    Args:
        room: tokens for which there is memory from the start.
    """

    def __init__(self, *args, room: int = 0, **kwargs):
        super().__init__(*args, **kwargs)
        self.layers = [_growing(layer) for layer in self.layers]
        for layer in self.layers:
            if type(layer) is GrowingLayer:
                layer.least_room = room
        if self.layer_class_to_replicate is DynamicLayer:
            self.layer_class_to_replicate = GrowingLayer
        self.cursor: Tensor | None = None
        self.steps, self.recorded = 0, None  # decode_graph.py's: steps seen, and what it recorded of them

    def __deepcopy__(self, memo):
        """A copy of the tokens; what was recorded belongs to this cache's own memory."""
        other = memo[id(self)] = type(self).__new__(type(self))
        other.__dict__.update(copy.deepcopy({**vars(self), "recorded": None}, memo))
        return other

    @contextmanager
    def cursor_at(self, cursor: Tensor) -> Iterator[None]:
        """Inside, tokens are written behind `cursor` [1] int64 on the device, updates return the whole buffers, and
        lengths are the cursor: a step that a CUDA graph can record. Every layer needs room."""
        users = (self, *self.layers)
        try:
            for user in users:
                user.cursor = cursor
            yield
        finally:
            for user in users:
                user.cursor = None

    def get_seq_length(self, layer_idx: int = 0) -> int | Tensor:
        """Tokens in a layer; inside `cursor_at`, the cursor."""
        return super().get_seq_length(layer_idx) if self.cursor is None else self.cursor[0]


def _growing(layer):
    if type(layer) is not DynamicLayer:
        return layer
    grown = GrowingLayer()
    if layer.is_initialized:
        grown.update(layer.keys, layer.values)
    return grown
