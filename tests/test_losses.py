"""Balancing losses against the papers' formulas, their scale, the bias update, and the loss without logits."""

import copy

import pytest
import torch
import torch.distributed as dist
from transformers import Trainer, TrainingArguments

from lamoe import BalanceCallback, LamoeForCausalLM
from lamoe.balance import max_violation
from lamoe.losses import balance_loss, next_token_loss, z_loss
from tests.ranks import on_two_ranks
from tests.test_moe import E, K, make_config
from tests.tiny import random_ids

W = 64


def balance_by_formula(logits, mask, scoring):
    """DeepSeek-V3 eq. 17-20 for one sequence, term by term."""
    tokens = [t for t in range(len(logits)) if mask[t]]
    f, P = [0.0] * E, [0.0] * E
    for t in tokens:
        s = logits[t].softmax(-1) if scoring == "softmax" else logits[t].sigmoid()
        for i in range(E):
            chosen = s[i] in s.topk(K).values
            f[i] += E / (K * len(tokens)) * float(chosen)
            P[i] += float(s[i] / s.sum()) / len(tokens)
    return sum(a * b for a, b in zip(f, P, strict=True))


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
def test_balance_loss_is_the_papers(scoring):
    config = make_config(scoring_func=scoring, topk_method="greedy")
    logits = torch.randn(3, 7, E, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 2
    mask = torch.ones(3, 7, dtype=torch.bool)
    mask[1, :4] = False
    got = balance_loss(logits, mask, config)
    expected = [balance_by_formula(logits[b], mask[b], scoring) for b in range(3)]
    torch.testing.assert_close(got, torch.tensor(expected, dtype=torch.float64), rtol=1e-6, atol=0)
    pooled = balance_loss(logits, mask, make_config(scoring_func=scoring, topk_method="greedy", seq_aux=False))
    together = balance_by_formula(logits.flatten(0, 1), mask.flatten(), scoring)
    torch.testing.assert_close(pooled, torch.full((3,), together, dtype=torch.float64), rtol=1e-6, atol=0)


def test_balance_loss_of_a_balanced_router_is_one():
    config = make_config(scoring_func="softmax", topk_method="greedy")
    logits = torch.eye(E).roll(1, 0).unsqueeze(0) * 1e-6
    logits = logits + logits.roll(1, -1) + logits.roll(2, -1)  # each expert is chosen by exactly K tokens
    torch.testing.assert_close(balance_loss(logits, None, config), torch.ones(1), rtol=1e-5, atol=0)


def test_z_loss_is_the_mean_square_of_the_log_sum_exp():
    logits = torch.randn(2, 5, E, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]]).bool()
    expected = torch.stack([logits[b][mask[b]].exp().sum(-1).log().square().mean() for b in range(2)])
    torch.testing.assert_close(z_loss(logits, mask), expected)
    torch.testing.assert_close(z_loss(logits[:1], None), expected[:1])


def training_model(**changes) -> LamoeForCausalLM:
    torch.manual_seed(5)
    return LamoeForCausalLM(make_config(**{"aux_loss_alpha": 0.5, "router_z_loss_coef": 0.1, **changes})).train()


def ragged_batch():
    ids = random_ids(4, 10, seed=9, vocab_size=W)
    mask = torch.ones_like(ids)
    mask[1, :3] = mask[3, :6] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[2, :5] = -100
    return ids, mask, labels


def gradients(model, parts: int, slices=slice(None), num_items=None, **checkpointing):
    """Gradients of an optimizer step over `ragged_batch` in so many accumulation steps, as Trainer takes them."""
    ids, mask, labels = (x[slices] for x in ragged_batch())
    items = labels[:, 1:].ne(-100).sum() if num_items is None else num_items
    for a, b, c in zip(ids.chunk(parts), mask.chunk(parts), labels.chunk(parts), strict=True):
        model(a, attention_mask=b, labels=c, num_items_in_batch=items).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def test_gradient_does_not_depend_on_accumulation():
    whole = gradients(training_model(), 1)
    without = gradients(training_model(aux_loss_alpha=0.0, router_z_loss_coef=0.0), 1)
    gate = "model.layers.1.mlp.gate.weight"
    assert (whole[gate] - without[gate]).norm() > 0.1 * without[gate].norm(), "the losses reach the router"
    for parts in (2, 4):
        for name, gradient in gradients(training_model(), parts).items():
            torch.testing.assert_close(gradient, whole[name], rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


def test_gradient_does_not_depend_on_checkpointing():
    expected = gradients(training_model(), 1)
    model = training_model()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    for name, gradient in gradients(model, 1).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6)


def _rank(rank: int, file: str):
    model = torch.nn.parallel.DistributedDataParallel(training_model())
    items = ragged_batch()[2][:, 1:].ne(-100).sum()
    ids, mask, labels = (x[2 * rank : 2 * rank + 2] for x in ragged_batch())
    loss = model(ids, attention_mask=mask, labels=labels, num_items_in_batch=items).loss
    (loss * dist.get_world_size()).backward()  # DDP averages, and Trainer undoes it so
    used = model.module.update_router_bias(0.01)
    biases = [router.e_score_correction_bias for router in model.module.routers]
    if rank == 0:
        torch.save([{n: p.grad for n, p in model.module.named_parameters()}, used, biases], file)


def test_gradient_counts_and_bias_of_two_ranks_equal_one(tmp_path):
    model = training_model()
    expected = gradients(model, 1)
    counts = model.update_router_bias(0.01)
    on_two_ranks(_rank, tmp_path, str(tmp_path / "out"))
    got, used, biases = torch.load(tmp_path / "out")
    for name, gradient in got.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
    for layer, count, bias in zip(used, counts, biases, strict=True):
        assert torch.equal(layer, count)
        assert bias.abs().max() == pytest.approx(0.01)
    assert all(torch.equal(b, r.e_score_correction_bias) for b, r in zip(biases, model.routers, strict=True))


def test_reentrant_checkpointing_says_that_it_loses_the_loss(caplog, monkeypatch):
    import logging

    model = training_model()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    model.enable_input_require_grads()
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    try:
        gradients(model, 1)
    finally:
        logger.removeHandler(caplog.handler)
    assert "gradient_checkpointing_kwargs={'use_reentrant': False}" in caplog.text


def test_evaluation_loss_is_the_token_loss_alone():
    ids, mask, labels = ragged_batch()
    model = training_model().eval()
    plain = training_model(aux_loss_alpha=0.0, router_z_loss_coef=0.0).eval()
    out = model(ids, attention_mask=mask, labels=labels, output_router_logits=True)
    torch.testing.assert_close(out.loss, plain(ids, attention_mask=mask, labels=labels).loss)
    assert out.aux_loss > 0


@pytest.mark.parametrize("num_items", [None, 77])
@pytest.mark.parametrize("shifted", [False, True])
def test_loss_without_logits_equals_the_loss_with_them(num_items, shifted):
    ids, mask, labels = ragged_batch()
    extra = {} if num_items is None else {"num_items_in_batch": torch.tensor(num_items)}
    if shifted:
        extra["shift_labels"] = torch.nn.functional.pad(labels, (0, 1), value=-100)[:, 1:].contiguous()
    results = []
    for skip in (False, True):
        model = training_model()
        out = model(ids, attention_mask=mask, labels=labels, skip_logits=skip, **extra)
        out.loss.backward()
        results.append((out.loss.detach(), {n: p.grad for n, p in model.named_parameters()}))
        offered = hasattr(torch.nn, "LinearCrossEntropyOptions")
        assert (out.logits is None) == (skip and offered)
    torch.testing.assert_close(results[1][0], results[0][0])
    for name, gradient in results[0][1].items():
        torch.testing.assert_close(results[1][1][name], gradient, rtol=1e-4, atol=1e-6)


def test_skip_logits_of_the_configuration_holds_in_training_only():
    ids = random_ids(2, 6, vocab_size=W)
    model = training_model(skip_logits=True)
    offered = hasattr(torch.nn, "LinearCrossEntropyOptions")
    assert (model(ids, labels=ids).logits is None) == offered
    assert model(ids).logits is not None
    assert model.eval()(ids, labels=ids).logits is not None


@pytest.mark.skipif(not hasattr(torch.nn, "LinearCrossEntropyOptions"), reason="needs PyTorch's chunked loss (2.12)")
def test_loss_without_logits_never_makes_them():
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        size = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for x in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(x, torch.Tensor):
                    Largest.size = max(Largest.size, x.numel())
            return out

    hidden = torch.randn(4, 256, 16, requires_grad=True)
    head = torch.randn(2048, 16, requires_grad=True)
    labels = torch.randint(0, 2048, (4, 256))
    with Largest():
        next_token_loss(hidden, head, labels).backward()
    assert Largest.size < 4 * 256 * 2048 / 4


def skewed_run(model, speed: float, steps: int = 60) -> float:
    """Route a stream of nearly equal tokens, moving the bias after each step; MaxVio of the last one."""
    router = model.routers[0].train()
    generator = torch.Generator().manual_seed(0)
    favourite = torch.randn(1, router.weight.shape[1], generator=generator)
    counts = None
    for _ in range(steps):
        router(favourite + 0.7 * torch.randn(512, router.weight.shape[1], generator=generator))
        counts = model.update_router_bias(speed)[0]
    return max_violation(counts)


def test_bias_brings_max_violation_below_one_half():
    assert skewed_run(training_model(), 0.0) > 2
    assert skewed_run(training_model(), 0.02) < 0.5


def test_bias_moves_by_the_sign_of_the_shortfall():
    model = training_model()
    router = model.routers[0]
    router.tokens_per_expert.copy_(torch.tensor([5, 1, 3] + [3] * (E - 3)))
    used = model.update_router_bias(0.25)[0]
    assert used.sum() == 3 * E
    assert router.e_score_correction_bias.tolist() == [-0.25, 0.25] + [0.0] * (E - 2)
    assert router.tokens_per_expert.sum() == 0


def test_bias_is_saved_and_restored(tmp_path):
    model = training_model()
    skewed_run(model, 0.02, steps=3)
    model.save_pretrained(tmp_path)
    again = LamoeForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again.routers[0].e_score_correction_bias, model.routers[0].e_score_correction_bias)
    assert model.routers[0].e_score_correction_bias.abs().max() > 0.01


def train(folder, parts: int = 1, **changes):
    """Two optimizer steps of Trainer over eight rows; the trained model and the log."""
    rows = [{"input_ids": row, "labels": row} for row in random_ids(8, 10, seed=4, vocab_size=W)]
    arguments = TrainingArguments(
        str(folder), max_steps=2, per_device_train_batch_size=4 // parts, gradient_accumulation_steps=parts,
        logging_steps=1, report_to="none", save_strategy="no", use_cpu=True, learning_rate=1e-2, disable_tqdm=True,
        seed=1, data_seed=1, max_grad_norm=0.0,
    )  # fmt: skip
    trainer = Trainer(training_model(**changes), arguments, train_dataset=rows, callbacks=[BalanceCallback(0.125)])
    trainer.train()
    return trainer


def test_trainer_balances_logs_and_does_not_depend_on_accumulation(tmp_path):
    whole, parts = train(tmp_path, 1), train(tmp_path, 4)
    for a, b in zip(whole.model.parameters(), parts.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    for a, b in zip(whole.model.routers, parts.model.routers, strict=True):
        assert torch.equal(a.e_score_correction_bias, b.e_score_correction_bias)
        assert a.e_score_correction_bias.abs().max() in (0.125, 0.25)
    logs = [entry for entry in whole.state.log_history if "loss" in entry]
    assert [set(entry) & {"max_violation", "dead_experts"} for entry in logs] == [
        {"max_violation", "dead_experts"}
    ] * 2


def test_callback_skips_a_skipped_step_and_finds_the_model_in_wrappers():
    model = training_model()
    model.routers[0].tokens_per_expert[0] = 9

    class Skipped:
        step_was_skipped = True

    callback = BalanceCallback(0.5)
    callback.on_step_end(None, None, None, model=torch.nn.DataParallel(model), optimizer=Skipped())
    assert model.routers[0].e_score_correction_bias.abs().max() == 0
    assert model.routers[0].tokens_per_expert.sum() == 0
    with pytest.raises(ValueError, match="BalanceCallback found no Lamoe model in Linear"):
        callback.on_step_end(None, None, None, model=torch.nn.Linear(2, 2))


def test_max_violation():
    assert max_violation(torch.tensor([2, 2, 2])) == 0
    assert max_violation(torch.tensor([9, 0, 0])) == 2
    assert max_violation(torch.tensor([0, 0])) == 0


def test_a_copy_of_the_model_counts_for_itself():
    model = training_model()
    twin = copy.deepcopy(model)
    twin(random_ids(1, 4, vocab_size=W))
    assert model.routers[0].tokens_per_expert.sum() == 0 < twin.routers[0].tokens_per_expert.sum()
