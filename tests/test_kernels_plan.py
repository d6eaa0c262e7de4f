"""The counting sort of routed rows by expert, and what moves rows by it, against plain PyTorch."""

from itertools import pairwise

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from lamoe.kernels_plan import combine, expert_sums, make_plan, pack, spread, unpack
from tests.kernels import assert_within_budget, poison

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FAR = 2**40  # an id that int32 cannot hold


def assert_sorts(ids: torch.Tensor, E: int, tile: int, kept: bool = True):
    """Hold the plan of `ids` [N, K] to every promise of `Plan`."""
    M = ids.numel()
    packed = make_plan(ids.to(DEVICE), E, tile, kept=kept).cpu()
    plan = unpack(packed, M, E)
    assert packed.dtype == torch.int32
    flat = ids.flatten().long()
    real = (flat >= 0) & (flat < E)
    rows = int(real.sum())

    counts = torch.bincount(flat[real], minlength=E)
    assert plan.starts[0] == 0 and plan.starts[E] == rows
    assert torch.equal(plan.starts.long().diff(), counts)

    stable = torch.where(real, flat, E).sort(stable=True).indices[:rows]
    assert torch.equal(plan.order[:rows].long(), stable)
    assert torch.equal(plan.positions.long()[stable], torch.arange(rows))
    assert (plan.positions[~real] == -1).all()

    tiles = int(plan.tiles)
    assert tiles == int(((counts + tile - 1) // tile).sum()) <= len(plan.tile_row)
    covered = torch.zeros(M, dtype=torch.int64)
    for e, row in zip(plan.tile_expert[:tiles].tolist(), plan.tile_row[:tiles].tolist(), strict=True):
        assert plan.starts[e] <= row < plan.starts[e + 1]
        covered[row : min(row + tile, int(plan.starts[e + 1]))] += 1
    assert (covered[:rows] == 1).all() and not covered[rows:].any()
    assert (plan.tile_expert[:tiles].diff() >= 0).all()
    if kept:
        for unused in (plan.order[rows:], plan.tile_expert[tiles:], plan.tile_row[tiles:]):
            assert not unused.any()


@st.composite
def routings(draw):
    """Ids [N, K] of E experts, with sentinels of all kinds, and a number of rows a tile."""
    E, N, K = draw(st.integers(1, 21)), draw(st.integers(0, 24)), draw(st.integers(1, 4))
    sentinels = [E, E + 1, 2 * E, 2**20, FAR, -1, -FAR]
    some = st.sampled_from(sorted(draw(st.sets(st.integers(0, E - 1), min_size=1)))) | st.sampled_from(sentinels)
    ids = draw(st.lists(some, min_size=N * K, max_size=N * K))
    return torch.tensor(ids, dtype=torch.int64).view(N, K), E, draw(st.sampled_from([16, 64, 128]))


@settings(derandomize=True, deadline=None, max_examples=60, suppress_health_check=list(HealthCheck))
@given(routings(), st.booleans())
@example((torch.zeros(0, 3, dtype=torch.int64), 5, 16), True)  # no row
@example((torch.tensor([[0]]), 1, 16), True)  # one row, one expert
@example((torch.tensor([[3, FAR, -1]]), 3, 16), True)  # nothing but sentinels
@example((torch.full((9, 4), 7), 12, 16), False)  # one expert has all
def test_a_plan_sorts(routing, kept):
    assert_sorts(*routing, kept)


@pytest.mark.parametrize(
    "M, E",
    [
        (127, 16),  # around the ids of a split, the experts of a group, and the ids that are read at a time
        (128, 15),
        (129, 17),
        (1025, 40),
        (2048, 5),  # the most that one launch sorts
        (2049, 5),
        (5000, 1),
        (9000, 70),
    ],
)
def test_a_plan_sorts_sizes_around_its_blocks(M, E):
    generator = torch.Generator().manual_seed(M)
    assert_sorts(torch.randint(-1, E + 2, (M, 1), generator=generator), E, 128)
    if M < 2048:
        half = torch.randint(0, E, (M, 1), generator=generator) // 2 * 2  # every other expert is empty
        assert_sorts(half.int(), E, 16)


def test_a_plan_sorts_more_ids_than_its_splits_read_at_once():
    assert_sorts(torch.randint(-1, 4, (128 * 512 + 70, 1), generator=torch.Generator().manual_seed(0)), 3, 128)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("M", [40, 2100])
def test_a_plan_needs_no_clean_memory(monkeypatch, M, dtype):
    ids = torch.randint(-1, 8, (M // 2, 2), generator=torch.Generator().manual_seed(M), dtype=dtype)
    poison(monkeypatch)
    assert_sorts(ids, 6, 16, kept=False)
    assert_sorts(ids, 6, 16, kept=True)


def routed(N: int, K: int, E: int, D: int):
    """A plan of ids with sentinels, its positions and rows on the CPU, random rows with NaN where nobody's row is."""
    generator = torch.Generator().manual_seed(N + D)
    ids = torch.randint(-1, E + 2, (N, K), generator=generator)
    ids[ids == 1] = 0  # an expert without rows, where there are two
    plan = unpack(make_plan(ids.to(DEVICE), E, 16, kept=True), N * K, E)
    positions = plan.positions.cpu().long()
    rows = int((positions >= 0).sum())
    y = torch.randn(N * K, D, generator=generator)
    y[rows:] = float("nan")
    return plan, positions.view(N, K), rows, y, generator


SHAPES = [(7, 3, 5, 20), (140, 1, 3, 8), (1, 1, 1, 4), (3, 2, 2, 1032)]  # N, K, E, D; the last is two blocks wide


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_combine_sums_the_rows_of_each_token(monkeypatch, shape, shared, weighted):
    N, K, E, D = shape
    plan, positions, _, y, generator = routed(*shape)
    weights = torch.rand(N, K, generator=generator) if weighted else None
    addend = torch.randn(N, D, generator=generator) if shared else None

    def expected(dtype):
        rows = y.to(dtype)[positions.clamp(min=0)] * (1 if weights is None else weights.to(dtype).unsqueeze(-1))
        out = rows.masked_fill((positions < 0).unsqueeze(-1), 0).sum(dim=1)
        return out if addend is None else out + addend.to(dtype)

    if weighted:
        poisoned = weights.masked_fill(positions < 0, float("nan"))
    poison(monkeypatch)
    on_device = [None if t is None else t.to(DEVICE) for t in (poisoned if weighted else None, addend)]
    out = torch.empty(N, D, device=DEVICE)
    got = combine(y.to(DEVICE), plan, *on_device, K, out)
    assert got is out
    assert_within_budget("out", got.cpu(), expected(torch.float32), expected(torch.float64))


@pytest.mark.parametrize("pad", [0, 5, 128])
@pytest.mark.parametrize("shape", SHAPES)
def test_pack_gathers_tokens_and_clears_what_follows(monkeypatch, shape, pad):
    N, K, E, D = shape
    plan, positions, rows, *_ = routed(*shape)
    x = torch.arange(N * D, dtype=torch.float32).view(N, D)
    x[(positions < 0).all(dim=1)] = float("nan")
    poison(monkeypatch)
    got = pack(x.to(DEVICE), plan, E, K, pad, torch.empty(N * K, D, device=DEVICE)).cpu()
    assert torch.equal(got[:rows], x[plan.order[:rows].cpu().long() // K])
    assert not got[rows : rows + pad].any()
    assert got[rows + pad :].isnan().all()


@pytest.mark.parametrize("shape", SHAPES)
def test_spread_is_the_gradient_of_the_weighted_sum(monkeypatch, shape):
    N, K, E, D = shape
    plan, positions, rows, y, generator = routed(*shape)
    weights, dout = torch.rand(N, K, generator=generator), torch.randn(N, D, generator=generator)
    poison(monkeypatch)
    poisoned = weights.masked_fill(positions < 0, float("nan"))
    dy, dw = (t.cpu() for t in spread(dout.to(DEVICE), y.to(DEVICE), plan, poisoned.to(DEVICE)))
    found = positions[positions >= 0]

    def expected(dtype):
        dy, dw = torch.zeros(N * K, D, dtype=dtype), torch.zeros(N, K, dtype=dtype)
        dy[found] = (weights.to(dtype).unsqueeze(-1) * dout.to(dtype).unsqueeze(1))[positions >= 0]
        dw[positions >= 0] = (y.to(dtype)[found] * dout.to(dtype)[(positions >= 0).nonzero()[:, 0]]).sum(dim=1)
        return dy, dw

    for name, *tensors in zip(("dy", "dw"), (dy, dw), expected(torch.float32), expected(torch.float64), strict=True):
        assert_within_budget(name, *tensors)
    assert not dy[rows:].any() and not dw[positions < 0].any()


@pytest.mark.parametrize("shape", SHAPES)
def test_expert_sums_adds_each_experts_rows(monkeypatch, shape):
    N, K, E, D = shape
    plan, _, _, y, _ = routed(*shape)
    poison(monkeypatch)
    got = expert_sums(y.to(DEVICE), plan, E).cpu()
    starts = plan.starts.tolist()

    def expected(dtype):
        return torch.stack([y[a:b].to(dtype).sum(dim=0) for a, b in pairwise(starts)])

    assert_within_budget("sums", got, expected(torch.float32), expected(torch.float64))


def test_no_tokens_at_all():
    plan = unpack(make_plan(torch.zeros(0, 2, dtype=torch.int64, device=DEVICE), 3, 16, kept=True), 0, 3)
    nothing = torch.zeros(0, 8, device=DEVICE)
    assert combine(nothing, plan, None, None, 2, nothing).shape == (0, 8)
    assert pack(nothing, plan, 3, 2, 128, nothing).shape == (0, 8)
    assert [t.shape for t in spread(nothing, nothing, plan, nothing[:, :2])] == [(0, 8), (0, 2)]
    assert not expert_sums(nothing, plan, 3).any()
