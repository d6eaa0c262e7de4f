"""`generate` and `generate_batch`: the native classes' tokens, whatever the cache, the decoding and the batch.

Transformers' own tests of generation are not in its source distribution; these are the same checks.
"""

import asyncio
import copy

import pytest
import torch
from transformers import CompileConfig, ContinuousBatchingConfig, DynamicCache, GenerationConfig
from transformers.generation.continuous_batching.cache import PagedAttentionCache
from transformers.generation.continuous_batching.offloading_manager import OffloadingManager

from lamoe import LamoeForCausalLM
from lamoe.cache import GrowingCache
from tests.tiny import lamoe_model, random_ids

CLOSE = {"rtol": 1e-3, "atol": 1e-3}  # float32 on logits of about 10
NEW = 12


@pytest.fixture(scope="module", params=["v2-lite", "v3", "glm-4.7-flash"])
def pair(request, tmp_path_factory):
    return lamoe_model(request.param, tmp_path_factory.mktemp("checkpoint"), torch.float32)


@pytest.fixture(scope="module")
def ours(pair):
    return pair[1]


def generate(model, ids, **options):
    """Tokens of `model`; without an attention mask among the options all of `ids` are seen, the padding id too."""
    options = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0, **options}
    if ids is not None:
        options.setdefault("attention_mask", torch.ones_like(ids))
    return model.generate(ids, **options)


def with_scores(model, ids, seed=0, **options):
    torch.manual_seed(seed)
    return generate(model, ids, return_dict_in_generate=True, output_logits=True, **options)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_cache": False},
        {"prefill_chunk_size": 4},
        {"do_sample": True, "temperature": 0.8, "top_k": 20, "top_p": 0.9, "num_return_sequences": 3},
        {"num_beams": 4, "num_return_sequences": 3, "length_penalty": 0.5, "early_stopping": True},
        {"num_beams": 3, "do_sample": True, "num_return_sequences": 2},
    ],
    ids=["greedy", "no-cache", "chunked-prefill", "sampling", "beams", "sampled-beams"],
)
def test_tokens_and_logits_equal_native(pair, options):
    native, ours = pair
    ids = random_ids(2, 11)
    native_options = {name: value for name, value in options.items() if name != "prefill_chunk_size"}
    expected, got = with_scores(native, ids, **native_options), with_scores(ours, ids, **options)
    rows = 2 * options.get("num_return_sequences", 1)
    assert expected.sequences.shape == (rows, 11 + NEW)
    assert torch.equal(got.sequences, expected.sequences)
    torch.testing.assert_close(got.logits, expected.logits, **CLOSE)
    if rows > 2:  # sequences of one prompt differ, or returning several of them tests nothing
        assert len({tuple(row) for row in got.sequences.tolist()}) == rows


def test_stopping_at_an_end_token(pair):
    native, ours = pair
    ids = random_ids(3, 11)
    free = generate(native, ids)
    end = free[0, 11 + 4].item()
    stop = 11 + free[0, 11:].tolist().index(end)
    expected, got = (generate(model, ids, eos_token_id=end, pad_token_id=1) for model in pair)
    assert torch.equal(got, expected)
    assert torch.equal(got[0, : stop + 1], free[0, : stop + 1])
    assert (got[0, stop + 1 :] == 1).all()


class CountedForwards:
    """Numbers of new tokens of each forward of a model."""

    def __init__(self, model, monkeypatch):
        self.lengths, real = [], type(model).forward

        def forward(this, input_ids=None, *args, **kwargs):
            if this is model:
                self.lengths.append((input_ids if input_ids is not None else kwargs["inputs_embeds"]).shape[1])
            return real(this, input_ids, *args, **kwargs)

        monkeypatch.setattr(type(model), "forward", forward)


def test_assisted_generation_equals_greedy(ours, monkeypatch):
    ids = random_ids(1, 11)
    expected = generate(ours, ids, max_new_tokens=20)
    config = copy.deepcopy(ours.config)
    config.num_hidden_layers = 1
    torch.manual_seed(3)
    stranger, twin = LamoeForCausalLM(config).eval(), copy.deepcopy(ours)
    for assistant in (stranger, twin):
        assistant.generation_config.num_assistant_tokens = 4
        assistant.generation_config.num_assistant_tokens_schedule = "constant"
        assistant.generation_config.assistant_confidence_threshold = 0.0
    for assistant, forwards in ((stranger, range(15, 21)), (twin, range(4, 6))):
        counted = CountedForwards(ours, monkeypatch)
        assert torch.equal(generate(ours, ids, max_new_tokens=20, assistant_model=assistant), expected)
        assert len(counted.lengths) in forwards, counted.lengths  # every guess rejected, or every one accepted


def test_prompt_lookup_equals_greedy(ours, monkeypatch):
    ids = random_ids(1, 6).repeat(1, 4)
    expected = generate(ours, ids, max_new_tokens=20)
    counted = CountedForwards(ours, monkeypatch)
    assert torch.equal(generate(ours, ids, max_new_tokens=20, prompt_lookup_num_tokens=3), expected)
    assert max(counted.lengths[1:]) > 1  # guesses were made


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("beams", [1, 3])
def test_a_left_padded_row_gives_the_tokens_of_the_row_alone(ours, cache, beams):
    padding = (7, 0, 2)
    ids = random_ids(3, 13)
    mask = torch.stack([(torch.arange(13) >= n).long() for n in padding])
    options = {"cache_implementation": cache, "num_beams": beams}
    got = generate(ours, ids.masked_fill(mask == 0, 0), attention_mask=mask, **options)
    for row, n in enumerate(padding):
        assert torch.equal(got[row, 13:], generate(ours, ids[row : row + 1, n:], num_beams=beams)[0, 13 - n :])


def test_start_from_embeddings(ours):
    ids = random_ids(2, 11)
    got = generate(ours, None, inputs_embeds=ours.get_input_embeddings()(ids).detach())
    assert torch.equal(got, generate(ours, ids)[:, 11:])


@pytest.mark.parametrize("more", [0, 1, 5])
def test_continue_from_a_returned_cache(pair, more):
    native, ours = pair
    ids = random_ids(2, 11)
    first = generate(ours, ids, max_new_tokens=6, return_dict_in_generate=True)
    assert first.past_key_values.get_seq_length() == 16
    longer = torch.cat((first.sequences, random_ids(2, more, seed=9)), 1)
    got = generate(ours, longer, past_key_values=first.past_key_values)
    assert torch.equal(got, generate(native, longer))


def test_logits_to_keep(ours):
    ids = random_ids(2, 11)
    with torch.no_grad():
        every = ours(ids).logits
        for keep, expected in ((1, every[:, -1:]), (4, every[:, -4:]), (0, every)):
            torch.testing.assert_close(ours(ids, logits_to_keep=keep).logits, expected, **CLOSE)
        chosen = torch.tensor([2, 7, 10])
        torch.testing.assert_close(ours(ids, logits_to_keep=chosen).logits, every[:, chosen], **CLOSE)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_recorded_outputs(pair, cache):
    native, ours = pair
    ids, config = random_ids(2, 11), pair[1].config
    record = {name: True for name in ("output_scores", "output_attentions", "output_hidden_states")}
    results = []
    for model in pair:
        model.set_attn_implementation("eager")
        results.append(generate(model, ids, max_new_tokens=4, return_dict_in_generate=True, **record))
        if model is ours:
            results[-1] = generate(
                model, ids, max_new_tokens=4, return_dict_in_generate=True, cache_implementation=cache, **record
            )
        model.set_attn_implementation("sdpa")
    expected, got = results
    assert [score.shape for score in got.scores] == [(2, config.vocab_size)] * 4
    torch.testing.assert_close(got.scores, expected.scores, **CLOSE)
    assert len(got.attentions) == len(got.hidden_states) == 4
    for step, (weights, states) in enumerate(zip(got.attentions, got.hidden_states, strict=True)):
        T, S = (11, 11) if step == 0 else (1, 11 + step)
        assert len(weights) == config.num_hidden_layers
        assert len(states) == config.num_hidden_layers + 1
        torch.testing.assert_close(states, expected.hidden_states[step], **CLOSE)
        for layer, native_layer in zip(weights, expected.attentions[step], strict=True):
            assert layer.shape[:3] == (2, config.num_attention_heads, T)
            assert not layer[..., S:].any()  # the empty slots of a static cache
            torch.testing.assert_close(layer[..., :S], native_layer, **CLOSE)


@pytest.mark.parametrize(
    "cache",
    [
        "static",
        pytest.param("offloaded", marks=pytest.mark.gpu),
        pytest.param("offloaded_static", marks=pytest.mark.gpu),
    ],
)
def test_caches_give_equal_tokens(ours, cache):
    if "offloaded" in cache and not torch.cuda.is_available():
        pytest.skip("Transformers' offloading needs a GPU's streams")
    model = ours.to("cuda") if "offloaded" in cache else ours
    ids = random_ids(2, 11).to(model.device)
    try:
        expected = generate(model, ids, cache_implementation="dynamic", disable_compile=True)
        for options in ({}, {"num_beams": 3}, {"prefill_chunk_size": 4}):
            got = generate(model, ids, cache_implementation=cache, disable_compile=True, **options)
            beams = options.get("num_beams", 1)
            want = expected if beams == 1 else generate(model, ids, num_beams=beams)
            assert torch.equal(got, want)
    finally:
        ours.to("cpu")


@pytest.mark.parametrize("backend", ["fp8", "quanto"])
def test_a_quantised_cache_is_near(ours, backend):
    options = {"backend": backend}
    if backend == "fp8" and torch.tensor(470.0).to(torch.float8_e4m3fn).isnan():
        pytest.skip("Transformers keeps the first tokens' scale, and what exceeds it is NaN in PyTorch before 2.13")
    if backend == "quanto":
        pytest.importorskip("optimum.quanto")
        options |= {"nbits": 4, "q_group_size": 16, "residual_length": 4}
    ids = random_ids(2, 12)
    options = {"cache_implementation": "quantized", "cache_config": options}
    got, exact = with_scores(ours, ids, **options), with_scores(ours, ids)
    assert got.sequences.shape == exact.sequences.shape
    torch.testing.assert_close(got.logits[0], exact.logits[0], **CLOSE)  # the prompt is seen before it is quantised
    assert not torch.equal(got.logits[1], exact.logits[1])
    assert torch.cosine_similarity(got.logits[1], exact.logits[1]).min() > (0.99 if backend == "fp8" else 0.8)


# What makes the only layer of a model one with experts.
SPARSE = {
    "v2-lite": {"first_k_dense_replace": 0},
    "v3": {"first_k_dense_replace": 0},
    "glm-4.7-flash": {"mlp_layer_types": ["sparse"]},
}


def compiled(ours, backend: str, **options):
    """Tokens of a static cache under torch.compile with whole graphs, and how many graphs there were."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    settings = CompileConfig(fullgraph=True, dynamic=None, backend=backend, mode=None)
    settings._compile_all_devices = True
    model = copy.deepcopy(ours)  # a compiled call is kept on the model
    tokens = generate(model, random_ids(2, 11), cache_implementation="static", compile_config=settings, **options)
    assert not torch._dynamo.utils.counters["graph_break"]
    return tokens, torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("family, backend", [("v2-lite", "eager"), ("glm-4.7-flash", "aot_eager")])
def test_a_compiled_static_cache_is_one_graph(tmp_path, family, backend):
    _, ours = lamoe_model(family, tmp_path, torch.float32, num_hidden_layers=1, **SPARSE[family])
    tokens, graphs = compiled(ours, backend)
    assert torch.equal(tokens, generate(ours, random_ids(2, 11)))
    assert graphs == 1  # no step compiles anew


@pytest.mark.slow
def test_a_static_cache_compiled_by_inductor(tmp_path):
    _, ours = lamoe_model("v3", tmp_path, torch.float32, num_hidden_layers=1, **SPARSE["v3"])
    tokens, graphs = compiled(ours, "inductor")
    assert torch.equal(tokens, generate(ours, random_ids(2, 11)))
    assert graphs == 1


# Continuous batching: eight prompts, two of them with a common beginning of four pages.
COMMON = random_ids(1, 34, seed=20)[0].tolist()
PROMPTS = [random_ids(1, n, seed=n)[0].tolist() for n in (3, 9, 21, 40, 5, 1)]
PROMPTS += [[*COMMON, 5, 6], [*COMMON, 7]]
BATCHING = {"page_size": 8, "num_blocks": 24, "max_batch_tokens": 16, "max_requests_per_batch": 4}


def batched(model, prompts=PROMPTS, **settings):
    """Generated tokens of each prompt, in order, by continuous batching."""
    results = model.generate_batch(
        prompts,
        generation_config=GenerationConfig(max_new_tokens=NEW, do_sample=False, eos_token_id=-1),
        continuous_batching_config=ContinuousBatchingConfig(**{**BATCHING, **settings}),
    )
    assert [result.error for result in results.values()] == [None] * len(prompts)
    return [result.generated_tokens for result in results.values()]


def alone(model, prompts=PROMPTS):
    return [generate(model, torch.tensor([p]))[0, len(p) :].tolist() for p in prompts]


@pytest.fixture(scope="module")
def one_by_one(ours):
    """What `generate` gives for each of PROMPTS."""
    return alone(ours)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_continuous_batching_gives_the_tokens_of_generate(ours, one_by_one, implementation, monkeypatch):
    counted = CountedForwards(ours, monkeypatch)
    shared, search = [], PagedAttentionCache.search_prefix_match
    monkeypatch.setattr(
        PagedAttentionCache,
        "search_prefix_match",
        lambda self, *args: shared.append(search(self, *args)) or shared[-1],
    )
    ours.set_attn_implementation(implementation)
    try:
        assert batched(ours) == one_by_one
        assert ours.config._attn_implementation == implementation
    finally:
        ours.set_attn_implementation("sdpa")
    assert max(counted.lengths) <= BATCHING["max_batch_tokens"] < max(map(len, PROMPTS))  # prefills were cut
    assert len(counted.lengths) > 2 * NEW  # not all requests at once
    assert max(shared) == 32  # four whole pages of the common beginning


def test_continuous_batching_under_memory_pressure(ours, one_by_one, monkeypatch):
    evicted, offload = [], OffloadingManager.offload_requests
    monkeypatch.setattr(
        OffloadingManager, "offload_requests", lambda self: evicted.append(offload(self)) or evicted[-1]
    )
    # 72 slots for requests of up to 52 tokens
    assert batched(ours, num_blocks=9, allow_block_sharing=False, safety_margin=0.0) == one_by_one
    assert any(evicted)


def test_several_sequences_of_a_prompt_by_continuous_batching(ours):
    results = ours.generate_batch(
        PROMPTS[:3],
        generation_config=GenerationConfig(max_new_tokens=5, do_sample=True, eos_token_id=-1, num_return_sequences=2),
        continuous_batching_config=ContinuousBatchingConfig(**BATCHING, seed=3),
    )
    assert len(results) == 6
    assert all(len(result.generated_tokens) == 5 and result.error is None for result in results.values())


def test_continuous_batching_changes_nothing_of_the_callers(ours, one_by_one):
    settings, before = ContinuousBatchingConfig(**BATCHING), ours.config.to_dict()
    config, kept = ours.config, copy.deepcopy(settings)
    generation = GenerationConfig(max_new_tokens=3, do_sample=False, eos_token_id=-1)
    first = ours.generate_batch(PROMPTS[:2], generation_config=generation, continuous_batching_config=settings)
    assert settings == kept
    assert ours.config is config and ours.config.to_dict() == before
    second = ours.generate_batch(PROMPTS[:2], generation_config=generation, continuous_batching_config=settings)
    tokens = [[result.generated_tokens for result in results.values()] for results in (first, second)]
    assert tokens[0] == tokens[1] == [row[:3] for row in one_by_one[:2]]


@pytest.mark.parametrize("kv_lora_rank", [16, 17])
def test_pages_hold_latents_and_nothing_else(tmp_path, monkeypatch, kv_lora_rank):
    _, ours = lamoe_model("v3", tmp_path, torch.float32, kv_lora_rank=kv_lora_rank)
    caches, build = [], PagedAttentionCache.__init__

    def kept(self, *args, **kwargs):
        build(self, *args, **kwargs)
        caches.append(self)

    monkeypatch.setattr(PagedAttentionCache, "__init__", kept)
    assert batched(ours, PROMPTS[:4]) == alone(ours, PROMPTS[:4])
    (cache,) = caches
    half = -(-(kv_lora_rank + ours.config.qk_rope_head_dim) // 2)
    (allocator,) = cache.cache_allocators.values()
    a_token = allocator.bytes_per_block / BATCHING["page_size"]
    assert a_token == ours.config.num_hidden_layers * 2 * half * 4
    if (kv_lora_rank + ours.config.qk_rope_head_dim) % 2 == 0:
        assert a_token == ours.config.kv_bytes_per_token(4)
    # the tensor itself: all sectors and the two that padding is written to
    assert cache.cache_tensor.nbytes == (cache.num_sectors + 2) * cache.bytes_per_sector
    assert cache.num_sectors * cache.bytes_per_sector <= (BATCHING["num_blocks"] + 1) * allocator.bytes_per_block * 4


def test_what_transformers_serve_calls(ours, one_by_one):
    """`transformers serve --continuous-batching` drives a model through this manager."""
    serving = pytest.importorskip("transformers.cli.serving.utils")
    manager = serving.CBGenerateManager(ContinuousBatchingConfig(**BATCHING))
    options = GenerationConfig(max_new_tokens=NEW, do_sample=False, eos_token_id=-1)

    class Decoder:
        def decode(self, tokens, **_):
            return " ".join(map(str, tokens))

    async def requests():
        manager.init_cb(ours, options)
        return await asyncio.gather(
            *(
                manager.generate_non_streaming(ours, Decoder(), {"input_ids": prompt}, options, f"request {i}")
                for i, prompt in enumerate(PROMPTS[:4])
            )
        )

    try:
        answers = asyncio.run(requests())
    finally:
        manager.stop()
    assert [tokens for _, _, tokens in answers] == one_by_one[:4]


def test_the_callers_cache_is_the_one_that_is_filled(ours):
    for make in (DynamicCache, GrowingCache):
        cache = make(config=ours.config)
        generate(ours, random_ids(1, 5), past_key_values=cache, max_new_tokens=3)
        assert cache.get_seq_length() == 7
    out = generate(ours, random_ids(1, 5), max_new_tokens=3, return_dict_in_generate=True)
    assert type(out.past_key_values) is GrowingCache


@pytest.fixture(scope="module", params=["v2-lite", "glm-4.7-flash"])
def triton_model(request, tmp_path_factory):
    pytest.importorskip("lamoe.kernels_attention")
    if torch.cuda.is_available():
        pytest.skip("in float32, by Triton's interpreter, on the CPU")
    return lamoe_model(request.param, tmp_path_factory.mktemp("triton"), torch.float32, kv_lora_rank=32)[1]


@pytest.fixture
def kernel_calls(monkeypatch):
    kernels, calls = pytest.importorskip("lamoe.kernels_attention"), []
    for name in ("latent_decode", "latent_decode_pages"):
        real = getattr(kernels, name)
        monkeypatch.setattr(kernels, name, lambda *a, name=name, real=real, **k: calls.append(name) or real(*a, **k))
    return calls


@pytest.mark.parametrize(
    "options, padded",
    [
        ({}, False),
        ({}, True),
        ({"cache_implementation": "static", "disable_compile": True}, True),
        ({"num_beams": 2}, False),
        ({"prompt_lookup_num_tokens": 3}, False),
    ],
    ids=["growing", "padded", "static", "beams", "several tokens a step"],
)
def test_the_decode_kernel_gives_the_tokens_of_eager(triton_model, kernel_calls, monkeypatch, options, padded):
    ids = random_ids(2 if padded else 1, 11)
    mask = torch.ones_like(ids)
    mask[0, : 4 * padded] = 0
    options = {"attention_mask": mask, "max_new_tokens": 6, **options}
    expected = generate(triton_model, ids, **options)
    assert not kernel_calls
    monkeypatch.setattr(triton_model.config, "mla_implementation", "triton")
    assert torch.equal(generate(triton_model, ids, **options), expected)
    assert set(kernel_calls) == {"latent_decode"}


def test_the_decode_kernel_reads_pages(triton_model, kernel_calls, monkeypatch):
    expected = batched(triton_model, PROMPTS[:3])
    assert not kernel_calls
    monkeypatch.setattr(triton_model.config, "mla_implementation", "triton")
    assert batched(triton_model, PROMPTS[:3]) == expected
    assert set(kernel_calls) == {"latent_decode_pages"}


def test_forced_where_it_cannot_run_the_decode_kernel_says_why(ours, monkeypatch):
    monkeypatch.setattr(ours.config, "mla_implementation", "triton")
    with pytest.raises(ValueError, match=r"(kv_lora_rank=|the cache is on 'cpu').* use mla_implementation='eager'"):
        generate(ours, random_ids(1, 5))


def test_generating_in_the_middle_of_training_counts_nothing(tmp_path):
    """As TRL's GRPO does: the same tokens as in evaluation, no load, and every module is as it was."""
    _, model = lamoe_model("v3", tmp_path, torch.float32)
    ids = random_ids(1, 5)
    settings = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(ids, **settings)
    model.train()
    model.model.norm.eval()
    assert torch.equal(model.generate(ids, **settings), expected)
    assert not any(router.tokens_per_expert.any() for router in model.routers)
    assert [name for name, module in model.named_modules() if not module.training] == ["model.norm"]
    model(ids)
    assert all(router.tokens_per_expert.sum() == 5 * 3 for router in model.routers)
