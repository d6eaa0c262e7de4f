"""The growing cache: a DynamicCache in all that it shows, without copies where there is room."""

import copy

import pytest
import torch
from transformers import DynamicCache

from lamoe import LamoeConfig, cache
from lamoe.cache import GrowingCache

CONFIG = LamoeConfig.from_preset("tiny")


def filled(make=GrowingCache, tokens=5, batch=2, seed=0):
    """A cache with `tokens` of random numbers in every layer."""
    made = make(config=CONFIG)
    append(made, tokens, batch, seed)
    return made


def append(made, tokens, batch=2, seed=1):
    generator = torch.Generator().manual_seed(seed)
    for i in range(CONFIG.num_hidden_layers):
        made.update(*(torch.randn(batch, 1, tokens, width, generator=generator) for width in (6, 4)), i)


def assert_equal(ours, theirs):
    assert ours.get_seq_length() == theirs.get_seq_length()
    for mine, other in zip(ours.layers, theirs.layers, strict=True):
        assert torch.equal(mine.keys, other.keys) and torch.equal(mine.values, other.values)


CHANGES = {
    "crop": lambda c: c.crop(-2),
    "crop everything": lambda c: c.crop(-9),
    "crop nothing": lambda c: c.crop(0),
    "reorder": lambda c: c.reorder_cache(torch.tensor([1, 0])),
    "repeat": lambda c: c.batch_repeat_interleave(2),
    "select": lambda c: c.batch_select_indices(torch.tensor([1])),
}


@pytest.mark.parametrize("change", CHANGES)
def test_equal_to_a_dynamic_cache(change):
    ours, theirs = filled(), filled(DynamicCache)
    for made in (ours, theirs):
        append(made, 1)
        CHANGES[change](made)
    if change != "crop everything":  # a DynamicCache has nothing to append to then
        assert_equal(ours, theirs)
    batch = ours.layers[0].keys.shape[0]
    for tokens in (1, 3, 1):
        for made in (ours, theirs):
            append(made, tokens, batch, seed=tokens)
        assert_equal(ours, theirs)


def test_a_step_writes_in_place_until_the_buffer_is_full(monkeypatch):
    monkeypatch.setattr(cache, "ROOM", 4)
    made = filled(tokens=8)  # room for 8 + 4
    layer = made.layers[0]
    at, version = layer.keys.data_ptr(), layer.version
    for _ in range(4):
        append(made, 1)
        assert layer.keys.data_ptr() == at and layer.version == version
    append(made, 1)
    assert layer.keys.data_ptr() != at and layer.version == version + 1
    assert layer.keys.shape[-2] == 13


def test_cropping_keeps_the_room():
    made = filled()
    append(made, 1)
    at = made.layers[0].keys.data_ptr()
    for _ in range(3):
        made.crop(-2)
        append(made, 2)
    assert made.layers[0].keys.data_ptr() == at


def test_crop_refuses_positive_numbers_as_transformers_does():
    with pytest.raises(ValueError, match="is not supported"):
        filled().crop(3)


def test_reset_and_use_again():
    made = filled()
    made.reset()
    assert made.get_seq_length() == 0 and made.layers[0].keys is None
    append(made, 2)
    assert made.get_seq_length() == 2


def test_a_deep_copy_is_independent():
    made = filled()
    made.recorded = object()
    twin = copy.deepcopy(made)
    assert twin.recorded is None
    append(twin, 1)
    assert made.get_seq_length() == 5 and twin.get_seq_length() == 6
    assert_equal(made, filled())


def test_data_at_construction_is_kept():
    layers = [(torch.randn(2, 1, 3, 6), torch.randn(2, 1, 3, 4)) for _ in range(CONFIG.num_hidden_layers)]
    assert_equal(GrowingCache(layers, config=CONFIG), DynamicCache(layers, config=CONFIG))


def test_gradients_flow_through_cached_states():
    made = GrowingCache(config=CONFIG)
    first = torch.randn(1, 1, 2, 6, requires_grad=True)
    made.update(first, torch.randn(1, 1, 2, 4), 0)
    keys, _ = made.update(torch.randn(1, 1, 1, 6), torch.randn(1, 1, 1, 4), 0)
    keys.sum().backward()
    assert torch.equal(first.grad, torch.ones_like(first))


def test_behind_a_cursor_whole_buffers_are_written():
    made, plain = filled(), filled()
    append(plain, 1)
    for layer in made.layers:
        layer.make_room(1)
    with made.cursor_at(torch.tensor([5])):
        assert made.get_seq_length() == 5
        append(made, 1)
    assert made.get_seq_length() == 5 and made.cursor is None
    for layer in made.layers:
        layer.advance(1)
    assert_equal(made, plain)
