"""Recorded decode steps: the tokens of unrecorded ones, on a GPU, and without one by a stand-in for the graph."""

import copy

import pytest
import torch
from transformers import StaticCache, StoppingCriteria

from lamoe import decode_graph
from lamoe.cache import GrowingCache
from tests.graphs import DEVICE, EXPERTS, watch_recordings
from tests.test_generation import generate
from tests.tiny import lamoe_model, random_ids

pytest.importorskip("lamoe.kernels_attention")

NEW = 9


@pytest.fixture
def recordings(monkeypatch):
    """The graphs that are recorded."""
    return watch_recordings(monkeypatch)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    _, ours = lamoe_model("v3", tmp_path_factory.mktemp("checkpoint"), torch.float32, kv_lora_rank=32)
    ours.set_experts_implementation(EXPERTS)
    ours.config.mla_implementation = "triton"
    return ours.to(DEVICE)  # in float32: in bfloat16 random logits are too close to tell rounding from error


@pytest.fixture
def expected(model, monkeypatch):
    """Tokens without recording, for any arguments."""

    def run(ids, **options):
        with monkeypatch.context() as patch:
            patch.setattr(decode_graph, "can_record", lambda device: False)
            return generate(model, ids, **options)

    return run


def ids_of(*shape):
    return random_ids(*shape).to(DEVICE)


def test_tokens_are_those_of_unrecorded_steps(model, expected, recordings):
    ids = ids_of(2, 11)
    assert torch.equal(generate(model, ids, max_new_tokens=NEW), expected(ids, max_new_tokens=NEW))
    assert len(recordings) == 1


def test_padding(model, expected, recordings):
    ids = ids_of(2, 11)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    options = {"attention_mask": mask, "max_new_tokens": NEW}
    assert torch.equal(generate(model, ids, **options), expected(ids, **options))
    assert len(recordings) == 1


def test_latents_in_float8(model, expected, recordings, monkeypatch):
    monkeypatch.setattr(model.config, "latent_cache_dtype", "float8_e4m3fn")
    ids = ids_of(2, 11)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    options = {"attention_mask": mask, "max_new_tokens": NEW}
    got = generate(model, ids, return_dict_in_generate=True, **options)
    assert torch.equal(got.sequences, expected(ids, **options))
    assert got.past_key_values.recorded and got.past_key_values.layers[0].keys.dtype == torch.float8_e4m3fn
    assert len(recordings) == 1


def test_a_longer_buffer_is_recorded_anew(model, expected, recordings, monkeypatch):
    monkeypatch.setattr("lamoe.cache.ROOM", 5)
    ids = ids_of(1, 6)
    assert torch.equal(generate(model, ids, max_new_tokens=14), expected(ids, max_new_tokens=14))
    assert 2 <= len(recordings) <= 4


def test_logits_and_a_returned_cache(model, expected, recordings):
    ids = ids_of(1, 8)
    options = {"max_new_tokens": NEW, "return_dict_in_generate": True, "output_logits": True}
    first, plain = generate(model, ids, **options), expected(ids, **options)
    torch.testing.assert_close(torch.stack(first.logits), torch.stack(plain.logits), rtol=1e-4, atol=1e-4)
    assert first.past_key_values.get_seq_length() == plain.past_key_values.get_seq_length() == 8 + NEW - 1
    for ours, theirs in zip(first.past_key_values.layers, plain.past_key_values.layers, strict=True):
        torch.testing.assert_close(ours.keys, theirs.keys, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(ours.values, theirs.values, rtol=1e-4, atol=1e-4)
    twin = copy.deepcopy(first.past_key_values)
    more = torch.cat((first.sequences, ids_of(1, 2)), dim=1)
    again = [generate(model, more, past_key_values=cache, max_new_tokens=6) for cache in (first.past_key_values, twin)]
    assert torch.equal(again[0], again[1])
    assert torch.equal(again[0], expected(more, max_new_tokens=6))


def test_several_tokens_a_step_between_recorded_ones(model, expected, recordings):
    ids = ids_of(1, 12)
    options = {"max_new_tokens": 12, "prompt_lookup_num_tokens": 2}
    assert torch.equal(generate(model, ids, **options), expected(ids, max_new_tokens=12))


def test_beams_are_not_recorded_for_ever(model, expected, recordings, monkeypatch):
    monkeypatch.setattr(decode_graph, "MOST_RECORDINGS", 2)
    ids = ids_of(1, 6)
    options = {"max_new_tokens": 8, "num_beams": 2}
    assert torch.equal(generate(model, ids, **options), expected(ids, **options))
    assert len(recordings) <= 2


def stepped(model, ids, steps: int) -> GrowingCache:
    """A cache after a prompt and so many steps of one token."""
    cache = GrowingCache(config=model.config)
    model(ids, past_key_values=cache)
    for _ in range(steps):
        model(ids[:, :1], past_key_values=cache)
    return cache


def test_moved_weights_are_recorded_anew(model, recordings):
    ids = ids_of(1, 6)
    with torch.no_grad():
        cache = stepped(model, ids, decode_graph.STEPS_BEFORE + 2)
        assert len(recordings) == 1
        model.lm_head.weight.data = model.lm_head.weight.data.clone()
        model(ids[:, :1], past_key_values=cache)
        assert len(recordings) == 2


@pytest.fixture
def poison(model):
    """Fills the last router's weight with NaN, to be called in the middle; the fixture mends it."""
    weight = model.model.layers[-1].mlp.gate.weight.data
    kept = weight.clone()
    yield lambda: weight.fill_(float("nan"))
    weight.copy_(kept)


NONFINITE = "The router of layer 2 got NaN or infinite values in evaluation"


def test_nonfinite_logits_raise_a_step_later(model, recordings, poison):
    ids = ids_of(1, 6)
    with torch.no_grad():
        cache = stepped(model, ids, decode_graph.STEPS_BEFORE + 1)
        assert recordings
        poison()
        model(ids[:, :1], past_key_values=cache)
        with pytest.raises(ValueError, match=NONFINITE):
            decode_graph.settle(model, cache)
        decode_graph.settle(model, cache)  # once is enough
        model(ids[:, :1], past_key_values=cache)
        with pytest.raises(ValueError, match=NONFINITE):
            model(ids[:, :1], past_key_values=cache)


def test_nonfinite_logits_of_the_last_step_raise(model, recordings, poison):
    class PoisonBeforeTheLast(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            if input_ids.shape[1] == 6 + NEW - 1:
                poison()
            return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    with pytest.raises(ValueError, match=NONFINITE):
        generate(model, ids_of(1, 6), max_new_tokens=NEW, stopping_criteria=[PoisonBeforeTheLast()])
    assert recordings


def test_a_static_cache_is_recorded_instead_of_compiled(model, expected, recordings):
    ids = ids_of(2, 11)
    options = {"max_new_tokens": NEW, "cache_implementation": "static", "return_dict_in_generate": True}
    answer = generate(model, ids, **options)
    assert torch.equal(answer.sequences, expected(ids, max_new_tokens=NEW))
    assert len(recordings) == 1
    assert all(layer.room >= 11 + NEW - 1 for layer in answer.past_key_values.layers)
    assert all(layer.version == answer.past_key_values.layers[0].version for layer in answer.past_key_values.layers)
    answer = generate(model, ids, disable_compile=True, **options)
    assert type(answer.past_key_values) is StaticCache and len(recordings) == 1


def test_a_failed_recording_is_not_the_end(model, expected, monkeypatch):
    def record(step, device):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(decode_graph, "record", record)
    monkeypatch.setattr(decode_graph, "can_record", lambda device: True)
    monkeypatch.setattr(decode_graph, "_waits", lambda m: False)
    ids = ids_of(1, 6)
    assert torch.equal(generate(model, ids, max_new_tokens=NEW), expected(ids, max_new_tokens=NEW))


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.set_experts_implementation("eager"),
        lambda model: setattr(model.config, "mla_implementation", "eager"),
        lambda model: model.model.layers[1].register_forward_hook(lambda *args: None),
    ],
    ids=["eager experts", "eager attention", "a hook"],
)
def test_what_cannot_be_recorded_runs_as_ever(model, expected, recordings, change):
    ids = ids_of(1, 6)
    handle = change(model)
    try:
        assert torch.equal(generate(model, ids, max_new_tokens=NEW), expected(ids, max_new_tokens=NEW))
        assert not recordings
    finally:
        model.set_experts_implementation(EXPERTS)
        model.config.mla_implementation = "triton"
        if handle is not None:
            handle.remove()
