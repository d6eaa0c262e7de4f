"""The kernels of training beside the experts: cross entropy, queries and keys, gate, router's logits, norms."""

import pytest
import torch
import torch.nn.functional as F

from lamoe import LamoeForCausalLM, attention, recompute, token_loss
from lamoe.attention import rotate_pairs
from lamoe.token_loss import logits_loss
from tests.kernels import assert_within_budget
from tests.test_moe import make_config
from tests.test_recompute import kept_bytes
from tests.tiny import lamoe_model, random_ids

gate_kernels = pytest.importorskip("lamoe.kernels_gated")
logit_kernels = pytest.importorskip("lamoe.kernels_logits")
loss_kernels = pytest.importorskip("lamoe.kernels_loss")
heads_kernels = pytest.importorskip("lamoe.kernels_heads")
norm_kernels = pytest.importorskip("lamoe.kernels_norm")

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"  # on CPU Triton interprets
DTYPES = [torch.bfloat16, torch.float16, torch.float32] if GPU else [torch.float16, torch.float32]


def random(*shape, dtype=torch.float32, seed=0, scale=1.0):
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale).to(DEVICE, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("X, W", [(5, 97), (3, 4096), (2, 9001), (0, 7)])
def test_cross_entropy(X, W, dtype):
    logits = random(X, W, dtype=dtype, scale=5.0)
    targets = torch.randint(0, W, (X,), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    targets[1::3] = -100
    scale = torch.tensor(0.37, device=DEVICE)
    loss, mass = loss_kernels.losses(logits, targets, -100)
    gradient = loss_kernels.losses_gradient(scale, logits, targets, mass, -100)

    def plain(kind):
        leaf = logits.detach().to(kind).requires_grad_()
        exact = leaf if kind == torch.float64 else leaf.float()
        rows = F.cross_entropy(exact, targets, reduction="none")
        return rows.detach(), torch.autograd.grad(rows.sum() * scale.to(rows), leaf)[0]

    (exact, exact_gradient), (same, same_gradient) = plain(torch.float64), plain(dtype)
    assert_within_budget("loss", loss, same, exact)
    assert_within_budget("gradient", gradient, same_gradient, exact_gradient)
    assert not loss[1::3].any() and not gradient[1::3].any()


def test_cross_entropy_of_infinite_logits():
    logits = random(3, 50)
    logits[0, 3:] = float("-inf")
    logits[1, 4] = float("nan")
    targets = torch.tensor([1, 2, 3], device=DEVICE)
    expected = F.cross_entropy(logits, targets, reduction="none")
    loss, _ = loss_kernels.losses(logits, targets, -100)
    torch.testing.assert_close(loss, expected, equal_nan=True)


def test_cross_entropy_of_targets_that_are_no_column():
    logits, targets = random(4, 9), torch.tensor([-1, 9, 3, -100], device=DEVICE)
    loss, _ = loss_kernels.losses(logits, targets, -100)
    assert loss[:2].isnan().all() and loss[3] == 0
    torch.testing.assert_close(loss[2], F.cross_entropy(logits[2:3], targets[2:3]))


def test_targets_of_one_row_may_have_gaps(monkeypatch):
    monkeypatch.setattr(token_loss, "_fused", lambda logits: True)
    logits = random(1, 5, 9, dtype=torch.float16)
    labels = torch.arange(10, device=DEVICE).remainder(9).view(1, 10)[:, ::2]
    loss = logits_loss(logits.requires_grad_(), None, shift_labels=labels)
    torch.testing.assert_close(loss, F.cross_entropy(logits[0].float(), labels[0]))
    gradient = torch.autograd.grad(loss, logits)[0][0].float()
    torch.testing.assert_close(
        gradient, (logits[0].float().softmax(-1) - F.one_hot(labels[0], 9)) / 5, rtol=1e-2, atol=1e-3
    )


def eager_heads(q, kv, k, cos, sin, interleaved):
    """What attention.LamoeAttention makes of the same."""
    R = k.shape[-1]
    P = q.shape[-1] - R
    plain, turned = q.transpose(1, 2).split((P, R), dim=-1)
    key, value = kv.transpose(1, 2).split((P, kv.shape[-1] - P), dim=-1)
    turned, k = (rotate_pairs(x, cos, sin, interleaved) for x in (turned, k.unsqueeze(1)))
    query = torch.cat((plain, turned), dim=-1)
    key = torch.cat((key, k.expand(-1, key.shape[1], -1, -1)), dim=-1)
    return tuple(x.transpose(1, 2) for x in (query, key, value))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("one_position", [True, False])
@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("H, P, R, V", [(3, 8, 4, 8), (20, 12, 8, 16), (2, 5, 6, 7), (1, 8, 0, 4)])
def test_heads_and_their_gradients(H, P, R, V, interleaved, one_position, dtype):
    B, T = 2, 3
    q, kv = random(B, T, H, P + R, dtype=dtype), random(B, T, H, P + V, seed=1, dtype=dtype)
    k = random(B, T, R + 5, seed=2, dtype=dtype)[..., 5:]
    angles = [random(1 if one_position else B, T, R // 2, seed=3 + i) for i in range(2)]
    grads = [random(*shape, seed=5, dtype=dtype) for shape in ((B, T, H, P + R), (B, T, H, P + R), (B, T, H, V))]

    def run(function, kind):
        leaves = [x.detach().to(kind).requires_grad_() for x in (q, kv, k)]
        out = function(*leaves, *(x.double() if kind == torch.float64 else x for x in angles), interleaved)
        return [*(x.detach() for x in out), *torch.autograd.grad(out, leaves, [g.to(kind) for g in grads])]

    got = run(heads_kernels.expanded_heads, dtype)
    same, exact = run(eager_heads, dtype), run(eager_heads, torch.float64)
    for name, a, b, c in zip(("query", "key", "value", "dq", "dkv", "dk"), got, same, exact, strict=True):
        assert_within_budget(name, a, b, c)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(5, 7), (3, 4096), (0, 4)])
def test_the_gate_and_its_gradients(shape, dtype):
    gate, up, dout = (random(*shape, dtype=dtype, seed=i, scale=3.0) for i in range(3))

    def eager(kind):
        leaves = [x.detach().to(kind).requires_grad_() for x in (gate, up)]
        out = F.silu(leaves[0]) * leaves[1]
        return [out.detach(), *torch.autograd.grad(out, leaves, dout.to(kind))]

    out = gate_kernels.gated(gate, up)
    dgate, dup, again = gate_kernels.gated_gradient(dout, gate, up)
    assert torch.equal(again, out)
    for name, a, b, c in zip(
        ("out", "dgate", "dup"), (out, dgate, dup), eager(dtype), eager(torch.float64), strict=True
    ):
        assert_within_budget(name, a, b, c)


@pytest.mark.parametrize("N, D, E", [(130, 70, 20), (70, 64, 64), (5, 33, 160), (300, 40, 8), (0, 16, 4)])
def test_router_logits_and_their_gradients(N, D, E):
    dtype = torch.bfloat16 if GPU else torch.float16  # whose range is enough for these weights
    x, weight, dout = random(N, D + 3, dtype=dtype)[:, :D], random(E, D, seed=1), random(N, E, seed=2)

    def eager(kind):
        leaves = [leaf.detach().to(kind).requires_grad_() for leaf in (x, weight)]
        out = leaves[0] @ leaves[1].T
        return [out.detach(), *torch.autograd.grad(out, leaves, dout.to(kind))]

    got = [
        logit_kernels.router_logits(x, weight), logit_kernels.router_tokens_gradient(dout, weight, x),
        logit_kernels.router_gradient(dout, x),
    ]  # fmt: skip
    assert [y.dtype for y in got] == [torch.float32, dtype, torch.float32]
    same = eager(torch.float32)
    same[1] = same[1].to(dtype)
    for name, a, b, c in zip(("logits", "dx", "dweight"), got, same, eager(torch.float64), strict=True):
        assert_within_budget(name, a, b, c)
    assert torch.equal(logit_kernels.router_gradient(dout, x), got[2])
    if GPU and N:  # a BLAS rounds a row by its place in the matrix
        assert torch.equal(logit_kernels.router_logits(x[N - 1 :], weight)[0], got[0][N - 1])


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="needs a GPU")
@pytest.mark.parametrize("N, D, E", [(16384, 2048, 64), (8192, 7168, 256)])
def test_gpu_router_logits_of_published_widths(N, D, E):
    """Twenty runs are equal, and right everywhere: a copy that overtakes a product would spoil a tile now and then."""
    x, weight = random(N, D, dtype=torch.bfloat16), random(E, D, seed=1, scale=0.02)
    dout = random(N, E, seed=2)
    products = [
        lambda: logit_kernels.router_logits(x, weight), lambda: logit_kernels.router_tokens_gradient(dout, weight, x),
        lambda: logit_kernels.router_gradient(dout, x),
    ]  # fmt: skip
    exact = [x.double() @ weight.double().T, dout.double() @ weight.double(), dout.double().T @ x.double()]
    for product, right, tolerance in zip(products, exact, (2e-6, 4e-3, 2e-6), strict=True):
        first = product()
        assert (first.double() - right).abs().max() < tolerance * right.abs().max()
        assert all(torch.equal(product(), first) for _ in range(19))


def test_a_layer_takes_both(monkeypatch):
    """exact_linear and gated_linear with the kernels, as on a GPU, and without: the same numbers."""
    dtype = torch.bfloat16 if GPU else torch.float16
    x, weight = random(70, 16, dtype=dtype), random(4, 16, seed=1)
    gate, up = random(70, 24, dtype=dtype, seed=2), random(70, 24, dtype=dtype, seed=3)
    projection = torch.nn.Linear(24, 16, bias=False, device=DEVICE, dtype=dtype)
    found = []
    for fused in (False, True):
        monkeypatch.setattr(recompute, "_on_tensor_cores", lambda *tensors, on=fused: on)
        monkeypatch.setattr(recompute, "_fuses_gate", lambda *tensors, on=fused: on)
        leaves = [leaf.detach().requires_grad_() for leaf in (x, weight, gate, up)]
        logits = recompute.exact_linear(*leaves[:2])
        out = recompute.gated_linear(*leaves[2:], projection, F.silu, True)
        (logits.square().sum() + out.float().square().sum()).backward()
        with torch.no_grad():
            assert torch.equal(recompute.exact_linear(*leaves[:2]), logits)
        found.append([logits, out, *(leaf.grad for leaf in leaves), projection.weight.grad.clone()])
        projection.weight.grad = None
    for a, b in zip(*found, strict=True):  # the kernels round once, the eager form after each operation
        torch.testing.assert_close(a, b, rtol=0, atol=2e-2 * a.abs().max().item())
    torch.testing.assert_close(*(results[0] for results in found), rtol=1e-5, atol=1e-5)


EPS = 1e-6


def eager_norm(x, added, weight):
    """What attention.add_and_norm makes of the same."""
    total = x if added is None else x + added
    return total, F.rms_norm(total, weight.shape, weight, EPS)


def fused_norm(x, added, weight):
    return recompute.residual_norm(x, added, weight, EPS)


def norm_case(function, tensors, grads, frozen=()):
    """Both results, and the gradients of x, added and weight, None where there is none."""
    leaves = [None if t is None else t.detach().requires_grad_(i not in frozen) for i, t in enumerate(tensors)]
    out = function(*leaves)
    used = [(o, g.to(o)) for o, g in zip(out, grads, strict=True) if g is not None and o.requires_grad]
    torch.autograd.backward(*zip(*used, strict=True))
    return [*(o.detach() for o in out), *(None if leaf is None else leaf.grad for leaf in leaves)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("with_added", [True, False])
@pytest.mark.parametrize("shape", [(70, 33), (2, 35, 100), (9, 2048), (1, 64), (0, 16), (2, 5000)])
def test_a_sum_and_its_norm_and_their_gradients(shape, with_added, dtype):
    x, added, dtotal, dy = (random(*shape, dtype=dtype, seed=i, scale=2.0) for i in range(4))
    tensors = (x, added if with_added else None, random(shape[-1], dtype=dtype, seed=4))
    for grads in ((dtotal, dy), (None, dy), (dtotal, None)):
        got, again = (norm_case(fused_norm, tensors, grads) for _ in range(2))
        same = norm_case(eager_norm, tensors, grads)
        exact = norm_case(eager_norm, [None if t is None else t.double() for t in tensors], grads)
        for name, a, b, c, d in zip(("sum", "y", "dx", "dadded", "dweight"), got, same, exact, again, strict=True):
            assert (a is None) == (b is None), name
            if a is not None:
                assert_within_budget(name, a, b, c)
                assert torch.equal(a, d), f"{name} differs from run to run"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_norm_is_of_the_sum_as_it_is_stored_which_alone_is_kept(dtype):
    x, added, weight = (random(7, 48, dtype=dtype, seed=i).requires_grad_() for i in range(3))
    weight = weight.detach()[0].requires_grad_()
    total, y = fused_norm(x, added, weight)
    alone, again = fused_norm(total.detach().requires_grad_(), None, weight)
    assert torch.equal(total, x + added) and torch.equal(alone, total) and torch.equal(again, y)
    assert fused_norm(x, None, weight)[0].data_ptr() == x.data_ptr()
    for other in (added, None):
        assert kept_bytes(lambda other=other: fused_norm(x, other, weight), weight) == x.nbytes + 4 * 7


@pytest.mark.parametrize("frozen", [(2,), (0,), (1,), (0, 1), (0, 2), (0, 1, 2)], ids=str)
def test_norms_of_what_is_frozen(frozen):
    """No gradient for it, none of the kernel's time for a weight's, and right ones for the others."""
    tensors, grads = [random(6, 24, seed=i) for i in range(2)] + [random(24, seed=2)], [random(6, 24, seed=3)] * 2
    if len(frozen) == 3:
        assert not any(o.requires_grad for o in fused_norm(*tensors))
        return
    got, expected = norm_case(fused_norm, tensors, grads, frozen), norm_case(eager_norm, tensors, grads, frozen)
    assert [g is None for g in got] == [i - 2 in frozen for i in range(5)]
    torch.testing.assert_close(got, expected)
    parts = norm_kernels.norm_gradient(*grads, tensors[0], tensors[2], random(6), False)[1]
    assert not parts.numel()


def test_gradients_that_are_views_of_one_number():
    """expand()-ed ones, as of .sum(), and strided ones."""
    tensors = [random(5, 24, seed=i) for i in range(2)] + [random(24, seed=2)]
    strided = random(24, 5, seed=3).T
    for grads in ((torch.ones((), device=DEVICE).expand(5, 24), strided), (strided, random(5, 1).expand(5, 24))):
        torch.testing.assert_close(norm_case(fused_norm, tensors, grads), norm_case(eager_norm, tensors, grads))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(5, 7), (3, 4096), (0, 4)])
def test_three_gradients_are_summed_at_once(shape, dtype, monkeypatch):
    monkeypatch.setattr(recompute, "_fuses_sum", lambda x: x.requires_grad)
    x, *grads = (random(*shape, dtype=dtype, seed=i) for i in range(4))
    exact, same = sum(g.double() for g in grads), grads[0] + grads[1] + grads[2]
    strided = [grads[0].T.contiguous().T, *grads[1:]]
    for given, right in ((grads, exact), (strided, exact), (grads[:2], exact - grads[2].double())):
        leaf = x.detach().requires_grad_()
        aliases = recompute.spread(leaf)
        assert all(torch.equal(alias, x) and alias.data_ptr() == x.data_ptr() for alias in aliases)
        torch.autograd.backward(aliases[: len(given)], given)
        assert_within_budget("dx", leaf.grad, same, right)
    assert all(alias is x for alias in recompute.spread(x))


def fuse_the_residual_stream(monkeypatch, on: bool) -> list:
    """Take the kernels on any device, or on none; lists the calls of theirs."""
    calls = []
    for name in ("add_norm", "norm_gradient", "sum_of_three"):
        real = getattr(norm_kernels, name)
        monkeypatch.setattr(recompute, name, lambda *a, real=real, name=name: calls.append(name) or real(*a))
    monkeypatch.setattr(attention, "fuses_norm", lambda *tensors: on)
    monkeypatch.setattr(recompute, "_fuses_sum", lambda x: on and x.requires_grad)
    return calls


@pytest.mark.parametrize("frozen", ["", "layernorm.weight", "embed_tokens.weight"])
@pytest.mark.parametrize("checkpointing", [None, True, False], ids=["all kept", "reentrant", "checkpointed"])
def test_training_with_a_fused_residual_stream_is_training(checkpointing, frozen, monkeypatch):
    """Loss and all gradients of three layers and one of prediction, with the kernels and without; fewer bytes kept."""
    config = make_config(num_nextn_predict_layers=1, mtp_loss_coef=0.3, experts_implementation="eager")
    model = LamoeForCausalLM(config).to(DEVICE).train()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not frozen or not name.endswith(frozen))
    if checkpointing is not None:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
        model.enable_input_require_grads()
    ids = random_ids(2, 9, vocab_size=64).to(DEVICE)
    run = lambda: model(ids, labels=ids, use_cache=False).loss  # noqa: E731
    found, kept = [], []
    for fused in (False, True):
        calls = fuse_the_residual_stream(monkeypatch, fused)
        model.zero_grad()
        loss = run()
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
        again = checkpointing is False  # the reentrant kind's first forward knows of no gradient
        expected = {"add_norm": 16 if again else 8, "norm_gradient": 8, "sum_of_three": 3}
        assert {name: calls.count(name) for name in expected} == (expected if fused else dict.fromkeys(expected, 0))
        kept.append(kept_bytes(run, *model.parameters()))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-4 * a.abs().max().item())
    assert kept[1] <= kept[0]


@pytest.mark.parametrize("change", ["", "hook", "backward hook", "subclass", "replaced forward", "no_grad"])
def test_norms_that_are_more_than_their_weight_are_called(change, monkeypatch):
    calls = fuse_the_residual_stream(monkeypatch, True)
    norm, x, called = attention.LamoeRMSNorm(16).to(DEVICE), random(3, 16).requires_grad_(), []
    if change == "hook":
        norm.register_forward_hook(lambda *_: called.append(1))
    elif change == "backward hook":
        norm.register_full_backward_hook(lambda *_: called.append(1))
    elif change == "subclass":
        norm.__class__ = type("Own", (attention.LamoeRMSNorm,), {})
    elif change == "replaced forward":
        norm.forward = lambda x: called.append(1) or type(norm).forward(norm, x)
    with torch.set_grad_enabled(change != "no_grad"):
        total, y = attention.add_and_norm(norm, x, x)
    torch.testing.assert_close((total, y), eager_norm(x, x, norm.weight))
    assert ("ResidualNorm" in str(y.grad_fn)) == bool(calls) == (not change)
    if y.requires_grad:
        y.sum().backward()
    assert len(called) == ("hook" in change or "replaced" in change)


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="needs a GPU")
def test_gpu_norms_that_are_fused():
    x, weight = random(3, 32, dtype=torch.bfloat16), random(32, dtype=torch.bfloat16)
    assert recompute.fuses_norm(x, None, weight) and recompute.fuses_norm(x, x, weight)
    wide, narrow = random(1, 8200), random(3, 16)
    for refused in (
        (x, None, weight.float()), (x, x.float(), weight), (x.double(), None, weight.double()), (x, x[:1], weight),
        (x.cpu(), None, weight), (x[:, ::2], None, weight[:16]), (wide, None, wide[0]),
        (narrow, random(16, 3).T, narrow[0]),
    ):  # fmt: skip
        assert not recompute.fuses_norm(*refused)


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="needs a GPU")
@pytest.mark.parametrize("N, D", [(16384, 2048), (4096, 7168)])
def test_gpu_norms_of_published_widths(N, D):
    """Ten runs are equal, and within the budget."""
    x, added, *grads = (random(N, D, dtype=torch.bfloat16, seed=i) for i in range(4))
    tensors = (x, added, random(D, dtype=torch.bfloat16, seed=4))
    got, same = norm_case(fused_norm, tensors, grads), norm_case(eager_norm, tensors, grads)
    exact = norm_case(eager_norm, [t.double() for t in tensors], grads)
    for name, a, b, c in zip(("sum", "y", "dx", "dadded", "dweight"), got, same, exact, strict=True):
        assert_within_budget(name, a, b, c)
    for _ in range(9):
        assert all(map(torch.equal, norm_case(fused_norm, tensors, grads), got))


def test_operators():
    half = torch.bfloat16 if GPU else torch.float16
    x, weight = random(3, 8, dtype=half), random(4, 8)
    torch.library.opcheck(gate_kernels.gated.registered, (x, x))
    torch.library.opcheck(gate_kernels.gated_gradient.registered, (x, x, x))
    torch.library.opcheck(logit_kernels.router_logits.registered, (x, weight))
    torch.library.opcheck(logit_kernels.router_tokens_gradient.registered, (random(3, 4), weight, x))
    torch.library.opcheck(logit_kernels.router_gradient.registered, (random(3, 4), x))
    for added in (x, None):
        torch.library.opcheck(norm_kernels.add_norm.registered, (x, added, x[0], EPS))
        torch.library.opcheck(norm_kernels.norm_gradient.registered, (x, added, x, x[0], random(3), added is None))
    torch.library.opcheck(norm_kernels.sum_of_three.registered, (x, x, x))
    logits, targets = random(2, 9), torch.tensor([3, -100], device=DEVICE)
    torch.library.opcheck(loss_kernels.losses.registered, (logits, targets, -100))
    scale = torch.ones((), device=DEVICE)
    torch.library.opcheck(loss_kernels.losses_gradient.registered, (scale, logits, targets, random(2), -100))
    q, kv, k, angles = random(1, 2, 3, 6), random(1, 2, 3, 7), random(1, 2, 2), random(1, 2, 1)
    torch.library.opcheck(heads_kernels._heads.registered, (q, kv, k, angles, angles, True))
    torch.library.opcheck(
        heads_kernels._heads_gradient.registered, (q, q, random(1, 2, 3, 3), angles, angles, 2, True)
    )


@pytest.mark.parametrize("family", ["v2-lite", "v3", "glm-4.7-flash"])
def test_training_with_fused_heads_and_loss_is_training(family, tmp_path, monkeypatch):
    """Loss and all gradients of a model, with the kernels and without."""
    _, model = lamoe_model(family, tmp_path, torch.float32)
    model.to(DEVICE).train()
    ids = random_ids(2, 9).to(DEVICE)
    found, calls = [], []
    real = attention.LamoeAttention._expanded_for_training
    monkeypatch.setattr(
        attention.LamoeAttention, "_expanded_for_training", lambda self, *a: calls.append(self) or real(self, *a)
    )
    for fused in (False, True):
        monkeypatch.setattr(attention.LamoeAttention, "_trains_fused", lambda self, queries, form, on=fused: on)
        model.zero_grad()
        loss = model(ids, labels=ids, use_cache=False).loss
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
    assert len(calls) == model.config.num_hidden_layers
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="needs a GPU")
def test_held_logits_go_through_the_kernel(monkeypatch):
    logits = random(2, 5, 300, dtype=torch.bfloat16).requires_grad_()
    labels, calls = torch.arange(10, device=DEVICE).view(2, 5), []
    real = loss_kernels.losses
    monkeypatch.setattr(token_loss, "losses", lambda *a: calls.append(1) or real(*a))
    logits_loss(logits, labels).backward()
    assert calls and logits.grad.isfinite().all()
