"""What is kept for the backward: same values and gradients, fewer bytes; and routing under checkpointing."""

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.loss.loss_utils import ForCausalLMLoss

from lamoe import LamoeForCausalLM, token_loss
from lamoe.experts import ExpertOptions, expert_options
from lamoe.moe import LamoeMLP, LamoeTopkRouter, Routing
from lamoe.recompute import exact_linear, gated_linear, two_linears
from lamoe.token_loss import logits_loss
from tests.kernels import assert_within_budget
from tests.test_moe import make_config

BF16 = torch.bfloat16

interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="by Triton's interpreter, on the CPU")


def kept_bytes(run, *parameters) -> int:
    """Bytes that `run` keeps for its backward, each storage once, without those of `parameters`."""
    storages, known = {}, {parameter.untyped_storage().data_ptr() for parameter in parameters}

    def note(tensor):
        if tensor.untyped_storage().data_ptr() not in known:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        out = run()
    del out
    return sum(storages.values())


def gradients(run, *leaves):
    return torch.autograd.grad(run().double().square().sum(), leaves)


def test_gated_linear_has_plain_gradients_and_keeps_two_tensors():
    projection = nn.Linear(6, 4, bias=False).double()
    gate, up = (torch.randn(2, 3, 6, dtype=torch.double, requires_grad=True) for _ in range(2))
    leaves = (gate, up, projection.weight)
    lean = functools.partial(gated_linear, gate, up, projection, nn.SiLU(), True)
    plain = functools.partial(lambda: projection(F.silu(gate) * up))
    torch.testing.assert_close(lean(), plain(), rtol=0, atol=0)
    torch.testing.assert_close(gradients(lean, *leaves), gradients(plain, *leaves))
    assert kept_bytes(lean, projection.weight) == gate.nbytes + up.nbytes
    assert kept_bytes(plain, projection.weight) == 4 * gate.nbytes
    projection.weight.requires_grad_(False)
    torch.testing.assert_close(gradients(lean, gate, up), gradients(plain, gate, up))


@pytest.mark.parametrize("change", ["hook", "gelu", "bias", "no_grad"])
def test_gated_linear_leaves_what_it_cannot_read_alone(change):
    """A hooked projection is called, and another activation is computed."""
    projection = nn.Linear(6, 4, bias=change == "bias")
    act, called = nn.GELU() if change == "gelu" else nn.SiLU(), []
    if change == "hook":
        projection.register_forward_hook(lambda *_: called.append(1))
    gate, up = (torch.randn(3, 6, requires_grad=True) for _ in range(2))
    with torch.set_grad_enabled(change != "no_grad"):
        out = gated_linear(gate, up, projection, act, change != "gelu")
    torch.testing.assert_close(out, projection(act(gate) * up))
    assert len(called) == (2 if change == "hook" else 0)
    assert "GatedLinear" not in str(out.grad_fn)


@pytest.mark.parametrize("frozen", [(), (0,), (1,), (2,), (1, 2)], ids=str)
def test_two_linears_have_plain_gradients_and_keep_what_plain_ones_do(frozen):
    first, second = (nn.Linear(6, width, bias=False).double() for width in (4, 5))
    x = torch.randn(2, 3, 6, dtype=torch.double)
    leaves = [x, first.weight, second.weight]
    for i, leaf in enumerate(leaves):
        leaf.requires_grad_(i not in frozen)
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    outs = {
        "both": lambda run: torch.cat(run(), dim=-1), "first": lambda run: run()[0], "second": lambda run: run()[1],
        "views": lambda run: run()[0].sum() + run()[1].sum(dim=-1),
    }  # fmt: skip
    lean, plain = (lambda: two_linears(x, first, second)), (lambda: (first(x), second(x)))
    assert "TwoLinears" in str(lean()[0].grad_fn)
    for name, out in outs.items():
        got, expected = (
            torch.autograd.grad(out(run).square().sum(), wanted, allow_unused=True)
            if out(run).requires_grad
            else [None] * len(wanted)
            for run in (lean, plain)
        )
        assert [g is None for g in got] == [g is None for g in expected], name
        for a, b in zip(got, expected, strict=True):
            assert a is None or (a.shape == b.shape and torch.allclose(a, b)), name
    weights = (first.weight, second.weight)
    assert kept_bytes(lean, *weights) == kept_bytes(plain, *weights) == (0 if frozen == (1, 2) else x.nbytes)


@pytest.mark.parametrize("change", ["hook", "backward hook", "bias", "wrapped", "dtype", "no_grad"])
def test_two_linears_leave_what_they_cannot_read_alone(change):
    called = []
    first, second = (nn.Linear(6, width, bias=change == "bias" and width == 5) for width in (4, 5))
    if change == "hook":
        second.register_forward_hook(lambda *_: called.append(1))
    elif change == "backward hook":
        second.register_full_backward_hook(lambda *_: called.append(1))
    elif change == "wrapped":
        second = nn.Sequential(second)
    x = torch.randn(3, 6, requires_grad=True)
    with torch.set_grad_enabled(change != "no_grad"), torch.autocast("cpu", dtype=BF16, enabled=change == "dtype"):
        outs = two_linears(x, first, second)
        torch.testing.assert_close(outs, (first(x), second(x)))
    assert "TwoLinears" not in str(outs[0].grad_fn) + str(outs[1].grad_fn)
    assert len(called) == 2 * (change == "hook")
    if change == "backward hook":
        outs[1].sum().backward()
        assert called


def nodes(out: torch.Tensor) -> list[str]:
    """Names of all nodes of a graph."""
    seen, todo = set(), [out.grad_fn]
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen.add(node)
            todo += [after for after, _ in node.next_functions]
    return [node.name() for node in seen]


@pytest.mark.parametrize("changes", [{}, {"q_lora_rank": 12}, {"attention_bias": True, "q_lora_rank": 12}], ids=str)
def test_layers_add_gradients_within_products(changes):
    """Attention and the feed-forward, each with two linear layers of the same, but for biased ones; eagerly alone."""
    model, ids = LamoeForCausalLM(make_config(**changes)).train(), torch.arange(12).view(2, 6)
    model.set_experts_implementation("eager")
    found = nodes(model(ids, labels=ids, use_cache=False).loss)
    assert found.count("_TwoLinearsBackward") == (3 if "attention_bias" in changes else 6)
    model.model.layers[1].self_attn.kv_a_proj_with_mqa.register_forward_hook(lambda *_: None)
    again = nodes(model(ids, labels=ids, use_cache=False).loss)
    assert again.count("_TwoLinearsBackward") == (3 if "attention_bias" in changes else 5)


def test_a_feed_forward_keeps_its_input_gate_and_up():
    mlp, x = LamoeMLP(make_config(), 24).double(), torch.randn(5, make_config().hidden_size, dtype=torch.double)
    x.requires_grad_()
    plain = lambda: mlp.down_proj(F.silu(mlp.gate_proj(x)) * mlp.up_proj(x))  # noqa: E731
    leaves = (x, *mlp.parameters())
    torch.testing.assert_close(gradients(lambda: mlp(x), *leaves), gradients(plain, *leaves))
    assert kept_bytes(lambda: mlp(x), *mlp.parameters()) == x.nbytes + 2 * 5 * 24 * 8


def test_feed_forward_under_autocast_has_the_gradients_of_autocast():
    torch.manual_seed(0)
    mlp, x = LamoeMLP(make_config(), 24), torch.randn(5, make_config().hidden_size)

    def run(forward):
        mlp.zero_grad()
        with torch.autocast("cpu", dtype=BF16):
            out = forward(x)
        out.float().square().sum().backward()
        return [out.detach(), *(p.grad for p in mlp.parameters())]

    got = run(mlp)
    plain = run(lambda x: mlp.down_proj(F.silu(mlp.gate_proj(x)) * mlp.up_proj(x)))
    assert [g.dtype for g in got] == [BF16, *[torch.float32] * 3]
    exact = [g.double() for g in plain]
    for name, one, two, three in zip(("out", "gate", "up", "down"), got, plain, exact, strict=True):
        # one rounding of bfloat16 apart at most: both multiply the same bfloat16 numbers
        torch.testing.assert_close(one.double(), three, rtol=2**-7, atol=2**-7 * three.abs().max().item(), msg=name)
        assert two.dtype == one.dtype


def test_exact_linear_keeps_the_half_precision_input():
    x = torch.randn(7, 6).to(BF16).requires_grad_()
    weight = torch.randn(4, 6, requires_grad=True)
    lean, plain = (lambda: exact_linear(x, weight)), (lambda: F.linear(x.float(), weight))
    torch.testing.assert_close(lean(), plain(), rtol=0, atol=0)
    torch.testing.assert_close(gradients(lean, x, weight), gradients(plain, x, weight))
    assert kept_bytes(lean, weight) == x.nbytes and kept_bytes(plain, weight) >= 2 * x.nbytes
    router = LamoeTopkRouter(make_config(), 1)
    router.reset_parameters()
    logits, _, _ = router(torch.randn(7, make_config().hidden_size, dtype=BF16))
    assert logits.dtype == torch.float32


@pytest.mark.parametrize("items", [None, 5, torch.tensor(5)])
@pytest.mark.parametrize("chunk", [1, 3 * 64, 2**26])
def test_loss_of_held_logits_is_that_of_transformers(items, chunk, monkeypatch):
    monkeypatch.setattr(token_loss, "CHUNK", chunk)
    logits = (3 * torch.randn(2, 5, 64)).to(BF16).requires_grad_()
    labels = torch.randint(0, 64, (2, 5)).masked_fill(torch.rand(2, 5) < 0.3, -100)
    for extra in ({}, {"shift_labels": labels.roll(-1, 1)}):
        got = logits_loss(logits, labels, items, **extra)
        (gradient,) = torch.autograd.grad(got, logits)
        plain = ForCausalLMLoss(logits, labels, 64, items, **extra)
        (expected,) = torch.autograd.grad(plain, logits)
        exact = logits.detach().double().requires_grad_()
        loss = ForCausalLMLoss(exact, labels, 64, items, **extra)
        assert got.dtype == torch.float32 and gradient.dtype == BF16
        torch.testing.assert_close(got, plain)
        assert_within_budget("gradient", gradient, expected, torch.autograd.grad(loss, exact)[0])


def test_loss_of_held_logits_keeps_the_logits_alone():
    logits = torch.randn(1, 9, 512, dtype=BF16, requires_grad=True)
    labels = torch.randint(0, 512, (1, 9))
    lean = kept_bytes(lambda: logits_loss(logits, labels))
    plain = kept_bytes(lambda: ForCausalLMLoss(logits, labels, 512))
    assert lean < 1.2 * logits.nbytes and plain > 2 * logits.nbytes


def test_model_takes_the_lean_loss_in_half_precision_unless_told_another():
    model, ids = LamoeForCausalLM(make_config()).to(BF16).train(), torch.arange(12).view(2, 6)
    model.set_experts_implementation("eager")
    out = model(ids, labels=ids)
    torch.testing.assert_close(out.loss, ForCausalLMLoss(out.logits, ids, 64))
    assert "CrossEntropySum" in str(out.loss.grad_fn.next_functions)
    model.loss_function = lambda logits, labels, vocab_size, **_: logits.float().sum()
    assert model(ids, labels=ids).loss == model(ids).logits.float().sum()


def test_expert_recompute_is_a_field_that_boost_overrides():
    module = LamoeForCausalLM(make_config(expert_recompute=True)).model.layers[1].mlp.experts
    assert expert_options(module) == ExpertOptions(recompute=True)
    module._lamoe_options = ExpertOptions(batch_invariant=True)
    assert expert_options(module) == ExpertOptions(batch_invariant=True)
    assert expert_options(nn.Module()) == ExpertOptions()


@interpreted
def test_expert_recompute_keeps_less(calls):
    def kept(recompute):
        torch.manual_seed(0)
        model = LamoeForCausalLM(make_config(expert_recompute=recompute, num_hidden_layers=2)).train()
        model.set_experts_implementation("lamoe")
        ids = torch.arange(12).view(2, 6)
        bytes_kept = kept_bytes(lambda: model(ids, labels=ids, use_cache=False).loss, *model.parameters())
        model(ids, labels=ids, use_cache=False).loss.backward()
        return bytes_kept, [p.grad for p in model.parameters()], model.config

    (much, plain, config), (little, again, _) = kept(False), kept(True)
    rows = 12 * config.num_experts_per_tok * len(config.moe_layers)
    assert much - little == rows * 2 * config.moe_intermediate_size * 4
    torch.testing.assert_close(again, plain)


class Fickle:
    """Attention that comes out differently each time, so that a router asked again would choose others."""

    def __init__(self, model):
        self.calls = 0
        for layer in model.model.layers:
            layer.self_attn.register_forward_hook(self)

    def __call__(self, module, inputs, output):
        self.calls += 1
        noise = torch.randn(output[0].shape, generator=torch.Generator().manual_seed(self.calls))
        return output[0] + 3 * noise.to(output[0]), output[1]


def chosen_in(model) -> list[torch.Tensor]:
    """The experts of every call of a router, in order."""
    chosen = []
    for router in model.routers:
        router.register_forward_hook(lambda module, inputs, output: chosen.append((module.layer_idx, output[2])))
    return chosen


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputation_routes_as_the_first_forward_did(reentrant):
    """Two forwards in flight, the first one's backward first: fickle inputs, equal experts, counted once."""
    model = LamoeForCausalLM(make_config(num_hidden_layers=4)).train()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    Fickle(model)
    chosen = chosen_in(model)
    batches = [torch.randint(0, 64, (2, 6)) for _ in range(2)]
    losses = [model(ids, labels=ids, use_cache=False).loss for ids in batches]
    first, second = chosen[:3], chosen[3:6]
    assert len(chosen) == 6
    for loss, told in ((losses[0], first), (losses[1], second)):
        del chosen[:]
        loss.backward()
        assert [layer for layer, _ in chosen] == [3, 2, 1]
        for (layer, again), (known, experts) in zip(chosen, reversed(told), strict=True):
            assert layer == known and torch.equal(again, experts)
    counted = [int(router.tokens_per_expert.sum()) for router in model.routers]
    assert counted == [24 * model.config.num_experts_per_tok] * 3


def test_recomputation_of_one_layer_in_any_order_and_twice():
    """Layers checkpointed by hand, the graph run through twice, as FSDP's wrappers and double backwards do."""
    model = LamoeForCausalLM(make_config()).train()
    layer, x = model.model.layers[1], torch.randn(1, 5, model.config.hidden_size, requires_grad=True)
    angles = model.model.rotary_emb(x, torch.arange(5)[None])
    chosen = chosen_in(model)
    outs = [checkpoint(layer, x, routing=Routing(), position_embeddings=angles, use_reentrant=False) for _ in "ab"]
    with torch.no_grad():
        layer.mlp.gate.weight.neg_()  # whoever is asked now chooses others
    for out in (outs[1], outs[0], outs[1]):
        out.sum().backward(retain_graph=True)
    experts = [experts for _, experts in chosen]
    assert len(experts) == 5 and all(torch.equal(experts[0], other) for other in experts)
    assert int(layer.mlp.gate.tokens_per_expert.sum()) == 2 * 5 * model.config.num_experts_per_tok


@pytest.mark.parametrize("router", ["eager", pytest.param("triton", marks=interpreted)])
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_changes_no_gradient_and_no_count(reentrant, router):
    def run(checkpointing):
        torch.manual_seed(0)
        model = LamoeForCausalLM(make_config(router_implementation=router)).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        for ids in torch.arange(24).view(2, 2, 6):
            model(ids, labels=ids, use_cache=False).loss.backward()
        counts = [router.tokens_per_expert.clone() for router in model.routers]
        return [p.grad for p in model.parameters()], counts

    (plain, counts), (got, again) = run(False), run(True)
    torch.testing.assert_close(got, plain)
    assert all(torch.equal(a, b) for a, b in zip(counts, again, strict=True))
