"""The choice of attention kernels, and padding and packing told by documents in place of a mask."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from lamoe import LamoeForCausalLM, attention_choice
from lamoe.attention_choice import Case, Documents, choose_attention, documents_of, sdpa_attention
from tests.kernels import assert_within_budget
from tests.test_moe import make_config

BF16, F32 = torch.bfloat16, torch.float32
H100, A100 = (9, 0), (8, 0)
WIDE, EQUAL = (192, 128), (128, 128)
PACKED = {"mask": "documents", "tokens": 16384}


@pytest.mark.parametrize(
    ("case", "way"),
    [
        (Case("cpu", None, F32, WIDE, mask="right"), "torch"),
        (Case("cpu", None, BF16, WIDE, mask="other"), "torch"),
        (Case("cuda", None, BF16, WIDE, mask="other"), "torch"),  # ROCm
        (Case("cuda", H100, BF16, WIDE), "torch"),
        (Case("cuda", H100, BF16, WIDE, mask="right"), "causal"),
        (Case("cuda", H100, F32, WIDE, mask="right"), "causal"),
        (Case("cuda", H100, BF16, WIDE, mask="other"), "masked"),
        (Case("cuda", H100, BF16, EQUAL, mask="other"), "torch"),
        (Case("cuda", A100, BF16, WIDE), "padded"),
        (Case("cuda", A100, BF16, WIDE, mask="right"), "padded"),
        (Case("cuda", A100, BF16, EQUAL), "torch"),
        (Case("cuda", A100, F32, WIDE), "torch"),
        (Case("cuda", A100, BF16, (320, 256)), "torch"),  # too wide for FlashAttention
        (Case("cuda", H100, BF16, WIDE, documents=4, **PACKED), "each"),
        (Case("cuda", H100, BF16, WIDE, documents=8, **PACKED), "each"),
        (Case("cuda", H100, BF16, WIDE, documents=9, **PACKED), "varlen"),
        (Case("cuda", A100, BF16, WIDE, documents=4, **PACKED), "varlen"),
        (Case("cuda", H100, BF16, WIDE, dropout=True, documents=9, **PACKED), "each"),
        (Case("cuda", H100, BF16, WIDE, dropout=True, documents=99, **PACKED), "masked"),
        (Case("cuda", H100, F32, WIDE, documents=16, **PACKED), "each"),
        (Case("cuda", H100, F32, WIDE, documents=17, **PACKED), "masked"),
        (Case("cuda", H100, F32, EQUAL, documents=17, **PACKED), "torch"),
    ],
)
def test_each_case_has_its_way(case, way):
    assert choose_attention(case) == way


def test_no_mask_ever_reaches_cudnn_at_unequal_widths():
    for capability in (A100, H100, (10, 0), (12, 0)):
        for dtype in (BF16, torch.float16, F32):
            for mask in ("documents", "other"):
                for dropout in (False, True):
                    case = Case("cuda", capability, dtype, WIDE, dropout, mask, documents=50, tokens=100)
                    assert choose_attention(case) in ("masked", "varlen", "each")


@pytest.mark.parametrize(
    ("mask", "spans", "pattern"),
    [
        ([[1, 1, 1], [1, 1, 1]], ((0, 0, 3), (1, 0, 3)), "none"),
        ([[1, 1, 0], [1, 1, 1]], ((0, 0, 2), (1, 0, 3)), "right"),
        ([[0, 1, 1], [1, 1, 1]], ((0, 1, 3), (1, 0, 3)), "documents"),
        ([[0, 1, 0], [1, 1, 0]], ((0, 1, 2), (1, 0, 2)), "documents"),
        ([[1, 0, 1], [1, 1, 1]], None, None),
        ([[0, 0, 0], [1, 1, 1]], None, None),
    ],
)
def test_documents_of_a_padding_mask(mask, spans, pattern):
    found = documents_of(torch.tensor(mask), torch.tensor([[0, 0, 0]]), 2, 3)
    assert (found and found.spans) == spans and (found and found.pattern) == pattern


def test_documents_of_positions():
    positions = torch.tensor([[0, 1, 0, 1, 2], [3, 4, 5, 6, 7]])
    found = documents_of(None, positions, 2, 5)
    assert found.spans == ((0, 0, 2), (0, 2, 5), (1, 0, 5)) and found.pattern == "documents"
    assert found.longest == 5 and found.tokens == 10
    index, ends = found.on(torch.device("cpu"))
    assert index is None and ends.tolist() == [0, 2, 5, 10] and ends.dtype == torch.int32
    assert documents_of(None, torch.arange(5)[None], 2, 5).pattern == "none"
    index, _ = documents_of(torch.tensor([[0, 1, 1], [1, 1, 0]]), None, 2, 3).on(torch.device("cpu"))
    assert index.tolist() == [1, 2, 3, 4]


BATCHES = {
    "left": {"attention_mask": torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1], [1] * 8])},
    "right": {"attention_mask": torch.tensor([[1, 1, 1, 1, 1, 0, 0, 0], [1] * 8])},
    "both": {"attention_mask": torch.tensor([[0, 1, 1, 1, 1, 0, 0, 0], [0, 0, 1, 1, 1, 1, 1, 1]])},
    "packed": {"position_ids": torch.tensor([[0, 1, 2, 0, 0, 1, 2, 3], [0, 1, 2, 3, 4, 5, 6, 7]])},
}


def targets(ids, mask):
    """Labels without padding, and without what padding would predict."""
    return ids.masked_fill((mask == 0) | (F.pad(mask, (1, 0))[:, :-1] == 0), -100)


def losses_and_gradients(model, batch: dict) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    ids = torch.arange(16).view(2, 8) % model.config.vocab_size
    labels = ids
    if "attention_mask" in batch:
        labels = targets(ids, batch["attention_mask"])
    model.zero_grad()
    loss = model(ids, labels=labels, use_cache=False, **batch).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def reference_varlen(q, k, v, ends, ends_k, longest, longest_k, *, scale, window_size):
    """What FlashAttention is asked for, by a loop that keeps to its contract."""
    assert ends.dtype == torch.int32 and ends is ends_k and window_size == (-1, 0)
    assert q.shape == k.shape == v.shape and q.shape[-1] % 8 == 0
    lengths = ends.diff().tolist()
    assert longest == longest_k == max(lengths) and sum(lengths) == len(q)
    outs = []
    for parts in zip(*(x.split(lengths) for x in (q, k, v)), strict=True):
        heads = (x.transpose(0, 1) for x in parts)
        outs.append(F.scaled_dot_product_attention(*heads, is_causal=True, scale=scale).transpose(0, 1))
    return torch.cat(outs)


@pytest.mark.parametrize(
    ("way", "kind"),
    [*itertools.product(("each", "varlen"), ("left", "right", "both", "packed")), ("causal", "right")],
)
def test_every_way_equals_the_mask(way, kind, monkeypatch):
    """Loss and all gradients, with the GPU's ways on a processor, against eager attention under a mask in float64."""
    batch = BATCHES[kind]
    torch.manual_seed(0)
    model = LamoeForCausalLM(make_config(qk_nope_head_dim=6, v_head_dim=4)).double().train()
    model.set_experts_implementation("eager")  # the others have no float64
    model.set_attn_implementation("eager")
    loss, exact = losses_and_gradients(model, batch)

    seen = []
    monkeypatch.setattr(attention_choice, "on_gpu", lambda x: True)
    monkeypatch.setattr(attention_choice, "choose_attention", lambda case: seen.append(case.mask) or way)
    monkeypatch.setattr(attention_choice, "varlen_attention", lambda: reference_varlen)
    model.set_attn_implementation("sdpa")
    got, gradients = losses_and_gradients(model, batch)
    assert seen[0] == ("right" if kind == "right" else "documents")
    torch.testing.assert_close(got, loss)
    assert gradients.keys() == exact.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, exact[name], msg=lambda text, name=name: f"{name}: {text}")


def test_padding_comes_out_as_zeros():
    q, k, v = (torch.randn(2, 3, 4, width) for width in (6, 6, 5))
    documents = Documents(((0, 2, 4), (1, 0, 3)), 2, 4)
    out, _ = sdpa_attention(None, q, k, v, documents)
    assert out.shape == (2, 4, 3, 5) and not out[0, :2].any() and not out[1, 3:].any()
    torch.testing.assert_close(out[0, 2], v[0, :, 2])


@pytest.mark.parametrize("trains", [True, False])
def test_cudnn_is_left_out_under_a_mask_with_gradients(trains, monkeypatch):
    """Of PyTorch's kernels, those that are allowed while a dense mask goes through Transformers' function."""
    allowed = []
    monkeypatch.setattr(attention_choice, "choose_attention", lambda case: "masked")
    real = F.scaled_dot_product_attention

    def note(*args, **kwargs):
        allowed.append(torch.backends.cuda.cudnn_sdp_enabled())
        return real(*args, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", note)
    model = LamoeForCausalLM(make_config(num_hidden_layers=1, first_k_dense_replace=1))
    with torch.set_grad_enabled(trains):
        model(torch.arange(8)[None], attention_mask=torch.tensor([[0] * 3 + [1] * 5]), use_cache=False)
    assert allowed == [not trains] and torch.backends.cuda.cudnn_sdp_enabled()


def test_on_a_processor_nothing_is_chosen(monkeypatch):
    monkeypatch.setattr(attention_choice, "documents_of", lambda *_: pytest.fail("looked at a mask"))
    losses_and_gradients(LamoeForCausalLM(make_config()).train(), BATCHES["left"])


@pytest.mark.parametrize("asked", ["eager", "flex_attention"])
def test_a_named_implementation_stays_what_was_asked_for(asked, monkeypatch):
    monkeypatch.setattr(attention_choice, "on_gpu", lambda x: True)
    config = make_config()
    config._attn_implementation = asked
    x = torch.zeros(2, 8, config.hidden_size)
    found = attention_choice.find_documents(config, x, BATCHES["left"]["attention_mask"], None, None, None, {})
    assert found is None


@pytest.mark.parametrize(
    ("changes", "mask", "text"),
    [
        ({}, "gap", "it hides more than padding. To be faster: give a mask [B, T] of whole documents"),
        ({"dropout": True}, "packed", "attention_dropout is not 0. To be faster: set attention_dropout=0"),
        ({"dtype": F32}, "packed", "do not run in torch.float32. To be faster: compute in bfloat16"),
        ({"widths": (320, 256)}, "packed", "no kernel here takes documents of these widths. To be faster: pack fewer"),
    ],
)
def test_a_slow_way_is_told_once_with_the_way_out(changes, mask, text, monkeypatch):
    case = Case("cuda", H100, BF16, WIDE)._replace(**changes)
    monkeypatch.setattr(attention_choice, "on_gpu", lambda x: True)
    monkeypatch.setattr(attention_choice, "case_of", lambda config, x: case)
    config = make_config()
    config._attn_implementation = "sdpa"
    x = torch.zeros(1, 34, config.hidden_size)
    arguments = (torch.tensor([[1, 0] * 17]), None) if mask == "gap" else (None, torch.tensor([[0, 1] * 17]))
    messages = []
    monkeypatch.setattr(attention_choice.logger, "warning_once", messages.append)
    assert attention_choice.find_documents(config, x, *arguments, None, None, {}) is None
    assert len(messages) == 1 and text in messages[0] and "dense mask" in messages[0]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("kind", ["left", "right", "gap", "packed", "long"])
def test_gradients_are_finite_and_exact_on_a_gpu(kind):
    """At 192/128, where cuDNN gives NaN in dQ under a mask."""
    B, T = (1, 6144) if kind == "long" else (2, 256)
    mask = torch.ones(B, T, dtype=torch.long, device="cuda")
    positions = None
    if kind in ("packed", "long"):
        positions = torch.arange(T, device="cuda").remainder(T // 2 if kind == "long" else 100).expand(B, -1)
        mask = None
    elif kind == "gap":
        mask[0, 100:150] = 0
    else:
        mask[0, slice(0, 100) if kind == "left" else slice(-100, None)] = 0
    torch.manual_seed(0)
    config = make_config(
        qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128, max_position_embeddings=T, num_hidden_layers=1,
        first_k_dense_replace=1,  # without experts, whose choice would differ by rounding
    )  # fmt: skip
    model = LamoeForCausalLM(config).cuda().train()
    ids = torch.randint(0, config.vocab_size, (B, T), device="cuda")
    labels = ids if mask is None else targets(ids, mask)

    def gradients(dtype, implementation):
        model.to(dtype).zero_grad()
        model.set_attn_implementation(implementation)
        extra = {"attention_mask": mask} if mask is not None else {"position_ids": positions}
        model(ids, labels=labels, use_cache=False, **extra).loss.backward()
        return {name: p.grad.double() for name, p in model.named_parameters()}

    model.to(torch.bfloat16)  # the same weights for all
    same_dtype, got = gradients(torch.bfloat16, "eager"), gradients(torch.bfloat16, "sdpa")
    exact = gradients(torch.float64, "eager")
    for name, gradient in got.items():
        assert torch.isfinite(gradient).all(), name
        assert_within_budget(name, gradient.bfloat16(), same_dtype[name].bfloat16(), exact[name])
