"""Continuous batching by block tables and recorded batches: the tokens of `generate`, whoever is in the batch.

On a GPU by real graphs, and without one by a stand-in that calls again with the very arguments of the recording.
"""

import copy
import gc
import inspect
import weakref
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import ContinuousBatchingConfig, GenerationConfig
from transformers.generation.continuous_batching import model_runner
from transformers.generation.continuous_batching.cache import PagedAttentionCache
from transformers.generation.continuous_batching.input_outputs import ContinuousBatchingIOs
from transformers.generation.continuous_batching.offloading_manager import OffloadingManager
from transformers.generation.continuous_batching.utils import build_attention_mask

from lamoe import modeling_lamoe
from lamoe.decode_graph import Watch, record
from tests.test_generation import COMMON, generate
from tests.tiny import lamoe_model, random_ids

kernels = pytest.importorskip("lamoe.kernels_attention")
from lamoe import continuous, pages  # noqa: E402 (which import the kernels)

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
NEW = 5
on_gpu = [pytest.mark.gpu, pytest.mark.skipif(not GPU, reason="needs a GPU")]
EXPERTS = "lamoe" if GPU else "grouped_mm"  # the interpreter takes long
# More requests than a batch takes, of lengths below, at and beyond pages of 8; two with a common beginning.
PROMPTS = [random_ids(1, n, seed=n)[0].tolist() for n in (3, 8, 17, 1)] + [[*COMMON[:18], 5], [*COMMON[:18], 7, 9]]
BATCHING = {
    "page_size": 8, "num_blocks": 40, "max_batch_tokens": 16, "max_requests_per_batch": 3, "use_async_batching": False,
}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    changes = {"kv_lora_rank": 32, "num_hidden_layers": 2}
    _, ours = lamoe_model("v3", tmp_path_factory.mktemp("checkpoint"), torch.float32, **changes)
    ours.set_experts_implementation(EXPERTS)
    ours.config.mla_implementation = "triton"
    return ours.to(DEVICE)  # in float32: in bfloat16 random logits are too close to tell rounding from error


@pytest.fixture(scope="module")
def expected(model):
    """What `generate` gives for each of PROMPTS, without the kernel."""
    model.config.mla_implementation = "eager"
    rows = [torch.tensor([prompt], device=DEVICE) for prompt in PROMPTS]
    tokens = [generate(model, row, max_new_tokens=NEW)[0, row.shape[1] :].tolist() for row in rows]
    model.config.mla_implementation = "triton"
    return tokens


def results(model, prompts=PROMPTS, new_tokens=NEW, sequences=1, **settings):
    options = {"max_new_tokens": new_tokens, "eos_token_id": -1, "num_return_sequences": sequences}
    options |= {"do_sample": True, "top_k": 1} if sequences > 1 else {"do_sample": False}  # greedy in both cases
    batching = ContinuousBatchingConfig(**{**BATCHING, **settings})
    answers = model.generate_batch(prompts, GenerationConfig(**options), batching)
    return list(answers.values())


def batched(model, *arguments, **settings):
    """Generated tokens of each prompt, in order."""
    answers = results(model, *arguments, **settings)
    assert not any(answer.error for answer in answers)
    return [answer.generated_tokens for answer in answers]


@pytest.fixture
def reads(monkeypatch):
    """How the kernel was told where keys lie: by "table" or "list", and of how many requests, at each call."""
    calls, real = [], kernels.latent_decode_pages

    def counted(q, r, first, second, table, page, lengths, **options):
        calls.append(("table" if table.dim() == 2 else "list", len(lengths)))
        return real(q, r, first, second, table, page, lengths, **options)

    monkeypatch.setattr(kernels, "latent_decode_pages", counted)
    return calls


class NoQuestions(TorchDispatchMode):
    """Fails where the host asks for a tensor's value, which no graph could answer."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func not in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default), func
        return func(*args, **(kwargs or {}))


class EagerGraph:
    """Calls again what was recorded, with the arguments of then; what replays write is found where it was."""

    def __init__(self, forward, arguments, recording):
        self.forward, self.arguments, self.recording = forward, arguments, recording
        self.found = inspect.getclosurevars(forward).nonlocals["found"]  # the routers' checksums of each call
        self.checksums = self.run()

    def run(self):
        self.recording.append(True)
        with NoQuestions():
            self.forward(*self.arguments)
        self.recording.pop()
        return self.found[-1]

    def replay(self):
        self.checksums.copy_(self.run())

    def reset(self):
        """Nothing is held."""


@pytest.fixture
def graphs(monkeypatch):
    """The graphs that are recorded; without a GPU by the stand-in."""
    made, real = [], model_runner.ModelRunner._capture_graph

    def capture(self, forward_fn, compute_stream, *arguments):
        forward_fn(*arguments)
        graph = EagerGraph(forward_fn, arguments, recording)
        self.inputs_and_outputs.set_graph(graph)

    def counted(self, *arguments):
        (real if GPU else capture)(self, *arguments)
        made.append(self.inputs_and_outputs.get_graph())

    monkeypatch.setattr(model_runner.ModelRunner, "_capture_graph", counted)
    if not GPU:
        recording = []
        monkeypatch.setattr(modeling_lamoe, "recording", lambda x: bool(recording))
        monkeypatch.setattr(model_runner, "get_memory_pools", lambda: (None, None))
        monkeypatch.setattr(continuous, "never_recorded", lambda *_: None)
    return made


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="needs a GPU")
@pytest.mark.parametrize("recorded", [True, False])
def test_gpu_waits_for_inputs(model, expected, reads, graphs, monkeypatch, recorded):
    """Transformers fills a batch's inputs on another stream than it runs on: here, long after they are wanted."""
    prepare = ContinuousBatchingIOs.prepare_batch_tensors

    def late(self, *arguments, **options):
        prepare(self, *arguments, **options)
        inputs = [self._bulk_input_tensor, self.block_table, self.write_index_storage, self.read_index_storage]
        right = [x.clone() for x in inputs]
        for x in inputs:
            x.zero_()
        torch.cuda._sleep(10**7)  # cycles: some milliseconds
        for x, values in zip(inputs, right, strict=True):
            x.copy_(values)

    monkeypatch.setattr(ContinuousBatchingIOs, "prepare_batch_tensors", late)
    assert batched(model, use_cuda_graph=recorded and None) == expected
    assert bool(graphs) == recorded


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="needs a GPU")
def test_gpu_copies_wait_for_what_clears_inputs(model, expected, reads, graphs, monkeypatch):
    """Async batches copy their inputs on a third stream: here, long before they are cleared for the first time."""
    clear = ContinuousBatchingIOs._reset_static_tensors

    def late(self, full_reset=False):
        if full_reset and self.device.type == "cuda":
            torch.cuda._sleep(10**8)  # cycles: some 50 milliseconds
        clear(self, full_reset)

    monkeypatch.setattr(ContinuousBatchingIOs, "_reset_static_tensors", late)
    assert batched(model, use_async_batching=True) == expected


def test_copies_wait_for_what_clears_inputs(monkeypatch):
    waits, here = [], object()
    copies = SimpleNamespace(device="cuda:0", wait_stream=waits.append)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: here)
    monkeypatch.setattr(continuous.PagedRunner, "_static", lambda self, decode: False)
    runner = object.__new__(continuous.PagedRunner)
    for io, expected in ((SimpleNamespace(), []), (SimpleNamespace(h2d_stream=copies), [here])):
        runner.inputs_and_outputs = io
        assert runner.maybe_pad_inputs(3, 4, True) == (3, 4)
        assert waits == expected


@pytest.mark.parametrize("blocks, way", [(None, "table"), (5, "table"), (0, "list")])
def test_tokens_are_those_of_generate(model, expected, reads, blocks, way):
    assert batched(model, max_blocks_per_request=blocks, use_cuda_graph=False) == expected
    assert {read[0] for read in reads} == {way}
    assert {read[1] for read in reads} >= {1, 3}  # requests joined and left


def test_recorded_batches(model, expected, reads, graphs):
    """Padded to powers of two, at most to the greatest batch."""
    assert batched(model, max_requests_per_batch=5) == expected
    assert {read[0] for read in reads} == {"table"} and {read[1] for read in reads} == {1, 2, 4, 5}
    assert len(graphs) == 4


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({}, marks=on_gpu),
        pytest.param({"max_blocks_per_request": 2}, marks=on_gpu),
        pytest.param({"num_blocks": 6, "allow_block_sharing": False, "safety_margin": 0.0}, marks=on_gpu),
    ],
    ids=["plain", "outgrown tables", "memory pressure"],
)
def test_gpu_batches_that_are_prepared_while_others_run(model, expected, reads, graphs, settings):
    """Each of the two pairs of inputs and outputs has its own graphs."""
    for _ in range(3):
        assert batched(model, use_async_batching=True, **settings) == expected
    assert len(graphs) >= 2 * 3 and "table" in {read[0] for read in reads}


@pytest.mark.parametrize("recorded", [True, False])
def test_a_request_that_outgrows_its_table(model, expected, reads, graphs, recorded):
    assert batched(model, max_blocks_per_request=2, use_cuda_graph=recorded and None) == expected
    assert {read[0] for read in reads} == {"table", "list"}
    assert bool(graphs) == recorded


@pytest.mark.parametrize("recorded", [True, False])
def test_poison_behind_what_is_written(model, expected, reads, graphs, monkeypatch, recorded):
    """The ends of pages, free pages and what padding reads from are NaN."""
    build = PagedAttentionCache.__init__

    def poisoned(self, *arguments, **options):
        build(self, *arguments, **options)
        self.cache_tensor.view(torch.float32).fill_(float("nan"))

    monkeypatch.setattr(PagedAttentionCache, "__init__", poisoned)
    assert batched(model, use_cuda_graph=recorded and None, max_requests_per_batch=8) == expected
    assert bool(graphs) == recorded


def test_a_common_beginning_is_shared(model, expected, reads, graphs, monkeypatch):
    shared, search = [], PagedAttentionCache.search_prefix_match
    monkeypatch.setattr(
        PagedAttentionCache, "search_prefix_match", lambda self, *a: shared.append(search(self, *a)) or shared[-1]
    )
    assert batched(model) == expected
    assert max(shared) == 16


def test_several_sequences_of_a_prompt(model, expected, graphs):
    """Greedy ones are equal: a sequence writes to a page of its own, behind those that it shares."""
    got = batched(model, PROMPTS[1:3], NEW, 2)
    assert got == [expected[1], expected[1], expected[2], expected[2]]


def test_memory_pressure(model, expected, reads, graphs, monkeypatch):
    evicted, offload = [], OffloadingManager.offload_requests
    monkeypatch.setattr(
        OffloadingManager, "offload_requests", lambda self: evicted.append(offload(self)) or evicted[-1]
    )
    # 40 slots for three requests of up to 26 tokens
    assert batched(model, num_blocks=5, allow_block_sharing=False, safety_margin=0.0) == expected
    assert any(evicted) and graphs


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_tables_that_the_kernel_cannot_read_after_all(model, expected, reads, monkeypatch, implementation):
    """As when an adapter that cannot be absorbed comes into a model that is being served."""
    monkeypatch.setattr(modeling_lamoe.LamoeModel, "decodes", lambda self, x: False)
    monkeypatch.setattr(continuous, "_blocks", lambda *_: 5)
    listed, real = [], pages.listed
    monkeypatch.setattr(modeling_lamoe, "listed", lambda k: listed.append(k["block_table"] is not None) or real(k))
    model.set_attn_implementation(implementation)
    try:
        assert batched(model, PROMPTS[:3], use_cuda_graph=False) == expected[:3]
    finally:
        model.set_attn_implementation("sdpa")
    assert any(listed) and not reads


# What cannot be recorded, or no longer.


@pytest.mark.parametrize("asynchronous", [False, pytest.param(True, marks=on_gpu)])
def test_nonfinite_logits_fail_the_requests(model, graphs, monkeypatch, asynchronous):
    """A replay's checksums are looked at before its tokens; without an error these would be garbage."""
    weight = model.model.layers[-1].mlp.gate.weight.data
    kept, replayed, send = weight.clone(), [], continuous.Watch.send

    def poison(self, checksums):
        send(self, checksums)
        replayed.append(len(replayed))
        if len(replayed) == 2:
            weight.fill_(float("nan"))

    monkeypatch.setattr(continuous.Watch, "send", poison)
    try:
        answers = results(model, PROMPTS[:2], 12, use_async_batching=asynchronous)
    finally:
        weight.copy_(kept)
    assert [answer.error for answer in answers] == [
        "The router of layer 1 got NaN or infinite values in evaluation. Train in bfloat16, not float16, lower the"
        " learning rate, or look at the batch; router_nonfinite='zero' keeps such tokens out of the experts, 'ignore'"
        " routes them as they are."
    ] * 2
    assert len(replayed) == 3 or GPU  # the very replay that saw it; on a GPU the poison waits for no replay


def test_a_changed_model_is_recorded_anew_or_no_longer(model, expected, graphs, monkeypatch):
    settings, counts = ContinuousBatchingConfig(**BATCHING), []
    options = GenerationConfig(max_new_tokens=NEW, do_sample=False, eos_token_id=-1)
    try:
        for change in ("none", "moved", "none", "hooked"):
            if change == "moved":
                model.lm_head.weight.data = model.lm_head.weight.data.clone()
            if change == "hooked":
                monkeypatch.setattr(continuous, "never_recorded", lambda *_: "a module has hooks")
            answers = model.generate_batch(PROMPTS[:3], options, settings, persistent_manager=True)
            assert [answer.generated_tokens for answer in answers.values()] == expected[:3]
            runner = model._cached_continuous_batching_manager.batch_processor.model_runner
            counts.append(len(graphs))
            assert runner.use_cuda_graph_decode == (change != "hooked")
        assert counts[0] < counts[1] == counts[2] == counts[3]
    finally:
        model.destroy_cached_continuous_batching_manager()


def test_without_the_kernel_nothing_is_recorded(model, graphs, monkeypatch):
    """An adapter that no kernel absorbs: tables become lists, for which the host asks for lengths."""
    assert continuous._recordable(model)
    monkeypatch.setattr(type(model.model), "decodes", lambda self, x, depth=0: False)
    assert not continuous._recordable(model)


def test_a_destroyed_manager_leaves_its_memory_at_once(model):
    results(model)  # whatever is made only once
    options = GenerationConfig(max_new_tokens=2, eos_token_id=-1, do_sample=False)
    model.generate_batch(PROMPTS[:2], options, ContinuousBatchingConfig(**BATCHING), persistent_manager=True)
    manager = model._cached_continuous_batching_manager
    known = [weakref.ref(manager), weakref.ref(manager.batch_processor.cache)]
    gc.collect()
    gc.disable()
    try:
        del manager
        model.destroy_cached_continuous_batching_manager()
        assert [one() for one in known] == [None, None]
    finally:
        gc.enable()


def test_after_an_error_no_older_checksum_is_asked(model):
    runner = continuous.PagedRunner.__new__(continuous.PagedRunner)
    runner.inputs_and_outputs, runner.watches = SimpleNamespace(current_pair=0), {}
    for pair in (0, 1):
        runner.watches[pair] = Watch(torch.zeros(1))
        runner.watches[pair].send(torch.full((1,), float("nan")))
    with pytest.raises(ValueError, match="router"):
        runner.settle(model)
    runner.inputs_and_outputs.current_pair = 1
    runner.settle(model)


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="needs a GPU")
def test_gpu_a_failed_recording_harms_nothing():
    x, before = torch.ones(4, device=DEVICE), torch.cuda.current_stream()
    for _ in range(2):
        with pytest.raises(RuntimeError):
            record(lambda: (x * float(x.sum()),), x.device)
        assert torch.cuda.current_stream() == before
        torch.cuda.empty_cache()
    graph, y = record(lambda: (x * 2,), x.device)
    x.fill_(3)
    graph.replay()
    assert y.tolist() == [6] * 4


def test_a_failed_recording_is_not_the_end(model, expected, graphs, monkeypatch):
    def fail(self, forward_fn, compute_stream, *arguments):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(model_runner.ModelRunner, "_capture_graph", fail)
    assert batched(model, PROMPTS[:3]) == expected[:3]


@pytest.fixture
def made(model, monkeypatch):
    """The settings that a manager ends up with, for those that are given."""

    def settings(**given):
        batching = ContinuousBatchingConfig(**given)
        before = copy.deepcopy(batching)
        manager = model.init_continuous_batching(GenerationConfig(eos_token_id=-1), batching)
        assert batching == before
        return manager.continuous_batching_config

    return settings


def test_settings_by_default(model, made, graphs):
    assert made().max_blocks_per_request == 1  # 160 positions in a page of 256
    assert made(page_size=16).max_blocks_per_request == 10
    model.config.max_position_embeddings = 2**20
    try:
        assert made().max_blocks_per_request == continuous.MOST_BLOCKS == 512
    finally:
        model.config.max_position_embeddings = 160
    assert made().use_cuda_graph == (False, True) and not made().use_async_batching


def test_settings_that_were_given(made, graphs):
    got = made(max_blocks_per_request=7, use_cuda_graph=False)
    assert (got.max_blocks_per_request, got.use_cuda_graph, got.use_async_batching) == (7, (False, False), False)
    assert made(use_cuda_graph=(False, True), use_async_batching=False).use_cuda_graph == (False, True)
    assert made(use_async_batching=True).use_async_batching and not made(use_async_batching=False).use_async_batching
    assert made(max_blocks_per_request=0).use_cuda_graph == (False, False)


def test_settings_that_cannot_be(model, made, monkeypatch):
    said = []
    monkeypatch.setattr(continuous.logger, "warning", said.append)
    monkeypatch.setattr(model.config, "mla_implementation", "eager")
    assert made().max_blocks_per_request == 0 and made().use_cuda_graph == (False, False) and not said
    got = made(max_blocks_per_request=4, use_cuda_graph=True)
    assert got.max_blocks_per_request == 0 and got.use_cuda_graph == (False, False)
    assert said == [
        "max_blocks_per_request is ignored: block tables are for the decode kernel alone.",
        f"use_cuda_graph is ignored: {'the decode kernel is not chosen' if GPU else 'there are no CUDA graphs here'}.",
    ]


def test_a_batch_is_prepared_for_the_requests_that_there_are(model, monkeypatch):
    seen, real = [], type(model).init_continuous_batching
    monkeypatch.setattr(
        type(model), "init_continuous_batching", lambda self, *a, **k: seen.append(k) or real(self, *a, **k)
    )
    batched(model, PROMPTS[:2], 1, 2, max_requests_per_batch=None)
    batched(model, PROMPTS[:2], 1, max_requests_per_batch=3)
    assert [k["continuous_batching_config"].max_requests_per_batch for k in seen] == [4, 3]


@pytest.mark.skipif(GPU, reason="looks at what is being recorded")
def test_a_batch_means_what_transformers_makes_of_it(model, expected, graphs, monkeypatch):
    """Tables against its own lists of slots, and masks against its own masks, in all batches of a run."""
    prepared, prepare = [], ContinuousBatchingIOs.prepare_batch_tensors
    compared, forward = [], type(model.model).forward

    def prepare_both(self, requests_in_batch, *arguments, **options):
        lists = [[]], [[]]
        for request in requests_in_batch:
            state = request.state
            self.cache.extend_read_and_write_indices(
                state.request_id, state.position_offset, request.query_length, *lists
            )
        prepared.append([slots for (slots,) in lists])
        prepare(self, requests_in_batch, *arguments, **options)

    def compare(self, input_ids, **kwargs):
        T = input_ids.shape[1]
        read, written = prepared[-1]
        ends_q, ends_k = kwargs["cu_seq_lens_q"], kwargs["cu_seq_lens_k"]["full_attention"]
        if kwargs["block_table"] is not None:
            padding = T - len(written)
            lengths, step = pages.paged_step(kwargs, T)
            assert lengths.sum() == len(read) and step.written.tolist() == written + [-1] * padding
            lists = pages.listed(kwargs)
            trash = kwargs["cache"].cache_allocators["full_attention"].write_trash_index
            assert lists["read_index"][0].tolist() == read
            assert lists["write_index"][0].tolist() == written + [trash] * padding
            assert lists["max_length_k"]["full_attention"] == lengths.max()
            compared.append("padded table" if padding else "table")
        else:
            S = kwargs["read_index"][0].numel() or T
            x = torch.zeros(1, T, 1, device=DEVICE)
            mask = torch.full((1, 1, T, S), torch.finfo(x.dtype).min, device=DEVICE)
            build_attention_mask(mask, ends_q.tolist(), ends_k.tolist())
            assert torch.equal(pages.batch_mask(self.config, x, None, kwargs), mask)
            compared.append("mask")
        return forward(self, input_ids, **kwargs)

    monkeypatch.setattr(ContinuousBatchingIOs, "prepare_batch_tensors", prepare_both)
    monkeypatch.setattr(type(model.model), "forward", compare)
    monkeypatch.setitem(globals(), "NoQuestions", nullcontext)
    monkeypatch.setattr(pages, "MAX_SHOWN", 100)  # so that masks are made in several blocks of rows
    settings = {"max_requests_per_batch": 5, "max_batch_tokens": 12}
    assert batched(model, **settings) == expected
    assert set(compared) == {"table", "padded table", "mask"}
