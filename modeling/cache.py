"""The cache of `generate` by default: Transformers' DynamicCache, without a copy of everything at each step."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

from .float8 import FLOAT8, as_bytes, dequantised, quantised

# A buffer that is full is replaced by one with room for a quarter more, and at least so many tokens.
ROOM = 256


class GrowingLayer(DynamicLayer):
    """One layer: `keys` and `values` are the written beginnings of buffers with room for more tokens.

    Whoever sets them (reordering, offloading) need not know: what is set has no room, and the next update moves it to
    buffers that have. What was cropped away is overwritten.

    Args:
        latent_dtype: of `keys`; None is the model's, float8_e4m3fn is with a scale a token in `values` (float8.py).
    """

    def __init__(self, *args, latent_dtype: torch.dtype | None = None, **kwargs):
        self.latent_dtype = latent_dtype
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
        """[B, 1, S, R], of latents in float8 [B, 1, S, R + 8], or None before the first update."""
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
        """Append [B, 1, T, ...] to both: in place where there is room, but by a copy where autograd may need them.

        Returns:
            all latents and keys, [B, 1, S, C] and [B, 1, S, R]; those in float8 as they are read from it.

        Raises:
            ValueError: autograd would need latents in float8.
        """
        grows = self.cursor is None and torch.is_grad_enabled()
        if grows and (key_states.requires_grad or (self.is_initialized and self.keys.requires_grad)):
            return self._kept_for_gradients(key_states, value_states)
        new = (key_states, value_states) if self.latent_dtype is None else quantised(key_states, value_states)
        if self.cursor is not None:
            at = self.cursor + torch.arange(key_states.shape[-2], device=key_states.device)
            for buffer, states in zip(self._buffers, new, strict=True):
                as_bytes(buffer).index_copy_(2, at, as_bytes(states))
            return self._read(*self._buffers)
        if not self.is_initialized:
            self.lazy_initialization(*new)
        S, T = self._length, key_states.shape[-2]
        self.make_room(T)
        for buffer, states in zip(self._buffers, new, strict=True):
            buffer[..., S : S + T, :] = states
        self.advance(T)
        return self._read(self.keys, self.values)

    def _read(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        return (keys, values) if self.latent_dtype is None else dequantised(keys, values)

    def _kept_for_gradients(self, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        if self.latent_dtype is not None:
            raise ValueError(
                f"Latents in {self.latent_dtype} have no gradient: call the model under torch.no_grad(), or use a "
                "cache without latent_dtype."
            )
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        return super().update(key_states, value_states)

    def reorder_cache(self, beam_idx: Tensor):
        """Take the rows `beam_idx` [B]."""
        self._change_rows(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int):
        """Repeat each row."""
        self._change_rows(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor):
        """Keep the rows `indices`."""
        self._change_rows(lambda x: x[indices, ...])

    def _change_rows(self, change: Callable[[Tensor], Tensor]):
        if self._length > 0:
            self.keys, self.values = (change(as_bytes(x)).view(x.dtype) for x in (self.keys, self.values))

    def holds(self, x: Tensor) -> bool:
        """Whether the layer has tokens of x's [B, T, D] batch size, dtype and device, in whole buffers."""
        return all(
            b is not None and b.shape[0] == len(x) and b.dtype == dtype and b.device == x.device and b.is_contiguous()
            for b, dtype in zip(self._buffers, (self.latent_dtype or x.dtype, x.dtype), strict=True)
        )

    def begin_write(self, tokens: int) -> tuple[Tensor, Tensor]:
        """Both buffers, as they are, without the axis of heads: for a kernel that writes so many `tokens` behind the
        last."""
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
        latent_dtype: float8_e4m3fn holds latents in half the bytes of bfloat16, with a scale a token: see float8.py.
            What attends to them reads the rounded ones. Without gradients. None is the model's dtype.

    Raises:
        ValueError: `latent_dtype` is something else.
    """

    def __init__(self, *args, room: int = 0, latent_dtype: torch.dtype | None = None, **kwargs):
        if latent_dtype not in (None, FLOAT8):
            raise ValueError(f"latent_dtype={latent_dtype} is neither {FLOAT8} nor None, which is the model's.")
        super().__init__(*args, **kwargs)
        self.latent_dtype = latent_dtype
        self.layers = [_growing(layer, latent_dtype) for layer in self.layers]
        for layer in self.layers:
            if type(layer) is GrowingLayer:
                layer.least_room = room
        if self.layer_class_to_replicate is DynamicLayer:
            self.layer_class_to_replicate = partial(GrowingLayer, latent_dtype=latent_dtype)
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


def default_cache(config, room: int = 0) -> GrowingCache:
    """What `generate` takes by itself: latents in `config.latent_cache_dtype`."""
    dtype = config.latent_cache_dtype
    return GrowingCache(config=config, room=room, latent_dtype=dtype and getattr(torch, dtype))


def _growing(layer, latent_dtype: torch.dtype | None):
    if type(layer) is not DynamicLayer:
        return layer
    grown = GrowingLayer(latent_dtype=latent_dtype)
    if layer.is_initialized:
        grown.update(layer.keys, layer.values)
    return grown
