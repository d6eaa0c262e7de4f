"""The experts' kernels in Gluon: when they are chosen, and, on a Hopper, that their bits are those of the kernels that
they replace."""

import importlib
import itertools
import re
import sys

import pytest
import torch

from lamoe import kernels_gemm, kernels_moe
from lamoe.kernels_plan import Plan, make_plan, pack, unpack
from lamoe.kernels_tiles import CDNA, FLOAT32, INTERPRETER, TABLE
from tests.kernels import ACTIVATIONS, assert_right, make_case, poison

GPU = torch.cuda.is_available()
HOPPER = GPU and torch.version.hip is None and torch.cuda.get_device_capability()[0] == 9
GLUON = "triton.experimental.gluon.language.nvidia.hopper"
UP, DA, DW = (TABLE[90].tiles[1][2]._asdict()[name] for name in ("up", "da", "dw"))  # of many rows, none wide
NAMES = ("up", "hidden", "weight")


def on_hopper(function):
    return pytest.mark.gpu(pytest.mark.skipif(not HOPPER, reason="needs a Hopper")(function))


@pytest.fixture
def load(monkeypatch):
    """Look for the kernels as on a GPU of some compute capability, with their modules imported anew."""
    for name in NAMES:
        monkeypatch.delitem(sys.modules, f"lamoe.kernels_{name}", raising=False)

    def load(major=9, device="cuda"):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (major, 0))
        return kernels_moe._hopper.__wrapped__(torch.device(device))

    return load


def test_they_are_for_hopper(load, monkeypatch):
    assert load(8) == load(10) == load(12) == load(9, "cpu") == {}
    # nothing of Gluon runs where it is of no use
    assert not {f"lamoe.kernels_{name}" for name in NAMES} & set(sys.modules)
    found = {name: function.__name__ for name, (_, function) in load().items()}
    assert found == {"up": "up_rows", "hidden": "hidden_gradient", "weight": "weight_gradient_ahead"}
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert load() == {}


@pytest.mark.parametrize("missing", ["triton.experimental.gluon", GLUON, "triton.experimental.gluon.nvidia.hopper"])
@pytest.mark.parametrize(
    "name, what", zip(NAMES, ("up projection", "gradient of hidden rows", "weight gradient"), strict=True)
)
def test_a_triton_without_gluon_for_hopper(load, monkeypatch, missing, name, what):
    load()  # what a module imports before it looks for Gluon has been loaded
    monkeypatch.delitem(sys.modules, f"lamoe.kernels_{name}")
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ImportError, match=f"The Hopper {what} needs a Triton with Gluon for Hopper: pip install"):
        importlib.import_module(f"lamoe.kernels_{name}")
    assert load() == {}


def test_tiles_that_fit(load):
    x = torch.empty(1, 168, dtype=torch.bfloat16)
    for (fits, _), tile in zip(load().values(), (UP, DA, DW), strict=True):
        assert fits(x, tile) and fits(x.half(), tile)
        assert not fits(x.float(), tile) and not fits(x, tile._replace(specialised=False))
    (up_fits, _), (hidden_fits, _), _ = load().values()
    assert up_fits(x[:, :160], UP) and not hidden_fits(x[:, :160], DA)  # fewer steps than stages
    for row in (*TABLE.values(), CDNA, FLOAT32, INTERPRETER):
        for _, _, tiles in row.tiles:
            for tile in tiles:
                assert not tile.specialised or (tile.rows, tile.columns, tile.depth) == (128, 256, 64)


@pytest.mark.parametrize(
    "rows, width, expected",
    [(64, 1408, [True]), (64, 1280, [False]), (64, 1416, [False]), (1213, 1408, [True]), (1214, 1408, [])],
)
def test_when_the_tiles_of_a_weight_gradient_are_turned(rows, width, expected, monkeypatch):
    """Where 128 divides the columns and 256 does not; of an expert with more rows than 8 MiB, Triton does it. Added to
    a gradient as into new memory."""
    taken = []
    found = {"weight": (lambda *arguments: True, lambda *arguments: taken.append(arguments[-3:-1]) or arguments[0])}
    monkeypatch.setattr(kernels_moe, "_hopper", lambda device: found)
    monkeypatch.setattr(kernels_moe, "weight_gradient", lambda *arguments: arguments[0])
    a, b = (torch.empty(4 * rows, X, dtype=torch.bfloat16, device="meta") for X in (2048, width))
    for old in (None, torch.empty(0)):
        taken.clear()
        kernels_moe.expert_gradient(a, b, None, 4, old, DW)
        assert [turn for _, turn in taken] == expected
        assert all(given is old for given, _ in taken)


def test_a_kernel_that_does_not_compile_is_tried_once(monkeypatch):
    """Gluon is experimental: its names and signatures may differ in another Triton."""
    tries = []

    def fail(*arguments):
        tries.append(arguments)
        raise TypeError("async_load() got an unexpected keyword argument")

    found = {name: (lambda *arguments: True, fail) for name in NAMES}
    monkeypatch.setattr(kernels_moe, "_hopper", lambda device: found)
    case = make_case(5, 16, 8, 3, 2, device="cuda" if GPU else "cpu")
    for _ in range(2):
        assert_right(case)
    assert len(tries) == len(NAMES) and not found


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA"), RuntimeError("Triton Error [CUDA]: out of memory")],
    ids=["torch", "triton"],
)
def test_no_memory_is_not_a_kernel_that_does_not_compile(monkeypatch, name, error):
    def fail(*arguments):
        raise error

    found = {name: (lambda *arguments: True, fail)}
    monkeypatch.setattr(kernels_moe, "_hopper", lambda device: found)
    with pytest.raises(type(error), match=re.escape(str(error))):
        assert_right(make_case(5, 16, 8, 3, 2, device="cuda" if GPU else "cpu"))
    assert found


def sorted_rows(kind: str, N: int, E: int, K: int) -> tuple[Plan, int]:
    """A plan of N tokens on the GPU for the kernels' tiles, and how many rows it has."""
    index = torch.rand(N, E, device="cuda").topk(K, dim=-1).indices
    if kind == "one expert":
        index = torch.full_like(index, E - 2)
    if kind == "sentinels":
        index = torch.where(torch.rand(N, K, device="cuda") < 0.3, E, index)
    if kind == "nobody":
        index = torch.full_like(index, E)
    plan = unpack(make_plan(index.contiguous(), E, UP.rows, kept=True), N * K, E)
    return plan, int(plan.starts[E])


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
def test_gpu_up_gives_the_bits_of_the_kernel_that_it_replaces(N, D, F, E, K, kind, dtype, act, save, monkeypatch):
    """With memory poisoned that nobody has written; ten times, since a race shows only now and then."""
    from lamoe.kernels_up import up_rows

    torch.manual_seed(0)
    x, gate_up = (torch.randn(*shape, device="cuda", dtype=dtype) for shape in ((N, D), (E, 2 * F, D)))
    plan, real = sorted_rows(kind, N, E, K)
    poison(monkeypatch)
    expected = kernels_gemm.gated_rows(x, gate_up, plan, K, act, save, UP)
    for _ in range(10):
        got = up_rows(x, gate_up, plan, K, act, save, UP)
        for mine, theirs in zip(got, expected, strict=True):
            assert torch.equal(mine[:real].nan_to_num(), theirs[:real].nan_to_num())
            assert len(mine) == len(theirs) and not mine[real:].isfinite().any()  # rows of nobody are not written


@on_hopper
@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize(
    "N, D, F, E, K, kind, dtype",
    [
        (3000, 2048, 1408, 8, 6, "uniform", torch.bfloat16), (333, 184, 272, 5, 2, "uniform", torch.float16),
        (200, 192, 72, 4, 1, "one expert", torch.bfloat16), (500, 256, 128, 6, 4, "sentinels", torch.bfloat16),
        (64, 168, 128, 3, 2, "nobody", torch.bfloat16), (1, 256, 264, 2, 1, "uniform", torch.bfloat16),
        (20000, 168, 520, 3, 2, "sentinels", torch.bfloat16), (9000, 200, 256, 60, 4, "uniform", torch.float16),
        (900, 4104, 264, 6, 2, "uniform", torch.bfloat16),
    ],
)  # fmt: skip
def test_gpu_hidden_gives_the_bits_of_the_kernels_that_it_replaces(N, D, F, E, K, kind, dtype, act, monkeypatch):
    """As of the up projection; the router weights' gradient is summed in another order."""
    from lamoe.kernels_hidden import hidden_gradient

    torch.manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, device="cuda", dtype=dtype)  # noqa: E731
    dy, down, h, weights = draw(N, D), draw(E, D, F) / F**0.5, draw(N * K, 2 * F), draw(N, K).float()
    plan, real = sorted_rows(kind, N, E, K)
    poison(monkeypatch)
    rows = pack(dy, plan, E, K, kernels_gemm.PAD, dy.new_empty((N * K, D)))
    da = kernels_gemm.plain_rows(rows, down, plan, K, DA, gather=False, transposed=True)
    expected_dh, expected_dw = kernels_gemm.act_gradient(da, h, weights, plan, E, act, True)
    for _ in range(10):
        dh, dw, a = hidden_gradient(rows, down, h, weights, plan, act, True, DA)
        assert torch.equal(dh[:real], expected_dh[:real])
        assert torch.equal(a[:real], da[:real])
        assert not a[real:].isfinite().any()  # rows of nobody are not written
        assert not dh[real : real + kernels_gemm.PAD].any()
        assert not dh[real + kernels_gemm.PAD :].isfinite().any()
        assert (dw - expected_dw).norm() <= 1e-6 * expected_dw.norm()
        assert torch.equal(dw == 0, expected_dw == 0)
        frozen_dh, frozen_dw, nothing = hidden_gradient(rows, down, h, weights, plan, act, False, DA)
        assert torch.equal(frozen_dh[:real], dh[:real])
        assert torch.equal(frozen_dw, dw)
        assert not len(nothing)


@on_hopper
@pytest.mark.parametrize(
    "N, H, W, E, K, kind, dtype",
    [
        (3000, 2048, 1408, 8, 6, "uniform", torch.bfloat16), (333, 144, 272, 5, 2, "uniform", torch.float16),
        (200, 64, 72, 4, 1, "one expert", torch.bfloat16), (500, 192, 128, 6, 4, "sentinels", torch.bfloat16),
        (64, 136, 128, 3, 2, "nobody", torch.bfloat16), (1, 256, 264, 2, 1, "uniform", torch.bfloat16),
        (20000, 136, 520, 3, 2, "sentinels", torch.bfloat16), (900, 200, 520, 60, 4, "uniform", torch.float16),
        (50, 72, 520, 1, 1, "uniform", torch.bfloat16),
    ],
)  # fmt: skip
def test_gpu_weight_gives_the_bits_of_the_kernel_that_it_replaces(N, H, W, E, K, kind, dtype, monkeypatch):
    """As of the up projection; experts of no row, of fewer rows than a stage has, of fewer stages than there are; with
    tiles as they are, and turned; new, and added to what is there."""
    from lamoe.kernels_weight import weight_gradient_ahead

    torch.manual_seed(0)
    plan, real = sorted_rows(kind, N, E, K)
    poison(monkeypatch)
    a, b = torch.randn(N * K, H, device="cuda", dtype=dtype), torch.empty(N * K, W, device="cuda", dtype=dtype)
    a[real : real + kernels_gemm.PAD] = 0
    a[real + kernels_gemm.PAD :] = float("nan")
    b[:real] = torch.randn(real, W, device="cuda", dtype=dtype)
    old = torch.randn(E, H, W, device="cuda", dtype=dtype)
    expected = kernels_gemm.weight_gradient(a, b, plan, E, None, DW)
    added = kernels_gemm.weight_gradient(a, b, plan, E, old.clone(), DW)
    for _, turn in itertools.product(range(10), (False, True)):
        assert torch.equal(weight_gradient_ahead(a, b, plan, E, None, turn, DW), expected)
        into = old.clone()
        assert weight_gradient_ahead(a, b, plan, E, into, turn, DW) is into
        assert torch.equal(into, added)


@on_hopper
@pytest.mark.parametrize("recompute", [False, True])
def test_gpu_experts_take_them(recompute, monkeypatch):
    kernels = kernels_moe._hopper(torch.device("cuda", torch.cuda.current_device()))
    taken = []

    def counted(name):
        fits, function = kernels[name]

        def run(*arguments):
            taken.append(name)
            return function(*arguments)

        return fits, run

    monkeypatch.setattr(kernels_moe, "_hopper", lambda device: {name: counted(name) for name in kernels})
    case = make_case(600, 256, 512, 4, 2, dtype=torch.bfloat16, device="cuda", shared=True)
    assert_right(case, recompute=recompute)
    assert taken == ["up"] * (1 + recompute) + ["hidden", "weight", "weight"]
    taken.clear()
    assert_right(case, ())
    assert taken == ["up"]
