"""The cache of `generate` by default: Transformers' DynamicCache, without a copy of everything at each step."""

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

# A buffer that is full is replaced by one with room for a quarter more, and at least so many tokens.
ROOM = 256


class GrowingLayer(DynamicLayer):
    """One layer: `keys` and `values` are the written beginnings of buffers with room for more tokens.

    Whoever replaces them (reordering, offloading) need not know: the next update copies what is no such beginning into
    a new buffer. What was cropped away is overwritten.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._buffers: list[Tensor | None] = [None, None]

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor):
        """Begin without tokens."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values = (states[..., :0, :] for states in (key_states, value_states))
        self._buffers = [None, None]
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Append [B, 1, T, ...] to both: in place where there is room, but by a copy where autograd may need them."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if torch.is_grad_enabled() and (key_states.requires_grad or self.keys.requires_grad):
            return super().update(key_states, value_states)
        self.keys = self._append(0, self.keys, key_states)
        self.values = self._append(1, self.values, value_states)
        return self.keys, self.values

    def reset(self):
        """Forget all tokens, and free the buffers."""
        self._buffers = [None, None]
        super().reset()

    def _append(self, which: int, written: Tensor, new: Tensor) -> Tensor:
        S, T = written.shape[-2], new.shape[-2]
        buffer = self._buffers[which]
        if buffer is None or buffer.shape[-2] < S + T or not _begins(buffer, written):
            buffer = new.new_empty((*new.shape[:2], S + T + max(ROOM, S // 4), new.shape[-1]))
            buffer[..., :S, :] = written
            self._buffers[which] = buffer
        buffer[..., S : S + T, :] = new
        return buffer[..., : S + T, :]


def _begins(buffer: Tensor, written: Tensor) -> bool:
    """Whether `written` is the beginning of `buffer`, sequence by sequence."""
    rows = written.shape[:2] == buffer.shape[:2] and written.stride() == buffer.stride()
    return rows and written.data_ptr() == buffer.data_ptr() and written.dtype == buffer.dtype


class GrowingCache(DynamicCache):
    """A DynamicCache whose full-attention layers grow in place: a step writes its own tokens and nothing else."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.layers = [_growing(layer) for layer in self.layers]
        if self.layer_class_to_replicate is DynamicLayer:
            self.layer_class_to_replicate = GrowingLayer


def _growing(layer):
    if type(layer) is not DynamicLayer:
        return layer
    grown = GrowingLayer()
    if layer.is_initialized:
        grown.update(layer.keys, layer.values)
    return grown
