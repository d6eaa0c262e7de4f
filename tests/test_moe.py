"""Router and experts against float64 loops; what they count, keep in float32 and refuse."""

import logging

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from lamoe import LamoeConfig, LamoeForCausalLM, LamoeForTokenClassification
from lamoe.moe import LamoeExperts, LamoeMoE, LamoeTopkRouter, select_experts
from tests.tiny import random_ids

E, K, D, WIDTH = 12, 3, 16, 8


def make_config(**changes) -> LamoeConfig:
    settings = {
        "vocab_size": 64, "hidden_size": D, "intermediate_size": 24, "moe_intermediate_size": WIDTH,
        "num_hidden_layers": 3, "num_attention_heads": 2, "q_lora_rank": None, "kv_lora_rank": 16,
        "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8, "n_routed_experts": E,
        "num_experts_per_tok": K, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
        "initializer_range": 0.3, "max_position_embeddings": 64,
    }  # fmt: skip
    return LamoeConfig(**{**settings, **changes})


def chosen_by_loop(scores, bias, config) -> list[set[int]]:
    """Each token's experts, by the words of the papers: sort groups, keep the best, sort experts in them."""
    size = config.n_routed_experts // config.n_group
    chosen = []
    for row in (scores + bias).tolist():
        groups = [row[g * size : (g + 1) * size] for g in range(config.n_group)]
        if config.topk_method == "noaux_tc":
            rank = [sum(sorted(group)[-2:]) for group in groups]
        else:
            rank = [max(group) for group in groups]
        kept = sorted(range(config.n_group), key=lambda g: -rank[g])[: config.topk_group]
        if config.topk_method == "greedy":
            kept = range(config.n_group)
        allowed = [e for e in range(len(row)) if e // size in kept]
        chosen.append(set(sorted(allowed, key=lambda e: -row[e])[: config.num_experts_per_tok]))
    return chosen


@pytest.mark.parametrize("n_group, topk_group", [(1, 1), (3, 1), (3, 2), (6, 2), (4, 4)])
@pytest.mark.parametrize("method", ["greedy", "group_limited_greedy", "noaux_tc"])
def test_selection_is_that_of_the_papers(method, n_group, topk_group):
    config = make_config(topk_method=method, n_group=n_group, topk_group=topk_group)
    generator = torch.Generator().manual_seed(3)
    scores = torch.rand(50, E, generator=generator)
    bias = torch.randn(E, generator=generator) * 0.3
    got = select_experts(scores, bias, config)
    assert [set(row) for row in got.tolist()] == chosen_by_loop(scores, bias, config)
    assert got.shape == (50, K)


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("scoring, method", [("sigmoid", "noaux_tc"), ("softmax", "greedy"), ("sigmoid", "greedy")])
def test_weights_use_the_score_without_the_bias(scoring, method, norm):
    config = make_config(scoring_func=scoring, topk_method=method, norm_topk_prob=norm, routed_scaling_factor=1.7)
    torch.manual_seed(0)
    router = LamoeTopkRouter(config, 1)
    nn.init.normal_(router.weight)
    if method == "noaux_tc":
        router.e_score_correction_bias.copy_(torch.randn(E))
    else:
        assert not hasattr(router, "e_score_correction_bias")
    x = torch.randn(20, D)
    logits, weights, experts = router(x)
    exact = x.double() @ router.weight.double().T
    score = exact.softmax(-1) if scoring == "softmax" else exact.sigmoid()
    expected = score.gather(1, experts)
    if norm:
        expected = expected / expected.sum(-1, keepdim=True)
    torch.testing.assert_close(weights.double(), expected * 1.7, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(logits.double(), exact, rtol=1e-5, atol=1e-5)


def test_router_is_float32_under_bfloat16_and_autocast():
    model = LamoeForCausalLM(make_config()).to(torch.bfloat16)
    router = model.routers[0]
    with torch.no_grad():
        router.e_score_correction_bias.fill_(1 + 2**-20)
    model = model.half().to(torch.bfloat16)
    assert router.weight.dtype == router.e_score_correction_bias.dtype == torch.float32
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32
    assert model.model.layers[0].self_attn.o_proj.weight.dtype == torch.bfloat16
    assert router.e_score_correction_bias[0] == 1 + 2**-20
    x = torch.randn(4, D, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        logits, weights, _ = router(x)
    assert logits.dtype == weights.dtype == torch.float32
    torch.testing.assert_close(logits, x.float() @ router.weight.T)
    assert model.double().routers[0].weight.dtype == torch.float64


def test_loading_in_bfloat16_keeps_the_router_in_float32(tmp_path):
    LamoeForCausalLM(make_config()).save_pretrained(tmp_path)
    model = LamoeForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    kept = {name for name, tensor in model.state_dict().items() if tensor.dtype == torch.float32}
    assert kept == {f"model.layers.{i}.mlp.gate.{n}" for i in (1, 2) for n in ("weight", "e_score_correction_bias")}


def experts_by_loop(experts: LamoeExperts, x, index, weights):
    """Sum over a token's experts, one by one, in float64."""
    out = torch.zeros(x.shape, dtype=torch.float64)
    for token in range(x.shape[0]):
        for slot, expert in enumerate(index[token].tolist()):
            if expert < experts.num_experts:
                gate, up = (experts.gate_up_proj[expert].double() @ x[token].double()).chunk(2)
                y = experts.down_proj[expert].double() @ (F.silu(gate) * up)
                out[token] = out[token] + weights[token, slot].double() * y
    return out


@pytest.mark.parametrize(
    "tokens, chosen, lopsided", [(0, 3, False), (1, 1, False), (9, 3, False), (9, 3, True), (5, 12, False)]
)
@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
def test_experts_and_their_gradients_equal_a_loop(implementation, tokens, chosen, lopsided):
    config = make_config(num_experts_per_tok=chosen, experts_implementation=implementation)
    config._experts_implementation = implementation
    torch.manual_seed(1)
    experts = LamoeExperts(config)
    for parameter in experts.parameters():
        nn.init.normal_(parameter, std=0.3)
    x = torch.randn(tokens, D, requires_grad=True)
    index = (
        torch.stack([torch.randperm(E)[:chosen] for _ in range(tokens)]) if tokens else torch.zeros(0, chosen).long()
    )
    if lopsided:
        index = index * 0 + 7
    weights = torch.rand(tokens, chosen, requires_grad=True)
    got = experts(x, index, weights)
    inputs = [x, weights, *experts.parameters()]
    expected = experts_by_loop(experts, x, index, weights)
    torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-5)
    assert got.shape == (tokens, D) and got.dtype == x.dtype
    if tokens:
        upstream = torch.randn_like(got)
        for a, b in zip(
            torch.autograd.grad(got, inputs, upstream), torch.autograd.grad(expected, inputs, upstream.double()),
            strict=True,
        ):  # fmt: skip
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_sentinels_give_zero_to_output_and_gradients_even_with_nan_weights():
    config = make_config(experts_implementation="eager")
    torch.manual_seed(2)
    experts = LamoeExperts(config)
    for parameter in experts.parameters():
        nn.init.normal_(parameter)
    experts.num_experts = 4  # of 12: the local ones of expert parallelism
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter[4:] = float("nan")  # nothing may read past them
    x = torch.randn(6, D, requires_grad=True)
    index = torch.tensor([[0, 4, 2], [4, 5, 11], [3, 1, 0], [4, 4, 4], [2, 9, 4], [1, 4, 3]])
    weights = torch.rand(6, 3)
    weights[index >= 4] = float("nan")
    weights.requires_grad_(True)
    out = experts(x, index, weights)
    expected = experts_by_loop(experts, x, index, weights)
    torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=1e-5)
    dx, dw = torch.autograd.grad(out.sum(), [x, weights])
    assert torch.equal(dw[index >= 4], torch.zeros_like(dw[index >= 4]))
    assert torch.equal(dx[1], torch.zeros(D)) and torch.equal(out[3], torch.zeros(D))
    assert dx.isfinite().all()


def test_experts_are_switchable_at_run_time_by_any_registered_name():
    model = LamoeForCausalLM(make_config()).eval()
    calls = []

    def spy(self, hidden_states, top_k_index, top_k_weights):
        calls.append(top_k_index.shape)
        return ALL_EXPERTS_FUNCTIONS["grouped_mm"](self, hidden_states, top_k_index, top_k_weights)

    ALL_EXPERTS_FUNCTIONS["spy"] = spy
    try:
        ids = random_ids(2, 5, vocab_size=64)
        expected = model(ids).logits
        model.set_experts_implementation("spy")
        torch.testing.assert_close(model(ids).logits, expected)
        assert calls == [(10, K), (10, K)]
    finally:
        del ALL_EXPERTS_FUNCTIONS["spy"]


@pytest.mark.parametrize("shared", [0, 1, 2])
def test_any_number_of_shared_experts(shared):
    config = make_config(n_shared_experts=shared)
    block = LamoeForCausalLM(config).model.layers[1].mlp
    x = torch.randn(2, 3, D)
    _, weights, experts = block.gate(x)
    expected = block.experts(x.flatten(0, 1), experts, weights).view_as(x)
    if shared:
        assert block.shared_experts.gate_proj.out_features == shared * WIDTH
        expected = expected + block.shared_experts(x)
    torch.testing.assert_close(block(x), expected)


def test_state_with_one_tensor_an_expert_is_loaded_whole_or_in_shards(tmp_path):
    model, whole, sharded = (LamoeForCausalLM(make_config()) for _ in range(3))
    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    assert "model.layers.1.mlp.experts.3.up_proj.weight" in state
    assert str(whole.load_state_dict(state)) == "<All keys matched successfully>"
    for half in (0, 1):
        sharded.load_state_dict({name: state[name] for name in sorted(state)[half::2]}, strict=False)
    for name, expected in model.state_dict().items():
        assert torch.equal(whole.state_dict()[name], expected), name
        assert torch.equal(sharded.state_dict()[name], expected), name
    with pytest.raises(RuntimeError, match=r"Missing key.*mlp.experts.gate_up_proj"):
        whole.load_state_dict({name: x for name, x in state.items() if ".experts." not in name})


def test_moe_layers_follow_frequency_and_dense_prefix():
    model = LamoeForCausalLM(make_config(num_hidden_layers=5, moe_layer_freq=2, first_k_dense_replace=1))
    sparse = [i for i, layer in enumerate(model.model.layers) if isinstance(layer.mlp, LamoeMoE)]
    assert sparse == model.config.moe_layers == [2, 4]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_router_that_meets_nan_says_in_which_layer(bad):
    model = LamoeForCausalLM(make_config())
    ids = random_ids(1, 6, vocab_size=64)
    model.train()(ids)
    with torch.no_grad():
        model.model.layers[1].mlp.gate.weight[0, 0] = bad
    with pytest.raises(ValueError) as caught:
        model(ids)
    assert str(caught.value) == (
        "The router of layer 1 got NaN or infinite values in training forward 2. Train in bfloat16, not float16, "
        "lower the learning rate, or look at the batch; router_nonfinite='zero' keeps such tokens out of the experts, "
        "'ignore' routes them as they are."
    )
    with pytest.raises(ValueError, match="layer 1 got NaN or infinite values in evaluation"):
        model.eval()(ids)
    model.config.router_nonfinite = "ignore"
    model(ids)


def test_training_in_float16_is_warned_of_once(caplog):
    model = LamoeForCausalLM(make_config())
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    try:
        for _ in range(2):
            with torch.autocast("cpu", torch.bfloat16):
                model.train()(random_ids(1, 4, vocab_size=64))
        assert "float16" not in caplog.text
        for _ in range(2):
            with torch.autocast("cpu", torch.float16):
                model.train()(random_ids(1, 4, vocab_size=64))
    finally:
        logger.removeHandler(caplog.handler)
    assert caplog.text.count("Training in float16: routers overflow in it; bfloat16 has the range") == 1


def test_layers_that_are_compiled_one_by_one_train():
    model = LamoeForCausalLM(make_config()).train()
    ids = random_ids(1, 6, vocab_size=64)
    expected = model(ids, labels=ids).loss
    for layer in model.model.layers:
        layer.mlp.compile(backend="eager")
        getattr(layer.mlp, "gate", layer.mlp).checksum = None
    torch.testing.assert_close(model(ids, labels=ids).loss, expected)


def test_a_layer_compiled_after_an_error_does_not_repeat_it():
    model = LamoeForCausalLM(make_config())
    ids = random_ids(1, 6, vocab_size=64)
    weight = model.routers[0].weight
    with torch.no_grad():
        kept = weight[0, 0].clone()
        weight[0, 0] = float("nan")
        with pytest.raises(ValueError, match=r"The router of layer 1"):
            model(ids)
        weight[0, 0] = kept
    for layer in model.model.layers:
        layer.compile(backend="eager")
    assert model(ids).logits.isfinite().all()


@pytest.mark.parametrize("training", [False, True])
def test_shapes_can_be_had_on_meta(training):
    model = LamoeForCausalLM(make_config(experts_implementation="batched_mm")).train(training).to("meta")
    assert model(random_ids(2, 6, vocab_size=64).to("meta")).logits.shape == (2, 6, 64)


def test_a_router_that_peft_copies_is_counted_once():
    from peft import LoraConfig, get_peft_model

    model = LamoeForCausalLM(make_config())
    get_peft_model(model, LoraConfig(target_modules=["o_proj"], modules_to_save=["gate"]))
    assert len(model.routers) == 2


def test_dropout_of_token_classification_is_that_of_the_configuration():
    for rates, expected in (({}, 0.1), ({"classifier_dropout": 0.0}, 0.0), ({"hidden_dropout": 0.3}, 0.3)):
        assert LamoeForTokenClassification(make_config(**rates)).dropout.p == expected


def test_policy_zero_keeps_a_bad_token_out_of_the_experts():
    config = make_config(router_nonfinite="zero")
    block = LamoeForCausalLM(config).model.layers[1].mlp
    x = torch.randn(1, 4, D)
    expected = block(x)
    x[0, 2, 5] = float("nan")
    got = block(x)
    assert torch.equal(got[0, 2], torch.zeros(D))
    torch.testing.assert_close(got[0, [0, 1, 3]], expected[0, [0, 1, 3]])


@pytest.mark.parametrize("reentrant", [None, False, True])
def test_counts_exclude_padding_recomputation_and_evaluation(reentrant):
    model = LamoeForCausalLM(make_config()).train()
    if reentrant is not None:
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
    ids = random_ids(2, 9, vocab_size=64)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    model(ids, attention_mask=mask, labels=ids).loss.backward()
    for router in model.routers:
        assert router.tokens_per_expert.sum() == (18 - 4) * K
        assert router.tokens_per_expert.dtype == torch.int64
    model.eval()(ids)
    assert model.routers[0].tokens_per_expert.sum() == (18 - 4) * K
    assert not any("tokens_per_expert" in name for name in model.state_dict())


def test_output_router_logits_are_those_of_every_sparse_layer():
    model = LamoeForCausalLM(make_config()).eval()
    out = model(random_ids(2, 5, vocab_size=64), output_router_logits=True)
    assert [logits.shape for logits in out.router_logits] == [(10, E)] * 2
    assert model(random_ids(2, 5, vocab_size=64)).router_logits is None


def test_initialisation_leaves_nothing_unset():
    with torch.device("meta"):
        model = LamoeForCausalLM(make_config())
    model.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            tensor.fill_(77)
    model.init_weights()
    std = model.config.initializer_range
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        assert not (tensor == 77).any(), name
        if tensor.dim() > 1:
            assert abs(float(tensor.detach().std()) - std) < std / 3, name


def test_experts_load_from_one_tensor_each_as_checkpoints_hold_them():
    """By load_state_dict, which Trainer resumes with; at once, and from shards that hold some of the experts."""
    source, at_once, by_shards = (LamoeExperts(make_config()) for _ in range(3))
    for experts in (source, at_once, by_shards):
        experts.reset_parameters(0.3)
    tensors = {}
    for expert in range(E):
        gate, up = source.gate_up_proj[expert].detach().chunk(2)
        parts = {"gate_proj": gate, "up_proj": up, "down_proj": source.down_proj[expert].detach()}
        tensors |= {f"{expert}.{name}.weight": part.clone() for name, part in parts.items()}
    assert at_once.load_state_dict(dict(tensors)) == ([], [])
    names = sorted(tensors)
    for shard in (names[:10], names[10:]):
        by_shards.load_state_dict({name: tensors[name] for name in shard}, strict=False)
    for experts in (at_once, by_shards):
        assert torch.equal(experts.gate_up_proj, source.gate_up_proj)
        assert torch.equal(experts.down_proj, source.down_proj)
    assert len(tensors) == 3 * E  # the caller's are left alone
    assert at_once.load_state_dict(source.state_dict()) == ([], [])
