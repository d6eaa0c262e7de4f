"""Balancing losses against the papers' formulas, their scale, and the loss without logits."""

import pytest
import torch

from lamoe import losses
from lamoe.losses import RunningLoad, next_token_loss, router_losses
from tests.steps import W, gradients, ragged_batch, training_model
from tests.test_moe import E, K, make_config
from tests.tiny import random_ids


def chosen_by(scores, config) -> set[int]:
    """The experts of one token, by the words of V2 (groups by their best) and V3 (by their two best), without bias."""
    size = E // config.n_group
    groups = range(config.n_group)
    rank = [sorted(scores[g * size : (g + 1) * size].tolist())[::-1] for g in groups]
    best = 2 if config.topk_method == "noaux_tc" else 1
    kept = sorted(groups, key=lambda g: -sum(rank[g][:best]))[: config.topk_group]
    if config.topk_method == "greedy":
        kept = list(groups)
    return set(sorted((i for i in range(E) if i // size in kept), key=lambda i: -scores[i])[:K])


def losses_by_formula(logits, mask, config, load=None):
    """Expert-, device- and communication-level loss of one sequence, term by term (V2 eq. 23-31, V3 eq. 17-20).

    `load` gives the counts that f and f'' are taken from in place of this sequence's: experts, devices, tokens.
    """
    tokens = [t for t in range(len(logits)) if mask[t]]
    D, size = config.loss_devices, E // config.loss_devices
    count, sent, P = [0.0] * E, [0.0] * D, [0.0] * E
    for t in tokens:
        s = logits[t].softmax(-1) if config.scoring_func == "softmax" else logits[t].sigmoid()
        chosen = chosen_by(s, config)
        for i in range(E):
            count[i] += i in chosen
            P[i] += float(s[i] / s.sum()) / len(tokens)
        for d in range(D):
            sent[d] += any(i // size == d for i in chosen)
    n = len(tokens)
    if load is not None:
        count, sent, n = load
    most = config.topk_group if config.topk_method != "greedy" and config.n_group == D else min(K, D)
    f = [E / (K * n) * c for c in count]
    P_device = [sum(P[d * size : (d + 1) * size]) for d in range(D)]
    f_device = [sum(f[d * size : (d + 1) * size]) / size for d in range(D)]
    f_sent = [D / (most * n) * c for c in sent]
    return [
        sum(a * b for a, b in zip(x, y, strict=True)) for x, y in ((f, P), (f_device, P_device), (f_sent, P_device))
    ]


def counts_by_loop(logits, mask, config):
    """How many of the tokens choose each expert and reach each device, and how many there are."""
    size = E // config.loss_devices
    count, sent = [0] * E, [0] * config.loss_devices
    for row, real in zip(logits, mask, strict=True):
        if real:
            s = row.softmax(-1) if config.scoring_func == "softmax" else row.sigmoid()
            chosen = chosen_by(s, config)
            for i in chosen:
                count[i] += 1
            for d in {i // size for i in chosen}:
                sent[d] += 1
    return count, sent, int(mask.sum())


def router_case(**changes):
    """Two layers' float64 logits of three rows of six with padding; mask, labels of some, and the configuration."""
    config = make_config(**{"aux_loss_alpha": 0.3, "topk_method": "greedy", **changes})
    generator = torch.Generator().manual_seed(0)
    layers = [torch.randn(18, E, generator=generator, dtype=torch.float64) * 2 for _ in range(2)]
    mask = torch.ones(3, 6, dtype=torch.bool)
    mask[1, :2] = False
    labels = torch.arange(18).view(3, 6).masked_fill(~mask, -100)
    labels[2, :3] = -100
    return layers, mask, labels, config


V2 = {"topk_method": "group_limited_greedy", "scoring_func": "softmax", "n_group": 4, "topk_group": 2}
V3 = {"topk_method": "noaux_tc", "scoring_func": "sigmoid", "n_group": 3, "topk_group": 2}


@pytest.mark.parametrize("scope", ["sequence", "batch", "global"])
@pytest.mark.parametrize(
    "kind", [{"scoring_func": "softmax"}, {"scoring_func": "sigmoid", "expert_devices": 6}, V2, V3], ids=str
)
def test_balance_losses_are_the_papers(scope, kind):
    several = kind.get("expert_devices", kind.get("n_group", 1)) > 1
    alphas = {"device_loss_alpha": 0.2, "communication_loss_alpha": 0.7} if several else {}
    layers, mask, labels, config = router_case(aux_loss_scope=scope, **kind, **alphas)
    weights = labels[:, 1:].ne(-100).sum(dim=1).tolist()
    expected = expected_added = 0.0
    for logits in layers:
        rows = logits.view(3, 6, E)
        if scope == "batch":
            found = [(sum(weights), losses_by_formula(logits, mask.flatten(), config))]
        else:
            load = counts_by_loop(logits, mask.flatten(), config) if scope == "global" else None
            found = [(w, losses_by_formula(rows[b], mask[b], config, load)) for b, w in enumerate(weights)]
        for w, (expert, device, sent) in found:
            expected += w * expert / sum(weights) / 2
            expected_added += w * (0.3 * expert + (0.2 * device + 0.7 * sent if several else 0)) / 2
    balance, added = router_losses(layers, labels, mask, torch.tensor(40), config)
    torch.testing.assert_close(float(balance), expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(float(added), expected_added / 40, rtol=1e-6, atol=0)
    alone = router_losses(layers, labels, mask, None, config)[1]
    torch.testing.assert_close(float(alone), expected_added / sum(weights), rtol=1e-6, atol=0)


@pytest.mark.parametrize("scope", ["sequence", "batch", "global"])
def test_gradient_of_the_balance_losses_is_that_of_the_formula(scope):
    layers, mask, labels, config = router_case(
        aux_loss_scope=scope, **V2, device_loss_alpha=0.2, communication_loss_alpha=0.7, router_z_loss_coef=0.1
    )
    layers = [logits.requires_grad_() for logits in layers]
    added = router_losses(layers, labels, mask, None, config)[1]
    got = torch.autograd.grad(added, layers)

    step, generator = 1e-6, torch.Generator().manual_seed(1)
    direction = [torch.randn(x.shape, generator=generator, dtype=x.dtype) for x in layers]
    moved = [
        router_losses(
            [(x + s * step * d).detach() for x, d in zip(layers, direction, strict=True)], labels, mask, None, config
        )[1]
        for s in (1, -1)
    ]
    slope = sum((g * d).sum() for g, d in zip(got, direction, strict=True))
    torch.testing.assert_close((moved[0] - moved[1]) / (2 * step), slope, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("scope", ["sequence", "batch", "global"])
@pytest.mark.parametrize("positions", [None, torch.tensor([[0, 1, 2, 0, 1, 0]])], ids=["rows", "documents"])
def test_layers_together_are_the_layers_one_by_one(monkeypatch, scope, positions):
    """Of five layers three and two, all or one at a time: the losses, their gradients and the running load."""
    layers, mask, labels, config = router_case(
        aux_loss_scope=scope, **V2, device_loss_alpha=0.2, communication_loss_alpha=0.7, router_z_loss_coef=0.1
    )
    layers = [(logits * scale).requires_grad_() for scale in (1, 0.5) for logits in layers] + [layers[0] * 3]

    def found(at_once):
        monkeypatch.setattr(losses, "_AT_ONCE", at_once * layers[0].numel())
        running = RunningLoad()
        both = router_losses(layers, labels, mask, None, config, position_ids=positions, running=running)
        load = () if running.choices is None else (running.choices,)
        return *both, *torch.autograd.grad(both[1], layers[:4]), *load

    alone, some, everything = found(0), found(3), found(2**20)
    assert len(alone) == len(some) == 6 + (scope == "global")
    for values in zip(alone, some, everything, strict=True):
        for value in values[1:]:
            torch.testing.assert_close(value, values[0], rtol=1e-12, atol=1e-15)


def test_a_compiled_loss_is_not_compiled_for_each_length():
    """Two times: once for a length, once for any."""
    config, graphs = make_config(scoring_func="softmax", topk_method="greedy"), []
    compiled = torch.compile(router_losses, backend=lambda graph, inputs: graphs.append(graph) or graph)
    for length in range(20, 60, 5):
        layers = [torch.randn(length, E) for _ in range(3)]
        labels = torch.zeros(1, length, dtype=torch.long)
        found = compiled(layers, labels, None, None, config), router_losses(layers, labels, None, None, config)
        torch.testing.assert_close(*found)
    assert len(graphs) == 2


def test_balance_loss_of_a_balanced_router_is_one():
    config = make_config(scoring_func="softmax", topk_method="greedy")
    logits = torch.eye(E).roll(1, 0) * 1e-6
    logits = logits + logits.roll(1, -1) + logits.roll(2, -1)  # each expert is chosen by exactly K tokens
    balance, _ = router_losses([logits], torch.zeros(1, E, dtype=torch.long), None, None, config)
    torch.testing.assert_close(balance, torch.tensor(1.0), rtol=1e-5, atol=0)


def test_z_loss_is_the_mean_square_of_the_log_sum_exp():
    layers, mask, labels, config = router_case(aux_loss_alpha=0.0, router_z_loss_coef=2.0)
    expected = 0.0
    for logits in layers:
        for b, w in enumerate(labels[:, 1:].ne(-100).sum(dim=1).tolist()):
            rows = logits.view(3, 6, E)[b][mask[b]]
            expected += w * 2.0 * float(rows.exp().sum(-1).log().square().mean()) / 2 / 40
    torch.testing.assert_close(float(router_losses(layers, labels, mask, 40, config)[1]), expected)


def test_global_load_sums_the_forwards_of_a_step_and_then_starts_anew():
    layers, mask, labels, config = router_case(aux_loss_scope="global")
    mask, labels = torch.ones_like(mask), torch.ones_like(labels)
    running = RunningLoad()
    for step in range(2):  # each of two forwards, with 15 labelled tokens
        loads = [(0, 0, 0)] * 2
        for part in range(2):
            forward = [logits * (1 if part == step else -1) for logits in layers]
            _, added = router_losses(forward, labels, mask, torch.tensor(30), config, running=running)
            expected = 0.0
            for i, logits in enumerate(forward):
                count, _, n = counts_by_loop(logits, mask.flatten(), config)
                count = count if part == 0 else [a + b for a, b in zip(count, loads[i][0], strict=True)]
                loads[i] = (count, [0], n * (part + 1))
                rows = logits.view(3, 6, E)
                expected += sum(5 * losses_by_formula(rows[b], mask[b], config, loads[i])[0] for b in range(3)) / 2
            torch.testing.assert_close(float(added), 0.3 * expected / 30, rtol=1e-6, atol=0)


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
