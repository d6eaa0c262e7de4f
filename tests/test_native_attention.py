"""`lamoe.boost` of native latent attention: the stock classes' tokens and logits, absorbed; and what is left alone."""

import copy
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache, StaticCache

from lamoe import LamoeConfig, LamoeForCausalLM, boost, experts, native_attention, unboost
from lamoe.native_attention import attend_over_latents, attention_modules
from tests.latent_models import FAMILIES, latent_model
from tests.tiny import random_ids

CLOSE = {"rtol": 1e-4, "atol": 1e-4}  # float32 on logits of about 10
REACHED = [name for name in FAMILIES if name != "hy_v4"]
PLAIN = [name for name in REACHED if "index_topk" not in FAMILIES[name][1]]  # without sparse attention
GPU = torch.cuda.is_available()
on_gpu = [pytest.mark.gpu, pytest.mark.skipif(not GPU, reason="needs a GPU")]
interpreted = pytest.mark.skipif(GPU, reason="in float32, by Triton's interpreter, on the CPU")


@pytest.fixture(autouse=True)
def plain_experts(monkeypatch):
    """Experts by grouped_mm on a CPU: here it is attention that matters, and the interpreter is slow."""
    monkeypatch.setattr(experts, "INTERPRETED", False)


@pytest.fixture
def taken(monkeypatch) -> list[tuple[str, int, int]]:
    """The form, new tokens and keys of each call of a layer that attends over latents."""
    taken = []
    for form, name in (("absorbed", "absorbed_attention"), ("triton", "latent_decode")):
        if not hasattr(native_attention, name):
            continue

        def spy(real, form, q, r, c, *args, **kwargs):
            taken.append((form, q.shape[2], c.shape[1]))
            return real(q, r, c, *args, **kwargs)

        monkeypatch.setattr(native_attention, name, partial(spy, getattr(native_attention, name), form))
    return taken


def padded(length: int, padding: int = 5) -> dict:
    """Two sequences, the first of them padded on the left."""
    mask = torch.ones(2, length, dtype=torch.long)
    mask[0, :padding] = 0
    return {"input_ids": random_ids(2, length), "attention_mask": mask}


def steps(model, lengths, width=15, batch=None, cache=None, **options) -> list[torch.Tensor]:
    """First outputs of a prompt, and of steps of so many new tokens over its cache."""
    inputs = padded(width + sum(lengths)) if batch is None else batch
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    past, outputs, start = DynamicCache(config=model.config) if cache is None else cache, [], 0
    with torch.no_grad():
        for length in (width, *lengths):
            stop = start + length
            out = model(ids[:, start:stop], attention_mask=mask[:, :stop], past_key_values=past, **options)
            outputs.append(out[0])
            start = stop
    return outputs


def generate(model, inputs=None, **options):
    """Tokens, and logits of each, by greedy decoding unless the options say otherwise."""
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "output_logits": True}
    settings |= {"return_dict_in_generate": True, **options}
    torch.manual_seed(0)
    return model.generate(**(padded(14) if inputs is None else inputs), **settings)


def paths(report) -> set[tuple[str, str]]:
    """Paths and reasons of the layers of latent attention."""
    return {(row.path, row.reason) for row in report.rows if "attn" in row.name}


@pytest.mark.parametrize("name", REACHED)
def test_every_family_decodes_absorbed_as_its_stock_class_does_and_unboost_restores_it(name, taken):
    model = latent_model(name)
    expected = steps(model, (1, 3, 1))
    keys = list(model.state_dict())
    layers = FAMILIES[name][2]
    for _ in range(2):  # a second boost changes nothing
        report = boost(model)
    assert [row.path for row in report.rows if "attn" in row.name] == ["absorbed"] * layers
    got = steps(model, (1, 3, 1))
    absorbed = (1, 1) if name == "glm5_next_text" else (1, 3, 1)  # its layers get a mask of padding alone
    assert [call[:2] for call in taken] == [("absorbed", T) for T in absorbed for _ in range(layers)]
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, **CLOSE)
    assert list(model.state_dict()) == keys
    unboost(model)
    for a, b in zip(steps(model, (1, 3, 1)), expected, strict=True):
        assert torch.equal(a, b)
    assert len(taken) == len(absorbed) * layers  # none since
    for module in model.modules():
        assert not [key for key, value in vars(module).items() if "lamoe" in key or native_attention._is_ours(value)]


@pytest.mark.parametrize("name", [name for name in PLAIN if name != "deepseek_v3"])  # which comes below
def test_every_family_generates_the_tokens_of_its_stock_class(name, taken):
    model = latent_model(name)
    expected = generate(model, max_new_tokens=4)
    boost(model)
    got = generate(model, max_new_tokens=4)
    assert taken
    assert torch.equal(got.sequences, expected.sequences)
    torch.testing.assert_close(got.logits, expected.logits, **CLOSE)


@pytest.mark.parametrize("name", ["deepseek_v2", "deepseek_v3", "deepseek_v32"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"cache_implementation": "static"},
        {"num_beams": 3, "num_return_sequences": 2},
        {"do_sample": True, "num_return_sequences": 2},
        {"cache_implementation": "offloaded"},
    ],
    ids=["dynamic", "static", "beams", "sampling", "offloaded"],
)
def test_ways_of_decoding_give_the_stock_tokens(name, options, taken):
    if "offloaded" in options.values() and not GPU:
        pytest.skip("Transformers offloads from GPUs only")
    if "offloaded" in options.values() and name == "deepseek_v32":
        pytest.skip("Transformers 5.23 moves all of this cache away but its indexer's keys, and the stock class fails")
    device = "cuda" if "offloaded" in options.values() else "cpu"
    model, inputs = latent_model(name).to(device), {key: x.to(device) for key, x in padded(14).items()}
    expected = generate(model, inputs, **options)
    boost(model)
    got = generate(model, inputs, **options)
    assert taken
    assert torch.equal(got.sequences, expected.sequences)
    torch.testing.assert_close(got.logits, expected.logits, **CLOSE)


@pytest.mark.parametrize("name", ["deepseek_v3", "minicpm3"])
def test_guessed_tokens_are_checked_in_absorbed_steps_of_several(name, taken):
    model = latent_model(name)
    inputs = {"input_ids": random_ids(1, 6).repeat(1, 3), "attention_mask": torch.ones(1, 18, dtype=torch.long)}
    expected = generate(model, inputs, max_new_tokens=12)
    boost(model)
    got = generate(model, inputs, max_new_tokens=12, prompt_lookup_num_tokens=3)
    assert torch.equal(got.sequences, expected.sequences)
    assert {1, 2, 3, 4} & {T for _, T, _ in taken} - {1}  # and the cache was cropped where a guess was wrong


@pytest.mark.parametrize("name", ["deepseek_v3", "deepseek_v32", "glm5_next_text"])
def test_eager_attention_still_returns_its_weights(name, taken):
    model = latent_model(name, attn_implementation="eager")
    reason = "attn_implementation='eager' returns the weights, and the decode kernel does not"
    outputs = []
    for turn in (None, boost):
        if turn:
            assert paths(turn(model)) == {("absorbed", reason)}
        inputs = padded(16)
        past = DynamicCache(config=model.config)
        for part in (slice(15), slice(15, 16)):
            with torch.no_grad():
                out = model(
                    inputs["input_ids"][:, part],
                    attention_mask=inputs["attention_mask"][:, : part.stop],
                    past_key_values=past,
                    output_attentions=True,
                )
        outputs.append(out)
    assert taken
    for got, expected in zip(outputs[1].attentions, outputs[0].attentions, strict=True):
        assert got.shape == (2, 4, 1, 16)
        torch.testing.assert_close(got, expected, **CLOSE)


def test_a_short_prompt_and_steps_over_a_static_cache_give_the_stock_logits(taken):
    model = latent_model("youtu")
    outputs = []
    for _ in range(2):
        cache = StaticCache(model.config, max_cache_len=40)
        outputs.append(steps(model, (1, 2), cache=cache))
        boost(model)
    assert {(T, S) for _, T, S in taken} == {(15, 40), (1, 40), (2, 40)}
    for a, b in zip(*outputs, strict=True):
        torch.testing.assert_close(a[:, -10:], b[:, -10:], **CLOSE)  # but for padding, of which nobody sees anything


class LargestTensor(TorchDispatchMode):
    """Counts the elements of the largest tensor that an operator makes, views aside."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if not func.is_view:
            for tensor in out if isinstance(out, (tuple, list)) else (out,):
                if isinstance(tensor, torch.Tensor):
                    self.numel = max(self.numel, tensor.numel())
        return out


@pytest.mark.parametrize(("name", "batch", "T"), [("deepseek_v3", 1, 1), ("minicpm3", 3, 1), ("axk1", 1, 3)])
def test_a_decode_step_makes_no_tensor_of_heads_times_context(name, batch, T):
    S, C, R, H, P, V = 4000, 16, 4, 4, 8, 12
    model = latent_model(name, max_position_embeddings=2 * S, num_hidden_layers=1)
    largest = []
    for turn in (unboost, boost):
        turn(model)
        cache = DynamicCache()
        cache.update(torch.ones(batch, 1, S, C), torch.ones(batch, 1, S, R), 0)
        with torch.no_grad(), LargestTensor() as seen:
            model(random_ids(batch, T), past_key_values=cache)
        largest.append(seen.numel)
    expanded = batch * H * (S + T) * (P + V)
    assert largest[0] >= expanded
    assert largest[1] <= batch * (S + T) * C  # the cache itself


def test_what_is_no_decode_step_without_gradients_keeps_the_stock_bits(taken):
    model = latent_model("minicpm3")

    def outcomes() -> list[torch.Tensor]:
        ids, outputs = random_ids(2, 12), []
        outputs.append(model(ids).logits)
        with torch.no_grad():
            outputs.append(model(ids).logits)  # without a cache
            outputs.append(model(ids, past_key_values=DynamicCache(), attention_mask=padded(12)["attention_mask"])[0])
        for mode in ("gradients", "training", "autocast", "long", "is_causal"):
            past, given = DynamicCache(), {}
            with torch.no_grad():
                model(ids, past_key_values=past)
            new = ids[:, :1]
            if mode == "long":
                new = random_ids(2, native_attention._absorb_limit(model.model.layers[0].self_attn) + 1)
            if mode == "is_causal":
                given = {"is_causal": False}
            model.train(mode == "training")
            with torch.set_grad_enabled(mode == "gradients"), torch.autocast("cpu", enabled=mode == "autocast"):
                outputs.append(model(new, past_key_values=past, **given)[0])
            model.eval()
        return outputs

    expected = outcomes()
    boost(model)
    for got, want in zip(outcomes(), expected, strict=True):
        assert torch.equal(got, want)
    assert not taken
    steps(model, (1,))
    assert taken


def test_the_limit_of_new_tokens_is_where_absorbing_stops_paying():
    layer = latent_model("deepseek_v3", kv_lora_rank=512, qk_nope_head_dim=128, v_head_dim=128, num_hidden_layers=1)
    attention = layer.model.layers[0].self_attn
    assert native_attention._absorb_limit(attention) == 170
    attention.kv_lora_rank = 100
    assert native_attention._absorb_limit(attention) > 10**6


def test_flash_masks_of_padding_are_read_for_one_new_token():
    model = latent_model("glm4_moe_lite")
    boost(model)
    layer = model.model.layers[0].self_attn
    c, k, query = torch.randn(2, 1, 9, 16), torch.randn(2, 1, 9, 4), torch.randn(2, 4, 1, 12)
    seen = padded(9, 3)["attention_mask"]
    outputs = []
    for mask in (seen, seen[:, None, None].bool(), torch.where(seen[:, None, None].bool(), 0.0, -1e30)):
        stand_in = native_attention._LatentModule(layer)
        outputs.append(attend_over_latents(stand_in, query, *stand_in.expand_kv(c, k), mask, scaling=0.3)[0])
    assert outputs[0].shape == (2, 1, 4, 12)
    for out in outputs[1:]:
        torch.testing.assert_close(out, outputs[0])
    kwargs = {"past_key_values": DynamicCache(), "attention_mask": seen}
    with torch.no_grad():
        assert native_attention._absorbs(layer, (torch.zeros(2, 1, 32),), kwargs)
        assert not native_attention._absorbs(layer, (torch.zeros(2, 2, 32),), kwargs)
        layer.sliding_window = 4
        assert not native_attention._absorbs(layer, (torch.zeros(2, 1, 32),), kwargs)


def test_keys_that_sparse_attention_chose_but_nobody_sees_stay_hidden(taken):
    model = latent_model("deepseek_v32")
    batch = padded(16, 12)  # four keys are seen, and eight are chosen
    expected = steps(model, (1,), batch=batch)[1]
    boost(model)
    torch.testing.assert_close(steps(model, (1,), batch=batch)[1], expected, **CLOSE)
    assert {S for _, _, S in taken} == {8}  # these alone are read


def test_the_kernel_reads_a_static_cache_only_as_far_as_it_is_seen():
    c = torch.zeros(2, 9, 16)
    mask = torch.zeros(1, 1, 1, 9, dtype=torch.bool)
    mask[..., 2:6] = True
    lengths, seen = native_attention._seen_keys(mask, 2, c)
    assert lengths.tolist() == [6, 6] and lengths.dtype == seen.dtype == torch.int32
    assert torch.equal(seen.bool(), mask[0, 0].expand(2, -1)) and seen.is_contiguous()
    lengths, seen = native_attention._seen_keys(None, 2, c)
    assert lengths.tolist() == [9, 9] and seen is None


def lora(model, *targets):
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(r=2, target_modules=list(targets), init_lora_weights=False)).eval()


@pytest.mark.parametrize("name", ["deepseek_v3", "minicpm3"])
def test_an_unmerged_lora_on_kv_b_proj_is_expanded_and_a_merged_one_absorbed(name, taken, caplog):
    model = lora(latent_model(name), "kv_b_proj")
    expected = steps(model, (1, 3))
    reason = "kv_b_proj is a peft.tuners.lora.layer.Linear, so its weight cannot be absorbed"
    assert paths(boost(model)) == {("expanded", reason)}
    for a, b in zip(steps(model, (1, 3)), expected, strict=True):
        assert torch.equal(a, b)
    assert not taken
    assert (
        "Attention's kv_b_proj is a peft.tuners.lora.layer.Linear, so its weight cannot be absorbed: each step "
        "expands the whole context. Merge the adapter or dequantise kv_b_proj to decode without expansion."
    ) in caplog.text
    merged = model.merge_and_unload()
    for a, b in zip(steps(merged, (1, 3)), expected, strict=True):
        torch.testing.assert_close(a, b, **CLOSE)
    assert {form for form, _, _ in taken} == {"absorbed"}
    assert {path for path, _ in paths(boost(merged))} == {"absorbed"}


def test_a_lora_beside_kv_b_proj_is_no_obstacle(taken):
    model = lora(latent_model("deepseek_v3"), "q_b_proj", "kv_a_proj_with_mqa", "o_proj")
    expected = steps(model, (1, 3))
    boost(model)
    for a, b in zip(steps(model, (1, 3)), expected, strict=True):
        torch.testing.assert_close(a, b, **CLOSE)
    assert taken


def test_a_bias_or_a_hook_of_kv_b_proj_is_expanded():
    model = latent_model("youtu")
    layers = [layer.self_attn for layer in model.model.layers]
    layers[0].kv_b_proj.bias = nn.Parameter(torch.ones(80))
    layers[1].kv_b_proj.register_forward_hook(lambda module, args, out: 2 * out)
    expected = steps(model, (1,))
    assert [(row.path, row.reason) for row in boost(model).rows] == [
        ("expanded", "kv_b_proj has a bias, so its weight cannot be absorbed"),
        ("expanded", "kv_b_proj has hooks, so its weight cannot be absorbed"),
    ]
    for a, b in zip(steps(model, (1,)), expected, strict=True):
        assert torch.equal(a, b)


def test_a_packed_kv_b_proj_is_expanded_by_its_own_forward():
    class Packed(nn.Module):
        def __init__(self, linear):
            super().__init__()
            self.packed = nn.Parameter(linear.weight.detach().clone())

        def forward(self, x):
            return x @ self.packed.T

    model = latent_model("minicpm3")
    for layer in model.model.layers:
        layer.self_attn.kv_b_proj = Packed(layer.self_attn.kv_b_proj)
    expected = steps(model, (1,))
    ((path, reason),) = paths(boost(model))
    assert path == "expanded" and reason.endswith("Packed, so its weight cannot be absorbed")
    for a, b in zip(steps(model, (1,)), expected, strict=True):
        assert torch.equal(a, b)


def test_the_report_folds_layers_and_names_what_keeps_the_kernel_away(monkeypatch):
    model = latent_model("minicpm3")  # without experts
    cpu = "the cache is on 'cpu', and Triton runs on CUDA and ROCm devices"
    monkeypatch.setattr(native_attention, "why_not", lambda *given: cpu if given[4].type == "cpu" else None)
    where = "model.layers.0.self_attn to model.layers.1.self_attn (2 layers): MiniCPM3Attention, "
    assert str(boost(model)) == f"{where}absorbed: {cpu}"
    monkeypatch.setattr(native_attention, "why_not", lambda *given: None)
    assert str(boost(model)) == f"{where}triton"
    monkeypatch.setattr(native_attention, "MISSING", "Triton or a part of it is missing (No module named 'triton')")
    assert str(boost(model)) == f"{where}absorbed: Triton or a part of it is missing (No module named 'triton')"


def test_attention_sinks_are_not_reached():
    model = latent_model("hy_v4")
    expected = steps(model, (1,))
    assert paths(boost(model)) == {("not reached", "its attention takes s_aux, which the absorbed form does not")}
    assert torch.equal(steps(model, (1,))[1], expected[1])
    assert "forward" not in vars(model.model.layers[0].self_attn)


def other_class(model, **methods):
    """Make the first attention layer one of a class that differs from the stock one."""
    layer = next(module for _, module in attention_modules(model))
    layer.__class__ = type("OtherAttention", (type(layer),), methods)
    return layer


def test_an_unknown_version_of_a_class_is_not_reached_and_the_reason_says_what_differs():
    def reason_of(change) -> str:
        model = latent_model("deepseek_v3")
        change(model)
        rows = [row for row in boost(model).rows if "attn" in row.name]
        assert [row.path for row in rows] == ["not reached", "absorbed"]
        assert "forward" not in vars(model.model.layers[0].self_attn) or rows[0].reason.startswith("something")
        return rows[0].reason

    class Bare(nn.Module):
        def __init__(self):
            super().__init__()
            self.kv_b_proj = nn.Linear(2, 2)

    def bare(model):
        model.model.layers[0].self_attn = Bare()

    def swap_plain_and_rotary(self, c, k):
        B, _, S, _ = c.shape
        widths = (self.v_head_dim, self.qk_nope_head_dim)
        value, plain = self.kv_b_proj(c).view(B, S, -1, sum(widths)).transpose(1, 2).split(widths, dim=-1)
        return torch.cat((plain, k.expand(-1, plain.shape[1], -1, -1)), dim=-1), value

    assert reason_of(bare) == "its class has no expand_kv: what it caches is its own affair"
    assert reason_of(lambda model: other_class(model, forward=lambda self, *args, **kwargs: None)) == (
        "its forward does not call expand_kv and a function of Transformers' attention registry"
    )
    assert reason_of(lambda model: delattr(model.model.layers[0].self_attn, "v_head_dim")) == "it has no v_head_dim"
    layout = "its expand_kv does not make [k_nope; k_rot] and v of kv_b_proj, head by head"
    assert reason_of(lambda model: other_class(model, expand_kv=swap_plain_and_rotary)) == layout
    assert reason_of(lambda model: other_class(model, expand_kv=lambda self, c, k: self.of_a_new_version(c))) == layout
    assert reason_of(lambda model: setattr(model.model.layers[0].self_attn, "forward", print)) == (
        "something else has replaced its forward"
    )


def test_a_forward_that_changes_keys_stops_with_an_error_instead_of_wrong_numbers():
    layer = latent_model("deepseek_v3").model.layers[0].self_attn
    c, k, query = torch.randn(1, 1, 3, 16), torch.randn(1, 1, 3, 4), torch.randn(1, 4, 1, 12)
    end = " Call lamoe.unboost(model), and report the version of Transformers."
    stand_in = native_attention._LatentModule(layer)
    with pytest.raises(RuntimeError) as caught:
        attend_over_latents(stand_in, query, 2 * stand_in.expand_kv(c, k)[0], k, None, scaling=1.0)
    assert str(caught.value) == (
        "DeepseekV3Attention cannot attend over latents: it changes what expand_kv returns." + end
    )
    with pytest.raises(RuntimeError) as caught:
        attend_over_latents(stand_in, query, *stand_in.expand_kv(c, k), None, scaling=1.0, s_aux=torch.ones(4))
    assert str(caught.value) == "DeepseekV3Attention cannot attend over latents: it wants s_aux." + end


def test_the_name_in_the_registry_is_not_for_models():
    model = latent_model("youtu", attn_implementation="lamoe_latents")
    with pytest.raises(ValueError) as caught, torch.no_grad():
        model(random_ids(1, 3))
    assert str(caught.value) == (
        "attn_implementation='lamoe_latents' is for lamoe.boost alone; load the model with another one and call "
        "lamoe.boost(model)."
    )


def test_a_copy_of_a_boosted_model_reads_its_own_weights(taken):
    model = latent_model("minicpm3")
    boost(model)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.model.layers[0].self_attn.kv_b_proj.weight.mul_(-1)
    expected = copy.deepcopy(other)
    unboost(expected)
    torch.testing.assert_close(steps(other, (1,))[1], steps(expected, (1,))[1], **CLOSE)
    assert taken


@pytest.mark.parametrize("hooked_first", [True, False])
def test_hooks_of_accelerate_stay_and_go_in_any_order(hooked_first, taken):
    from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

    class Counted(ModelHook):
        calls = 0

        def pre_forward(self, module, *args, **kwargs):
            Counted.calls += 1
            return args, kwargs

    model = latent_model("deepseek_v3")
    layer = model.model.layers[0].self_attn
    expected = steps(model, (1,))
    turns = [lambda: add_hook_to_module(layer, Counted()), lambda: boost(model)]
    for turn in turns if hooked_first else turns[::-1]:
        turn()
    torch.testing.assert_close(steps(model, (1,))[1], expected[1], **CLOSE)
    assert (Counted.calls, len(taken)) == (2, 2)
    unboost(model)
    assert torch.equal(steps(model, (1,))[1], expected[1])
    assert (Counted.calls, len(taken)) == (4, 2)
    boost(model)
    remove_hook_from_module(layer)
    steps(model, (1,))
    assert (Counted.calls, len(taken)) == (4, 4)
    unboost(model)
    assert torch.equal(steps(model, (1,))[1], expected[1])
    assert len(taken) == 4


def test_saving_writes_nothing_of_ours(tmp_path):
    model = latent_model("minicpm3")
    model.save_pretrained(tmp_path / "before")
    boost(model)
    model.save_pretrained(tmp_path / "after")
    for file in ("config.json", "model.safetensors"):
        assert (tmp_path / "after" / file).read_bytes() == (tmp_path / "before" / file).read_bytes()


def test_a_boosted_step_compiles_in_one_graph(taken):
    model = latent_model("minicpm3", num_hidden_layers=1)
    boost(model)
    expected = steps(model, (1,))[1]
    absorbed = len(taken)
    torch._dynamo.reset()
    cache = DynamicCache(config=model.config)
    inputs = padded(16)
    with torch.no_grad():
        model(inputs["input_ids"][:, :15], attention_mask=inputs["attention_mask"][:, :15], past_key_values=cache)
        compiled = torch.compile(model.forward, fullgraph=True, backend="eager")
        got = compiled(inputs["input_ids"][:, 15:], attention_mask=inputs["attention_mask"], past_key_values=cache)
    torch.testing.assert_close(got.logits, expected, **CLOSE)
    assert len(taken) == 2 * absorbed


def test_a_lamoe_model_absorbs_by_itself():
    model = LamoeForCausalLM(LamoeConfig.from_preset("tiny", num_hidden_layers=2))
    assert not [row for row in boost(model).rows if "attn" in row.name]


def test_the_benchmark_of_attention_compares_the_stock_class_with_and_without_boost(taken, monkeypatch):
    from lamoe.scripts.benchmark import Arguments, attention_step

    monkeypatch.setattr(native_attention, "why_not", lambda *given: "the interpreter is slow")
    (row,) = attention_step(Arguments(suite="attention", preset="tiny", context=[600]))
    assert taken
    assert row["boosted_temporary_mib"] < row["native_temporary_mib"]


WIDE = {"kv_lora_rank": 32}  # the least that the kernel takes


@interpreted
@pytest.mark.parametrize(
    ("name", "cache"), [("deepseek_v3", "dynamic"), ("youtu", "static"), ("deepseek_v32", "dynamic")]
)
def test_the_decode_kernel_gives_the_stock_logits(name, cache, taken):
    pytest.importorskip("triton")
    model = latent_model(name, num_hidden_layers=2, **WIDE)

    def run() -> list[torch.Tensor]:
        past = StaticCache(model.config, max_cache_len=24) if cache == "static" else None
        return steps(model, (1, 2, 1), cache=past)

    expected = run()
    assert paths(boost(model)) == {("triton", "")}
    for a, b in zip(run(), expected, strict=True):
        torch.testing.assert_close(a, b, **CLOSE)
    forms = [("triton", 1), ("absorbed", 2), ("triton", 1)]  # by two layers each
    assert [(form, T) for form, T, _ in taken[-6:]] == [form for form in forms for _ in range(2)]


def assert_near(got, same_dtype, exact):
    """Not further from float64 than twice what the stock class in the same dtype is, plus two ulps of bfloat16."""
    error, allowed = (got.double() - exact).abs().max(), (same_dtype.double() - exact).abs().max()
    assert error <= 2 * allowed + 2 * 2**-8 * exact.abs().max(), (float(error), float(allowed))


@pytest.mark.parametrize("name", [pytest.param(name, marks=on_gpu) for name in REACHED])
def test_bfloat16_by_the_kernel_on_a_gpu(name, taken):
    sizes = {"kv_lora_rank": 128, "num_attention_heads": 4}
    model = latent_model(name, **sizes)
    batch = {key: value.cuda() for key, value in padded(20).items()}
    exact = [out.cpu().double() for out in steps(latent_model(name, **sizes).double(), (1, 3, 1))]
    model = model.to("cuda", torch.bfloat16)
    plain = [out.cpu() for out in steps(model, (1, 3, 1), batch=batch)]
    assert paths(boost(model)) == {("triton", "")}
    got = [out.cpu() for out in steps(model, (1, 3, 1), batch=batch)]
    assert {form for form, T, _ in taken if T == 1} == {"triton"}
    for a, b, c in zip(got, plain, exact, strict=True):
        assert_near(a, b, c)


@pytest.mark.parametrize("name", [pytest.param(name, marks=on_gpu) for name in PLAIN])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_float32_tokens_by_the_kernel_on_a_gpu(name, cache, taken):
    model = latent_model(name, kv_lora_rank=64).cuda()
    inputs = {key: value.cuda() for key, value in padded(14).items()}
    options = {} if cache == "dynamic" else {"cache_implementation": "static"}
    expected = generate(model, inputs, **options)
    boost(model)
    got = generate(model, inputs, **options)
    assert torch.equal(got.sequences, expected.sequences)
    torch.testing.assert_close(got.logits, expected.logits, rtol=1e-3, atol=1e-3)
    assert "triton" in {form for form, _, _ in taken}
