"""Routing that is told and returned."""

import pytest
import torch

from lamoe import LamoeForCausalLM, record_routed_experts
from tests.test_moe import make_config

K = make_config().num_experts_per_tok
E = make_config().n_routed_experts
IDS = torch.arange(10).view(2, 5)


def make_model(**changes) -> LamoeForCausalLM:
    torch.manual_seed(0)
    model = LamoeForCausalLM(make_config(**changes)).eval()
    model.set_experts_implementation("eager")
    return model


@pytest.mark.parametrize("topk", ["noaux_tc", "greedy"])
@pytest.mark.parametrize("form", ["tensor", "int16", "all layers", "list", "flat"])
def test_replay_of_the_own_choice_is_bit_equal(topk, form):
    model = make_model(topk_method=topk, scoring_func="sigmoid" if topk == "noaux_tc" else "softmax")
    out = model(IDS, output_routed_experts=True)
    experts = out.routed_experts
    assert experts.shape == (2, 5, 2, K) and experts.dtype == torch.int64
    given = {
        "tensor": experts,
        "int16": experts.to(torch.int16),
        "all layers": torch.cat((torch.zeros_like(experts[:, :, :1]), experts), dim=2),
        "list": list(experts.unbind(2)),
        "flat": tuple(experts.to(torch.int32).unbind(2)),
    }[form]
    again = model(IDS, routed_experts=given, output_routed_experts=True)
    assert torch.equal(again.logits, out.logits) and torch.equal(again.routed_experts, experts)
    assert model(IDS).routed_experts is None


def test_another_choice_is_used_with_weights_of_the_current_logits():
    model = make_model()
    experts = model(IDS, output_routed_experts=True).routed_experts
    other = (experts + 1) % E
    seen = []
    model.routers[1].register_forward_hook(lambda module, inputs, output: seen.append((inputs[0], *output)))
    out = model(IDS, routed_experts=other, output_routed_experts=True)
    assert torch.equal(out.routed_experts, other) and not torch.equal(out.logits, model(IDS).logits)
    x, logits, weights, used = seen[0]
    assert torch.equal(used, other[:, :, 1].reshape(-1, K))
    scores = torch.nn.functional.linear(x.flatten(0, 1), model.routers[1].weight).sigmoid()
    expected = torch.stack([row[ids] for row, ids in zip(scores, used, strict=True)])
    expected = expected / expected.sum(-1, keepdim=True) * model.config.routed_scaling_factor
    torch.testing.assert_close(weights, expected)


def test_gradients_reach_the_router_and_are_those_of_a_free_choice():
    model = make_model().train()

    def gradients(**extra):
        model.zero_grad()
        model(IDS, labels=IDS, **extra).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters()}

    experts = model(IDS, output_routed_experts=True).routed_experts
    free, told = gradients(), gradients(routed_experts=experts)
    torch.testing.assert_close(told, free)
    assert all(gradients(routed_experts=(experts + 1) % E)[f"model.layers.{i}.mlp.gate.weight"].any() for i in (1, 2))


def test_tokens_without_a_record_are_routed_anew():
    model = make_model()
    experts = model(IDS, output_routed_experts=True).routed_experts
    told = (experts + 1) % E
    told[0, :3] = -1
    told[1, 4, 0, 1] = -1  # one id that is missing is a token that is
    got = model(IDS, routed_experts=told, output_routed_experts=True).routed_experts
    assert torch.equal(got[0, :3, 0], experts[0, :3, 0]) and torch.equal(got[1, 4, 0], experts[1, 4, 0])
    assert torch.equal(got[1, :4], told[1, :4])


def test_a_replay_is_counted_and_survives_checkpointing():
    model = make_model().train()
    experts = (model(IDS, output_routed_experts=True).routed_experts + 1) % E
    for router in model.routers:
        router.reset_counts()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    mask = torch.tensor([[0, 0, 1, 1, 1], [1] * 5])
    model(IDS, attention_mask=mask, labels=IDS, routed_experts=experts, use_cache=False).loss.backward()
    for layer, router in enumerate(model.routers):
        expected = torch.bincount(experts[:, :, layer][mask.bool()].flatten(), minlength=E)
        assert torch.equal(router.tokens_per_expert, expected)


def test_training_repeats_the_routing_of_generation():
    model = make_model()
    prompt, mask = torch.tensor([[0, 0, 5, 6], [7, 8, 9, 10]]), torch.tensor([[0, 0, 1, 1], [1] * 4])
    with record_routed_experts(model) as routing:
        ids = model.generate(prompt, attention_mask=mask, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    experts = routing.experts(ids.shape[1])
    assert experts.shape == (2, 8, 2, K) and (experts[:, -1] == -1).all() and (experts[:, :-1] >= 0).all()
    assert not any(router._forward_hooks for router in model.routers if len(router._forward_hooks) > 1)
    mask = torch.cat((mask, torch.ones(2, 4, dtype=torch.long)), dim=1)
    with torch.no_grad():
        for router in model.routers:
            router.weight.neg_()  # a step of training that would have chosen others
    out = model(ids, attention_mask=mask, routed_experts=experts, output_routed_experts=True)
    assert torch.equal(out.routed_experts[:, :-1], experts[:, :-1])
    assert not torch.equal(model(ids, attention_mask=mask, output_routed_experts=True).routed_experts, experts)


def test_what_cannot_be_recorded_says_so():
    model = make_model()
    with record_routed_experts(model) as routing, pytest.raises(ValueError, match="No forward was recorded"):
        routing.experts()
    with record_routed_experts(model) as routing:
        model(IDS)
    assert routing.experts().shape == (2, 5, 2, K)
    with pytest.raises(ValueError, match="5 tokens were seen, more than length=4; record one"):
        routing.experts(4)
    with record_routed_experts(model) as routing:
        model(IDS)
        model(IDS[:1])
    with pytest.raises(ValueError, match="The batch has changed between forwards: "):
        routing.experts()


def some(*shape, fill=None):
    ids = torch.arange(K).expand(*shape, K)
    return ids if fill is None else torch.full_like(ids, fill)


@pytest.mark.parametrize(
    ("given", "text"),
    [
        (some(2, 5, 2).float(), "routed_experts are torch.float32; they must be integers"),
        (some(2, 4, 2), rf"routed_experts are \[2, 4, 2, {K}\]; it must be \[B=2, T=5, L, K={K}\]"),
        (some(2, 5, 4), "with L=2 layers that have experts, or all 3; tokens that nothing is known of get -1"),
        (some(2, 5), r"routed_experts are \[2, 5, "),
        ([], "routed_experts is empty; it must be"),
        ([some(2, 5), some(2, 4)], "have different shapes"),
        (some(2, 5, 2, fill=0), "ids must be different and below n_routed_experts"),
        (some(2, 5, 2) + E, "hold .* for a token"),
    ],
)
def test_what_does_not_fit_is_refused(given, text):
    with pytest.raises(ValueError, match=text):
        make_model()(IDS, routed_experts=given)


def test_dense_layers_of_a_record_are_not_looked_at():
    model = make_model()
    experts = model(IDS, output_routed_experts=True).routed_experts
    dense = torch.full_like(experts[:, :, :1], E + 7)
    out = model(IDS, routed_experts=torch.cat((dense, experts), dim=2))
    assert torch.equal(out.logits, model(IDS).logits)
