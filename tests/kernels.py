"""What the tests of the kernels share: eager references in any dtype, the error budget, and poisoned memory."""

from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lamoe import kernels_moe
from lamoe.kernels_moe import fused_experts

ACTIVATIONS = {"silu": F.silu, "gelu": F.gelu, "gelu_tanh": partial(F.gelu, approximate="tanh"), "relu": F.relu}


class Case(NamedTuple):
    """Arguments of `fused_experts`, and the gradient of its result."""

    x: Tensor
    index: Tensor
    weights: Tensor
    gate_up: Tensor
    down: Tensor
    shared: Tensor | None
    dy: Tensor

    @property
    def inputs(self) -> tuple[Tensor | None, ...]:
        """What can have a gradient."""
        return self.x, self.weights, self.gate_up, self.down, self.shared


INPUTS = ("x", "weights", "gate_up", "down", "shared")


def make_case(N, D, width, E, K, *, seed=0, dtype=torch.float32, device="cpu", shared=True, sentinels=False) -> Case:
    """A random case: values of a layer's size, distinct experts a token; `sentinels`: also ids E, E + 1, -1, -2."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape, scale=1.0):
        return (torch.randn(shape, generator=generator) * scale).to(device, dtype)

    ids = torch.rand(N, E + (4 if sentinels else 0), generator=generator).argsort(dim=-1)[:, :K]
    ids = torch.where(ids > E + 1, E + 1 - ids, ids)
    weights = torch.rand(N, K, generator=generator).to(device)  # float32, as the router gives them
    gate_up, down = draw(E, 2 * width, D, scale=D**-0.5), draw(E, D, width, scale=width**-0.5)
    return Case(draw(N, D), ids.to(device), weights, gate_up, down, draw(N, D) if shared else None, draw(N, D))


def eager_experts(x, index, weights, gate_up, down, shared=None, activation="silu") -> Tensor:
    """moe.LamoeExperts.forward plus `shared`, in the dtype of its arguments; ids outside [0, E) are sentinels."""
    N, K = index.shape
    flat = index.reshape(-1)
    places = [(flat == e).nonzero().squeeze(1) for e in range(len(down))]
    pieces = []
    for rows, w_gate_up, w_down in zip(places, gate_up.unbind(0), down.unbind(0), strict=True):
        gate, up = F.linear(x[rows // K].to(w_gate_up.dtype), w_gate_up).chunk(2, dim=-1)
        pieces.append(F.linear(ACTIVATIONS[activation](gate) * up, w_down))
    rows_NKD = pieces[0].new_zeros(N * K, down.shape[1]).index_copy(0, torch.cat(places), torch.cat(pieces))
    real = (index >= 0) & (index < len(down))
    weights = weights.masked_fill(~real, 0.0).to(torch.promote_types(rows_NKD.dtype, torch.float32))
    out = (rows_NKD.unflatten(0, (N, K)) * weights.unsqueeze(-1)).sum(dim=1).to(x.dtype)
    return out if shared is None else out + shared


def results(function, case: Case, needs=INPUTS, dtype=None, **options) -> dict[str, Tensor]:
    """`function`'s output for a case, cast to `dtype` if given, and the gradients of the inputs that `needs` names."""
    inputs = {}
    for name, tensor in zip(INPUTS, case.inputs, strict=True):
        if tensor is not None:
            tensor = tensor.detach() if dtype is None else tensor.detach().to(dtype)
            tensor.requires_grad_(name in needs)
        inputs[name] = tensor
    x, weights, gate_up, down, shared = inputs.values()
    out = function(x, case.index, weights, gate_up, down, shared=shared, **options)
    found = {"out": out.detach()}
    wanted = [name for name in needs if inputs[name] is not None]
    if wanted:
        grads = torch.autograd.grad(out, [inputs[name] for name in wanted], case.dy.to(out.dtype))
        found.update({f"d {name}": grad for name, grad in zip(wanted, grads, strict=True)})
    return found


def assert_within_budget(name: str, got: Tensor, same_dtype: Tensor, exact: Tensor):
    """Pass if `got` is as near the float64 `exact` as plain PyTorch in the same dtype is, times two, plus two ulps.

    Nearness is that of the worst element, and then of the mean square; an ulp is that of the largest element, and then
    of the root mean square. In float32 on a GPU it is six times: a row's products are added one after the other
    there, where cuBLAS adds several chains (an H100 and an H200 have shown up to 5.5 times).
    """
    times = 6 if got.is_cuda and got.dtype == torch.float32 else 2
    assert got.shape == exact.shape and got.dtype == same_dtype.dtype, name
    assert torch.isfinite(got).all(), f"{name} is not finite"
    if not exact.numel():
        return
    for kind, norm in (
        ("worst", lambda t: t.abs().max().item()),
        ("mean", lambda t: t.square().mean().sqrt().item()),
    ):
        error, eager = (norm(tensor.double() - exact) for tensor in (got, same_dtype))
        budget = times * eager + 2 * torch.finfo(got.dtype).eps * norm(exact)
        assert error <= budget, (
            f"{name}: {kind} error {error:.3e} is over {budget:.3e}; plain PyTorch's is {eager:.3e}"
        )


def assert_equal(got: dict[str, Tensor], expected: dict[str, Tensor]):
    """Pass if both hold the same tensors, bit for bit."""
    assert got.keys() == expected.keys()
    for name in got:
        torch.testing.assert_close(got[name], expected[name], rtol=0, atol=0, msg=lambda text, n=name: f"{n}: {text}")


def poison(monkeypatch):
    """From here on, memory that is allocated without a value holds NaN; of integers, indices far outside."""

    def filled(make):
        def poisoned(*arguments, **options):
            tensor = make(*arguments, **options)
            return tensor.fill_(float("nan") if tensor.is_floating_point() else 2**30 + 7)

        return poisoned

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, filled(getattr(owner, name)))


def assert_right(case, needs=INPUTS, activation="silu", **options):
    """Hold the fused output and gradients of a case to the budget; returns them."""
    got = results(fused_experts, case, needs, activation=activation, **options)
    same, exact = (results(eager_experts, case, needs, d, activation=activation) for d in (None, torch.float64))
    for name in got:
        assert_within_budget(name, got[name], same[name], exact[name])
    return got


def part_of(case, rows):
    """The case of some of its tokens."""
    parts = {name: getattr(case, name)[rows] for name in ("x", "index", "weights", "shared", "dy")}
    return case._replace(**parts)


def leaf(tensor: Tensor) -> Tensor:
    return tensor.clone().requires_grad_()


def operator_calls(device) -> dict:
    """Every registered operator of kernels_moe with some arguments."""
    case = make_case(3, 8, 4, 3, 2, device=device, seed=18)
    x, index, weights, gate_up, down, shared, dy = case
    leaves = (leaf(x), index, *map(leaf, case[2:6]))
    plain = {"act": "silu", "train": True, "recompute": False, "batch_invariant": False, "accumulate": False}
    options = lambda **changes: tuple({**plain, **changes}.values())  # noqa: E731
    h, packed = kernels_moe._experts(*case[:6], *options())[1:]
    rows, bias, into = x[index.flatten() % 3].contiguous(), x.new_ones(3, 8), [t + 1 for t in (gate_up, down)]
    back = lambda h, *into_and_needs: (dy, x, weights, gate_up, down, h, packed, *into_and_needs)  # noqa: E731
    one = make_case(1, 8, 4, 8, 2, device=device, seed=19)
    always = one.x.new_ones(6, 8), one.x.new_ones(6, 8), one.x.new_ones(8, 6)
    return {
        "few_experts plain": (*one[:5], *always, None, "silu"),
        "few_experts residual": (*one[:5], *always, one[0].detach().clone(), "silu"),
        "experts inference": (*case[:6], *options(train=False)),
        "experts invariant": (*case[:5], None, *options(train=False, batch_invariant=True)),
        "experts gradients": (*leaves, *options()),
        "experts recompute": (*leaves, *options(recompute=True)),
        "experts_backward all": back(h, "silu", False, True, True, True),
        "experts_backward none": back(h, "silu", False, False, False, False),
        "experts_backward recompute": back(h.new_empty(0), "silu", False, True, True, True),
        "experts_backward_into both": back(h, *into, "silu", False, False, True, True),
        "experts_backward_into one": back(h, None, into[1], "silu", False, True, True, True),
        "plan int64": (index, 3, x),
        "plan int32": (index.int(), 3, x),
        "grouped_linear tokens": (x, packed, gate_up, None, 2, True, False),
        "grouped_linear gradients": (leaf(x), packed, leaf(gate_up), None, 2, True, False),
        "grouped_linear transposed": (leaf(rows), packed, leaf(gate_up), leaf(bias), 2, False, True),
        "grouped_linear_backward tokens": (rows, x, packed, gate_up, 2, True, False, True, True, True),
        "grouped_linear_backward rows": (rows, rows, packed, gate_up, 2, False, False, True, True, False),
        "weighted_sum plain": (rows, packed, weights, 3),
        "weighted_sum gradients": (leaf(rows), packed, leaf(weights), 3),
        "weighted_sum_backward plain": (dy, rows, packed, weights, 3),
    }


def kept_bytes(case, **options) -> int:
    """Bytes that the backward keeps: distinct memory that is not the caller's own, and x."""
    own = {t.untyped_storage().data_ptr() for t in (case.index, *case.inputs[1:], case.dy)}
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    inputs = [t.requires_grad_() for t in case.inputs]
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        out = fused_experts(inputs[0], case.index, *inputs[1:4], shared=inputs[4], **options)
    assert out.requires_grad
    return sum(size for pointer, size in kept.items() if pointer not in own)


def captured(step):
    """A CUDA graph of `step`, which has run twice before, on another stream."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    return graph, out
