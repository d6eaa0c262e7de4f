"""The experts function "lamoe" of Transformers' registry, and our own model with it."""

import logging

import pytest
import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.integrations.finegrained_fp8 import ALL_FP8_EXPERTS_FUNCTIONS, FP8Experts
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

import lamoe
from lamoe import LamoeForCausalLM, boost, experts
from lamoe.experts import activation_name, describe, lamoe_experts_forward
from lamoe.moe import LamoeExperts
from tests.registry import (
    assert_same,
    close,
    experts_module,
    logits_and_gradients,
    on_the_cpu,
    routed,
    run,
    without_triton,
)
from tests.test_moe import make_config
from tests.tiny import random_ids

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="in float32, by Triton's interpreter, on the CPU")


@pytest.fixture
def warned(caplog):
    """What Transformers' loggers say."""
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    yield caplog
    logger.removeHandler(caplog.handler)


COMPOSITE = [
    {"has_gate": False},
    {"has_bias": True},
    {"is_transposed": True},
    {"has_post_expert_norm": True},
    {"has_gate": False, "has_bias": True, "is_transposed": True, "has_post_expert_norm": True},
]


@pytest.mark.parametrize("flags", [{}, *COMPOSITE], ids=lambda flags: "+".join(flags) or "fused")
@pytest.mark.parametrize("N, K", [(1, 1), (5, 2)])
def test_every_layout_equals_grouped_mm(flags, N, K, calls):
    module = experts_module(**flags)
    inputs = routed(N, K)
    close(run(module, "lamoe", *inputs), run(module, "grouped_mm", *inputs))
    path = "composite" if flags else "fused"
    assert describe(module)[0] == path and calls[path] == 1


@pytest.mark.parametrize("flags", [{}, COMPOSITE[-1]], ids=["fused", "composite"])
def test_rows_of_other_experts_give_exactly_zero_even_if_they_are_nan(flags):
    """As all-reduce expert parallelism calls: ids of `num_experts`, weights of the local ones."""
    module = experts_module(**flags)
    x, index, weights = routed(6, 2)
    index = torch.tensor([[0, 4], [4, 4], [3, 1], [9, 2], [4, 4], [1, 0]])
    with torch.no_grad():
        x[[1, 4]] = float("nan")
        weights[index >= 4] = float("nan")
    got = run(module, "lamoe", x, index, weights)
    for row in (1, 4):
        assert not got[0][row].any() and not got[1][row].any()
    assert not got[2][index >= 4].any()
    with torch.no_grad():
        x[[1, 4]] = 0.0
        weights[index >= 4] = 0.0
    module._is_expert_parallel = True
    close(got, run(module, "grouped_mm", x, index, weights))


@pytest.mark.parametrize("flags", [{}, COMPOSITE[-1]], ids=["fused", "composite"])
def test_local_count_is_num_experts_and_nothing_reads_past_it(flags):
    module = experts_module(**flags)
    local = experts_module(E=2, **flags)
    with torch.no_grad():
        for mine, all_of_them in zip(local.parameters(), module.parameters(), strict=True):
            mine.copy_(all_of_them[:2] if len(all_of_them) == 4 else all_of_them)
            if len(all_of_them) == 4:
                all_of_them[2:] = float("nan")
    module.num_experts = 2
    inputs = routed(5, 2)
    got, expected = run(module, "lamoe", *inputs), run(local, "lamoe", *inputs)
    close(got[:3], expected[:3])


@pytest.mark.parametrize("flags", [{}, COMPOSITE[-1]], ids=["fused", "composite"])
@pytest.mark.parametrize("tokens", [0, 1])
def test_an_empty_rank_and_its_dummy_row_reach_the_backward(flags, tokens):
    """As all-to-all expert parallelism calls: one expert a row, unit weights, and one row where none came."""
    module = experts_module(**flags)
    x = torch.zeros(tokens, 8, requires_grad=True)
    out = module(x, torch.zeros(tokens, 1).long(), torch.ones(tokens, 1))
    assert out.shape == (tokens, 8)
    for gradient in torch.autograd.grad(out[:0].sum(), [x, *module.parameters()]):
        assert not gradient.any()


@pytest.mark.parametrize("flags", [{}, {"has_bias": True}], ids=["fused", "composite"])
def test_inputs_may_be_strided(flags):
    module = experts_module(**flags)
    x, index, weights = routed(6, 2)
    wide = torch.stack([x.detach(), -x.detach()], dim=-1)[..., 0].requires_grad_()
    strided = index.T.contiguous().T, weights.detach().T.contiguous().T.requires_grad_()
    assert not (wide.is_contiguous() or strided[0].is_contiguous() or strided[1].is_contiguous())
    close(run(module, "lamoe", wide, *strided), run(module, "lamoe", x, index, weights))


@pytest.mark.parametrize("flags", [{}, {"has_bias": True}], ids=["fused", "composite"])
def test_autocast_computes_in_its_dtype_and_returns_the_callers(flags):
    """In float16: the interpreter has no bfloat16 products."""
    module = experts_module(F=16, **flags)
    inputs = routed(6, 2)
    expected = run(module, "lamoe", *inputs)
    with torch.autocast("cpu", torch.float16):
        got = run(module, "lamoe", *inputs)
    assert [a.dtype for a in got] == [torch.float32] * len(got)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2)
        assert not torch.equal(a, b)


@pytest.mark.parametrize("name", ["silu", "swish", "relu", "gelu", "gelu_python", "gelu_new", "gelu_fast",
                                  "gelu_pytorch_tanh", "gelu_accurate"])  # fmt: skip
def test_known_activations_are_what_the_kernels_compute(name, calls):
    module = experts_module(act=name)
    inputs = routed(4, 1)
    with torch.no_grad():
        inputs[0].mul_(4)
    close(run(module, "lamoe", *inputs), run(module, "grouped_mm", *inputs))
    assert calls == {"fused": 1, "composite": 0}


def test_other_activations_are_called():
    assert activation_name(nn.GELU()) == activation_name(torch.nn.functional.gelu) == "gelu"
    assert activation_name(nn.GELU(approximate="tanh")) == "gelu_tanh"
    for name in ("gelu_10", "quick_gelu", "relu2", "mish", "sigmoid", "relu6"):
        assert activation_name(ACT2FN[name]) is None
    module = experts_module(act="mish")
    assert describe(module) == ("composite", "the kernels do not know MishActivation")
    inputs = routed(5, 2)
    close(run(module, "lamoe", *inputs), run(module, "grouped_mm", *inputs))


def test_a_gate_of_its_own_is_called():
    class Odd(nn.Module):
        def _apply_gate(self, gate_up):
            gate, up = gate_up.chunk(2, dim=-1)
            return gate.tanh() * (up + 1)

    replaced = experts_module()
    replaced._apply_gate = Odd()._apply_gate
    for module in (experts_module(base=Odd), replaced):
        assert describe(module) == ("composite", "its gate is its own")
        inputs = routed(3, 1)
        close(run(module, "lamoe", *inputs), run(module, "grouped_mm", *inputs))


class Halves(nn.Module):
    def forward(self, weight):
        return weight / 2


def parametrized(module, monkeypatch):
    torch.nn.utils.parametrize.register_parametrization(module, "down_proj", Halves())


def subclassed(module, monkeypatch):
    class Quantised(torch.Tensor):
        pass

    module.down_proj = nn.Parameter(module.down_proj.detach().as_subclass(Quantised))


def strided(module, monkeypatch):
    module.down_proj = nn.Parameter(module.down_proj.detach().mT.contiguous().mT)


def mixed(module, monkeypatch):
    module.down_proj = nn.Parameter(module.down_proj.detach().half())


FALLBACKS = [
    (parametrized, "its weights are parametrized, as adapters on whole expert tensors are"),
    (subclassed, "a weight is a "),
    (on_the_cpu, "the weights are on cpu, and the kernels run on GPUs"),
    (without_triton, "Triton or a part of it is missing (No module named 'triton')"),
    (strided, "the weights are not contiguous"),
]


@pytest.mark.parametrize("change, reason", FALLBACKS, ids=lambda value: getattr(value, "__name__", ""))
def test_what_the_kernels_do_not_take_runs_by_grouped_mm_and_says_so_once(change, reason, monkeypatch, calls, warned):
    module = experts_module()
    change(module, monkeypatch)
    path, why = describe(module)
    assert path == "grouped_mm" and why.startswith(reason)
    x, index, weights = routed(5, 2)
    shared = torch.randn(5, 8)
    expected = ALL_EXPERTS_FUNCTIONS["grouped_mm"](module, x, index, weights) + shared
    for _ in range(2):
        assert torch.equal(module(x, index, weights, shared=shared), expected)
    assert calls == {"fused": 0, "composite": 0}
    said = f"The experts of {type(module).__name__} run by grouped_mm, not by Lamoe's kernels: {why}."
    assert warned.text.count(said) == warned.text.count("Lamoe's kernels") == 1


@pytest.mark.parametrize("change, dtype, width, reason", [
    (None, torch.float64, 12, "the weights are torch.float64; the kernels take bfloat16, float16 and float32"),
    (None, torch.float32, 10, "a width of 10 is not a multiple of 16 bytes in torch.float32"),
    (mixed, torch.float32, 16, "the weights differ in dtype"),
])  # fmt: skip
def test_what_grouped_mm_does_not_take_either_runs_eager(change, dtype, width, reason, monkeypatch):
    """PyTorch's grouped_mm takes no float64 and no odd widths: these run by the module's own forward."""
    module = experts_module(F=width).to(dtype)
    if change:
        change(module, monkeypatch)
    assert describe(module) == ("grouped_mm" if change else "eager", reason)
    if not change:
        inputs = [t.detach().to(dtype).requires_grad_() if t.is_floating_point() else t for t in routed(5, 2)]
        close(run(module, "lamoe", *inputs), run(module, "batched_mm", *inputs))


def test_both_registries_know_the_name_and_fp8_falls_back(monkeypatch, warned):
    assert ALL_EXPERTS_FUNCTIONS["lamoe"] is ALL_FP8_EXPERTS_FUNCTIONS["lamoe"] is lamoe_experts_forward
    module = experts_module()
    eights = FP8Experts.__new__(FP8Experts)
    vars(eights).update(vars(module))
    eights._parameters = {
        name: nn.Parameter(tensor.detach().to(torch.float8_e4m3fn), requires_grad=False)
        for name, tensor in module.named_parameters()
    }
    monkeypatch.setitem(type(ALL_FP8_EXPERTS_FUNCTIONS)._global_mapping, "grouped_mm", lambda *args: "theirs")
    assert lamoe_experts_forward(eights, *routed(3, 2)) == "theirs"
    assert "FP8Experts run by grouped_mm, not by Lamoe's kernels: the weights are torch.float8_e4m3fn" in warned.text


def test_shared_experts_are_added_inside_the_call(monkeypatch):
    model = LamoeForCausalLM(make_config(experts_implementation="eager")).eval()
    ids = random_ids(1, 2, vocab_size=64)
    expected = logits_and_gradients(model, ids)
    given = []

    def spy(*args, **kwargs):
        given.append(kwargs["shared"] is not None)
        return lamoe.fused_experts(*args, **kwargs)

    monkeypatch.setattr(experts, "fused_experts", spy)
    assert [row.path for row in boost(model).rows] == ["fused"] * 2
    assert_same(logits_and_gradients(model, ids), expected)
    assert given == [True, True]

    seen = []
    layer = model.model.layers[1].mlp
    handle = layer.experts.register_forward_hook(lambda module, args, out: seen.append(out.detach()))
    torch.testing.assert_close(model(ids).logits, expected[0], rtol=1e-4, atol=1e-5)
    handle.remove()
    assert len(seen) == 1
    assert given[2:] == [False, True]  # what a hook sees is the routed sum alone
    layer.experts._is_expert_parallel = True
    model(ids)
    layer.experts._is_expert_parallel = False
    layer.experts.forward = layer.experts.forward  # as parallel styles and accelerate do
    model(ids)
    assert given[4:] == [False, True, False, True]


@pytest.mark.parametrize("change", [on_the_cpu, without_triton])
def test_shared_experts_are_added_where_the_kernels_do_not_run(change, monkeypatch):
    model = LamoeForCausalLM(make_config(experts_implementation="grouped_mm")).eval()
    ids = random_ids(1, 3, vocab_size=64)
    expected = model(ids).logits
    change(None, monkeypatch)
    model.set_experts_implementation("lamoe")
    torch.testing.assert_close(model(ids).logits, expected)


def test_a_block_of_ours_compiles_in_one_graph():
    block = LamoeForCausalLM(make_config(experts_implementation="lamoe")).model.layers[1].mlp.eval()
    x = torch.randn(1, 5, 16)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(block, fullgraph=True, backend="aot_eager")(x), block(x))


def test_the_default_is_ours_where_there_is_a_gpu_and_a_choice_is_a_choice(monkeypatch):
    assert LamoeForCausalLM(make_config()).config._experts_implementation == "grouped_mm"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert LamoeForCausalLM(make_config()).config._experts_implementation == "lamoe"
    chosen = LamoeForCausalLM(make_config(experts_implementation="eager"))
    assert chosen.config._experts_implementation == "eager"
    chosen.set_experts_implementation("batched_mm")
    assert chosen.config._experts_implementation == "batched_mm"
    monkeypatch.setattr(experts, "MISSING", "Triton is missing")
    assert LamoeForCausalLM(make_config()).config._experts_implementation == "grouped_mm"


def test_generation_keeps_our_experts_at_decode(monkeypatch):
    model = LamoeForCausalLM(make_config(experts_implementation="lamoe")).eval()
    monkeypatch.setattr(LamoeForCausalLM, "device", torch.device("cuda"))
    with model._optimize_model_for_decode():
        assert model.config._experts_implementation == "lamoe"


def test_a_copy_of_the_class_runs_its_own_function_whoever_is_registered():
    class Copied(LamoeExperts):
        def lamoe_forward(self, *args):
            return args[0] * 0 + 7

    module = Copied(make_config(experts_implementation="lamoe"))
    assert (module(torch.zeros(3, 16), torch.zeros(3, 1).long(), torch.ones(3, 1)) == 7).all()


def test_registration_leaves_an_entry_alone_but_for_the_package():
    mapping = type(ALL_EXPERTS_FUNCTIONS)._global_mapping
    mapping["lamoe"] = print
    experts.register()
    assert ALL_EXPERTS_FUNCTIONS["lamoe"] is print
    experts.register(overwrite=True)
    assert ALL_EXPERTS_FUNCTIONS["lamoe"] is lamoe_experts_forward


def test_fused_experts_is_exported_and_a_missing_triton_is_an_import_error(monkeypatch):
    assert lamoe.fused_experts is experts.fused_experts
    monkeypatch.setitem(__import__("sys").modules, "lamoe.kernels_moe", None)
    with pytest.raises(ImportError):
        _ = lamoe.fused_experts
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = lamoe.nothing
