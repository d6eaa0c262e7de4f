"""A handful of tokens with the shared expert in the same launches. The other ways are in test_kernels_moe.py."""

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("lamoe.kernels_moe")

from lamoe import kernels_moe
from tests.kernels import eager_experts, make_case

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # on CPU Triton interprets


@pytest.mark.parametrize("shared_width", [12, 20, 24, 7])
@pytest.mark.parametrize("tokens", [1, 3])
def test_few_tokens_with_their_shared_expert(tokens, shared_width):
    case = make_case(tokens, 20, 12, 24, 2, device=DEVICE, seed=31, shared=False)
    generator = torch.Generator().manual_seed(5)
    shapes = ((shared_width, 20), (shared_width, 20), (20, shared_width))
    shared = [torch.randn(shape, generator=generator).to(DEVICE) for shape in shapes]
    arguments = (case.x, case.index, case.weights, case.gate_up, case.down)

    def expected(dtype):
        gate, up, down = (weight.to(dtype) for weight in shared)
        x = case.x.to(dtype)
        always = F.silu(x @ gate.T) * (x @ up.T) @ down.T
        return eager_experts(*(t.to(dtype) if t.is_floating_point() else t for t in arguments)) + always

    with torch.no_grad():
        out = kernels_moe.few_experts(*arguments, tuple(shared), "silu")
        residual = torch.randn(case.x.shape, generator=generator).to(DEVICE)
        both = kernels_moe.few_experts(*arguments, tuple(shared), "silu", residual)
    torch.testing.assert_close(both, out + residual)
    exact = expected(torch.float64)
    assert (out.double() - exact).norm() <= 2 * (expected(torch.float32) - exact).norm() + 2**-22 * exact.norm()
    assert kernels_moe.few_experts(*arguments, tuple(shared), "silu") is None  # gradients may be wanted
    with torch.no_grad():
        assert kernels_moe.few_experts(*arguments, tuple(w.double() for w in shared), "silu") is None
        assert (
            kernels_moe.few_experts(*(t.repeat(9, 1) for t in arguments[:3]), *arguments[3:], shared, "silu") is None
        )
