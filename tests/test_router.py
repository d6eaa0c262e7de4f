"""The fused router against the eager one: the same experts in the same order, weights, gradients, refusals."""

import json
import sys
from types import SimpleNamespace

import pytest
import torch

from lamoe import LamoeConfig, LamoeForCausalLM
from lamoe import moe as eager
from lamoe.moe import LamoeTopkRouter, route_eager
from tests.test_moe import D, make_config
from tests.tiny import random_ids

kernels_router = pytest.importorskip("lamoe.kernels_router")
route = kernels_router.route

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # on CPU Triton interprets
METHODS = [
    ("greedy", "softmax"), ("greedy", "sigmoid"), ("group_limited_greedy", "softmax"),
    ("group_limited_greedy", "sigmoid"), ("noaux_tc", "sigmoid"),
]  # fmt: skip
GROUPS = {8: 4, 20: 5, 64: 8, 160: 8, 256: 8, 512: 1}


def make_fields(E: int, K: int, method: str, scoring: str, norm: bool = True, scale: float = 2.5) -> dict:
    groups = GROUPS[E]
    return {
        "num_experts_per_tok": K, "topk_method": method, "scoring_func": scoring, "n_group": groups,
        "topk_group": min(max(2, -(-K * groups // E)), groups), "norm_topk_prob": norm, "routed_scaling_factor": scale,
    }  # fmt: skip


def make_logits(kind: str, N: int, E: int, method: str, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Logits [N, E], and a bias for noaux_tc, of few different values if `kind` says so."""
    generator = torch.Generator(DEVICE).manual_seed(seed)
    logits = torch.randn(N, E, generator=generator, device=DEVICE) * 2
    bias = torch.randn(E, generator=generator, device=DEVICE) / 2 if method == "noaux_tc" else None
    if kind != "random":
        logits = logits.round()
        bias = None if bias is None else bias.round()
    if kind == "nonfinite":
        logits[0] = float("nan")
        logits[1, ::3] = float("nan")
        logits[2, 1::2] = float("-inf")
        logits[3] = float("-inf")
        logits[4, -1] = float("inf")
        logits[5, ::2] = -0.0
        logits[5, 1::2] = 0.0
        if DEVICE == "cpu":  # torch.sort on CUDA counts a NaN with a sign as the least, not the greatest
            logits[6, ::3] = -float("nan")
        logits[7, :-1] = float("-inf")
    return logits, bias


def assert_equal_to_eager(logits, bias, fields):
    expected_weights, expected = route_eager(logits, bias, SimpleNamespace(**fields))
    weights, experts = route(logits, bias, **fields)
    assert torch.equal(experts, expected)
    assert weights.dtype == torch.float32 and experts.dtype == torch.int64
    torch.testing.assert_close(weights, expected_weights, rtol=2e-6, atol=1e-12, equal_nan=True)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # NumPy's, when the interpreter meets inf - inf
@pytest.mark.filterwarnings("ignore:All-NaN slice:RuntimeWarning")
@pytest.mark.parametrize("method, scoring", METHODS)
@pytest.mark.parametrize("E", [8, 20, 64, 160, 256])
@pytest.mark.parametrize("kind", ["random", "ties", "nonfinite"])
def test_experts_are_those_of_eager_in_its_order(kind, E, method, scoring):
    for K in (1, 6, 8):
        logits, bias = make_logits(kind, 9, E, method, seed=K)
        assert_equal_to_eager(logits, bias, make_fields(E, K, method, scoring))


@pytest.mark.parametrize("method, scoring", METHODS)
def test_of_equals_the_lowest_id_and_the_lowest_group_win(method, scoring):
    fields = make_fields(20, 6, method, scoring)  # groups of four, two of them open
    logits = torch.zeros(3, 20, device=DEVICE)
    logits[1, 17] = 1
    logits[2, [2, 7, 9]] = 1
    bias = torch.zeros(20, device=DEVICE) if method == "noaux_tc" else None
    expected = [
        [0, 1, 2, 3, 4, 5],
        [17, 0, 1, 2, 3, 4] if method == "greedy" else [17, 0, 1, 2, 3, 16],
        [2, 7, 9, 0, 1, 3] if method == "greedy" else [2, 7, 0, 1, 3, 4],
    ]
    assert route_eager(logits, bias, SimpleNamespace(**fields))[1].tolist() == expected
    assert route(logits, bias, **fields)[1].tolist() == expected


def test_plain_softmax_chooses_by_the_logits():
    logits = torch.tensor([[0.0, -200.0, -190.0, -180.0]], device=DEVICE)  # all but one score underflow
    fields = {**make_fields(8, 3, "greedy", "softmax"), "n_group": 1, "topk_group": 1}
    assert route_eager(logits, None, SimpleNamespace(**fields))[1].tolist() == [[0, 3, 2]]
    assert route(logits, None, **fields)[1].tolist() == [[0, 3, 2]]


@pytest.mark.parametrize("N, E, K", [(0, 64, 6), (1, 64, 6), (1, 8, 8), (3, 512, 16), (7, 64, 17), (2, 20, 20)])
def test_odd_sizes(N, E, K):
    logits, bias = make_logits("ties", N, E, "noaux_tc")
    logits.requires_grad_(True)
    fields = make_fields(E, K, "noaux_tc", "sigmoid")
    assert_equal_to_eager(logits, bias, fields)
    weights, experts = route(logits, bias, **fields)
    assert weights.shape == experts.shape == (N, K)
    assert torch.autograd.grad(weights.sum(), logits)[0].shape == (N, E)


def gradients(route_it, logits, bias, dweights):
    logits = logits.detach().requires_grad_(True)
    weights, experts = route_it(logits, bias)
    return weights, torch.autograd.grad(weights, logits, dweights.to(weights.dtype))[0], experts


@pytest.mark.parametrize("norm, scale", [(False, 1), (True, 2.5), (False, 16.0)])
@pytest.mark.parametrize("method, scoring", METHODS)
@pytest.mark.parametrize("E, K", [(8, 1), (20, 6), (160, 8)])
def test_weights_and_gradients_are_as_near_to_float64_as_eager(E, K, method, scoring, norm, scale):
    fields = make_fields(E, K, method, scoring, norm, scale)
    logits, bias = make_logits("random", 9, E, method)
    dweights = torch.randn(9, K, device=DEVICE)

    def plain(logits, bias):
        return route_eager(logits, bias, SimpleNamespace(**fields))

    *exact, experts = gradients(plain, logits.double(), None if bias is None else bias.double(), dweights)
    *same_dtype, _ = gradients(plain, logits, bias, dweights)
    *got, chosen = gradients(lambda logits, bias: route(logits, bias, **fields), logits, bias, dweights)
    assert torch.equal(chosen, experts)
    for ours, eagers, reference in zip(got, same_dtype, exact, strict=True):
        # of K = 1 normalised, the exact gradient is zero, a difference of terms as large as dweights
        ulp = torch.finfo(torch.float32).eps * torch.maximum(reference.abs().max(), dweights.abs().max())
        assert (ours - reference).abs().max() <= 2 * (eagers - reference).abs().max() + 2 * ulp


def test_a_token_does_not_depend_on_its_batch_and_two_runs_are_equal():
    logits, bias = make_logits("random", 11, 256, "noaux_tc")
    fields = make_fields(256, 8, "noaux_tc", "sigmoid")
    dweights = torch.randn(11, 8, device=DEVICE)

    def run(rows):
        return gradients(lambda logits, bias: route(logits, bias, **fields), logits[rows], bias, dweights[rows])

    whole = run(slice(None))
    for rows in (slice(0, 11), slice(4, 5), slice(3, 10)):
        for part, expected in zip(run(rows), whole, strict=True):
            assert torch.equal(part, expected[rows])


def test_strided_logits_and_gradients():
    fields = make_fields(20, 6, "group_limited_greedy", "softmax")
    logits = make_logits("random", 20, 12, "greedy")[0].T
    dweights = torch.randn(6, 12, device=DEVICE).T
    got = gradients(lambda logits, bias: route(logits, bias, **fields), logits, None, dweights)
    expected = gradients(lambda x, b: route_eager(x, b, SimpleNamespace(**fields)), logits, None, dweights)
    for ours, eagers in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, eagers, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method, scoring", [("noaux_tc", "sigmoid"), ("greedy", "softmax")])
def test_operators_are_declared_as_they_are(method, scoring):
    logits, bias = make_logits("random", 5, 20, method)
    softmax = scoring == "softmax"
    arguments = (logits.requires_grad_(True), bias, 6, not softmax, 5, 2, softmax, True, 2.5)
    torch.library.opcheck(kernels_router._route.registered, arguments)
    experts = kernels_router._route(*arguments)[1]
    dweights = torch.randn(5, 6, device=DEVICE)
    torch.library.opcheck(
        kernels_router._route_backward.registered, (dweights, logits.detach(), experts, softmax, True, 2.5)
    )


def make_router(**changes) -> LamoeTopkRouter:
    torch.manual_seed(0)
    router = LamoeTopkRouter(make_config(**changes), 1).to(DEVICE)
    torch.nn.init.normal_(router.weight)
    return router


def test_router_compiles_as_one_graph():
    router = make_router(router_implementation="triton", n_group=3, topk_group=2)
    torch._dynamo.reset()
    compiled = torch.compile(router, backend="aot_eager", fullgraph=True)
    for N in (5, 8, 13):
        x = torch.randn(N, D, device=DEVICE)
        expected, got = router(x), compiled(x)
        for one, other in zip(got, expected, strict=True):
            torch.testing.assert_close(one, other)
        grads = [torch.autograd.grad(out[1].square().sum(), router.weight)[0] for out in (got, expected)]
        torch.testing.assert_close(*grads)


def test_a_model_trains_alike_with_both():
    results = []
    for implementation in ("eager", "triton"):
        torch.manual_seed(0)
        model = LamoeForCausalLM(make_config(router_implementation=implementation, aux_loss_alpha=0.01)).to(DEVICE)
        ids = random_ids(2, 9, vocab_size=64).to(DEVICE)
        loss = model.train()(ids, labels=ids).loss
        loss.backward()
        router = model.routers[0]
        results.append((loss.detach(), router.tokens_per_expert, router.weight.grad))
    (loss, counts, grad), (fused_loss, fused_counts, fused_grad) = results
    torch.testing.assert_close(fused_loss, loss)
    assert torch.equal(fused_counts, counts) and counts.sum() == 18 * model.config.num_experts_per_tok
    torch.testing.assert_close(fused_grad, grad)


@pytest.fixture
def calls(monkeypatch):
    """The calls of the kernel's public function."""
    found = []

    def spy(*args, **kwargs):
        found.append(args)
        return route(*args, **kwargs)

    monkeypatch.setattr(kernels_router, "route", spy)
    return found


@pytest.mark.parametrize("implementation", ["auto", "eager", "triton"])
def test_the_field_chooses_who_routes(calls, implementation):
    router = make_router(router_implementation=implementation)
    router(torch.randn(4, D, device=DEVICE))
    assert bool(calls) == (implementation == "triton" or (implementation == "auto" and DEVICE == "cuda"))


def refused(logits, bias, fields) -> str:
    with pytest.raises(ValueError) as caught:
        eager.route(logits, bias, SimpleNamespace(**fields, router_implementation="triton"))
    with pytest.raises(ValueError) as directly:
        route(logits, bias, **fields)
    assert str(caught.value) == str(directly.value)
    return str(caught.value)


def test_refused_with_the_reason(monkeypatch):
    fields = make_fields(20, 6, "noaux_tc", "sigmoid")
    logits, bias = make_logits("random", 3, 20, "noaux_tc")
    start, end = "The fused router does not run here: ", "; use router_implementation='eager'."
    assert refused(logits.double(), bias, fields) == (
        f"{start}the logits are torch.float64, and the kernel computes in torch.float32{end}"
    )
    by_softmax = (
        f"{start}scoring_func='softmax' with topk_method='noaux_tc' and a correction bias chooses by the rounding of "
        f"a sum, which only one implementation can have{end}"
    )
    assert refused(logits, bias, {**fields, "scoring_func": "softmax"}) == by_softmax
    assert refused(logits, None, {**fields, "scoring_func": "softmax"}) == by_softmax
    greedy = {**fields, "scoring_func": "softmax", "topk_method": "greedy"}
    assert refused(logits, bias, greedy) == by_softmax.replace("noaux_tc", "greedy")
    many = {**fields, "n_group": 3, "topk_group": 1}
    assert refused(torch.zeros(1, 3 * 2049, device=DEVICE), None, many) == (
        f"{start}3 x 2049 experts pad to 4 x 4096, more than 8192{end}"
    )
    monkeypatch.setattr(kernels_router, "_INTERPRETED", False)
    assert refused(logits.cpu(), None, fields) == (
        f"{start}the logits are on 'cpu', and Triton runs on CUDA and ROCm devices{end}"
    )


def test_refused_without_triton(monkeypatch):
    monkeypatch.delitem(sys.modules, "lamoe.kernels_router")
    monkeypatch.setitem(sys.modules, "triton", None)
    logits, _ = make_logits("random", 3, 20, "greedy")
    fields = make_fields(20, 6, "greedy", "softmax")
    with pytest.raises(ValueError) as caught:
        eager.route(logits, None, SimpleNamespace(**fields, router_implementation="triton"))
    assert str(caught.value) == (
        "The fused router needs Triton: pip install triton, or router_implementation='eager'."
    )
    weights, _ = eager.route(logits, None, SimpleNamespace(**fields, router_implementation="auto"))
    assert torch.equal(weights, route_eager(logits, None, SimpleNamespace(**fields))[0])


def test_configuration_of_the_choice(tmp_path):
    with pytest.raises(ValueError) as caught:
        make_config(router_implementation="cuda")
    assert str(caught.value) == "router_implementation='cuda' is not one of 'auto', 'eager', 'triton'."
    make_config().save_pretrained(tmp_path)
    assert "router_implementation" not in json.loads((tmp_path / "config.json").read_text())
    make_config(router_implementation="eager").save_pretrained(tmp_path)
    assert LamoeConfig.from_pretrained(tmp_path).router_implementation == "eager"
    assert make_config().router_implementation == "auto"


def test_policy_zero_routes_a_bad_token_as_zeros():
    router = make_router(router_implementation="triton", router_nonfinite="zero")
    x = torch.randn(4, D, device=DEVICE)
    x[2, 3] = float("nan")
    logits, weights, experts = router(x)
    assert logits.isfinite().all() and weights.isfinite().all()
    assert experts.min() >= 0 and experts.max() < logits.shape[1]
    assert experts[2].tolist() == [0, 1, 2]


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
@pytest.mark.parametrize("method, scoring", METHODS)
@pytest.mark.parametrize("E", [64, 160, 256])
@pytest.mark.parametrize("kind", ["random", "ties", "nonfinite"])
def test_millions_of_tokens(kind, E, method, scoring):
    logits, bias = make_logits(kind, 2**21, E, method)
    if kind == "random":
        logits[::2] *= 20  # where sigmoid saturates and becomes denormal
    assert_equal_to_eager(logits, bias, make_fields(E, 8, method, scoring))
    if kind == "nonfinite":
        return
    fields = make_fields(E, 8, method, scoring)
    dweights = torch.randn(len(logits), 8, device=DEVICE)
    _, got, _ = gradients(lambda logits, bias: route(logits, bias, **fields), logits, bias, dweights)
    _, expected, _ = gradients(lambda x, b: route_eager(x, b, SimpleNamespace(**fields)), logits, bias, dweights)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
def test_more_logits_than_an_int32_can_count():
    N, fields = 2**23 + 77, make_fields(256, 8, "noaux_tc", "sigmoid")
    logits = torch.empty(N, 256, device=DEVICE)
    logits[-500:], bias = make_logits("random", 500, 256, "noaux_tc")
    logits[:-500] = 0
    logits.requires_grad_(True)
    weights, experts = route(logits, bias, **fields)
    last = logits.detach()[-500:].requires_grad_(True)
    expected_weights, expected = route_eager(last, bias, SimpleNamespace(**fields))
    assert torch.equal(experts[-500:], expected)
    (dlogits,) = torch.autograd.grad(weights.square().sum(), logits)
    (dlast,) = torch.autograd.grad(expected_weights.square().sum(), last)
    torch.testing.assert_close(dlogits[-500:], dlast, rtol=1e-4, atol=1e-6)
