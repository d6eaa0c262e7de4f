"""Counts, biases and what is reported of them: the same however a step is cut, for Lamoe and for native classes."""

import copy
import re
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import transformers
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from lamoe import LamoeForCausalLM, RouterBalance
from lamoe.balance import BIASES, max_violation
from lamoe.correction import move_biases, summed_over_ranks
from tests.ranks import on_two_ranks
from tests.registry import COMMON, FAMILIES, NATIVE, native_tiny
from tests.steps import (
    W,
    assert_same_step,
    forwards,
    gradients,
    native_training_model,
    plain_model,
    ragged_batch,
    training_model,
)  # fmt: skip
from tests.test_moe import E
from tests.tiny import random_ids

MODELS = {"lamoe": training_model, "native": native_training_model}


def test_losses_reach_the_router():
    gate = "model.layers.1.mlp.gate.weight"
    whole, without = gradients(training_model())[1][gate], gradients(plain_model())[1][gate]
    assert (whole - without).norm() > 0.1 * without.norm()


def biases_of(model) -> list[torch.Tensor]:
    return [b.clone() for name, b in model.named_buffers() if name.endswith("e_score_correction_bias")]


def one_step(model, **layout):
    """Loss, gradients, counts, report and biases of one optimizer step."""
    with RouterBalance(model) as balance:
        done = gradients(model, **layout)
        counts = balance.step(0.25)
        return done, counts, balance.report(), biases_of(model)


def assert_same_rows(got: list[dict], expected):
    """Compare two reports: all of it comes from counts and is the same, but for the sum of the routers' entropies."""
    for a, b in zip(got, map(vars, expected), strict=True):
        assert {**a, "router_entropy": None} == {**b, "router_entropy": None}
        assert (a["router_entropy"] or 0) == pytest.approx(b["router_entropy"] or 0, rel=1e-5)


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize(
    ("layout", "checkpointing"),
    [
        ({"parts": 2}, None), ({"parts": 4}, None), ({}, False), ({"parts": 2}, False),
        ({"pack": True}, None), ({"pack": True, "parts": 2}, None), ({"pack": True, "parts": 4}, False),
    ],
)  # fmt: skip
def test_a_step_is_the_same_however_it_is_cut(kind, layout, checkpointing):
    expected, counts, report, biases = one_step(MODELS[kind]())
    model = MODELS[kind]()
    if checkpointing is not None:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
    got = one_step(model, **layout)
    assert_same_step(got[0], expected)
    assert all(torch.equal(a, b) for a, b in zip(got[1], counts, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(got[3], biases, strict=True))
    assert biases[0].abs().max() >= 0.25
    assert_same_rows([vars(row) for row in got[2]], report)
    assert counts[0].sum() == 31 * model.config.num_experts_per_tok


@pytest.mark.parametrize("kind", MODELS)
def test_reentrant_recomputation_is_not_counted(kind):
    counts = one_step(MODELS[kind]())[1]
    model = MODELS[kind]()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    model.enable_input_require_grads()
    assert all(torch.equal(a, b) for a, b in zip(one_step(model)[1], counts, strict=True))


@pytest.mark.parametrize("kind", MODELS)
def test_only_training_forwards_with_gradients_count(kind):
    model = MODELS[kind]()
    ids = random_ids(2, 6, vocab_size=W)
    with RouterBalance(model) as balance:
        with torch.no_grad():
            model(ids)  # as GRPO computes the old log-probabilities
        model.eval()(ids)
        assert all(not counts.any() for counts in balance.step(0.25))
        model.train()(ids)
        balance.skip()
        assert all(not counts.any() for counts in balance.step(0.25))
        assert not any(row.max_violation for row in balance.report())
        model(ids)
        assert balance.step(0)[0].sum() == 12 * model.config.num_experts_per_tok
    hooked = [m for m in model.modules() if m._forward_hooks or m._forward_pre_hooks]
    assert not hooked


def _rank(rank: int, file: str):
    results = []
    for kind, scope in (("lamoe", "sequence"), ("lamoe", "global"), ("native", None)):
        model = training_model(aux_loss_scope=scope) if kind == "lamoe" else native_training_model()
        wrapped = torch.nn.parallel.DistributedDataParallel(model)
        loss = torch.zeros(())
        with RouterBalance(wrapped) as balance:
            for arguments in forwards(1, rows=slice(2 * rank, 2 * rank + 2)):
                one = wrapped(**arguments).loss
                (one * dist.get_world_size()).backward()  # DDP averages, and Trainer undoes it so
                loss += one.detach()
            dist.all_reduce(loss)
            used = balance.step(0.25)
            rows = [vars(row) for row in balance.report()]
        results.append([(float(loss), {n: p.grad for n, p in model.named_parameters()}), used, rows, biases_of(model)])
    if rank == 0:
        torch.save(results, file)


def test_two_ranks_equal_one(tmp_path):
    models = [training_model(), training_model(aux_loss_scope="global"), native_training_model()]
    on_two_ranks(_rank, tmp_path, str(tmp_path / "out"))
    for model, got in zip(models, torch.load(tmp_path / "out"), strict=True):
        expected = one_step(model)
        assert_same_step(got[0], expected[0])
        assert all(torch.equal(a, b) for a, b in zip(got[1], expected[1], strict=True))
        assert all(torch.equal(a, b) for a, b in zip(got[3], expected[3], strict=True))
        assert_same_rows(got[2], expected[2])


def trained_on_skew(kind: str, speed: float, steps: int = 60) -> list[float]:
    """Train on words that come as rarely as the root of their rank; each layer's MaxVio over the last 20 steps."""
    model = plain_model() if kind == "lamoe" else MODELS[kind]()
    generator = torch.Generator().manual_seed(3)
    frequency = torch.arange(1, W + 1).float() ** -0.5
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    with RouterBalance(model) as balance:
        for step in range(steps):
            if step == steps - 20:
                balance.report()
            ids = torch.multinomial(frequency, 16 * 16, replacement=True, generator=generator).view(16, 16)
            model(ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            balance.step(speed)
        return [row.max_violation for row in balance.report()]


@pytest.mark.parametrize(("kind", "collapsed"), [("lamoe", 2.0), ("native", 1.3)])  # they can reach 3.0 and 1.67
def test_bias_keeps_max_violation_below_one_half_where_routers_collapse(kind, collapsed):
    assert min(trained_on_skew(kind, 0.0)) > collapsed
    assert max(trained_on_skew(kind, 0.02)) < 0.5


def test_bias_moves_by_the_sign_of_the_shortfall():
    model = training_model()
    router = model.routers[0]
    router.tokens_per_expert.copy_(torch.tensor([5, 1, 3] + [3] * (E - 3)))
    used = model.update_router_bias(0.25)[0]
    assert used.sum() == 3 * E
    assert router.e_score_correction_bias.tolist() == [-0.25, 0.25] + [0.0] * (E - 2)
    assert router.tokens_per_expert.sum() == 0


def test_counts_past_float32_move_the_bias_right_and_widths_may_differ():
    big = 2**25
    counts = [torch.tensor([big + 1, big - 1, big, big]), torch.tensor([1, 3]), torch.tensor([7, 7, 7, 7])]
    biases = [torch.zeros(1, 4), torch.ones(2), torch.zeros(4)]
    move_biases(biases, counts, 0.5)
    assert biases[0].tolist() == [[-0.5, 0.5, 0, 0]]
    assert biases[1].tolist() == [1.5, 0.5]
    assert not biases[2].any()
    assert summed_over_ranks([]) == []


def test_bias_is_saved_and_restored(tmp_path):
    model = training_model()
    model(random_ids(2, 9, vocab_size=W))
    model.update_router_bias(0.02)
    model.save_pretrained(tmp_path)
    again = LamoeForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again.routers[0].e_score_correction_bias, model.routers[0].e_score_correction_bias)
    assert model.routers[0].e_score_correction_bias.abs().max() > 0.01


def test_a_native_bias_in_bfloat16_becomes_float32_when_it_is_moved():
    model = native_training_model().to(torch.bfloat16)
    bias = model.model.layers[1].mlp.gate
    with RouterBalance(model) as balance:
        model(random_ids(2, 6, vocab_size=W))
        balance.step(0)
        assert bias.e_score_correction_bias.dtype == torch.bfloat16
        before = bias.e_score_correction_bias.float()
        model(random_ids(2, 6, vocab_size=W))
        balance.step(1e-4)
        assert bias.e_score_correction_bias.dtype == torch.float32
        assert (bias.e_score_correction_bias - before).abs().max() == pytest.approx(1e-4, rel=1e-2)
        model(random_ids(2, 6, vocab_size=W))  # and the forward takes it


def test_state_goes_on_in_another_process_model():
    first, second = native_training_model(), native_training_model().to(torch.bfloat16)
    ids = random_ids(2, 6, vocab_size=W)
    with RouterBalance(first) as balance, RouterBalance(second) as other:
        first(ids)
        balance.step(1e-4)
        other.load_state_dict(balance.state_dict())
        assert all(torch.equal(a, b) for a, b in zip(biases_of(first), biases_of(second), strict=True))
        assert other.report() == balance.report()
        with pytest.raises(ValueError) as caught:
            other.load_state_dict({**balance.state_dict(), "biases": {"layers.9.mlp": [0.0]}})
    assert str(caught.value) == (
        "The saved balance is of the layers layers.9.mlp, the model has model.layers.1.mlp, model.layers.2.mlp; "
        "resume with the model that was saved."
    )


def test_report_is_that_of_the_counts():
    model = training_model()
    with RouterBalance(model) as balance:
        assert balance.report() == []
        seen = []
        for seed in (1, 2):
            model(random_ids(2, 9, seed=seed, vocab_size=W))
            seen.append(balance.step(0.5)[0])
        row = balance.report()[0]
    load = (seen[0] + seen[1]).double()
    shares = load / load.sum()
    entropy = -(shares[shares > 0] * shares[shares > 0].log()).sum() / torch.tensor(float(E)).log()
    assert row.label == "layer_1"
    assert row.max_violation == pytest.approx(float(load.max() / load.mean() - 1))
    assert row.max_violation_batch == pytest.approx(float(seen[1].max() / seen[1].double().mean() - 1))
    assert row.dead_experts == int((load == 0).sum())
    assert row.load_entropy == pytest.approx(float(entropy))
    assert row.busiest == int(load.argmax())
    bias = model.routers[0].e_score_correction_bias
    assert row.bias_range == pytest.approx(float(bias.max() - bias.min()))


def test_router_entropy_is_that_of_the_normalised_affinities():
    model = training_model()
    ids, mask, _ = ragged_batch()
    logits = model(ids, attention_mask=mask, output_router_logits=True).router_logits[0]
    scores = logits.detach().double().sigmoid()[mask.flatten() > 0]
    shares = scores / scores.sum(-1, keepdim=True)
    expected = -(shares * shares.log()).sum(-1).mean() / torch.tensor(float(E)).log()
    with RouterBalance(model) as balance:
        balance.skip()  # what was counted before
        model(ids, attention_mask=mask)
        balance.step(0)
        assert balance.report()[0].router_entropy == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("target", [{"target_modules": ["o_proj"], "modules_to_save": ["gate"]},
                                    {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}])  # fmt: skip
def test_native_layers_are_found_once_under_peft(target):
    model = native_training_model()
    expected = one_step(model)[1]
    wrapped = get_peft_model(native_training_model(), LoraConfig(**{"target_modules": [], **target}))
    with RouterBalance(wrapped) as balance:
        assert balance.labels == ["layer_1", "layer_2"]
        for arguments in forwards(1):
            wrapped(**arguments)
        assert all(torch.equal(a, b) for a, b in zip(balance.step(0.25), expected, strict=True))
        wrapped(**forwards(1)[0])
        assert [layer.bias.abs().max() >= 0.25 for layer in balance.layers] == [True, True]


@pytest.mark.parametrize("name", [*FAMILIES, *NATIVE])
def test_native_classes_are_counted(name):
    model = native_tiny(name).train()
    ids = random_ids(2, 7)
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    with RouterBalance(model) as balance:
        model(ids, attention_mask=mask).logits.sum().backward()
        counts = balance.step(0.25)
        assert {int(layer.sum()) for layer in counts} == {11 * chosen(model)}
        assert [row.bias_range is not None for row in balance.report()] == [biased(model)] * len(counts)


def chosen(model) -> int:
    config = model.config
    return config.ffn_config.moe_top_k if config.model_type == "dbrx" else config.num_experts_per_tok


def biased(model) -> bool:
    return any(name.endswith(BIASES) for name, _ in [*model.named_buffers(), *model.named_parameters()])


# Those whose bias is a parameter, lies on the block or in a part of it, or has another name.
OTHERS = {
    "minimax_m2": {}, "hy_v3": {"num_hidden_layers": 2}, "afmoe": {"num_dense_layers": 0},
    "lfm2_moe": {"num_dense_layers": 0, "layer_types": ["full_attention"]},
    "ernie4_5_moe": {"moe_num_experts": 4, "moe_k": 2, "moe_layer_start_index": 0},
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_other_correction_biases_are_moved(name):
    known = AutoConfig.for_model(name)
    settings = {k: v for k, v in COMMON.items() if hasattr(known, k) or k in known.attribute_map}
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(name, **{**settings, **OTHERS[name]}), experts_implementation="eager"
    ).train()
    ids = random_ids(2, 7)
    with RouterBalance(model) as balance:
        assert balance.layers and all(layer.owner is not None for layer in balance.layers)
        model(ids).logits.sum().backward()
        counts = balance.step(0.25)
        for layer, count in zip(balance.layers, counts, strict=True):
            assert count.sum() == 14 * 2
            shortfall = torch.sign(count.float().mean() - count).view_as(layer.bias)
            assert torch.equal(layer.bias.detach(), 0.25 * shortfall)
        model(ids)


def test_every_native_class_with_a_correction_bias_is_reached():
    folder = Path(transformers.__file__).parent / "models"
    kept = re.compile(rf"self\.({'|'.join(BIASES)})\s*=\s*nn\.(Buffer|Parameter)")
    found = [path for path in folder.glob("*/modeling_*.py") if kept.search(path.read_text(encoding="utf-8"))]
    assert len(found) >= 30
    arguments = re.compile(
        r"class \w*Experts\(nn\.Module\):.*?def forward\(\s*self,\s*hidden_states[^,]*,\s*(\w+)", re.S
    )
    for path in found:
        assert arguments.search(path.read_text(encoding="utf-8"))[1] in ("top_k_index", "selected_experts"), path


def test_a_model_without_experts_is_refused():
    with pytest.raises(ValueError) as caught:
        RouterBalance(torch.nn.Linear(2, 2))
    assert str(caught.value) == (
        "Linear has no routed experts to balance: it is no Lamoe model, and has no module ...Experts whose forward "
        "takes top_k_index, router_indices or selected_experts."
    )


def test_a_sharded_bias_is_refused():
    model = native_training_model()
    with RouterBalance(model) as balance:
        model(random_ids(1, 4, vocab_size=W))
        model.model.layers[1].mlp.gate.e_score_correction_bias.device_mesh = "mesh"
        with pytest.raises(ValueError, match=r"bias of model.layers.1.mlp is sharded over ranks and cannot be"):
            balance.step(0.1)
        balance.step(0)


def test_max_violation():
    assert max_violation(torch.tensor([2, 2, 2])) == 0
    assert max_violation(torch.tensor([9, 0, 0])) == 2
    assert max_violation(torch.tensor([0, 0])) == 0


def test_a_copy_of_the_model_counts_for_itself():
    model = training_model()
    twin = copy.deepcopy(model)
    twin(random_ids(1, 4, vocab_size=W))
    assert model.routers[0].tokens_per_expert.sum() == 0 < twin.routers[0].tokens_per_expert.sum()
