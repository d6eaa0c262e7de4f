"""Unmerged LoRA of PEFT on the projections of the attention: read, absorbed, cut by heads, and never forgotten."""

import re

import pytest
import torch
from torch import nn

from lamoe import decode_graph, prefill
from lamoe.cache import GrowingCache
from lamoe.projections import adapter_layers, adapter_state, effective_weight, is_lora, uncomputable_weight
from tests.graphs import watch_recordings
from tests.test_attention import small_model, step_by_step, taken, warnings_of_attention  # noqa: F401 (fixtures)
from tests.test_generation import compiled, generate
from tests.test_prefill import calls, tight  # noqa: F401 (fixtures)
from tests.tiny import lamoe_model, random_ids

peft = pytest.importorskip("peft")

ATTENTION = ["q_proj", "q_b_proj", "kv_b_proj", "o_proj"]


def adapted(model, names=("kv_b_proj",), adapters=("one",), **settings):
    """`model` with random adapters in its projections, the first of them active."""
    torch.manual_seed(1)
    settings = {"r": 3, "lora_alpha": 6, "init_lora_weights": False, "target_modules": list(names), **settings}
    wrapped = peft.get_peft_model(model, peft.LoraConfig(**settings), adapter_name=adapters[0])
    for name in adapters[1:]:
        wrapped.add_adapter(name, peft.LoraConfig(**{**settings, "r": 5}))
    return wrapped.eval()


def projection_of(model):
    return inner(model).model.layers[0].self_attn.kv_b_proj


def inner(model):
    """The model without PEFT's wrapper."""
    return model.base_model.model


def scaled(model):
    for layer in adapter_layers(inner(model)):
        layer.scale_layer(0.5)


def trained(model):
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.mul_(1.5)


def merged_and_disabled(model):
    model.merge_adapter()
    model.base_model.disable_adapter_layers()


CHANGES = {
    "as it came": lambda model: None,
    "switched": lambda model: model.set_adapter("two"),
    "both": lambda model: model.base_model.set_adapter(["one", "two"]),
    "scaled": scaled,
    "trained": trained,
    "disabled": lambda model: model.base_model.disable_adapter_layers(),
    "merged": lambda model: model.merge_adapter(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_the_weight_is_what_the_module_applies(change):
    model = adapted(small_model().double(), adapters=("one", "two"))
    projection = projection_of(model)
    before = projection(torch.eye(16, dtype=torch.float64)).T
    CHANGES[change](model)
    applied = projection(torch.eye(16, dtype=torch.float64)).T
    assert uncomputable_weight(projection, applied) is None
    torch.testing.assert_close(effective_weight(projection), applied, rtol=1e-13, atol=1e-13)
    same = change in ("as it came", "merged")
    assert torch.allclose(applied, before) == same


def test_a_low_precision_weight_is_rounded_as_a_merged_one():
    model = adapted(small_model().to(torch.bfloat16))
    projection = projection_of(model)
    assert projection.lora_A["one"].weight.dtype == torch.float32  # as PEFT has it
    exact = projection.base_layer.weight.double() + projection.get_delta_weight("one").double()
    got = effective_weight(projection)
    assert got.dtype == torch.bfloat16
    # one rounding of the sum, and those of the factors
    assert (got.double() - exact).abs().max() <= 2**-8 * exact.abs().max() * 1.5


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    changes = {"kv_lora_rank": 32, "num_hidden_layers": 2}
    ours = lamoe_model("v3", tmp_path_factory.mktemp("checkpoint"), torch.float32, **changes)[1]
    return adapted(ours, ATTENTION, ("one", "two"))


WAYS = {
    "absorbed": {},
    "kernel": {"mla_implementation": "triton"},
    "static": {"cache_implementation": "static", "disable_compile": True},
    "dynamic": {"cache_implementation": "dynamic"},
    "several tokens a step": {"prompt_lookup_num_tokens": 3},
    "kernel, static": {
        "mla_implementation": "triton", "cache_implementation": "static", "disable_compile": True,
    },
}  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
def test_greedy_tokens_are_equal(model, taken, warnings_of_attention, monkeypatch, way):  # noqa: F811
    if "kernel" in way:
        pytest.importorskip("lamoe.kernels_attention")
        if torch.cuda.is_available():
            pytest.skip("in float32, by Triton's interpreter, on the CPU")
    ids = random_ids(1, 11)
    plain = inner(model)
    for adapters in (["one"], ["one", "two"]):
        model.base_model.set_adapter(adapters)
        expected = generate(plain, ids, max_new_tokens=5, mla_form="expanded")
        taken.clear()
        options = dict(WAYS[way])
        implementation = options.pop("mla_implementation", "auto")
        with monkeypatch.context() as patch:
            patch.setattr(plain.config, "mla_implementation", implementation)
            assert torch.equal(generate(plain, ids, max_new_tokens=5, **options), expected)
        layers = plain.config.num_hidden_layers
        assert taken.count("expanded") == layers * ("static" not in way)  # the prompt alone; a static cache's by heads
        assert ("absorbed" in taken) == ("kernel" not in way)
    assert not warnings_of_attention()


@pytest.mark.slow
def test_a_compiled_static_cache_is_one_graph(tmp_path):
    ours = lamoe_model("v2-lite", tmp_path, torch.float32, num_hidden_layers=1, first_k_dense_replace=0)[1]
    plain = inner(adapted(ours))
    tokens, graphs = compiled(plain, "eager")
    assert torch.equal(tokens, generate(plain, random_ids(2, 11), mla_form="expanded"))
    assert graphs == 1


def test_adapters_change_the_tokens(model):
    ids, plain, found = random_ids(1, 11), inner(model), []
    for adapters in (["one"], ["two"], ["one", "two"]):
        model.base_model.set_adapter(adapters)
        found.append(tuple(generate(plain, ids)[0].tolist()))
    assert len(set(found)) == 3


def test_absorbed_gradients_reach_the_factors():
    results = []
    for form in ("expanded", "absorbed"):
        model = adapted(small_model().double())
        model(random_ids(2, 7, vocab_size=31), labels=random_ids(2, 7, vocab_size=31), mla_form=form).loss.backward()
        results.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert len(results[0]) == 2
    for name, gradient in results[0].items():
        assert gradient.abs().max() > 0
        torch.testing.assert_close(results[1][name], gradient, rtol=1e-8, atol=1e-10)


def test_a_long_prompt_by_heads(calls, tight):  # noqa: F811
    model = adapted(small_model(q_lora_rank=12).double(), ATTENTION, ("one", "two"))
    model.base_model.set_adapter(["one", "two"])
    ids = random_ids(2, 21, vocab_size=31)
    with torch.no_grad():
        expected = model(ids).logits
        tight(model.config)
        torch.testing.assert_close(model(ids).logits, expected, rtol=1e-11, atol=1e-11)
    assert len(calls.prompts) == 1
    assert prefill.MAX_EXPANDED < 2**20


def dropped(model):
    return model.train()


def hook_on_a_factor(model):
    projection_of(model).lora_A["one"].register_forward_hook(lambda module, args, output: output * 2)
    return model


def hook_on_the_base(model):
    projection_of(model).base_layer.register_forward_hook(lambda module, args, output: output * 2)
    return model


def hook(model):
    projection_of(model).register_forward_pre_hook(lambda module, args: None)
    return model


FOREIGN = {
    "no plain LoRA": lambda: adapted(small_model(), use_dora=True),
    "more than a product": lambda: adapted(small_model(), lora_bias=True),
    "with dropout": lambda: dropped(adapted(small_model(), lora_dropout=0.5)),
    "of which a factor has hooks": lambda: hook_on_a_factor(adapted(small_model())),
    "^has hooks": lambda: hook_on_the_base(adapted(small_model())),
    "^has hooks$": lambda: hook(adapted(small_model())),
    "unmerged by its next call": lambda: (m := adapted(small_model()), merged_and_disabled(m))[0],
    "is a peft.tuners": lambda: peft.get_peft_model(
        small_model(), peft.LoHaConfig(target_modules=["kv_b_proj"])
    ).eval(),
}


@pytest.mark.parametrize("reason", FOREIGN)
def test_anything_else_is_expanded_and_says_why(taken, warnings_of_attention, reason):  # noqa: F811
    model = FOREIGN[reason]()
    projection = projection_of(model)
    why = uncomputable_weight(projection, projection.weight)
    assert re.search(reason, why)
    step_by_step(inner(model), random_ids(1, 8, vocab_size=31))
    if "unmerged" in reason:  # the first call has done it
        assert uncomputable_weight(projection, projection.weight) is None
        return
    assert set(taken) == {"expanded"}
    (message,) = warnings_of_attention()
    assert why in message and "Merge the adapter" in message


def test_names_that_peft_might_change():
    projection = projection_of(adapted(small_model()))
    assert is_lora(projection)
    del projection.lora_variant
    assert not is_lora(projection)
    assert "peft.tuners.lora.layer.Linear" in uncomputable_weight(projection, projection.weight)
    assert not is_lora(nn.Linear(2, 2))


@pytest.mark.parametrize("change", [*CHANGES, "moved"])
def test_the_state_shows_every_change_that_a_graph_would_miss(change):
    model = adapted(small_model(), ATTENTION, ("one", "two"))
    layers = adapter_layers(inner(model))
    assert len(layers) == 3
    before = [adapter_state(layer) for layer in layers]
    kept = [parameter.data for parameter in model.parameters()]
    if change == "moved":
        model.to(torch.float64)
    else:
        CHANGES[change](model)
    assert all(was != adapter_state(layer) for was, layer in zip(before, layers, strict=True)) == (
        change not in ("as it came", "trained")
    )
    assert kept


def test_recorded_steps_follow_the_adapters(model, monkeypatch):
    pytest.importorskip("lamoe.kernels_attention")
    if torch.cuda.is_available():
        pytest.skip("there is a test for the GPU")
    recordings = watch_recordings(monkeypatch)
    monkeypatch.setattr(decode_graph, "STEPS_BEFORE", 1)
    monkeypatch.setattr(decode_graph, "_waits", lambda m: False)
    plain, ids = inner(model), random_ids(1, 6)
    monkeypatch.setattr(plain.config, "mla_implementation", "triton")
    model.base_model.set_adapter(["one"])
    with torch.no_grad():
        cache = GrowingCache(config=plain.config)
        plain(ids, past_key_values=cache)
        for _ in range(3):
            plain(ids[:, :1], past_key_values=cache)
        times = [len(recordings)]
        for change in ("trained", "switched", "scaled", "disabled", "merged"):
            CHANGES[change](model)
            try:
                plain(ids[:, :1], past_key_values=cache)
            finally:
                undo(model, change)
            times.append(len(recordings))
        handle = projection_of(model).register_forward_hook(lambda *args: None)
        try:
            plain(ids[:, :1], past_key_values=cache)
        finally:
            handle.remove()
        assert cache.recorded is False  # nobody would run the hook; seen because the adapters had changed, too
    assert times == [1, 1, 2, 3, 4, 5]  # what is trained on is read where it lies


def undo(model, change):
    if change == "merged":
        model.unmerge_adapter()
    if change == "scaled":
        for layer in adapter_layers(inner(model)):
            layer.unscale_layer()
    if change == "trained":
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter.div_(1.5)
    model.base_model.enable_adapter_layers()
    model.base_model.set_adapter(["one"])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("change", ["switched", "scaled", "disabled", "merged", "trained"])
def test_graphs_follow_the_adapters(tmp_path, change):
    ours = lamoe_model("v3", tmp_path, torch.float32, kv_lora_rank=32)[1].to("cuda")
    ours.set_experts_implementation("lamoe")
    model = adapted(ours, ATTENTION, ("one", "two"))
    ids, results = random_ids(1, 6).cuda(), []
    with torch.no_grad():
        for form in ("auto", "expanded"):
            cache, found = GrowingCache(config=ours.config), []
            ours(ids, past_key_values=cache)
            for step in range(decode_graph.STEPS_BEFORE + 6):
                if step == decode_graph.STEPS_BEFORE + 3:
                    assert bool(cache.recorded) == (form == "auto")
                    CHANGES[change](model)
                options = {} if form == "auto" else {"mla_form": form}
                found.append(ours(ids[:, :1], past_key_values=cache, **options).logits.float())
            results.append(torch.cat(found))
            undo(model, change)
    torch.testing.assert_close(*results, rtol=1e-3, atol=1e-3)
