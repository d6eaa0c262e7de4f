"""The up projection in Gluon: when it is chosen, and, on a Hopper, that its bits are those of the kernel before it."""

import importlib
import sys

import pytest
import torch

from lamoe import kernels_gemm, kernels_moe
from lamoe.kernels_plan import make_plan, unpack
from lamoe.kernels_tiles import CDNA, FLOAT32, INTERPRETER, TABLE
from tests.kernels import ACTIVATIONS, assert_right, make_case, poison

GPU = torch.cuda.is_available()
HOPPER = GPU and torch.version.hip is None and torch.cuda.get_device_capability()[0] == 9
GLUON = "triton.experimental.gluon.language.nvidia.hopper"
TILE = TABLE[90].tiles[1][2].up  # of many rows, none wide


def on_hopper(function):
    return pytest.mark.gpu(pytest.mark.skipif(not HOPPER, reason="needs a Hopper")(function))


@pytest.fixture
def load(monkeypatch):
    """Look for the kernel as on a GPU of some compute capability, with its module imported anew."""
    monkeypatch.delitem(sys.modules, "lamoe.kernels_up", raising=False)

    def load(major=9, device="cuda"):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (major, 0))
        return kernels_moe._hopper_up.__wrapped__(torch.device(device))

    return load


def test_it_is_for_hopper(load, monkeypatch):
    assert load(8) == load(10) == load(12) == load(9, "cpu") == []
    assert "lamoe.kernels_up" not in sys.modules  # nothing of Gluon runs where it is of no use
    assert [function.__name__ for function in load()] == ["fits", "up_rows"]
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert load() == []


@pytest.mark.parametrize("missing", ["triton.experimental.gluon", GLUON, "triton.experimental.gluon.nvidia.hopper"])
def test_a_triton_without_gluon_for_hopper(load, monkeypatch, missing):
    monkeypatch.setitem(sys.modules, missing, None)
    importlib.import_module("lamoe.kernels_gemm")
    with pytest.raises(
        ImportError, match="The Hopper up projection needs a Triton with Gluon for Hopper: pip install"
    ):
        importlib.import_module("lamoe.kernels_up")
    assert load() == []


def test_tiles_that_fit(load):
    fits, _ = load()
    assert fits(torch.bfloat16, TILE) and fits(torch.float16, TILE)
    assert not fits(torch.float32, TILE) and not fits(torch.bfloat16, TILE._replace(specialised=False))
    for row in (*TABLE.values(), CDNA, FLOAT32, INTERPRETER):
        for _, _, tiles in row.tiles:
            for tile in tiles:
                assert not tile.specialised or (tile.rows, tile.columns, tile.depth) == (128, 256, 64)


def test_a_kernel_that_does_not_compile_is_tried_once(monkeypatch):
    """Gluon is experimental: its names and signatures may differ in another Triton."""
    tries = []

    def fail(*arguments):
        tries.append(arguments)
        raise TypeError("async_load() got an unexpected keyword argument")

    found = [lambda *arguments: True, fail]
    monkeypatch.setattr(kernels_moe, "_hopper_up", lambda device: found)
    case = make_case(5, 16, 8, 3, 2, device="cuda" if GPU else "cpu")
    for _ in range(2):
        assert_right(case)
    assert len(tries) == 1 and not found


def test_no_memory_is_not_a_kernel_that_does_not_compile(monkeypatch):
    def fail(*arguments):
        raise torch.OutOfMemoryError("out of memory")

    found = [lambda *arguments: True, fail]
    monkeypatch.setattr(kernels_moe, "_hopper_up", lambda device: found)
    with pytest.raises(torch.OutOfMemoryError):
        assert_right(make_case(5, 16, 8, 3, 2, device="cuda" if GPU else "cpu"))
    assert found


def routing(kind: str, N: int, E: int, K: int) -> torch.Tensor:
    """Experts [N, K] on the GPU."""
    index = torch.rand(N, E, device="cuda").topk(K, dim=-1).indices
    if kind == "one expert":
        index = torch.full_like(index, E - 2)
    if kind == "sentinels":
        index = torch.where(torch.rand(N, K, device="cuda") < 0.3, E, index)
    if kind == "nobody":
        index = torch.full_like(index, E)
    return index.contiguous()


@on_hopper
@pytest.mark.parametrize("save", [False, True])
@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize(
    "N, D, F, E, K, kind, dtype",
    [
        (3000, 2048, 1408, 8, 6, "uniform", torch.bfloat16), (333, 144, 272, 5, 2, "uniform", torch.float16),
        (200, 64, 72, 4, 1, "one expert", torch.bfloat16), (500, 192, 128, 6, 4, "sentinels", torch.bfloat16),
        (64, 136, 128, 3, 2, "nobody", torch.bfloat16), (1, 256, 264, 2, 1, "uniform", torch.bfloat16),
        (700, 128, 96, 60, 3, "uniform", torch.bfloat16),
    ],
)  # fmt: skip
def test_gpu_bits_of_the_kernel_that_it_replaces(N, D, F, E, K, kind, dtype, act, save, monkeypatch):
    """With memory poisoned that nobody has written; ten times, since a race shows only now and then."""
    from lamoe.kernels_up import up_rows

    torch.manual_seed(0)
    x, gate_up = (torch.randn(*shape, device="cuda", dtype=dtype) for shape in ((N, D), (E, 2 * F, D)))
    plan = unpack(make_plan(routing(kind, N, E, K), E, TILE.rows, kept=True), N * K, E)
    real = int(plan.starts[E])
    poison(monkeypatch)
    expected = kernels_gemm.gated_rows(x, gate_up, plan, K, act, save, TILE)
    for _ in range(10):
        got = up_rows(x, gate_up, plan, K, act, save, TILE)
        for mine, theirs in zip(got, expected, strict=True):
            assert torch.equal(mine[:real].nan_to_num(), theirs[:real].nan_to_num())
            assert len(mine) == len(theirs) and not mine[real:].isfinite().any()  # rows of nobody are not written


@on_hopper
@pytest.mark.parametrize("recompute", [False, True])
def test_gpu_experts_take_it(recompute, monkeypatch):
    fits, up_rows = kernels_moe._hopper_up(torch.device("cuda", torch.cuda.current_device()))
    saved = []

    def counted(x, gate_up, plan, K, act, save, tile):
        saved.append(save)
        return up_rows(x, gate_up, plan, K, act, save, tile)

    monkeypatch.setattr(kernels_moe, "_hopper_up", lambda device: [fits, counted])
    case = make_case(600, 256, 384, 4, 2, dtype=torch.bfloat16, device="cuda", shared=True)
    assert_right(case, recompute=recompute)
    assert saved == ([False, True] if recompute else [True])
    assert_right(case, ())
    assert saved[-1] is False
