"""`generate(..., use_mtp=True)`: greedy tokens without drafts, sampled ones by their distribution, any batch."""

import copy

import pytest
import torch
from transformers import DynamicCache, LogitsProcessor, LogitsProcessorList, StoppingCriteria
from transformers.generation import StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from lamoe.mtp_generation import Drafter, Speculation, verify_by_sampling, verify_greedily
from tests.test_mtp import mtp_model

NEW, WORDS = 16, 31


def sentences(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    """Rows that go round a circle of words in steps of 7; now and then one is another word."""
    generator = torch.Generator().manual_seed(seed)
    start = torch.randint(0, WORDS, (rows, 1), generator=generator)
    ids = (start + 7 * torch.arange(length)) % WORDS
    noise = torch.rand(ids.shape, generator=generator) < 0.1
    return torch.where(noise, torch.randint(0, WORDS, ids.shape, generator=generator), ids)


@pytest.fixture(scope="module")
def trained():
    """A model with three depths after some seconds of training."""
    model = mtp_model(3, initializer_range=0.1, vocab_size=WORDS).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for step in range(40):
        ids = sentences(8, 24, seed=step)
        out = model(ids, labels=ids)
        out.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(out.mtp_loss))
    assert losses[-1] < losses[0] / 2
    return model.eval()


@pytest.fixture(scope="module", params=[1, 2, 3])
def model(request, trained):
    """The trained model with so many depths, shaken so that some drafts fail; in float64, so that rounding decides
    nothing."""
    found = copy.deepcopy(trained).double()
    for layer in found.model.mtp_layers:
        layer.eh_proj.weight.data += 0.25 * torch.randn(layer.eh_proj.weight.shape, generator=torch.manual_seed(5))
    del found.model.layers[3 + request.param :]
    found.config.num_nextn_predict_layers = request.param
    return found


def generate(model, ids, **options):
    options = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0, **options}
    options.setdefault("attention_mask", torch.ones_like(ids))
    return model.generate(ids, **options)


def batch(rows: int, length: int = 11):
    """Prompts, and a mask that hides a different number of words on the left of each."""
    ids = sentences(rows, length, seed=9)
    mask = torch.ones_like(ids)
    for row in range(1, rows):
        mask[row, : 2 * row] = 0
    return ids, mask


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("length", [1, 2, 11])
def test_greedy_tokens_are_those_without_drafts(model, rows, length):
    ids, mask = batch(rows, length) if length > 2 else (sentences(rows, length), torch.ones(rows, length).long())
    expected = generate(model, ids, attention_mask=mask)
    got = generate(model, ids, attention_mask=mask, use_mtp=True)
    assert torch.equal(got, expected)
    found = model.speculation
    if length > 2:
        assert found.acceptance_rate > 0.1
    if rows == 1:
        assert sum(found.accepted) + found.rounds + 1 == NEW


def test_drafts_of_a_trained_model_are_accepted_above_chance(trained):
    ids, mask = batch(3)
    assert torch.equal(*(generate(trained, ids, attention_mask=mask, use_mtp=mtp) for mtp in (False, True)))
    for accepted, drafted in zip(trained.speculation.accepted, trained.speculation.drafted, strict=True):
        assert accepted / drafted > 0.5  # by chance 1/31
    assert trained.speculation.rounds < NEW / 2


def test_random_layers_change_no_token(model):
    stranger = copy.deepcopy(model)
    for layer in stranger.model.mtp_layers:
        torch.nn.init.normal_(layer.eh_proj.weight)
    ids, mask = batch(3)
    expected = generate(model, ids, attention_mask=mask)
    assert torch.equal(generate(stranger, ids, attention_mask=mask, use_mtp=True), expected)
    assert stranger.speculation.acceptance_rate < 0.3


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("depths", [1, 2, 3])
def test_rows_that_keep_different_numbers(depths, rows, monkeypatch):
    """A random model, to which every word matters; what it checks is its own greedy continuation, often spoilt.

    Tokens are those without drafts, and whatever the caches hold after rounds of rejected drafts, each draft that the
    layers make is that of all words anew.
    """
    model = mtp_model(depths, dtype=torch.float64, vocab_size=WORDS)
    ids, mask = batch(rows)
    expected = generate(model, ids, attention_mask=mask, max_new_tokens=NEW + depths)
    pads, made, real = (mask == 0).sum(dim=1), [], Drafter.draft
    generator = torch.Generator().manual_seed(2)

    def half_right(self, states, tokens, kept, first, *rest):
        found = real(self, states, tokens, kept, first, *rest)
        known = (first + kept + pads).clamp(max=expected.shape[1] - len(found))
        made.append((known.tolist(), torch.stack(found, dim=1) if found else None))
        right = [expected.gather(1, (known + i).unsqueeze(1)).squeeze(1) for i in range(len(found))]
        return [torch.where(torch.rand(rows, generator=generator) < 0.6, x, (x + 1) % WORDS) for x in right]

    monkeypatch.setattr(Drafter, "draft", half_right)
    got = generate(model, ids, attention_mask=mask, use_mtp=True)
    assert torch.equal(got, expected[:, : 11 + NEW])
    assert 0.2 < model.speculation.acceptance_rate < 0.9
    checked = 0
    for known, drafts in made:
        for row in range(rows if drafts is not None else 0):
            if known[row] < 11 + NEW:
                prefix = expected[row : row + 1, pads[row] : known[row]]
                assert drafts[row].tolist() == plain_drafts(model, prefix, drafts.shape[1])
                checked += 1
    assert checked >= rows * 3


def plain_drafts(model, prefix, count):
    """Drafts behind `prefix` [1, N] without any cache: depth k over the places 0 to N - 2 and the words k ahead."""
    ids, found = prefix, []
    states = model.model(prefix[:, :-1]).last_hidden_state
    for depth in range(1, count + 1):
        embeds = model.model.mtp_embeds(depth, ids[:, depth:])
        positions = torch.arange(states.shape[1], device=states.device).unsqueeze(0)
        states = model.model.mtp_step(depth, embeds, states, None, positions)
        token = model.mtp_head(depth)(states[:, -1]).argmax(-1)
        found.append(int(token))
        ids = torch.cat((ids, token.unsqueeze(0)), dim=1)
    return found


@pytest.mark.parametrize("rows", [1, 3])
def test_rows_end_at_an_end_token(model, rows):
    ids, mask = batch(rows)
    free = generate(model, ids, attention_mask=mask)
    options = {"attention_mask": mask, "eos_token_id": [free[0, 11 + 5].item(), 97], "pad_token_id": 3}
    options |= {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    expected, got = (generate(model, ids, use_mtp=mtp, **options) for mtp in (False, True))
    assert torch.equal(got.sequences, expected.sequences)
    assert rows == 1 or (got.sequences == 3).any()
    assert got.past_key_values.get_seq_length() == expected.past_key_values.get_seq_length()
    for name in ("scores", "logits"):
        ours, theirs = getattr(got, name), getattr(expected, name)
        assert len(ours) == len(theirs)
        for step, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            live = (got.sequences[:, 11 : 11 + step] != options["eos_token_id"][0]).all(dim=1)
            torch.testing.assert_close(a[live], b[live])
            assert not a[~live].any()


class Contains(StoppingCriteria):
    """Stops a row that has had the word so many times."""

    def __init__(self, word, times):
        self.word, self.times = word, times

    def __call__(self, input_ids, scores, **kwargs):
        return (input_ids == self.word).sum(dim=1) >= self.times


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("end", [None, 0])
def test_stopping_criteria(model, rows, end):
    ids, mask = batch(rows)
    word = generate(model, ids, attention_mask=mask)[0, -3].item()
    criteria = StoppingCriteriaList([Contains(word, int((ids == word).sum(1).max()) + 1)])
    options = {"attention_mask": mask, "stopping_criteria": criteria, "eos_token_id": end}
    expected, got = (generate(model, ids, use_mtp=mtp, **options) for mtp in (False, True))
    assert torch.equal(got, expected)
    assert got.shape[1] < 11 + NEW or rows > 1


class NotAfter(LogitsProcessor):
    """Forbids the word that comes seven after the one before the last: looks at the whole row."""

    def __call__(self, input_ids, scores):
        return scores.scatter(1, ((input_ids[:, -2:].sum(dim=1) + 7) % WORDS).unsqueeze(1), float("-inf"))


@pytest.mark.parametrize("rows", [1, 3])
def test_logits_processors(model, rows):
    ids, mask = batch(rows)
    options = {"attention_mask": mask, "repetition_penalty": 1.3, "min_new_tokens": 9, "eos_token_id": 5}
    options |= {"no_repeat_ngram_size": 3, "logits_processor": LogitsProcessorList([NotAfter()])}
    expected, got = (generate(model, ids, use_mtp=mtp, **options) for mtp in (False, True))
    assert torch.equal(got, expected)
    assert model.speculation.acceptance_rate > 0.05


@pytest.mark.parametrize("rows", [1, 3])
def test_a_cache_goes_on_without_drafts(model, rows):
    """What is in the cache afterwards is what would be there without drafts, for whoever goes on with it."""
    ids, mask = batch(rows)
    whole = generate(model, ids, attention_mask=mask, max_new_tokens=2 * NEW)
    cache = DynamicCache(config=model.config)
    first = generate(model, ids, attention_mask=mask, past_key_values=cache, use_mtp=True)
    assert cache.get_seq_length() == 11 + NEW - 1
    seen = torch.cat((mask, mask.new_ones(rows, NEW)), dim=1)
    for mtp in (False, True):
        again = copy.deepcopy(cache)
        assert torch.equal(generate(model, first, attention_mask=seen, past_key_values=again, use_mtp=mtp), whole)


def test_a_prompt_in_chunks(model):
    ids, mask = batch(3)
    expected = generate(model, ids, attention_mask=mask, use_mtp=True)
    rounds = model.speculation
    assert torch.equal(generate(model, ids, attention_mask=mask, use_mtp=True, prefill_chunk_size=4), expected)
    assert model.speculation == rounds


@pytest.mark.parametrize("form", ["expanded", "absorbed"])
def test_every_form_of_attention(model, form):
    ids, mask = batch(3)
    expected = generate(model, ids, attention_mask=mask)
    other = copy.deepcopy(model)
    other.config.mla_form = form
    assert torch.equal(generate(other, ids, attention_mask=mask, use_mtp=True), expected)


def test_the_decode_kernel_sees_no_rejected_draft():
    """In Triton's interpreter where there is no GPU."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = mtp_model(1, kv_lora_rank=32, qk_rope_head_dim=32, num_hidden_layers=2).to(device)
    ids, mask = (x.to(device) for x in batch(2, 6))
    expected = generate(model, ids, attention_mask=mask, max_new_tokens=4)
    model.config.mla_implementation = "triton"
    assert torch.equal(generate(model, ids, attention_mask=mask, max_new_tokens=4, use_mtp=True), expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 3])
def test_tokens_on_a_gpu(trained, rows):
    model = copy.deepcopy(trained).to("cuda")
    ids, mask = (x.to("cuda") for x in batch(rows))
    expected = generate(model, ids, attention_mask=mask)
    assert torch.equal(generate(model, ids, attention_mask=mask, use_mtp=True), expected)
    assert model.speculation.acceptance_rate > 0.3


# Sampling


def test_verification_by_argmax():
    scores = torch.tensor([[[0, 1], [1, 0], [0, 1]], [[1, 0], [0, 1], [1, 0]]]).float()
    tokens, kept = verify_greedily(scores, torch.tensor([[1, 0], [1, 1]]))
    assert tokens.tolist() == [[1, 0, 1], [0, 1, 0]] and kept.tolist() == [2, 0]


def test_sampled_tokens_have_the_models_distribution():
    """Two tokens by one draft, many times over: their joint frequencies, whatever q is."""
    many, W = 60_000, 4
    first = torch.tensor([0.5, 0.3, 0.2, 0.0]).log()
    second = torch.randn(W, W)  # by the first token
    q = torch.tensor([0.1, 0.2, 0.3, 0.4])
    drafts = torch.multinomial(q.expand(many, -1), 1)
    scores = torch.stack((first.expand(many, -1), second[drafts[:, 0]]), dim=1)
    tokens, kept = verify_by_sampling(scores, drafts, q.expand(many, 1, -1))
    assert torch.equal(tokens[kept == 1][:, 0], drafts[kept == 1][:, 0])
    torch.testing.assert_close(tokens[:, 0].bincount(minlength=W) / many, first.exp(), rtol=0, atol=0.01)
    torch.testing.assert_close((kept == 1).float().mean(), torch.tensor(0.1 + 0.2 + 0.2), rtol=0, atol=0.01)
    for word in range(3):
        after = tokens[(kept == 1) & (tokens[:, 0] == word), 1]
        torch.testing.assert_close(
            after.bincount(minlength=W) / len(after), second[word].softmax(0), rtol=0, atol=0.02
        )
    same, kept = verify_by_sampling(
        first.expand(many, 2, -1), torch.multinomial(first.exp().expand(many, -1), 1), first.exp().expand(many, 1, -1)
    )
    assert (kept == 1).all()
    torch.testing.assert_close(same[:, 1].bincount(minlength=W) / many, first.exp(), rtol=0, atol=0.01)


def test_sampling_by_generate(trained):
    """The third of three sampled tokens, against its exact distribution over all ways to it."""
    model = copy.deepcopy(trained)
    ids, rows = sentences(1, 9, seed=3), 3000
    settings = {"do_sample": True, "temperature": 2.0, "top_k": 3, "max_new_tokens": 3}
    torch.manual_seed(1)
    got = generate(model, ids.expand(rows, -1), use_mtp=True, **settings)
    assert 0.1 < model.speculation.acceptance_rate < 1

    def following(prefixes):
        best, words = (model(prefixes).logits[:, -1] / 2).topk(3)
        return best.softmax(-1), words

    exact = torch.zeros(WORDS)
    with torch.no_grad():
        for p1, w1 in zip(*(x[0] for x in following(ids)), strict=True):
            one = torch.cat((ids, w1.view(1, 1)), dim=1)
            for p2, w2 in zip(*(x[0] for x in following(one)), strict=True):
                p3, w3 = following(torch.cat((one, w2.view(1, 1)), dim=1))
                exact.index_add_(0, w3[0], p1 * p2 * p3[0])
    torch.testing.assert_close(got[:, -1].bincount(minlength=WORDS) / rows, exact, rtol=0, atol=0.035)


# What goes with it


class Listener(BaseStreamer):
    def __init__(self):
        self.heard, self.ended = [], False

    def put(self, value):
        self.heard.append(value)

    def end(self):
        self.ended = True


def test_a_streamer_hears_token_by_token(model):
    ids, _ = batch(1)
    streamer = Listener()
    out = generate(model, ids, use_mtp=True, streamer=streamer)
    assert torch.equal(streamer.heard[0], ids) and all(x.shape == (1,) for x in streamer.heard[1:])
    assert torch.cat(streamer.heard[1:]).tolist() == out[0, 11:].tolist() and streamer.ended


def test_counting():
    found = Speculation()
    assert found.acceptance_rate == 0
    found.count(2, 1)
    found.count(3, 3)
    assert (found.drafted, found.accepted) == ([2, 2, 1], [2, 1, 1])
    assert found.acceptance_rate == 4 / 5


def refusals():
    ids, mask = batch(2)
    one, _ = batch(1)
    return {
        "no layers": (one, {}, "the model has no multi-token-prediction layers .num_nextn_predict_layers=0."),
        "two kinds": (one, {"prompt_lookup_num_tokens": 2}, "prompt_lookup_num_tokens asks for other drafts"),
        "embeds": (None, {"inputs_embeds": torch.zeros(1, 3, 32)}, "pass input_ids, not inputs_embeds"),
        "no cache": (one, {"use_cache": False}, "drafts need a cache: leave use_cache=True"),
        "static": (one, {"cache_implementation": "static"}, "StaticCache holds of rejected drafts .* DynamicCache"),
        "streamer": (ids, {"streamer": Listener()}, "a streamer takes one row, and there are 2"),
        "guidance": (one, {"guidance_scale": 2.0}, "UnbatchedClassifierFreeGuidance.* cannot look at drafts"),
        "prefixes": (
            ids,
            {"prefix_allowed_tokens_fn": lambda row, words: [1]},
            "PrefixConstrained.* rows of several lengths",
        ),
        "states": (one, {"return_dict_in_generate": True, "output_hidden_states": True}, "ask the model's forward"),
        "ranks": (one, {"synced_gpus": True}, "synced_gpus would need as many rounds on every rank"),
        "assistant": (one, {"assistant_model": "another"}, "or an assistant_model; leave one of them out"),
    }


@pytest.mark.parametrize("what", refusals())
def test_what_drafts_cannot_do_is_refused(trained, what):
    ids, options, message = refusals()[what]
    model = copy.deepcopy(trained)
    if what == "no layers":
        del model.model.layers[3:]
    if what == "assistant":
        options = {"assistant_model": copy.deepcopy(trained)}
    with pytest.raises(ValueError, match=f"use_mtp=True: .*{message}"):
        if ids is None:
            model.generate(use_mtp=True, max_new_tokens=4, **options)
        else:
            generate(model, ids, use_mtp=True, **options)


def test_beams_go_without_drafts(trained):
    """As Transformers has it, with its warning."""
    ids, _ = batch(1)
    expected = generate(trained, ids, num_beams=2)
    assert torch.equal(generate(trained, ids, num_beams=2, use_mtp=True), expected)
