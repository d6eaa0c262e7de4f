"""Linear layers over routed rows, for experts that are not two gated projections, against a loop over tokens."""

import pytest
import torch

from lamoe import kernels_tiles
from lamoe.kernels_moe import GroupedRows
from tests.kernels import assert_right, assert_within_budget, make_case, poison

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_grouped_rows(monkeypatch, transposed, bias):
    case = make_case(9, 16, 12, 5, 3, device=DEVICE, seed=19, sentinels=True, shared=False)
    generator = torch.Generator().manual_seed(0)
    biases = [torch.randn(5, width, generator=generator).to(DEVICE) for width in (24, 16)] if bias else [None, None]

    def grouped(x, weights, gate_up, down, *biases):
        rows = GroupedRows(x, case.index, 5)
        turn = (lambda w: w.mT.contiguous()) if transposed else (lambda w: w)
        gate, up = rows.linear(x, turn(gate_up), biases[0], tokens=True, transposed=transposed).chunk(2, dim=-1)
        return rows.sum(rows.linear(gate.tanh() * up, turn(down), biases[1], transposed=transposed), weights)

    def looped(x, weights, gate_up, down, *biases):
        out = []
        for token, ids, scales in zip(x, case.index.tolist(), weights, strict=True):
            total = torch.zeros_like(token)
            for e, scale in zip(ids, scales, strict=True):
                if 0 <= e < 5:
                    first, second = (0 if b is None else b[e] for b in biases)
                    gate, up = (gate_up[e] @ token + first).chunk(2)
                    total = total + scale * (down[e] @ (gate.tanh() * up) + second)
            out.append(total)
        return torch.stack(out)

    def all_results(function, dtype):
        leaves = [t if t is None else t.to(dtype).requires_grad_() for t in (*case.inputs[:4], *biases)]
        out = function(*leaves)
        return [out.detach(), *torch.autograd.grad(out, [t for t in leaves if t is not None], case.dy.to(dtype))]

    same, exact = (all_results(looped, dtype) for dtype in (torch.float32, torch.float64))
    poison(monkeypatch)
    for i, (got, plain, best) in enumerate(zip(all_results(grouped, torch.float32), same, exact, strict=True)):
        assert_within_budget(f"result {i}", got, plain, best)


def test_wide_tokens_may_have_taller_tiles(monkeypatch):
    """Rows of any width share the plan of their tokens: what is 16 wide here would take tiles of 32 rows by itself."""
    narrow = kernels_tiles.INTERPRETER.tiles[0][2]
    wide = kernels_tiles.Tiles(*(tile._replace(rows=32) for tile in narrow[:-1]), narrow.dw)
    device = kernels_tiles.INTERPRETER._replace(tiles=((0, 16, wide), (0, 0, narrow)))
    monkeypatch.setattr(kernels_tiles, "_device", lambda x: device)
    case = make_case(60, 16, 12, 2, 1, device=DEVICE, seed=20)
    assert kernels_tiles.tiles_for(case.x, 60, 2, 16) is wide and kernels_tiles.tiles_for(case.x, 60, 2, 12) is narrow
    assert_right(case)
    rows = GroupedRows(case.x, case.index, 2)
    got = rows.linear(rows.linear(case.x, case.gate_up[:, :12], tokens=True), case.down)
    order = case.index.flatten().argsort(stable=True)
    weights = case.down.double() @ case.gate_up[:, :12].double()
    torch.testing.assert_close(
        got.double(), torch.einsum("md,mfd->mf", case.x[order].double(), weights[case.index.flatten()[order]]),
        rtol=1e-5, atol=1e-5,
    )  # fmt: skip


def test_grouped_rows_of_sentinels_are_zeros():
    x = torch.ones(2, 8, device=DEVICE)
    rows = GroupedRows(x, torch.tensor([[0, 2], [7, -1]], device=DEVICE), 2)
    got = rows.linear(x, torch.ones(2, 4, 8, device=DEVICE), torch.ones(2, 4, device=DEVICE), tokens=True)
    assert torch.equal(got, torch.tensor([[9.0] * 4] + [[0.0] * 4] * 3, device=DEVICE))
