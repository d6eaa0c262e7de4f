"""The fused experts against float64: output and gradients, the ways for few rows, and what surrounds the operators."""

import itertools
import re

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from lamoe import kernels_gemm, kernels_moe, kernels_tiles
from lamoe.kernels_moe import fused_experts
from lamoe.kernels_plan import SMALLEST_TILE, make_plan, plan_size, unpack
from tests.kernels import (
    ACTIVATIONS,
    INPUTS,
    assert_equal,
    assert_right,
    assert_within_budget,
    captured,
    eager_experts,
    kept_bytes,
    make_case,
    operator_calls,
    part_of,
    poison,
    results,
)

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
RUNS = 10 if GPU else 2
ROWS_BEHIND = kernels_gemm.PAD
SHAPES = [  # N, D, F, E, K
    (17, 24, 20, 5, 2),
    (0, 16, 8, 4, 2),
    (1, 20, 12, 3, 1),
    (6, 36, 12, 7, 6),
    (5, 16, 8, 9, 8),
    (6, 16, 8, 4, 4),
]


@pytest.fixture(autouse=True)
def short_padding(monkeypatch):
    """The interpreter reads no row behind an expert's last, and its time goes into the number of programs."""
    if not GPU:
        monkeypatch.setattr(kernels_gemm, "PAD", 4)
        monkeypatch.setattr(kernels_moe, "PAD", 4)


@pytest.mark.parametrize("sentinels", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_output_and_gradients(shape, sentinels):
    case = make_case(*shape, device=DEVICE, shared=not sentinels, sentinels=sentinels)
    got = assert_right(case)
    inference = assert_right(case, ())
    torch.testing.assert_close(inference["out"], got["out"])


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation(activation):
    case = make_case(7, 16, 12, 3, 2, device=DEVICE, seed=2)
    assert tuple(ACTIVATIONS) == kernels_moe.ACTIVATIONS
    assert_right(case, activation=activation)
    assert_right(part_of(case, slice(0, 2)), (), activation)


@pytest.mark.parametrize("chosen", [[2], [4, 1]], ids=["one expert has all", "most experts are empty"])
def test_lopsided_routing(chosen):
    case = make_case(21, 16, 8, 6, len(chosen), device=DEVICE, seed=3)
    case = case._replace(index=torch.tensor(chosen, device=DEVICE).expand(21, -1))
    got = assert_right(case)
    empty = [e for e in range(6) if e not in chosen]
    assert not got["d gate_up"][empty].any() and not got["d down"][empty].any()


def test_float16():
    case = make_case(9, 24, 16, 5, 2, dtype=torch.float16, device=DEVICE, sentinels=True, seed=4)
    assert_right(case)
    assert_right(case, ())


def test_views_that_are_not_contiguous():
    case = make_case(8, 24, 12, 5, 3, device=DEVICE, seed=5)
    expected = results(fused_experts, case)
    views = [torch.stack([t, t], dim=-1)[..., 0] for t in (case.x, case.index, case.weights, case.shared, case.dy)]
    x, index, weights, shared, dy = views
    assert not any(view.is_contiguous() for view in views)
    turned = case._replace(x=x, index=index, weights=weights, shared=shared, dy=dy)
    assert_equal(results(fused_experts, turned), expected)
    assert_equal(results(fused_experts, case._replace(index=case.index.int()), ()), results(fused_experts, case, ()))


def test_weights_inside_a_flat_buffer():
    case = make_case(8, 24, 12, 5, 3, device=DEVICE, seed=6)
    flat = [torch.cat([w.new_zeros(1), w.flatten()])[1:].view_as(w) for w in (case.gate_up, case.down)]
    assert all(w.is_contiguous() and w.data_ptr() % 16 for w in flat)
    shifted = case._replace(gate_up=flat[0], down=flat[1])
    assert_equal(results(fused_experts, shifted), results(fused_experts, case))


def test_gradients_of_some_inputs_are_those_of_all():
    case = make_case(3, 16, 8, 3, 2, device=DEVICE, seed=7, sentinels=True)
    expected = results(fused_experts, case)
    for needs in [("shared",), *(some for n in range(1, 5) for some in itertools.combinations(INPUTS[:4], n))]:
        got = results(fused_experts, case, needs)
        assert got.keys() == {"out", *(f"d {name}" for name in needs)}
        assert_equal(got, {name: expected[name] for name in got})


@pytest.mark.parametrize("recompute", [False, True])
def test_sentinels_add_nothing_and_leak_nothing(monkeypatch, recompute):
    case = make_case(11, 16, 8, 4, 3, device=DEVICE, seed=8, sentinels=True)
    case.index[3] = torch.tensor([4, 7, 1000])
    case.index[10] = torch.tensor([-1, 4, -1000])
    gone = (case.index < 0) | (case.index >= 4)
    assert gone[:3].any()
    dirty = case._replace(x=case.x.clone(), weights=case.weights.masked_fill(gone, float("nan")))
    dirty.x[gone.all(dim=1)] = float("nan")
    expected = [results(fused_experts, case, needs, recompute=recompute) for needs in (INPUTS, ())]
    poison(monkeypatch)
    for needs, clean in zip((INPUTS, ()), expected, strict=True):
        got = results(fused_experts, dirty, needs, recompute=recompute)
        assert_equal(got, clean)
        assert torch.equal(got["out"][gone.all(dim=1)], case.shared[gone.all(dim=1)])
    assert not expected[0]["d x"][gone.all(dim=1)].any() and not expected[0]["d weights"][gone].any()


@pytest.mark.parametrize("N", [2, 5, 40])
def test_nothing_but_sentinels(monkeypatch, N):
    case = make_case(N, 16, 8, 4, 2, device=DEVICE)
    case = case._replace(index=case.index + 4, x=case.x * float("nan"), weights=case.weights * float("nan"))
    poison(monkeypatch)
    for options in ({}, {"recompute": True}):
        got = results(fused_experts, case, **options)
        assert torch.equal(got.pop("out"), case.shared) and torch.equal(got.pop("d shared"), case.dy)
        assert not any(gradient.any() for gradient in got.values())
    for options in ({}, {"batch_invariant": True}):
        assert torch.equal(results(fused_experts, case, (), **options)["out"], case.shared)


WAYS = {  # of inference in the interpreter, by function: the most tokens, of K = 2 experts each, and E
    "vector_experts": (2, 16),
    "swapped_experts": (8, 4),
    "gated_rows": (9, 4),
}


@pytest.mark.skipif(GPU, reason="counts by the interpreter's table")
@pytest.mark.parametrize("way", WAYS)
def test_each_way_is_right_in_poisoned_memory(monkeypatch, way):
    N, E = WAYS[way]
    taken = []
    for name in WAYS:
        function = getattr(kernels_moe, name)
        monkeypatch.setattr(kernels_moe, name, lambda *a, n=name, f=function, **k: taken.append(n) or f(*a, **k))
    poison(monkeypatch)
    for seed, shared in enumerate((True, False)):
        case = make_case(N, 40, 20, E, 2, seed=seed, sentinels=True, shared=shared)
        case.index[0, 0], case.index[1, 1] = -1, E
        assert_right(case, ())
    assert taken == [way] * 2
    if way != "gated_rows":  # the next token is one too many
        taken.clear()
        fused_experts(*make_case(N + 1, 16, 8, E, 2)[:5])
        assert taken and way not in taken


@pytest.mark.skipif(GPU, reason="tiles of the interpreter")
@pytest.mark.parametrize("widths", [(40, 20), (32, 48)], ids=["between steps", "whole steps"])
def test_wide_tiles_of_tokens_load_no_absent_ones(monkeypatch, widths):
    """Of fewer tokens than a tile has, of more, and of nobody's."""
    poison(monkeypatch)
    tiles = kernels_tiles.SwappedTile(16, 32, 16, 1, 2), kernels_tiles.SwappedTile(32, 32, 16, 1, 2)
    monkeypatch.setattr(kernels_moe, "few_rows", lambda *arguments: tiles)
    for seed, N in enumerate((5, 70)):
        assert_right(make_case(N, *widths, 3, 2, seed=seed, sentinels=True), ())


def test_poisoned_memory_changes_nothing(monkeypatch):
    case = make_case(9, 20, 12, 4, 2, device=DEVICE, seed=10, sentinels=True)
    modes = [{}, {"recompute": True}, {"batch_invariant": True}]
    expected = [results(fused_experts, case, **options) for options in modes]
    poison(monkeypatch)
    for options, clean in zip(modes, expected, strict=True):
        assert_equal(results(fused_experts, case, **options), clean)
    assert_equal(expected[1], expected[0])


@pytest.mark.parametrize("needs", [("x",), ("gate_up",), ("down",)], ids="".join)
def test_poisoned_memory_changes_no_single_gradient(monkeypatch, needs):
    case = make_case(5, 20, 12, 4, 2, device=DEVICE, seed=11, sentinels=True)
    expected = results(fused_experts, case, needs)
    poison(monkeypatch)
    assert_equal(results(fused_experts, case, needs), expected)


def test_what_a_weight_gradient_may_read_behind_the_last_row_is_zero(monkeypatch):
    index = torch.full((12, 1), 9, device=DEVICE)
    index[:3] = 1
    plan = unpack(make_plan(index, 2, 16, kept=True), 12, 2)
    monkeypatch.setattr(kernels_gemm, "PAD", 5)
    poison(monkeypatch)
    da, h, weights = (torch.ones(12, width, device=DEVICE) for width in (4, 8, 1))
    dh, dw = kernels_gemm.act_gradient(da, h, weights, plan, 2, "relu", True)
    assert (dh[:3] == 1).all() and not dh[3:8].any() and dh[8:].isnan().all()
    assert (da[:3] == 1).all() and torch.equal(dw, (index == 1) * 4.0)


def test_runs_are_equal_bit_for_bit():
    case = make_case(9, 20, 12, 4, 2, device=DEVICE, seed=12)
    first, few = results(fused_experts, case), results(fused_experts, case, ())
    for _ in range(RUNS - 1):
        assert_equal(results(fused_experts, case), first)
        assert_equal(results(fused_experts, case, ()), few)


def test_batch_invariant_rows_do_not_depend_on_their_batch(monkeypatch):
    if not GPU:  # BLAS rounds a row by its place in the matrix
        monkeypatch.setattr("numpy.matmul", lambda a, b, dtype=None: (a[:, :, None] * b[None]).sum(1, dtype=dtype))
    case = make_case(23, 40, 12, 9, 2, device=DEVICE, seed=13, sentinels=True)
    for needs in ((), INPUTS[:2]):
        whole = results(fused_experts, case, needs, batch_invariant=True)
        for rows in (slice(0, 1), slice(22, 23), slice(3, 9)):
            got = results(fused_experts, part_of(case, rows), needs, batch_invariant=True)
            assert_equal(got, {name: whole[name][rows] for name in got})


def test_accumulate_adds_in_place(monkeypatch):
    case = make_case(9, 16, 8, 4, 2, device=DEVICE, seed=14)
    written, gradient = [], kernels_moe.weight_gradient

    def observed(a, b, plan, E, into, tile):
        written.append(None if into is None else into.data_ptr())
        return gradient(a, b, plan, E, into, tile)

    monkeypatch.setattr(kernels_moe, "weight_gradient", observed)
    ours, theirs = ([nn.Parameter(w.clone()) for w in (case.gate_up, case.down)] for _ in range(2))
    for weights, accumulate in ((ours, True), (theirs, False)):
        for step in range(2):
            grads = [w.grad for w in weights]
            out = fused_experts(case.x * (step + 1), case.index, case.weights, *weights, accumulate=accumulate)
            out.backward(case.dy)
            if step and accumulate:
                assert all(w.grad is before for w, before in zip(weights, grads, strict=True))
                assert set(written[-2:]) == {grad.data_ptr() for grad in grads}
            else:
                assert written[-2:] == [None, None]
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.grad, other.grad, rtol=0, atol=0)
    ours[0].requires_grad_(False)  # a frozen weight's old gradient is left alone
    kept = ours[0].grad.clone()
    fused_experts(*case[:3], *ours, accumulate=True).backward(case.dy)
    assert torch.equal(ours[0].grad, kept)


def test_half_weights_under_float32_states():
    half = make_case(6, 16, 8, 4, 2, dtype=torch.float16, device=DEVICE, seed=15)
    case = half._replace(x=half.x.float(), shared=half.shared.float(), dy=half.dy.float())
    got, expected = results(fused_experts, case), results(fused_experts, half)
    assert {name: t.dtype for name, t in got.items()} == {
        "out": torch.float32, "d x": torch.float32, "d weights": torch.float32, "d gate_up": torch.float16,
        "d down": torch.float16, "d shared": torch.float32,
    }  # fmt: skip
    assert_equal({name: t.to(expected[name].dtype) for name, t in got.items()}, expected)
    rounded = half._replace(weights=half.weights.half())
    assert results(fused_experts, rounded)["d weights"].dtype == torch.float16


def test_autocast_multiplies_in_its_dtype():
    case = make_case(6, 16, 8, 4, 2, device=DEVICE, seed=16)
    half = case._replace(**{n: getattr(case, n).half() for n in ("x", "gate_up", "down", "shared", "dy")})
    expected = results(fused_experts, half)
    with torch.autocast(DEVICE, torch.float16):
        got = results(fused_experts, case)
    assert all(t.dtype == torch.float32 for t in got.values())
    assert_equal(got, {name: t.float() for name, t in expected.items()})


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_changes_nothing(use_reentrant):
    # of fewer tokens, the first of both forwards, which has no gradients, would take another way
    case = make_case(9, 16, 8, 4, 2, device=DEVICE, seed=17)

    def checkpointed(*arguments, shared):
        run = lambda *a: fused_experts(*a[:-1], shared=a[-1])  # noqa: E731
        return checkpoint(run, *arguments, shared, use_reentrant=use_reentrant)

    def backward(function):
        leaves = [t.detach().clone().requires_grad_() for t in case.inputs]
        out = function(leaves[0], case.index, *leaves[1:4], shared=leaves[4])
        out.backward(case.dy)
        return {"out": out.detach(), **{name: t.grad for name, t in zip(INPUTS, leaves, strict=True)}}

    assert_equal(backward(checkpointed), backward(fused_experts))


def test_compiled_with_changing_numbers_of_tokens():
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(fused_experts, fullgraph=True, backend=counter)
    for N in (5, 7, 3):
        case = make_case(N, 16, 8, 4, 2, device=DEVICE, seed=N)
        assert_equal(results(compiled, case), results(fused_experts, case))
    assert counter.frame_count <= 2  # for the first N, then for any


OPERATORS = {
    "experts": ("inference", "invariant", "gradients", "recompute"),
    "few_experts": ("plain", "residual"),
    "experts_backward": ("all", "none", "recompute"),
    "experts_backward_into": ("both", "one"),
    "plan": ("int64", "int32"),
    "grouped_linear": ("tokens", "gradients", "transposed"),
    "grouped_linear_backward": ("tokens", "rows"),
    "weighted_sum": ("plain", "gradients"),
    "weighted_sum_backward": ("plain",),
}


@pytest.mark.parametrize("name, how", [(name, how) for name, hows in OPERATORS.items() for how in hows])
def test_opcheck(name, how):
    torch.library.opcheck(getattr(kernels_moe, f"_{name}").registered, operator_calls(DEVICE)[f"{name} {how}"])


def test_every_operator_is_checked():
    kind = type(kernels_moe._plan)
    assert {name[1:] for name, value in vars(kernels_moe).items() if isinstance(value, kind)} == OPERATORS.keys()


def test_eager_gradients_do_without_the_dispatcher():
    """Its own gradient of an operator takes the host a quarter of a millisecond longer."""
    case = make_case(3, 16, 8, 4, 2, device=DEVICE)
    out = fused_experts(case.x.requires_grad_(), *case[1:5])
    assert "CustomOpDef" in out.grad_fn.name() and "Generated" not in out.grad_fn.name()
    with torch.no_grad():
        assert fused_experts(*case[:5]).grad_fn is None


def test_the_backward_keeps_x_the_pre_activation_and_the_plan():
    N, D, width, E, K = 12, 128, 64, 4, 2
    case = make_case(N, D, width, E, K, device=DEVICE)
    x, h, plan = 4 * N * D, 4 * N * K * 2 * width, 4 * plan_size(N * K, E)
    assert x + h <= kept_bytes(case) <= 1.05 * (x + h)
    assert kept_bytes(case, recompute=True) <= x + plan


def wrong(**changes):
    case = make_case(3, 16, 8, 4, 2)
    arguments = {
        "hidden_states": case.x, "top_k_index": case.index, "top_k_weights": case.weights,
        "gate_up_proj": case.gate_up, "down_proj": case.down,
    }  # fmt: skip
    return {**arguments, **{name: change(case) for name, change in changes.items()}}


NOT_HERE = "The fused experts do not run here: {}; use experts_implementation='grouped_mm'."


@pytest.mark.parametrize(
    "changes, text",
    [
        (
            {"activation": lambda c: "tanh"},
            "activation='tanh' is not one of silu, gelu, gelu_tanh, relu.",
        ),
        (
            {"hidden_states": lambda c: c.x[:, :12]},
            "hidden_states (3, 12) is not [N, 16], which gate_up_proj asks for.",
        ),
        (
            {"hidden_states": lambda c: c.x[None]},
            "hidden_states (1, 3, 16) is not [N, 16], which gate_up_proj asks for.",
        ),
        (
            {"top_k_index": lambda c: c.index[:, :1]},
            "top_k_index (3, 1) and top_k_weights (3, 2) are not both [3, K].",
        ),
        (
            {"top_k_index": lambda c: c.index[:2], "top_k_weights": lambda c: c.weights[:2]},
            "top_k_index (2, 2) and top_k_weights (2, 2) are not both [3, K].",
        ),
        (
            {"down_proj": lambda c: c.down[:3]},
            "down_proj (3, 16, 8) is not [4, 16, 8], which gate_up_proj asks for.",
        ),
        (
            {"gate_up_proj": lambda c: c.gate_up[:, :15]},
            "down_proj (4, 16, 8) is not [4, 16, 7], which gate_up_proj asks for.",
        ),
        (
            {"shared": lambda c: c.x[:2]},
            "shared (2, 16) is not (3, 16), as hidden_states is.",
        ),
        (
            {"gate_up_proj": lambda c: c.gate_up.double(), "down_proj": lambda c: c.down.double()},
            NOT_HERE.format("the weights are torch.float64; the kernels take bfloat16, float16 and float32"),
        ),
        ({"down_proj": lambda c: c.down.half()}, NOT_HERE.format("the weights differ in dtype")),
        ({"down_proj": lambda c: c.down.mT.contiguous().mT}, NOT_HERE.format("the weights are not contiguous")),
        (
            {
                "gate_up_proj": lambda c: c.gate_up.half()[:, :8].contiguous(),
                "down_proj": lambda c: c.down.half()[..., :4].contiguous(),
            },
            NOT_HERE.format("a width of 4 is not a multiple of 16 bytes in torch.float16"),
        ),
    ],
)  # fmt: skip
def test_what_is_refused(changes, text):
    with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
        fused_experts(**wrong(**changes))


def test_weights_of_another_kind_are_refused():
    class Other(Tensor):
        pass

    text = NOT_HERE.format("a weight is a Other, not a plain tensor")
    with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
        fused_experts(**wrong(gate_up_proj=lambda c: c.gate_up.as_subclass(Other)))


def test_the_tables_hold_together():
    devices = [*kernels_tiles.TABLE.values(), kernels_tiles.CDNA, kernels_tiles.FLOAT32, kernels_tiles.INTERPRETER]
    for classes, few in devices:
        assert [key for *key, _ in classes] == sorted((key for *key, _ in classes), reverse=True)
        assert classes[-1][:2] == (0, 0)
        for way in few.swapped:
            assert way.up.tokens == way.down.tokens >= SMALLEST_TILE
        for *_, tiles in classes:
            assert len({tile.rows for tile in tiles[:5]}) == 1, "products of rows share one plan"
            assert tiles.up.rows >= SMALLEST_TILE
            assert tiles.dw.depth <= ROWS_BEHIND, "a weight gradient reads at most PAD rows behind an expert's last"


# What needs a GPU.

gpu = [pytest.mark.gpu, pytest.mark.skipif(not GPU, reason="needs a GPU")]
HALVES = [torch.bfloat16, torch.float16]


def on_gpu(function):
    """Mark a test as one for a GPU."""
    for mark in gpu:
        function = mark(function)
    return function


@on_gpu
@pytest.mark.parametrize("dtype", [*HALVES, torch.float32])
@pytest.mark.parametrize(
    "shape", [(17, 24, 40, 5, 2), (0, 16, 8, 4, 2), (1, 72, 48, 9, 8), (129, 256, 136, 12, 6), (512, 512, 384, 16, 4),
              (3000, 1024, 704, 24, 6), (4096, 512, 256, 8, 1), (333, 2048, 1408, 64, 6), (260, 4096, 512, 4, 1)],
)  # fmt: skip
def test_gpu_output_and_gradients(shape, dtype):
    case = make_case(*shape, dtype=dtype, device=DEVICE, sentinels=True)
    assert_right(case)
    assert_right(case, INPUTS[:2])  # frozen experts
    assert_right(case, ())


@on_gpu
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("tokens", [84, 120, 160])
def test_gpu_some_tokens_of_wide_experts(monkeypatch, tokens, dtype):
    """Swapped operands by 64 tokens, on a Hopper; of 20 to 40 rows an expert on average."""
    case = make_case(tokens, 4096, 2056, 8, 2, dtype=dtype, device=DEVICE, sentinels=True)
    way = kernels_tiles.few_rows(case.x, 2 * tokens, 8, 4096, 2056)
    assert way is not None or torch.cuda.get_device_capability()[0] < 9
    poison(monkeypatch)
    assert_right(case, ())


@on_gpu
@pytest.mark.parametrize("dtype", [*HALVES, torch.float32])
@pytest.mark.parametrize("options", [{}, {"recompute": True}, {"batch_invariant": True}], ids=str)
def test_gpu_runs_are_equal_bit_for_bit(monkeypatch, dtype, options):
    case = make_case(512, 512, 384, 16, 4, dtype=dtype, device=DEVICE, sentinels=True)
    first = results(fused_experts, case, **options)
    poison(monkeypatch)
    for _ in range(RUNS):
        assert_equal(results(fused_experts, case, **options), first)


@on_gpu
@pytest.mark.parametrize("dtype", [*HALVES, torch.float32])
def test_gpu_batch_invariant_rows(dtype):
    case = make_case(700, 512, 384, 8, 4, dtype=dtype, device=DEVICE)
    whole = results(fused_experts, case, (), batch_invariant=True)["out"]
    for rows in (slice(0, 1), slice(699, 700), slice(100, 177), slice(3, 600)):
        part = results(fused_experts, part_of(case, rows), (), batch_invariant=True)["out"]
        torch.testing.assert_close(part, whole[rows], rtol=0, atol=0)


@on_gpu
@pytest.mark.parametrize("way", WAYS)
def test_gpu_graph_of_inference(way):
    N, E = {"vector_experts": (4, 64), "swapped_experts": (16, 8), "gated_rows": (2000, 8)}[way]
    case, other = (make_case(N, 256, 128, E, 2, dtype=torch.bfloat16, device=DEVICE, seed=seed) for seed in (0, 1))
    with torch.no_grad():
        graph, out = captured(lambda: fused_experts(*case[:5], shared=case.shared))
        for routing in (other.index, torch.full_like(case.index, E - 1), torch.full_like(case.index, E), other.index):
            case.index.copy_(routing)
            graph.replay()
            expected = fused_experts(*case[:5], shared=case.shared)
            torch.testing.assert_close(out, expected, rtol=0, atol=0)


@on_gpu
@pytest.mark.parametrize("options", [{}, {"recompute": True}], ids=str)
def test_gpu_graph_of_a_training_step(options):
    case, other = (make_case(600, 256, 128, 8, 2, dtype=torch.bfloat16, device=DEVICE, seed=seed) for seed in (0, 1))

    def step():
        found = results(fused_experts, case, **options)
        return found

    graph, captured_results = captured(step)
    for routing in (other.index, torch.full_like(case.index, 7), torch.full_like(case.index, 8), other.index):
        case.index.copy_(routing)
        graph.replay()
        torch.cuda.synchronize()
        assert_equal(captured_results, results(fused_experts, case, **options))


@on_gpu
@pytest.mark.parametrize("N", [8, 100])
def test_gpu_weights_past_two_to_the_31(N):
    E, width, D = 130, 2048, 4096
    assert E * 2 * width * D > 2**31
    torch.cuda.empty_cache()
    torch.manual_seed(0)
    gate_up = torch.randn(E, 2 * width, D, device=DEVICE, dtype=torch.bfloat16).mul_(D**-0.5)
    down = torch.randn(E, D, width, device=DEVICE, dtype=torch.bfloat16).mul_(width**-0.5)
    small = make_case(N, D, 16, 3, 2, dtype=torch.bfloat16, device=DEVICE)
    used = torch.tensor([0, 127, 129], device=DEVICE)
    big = small._replace(index=used[small.index], gate_up=gate_up, down=down)
    few = small._replace(gate_up=gate_up[used], down=down[used])
    same, exact = (results(eager_experts, few, dtype=dtype) for dtype in (None, torch.float64))
    assert_within_budget("out", results(fused_experts, big, ())["out"], same["out"], exact["out"])
    got = results(fused_experts, big)
    for name in got:
        if name in ("d gate_up", "d down"):
            assert got[name].count_nonzero(dim=(1, 2)).nonzero().flatten().tolist() == used.tolist()
            got[name] = got[name][used]
        assert_within_budget(name, got[name], same[name], exact[name])


@on_gpu
def test_gpu_rows_past_two_to_the_31():
    N, D, width, E, K = 131_104, 192, 2048, 8, 4
    assert N * K * 2 * width > 2**31
    torch.cuda.empty_cache()
    case = make_case(N, D, width, E, K, dtype=torch.bfloat16, device=DEVICE)
    blocks = (torch.arange(N, device=DEVICE) * E // N)[:, None].expand(-1, K)  # the last tokens have the last rows
    case = case._replace(index=blocks)
    got = results(fused_experts, case)
    rows = slice(N - 200, N)
    same, exact = (results(eager_experts, part_of(case, rows), dtype=dtype) for dtype in (None, torch.float64))
    for name in ("out", "d x", "d weights", "d shared"):
        assert_within_budget(name, got[name][rows], same[name], exact[name])
    # the last expert's gradients, from its tokens alone
    alone = slice((E - 1) * N // E, N)
    part = part_of(case, alone)
    part = part._replace(index=part.index * 0, gate_up=case.gate_up[E - 1 :], down=case.down[E - 1 :])
    expected = results(fused_experts, part)
    for name in ("d gate_up", "d down"):
        torch.testing.assert_close(got[name][E - 1 :], expected[name], rtol=0, atol=0)


@on_gpu
def test_gpu_compiled():
    torch._dynamo.reset()
    compiled = torch.compile(fused_experts, fullgraph=True)
    for N in (300, 700):
        case = make_case(N, 256, 128, 8, 2, dtype=torch.bfloat16, device=DEVICE)
        for needs in (INPUTS, ()):
            assert_equal(results(compiled, case, needs), results(fused_experts, case, needs))
