"""Latents in float8: their rounding, the cache that holds them, and `generate` with it."""

import copy

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer
from transformers.utils import logging

from lamoe import LamoeConfig
from lamoe.cache import GrowingCache
from lamoe.float8 import COLUMNS, FLOAT8, as_bytes, dequantised, quantised, scales_of
from tests.test_cache import CHANGES
from tests.test_generation import batched, generate, with_scores
from tests.tiny import lamoe_model, random_ids

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]


class RoundedLayer(DynamicLayer):
    """Holds the latents that float8 would give back, in their own dtype: what a cache in float8 has to equal."""

    def update(self, key_states, value_states, *args, **kwargs):
        return super().update(dequantised(*quantised(key_states, value_states))[0], value_states)


def rounded_cache(config) -> DynamicCache:
    cache = DynamicCache(config=config)
    cache.layers = [RoundedLayer() for _ in cache.layers]
    return cache


def float8_cache(config) -> GrowingCache:
    return GrowingCache(config=config, latent_dtype=FLOAT8)


def latents(dtype, *shape):
    """Rows of all magnitudes that `dtype` has, and keys."""
    c = torch.randn(*shape, 24, dtype=torch.float64)
    powers = torch.linspace(-20, 13, c.shape[-2]) if dtype == torch.float16 else torch.linspace(-110, 122, c.shape[-2])
    return (c * torch.exp2(powers.double()).unsqueeze(-1)).to(dtype), torch.randn(*shape, 6).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rounding(dtype):
    """Each number within one part in 16, or 2**-17 of its row's largest; scales are the least powers of two."""
    c, k = latents(dtype, 2, 1, 40)
    c8, values = quantised(c, k)
    assert c8.dtype == FLOAT8 and values.dtype == dtype and values.shape == (2, 1, 40, 6 + COLUMNS)
    scales, largest = scales_of(values, 6).double(), c.double().abs().amax(-1)
    assert torch.equal(scales.log2().frac(), torch.zeros_like(scales))
    assert (largest / scales <= 448).all() and (largest / scales > 224).all()
    back, keys = dequantised(c8, values)
    assert back.dtype == dtype and torch.equal(keys, k)
    exact = c8.double() * scales.unsqueeze(-1)
    if dtype != torch.float16:  # whose smallest numbers have few bits
        assert torch.equal(back.double(), exact)
    error = (exact - c.double()).abs()
    assert (error <= torch.maximum(c.double().abs() / 16, largest.unsqueeze(-1) * 2**-17)).all()
    back, c = (x.double() / scales.unsqueeze(-1) for x in (back, c))
    assert (back - c).norm() < 0.03 * c.norm()


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
def test_extremes_stay_finite(dtype):
    info = torch.finfo(dtype)
    rows = [0.0, info.max, -info.max, info.tiny, info.smallest_normal, 448.0, 449.0, 464.0, 465.0, 480.0]
    c = torch.tensor(rows, dtype=dtype).unsqueeze(1).expand(-1, 8).clone()
    c[:, 3:] = 0
    back = dequantised(*quantised(c, c[:, :2]))[0]
    assert back.isfinite().all() and not back[0].any()
    torch.testing.assert_close(back[1:], c[1:], rtol=1 / 15, atol=0.0)


def test_what_is_not_finite_stays_so():
    c = torch.ones(3, 8)
    c[1, 2], c[2, 3] = float("nan"), float("inf")
    back = dequantised(*quantised(c, c[:, :2]))[0]
    assert back[0].isfinite().all() and not back[1:].isfinite().any()


# The cache.

CONFIG = LamoeConfig.from_preset("tiny")


def append(cache, tokens, batch=2, seed=1):
    generator = torch.Generator().manual_seed(seed)
    for i in range(CONFIG.num_hidden_layers):
        last = cache.update(*(torch.randn(batch, 1, tokens, width, generator=generator) for width in (6, 4)), i)
    return last


class NoIndicesOfFloat8(TorchDispatchMode):
    """Refuses what not every release of PyTorch does to float8 on every device."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        named = any(part in str(function) for part in ("index", "gather", "scatter", "where", "masked"))
        assert not named or FLOAT8 not in {x.dtype for x in tree_leaves(args) if isinstance(x, torch.Tensor)}, function
        return function(*args, **(kwargs or {}))


def assert_equal(ours, rounded):
    assert ours.get_seq_length() == rounded.get_seq_length()
    for mine, other in zip(ours.layers, rounded.layers, strict=True):
        c, k = dequantised(mine.keys, mine.values)
        assert torch.equal(c, other.keys) and torch.equal(k, other.values)


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_cache_goes_on(change):
    ours, rounded = float8_cache(CONFIG), rounded_cache(CONFIG)
    for made in (ours, rounded):
        append(made, 5, seed=0)
        append(made, 1)
        with NoIndicesOfFloat8():
            CHANGES[change](made)
    if change != "crop everything":  # a DynamicCache has nothing to append to then
        assert_equal(ours, rounded)
    batch = ours.layers[0].keys.shape[0]
    for tokens in (1, 300, 1):  # more than there is room for
        found = [append(made, tokens, batch, seed=tokens) for made in (ours, rounded)]
        assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
        assert_equal(ours, rounded)


def test_behind_a_cursor_and_in_a_copy():
    ours, plain = float8_cache(CONFIG), float8_cache(CONFIG)
    for made in (ours, plain):
        append(made, 5, seed=0)
    expected = append(plain, 2)
    for layer in ours.layers:
        layer.make_room(2)
    with ours.cursor_at(torch.tensor([5])), NoIndicesOfFloat8():
        whole = append(ours, 2)
    assert all(torch.equal(a[:, :, :7], b) for a, b in zip(whole, expected, strict=True))
    for layer in ours.layers:
        layer.advance(2)
    twin = copy.deepcopy(ours)
    append(ours, 1)
    for mine, other in zip(twin.layers, plain.layers, strict=True):
        assert torch.equal(as_bytes(mine.keys), as_bytes(other.keys)) and torch.equal(mine.values, other.values)


def test_offloading_and_layers_made_when_they_are_needed():
    ours, plain = GrowingCache(latent_dtype=FLOAT8), float8_cache(CONFIG)
    for made in (ours, plain):
        append(made, 3)
        made.layers[0].offload()
        made.layers[0].prefetch()
    assert all(torch.equal(a, b) for a, b in zip(append(ours, 1), append(plain, 1), strict=True))
    assert ours.layers[0].keys.dtype == FLOAT8


def test_refusals():
    with pytest.raises(ValueError, match=r"latent_dtype=torch.int8 is neither torch.float8_e4m3fn nor None"):
        GrowingCache(latent_dtype=torch.int8)
    states = torch.randn(1, 1, 2, 6, requires_grad=True), torch.randn(1, 1, 2, 4)
    with pytest.raises(ValueError, match=r"have no gradient: call the model under torch.no_grad\(\), or use a cach"):
        float8_cache(CONFIG).update(*states, 0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_bytes_a_token(dtype):
    config = LamoeConfig.from_preset("v2-lite", latent_cache_dtype="float8_e4m3fn", num_hidden_layers=2)
    cache = float8_cache(config)
    for i in range(2):
        cache.update(torch.randn(3, 1, 7, 512, dtype=dtype), torch.randn(3, 1, 7, 64, dtype=dtype), i)
    held = sum(part.nbytes for layer in cache.layers for part in (layer.keys, layer.values))
    assert held == 3 * 7 * 2 * (512 + (64 + 8) * dtype.itemsize) == 3 * 7 * config.kv_bytes_per_token(dtype.itemsize)
    assert config.kv_bytes_per_token() == 2 * 656


# The model.


@pytest.fixture(scope="module", params=["v2-lite", "v3", "glm-4.7-flash"])
def ours(request, tmp_path_factory):
    return lamoe_model(request.param, tmp_path_factory.mktemp("checkpoint"), torch.float32, initializer_range=0.1)[1]


@torch.no_grad()
def logits(model, cache, ids, pieces, **inputs):
    parts = [model(part, past_key_values=cache, **inputs).logits for part in ids.split(pieces, 1)]
    return torch.cat(parts, dim=1)


@pytest.mark.parametrize("form", ["auto", "expanded", "absorbed"])
def test_logits_are_those_over_rounded_latents_and_near_the_exact_ones(ours, form):
    ids, pieces = random_ids(2, 24), [12, 1, 1, 6, *[1] * 4]
    got = logits(ours, float8_cache(ours.config), ids, pieces, mla_form=form)
    torch.testing.assert_close(got, logits(ours, rounded_cache(ours.config), ids, pieces, mla_form=form))
    exact = logits(ours, GrowingCache(config=ours.config), ids, pieces, mla_form=form)
    assert not torch.equal(got, exact)
    assert torch.cosine_similarity(got.flatten(), exact.flatten(), dim=0) > 0.99  # some tokens choose other experts


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_beams": 4, "num_return_sequences": 3},
        {"prefill_chunk_size": 4},
        {"padding": 4},
        {"prompt_lookup_num_tokens": 3},
    ],
    ids=["greedy", "beams", "chunked-prefill", "left-padding", "prompt-lookup"],
)
def test_generate_as_over_rounded_latents(ours, options, monkeypatch):
    padding = options.get("padding", 0)
    rows = 1 if "prompt_lookup_num_tokens" in options else 2
    ids = random_ids(rows, 11)
    mask = torch.ones_like(ids)
    mask[0, :padding] = 0
    options = {"attention_mask": mask, **{name: x for name, x in options.items() if name != "padding"}}
    expected = with_scores(ours, ids, past_key_values=rounded_cache(ours.config), **options)
    monkeypatch.setattr(ours.config, "latent_cache_dtype", "float8_e4m3fn")
    got = with_scores(ours, ids, **options)
    assert type(got.past_key_values) is GrowingCache and got.past_key_values.layers[0].keys.dtype == FLOAT8
    assert torch.equal(got.sequences, expected.sequences)
    torch.testing.assert_close(got.logits, expected.logits)


def test_other_caches_say_once_that_they_ignore_it(ours, monkeypatch):
    said = []
    monkeypatch.setattr(ours.config, "latent_cache_dtype", "float8_e4m3fn")
    monkeypatch.setattr(logging.get_logger("lamoe.generation"), "warning", said.append)
    ids = random_ids(1, 5)
    generate(ours, ids, max_new_tokens=2)
    generate(ours, ids, max_new_tokens=2, use_cache=False)
    assert not said
    for _ in range(2):
        generate(ours, ids, max_new_tokens=2, past_key_values=DynamicCache(config=ours.config))
    assert said == [
        "latent_cache_dtype='float8_e4m3fn' is for generate's default cache; this DynamicCache holds latents in its "
        "own dtype."
    ]
    generate(ours, ids, max_new_tokens=2, cache_implementation="static", disable_compile=True)
    assert len(said) == 2 and "this StaticCache" in said[1]
    batched(ours, [[5, 6, 7]])
    assert len(said) == 3 and "this paged cache" in said[2]


def test_forward_and_training_do_not_look_at_it(ours, monkeypatch):
    monkeypatch.setattr(ours.config, "latent_cache_dtype", "float8_e4m3fn")
    out = ours(random_ids(1, 5))
    assert out.past_key_values.layers[0].keys.dtype == torch.float32
    out.logits.sum().backward()
    ours.zero_grad()
