"""Ours equals the native classes on the same weights: logits, loss, every gradient, every cache."""

import pytest
import torch
from transformers import DynamicCache, StaticCache

from tests.tiny import FAMILIES, lamoe_model, random_ids

# Rotary angles, norms' epsilon and routers are float32 in the native classes even in a float64 model; what is left is
# their rounding, and it is the same in both but for the order of sums.
CLOSE = {"rtol": 2e-5, "atol": 2e-5}


@pytest.fixture(params=FAMILIES)
def pair(request, tmp_path):
    return lamoe_model(request.param, tmp_path)


def test_logits_loss_and_gradients(pair):
    native, ours = pair
    ids = random_ids(2, 19)
    labels = ids.clone()
    labels[0, :4] = -100
    expected, got = native(ids, labels=labels), ours(ids, labels=labels)
    torch.testing.assert_close(got.logits, expected.logits, **CLOSE)
    torch.testing.assert_close(got.loss, expected.loss, **CLOSE)
    expected.loss.backward()
    got.loss.backward()
    gradients = dict(ours.named_parameters())
    assert set(gradients) == {name for name, _ in native.named_parameters()}
    for name, parameter in native.named_parameters():
        torch.testing.assert_close(
            gradients[name].grad.to(parameter.grad), parameter.grad, **CLOSE, msg=lambda m, n=name: f"{n}: {m}"
        )
        assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("form", ["auto", "expanded", "absorbed"])
def test_padded_prefill_and_token_by_token(pair, form):
    native, ours = pair
    ids = random_ids(2, 24)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        expected = native(ids, attention_mask=mask, position_ids=positions).logits
        cache, got = DynamicCache(config=ours.config), []
        for start, stop in [(0, 9), *((i, i + 1) for i in range(9, 17)), (17, 20), (20, 24)]:
            got.append(
                ours(
                    ids[:, start:stop],
                    attention_mask=mask[:, :stop],
                    position_ids=positions[:, start:stop],
                    past_key_values=cache,
                    mla_form=form,
                ).logits
            )
    seen = mask.bool()
    torch.testing.assert_close(torch.cat(got, 1)[seen], expected[seen], **CLOSE)
    assert cache.layers[0].keys.shape == (2, 1, 24, ours.config.kv_lora_rank)
    assert cache.layers[0].values.shape == (2, 1, 24, ours.config.qk_rope_head_dim)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])  # flex_attention: in test_caches
def test_attention_implementations(pair, implementation):
    native, ours = pair
    native, ours = native.float(), ours.float()
    ids = random_ids(2, 21)
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    with torch.no_grad():
        expected = native(ids, attention_mask=mask).logits
        ours.set_attn_implementation(implementation)
        assert ours.config._attn_implementation == implementation
        whole = ours(ids, attention_mask=mask).logits
        cache = DynamicCache(config=ours.config)
        first = ours(ids[:, :12], attention_mask=mask[:, :12], past_key_values=cache).logits
        rest = ours(ids[:, 12:], attention_mask=mask, past_key_values=cache).logits
    seen = mask.bool()
    for got in (whole, torch.cat((first, rest), 1)):
        torch.testing.assert_close(got[seen], expected[seen], rtol=1e-3, atol=1e-3)


def test_static_cache(pair):
    native, ours = pair
    ids = random_ids(2, 20)
    with torch.no_grad():
        expected = native(ids).logits
        cache = StaticCache(config=ours.config, max_cache_len=32)
        got = [ours(ids[:, :11], past_key_values=cache).logits]
        got += [ours(ids[:, i : i + 1], past_key_values=cache).logits for i in range(11, 20)]
    torch.testing.assert_close(torch.cat(got, 1), expected, **CLOSE)
    assert cache.layers[0].keys.shape == (2, 1, 32, ours.config.kv_lora_rank)


@pytest.mark.parametrize("experts", ["eager", "grouped_mm", "batched_mm"])
def test_experts_implementations(pair, experts):
    native, ours = pair
    native, ours = native.float(), ours.float()
    ids = random_ids(2, 13)
    ours.set_experts_implementation(experts)
    assert ours.config._experts_implementation == experts
    with torch.no_grad():
        torch.testing.assert_close(ours(ids).logits, native(ids).logits, rtol=1e-3, atol=1e-3)
