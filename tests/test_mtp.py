"""Multi-token prediction: its layers on disk and in memory, against a plain reference, and its loss in training."""

import copy
import json
import logging

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from lamoe import LamoeForCausalLM, LamoeForSequenceClassification, LamoeModel, MTPCallback
from lamoe.hub import load_complete
from lamoe.mtp import documents, inside, mtp_targets
from tests.test_moe import make_config
from tests.tiny import native_model, random_ids

EXACT = {"rtol": 1e-10, "atol": 1e-10}
D, LAYERS = 32, 3


def mtp_model(depths=2, seed=0, dtype=torch.float32, **changes):
    """A random model of V3's shape, three layers and `depths` of prediction, in evaluation mode."""
    config = LamoeForCausalLM.config_class.from_dict(native_model("v3", torch.float32).config.to_dict())
    settings = {"num_nextn_predict_layers": depths, "experts_implementation": "eager", **changes}
    torch.manual_seed(seed)
    model = LamoeForCausalLM(type(config)(**{**config.to_dict(), **settings})).to(dtype).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
        for router in model.routers:
            router.e_score_correction_bias.normal_(std=0.1)
    return model


def raw(folder) -> dict[str, tuple[torch.dtype, bytes]]:
    """Dtype and bytes of every tensor in the checkpoint."""
    return {
        name: (x.dtype, x.contiguous().view(torch.uint8).numpy().tobytes())
        for file in folder.glob("*.safetensors")
        for name, x in load_file(file).items()
    }


def warnings_of(caplog, act):
    logger = logging.getLogger("lamoe")
    logger.addHandler(caplog.handler)
    try:
        return act()
    finally:
        logger.removeHandler(caplog.handler)


# On disk


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("depths", [1, 3])
@pytest.mark.parametrize("tied", [False, True])
def test_tensors_survive_load_and_save_byte_for_byte(depths, dtype, tied, tmp_path):
    model = mtp_model(depths, dtype=dtype, tie_word_embeddings=tied)
    model.save_pretrained(tmp_path / "a")
    names = raw(tmp_path / "a")
    for depth in range(depths):
        prefix = f"model.layers.{LAYERS + depth}."
        own = {name.removeprefix(prefix) for name in names if name.startswith(prefix)}
        assert {"enorm.weight", "hnorm.weight", "eh_proj.weight", "shared_head.norm.weight"} <= own
        assert {"mlp.experts.7.down_proj.weight", "mlp.gate.e_score_correction_bias"} <= own
        assert names[prefix + "embed_tokens.weight"] == names["model.embed_tokens.weight"]
        head = "model.embed_tokens.weight" if tied else "lm_head.weight"
        assert names[prefix + "shared_head.head.weight"] == names[head]
    again = load_complete(LamoeForCausalLM, tmp_path / "a", dtype="auto")
    assert again.config.num_nextn_predict_layers == depths
    assert [layer.embed_tokens for layer in again.model.mtp_layers] == [None] * depths
    assert again.num_parameters() == model.num_parameters()
    again.save_pretrained(tmp_path / "b", max_shard_size="60KB")
    assert raw(tmp_path / "b") == names
    assert json.loads((tmp_path / "b" / "config.json").read_text())["num_nextn_predict_layers"] == depths


def test_copies_that_differ_are_the_layers_own(tmp_path):
    mtp_model(2).save_pretrained(tmp_path / "a")
    tensors = load_file(tmp_path / "a" / "model.safetensors")
    for name in ("layers.3.embed_tokens", "layers.4.shared_head.head"):
        tensors[f"model.{name}.weight"] = torch.randn(97, D)
    save_file(tensors, tmp_path / "a" / "model.safetensors", metadata={"format": "pt"})
    model = load_complete(LamoeForCausalLM, tmp_path / "a")
    first, second = model.model.mtp_layers
    assert torch.equal(first.embed_tokens.weight, tensors["model.layers.3.embed_tokens.weight"])
    assert torch.equal(second.shared_head.head.weight, tensors["model.layers.4.shared_head.head.weight"])
    assert first.shared_head.head is None and second.embed_tokens is None
    assert model.mtp_head(1) is model.lm_head and model.mtp_head(2) is second.shared_head.head
    ids = random_ids(1, 5)
    assert torch.equal(model.model.mtp_embeds(1, ids), first.embed_tokens(ids))
    model.save_pretrained(tmp_path / "b")
    assert raw(tmp_path / "b") == raw(tmp_path / "a")
    model.resize_token_embeddings(100)
    assert len(first.embed_tokens.weight) == len(second.shared_head.head.weight) == 100
    out = model.train()(ids, labels=ids)
    out.loss.backward()
    assert out.mtp_loss > 0 and first.embed_tokens.weight.grad is not None


def test_absent_copies_are_written(tmp_path):
    mtp_model(1).save_pretrained(tmp_path / "a")
    before = raw(tmp_path / "a")
    tensors = load_file(tmp_path / "a" / "model.safetensors")
    del tensors["model.layers.3.embed_tokens.weight"], tensors["model.layers.3.shared_head.head.weight"]
    save_file(tensors, tmp_path / "a" / "model.safetensors", metadata={"format": "pt"})
    load_complete(LamoeForCausalLM, tmp_path / "a").save_pretrained(tmp_path / "b")
    assert raw(tmp_path / "b") == before


@pytest.mark.parametrize("held", [0, 1])
def test_promised_layers_that_are_not_there(held, tmp_path, caplog):
    model = mtp_model(2)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    copies = ("embed_tokens.weight", "shared_head.head.weight")  # copies alone are no layer
    kept = {
        name: x for name, x in tensors.items()
        if not any(f"layers.{i}." in name for i in range(LAYERS + held, 5)) or name.endswith(copies)
    }  # fmt: skip
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    found = warnings_of(caplog, lambda: load_complete(LamoeForCausalLM, tmp_path))
    said = "no multi-token-prediction layers: the model goes on with none"
    if held:
        said = "1 multi-token-prediction layers: the model goes on with 1"
    assert f"num_nextn_predict_layers=2, but the checkpoint has {said}" in caplog.text
    assert found.config.num_nextn_predict_layers == len(found.model.mtp_layers) == held
    ids = random_ids(2, 9)
    torch.testing.assert_close(found(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)


def test_a_missing_tensor_of_a_layer_is_an_error(tmp_path):
    mtp_model(1).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.3.hnorm.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"does not fit LamoeForCausalLM: missing keys: model.layers.3.hnorm.weight"):
        load_complete(LamoeForCausalLM, tmp_path)


def test_layers_can_be_left_out(tmp_path):
    model = mtp_model(2)
    model.save_pretrained(tmp_path)
    _, report = LamoeForCausalLM.from_pretrained(tmp_path, num_nextn_predict_layers=0, output_loading_info=True)
    assert not report["unexpected_keys"] and not report["missing_keys"]


def test_a_state_dict_tells_too(tmp_path):
    model = mtp_model(2)
    state = {name: x for name, x in model.state_dict().items() if "layers.4." not in name}
    found = LamoeForCausalLM.from_pretrained(None, config=model.config, state_dict=state)
    assert found.config.num_nextn_predict_layers == 1 and model.config.num_nextn_predict_layers == 2
    assert torch.equal(found.model.layers[3].eh_proj.weight, model.model.layers[3].eh_proj.weight)


@pytest.mark.parametrize("kind", [LamoeModel, LamoeForSequenceClassification])
def test_other_heads_keep_the_layers(kind, tmp_path):
    model = mtp_model(1)
    model.save_pretrained(tmp_path / "a")
    other = kind.from_pretrained(tmp_path / "a")
    other.config.pad_token_id = 0
    other.save_pretrained(tmp_path / "b")
    before, after = raw(tmp_path / "a"), raw(tmp_path / "b")
    prefix = "model." if kind is not LamoeModel else ""
    for name, tensor in before.items():
        if "layers.3." in name and "shared_head.head" not in name:
            assert after[prefix + name.removeprefix("model.")] == tensor
    assert other.train().routers == [layer.mlp.gate for layer in other.base_model.decoder_layers[1:]]
    idle = [name for name in other._ddp_params_and_buffers_to_ignore if "layers.3." in name and "tokens" not in name]
    assert len(idle) == sum(1 for name, _ in other.named_parameters() if "layers.3." in name)


# In memory


@pytest.mark.parametrize("depths", [1, 2])
def test_the_model_itself_is_as_without_the_layers(depths, tmp_path):
    model = mtp_model(depths)
    model.save_pretrained(tmp_path)
    plain = LamoeForCausalLM.from_pretrained(tmp_path, num_nextn_predict_layers=0).eval()
    plain.set_experts_implementation("eager")
    native = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    ids = random_ids(2, 9)
    asked = {"output_hidden_states": True, "output_router_logits": True, "use_cache": True}
    a, b = model(ids, **asked), plain(ids, **asked)
    assert torch.equal(a.logits, b.logits)
    assert len(a.past_key_values) == LAYERS
    assert len(a.hidden_states) == LAYERS + 1 and len(a.router_logits) == LAYERS - 1
    assert all(map(torch.equal, a.hidden_states, b.hidden_states))
    assert all(map(torch.equal, a.router_logits, b.router_logits))
    torch.testing.assert_close(a.logits, native(ids).logits, rtol=1e-3, atol=1e-3)
    greedy = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(ids, **greedy), plain.generate(ids, **greedy))
    labels = ids.clone()
    model.config.mtp_loss_coef = 0
    for one in (model, plain):
        one.train()(ids, labels=labels).loss.backward()
    parameters = dict(model.named_parameters())
    for name, one in plain.named_parameters():
        assert torch.equal(one.grad, parameters[name].grad), name
    assert not any(p.grad is not None for layer in model.model.mtp_layers for p in layer.parameters())


def test_depths_equal_a_plain_reference(tmp_path):
    """Eq. 21-25 in float64 with Transformers' own decoder layers; the loss by a loop over tokens."""
    model = mtp_model(2, dtype=torch.float64, mtp_loss_coef=0.7)
    model.save_pretrained(tmp_path)
    weights = {name: x.double() for name, x in load_file(tmp_path / "model.safetensors").items()}
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"num_hidden_layers": 5, "num_nextn_predict_layers": 0}))
    native = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64, experts_implementation="eager").eval()

    def norm(x, name):
        return x / (x.pow(2).mean(-1, keepdim=True) + model.config.rms_norm_eps).sqrt() * weights[name]

    B, T = 2, 11
    ids = random_ids(B, T)
    out = model(ids, output_hidden_states=True)
    expected_mean, added = [], 0.0
    for b in range(B):
        h = out.hidden_states[-1][b : b + 1]
        for k in (1, 2):
            prefix = f"model.layers.{LAYERS + k - 1}."
            h = h[:, : T - k]  # eq. 21: places 1 to T - k
            e = weights["model.embed_tokens.weight"][ids[b : b + 1, k:]]
            joined = torch.cat((norm(e, prefix + "enorm.weight"), norm(h, prefix + "hnorm.weight")), dim=-1)
            x = joined @ weights[prefix + "eh_proj.weight"].T
            places = torch.arange(T - k).unsqueeze(0)
            mask = torch.full((T - k, T - k), float("-inf"), dtype=torch.float64).triu(1)[None, None]
            x = native.model.layers[LAYERS + k - 1](
                x, attention_mask=mask, position_embeddings=native.model.rotary_emb(x, places), position_ids=places
            )
            h = norm(x, prefix + "shared_head.norm.weight")
            logits = (h @ weights["lm_head.weight"].T)[0]
            for i in range(T - k - 1):
                p = logits[i] - logits[i].max()
                loss = -(p[ids[b, i + k + 1]] - p.exp().sum().log())
                expected_mean.append((k, loss))
                added = added + 0.7 * loss / (B * (T - 1)) / 2
    means = [torch.stack([x for depth, x in expected_mean if depth == k]).mean() for k in (1, 2)]
    plain = model(ids, labels=ids).loss
    got = model.train()(ids, labels=ids)
    near = {"rtol": 1e-6, "atol": 1e-6}  # the native class turns by angles in float32
    torch.testing.assert_close(got.mtp_loss, torch.stack(means).mean(), **near)
    torch.testing.assert_close(got.loss - plain, added, **near)


# The loss


def plain_targets(ids, docs, k):
    """Of one row, by a loop."""
    found = []
    for i in range(len(ids)):
        there = i + k + 1 < len(ids) and docs[i] >= 0 and docs[i + k + 1] == docs[i] == docs[i + k]
        found.append(ids[i + k + 1] if there else -100)
    return found


def test_targets_equal_a_plain_loop():
    lengths = [(5, 1, 2, 9), (17,), (3, 3, 3, 3, 3, 2)]
    position_ids = torch.tensor([[i for n in row for i in range(n)] for row in lengths])
    ids = random_ids(3, 17)
    ids[1, 7] = -100
    mask = torch.ones(3, 17, dtype=torch.int64)
    mask[0, -3:] = 0
    mask[1, :4] = 0
    docs = documents(position_ids, mask, torch.zeros(3, 17, 1))
    expected = torch.tensor([[d for d, n in enumerate(row) for _ in range(n)] for row in lengths])
    expected[mask == 0] = -1
    assert torch.equal(docs, expected)
    assert torch.equal(
        documents(position_ids[:1], None, torch.zeros(3, 17, 1))[2], expected[0].masked_fill(mask[0] == 0, 3)
    )
    next_ids = F.pad(ids[:, 1:], (0, 1), value=-100)
    for k in (1, 2, 3, 16, 17, 30):
        got = mtp_targets(next_ids, docs, k)
        assert got.tolist() == [plain_targets(ids[b].tolist(), docs[b].tolist(), k) for b in range(3)], k
        if k < 4:
            assert (got != -100).any()
    # what a sharded sequence knows of its last target
    next_ids[2, -1] = 5
    assert mtp_targets(next_ids, torch.zeros(3, 17, dtype=torch.int64), 1)[2, -2:].tolist() == [5, -100]
    assert inside(docs, 1)[0].tolist() == [1, 1, 1, 1, 0, 0, 1, 0, *[1] * 5, 0, 0, 0, 0]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("changed", [0, 1])
def test_documents_do_not_leak(attention, changed):
    """All experts take all tokens here, so that no product changes its shape with another document's routing."""
    all_experts = {"n_routed_experts": 2, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1}
    model = mtp_model(2, **all_experts, attn_implementation=attention).train()
    cut, T = 7, 16
    position_ids = torch.cat((torch.arange(cut), torch.arange(T - cut))).unsqueeze(0)
    parts = [slice(0, cut), slice(cut, T)]
    ids, other = random_ids(1, T), random_ids(1, T)
    other[:, parts[changed]] = random_ids(1, T, seed=5)[:, parts[changed]]
    losses, grads = [], []
    for words in (ids, other):
        labels = words.clone()
        labels[:, parts[changed]] = labels[:, cut] = -100
        model.zero_grad()
        out = model(words, labels=labels, position_ids=position_ids)
        out.loss.backward()
        losses.append((out.mtp_loss, out.loss))
        grads.append(model.model.mtp_layers[1].eh_proj.weight.grad.clone())
    assert torch.equal(losses[0][0], losses[1][0]) and torch.equal(losses[0][1], losses[1][1])
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-5, atol=1e-7)
    docs = documents(position_ids, None, torch.zeros(1, T, 1))
    hidden = model.model(ids, position_ids=position_ids).last_hidden_state
    one, two = (model.model.predict_ahead(hidden, x, None, None, position_ids, docs)[0] for x in (ids, other))
    assert torch.equal(one[:, :, parts[1 - changed]], two[:, :, parts[1 - changed]])  # not into states either
    if changed == 0:
        assert not torch.equal(losses[0][0], model(ids, labels=labels).mtp_loss)  # without positions it is one


def test_padding_is_as_nothing():
    model = mtp_model(2, dtype=torch.float64).train()
    ids = random_ids(1, 9)
    expected = model(ids, labels=ids)
    counts = [router.tokens_per_expert.clone() for router in model.routers]
    for left, right in ((4, 0), (0, 4)):
        padded, mask = F.pad(ids, (left, right)), F.pad(torch.ones_like(ids), (left, right))
        position_ids = (mask.cumsum(-1) - 1).clamp(min=0)
        for router in model.routers:
            router.reset_counts()
        labels = padded.masked_fill(mask == 0, -100)
        labels[:, left] = -100
        got = model(padded, attention_mask=mask, position_ids=position_ids, labels=labels)
        torch.testing.assert_close(got.mtp_loss, expected.mtp_loss, **EXACT)
        torch.testing.assert_close(got.loss, expected.loss, rtol=1e-6, atol=1e-6)  # the main loss is in float32
        assert all(map(torch.equal, counts, (router.tokens_per_expert for router in model.routers)))


OPTIONS = {"aux_loss_alpha": 0.3, "router_z_loss_coef": 0.1}


def gradients(model, batches, num_items, **options):
    model.zero_grad()
    for ids in batches:
        model(ids, labels=ids, num_items_in_batch=num_items, **options).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("way", ["accumulation", "checkpointing", "skip_logits", "embeds"])
def test_gradients_do_not_depend_on_how(way):
    model = mtp_model(2, dtype=torch.float64, **OPTIONS).train()
    ids = random_ids(4, 9)
    expected = gradients(model, [ids], 4 * 8)
    assert all(f"model.layers.{i}.mlp.gate.weight" in expected for i in (2, 3, 4))
    if way == "accumulation":
        got = gradients(model, ids.split((1, 3)), 4 * 8)
    elif way == "embeds":
        embeds = model.model.embed_tokens(ids)
        model.zero_grad()
        model(inputs_embeds=embeds, labels=ids, num_items_in_batch=32).loss.backward()
        got = {name: p.grad for name, p in model.named_parameters()}
    elif way == "checkpointing":
        for router in model.routers:
            router.reset_counts()
        model.gradient_checkpointing_enable({"use_reentrant": False})
        got = gradients(model, [ids], 4 * 8)
        assert [int(router.tokens_per_expert.sum()) for router in model.routers] == [108, 108, 96, 84]
    else:
        got = gradients(model, [ids], 4 * 8, skip_logits=True)
    assert got.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-6, atol=1e-7, msg=name)  # float32 in the main loss


def test_without_num_items_the_batch_alone_counts():
    model = mtp_model(1, dtype=torch.float64, **OPTIONS).train()
    ids = random_ids(2, 9)
    labels = ids.clone()
    labels[0, :4] = -100
    torch.testing.assert_close(
        model(ids, labels=labels).loss, model(ids, labels=labels, num_items_in_batch=5 + 8).loss, **EXACT
    )
    shift_labels = F.pad(labels[:, 1:], (0, 1), value=-100)
    got = model(ids, labels=labels, shift_labels=shift_labels)
    torch.testing.assert_close(got.loss, model(ids, labels=labels).loss, **EXACT)
    nothing = model(ids, labels=torch.full_like(ids, -100), num_items_in_batch=13)
    assert nothing.mtp_loss == 0


def test_a_layers_router_losses_weigh_as_any_other():
    """z-loss and balance of a prediction layer, next to a model whose other layers are two."""
    model = mtp_model(1, dtype=torch.float64, **OPTIONS, mtp_loss_coef=1e-12).train()
    ids = random_ids(1, 9)
    out = model(ids, labels=ids, output_router_logits=True)
    plain = mtp_model(1, dtype=torch.float64, **OPTIONS, mtp_loss_coef=0).train()
    plain.load_state_dict(model.state_dict())
    from lamoe.losses import router_losses

    kept = documents(None, None, torch.zeros(1, 9, 1))
    ahead = model.model.predict_ahead(
        model.model(ids).last_hidden_state, ids, None, None, None, kept, output_router_logits=True
    )
    _, alone = router_losses(ahead.router_logits, ids, inside(kept, 1), None, model.config)
    difference = out.loss - plain(ids, labels=ids).loss
    torch.testing.assert_close(difference, alone / 2, rtol=1e-6, atol=1e-9)
    assert alone > 0.1


def test_routers_of_the_layers_are_balanced_where_they_are_trained():
    model = mtp_model(1).train()
    gates = [layer.mlp.gate for layer in model.model.layers[1:]]
    assert model.routers == gates
    before = gates[-1].e_score_correction_bias.clone()
    ids = random_ids(2, 9)
    model(ids, labels=ids)
    counts = model.update_router_bias(0.125)
    assert [int(layer.sum()) for layer in counts] == [54, 54, 48]  # the last place has no token ahead
    assert torch.equal(gates[-1].e_score_correction_bias, before + 0.125 * torch.sign(6 - counts[-1]))
    model.config.mtp_loss_coef = 0
    assert model.routers == gates[:-1]
    ignored = model._ddp_params_and_buffers_to_ignore
    assert "model.layers.3.eh_proj.weight" in ignored and "model.layers.2.mlp.gate.weight" not in ignored
    assert model(ids, labels=ids).mtp_loss is None
    model.config.mtp_loss_coef = 0.3
    assert model.eval()(ids, labels=ids).mtp_loss is None


def test_a_nan_names_the_layer():
    model = mtp_model(1).train()
    ids = random_ids(1, 5)
    model.model.layers[3].mlp.gate.weight.data[0, 0] = float("nan")
    model.eval()(ids)
    with pytest.raises(ValueError, match="The router of layer 3 got NaN or infinite values in training"):
        model.train()(ids, labels=ids)


@pytest.mark.parametrize("field", ["num_nextn_predict_layers", "mtp_loss_coef"])
def test_negative_fields_are_refused(field):
    with pytest.raises(ValueError, match=rf"{field}=-1 must not be negative; 0 is without"):
        make_config(**{field: -1})


def test_only_a_choice_is_written(tmp_path):
    make_config(num_nextn_predict_layers=1).save_pretrained(tmp_path)
    assert "mtp_loss_coef" not in json.loads((tmp_path / "config.json").read_text())
    config = make_config(num_nextn_predict_layers=1, mtp_loss_coef=0.1)
    config.save_pretrained(tmp_path)
    assert type(config).from_pretrained(tmp_path).mtp_loss_coef == 0.1


# In Trainer


def trainer(model, tmp_path, callbacks, **changes):
    rows = [{"input_ids": row, "labels": row} for row in (torch.arange(24) * 7 % 31 + torch.arange(8)[:, None])]
    settings = {
        "max_steps": 12,
        "learning_rate": 1e-2,
        "logging_steps": 3,
        "per_device_train_batch_size": 4,
        **changes,
    }
    arguments = TrainingArguments(tmp_path, report_to="none", save_strategy="no", use_cpu=True, **settings)
    return Trainer(model, arguments, train_dataset=rows, callbacks=callbacks)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_loss_falls_and_is_logged_apart(accumulation, tmp_path):
    model = mtp_model(2, initializer_range=0.05)
    seen = []

    def schedule(done):
        seen.append(done)
        return 0.3 if done < 0.5 else 0.1

    run = trainer(model, tmp_path, [MTPCallback(schedule)], gradient_accumulation_steps=accumulation)
    run.train()
    losses = [entry["mtp_loss"] for entry in run.state.log_history if "mtp_loss" in entry]
    assert len(losses) == 4 and losses[-1] < losses[0] - 0.5
    assert seen == [i / 12 for i in range(12)] and model.config.mtp_loss_coef == 0.1
    assert model.collect_mtp_loss() is None


def test_the_logged_loss_is_that_of_the_steps(tmp_path):
    model = mtp_model(1)
    twin = copy.deepcopy(model).train()
    run = trainer(model, tmp_path, [MTPCallback()], max_steps=1, logging_steps=1, per_device_train_batch_size=8)
    run.train()
    ids = torch.stack([row["input_ids"] for row in run.train_dataset])
    expected = twin(ids, labels=ids).mtp_loss
    assert run.state.log_history[0]["mtp_loss"] == pytest.approx(float(expected), rel=1e-4)
    assert twin.collect_mtp_loss() == pytest.approx(float(expected), rel=1e-5)
    assert twin.collect_mtp_loss() is None


def test_schedules_that_cannot_be(tmp_path):
    with pytest.raises(ValueError, match=r"The schedule gives mtp_loss_coef=0.0 at step 0; keep it > 0"):
        trainer(mtp_model(1), tmp_path, [MTPCallback(lambda done: 0)]).train()
    with pytest.raises(ValueError, match="mtp_loss_coef=0 leaves the layers out; a schedule needs a positive one"):
        trainer(mtp_model(1, mtp_loss_coef=0), tmp_path, [MTPCallback(lambda done: 0.3)]).train()
    with pytest.raises(ValueError, match="MTPCallback found no LamoeForCausalLM in Linear"):
        MTPCallback().on_log(None, None, None, logs={"loss": 1.0}, model=torch.nn.Linear(1, 1))
