"""Long prompts some heads and some tokens at a time: the results of all at once, and the memory that it is for."""

import itertools
import json

import pytest
import torch
import torch.nn.functional as F
from transformers import DynamicCache, StaticCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from lamoe import LamoeConfig, LamoeForCausalLM, attention, prefill
from lamoe.cache import GrowingCache
from lamoe.scripts.prefill_speed import peak_of, prompt_cost
from lamoe.scripts.result_tables import markdown_tables
from tests.test_attention import LargestTensor, hooked, one_layer, small_model
from tests.test_caches import as_kind, free_mask, packed
from tests.test_generation import generate
from tests.tiny import lamoe_model, random_ids

EXACT = {"rtol": 1e-11, "atol": 1e-11}
T = 21


class Calls:
    """Calls of the attention by groups of heads: heads and rows of each."""

    def __init__(self):
        self.prompts, self.shapes = [], []


@pytest.fixture
def calls(monkeypatch):
    made, real, attend = Calls(), attention.attention_by_heads, attention.LamoeAttention._attend

    def by_heads(config, prompt, *rest):
        made.prompts.append(prompt)
        return real(config, prompt, *rest)

    def counted(self, query, *rest, **kwargs):
        made.shapes.append((query.shape[1], query.shape[2]))
        return attend(self, query, *rest, **kwargs)

    monkeypatch.setattr(attention, "attention_by_heads", by_heads)
    monkeypatch.setattr(attention.LamoeAttention, "_attend", counted)
    return made


@pytest.fixture
def tight(monkeypatch):
    """Limits so small that nothing goes at once: two heads of two rows of T tokens, 8 rows of a mask, 5 tokens."""

    def tighten(config, batch: int = 2, length: int = T):
        numbers = prefill._numbers(config, length, length)
        monkeypatch.setattr(prefill, "MAX_EXPANDED", 2 * batch * numbers)
        monkeypatch.setattr(prefill, "MAX_ATTENDED", 3 * batch * length * config.v_head_dim)
        monkeypatch.setattr(prefill, "MAX_MASKED", 8 * batch * length)
        monkeypatch.setattr(prefill, "MAX_FED", 5 * 32 * 10)

    return tighten


@pytest.fixture(scope="module", params=["v2-lite", "glm-4.7-flash"])
def pair(request, tmp_path_factory):
    return lamoe_model(request.param, tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(params=["sdpa", "eager"])
def ours(request, pair):
    pair[1].set_attn_implementation(request.param)
    yield pair[1]
    pair[1].set_attn_implementation("sdpa")


@torch.no_grad()
def logits(model, ids, cache=None, **inputs):
    return model(ids, past_key_values=cache, use_cache=cache is not None, **inputs).logits


def left_padded():
    mask = torch.ones(2, T, dtype=torch.long)
    mask[0, :6] = 0
    return {"attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}, mask.bool()


def right_padded():
    mask = torch.ones(2, T, dtype=torch.long)
    mask[1, 15:] = 0
    return {"attention_mask": mask}, mask.bool()


SEEN = torch.ones(2, T, dtype=torch.bool)
# inputs, and which tokens are none of padding
WHOLE = {
    "nothing": lambda: ({}, SEEN),
    "a mask of ones": lambda: ({"attention_mask": SEEN.long()}, SEEN),
    "one position for all rows": lambda: ({"position_ids": torch.arange(T)[None]}, SEEN),
}
BY_ROWS = {
    "left padding": left_padded,
    "right padding": right_padded,
    "a boolean mask": lambda: ({"attention_mask": free_mask(2, T)}, SEEN),
    "an additive mask": lambda: ({"attention_mask": as_kind(free_mask(2, T), "additive").double()}, SEEN),
}


@pytest.mark.parametrize("given", [*WHOLE, *BY_ROWS])
def test_a_prompt_by_heads_equals_the_whole(ours, calls, tight, given):
    inputs, seen = (WHOLE | BY_ROWS)[given]()
    ids = random_ids(2, T)
    expected = logits(ours, ids, **inputs)
    assert not calls.prompts
    tight(ours.config)
    calls.shapes.clear()
    got = logits(ours, ids, **inputs)
    torch.testing.assert_close(got[seen], expected[seen], **EXACT)
    assert got.isfinite().all()
    assert len(calls.prompts) == ours.config.num_hidden_layers
    parts = {4: {2}, 5: {1, 2}}  # five heads are 3 + 2, in groups of 2 + 1 and 2
    assert {heads for heads, _ in calls.shapes} == parts[ours.config.num_attention_heads]
    if ours.config._attn_implementation == "eager":  # which holds the scores of all heads of a group
        assert {heads * rows for heads, rows in calls.shapes} <= set(range(9))
    else:
        assert max(rows for _, rows in calls.shapes) == (8 if given in BY_ROWS else T)


@pytest.mark.parametrize("cached", [False, True])
def test_packed_documents(ours, calls, tight, cached):
    documents, ids, positions = packed()
    tight(ours.config, 1, ids.shape[1])
    expected = torch.cat([logits(ours, document, mla_form="absorbed") for document in documents], 1)
    with torch.no_grad():
        got = ours(ids, position_ids=positions, use_cache=cached).logits
    assert calls.prompts[0].documents.tolist() == [[0] * 5 + [1] * 9 + [2] * 4]
    torch.testing.assert_close(got, expected, **EXACT)


CACHES = {
    "dynamic": lambda config: DynamicCache(config=config),
    "growing": lambda config: GrowingCache(config=config),
    "static": lambda config: StaticCache(config=config, max_cache_len=3 * T),
}


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("kind", CACHES)
def test_long_chunks_behind_a_filled_cache(ours, calls, tight, kind, padded):
    ids, (inputs, seen) = random_ids(2, T), left_padded() if padded else ({}, SEEN)
    expected = logits(ours, ids, **inputs)
    tight(ours.config, length=4)
    cache, parts = CACHES[kind](ours.config), []
    for start, stop in itertools.pairwise((0, 7, 16, 17, T)):
        part = {"position_ids": inputs["position_ids"][:, start:stop]} if padded else {}
        part |= {"attention_mask": inputs["attention_mask"][:, :stop]} if padded else {}
        parts.append(logits(ours, ids[:, start:stop], cache, mla_form="expanded", **part))
    torch.testing.assert_close(torch.cat(parts, 1)[seen], expected[seen], **EXACT)
    assert [prompt.cached for prompt in calls.prompts[:: ours.config.num_hidden_layers]] == [0, 7, 17]  # 16: one token
    assert max(rows for _, rows in calls.shapes[ours.config.num_hidden_layers :]) > 1


@pytest.mark.parametrize("kind", ["boolean", "additive"])
def test_a_ready_mask_of_a_chunk(ours, calls, tight, kind):
    ids, seen = random_ids(2, T), free_mask(2, T)
    mask = as_kind(seen, kind) if kind == "boolean" else as_kind(seen, kind).double()
    expected = logits(ours, ids, attention_mask=mask)
    tight(ours.config, length=4)
    cache = DynamicCache(config=ours.config)
    cut = ((0, 9), (9, T))
    parts = [logits(ours, ids[:, a:b], cache, attention_mask=mask[:, :, a:b, :b], mla_form="expanded") for a, b in cut]
    torch.testing.assert_close(torch.cat(parts, 1), expected, **EXACT)
    assert all(prompt.ready for prompt in calls.prompts)


OPTIONS = {
    "growing": {},
    "static": {"cache_implementation": "static", "disable_compile": True},
    "dynamic": {"cache_implementation": "dynamic"},
    "no cache": {"use_cache": False},
    "chunks": {"prefill_chunk_size": 7},
    "beams": {"num_beams": 2},
}


@pytest.mark.parametrize("padding", [0, 5])
@pytest.mark.parametrize("options", OPTIONS)
def test_greedy_tokens_are_equal(pair, calls, tight, options, padding):
    native, model = pair
    ids = random_ids(2, T)
    mask = torch.ones_like(ids)
    mask[0, :padding] = 0
    expected = generate(
        native, ids, attention_mask=mask, max_new_tokens=6, num_beams=OPTIONS[options].get("num_beams", 1)
    )
    tight(model.config, length=4)
    model.config.mla_absorb_max_tokens = 3  # or the later chunks were absorbed
    try:
        got = generate(model, ids, attention_mask=mask, max_new_tokens=6, **OPTIONS[options])
    finally:
        model.config.mla_absorb_max_tokens = None
    assert torch.equal(got, expected)
    assert calls.prompts


def test_flash_attention_gets_all_rows_and_the_padding(calls, tight, monkeypatch):
    model, ids = small_model().double(), random_ids(2, T, vocab_size=31)
    inputs, seen = left_padded()
    expected, plain = logits(model, ids, **inputs), logits(model, ids)
    masks = []

    def flash(module, query, key, value, attention_mask, dropout, scaling, **kwargs):
        masks.append(attention_mask)
        causal = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool).tril()
        if attention_mask is not None:
            causal = causal & attention_mask[:, None, None].bool()
        out = F.scaled_dot_product_attention(query, key, value, causal, scale=scaling)
        return out.transpose(1, 2), None

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "flash_attention_2", flash)
    model.config._attn_implementation_internal = "flash_attention_2"
    tight(model.config)
    torch.testing.assert_close(logits(model, ids), plain, **EXACT)
    assert masks == [None] * 2  # of two heads each
    torch.testing.assert_close(logits(model, ids, **inputs)[seen], expected[seen], **EXACT)
    assert masks[-1].shape == (2, T)
    assert {shape[1] for shape in calls.shapes} == {T}


def int8(linear):
    from tests.test_attention import Int8Linear

    return Int8Linear(linear)


@pytest.mark.parametrize("change", [hooked, int8])
@pytest.mark.parametrize("name", ["q_b_proj", "q_proj", "kv_b_proj", "o_proj"])
def test_projections_that_cannot_be_cut(calls, tight, name, change):
    model = small_model(q_lora_rank=None if name == "q_proj" else 12).double()
    layer = model.model.layers[0].self_attn
    setattr(layer, name, change(getattr(layer, name)))
    ids = random_ids(2, T, vocab_size=31)
    expected = logits(model, ids)
    tight(model.config)
    torch.testing.assert_close(logits(model, ids), expected, **EXACT)
    assert calls.prompts


def test_biases_of_the_projections(calls, tight):
    model = small_model(attention_bias=True, q_lora_rank=12).double()
    layer = model.model.layers[0].self_attn
    with torch.no_grad():
        for projection in (layer.o_proj, layer.q_a_proj, layer.kv_a_proj_with_mqa):
            projection.bias.normal_()
    ids = random_ids(2, T, vocab_size=31)
    expected = logits(model, ids)
    tight(model.config)
    torch.testing.assert_close(logits(model, ids), expected, **EXACT)
    assert calls.prompts


def test_with_gradients_nothing_changes(calls, tight):
    model, ids = small_model(), random_ids(2, T, vocab_size=31)
    results = []
    for _ in range(2):
        model.zero_grad()
        loss = model(ids, labels=ids).loss
        loss.backward()
        results.append([loss, *(parameter.grad.clone() for parameter in model.parameters())])
        tight(model.config)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert not calls.prompts


def test_what_else_is_left_alone(calls, tight):
    model, ids = small_model(), random_ids(2, T, vocab_size=31)
    tight(model.config)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        weights = model(ids, output_attentions=True).attentions
        assert weights[0].shape == (2, 4, T, T)
        model(ids, mla_form="absorbed")
    assert not calls.prompts


def sparse_model(**changes):
    """A layer with a dense feed-forward and one with experts."""
    model = small_model(num_hidden_layers=2, n_shared_experts=2, **changes).double()
    model.set_experts_implementation("eager")
    return model


def test_the_feed_forward_of_some_tokens_at_a_time(tight):
    model, ids = sparse_model(), random_ids(2, T, vocab_size=31)
    expected = logits(model, ids)
    tight(model.config)
    lengths = [[], []]
    for layer, seen in zip(model.model.layers, lengths, strict=True):
        layer.mlp.register_forward_pre_hook(lambda module, args, seen=seen: seen.append(args[0].shape[1]))
    torch.testing.assert_close(logits(model, ids), expected, **EXACT)
    for layer, seen in zip(model.model.layers, lengths, strict=True):
        assert sum(seen) == 2 * T and len(seen) > 1 and set(seen[:-1]) == {max(seen)}
        assert max(seen) * layer.mlp.numbers_a_token <= prefill.MAX_FED


def test_outputs_of_routers_and_layers_are_whole(tight):
    model, ids = sparse_model(), random_ids(2, T, vocab_size=31)
    with torch.no_grad():
        expected = model(ids, output_router_logits=True, output_hidden_states=True)
        tight(model.config)
        got = model(ids, output_router_logits=True, output_hidden_states=True)
        chunked = model(ids, output_hidden_states=True)
    assert [x.shape for x in got.router_logits] == [(2 * T, 8)]
    torch.testing.assert_close(got.router_logits, expected.router_logits, **EXACT)
    for outputs in (got, chunked):
        torch.testing.assert_close(outputs.hidden_states, expected.hidden_states, **EXACT)


def test_nan_in_the_first_tokens_is_seen(tight):
    model, ids = sparse_model(), random_ids(1, T, vocab_size=31)
    tight(model.config)
    model.model.layers[0].register_forward_hook(lambda m, args, out: out.index_fill(1, torch.tensor([0]), torch.nan))
    model.model.layers[1].self_attn.register_forward_hook(lambda m, args, out: (torch.zeros_like(out[0]), None))
    with pytest.raises(ValueError, match="router of layer 1 got NaN"):
        logits(model, ids)


def peak_bytes(call) -> int:
    """The most bytes that `call` held at once, above the start."""
    with torch.profiler.profile(profile_memory=True) as profile:
        call()
    return peak_of(profile)


def layer_cost(heads: int, length: int, padded: bool = False, cached: int = 0) -> int:
    """Peak bytes of one attention of these heads over a long prompt, in which a head is wide and a token narrow."""
    layer, rotary = one_layer((8, 16, 8, 24, heads), torch.float32)  # of equal widths, or a CPU holds all scores
    layer.config._attn_implementation_internal = "sdpa"
    x = torch.randn(1, length, 48)
    position = rotary(x, torch.arange(cached, cached + length)[None])
    cache = DynamicCache()
    if cached:
        cache.update(torch.ones(1, 1, cached, 8), torch.ones(1, 1, cached, 8), 0)
    seen = torch.ones(1, cached + length, dtype=torch.bool)
    seen[:, :3] = False
    prompt = prefill.Prompt(cached, seen if padded else None)
    with torch.no_grad():
        return peak_bytes(lambda: layer(x, position, None, cache, prompt=prompt))


@pytest.mark.parametrize("padded, cached", [(False, 0), (True, 0), (False, 256)])
def test_memory_does_not_grow_with_the_heads(monkeypatch, padded, cached):
    """Beside the weights of the projections, which grow."""
    length, numbers = 1024, 2**19
    for name in ("MAX_EXPANDED", "MAX_ATTENDED", "MAX_MASKED"):
        monkeypatch.setattr(prefill, name, numbers)
    few, many = (layer_cost(heads, length, padded, cached) for heads in (32, 128))
    assert many < 1.1 * few
    assert many < 3 * 4 * numbers + 4 * length * 48 * 4  # float32, and four of what a token is
    for name in ("MAX_EXPANDED", "MAX_ATTENDED"):
        monkeypatch.setattr(prefill, name, 2**40)
    assert layer_cost(128, length, padded, cached) > 5 * many


def test_what_a_prompt_costs_is_measured_and_shown(monkeypatch, tmp_path):
    model = small_model()
    cost = prompt_cost(model, 1, 64, repeats=1)
    layer = GrowingCache(config=model.config)
    model(random_ids(1, 64, vocab_size=31), past_key_values=layer)
    assert cost["outcome"] == "done" and cost["ms"] > 0
    assert 64 * 48 * 4 * 2 < cost["peak_gib"] * 2**30 < 64 * 48 * 4 * 60  # some tensors of tokens, of float32

    def out_of_memory(*args, **kwargs):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(model, "forward", out_of_memory)
    lost = prompt_cost(model, 1, 64)
    assert lost == {"ms": None, "peak_gib": None, "outcome": "out of memory"}
    shape = {"suite": "prefill", "preset": "v3", "feed_forward": "dense", "batch": 1, "context": 65536}
    shape |= {"device": "NVIDIA H100 80GB HBM3"}
    rows = [{**shape, "model": "lamoe", **cost, "ms": 1234.5, "peak_gib": 3.52}, {**shape, "model": "native", **lost}]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    (*_, line) = markdown_tables(tmp_path)["prefill"].splitlines()
    assert line == "| v3, dense, 1 x 64k tokens, H100 | out of memory | 1,234 | out of memory / 3.5 |"


def test_a_static_cache_is_expanded_as_far_as_it_is_written():
    model = small_model()
    ids, cache = random_ids(1, 40, vocab_size=31), StaticCache(config=model.config, max_cache_len=8192)
    with torch.no_grad():
        model(ids[:, :20], past_key_values=cache)
        with LargestTensor() as seen:
            model(ids[:, 20:], past_key_values=cache)
    assert seen.numel <= 16 * 8192  # the latents themselves


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "experts"])
def test_a_layer_of_deepseek_v3_over_64k_tokens(sparse):
    changes = {"num_hidden_layers": 1, "first_k_dense_replace": int(not sparse), "vocab_size": 128}
    config = LamoeConfig.from_preset("v3", **changes, bos_token_id=None, eos_token_id=None, pad_token_id=None)
    with torch.device("cuda"):
        model = LamoeForCausalLM._from_config(config, dtype=torch.bfloat16).eval()
        ids = torch.randint(0, 128, (1, 65536))
    with torch.no_grad():
        model(ids[:, :4096], logits_to_keep=1)
        cache = GrowingCache(config=config)
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        model(ids, past_key_values=cache, logits_to_keep=1)
    held = sum(buffer.nbytes for buffer in cache.layers[0]._buffers)
    assert torch.cuda.max_memory_allocated() - before - held < 4 * 2**30
