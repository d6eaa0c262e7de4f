"""What the caches hold, how large it is, and that every way to cut, reorder, mask and pad them gives equal results."""

import pytest
import torch
from transformers import DynamicCache, QuantizedCache, StaticCache

from lamoe import LamoeConfig, LamoeModel
from tests.tiny import KV_BYTES, lamoe_model, random_ids

CLOSE = {"rtol": 1e-3, "atol": 1e-3}  # float32 on logits of about 10


@pytest.fixture(scope="module", params=["v2-lite", "v3", "glm-4.7-flash"])
def pair(request, tmp_path_factory):
    return lamoe_model(request.param, tmp_path_factory.mktemp("checkpoint"), torch.float32)


@pytest.fixture(params=["sdpa", "eager"])
def models(request, pair):
    """Native and ours, with an attention implementation."""
    for model in pair:
        model.set_attn_implementation(request.param)
    yield pair
    for model in pair:
        model.set_attn_implementation("sdpa")


def new_cache(kind: str, model, length: int = 40):
    if kind == "static":
        return StaticCache(config=model.config, max_cache_len=length)
    return DynamicCache(config=model.config)


@torch.no_grad()
def logits(model, ids, cache=None, **inputs):
    return model(ids, past_key_values=cache, use_cache=cache is not None, **inputs).logits


@pytest.mark.parametrize("name", KV_BYTES)
def test_published_bytes_a_token(name):
    config = LamoeConfig.from_preset(name)
    latent, expanded = KV_BYTES[name]
    assert config.kv_bytes_per_token() == latent
    assert config.kv_bytes_per_token(4) == 2 * latent
    if expanded:
        assert config.kv_bytes_per_token(expanded=True) == expanded


def test_every_published_preset_is_counted():
    assert set(LamoeConfig.presets()) == {*KV_BYTES, "tiny"}


def cached_tensors(cache):
    """The tensors that hold a cache's tokens; scales and zero points of quantised ones aside."""
    for layer in cache.layers:
        for name in ("keys", "values"):
            packed = getattr(layer, f"_quantized_{name}", None)
            yield getattr(layer, name) if packed is None else packed[0]


@pytest.mark.parametrize("kind", ["dynamic", "static", "fp8"])
@pytest.mark.parametrize("name", LamoeConfig.presets())
def test_caches_hold_latents_of_the_counted_size(name, kind):
    preset = LamoeConfig.from_preset(name)
    shrunk = {"num_hidden_layers": 1, "first_k_dense_replace": 1, "hidden_size": 16, "num_attention_heads": 2}
    shrunk |= {"intermediate_size": 8, "vocab_size": 31, "num_key_value_heads": None, "pad_token_id": None}
    config = LamoeConfig.from_preset(name, **shrunk)
    torch.manual_seed(0)
    model = LamoeModel(config).to(torch.bfloat16).eval()
    B, S = 2, 12
    cache = QuantizedCache(backend="fp8", config=config) if kind == "fp8" else new_cache(kind, model, S)
    ids = random_ids(B, S, vocab_size=31)
    with torch.no_grad():
        model(ids[:, :9], past_key_values=cache)
        model(ids[:, 9:], past_key_values=cache)
    c, k = cached_tensors(cache)
    assert c.shape == (B, 1, S, config.kv_lora_rank)
    assert k.shape == (B, 1, S, config.qk_rope_head_dim)
    assert c.element_size() == (1 if kind == "fp8" else 2)
    a_token = sum(t.untyped_storage().nbytes() for t in (c, k)) / (B * S)
    assert a_token * preset.num_hidden_layers == preset.kv_bytes_per_token(c.element_size())
    assert a_token == config.kv_bytes_per_token(c.element_size())


def test_a_quanto_cache_holds_latents(pair):
    pytest.importorskip("optimum.quanto")
    ours, B, S = pair[1], 2, 12
    cache = QuantizedCache(backend="quanto", config=ours.config, nbits=4, q_group_size=16, residual_length=4)
    ids = random_ids(B, S)
    got = torch.cat([logits(ours, part, cache) for part in (ids[:, :8], ids[:, 8:])], 1)
    c, k = (getattr(cache.layers[0], f"_quantized_{name}") for name in ("keys", "values"))
    assert c.dequantize().shape == (B, 1, S, ours.config.kv_lora_rank)
    assert k.dequantize().shape == (B, 1, S, ours.config.qk_rope_head_dim)
    expected = logits(ours, ids)
    torch.testing.assert_close(got[:, :8], expected[:, :8], **CLOSE)  # the first tokens are seen before quantisation
    alike = torch.cosine_similarity(got[:, 8:].flatten(), expected[:, 8:].flatten(), dim=0)
    assert 0.8 < alike < 0.99999


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("pieces", [[1] * 20, [11, *[1] * 9], [7, 6, 1, 1, 5]], ids=str)
def test_pieces_equal_the_whole(models, kind, pieces):
    native, ours = models
    ids = random_ids(2, 20)
    cache = new_cache(kind, ours)
    got = torch.cat([logits(ours, part, cache) for part in ids.split(pieces, 1)], 1)
    torch.testing.assert_close(got, logits(native, ids), **CLOSE)
    assert int(cache.get_seq_length()) == 20


@pytest.mark.parametrize("form", ["expanded", "absorbed"])
def test_crop_then_continue(pair, form):
    native, ours = pair
    ids, other = random_ids(2, 20), random_ids(2, 9, seed=2)
    cache = new_cache("dynamic", ours)
    logits(ours, ids, cache)
    cache.crop(-7)
    assert cache.get_seq_length() == 13
    got = logits(ours, other, cache, mla_form=form)
    torch.testing.assert_close(got, logits(native, torch.cat((ids[:, :13], other), 1))[:, 13:], **CLOSE)
    cache.crop(0)
    assert cache.get_seq_length() == 22


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_reorder_then_continue(pair, kind):
    native, ours = pair
    ids, other = random_ids(4, 11), random_ids(4, 2, seed=2)
    cache, order = new_cache(kind, ours), torch.tensor([2, 2, 0, 1])
    logits(ours, ids, cache)
    cache.reorder_cache(order)
    expected = logits(native, torch.cat((ids[order], other), 1))[:, 11:]
    torch.testing.assert_close(logits(ours, other, cache), expected, **CLOSE)


def test_repeat_and_select_rows_then_continue(pair):
    native, ours = pair
    ids, other = random_ids(2, 11), random_ids(6, 2, seed=2)
    cache = new_cache("dynamic", ours)
    logits(ours, ids, cache)
    cache.batch_repeat_interleave(3)
    expected = logits(native, torch.cat((ids.repeat_interleave(3, 0), other), 1))
    torch.testing.assert_close(logits(ours, other, cache), expected[:, 11:], **CLOSE)
    rows, more = torch.tensor([4, 1]), random_ids(2, 3, seed=3)
    cache.batch_select_indices(rows)
    seen = torch.cat((ids.repeat_interleave(3, 0), other), 1)[rows]
    torch.testing.assert_close(logits(ours, more, cache), logits(native, torch.cat((seen, more), 1))[:, 13:], **CLOSE)


def test_reset_then_start_anew(pair):
    _, ours = pair
    for kind in ("dynamic", "static"):
        cache = new_cache(kind, ours)
        logits(ours, random_ids(2, 9, seed=5), cache)
        cache.reset()
        ids = random_ids(2, 7)
        got = torch.cat([logits(ours, part, cache) for part in (ids[:, :4], ids[:, 4:])], 1)
        torch.testing.assert_close(got, logits(ours, ids), **CLOSE)


def free_mask(batch: int, length: int) -> torch.Tensor:
    """A mask that no rule gives: each token sees itself and a random half of what went before, [B, 1, S, S]."""
    draw = torch.Generator().manual_seed(4)
    seen = torch.rand(batch, 1, length, length, generator=draw) < 0.5
    return (seen & torch.ones(length, length, dtype=torch.bool).tril()) | torch.eye(length, dtype=torch.bool)


def as_kind(seen: torch.Tensor, kind: str) -> torch.Tensor:
    return seen if kind == "boolean" else torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)


@pytest.mark.parametrize("form", ["expanded", "absorbed", "auto"])
@pytest.mark.parametrize("kind", ["boolean", "additive"])
def test_ready_masks(models, kind, form):
    native, ours = models
    ids, seen = random_ids(2, 15), free_mask(2, 15)
    expected = logits(native, ids, attention_mask=as_kind(seen, "additive"))
    assert (expected - logits(native, ids)).abs().max() > 0.1
    whole = logits(ours, ids, attention_mask=as_kind(seen, kind), mla_form=form)
    torch.testing.assert_close(whole, expected, **CLOSE)
    cache = new_cache("dynamic", ours)
    parts = []
    for start, stop in ((0, 8), (8, 9), (9, 15)):
        part = as_kind(seen[:, :, start:stop, :stop], kind)
        parts.append(logits(ours, ids[:, start:stop], cache, attention_mask=part, mla_form=form))
    torch.testing.assert_close(torch.cat(parts, 1), expected, **CLOSE)


def packed():
    """Documents of 5, 9 and 4 tokens in one row, and their positions."""
    documents = [random_ids(1, length, seed=length) for length in (5, 9, 4)]
    return documents, torch.cat(documents, 1), torch.cat([torch.arange(d.shape[1]) for d in documents])[None]


@pytest.mark.parametrize("form", ["expanded", "absorbed"])
def test_packed_documents_do_not_see_each_other(models, form):
    native, ours = models
    documents, ids, positions = packed()
    expected = torch.cat([logits(native, document) for document in documents], 1)
    assert (logits(ours, ids) - expected).abs().max() > 0.1
    got = logits(ours, ids, position_ids=positions, mla_form=form)
    torch.testing.assert_close(got, expected, **CLOSE)


def test_packed_documents_with_the_default_arguments(pair):
    native, ours = pair
    documents, ids, positions = packed()
    expected = torch.cat([logits(native, document) for document in documents], 1)
    with torch.no_grad():
        got = ours(ids, position_ids=positions).logits  # config.use_cache is true
    torch.testing.assert_close(got, expected, **CLOSE)


@pytest.mark.slow
def test_packed_documents_with_flex_attention(tmp_path):
    native, ours = lamoe_model("v3", tmp_path, torch.float32, num_hidden_layers=1)
    documents, ids, positions = packed()
    expected = torch.cat([logits(native, document) for document in documents], 1)
    ours.set_attn_implementation("flex_attention")
    for form in ("expanded", "absorbed"):
        got = logits(ours, ids, position_ids=positions, mla_form=form)
        torch.testing.assert_close(got, expected, **CLOSE)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("form", ["expanded", "absorbed"])
def test_a_left_padded_row_equals_the_row_alone(models, form, kind):
    native, ours = models
    padding = (6, 0, 1)
    ids = random_ids(3, 14)
    mask = torch.stack([(torch.arange(14) >= n).long() for n in padding])
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    cache, parts = new_cache(kind, ours), []
    for start, stop in ((0, 9), (9, 10), (10, 14)):
        inputs = {"attention_mask": mask[:, :stop], "position_ids": positions[:, start:stop], "mla_form": form}
        parts.append(logits(ours, ids[:, start:stop], cache, **inputs))
    got = torch.cat(parts, 1)
    assert got.isfinite().all()
    for row, n in enumerate(padding):
        torch.testing.assert_close(got[row, n:], logits(native, ids[row : row + 1, n:])[0], **CLOSE)


def test_a_static_cache_may_be_longer_than_what_it_holds(pair):
    """Its empty slots must not be seen: neither with one new token, when no mask is made, nor with several."""
    native, ours = pair
    ids = random_ids(1, 12)
    for kind in ("eager", "sdpa"):
        ours.set_attn_implementation(kind)
        cache = new_cache("static", ours, length=90)
        got = [logits(ours, part, cache, mla_form="absorbed") for part in ids.split([3, 1, 8], 1)]
        torch.testing.assert_close(torch.cat(got, 1), logits(native, ids), **CLOSE)
    ours.set_attn_implementation("sdpa")
