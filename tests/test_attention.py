"""Latent attention by itself: its two forms, when each is chosen, chunks, gradients, adapters, memory, rotation."""

import copy
import logging

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache

from lamoe import LamoeConfig, LamoeForCausalLM, attention
from lamoe.attention import LamoeAttention, LamoeRotaryEmbedding, absorbed_attention, rotate_pairs
from tests.tiny import FAMILIES, lamoe_model, native_model, random_ids

# (C, P, R, V, H): every published width with small head counts, and the odd ones.
WIDTHS = [
    (512, 128, 64, 128, 16),  # DeepSeek-V2, V3, Moonlight, Kimi-K2
    (512, 192, 64, 256, 20),  # GLM-4.7-Flash
    (256, 64, 32, 48, 5),
    (128, 32, 0, 64, 5),
    (128, 0, 32, 32, 1),
    (16, 12, 4, 16, 5),
]


def tiny_config(**changes) -> LamoeConfig:
    settings = {"vocab_size": 31, "hidden_size": 48, "intermediate_size": 16, "num_hidden_layers": 1}
    settings |= {"first_k_dense_replace": 1, "n_routed_experts": 8, "num_experts_per_tok": 2, "n_group": 1}
    settings |= {"topk_group": 1, "moe_intermediate_size": 8, "max_position_embeddings": 512}
    settings |= {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}, "initializer_range": 0.2}
    return LamoeConfig(**{**settings, **changes})


def one_layer(widths, dtype, **changes):
    """A seeded LamoeAttention of these widths, and its rotary embedding."""
    C, P, R, V, H = widths
    config = tiny_config(
        kv_lora_rank=C,
        qk_nope_head_dim=P,
        qk_rope_head_dim=R,
        v_head_dim=V,
        num_attention_heads=H,
        q_lora_rank=24,
        attn_implementation="eager",
        **changes,
    )
    torch.manual_seed(0)
    layer = LamoeAttention(config, 0)
    with torch.no_grad():
        layer.kv_a_layernorm.weight.add_(torch.randn(C) * 0.1)
    return layer.to(dtype).eval(), LamoeRotaryEmbedding(config)


def causal(T: int, S: int) -> torch.Tensor:
    return torch.ones(T, S, dtype=torch.bool).tril(S - T)[None, None]


def run_layer(layer, rotary, form: str, past: int = 13, new: int = 3, batch: int = 2):
    """Output of `new` tokens after a prefill of `past`, [B, new, D]."""
    dtype = layer.o_proj.weight.dtype
    draw = torch.Generator().manual_seed(2)
    x = torch.randn(batch, past + new, 48, generator=draw, dtype=torch.float64).to(dtype)
    cos, sin = rotary(x, torch.arange(past + new)[None])
    cache = DynamicCache()
    for part in (slice(0, past), slice(past, past + new)):
        rows = x[:, part]
        seen = causal(rows.shape[1], part.stop).expand(batch, -1, -1, -1)
        mask = torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)
        out, _ = layer(rows, (cos[:, part], sin[:, part]), mask, cache, mla_form=form)
    return out


@pytest.mark.parametrize("widths", WIDTHS, ids=str)
def test_forms_agree(widths):
    results = {}
    for dtype in (torch.float64, torch.float32):
        layer, rotary = one_layer(widths, dtype)
        with torch.no_grad():
            results[dtype] = [run_layer(layer, rotary, form) for form in ("expanded", "absorbed")]
    expanded, absorbed = results[torch.float64]
    assert (expanded - absorbed).abs().max() < 1e-10 * expanded.abs().max()
    for single in results[torch.float32]:  # rounding alone, and of the same order in both
        assert (single - expanded).abs().max() < 2e-5 * expanded.abs().max()


class Reference:
    """Random inputs of both forms in float64, and the expanded result by definition."""

    def __init__(self, B=2, H=5, T=3, S=700, C=12, P=6, R=4, V=7):
        draw = torch.Generator().manual_seed(3)
        sizes = {"query": (B, H, T, P), "turned": (B, H, T, R), "c": (B, S, C), "k": (B, S, R)}
        sizes |= {"up_key": (H, P, C), "up_value": (H, V, C)}
        for name, size in sizes.items():
            setattr(self, name, torch.randn(size, generator=draw, dtype=torch.float64))
        self.scaling = (P + R) ** -0.5

    def expected(self, seen=None):
        key = torch.einsum("bsc,hpc->bhsp", self.c, self.up_key)
        value = torch.einsum("bsc,hvc->bhsv", self.c, self.up_value)
        scores = self.query @ key.mT + self.turned @ self.k[:, None].mT
        scores = scores * self.scaling
        if seen is not None:
            scores = scores.masked_fill(~seen, float("-inf"))
        return scores.softmax(-1) @ value

    def got(self, mask=None, dtype=torch.float64, **options):
        q = (self.query @ self.up_key).to(dtype)
        inputs = (t.to(dtype) for t in (self.turned, self.c, self.k))
        out, weights = absorbed_attention(q, *inputs, mask, self.scaling, **options)
        assert out.dtype == dtype
        return (out.double() @ self.up_value.mT), weights


def additive(seen, dtype=torch.float64, lowest=None):
    return torch.zeros(seen.shape, dtype=dtype).masked_fill(
        ~seen, torch.finfo(dtype).min if lowest is None else lowest
    )


@pytest.mark.parametrize("heads", [1, 5, 16])
@pytest.mark.parametrize("rotary", [0, 4])
@pytest.mark.parametrize("max_scores", [2**22, 1], ids=["whole", "chunks"])
def test_absorbed_equals_definition(heads, rotary, max_scores):
    case = Reference(H=heads, R=rotary)
    seen = causal(3, 700).repeat(2, 1, 1, 1)
    seen[0, ..., :301] = False  # a whole first chunk, and part of the second
    for mask, truth in ((None, None), (seen, seen), (additive(seen), seen), (seen[1:], seen[1:])):
        out, weights = case.got(mask, max_scores=max_scores)
        torch.testing.assert_close(out, case.expected(truth), rtol=1e-11, atol=1e-12)
        assert weights is None
    out, _ = case.got(seen, torch.float32, max_scores=max_scores)
    torch.testing.assert_close(out, case.expected(seen), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("max_scores", [2**22, 1], ids=["whole", "chunks"])
def test_minus_infinity_in_an_additive_mask(max_scores):
    case = Reference()
    seen = causal(3, 700).repeat(2, 1, 1, 1)
    seen[0, ..., :301] = False
    out, _ = case.got(additive(seen, lowest=float("-inf")), max_scores=max_scores)
    torch.testing.assert_close(out, case.expected(seen), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("max_scores", [2**22, 1], ids=["whole", "chunks"])
@pytest.mark.parametrize("kind", ["boolean", "additive"])
def test_rows_that_see_nothing_are_finite(max_scores, kind):
    case = Reference()
    seen = causal(3, 700).repeat(2, 1, 1, 1)
    seen[1, :, 0] = False  # a query in left padding
    for dtype in (torch.float64, torch.float32):
        mask = seen if kind == "boolean" else additive(seen, dtype)
        out, _ = case.got(mask, dtype, max_scores=max_scores)
        assert out.isfinite().all()
        torch.testing.assert_close(out[0], case.expected(seen)[0], rtol=2e-5, atol=2e-5)
        torch.testing.assert_close(out[1, :, 1:], case.expected(seen)[1, :, 1:], rtol=2e-5, atol=2e-5)


def test_weights_are_returned_whole():
    case = Reference(S=600)
    seen = causal(3, 600)
    out, weights = case.got(seen, return_weights=True, max_scores=1)
    assert weights.shape == (2, 5, 3, 600)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 5, 3, dtype=torch.float64))
    assert not weights[~seen.expand_as(weights)].any()
    value = torch.einsum("bsc,hvc->bhsv", case.c, case.up_value)
    torch.testing.assert_close(weights @ value, out, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("max_scores", [2**22, 1], ids=["whole", "chunks"])
def test_dropout_drops_weights_and_rescales_the_rest(max_scores):
    B, H, S, share = 1, 8, 600, 0.3
    draw = torch.Generator().manual_seed(4)
    q = torch.randn(B, H, 2, S, generator=draw, dtype=torch.float64)
    nothing = torch.zeros(B, H, 2, 0, dtype=torch.float64), torch.zeros(B, S, 0, dtype=torch.float64)
    c = torch.eye(S, dtype=torch.float64)[None]  # so that the output is the weights
    clean, _ = absorbed_attention(q, nothing[0], c, nothing[1], None, 1.0, max_scores=max_scores)
    torch.manual_seed(5)
    dropped, _ = absorbed_attention(q, nothing[0], c, nothing[1], None, 1.0, share, max_scores=max_scores)
    kept = dropped != 0
    torch.testing.assert_close(dropped[kept], clean[kept] / (1 - share))
    assert abs(kept.double().mean() - (1 - share)) < 4 * (share * (1 - share) / kept.numel()) ** 0.5
    assert not torch.equal(kept[0, 0, 0], kept[0, 1, 0])


def test_dropout_is_for_training_only():
    layer, rotary = one_layer(WIDTHS[-1], torch.float64, attention_dropout=0.5)
    with torch.no_grad():
        quiet = [run_layer(layer, rotary, "absorbed") for _ in range(2)]
        torch.testing.assert_close(*quiet, rtol=0, atol=0)
        layer.train()
        assert not torch.equal(run_layer(layer, rotary, "absorbed"), quiet[0])


@pytest.mark.parametrize("kind", [None, "boolean", "additive"])
def test_gradients_through_chunks(kind):
    case = Reference(B=1, H=2, T=2, S=520, C=3, P=2, R=2, V=2)
    seen = causal(2, 520).clone()
    seen[..., :270] = False
    mask = {None: None, "boolean": seen, "additive": additive(seen)}[kind]
    inputs = [t.clone().requires_grad_() for t in (case.query @ case.up_key, case.turned, case.c, case.k)]

    def chunked(*tensors):
        return absorbed_attention(*tensors, mask, case.scaling, max_scores=1)[0]

    assert torch.autograd.gradcheck(chunked, inputs, fast_mode=True)
    whole = absorbed_attention(*inputs, mask, case.scaling)[0]
    target = torch.randn(whole.shape, generator=torch.Generator().manual_seed(6), dtype=whole.dtype)
    expected = torch.autograd.grad(whole, inputs, target)
    for got, want in zip(torch.autograd.grad(chunked(*inputs), inputs, target), expected, strict=True):
        assert want.abs().max() > 0
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)


def test_forms_have_equal_gradients():
    results = []
    for form in ("expanded", "absorbed"):
        layer, rotary = one_layer(WIDTHS[2], torch.float64)
        run_layer(layer, rotary, form).square().sum().backward()
        results.append({name: parameter.grad for name, parameter in layer.named_parameters()})
    for name, gradient in results[0].items():
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(results[1][name], gradient, rtol=1e-8, atol=1e-10, msg=name)


@pytest.fixture
def taken(monkeypatch):
    """The forms that LamoeAttention takes, in order."""
    forms = []
    for name in ("_expanded", "_absorbed"):
        real = getattr(LamoeAttention, name)

        def record(self, *args, _name=name, _real=real, **kwargs):
            forms.append(_name[1:])
            return _real(self, *args, **kwargs)

        monkeypatch.setattr(LamoeAttention, name, record)
    return forms


def small_model(**changes):
    torch.manual_seed(0)
    widths = {"kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8, "q_lora_rank": None}
    config = tiny_config(num_attention_heads=4, **{**widths, **changes})
    return LamoeForCausalLM(config).eval()


def test_the_form_is_chosen_by_the_number_of_new_tokens(taken, monkeypatch):
    model = small_model()
    limit = model.config.absorb_limit
    assert limit == 16  # C(P+V)/(2C-P-V)
    expansions, linear = [], F.linear

    def watch(x, weight, bias=None):
        expansions.extend([x.shape[-2]] * (weight is model.model.layers[0].self_attn.kv_b_proj.weight))
        return linear(x, weight, bias)

    monkeypatch.setattr(F, "linear", watch)
    ids = random_ids(1, 60, vocab_size=31)
    cache = DynamicCache(config=model.config)
    steps = [5, 1, limit, limit + 1, 2]
    with torch.no_grad():
        for T in steps:
            start = cache.get_seq_length()
            model(ids[:, start : start + T], past_key_values=cache)
    assert taken == ["expanded", "absorbed", "absorbed", "expanded", "absorbed"]
    assert expansions == [5, 5 + 1 + limit + limit + 1]  # kv_b_proj itself ran in the expanded calls alone

    taken.clear()
    model.config.mla_absorb_max_tokens = 0
    with torch.no_grad():
        model(ids[:, :1], past_key_values=cache)
    assert taken == ["expanded"]


@pytest.mark.parametrize("form", ["expanded", "absorbed"])
def test_a_form_can_be_forced(taken, form):
    model, ids = small_model(), random_ids(1, 9, vocab_size=31)
    other = {"expanded": "absorbed", "absorbed": "expanded"}[form]
    with torch.no_grad():
        expected = model(ids).logits
        taken.clear()
        by_argument = [model(ids, mla_form=form).logits, model.generate(ids, max_new_tokens=2, mla_form=form)]
        assert taken == [form] * 3
        taken.clear()
        model.config.mla_form = form
        by_field = [model(ids).logits, model.generate(ids, max_new_tokens=2)]
        assert taken == [form] * 3
        taken.clear()
        model(ids, mla_form=other)  # the argument wins
        assert taken == [other]
    torch.testing.assert_close(by_argument, by_field)
    torch.testing.assert_close(by_field[0], expected, rtol=1e-4, atol=1e-5)


@pytest.fixture
def warnings_of_attention(caplog):
    logging.Logger.warning_once.cache_clear()
    caplog.set_level(logging.WARNING, logger=attention.logger.name)
    return lambda: [record.getMessage() for record in caplog.records if "kv_b_proj" in record.getMessage()]


def step_by_step(model, ids):
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        parts = [ids[:, :6], *ids[:, 6:].split(1, dim=1)]
        return torch.cat([model(part, past_key_values=cache).logits for part in parts], 1)


class Wrapped(torch.Tensor):
    """A weight whose numbers are not what they seem, as quantisers make them: products with it are doubled."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        out = super().__torch_function__(function, types, args, kwargs)
        return out.as_subclass(torch.Tensor) * 2 if function is F.linear else out


class Int8Linear(nn.Module):
    """A quantised projection: int8 rows and their scales."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.weight = nn.Buffer((linear.weight.detach() / scale).round().to(torch.int8))
        self.scale = nn.Buffer(scale)

    def forward(self, x):
        return F.linear(x, self.weight * self.scale)


def subclassed(linear):
    linear.weight = nn.Parameter(linear.weight.detach().as_subclass(Wrapped), requires_grad=False)
    return linear


def hooked(linear):
    linear.register_forward_hook(lambda module, args, output: output * 1.5)
    return linear


@pytest.mark.parametrize("change", [Int8Linear, subclassed, hooked])
def test_a_weight_that_cannot_be_read_is_expanded(taken, warnings_of_attention, change):
    model, ids = small_model(), random_ids(2, 11, vocab_size=31)
    attend = model.model.layers[0].self_attn
    attend.kv_b_proj = change(attend.kv_b_proj)
    got = step_by_step(model, ids)
    assert set(taken) == {"expanded"}
    assert len(warnings_of_attention()) == 1
    with torch.no_grad():
        torch.testing.assert_close(got, model(ids).logits, rtol=1e-4, atol=1e-5)


def test_torch_int8_quantisation_is_expanded(taken):
    model, ids = small_model(), random_ids(1, 9, vocab_size=31)
    quantised = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    assert type(quantised.model.layers[0].self_attn.kv_b_proj) is not nn.Linear
    got = step_by_step(quantised, ids)
    assert set(taken) == {"expanded"}
    # Activations are quantised by the range of each call, so a step is only near the whole.
    with torch.no_grad():
        torch.testing.assert_close(got, quantised(ids).logits, rtol=0.2, atol=0.2)


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


@pytest.mark.parametrize("heads", [8, 64])
def test_a_decode_step_makes_no_tensor_of_heads_times_context(heads, monkeypatch):
    bound = 2**14
    monkeypatch.setattr(attention, "MAX_SCORES", bound)
    monkeypatch.setattr(attention, "MAX_SCORES_CPU", bound, raising=False)
    C, P, R, V = 8, 16, 4, 16
    layer, rotary = one_layer((C, P, R, V, heads), torch.float32)
    x = torch.randn(1, 1, 48, generator=torch.Generator().manual_seed(7))
    largest = {}
    for S in (4096, 8192):
        position = rotary(x, torch.tensor([[S - 1]]))
        for form in ("expanded", "absorbed"):
            cache = DynamicCache()
            cache.update(torch.ones(1, 1, S - 1, C), torch.ones(1, 1, S - 1, R), 0)
            with torch.no_grad(), LargestTensor() as seen:
                layer(x, position, None, cache, mla_form=form)
            largest[form, S] = seen.numel
        assert largest["expanded", S] >= heads * S * (P + V)
        # the cache itself grows with S, and scores are held by the chunk, of 256 keys at least
        assert largest["absorbed", S] <= max(S * C, bound, heads * 256)


@pytest.mark.parametrize("interleaved", [True, False])
def test_rotation_is_complex_multiplication(interleaved):
    draw = torch.Generator().manual_seed(8)
    x = torch.randn(2, 3, 5, 12, generator=draw, dtype=torch.float64)
    angles = torch.randn(2, 5, 6, generator=draw, dtype=torch.float64)
    turned = rotate_pairs(x, angles.cos(), angles.sin(), interleaved)
    pairs = torch.complex(x[..., 0::2], x[..., 1::2]) if interleaved else torch.complex(x[..., :6], x[..., 6:])
    expected = pairs * torch.polar(torch.ones_like(angles), angles)[:, None]
    torch.testing.assert_close(turned, torch.cat((expected.real, expected.imag), -1), rtol=1e-14, atol=1e-14)
    assert turned.dtype == x.dtype
    assert rotate_pairs(x.bfloat16(), angles.cos(), angles.sin(), interleaved).dtype == torch.bfloat16


def test_rotation_knows_only_the_distance():
    rotary = LamoeRotaryEmbedding(tiny_config(num_attention_heads=1, qk_rope_head_dim=8))
    draw = torch.Generator().manual_seed(9)
    q, k = (torch.randn(1, 1, 1, 8, generator=draw, dtype=torch.float64) for _ in range(2))

    def score(at_query, at_key):
        turned = (rotate_pairs(x, *rotary(x, torch.tensor([[at]])), True) for x, at in ((q, at_query), (k, at_key)))
        return torch.mul(*turned).sum()

    torch.testing.assert_close(score(7, 3), score(104, 100), rtol=1e-5, atol=1e-6)
    assert abs(score(7, 3) - score(7, 4)) > 1e-2


@pytest.mark.parametrize("family", FAMILIES)
def test_scale_equals_native(family):
    native = native_model(family)
    config = LamoeConfig.from_dict(native.config.to_dict())
    assert attention.attention_scale(config) == pytest.approx(native.model.layers[0].self_attn.scaling, rel=1e-12)


def test_scale_of_yarn_by_the_paper():
    widths = {"qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "num_attention_heads": 2}
    plain = tiny_config(**widths)
    assert attention.attention_scale(plain) == pytest.approx(192**-0.5)
    yarn = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 40.0, "original_max_position_embeddings": 4096}
    turned = tiny_config(**widths, rope_parameters={**yarn, "mscale": 0.707, "mscale_all_dim": 0.707})
    assert attention.attention_scale(turned) == pytest.approx(192**-0.5 * 1.2608038**2, rel=1e-6)
    assert attention.attention_scale(tiny_config(**widths, rope_parameters=yarn)) == pytest.approx(192**-0.5)


def test_halves_instead_of_pairs_equal_native(tmp_path):
    native, ours = lamoe_model("v3", tmp_path, rope_interleave=False)
    assert ours.config.rope_interleave is False
    ids = random_ids(2, 15)
    with torch.no_grad():
        expected = native(ids).logits
        torch.testing.assert_close(ours(ids).logits, expected, rtol=2e-5, atol=2e-5)
        torch.testing.assert_close(step_by_step(ours, ids), expected, rtol=2e-5, atol=2e-5)
        ours.config.rope_interleave = True
        assert (ours(ids).logits - expected).abs().max() > 1e-2


def test_no_rotary_width_at_all():
    model = small_model(qk_rope_head_dim=0)
    ids = random_ids(2, 11, vocab_size=31)
    with torch.no_grad():
        expected = model(ids).logits
    torch.testing.assert_close(step_by_step(model, ids), expected, rtol=1e-4, atol=1e-5)
    for implementation in ("static", "dynamic"):
        tokens = model.generate(ids, max_new_tokens=5, cache_implementation=implementation)
        torch.testing.assert_close(tokens, model.generate(ids, max_new_tokens=5, use_cache=False))


def test_a_copy_shares_no_state():
    model, ids = small_model(), random_ids(1, 9, vocab_size=31)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.model.layers[0].self_attn.kv_b_proj.weight.zero_()
    assert (step_by_step(twin, ids) - step_by_step(model, ids)).abs().max() > 1e-3
