"""Operators: which calls go past PyTorch's dispatcher, and that the others do not."""

import importlib
import itertools
import re
import sys

import pytest
import torch
import triton
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from lamoe import kernels_launch
from lamoe.kernels_launch import Operator, cdiv, next_power_of_2, operator


@operator("test_scaled")
def scaled(x: Tensor, other: Tensor | None, factor: float) -> Tensor:
    """x · factor."""
    return torch.empty_like(x).copy_(x.detach() * factor)


@scaled.register_fake
def _(x, other, factor):
    return torch.empty_like(x)


@operator("test_doubled", mutates_args=("x",))
def doubled(x: Tensor) -> None:
    """x, twice as great."""
    x.mul_(2)


class Watching(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


class Marked(Tensor):
    pass


@pytest.fixture
def dispatched(monkeypatch) -> list[str]:
    """The calls that went through the dispatcher."""
    seen = []

    def watched(op: Operator):
        through = op.registered

        def call(*inputs, **named):
            seen.append(through._name)
            return through(*inputs, **named)

        monkeypatch.setattr(op, "registered", call)

    for op in (scaled, doubled):
        watched(op)
    return seen


def test_plain_calls_go_past_the_dispatcher(dispatched):
    x = torch.randn(3)
    for other, factor in itertools.product((None, torch.nn.Parameter(x.clone(), requires_grad=False)), (2.0, 2, True)):
        torch.testing.assert_close(scaled(x, other, factor), x * factor)
    with torch.no_grad():
        scaled(x.clone().requires_grad_(), None, 2.0)
    with torch.inference_mode():
        scaled(torch.ones(2), None, 2.0)
    assert not dispatched


def test_calls_that_somebody_watches_do_not(dispatched):
    x = torch.randn(3)

    def counts(call):
        dispatched.clear()
        result = call()
        assert len(dispatched) == 1
        return result

    counts(lambda: scaled(x.clone().requires_grad_(), None, 2.0))
    counts(lambda: scaled(x, x.clone().requires_grad_(), 2.0))
    counts(lambda: scaled(x.as_subclass(Marked), None, 2.0))
    counts(lambda: scaled(x, x.as_subclass(Marked), 2.0))
    with Watching():
        counts(lambda: scaled(x, None, 2.0))
    with FakeTensorMode() as mode:
        fake = mode.from_tensor(x)
        assert counts(lambda: scaled(fake, None, 2.0)).shape == x.shape
    counts(lambda: torch.vmap(lambda row: scaled(row, None, 2.0))(torch.stack((x, x))))
    assert counts(lambda: scaled(x.to("meta"), None, 2.0)).is_meta
    minus = torch._neg_view(x)  # its memory holds x
    torch.testing.assert_close(counts(lambda: scaled(minus, None, 2.0)), -2 * x)
    torch.testing.assert_close(counts(lambda: scaled(x, other=None, factor=2.0)), 2 * x)
    graph = counts(lambda: make_fx(lambda x: scaled(x, None, 2.0), pre_dispatch=True)(x))
    assert "test_scaled" in graph.code
    traced = counts(lambda: torch.jit.trace(lambda x: scaled(x, None, 2.0), x, check_trace=False))
    assert "test_scaled" in str(traced.graph)
    with pytest.raises(RuntimeError, match="test_scaled"):  # no value of such a type: the dispatcher says so
        counts(lambda: scaled(x, None, [2.0]))


def test_where_pytorch_does_not_tell_who_watches(dispatched, monkeypatch):
    monkeypatch.setattr(kernels_launch, "_ASKS", False)
    scaled(torch.ones(2), None, 2.0)
    assert len(dispatched) == 1


class Scaling(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return scaled(x, None, 2.0)

    @staticmethod
    def backward(ctx, dy):
        return scaled(dy, None, 2.0)


def test_batched_gradients(dispatched):
    """Autograd's batches look like plain tensors, but have no memory that a kernel could read."""
    x, dys = torch.randn(3, requires_grad=True), torch.randn(4, 3)
    (got,) = torch.autograd.grad(Scaling.apply(x), x, dys, is_grads_batched=True)
    torch.testing.assert_close(got, 2 * dys)
    assert len(dispatched) == 1  # of the backward


def test_a_changed_argument_has_a_new_version(dispatched):
    x = torch.ones(2)
    version = x._version
    doubled(x)
    assert len(dispatched) == 1 and x._version > version and x.tolist() == [2, 2]


def test_a_compiled_graph_holds_the_operator():
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    x = torch.randn(3)
    compiled = torch.compile(lambda x: scaled(x, None, 2.0) + 1, fullgraph=True, backend=backend)
    torch.testing.assert_close(compiled(x), x * 2 + 1)
    assert sum("test_scaled" in str(node.target) for graph in graphs for node in graph.graph.nodes) == 1


def test_sizes_are_those_of_triton():
    for a, b in itertools.product((0, 1, 2, 7, 63, 64, 65, 2**31 + 1), (1, 2, 3, 64)):
        assert cdiv(a, b) == triton.cdiv(a, b)
    for x in (1, 2, 3, 4, 5, 64, 65, 1408, 2**20 - 1):
        assert next_power_of_2(x) == triton.next_power_of_2(x)


@pytest.mark.parametrize(
    "name, text",
    [
        ("moe", "The fused experts need Triton: pip install triton, or experts_implementation='eager'."),
        ("gated", "The fused gate needs Triton: pip install triton."),
        ("logits", "The fused router logits need Triton: pip install triton."),
    ],
)
def test_without_triton_it_is_said_what_needs_it(monkeypatch, name, text):
    """Each module looks for Triton before it imports this one, which knows no way out."""
    for module in [module for module in sys.modules if module.startswith("lamoe.kernels_")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(ImportError, match=f"^{re.escape(text)}$"):
        importlib.import_module(f"lamoe.kernels_{name}")
