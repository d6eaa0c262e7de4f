"""Rounds of speculative generation as CUDA graphs, on a GPU, and without one by a stand-in for the graph."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from transformers import LogitsProcessorList, StoppingCriteria

from lamoe import decode_graph
from lamoe.mtp_generation import Drafter
from tests import graphs
from tests.graphs import DEVICE, EXPERTS, replace_kernels, watch_recordings
from tests.test_mtp import mtp_model
from tests.test_mtp_generation import WORDS, Contains, NotAfter, generate, plain_drafts, sentences

pytest.importorskip("lamoe.kernels_attention")

P, NEW = 7, 18
WAYS = pytest.mark.parametrize("rows, depths", [(1, 1), (1, 2), (3, 1), (3, 2)])


@pytest.fixture
def recordings(monkeypatch):
    """The graphs that are recorded; without a GPU of PyTorch's own operators."""
    replace_kernels(monkeypatch)
    return watch_recordings(monkeypatch)


@pytest.fixture(scope="module")
def models():
    """By their depths, random models; in float32, since in bfloat16 rounding could choose words."""
    found = {}
    for depths in (1, 2):
        model = mtp_model(depths, kv_lora_rank=32, num_hidden_layers=2, vocab_size=WORDS)
        model.set_experts_implementation(EXPERTS)
        model.config.mla_implementation = "triton"
        found[depths] = model.to(DEVICE)
    return found


def prompts(rows: int):
    """Prompts, and a mask that hides a different number of words on the left of each."""
    ids = sentences(rows, P, seed=9)
    mask = torch.ones_like(ids)
    for row in range(1, rows):
        mask[row, : 2 * row] = 0
    return ids.to(DEVICE), mask.to(DEVICE)


@pytest.fixture
def unrecorded(monkeypatch):
    """`generate` without graphs; and without drafts, but for those that are asked for."""

    def run(model, ids, **options):
        with monkeypatch.context() as patch:
            patch.setattr(decode_graph, "can_record", lambda device: False)
            return generate(model, ids, max_new_tokens=options.pop("max_new_tokens", NEW), **options)

    return run


def drafted(model, ids, **options):
    return generate(model, ids, use_mtp=True, max_new_tokens=options.pop("max_new_tokens", NEW), **options)


@pytest.fixture
def half_right(monkeypatch, unrecorded):
    """What the layers draft is noted, and tokens take its place that the model agrees with at three places of five."""

    def begin(model, ids, mask, new: int = NEW):
        expected = unrecorded(model, ids, attention_mask=mask, max_new_tokens=new + 2)
        pads, made, real = (mask == 0).sum(dim=1), [], Drafter.draft

        def draft(self, states, tokens, kept, first, *rest):
            found = real(self, states, tokens, kept, first, *rest)
            known = first + kept + pads
            made.append((known.tolist(), torch.stack(found, dim=1).clone() if found else None))
            for depth in range(len(found)):
                at = (known + depth).clamp(max=expected.shape[1] - 1)
                right = expected.gather(1, at.unsqueeze(1)).squeeze(1)
                found[depth] = torch.where((3 * at + pads) % 5 < 3, right, (right + 1) % WORDS)
            return found

        monkeypatch.setattr(Drafter, "draft", draft)
        return expected[:, : ids.shape[1] + new], made

    return begin


@WAYS
def test_tokens_are_those_without_drafts(models, unrecorded, recordings, half_right, rows, depths):
    """And so are the statistics, the cache, and whatever the layers draft, those of all words anew."""
    model, (ids, mask) = models[depths], prompts(rows)
    expected, made = half_right(model, ids, mask)
    options = {"attention_mask": mask, "return_dict_in_generate": True, "output_logits": True}
    plain, found = unrecorded(model, ids, use_mtp=True, **options), model.speculation
    assert not recordings
    assert 0.2 < found.acceptance_rate < 0.9 and found.rounds > decode_graph.STEPS_BEFORE + 3
    made.clear()
    got = drafted(model, ids, **options)
    assert len(recordings) == 1 + depths
    assert torch.equal(got.sequences, expected) and torch.equal(plain.sequences, expected)
    assert model.speculation == found
    torch.testing.assert_close(torch.stack(got.logits), torch.stack(plain.logits), rtol=1e-4, atol=1e-4)
    assert got.past_key_values.get_seq_length() == P + NEW - 1
    for ours, theirs in zip(got.past_key_values.layers, plain.past_key_values.layers, strict=True):
        for row, first in enumerate((mask == 0).sum(dim=1)):
            a, b = (layer.keys[row, :, first:] for layer in (ours, theirs))
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    for known, drafts in made[1::2]:
        for row in range(rows):
            if known[row] < P + NEW:
                prefix = expected[row : row + 1, int((mask[row] == 0).sum()) : known[row]]
                assert drafts[row].tolist() == plain_drafts(model, prefix, depths)


def test_latents_in_float8(models, unrecorded, recordings, monkeypatch):
    """The drafts' own caches hold theirs in full; the model's, whose rows come without holes, goes on."""
    model, (ids, mask) = models[1], prompts(3)
    monkeypatch.setattr(model.config, "latent_cache_dtype", "float8_e4m3fn")
    expected = unrecorded(model, ids, attention_mask=mask)
    got = drafted(model, ids, attention_mask=mask, return_dict_in_generate=True)
    assert torch.equal(got.sequences, expected) and len(recordings) == 2
    assert {layer.keys.dtype for layer in got.past_key_values.layers} == {torch.float8_e4m3fn}
    seen = torch.cat((mask, mask.new_ones(3, NEW)), dim=1)
    more = unrecorded(model, expected, attention_mask=seen, past_key_values=got.past_key_values, max_new_tokens=4)
    assert torch.equal(more, unrecorded(model, ids, attention_mask=mask, max_new_tokens=NEW + 4))


def test_a_prompt_of_one_token_behind_a_cache(models, unrecorded, recordings):
    """The hook that reads its states stops no later round from being recorded."""
    model, (ids, _) = models[1], prompts(1)
    first = drafted(model, ids, return_dict_in_generate=True)
    recordings.clear()
    more = drafted(model, first.sequences, past_key_values=first.past_key_values)
    assert recordings
    assert torch.equal(more, unrecorded(model, first.sequences))


@WAYS
def test_longer_buffers_are_recorded_anew(models, recordings, half_right, monkeypatch, rows, depths):
    monkeypatch.setattr("lamoe.cache.ROOM", 7)
    model, (ids, mask) = models[depths], prompts(rows)
    expected, _ = half_right(model, ids, mask, 24)
    assert torch.equal(drafted(model, ids, attention_mask=mask, max_new_tokens=24), expected)
    assert 2 * (1 + depths) <= len(recordings) <= 5 * (1 + depths)


@WAYS
def test_an_end_token_inside_a_round(models, unrecorded, recordings, half_right, rows, depths):
    model, (ids, mask) = models[depths], prompts(rows)
    free, _ = half_right(model, ids, mask)
    for place in range(P + NEW - 4, P + NEW - 1):
        options = {"attention_mask": mask, "eos_token_id": free[0, place].item(), "pad_token_id": 3}
        expected = unrecorded(model, ids, **options)
        assert torch.equal(drafted(model, ids, **options), expected)
    assert recordings


@WAYS
def test_processors_and_criteria(models, unrecorded, recordings, rows, depths):
    model, (ids, mask) = models[depths], prompts(rows)
    options = {"attention_mask": mask, "repetition_penalty": 1.3}
    options["logits_processor"] = LogitsProcessorList([NotAfter()])
    free = unrecorded(model, ids, **options)[0]
    options["stopping_criteria"] = [Contains(free[-2].item(), int((free[:-1] == free[-2]).sum()))]
    expected = unrecorded(model, ids, **options)
    assert torch.equal(drafted(model, ids, **options), expected)
    assert recordings


@WAYS
def test_sampled_tokens_are_those_of_unrecorded_rounds(models, unrecorded, recordings, rows, depths):
    """With the same random numbers, but for the last rounds, which draft more."""
    model, (ids, mask) = models[depths], prompts(rows)
    found = []
    for way in (drafted, unrecorded):
        torch.manual_seed(3)
        options = {"do_sample": True, "temperature": 3.0, **({"use_mtp": True} if way is unrecorded else {})}
        found.append(way(model, ids, attention_mask=mask, **options))
        assert model.speculation.acceptance_rate > 0.05
    assert torch.equal(*(tokens[:, : P + NEW - depths] for tokens in found))
    assert len(recordings) == 1 + depths


class After(StoppingCriteria):
    """Does something once there are so many words."""

    def __init__(self, words: int, act):
        self.words, self.act = words, act

    def __call__(self, input_ids, scores, **kwargs):
        if input_ids.shape[1] == self.words:
            self.act()
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def test_nonfinite_logits_raise(models, recordings):
    model, (ids, _) = models[1], prompts(1)
    weight = model.model.layers[1].mlp.gate.weight.data
    kept = weight.clone()
    try:
        for words in (P + NEW - 3, P + NEW - 1):  # the latter before the last round
            poison = After(words, lambda: weight.fill_(float("nan")))
            with pytest.raises(ValueError, match="The router of layer 1 got NaN or infinite values in evaluation"):
                drafted(model, ids, stopping_criteria=[poison])
            weight.copy_(kept)
    finally:
        weight.copy_(kept)
    assert recordings


def test_moved_weights_are_recorded_anew(models, recordings):
    model, (ids, _) = models[1], prompts(1)

    def move():
        model.lm_head.weight.data = model.lm_head.weight.data.clone()

    expected = drafted(model, ids)
    assert len(recordings) == 2
    assert torch.equal(drafted(model, ids, stopping_criteria=[After(P + NEW - 3, move)]), expected)
    assert len(recordings) == 2 + 2 * 2


def test_another_number_of_tokens_is_recorded_anew(models, recordings, monkeypatch):
    monkeypatch.setattr(decode_graph, "STEPS_BEFORE", 0)
    model, (ids, _) = models[1], prompts(1)
    with torch.no_grad():
        expected = model.model(ids).last_hidden_state
        cache = model(ids[:, :2], use_cache=True).past_key_values
        for begin, end in ((2, 4), (4, 6), (6, 7)):
            states, logits = decode_graph.replayed_tokens(model, ids[:, begin:end], None, None, cache, {})
            torch.testing.assert_close(states, expected[:, begin:end], rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(logits, model.lm_head(states))
        assert decode_graph.replayed_tokens(model, ids[:, :1], None, None, cache, {"mla_form": "expanded"}) is None
    assert len(recordings) == 2


def test_a_static_cache_has_room_for_the_last_drafts(models, unrecorded, recordings, monkeypatch):
    model, (ids, _) = models[2], prompts(1)
    expected = unrecorded(model, ids)
    monkeypatch.setattr("lamoe.cache.ROOM", 0)
    got = drafted(model, ids, cache_implementation="static", return_dict_in_generate=True)
    assert torch.equal(got.sequences, expected)
    assert got.past_key_values.recorded.times == 1


def test_adapters_come_and_go(models, unrecorded, recordings):
    """Each round by the adapters that are active in it."""
    peft = pytest.importorskip("peft")
    model, (ids, _) = models[1], prompts(1)
    names = ["q_b_proj", "kv_b_proj", "eh_proj"]
    settings = peft.LoraConfig(r=3, lora_alpha=6, init_lora_weights=False, target_modules=names)
    adapted = peft.get_peft_model(model, settings)
    try:
        found = []
        for way in (unrecorded, drafted):
            adapted.base_model.enable_adapter_layers()
            criteria = [
                After(P + NEW - 6, adapted.base_model.disable_adapter_layers),
                After(P + NEW - 3, adapted.base_model.enable_adapter_layers),
            ]
            options = {"use_mtp": True} if way is unrecorded else {}
            found.append(way(model, ids, stopping_criteria=criteria, **options))
        adapted.base_model.disable_adapter_layers()
        other = unrecorded(model, ids)
    finally:
        adapted.unload()
    assert torch.equal(*found) and not torch.equal(found[0], other)
    assert len(recordings) == 3 * 2


def test_what_cannot_be_recorded_runs_as_ever(models, unrecorded, recordings):
    model, (ids, mask) = models[1], prompts(3)
    expected = unrecorded(model, ids, attention_mask=mask)
    handle = model.model.layers[-1].register_forward_hook(lambda *arguments: None)
    try:
        assert torch.equal(drafted(model, ids, attention_mask=mask), expected)
    finally:
        handle.remove()
    assert not recordings


def test_the_kernels_themselves(models, unrecorded, monkeypatch):
    recordings = watch_recordings(monkeypatch)
    monkeypatch.setattr(decode_graph, "STEPS_BEFORE", 0)
    model, (ids, mask) = models[1], prompts(2)
    options = {"attention_mask": mask, "max_new_tokens": 4}
    assert torch.equal(drafted(model, ids, **options), unrecorded(model, ids, **options))
    assert len(recordings) == 2


class Launches(TorchDispatchMode):
    """Counts operators that are no views: what the host launches, but for graphs."""

    def __init__(self):
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not func.is_view and "empty" not in str(func):
            self.found.append(str(func))
        return func(*args, **kwargs or {})


def test_a_round_launches_little_and_waits_once(models, recordings, monkeypatch):
    model, (ids, _) = models[1], prompts(1)
    waits, tolist, replay = [], torch.Tensor.tolist, graphs.EagerGraph.replay

    def counted(self):
        waits.append(self.shape)
        return tolist(self)

    def apart(self):
        with _disable_current_modes():
            replay(self)

    monkeypatch.setattr(torch.Tensor, "tolist", counted)
    monkeypatch.setattr(graphs.EagerGraph, "replay", apart)
    found = []
    for new in (NEW, NEW + 8):
        waits.clear()
        with Launches() as launches:
            drafted(model, ids, max_new_tokens=new)
        found.append((model.speculation.rounds, len(launches.found), len(waits), launches.found))
    rounds, made, waited = (b - a for a, b in zip(found[0][:3], found[1][:3], strict=True))
    assert rounds == 8 and recordings and made / rounds <= 30, found[1][3][-30:]
    assert waited / rounds == 2  # for the tokens, and on the host for checksums that came a round before
    assert not any("_local_scalar_dense" in name for name in found[1][3][-30:])
