"""The decode kernel against softmax attention in float64: every cache, ragged lengths, padding, poison, invariance."""

import importlib
import sys

import pytest
import torch

from lamoe.float8 import dequantised, quantised
from tests.kernels import poison

kernels = pytest.importorskip("lamoe.kernels_attention")
latent_decode, latent_decode_pages = kernels.latent_decode, kernels.latent_decode_pages

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"  # on CPU Triton interprets
ULP = {torch.float32: 2**-23, torch.bfloat16: 2**-8, torch.float16: 2**-11}
RUNS = 10 if GPU else 3
SCALING = 0.2
HOPPER = GPU and torch.version.hip is None and torch.cuda.get_device_capability()[0] == 9
on_gpu = [pytest.mark.gpu, pytest.mark.skipif(not GPU, reason="needs a GPU")]


class Step:
    """Random queries and a cache of ragged lengths; what no sequence has written is NaN.

    float8: latents of all magnitudes are cached so, and `c` is what can be read of them.
    """

    def __init__(self, H, B, T, C, R, S, dtype=torch.float32, seen=False, seed=0, lengths=None, float8=False):
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape):
            return torch.randn(shape, generator=generator).to(DEVICE, dtype)

        self.q, self.r = draw(B, H, T, C).transpose(0, 1), draw(H, B, T, R)
        self.c, self.k = draw(B, S, C), draw(B, S, R)
        self.lengths = torch.randint(T, S + 1, (B,), generator=generator).to(DEVICE, torch.int32)
        self.lengths[0] = S
        if lengths is not None:
            self.lengths = torch.tensor(lengths, device=DEVICE, dtype=torch.int32)
        written = torch.arange(S, device=DEVICE) < self.lengths[:, None]
        for part in (self.c, self.k):
            part.masked_fill_(~written[..., None], float("nan"))
        self.seen = (torch.rand(B, S, generator=generator) < 0.7).to(DEVICE) if seen else None
        self.cached = None
        if float8:
            sizes = torch.exp2(torch.randint(-9, 2, (B, S, 1), generator=generator).float()).to(DEVICE, dtype)
            self.cached = quantised(self.c * sizes, self.k)
            self.c, _ = dequantised(*self.cached)

    def run(self, **options):
        cached = self.cached or (self.c, self.k)
        return latent_decode(self.q, self.r, *cached, self.lengths, self.seen, scaling=SCALING, **options)

    def alone(self, b: int, **options):
        """What sequence b gets without the others, in a cache that is no longer than it."""
        n, rows = int(self.lengths[b]), slice(b, b + 1)
        seen = None if self.seen is None else self.seen[rows, :n]
        cached = (part[rows, :n] for part in self.cached or (self.c, self.k))
        parts = self.q[:, rows], self.r[:, rows], *cached, self.lengths[rows]
        return latent_decode(*parts, seen, scaling=SCALING, **options)

    def pages(self, page: int, flat: bool = False, room: int = 0, **options):
        """The same from a paged cache, in permuted pages; with page 1 also from flat lists of slots.

        room: pages that the table has besides, -1 as all that are not used.
        """
        (B, S, C), R = self.c.shape, self.k.shape[2]
        count = -(-S // page)
        table = torch.randperm(B * count, generator=torch.Generator().manual_seed(1)).to(DEVICE).view(B, count)
        halves = [self.c.new_full((B * count * page, C // 2 + R // 2), float("nan")) for _ in range(2)]
        for b, n in enumerate(self.lengths.tolist()):
            slots = table[b, torch.arange(n, device=DEVICE) // page] * page + torch.arange(n, device=DEVICE) % page
            for half, c, k in zip(halves, self.c[b, :n].chunk(2, -1), self.k[b, :n].chunk(2, -1), strict=True):
                half[slots] = torch.cat((c, k), dim=-1)
            table[b, -(-n // page) :] = -1 if room else 2**30  # never to be followed
        if room:
            table = torch.nn.functional.pad(table, (0, room), value=-1).int()
        if flat:
            starts = torch.cat((self.lengths.new_zeros(1), self.lengths.cumsum(0)))[:-1]
            table = torch.cat([row[:n] for row, n in zip(table, self.lengths.tolist(), strict=True)])
            options |= {"starts_B": starts, "longest": S}
        return latent_decode_pages(self.q, self.r, *halves, table, page, self.lengths, scaling=SCALING, **options)


def plain_attention(step: Step, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """softmax(q·cᵀ + r·kᵀ)·c and the log-sum-exp, in `dtype`; zeros and -inf for a token that sees nothing."""
    q, r, c, k = (x.nan_to_num().to(dtype) for x in (step.q, step.r, step.c, step.k))
    T, S = q.shape[2], c.shape[1]
    n, t = torch.arange(S, device=DEVICE), torch.arange(T, device=DEVICE)
    shown = n < (step.lengths[:, None] - (T - 1) + t)[..., None]
    if step.seen is not None:
        shown = shown & step.seen[:, None]
    # heads beside tokens: nothing of the cache is repeated for them
    q, r = (x.movedim(0, 2).flatten(1, 2) for x in (q, r))
    scores = ((q @ c.mT + r @ k.mT) * SCALING).masked_fill(~shown.repeat_interleave(len(step.q), dim=1), float("-inf"))
    weights = scores.softmax(dim=-1).nan_to_num()
    out, lse = weights @ c, scores.double().logsumexp(dim=-1)
    return tuple(x.unflatten(1, (T, len(step.q))).movedim(2, 0) for x in (out, lse))


def assert_within_budget(got, step: Step):
    """Not further from float64 than twice what plain PyTorch in the same dtype is, plus two ulps.

    In float32 on a GPU eight times: there scores are chains of 256 additions, which cuBLAS cuts into shorter ones (an
    H100 has shown up to 7.1 times).
    """
    out, lse = got
    exact, exact_lse = plain_attention(step, torch.float64)
    plain = plain_attention(step, out.dtype)[0]
    times = 8 if GPU and out.dtype == torch.float32 else 2
    allowed = times * (plain.double() - exact).norm() + 2 * ULP[out.dtype] * exact.norm()
    assert out.isfinite().all()
    error = (out.double() - exact).norm()
    assert error <= allowed, f"{(error / allowed).item():.2f} times the budget"
    close = 2e-5 if out.dtype == torch.float32 else 4 * ULP[out.dtype]  # scores of up to 30
    torch.testing.assert_close(lse.double(), exact_lse, rtol=close, atol=close)


# heads, batch, new tokens, C, R, S: rows up to 16, 32 and 64, several blocks of them; all numbers of tokens
SHAPES = [
    (16, 3, 1, 64, 32, 100), (1, 2, 1, 32, 16, 5), (40, 2, 2, 32, 0, 50), (20, 2, 3, 32, 8, 150),
    (128, 1, 1, 32, 16, 90), (5, 4, 8, 32, 16, 40), (24, 2, 5, 32, 64, 64), (64, 2, 4, 32, 16, 33),
    (4, 2, 6, 128, 64, 48), (3, 2, 7, 32, 2, 31),
]  # fmt: skip


@pytest.mark.parametrize("seen", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_definition(shape, seen):
    step = Step(*shape, seen=seen)
    assert_within_budget(step.run(), step)
    assert_within_budget(step.run(batch_invariant=True), step)


@pytest.fixture(params=["converted", "from bytes"])
def float8_way(request, monkeypatch):
    """Both ways to read float8, whatever the device has instructions for."""
    if request.param == "from bytes":
        monkeypatch.setattr(kernels, "converts_float8", lambda x: False)


@pytest.mark.parametrize("seen", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_latents_in_float8(shape, seen, float8_way):
    step = Step(*shape, seen=seen, float8=True)
    for options in ({}, {"batch_invariant": True}):
        got = step.run(**options)
        assert_within_budget(got, step)
        if not GPU:  # which has other tiles for them
            full = latent_decode(step.q, step.r, step.c, step.k, step.lengths, step.seen, scaling=SCALING, **options)
            assert all(torch.equal(a, b) for a, b in zip(got, full, strict=True))


def test_every_number_of_float8_is_read(float8_way):
    """The output of a query that sees one key is its latent."""
    every = torch.arange(256, dtype=torch.uint8)[torch.arange(256) % 128 < 127].view(torch.float8_e4m3fn)
    c8 = torch.cat((every, every[:2])).view(8, 1, 32).to(DEVICE)
    k = torch.zeros(8, 1, 2 + 8, device=DEVICE)
    k[..., 2] = torch.exp2(torch.tensor([-126.0, -50, -9, -1, 0, 1, 40, 118], device=DEVICE)).unsqueeze(1)
    q, lengths = torch.zeros(1, 8, 1, 32, device=DEVICE), torch.ones(8, dtype=torch.int32, device=DEVICE)
    out, _ = latent_decode(q, q[..., :2], c8, k, lengths, scaling=SCALING)
    assert torch.equal(out[0], dequantised(c8, k)[0])


@pytest.mark.parametrize("page", [1, 5, 16, 32])
@pytest.mark.parametrize("shape", SHAPES[:4])
def test_pages(shape, page):
    step = Step(*shape)
    assert_within_budget(step.pages(page), step)


@pytest.mark.parametrize("page", [5, 64])
def test_the_table_of_a_padded_batch(page):
    """As continuous batching has it: -1 behind a request's pages and in rows of no request, room for far more."""
    step = Step(16, 5, 1, 32, 16, 150)
    step.lengths[3:] = 0
    (out, lse), full = step.pages(page, room=40), step.pages(page)
    assert_within_budget((out, lse), step)
    assert not out[:, 3:].any() and (lse[:, 3:] == float("-inf")).all()
    torch.testing.assert_close(out, full[0], rtol=1e-5, atol=1e-5)  # in other splits


def test_flat_lists_of_slots():
    step = Step(*SHAPES[0])
    assert_within_budget(step.pages(1, flat=True), step)


@pytest.mark.parametrize("float8", [False, True])
@pytest.mark.parametrize("shape", [(16, 5, 1, 32, 16, 70), (40, 5, 2, 32, 16, 70)])
def test_a_row_alone_equals_the_row_in_a_batch(shape, float8, monkeypatch):
    monkeypatch.setattr(kernels, "INVARIANT_KEYS", 16)
    if not GPU:  # BLAS rounds a row by its place in the matrix
        monkeypatch.setattr("numpy.matmul", lambda a, b, dtype=None: (a[:, :, None] * b[None]).sum(1, dtype=dtype))
    step = Step(*shape, float8=float8)
    out, lse = step.run(batch_invariant=True)
    for b in range(shape[1]):
        alone, alone_lse = step.alone(b, batch_invariant=True)
        assert torch.equal(alone[:, 0], out[:, b]) and torch.equal(alone_lse[:, 0], lse[:, b])


def test_runs_are_equal_bit_for_bit():
    step = Step(*SHAPES[0], seen=True)
    first = step.run()
    for _ in range(RUNS - 1):
        assert all(torch.equal(a, b) for a, b in zip(step.run(), first, strict=True))


@pytest.mark.parametrize("heads", [16, 40])
def test_a_token_that_sees_nothing_gets_zeros(heads):
    step = Step(heads, 3, 1, 32, 16, 40, seen=True)
    step.seen[1] = False
    step.lengths[2] = 0
    for options in ({}, {"batch_invariant": True}):
        out, lse = step.run(**options)
        assert not out[:, 1:].any() and (lse[:, 1:] == float("-inf")).all()
        assert out[:, 0].isfinite().all() and out[:, 0].any()


def test_one_split_and_many_agree(monkeypatch):
    step = Step(16, 2, 2, 32, 16, 200)
    monkeypatch.setattr(kernels, "_splits", lambda *args: 1)
    assert_within_budget(step.run(), step)
    for splits in (2, 5, 128):  # some are empty
        monkeypatch.setattr(kernels, "_splits", lambda *args, splits=splits: splits)
        assert_within_budget(step.run(), step)


def test_views_of_longer_buffers_are_read_in_place():
    step = Step(16, 3, 1, 32, 16, 50)
    expected = step.run()
    both = torch.full((3, 80, 48), float("nan"), device=DEVICE)
    both[:, :50, :32], both[:, :50, 32:] = step.c, step.k
    step.c, step.k = both[:, :50, :32], both[:, :50, 32:]
    assert all(torch.equal(a, b) for a, b in zip(step.run(), expected, strict=True))


def test_nothing_to_do():
    step = Step(4, 2, 1, 32, 16, 8)
    step.q, step.r, step.c, step.k = step.q[:, :0], step.r[:, :0], step.c[:0], step.k[:0]
    step.lengths = step.lengths[:0]
    assert step.run()[0].shape == (4, 0, 1, 32)


def test_the_operator_is_registered_properly():
    step = Step(16, 2, 1, 32, 16, 20)
    c0, c1 = step.c.chunk(2, -1)
    rest = (None, step.lengths, None, None, None, 0, 20, SCALING, False)
    torch.library.opcheck(kernels._latent_decode.registered, (step.q, step.r, c0, c1, step.k, *rest))
    c8, k = Step(16, 2, 1, 32, 16, 20, float8=True).cached
    known = ("test_autograd_registration", "test_faketensor")  # the others multiply what they are given
    arguments = step.q, step.r, *c8.tensor_split(2, -1), k, *rest
    torch.library.opcheck(kernels._latent_decode.registered, arguments, test_utils=known)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((1, 512, 64, torch.float64, DEVICE), "the cache is torch.float64; the kernel takes bfloat16"),
        ((9, 512, 64, torch.float32, DEVICE), "9 new tokens are more than 8"),
        ((1, 48, 64, torch.float32, DEVICE), "kv_lora_rank=48 is not a power of two from 32 to 512"),
        ((1, 1024, 64, torch.float32, DEVICE), "kv_lora_rank=1024 is not a power of two from 32 to 512"),
        ((1, 512, 7, torch.float32, DEVICE), "qk_rope_head_dim=7 is not even, or more than 128"),
    ],
)  # fmt: skip
def test_refusals(arguments, message):
    *numbers, device = arguments
    assert kernels.why_not(*numbers, torch.device(device)).startswith(message)


def test_refusal_off_the_gpu(monkeypatch):
    monkeypatch.setattr(kernels, "_INTERPRETED", False)
    step = Step(4, 1, 1, 32, 16, 8)
    step.q, step.r = step.q.cpu(), step.r.cpu()
    with pytest.raises(
        ValueError, match="the cache is on 'cpu', and Triton runs on CUDA and ROCm devices; use mla_impl"
    ):
        step.run()


# What runs for many rows on a Hopper: kernels_wide.py's kernel, which the interpreter cannot run, or this file's.

HOPPER_ROWS = {"H": 64, "B": 8, "T": 1, "C": 512, "R": 64, "S": 512}


@pytest.fixture
def asked(monkeypatch) -> list[str]:
    """The kernels that `split_decode` launches from here on, as on a Hopper; none runs."""
    from lamoe.kernels_wide import fits

    class Kernel:
        def __getitem__(self, grid):
            return lambda *arguments, **options: names.append("_decode_kernel")

    names = []
    found = [fits, lambda *arguments: names.append("_wide_kernel")]
    monkeypatch.setattr(kernels, "_decode_kernel", Kernel())
    monkeypatch.setattr(kernels, "_device", lambda x, float8: kernels.TABLE[90])
    monkeypatch.setattr(kernels, "_wide", lambda device: found)
    return names


def launch(page=0, flat=False, room=0, shift=0, dtype=torch.bfloat16, batch_invariant=False, **shape):
    """Launch a first stage over rows with `room` more slots for keys, `shift` numbers off the beginning; or pages."""
    H, B, T, C, R, S = {**HOPPER_ROWS, **shape}.values()
    q, r = torch.empty(H, B, T, C, dtype=dtype), torch.empty(H, B, T, R, dtype=dtype)
    table = starts = None
    if page:
        first, second = (torch.empty(B * S, (C + R) // 2, dtype=dtype) for _ in range(2))
        halves = first[:, : C // 2], second[:, : C // 2], first[:, C // 2 :], second[:, C // 2 :]
        table, starts = torch.zeros(B, S // page, dtype=torch.int32), torch.zeros(B) if flat else None
    else:
        c = torch.empty(shift + B * S * C, dtype=dtype)[shift:].view(B, S, C)
        halves = *c.chunk(2, -1), torch.empty(B, S + room, R, dtype=dtype)[:, :S], None
    lengths = torch.ones(B, dtype=torch.int32)
    kernels.split_decode(q, r, *halves, lengths, None, table, starts, page, S, SCALING, batch_invariant)


@pytest.mark.parametrize(
    "options",
    [
        {}, {"H": 128}, {"H": 17}, {"H": 16, "T": 2}, {"H": 20, "T": 4}, {"dtype": torch.float16}, {"B": 1},
        {"batch_invariant": True},
        {"C": 256, "R": 32}, {"C": 128}, {"page": 64}, {"page": 256}, {"page": 64, "R": 32}, {"page": 64, "R": 0},
        {"S": 128, "B": 200},
    ],
    ids=str,
)  # fmt: skip
def test_many_rows_take_the_wide_kernel(asked, options):
    launch(**options)
    assert asked == ["_wide_kernel"]


@pytest.mark.parametrize(
    "options",
    [
        {"H": 16}, {"dtype": torch.float32}, {"C": 64}, {"R": 8}, {"R": 128}, {"page": 16},
        {"page": 32}, {"page": 64, "flat": True}, {"page": 64, "R": 16}, {"page": 64, "R": 128}, {"room": 8},
        {"shift": 1},
    ],
    ids=str,
)  # fmt: skip
def test_what_the_wide_kernel_does_not_take(asked, options):
    launch(**options)
    assert asked == ["_decode_kernel"]


def test_a_kernel_that_does_not_compile_is_tried_once(asked):
    """Gluon is experimental: its names and signatures may differ in another Triton."""
    found, tries = kernels._wide(None), []

    def fail(*arguments):
        tries.append(arguments)
        raise TypeError("async_load() got an unexpected keyword argument")

    found[1] = fail
    for _ in range(2):
        launch()
    assert asked == ["_decode_kernel"] * 2 and len(tries) == 1


def test_no_memory_is_not_a_kernel_that_does_not_compile(asked):
    found = kernels._wide(None)

    def fail(*arguments):
        raise RuntimeError("Triton Error [CUDA]: out of memory")

    found[1] = fail
    with pytest.raises(RuntimeError, match="out of memory"):
        launch()
    assert asked == [] and found


@pytest.fixture
def load(monkeypatch):
    """Look for the wide kernel as on a GPU of some compute capability, with its module imported anew."""
    monkeypatch.setattr(kernels, "_INTERPRETED", False)
    monkeypatch.delitem(sys.modules, "lamoe.kernels_wide", raising=False)

    def load(major=9, device="cuda"):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (major, 0))
        return kernels._wide.__wrapped__(torch.device(device))

    return load


def test_the_wide_kernel_is_for_hopper(load, monkeypatch):
    assert load(8) == load(10) == load(12) == load(9, "cpu") == []
    assert "lamoe.kernels_wide" not in sys.modules  # nothing of Gluon runs where it is of no use
    assert [function.__name__ for function in load()] == ["fits", "launch"]
    monkeypatch.setattr(kernels, "_INTERPRETED", True)
    assert load() == []
    monkeypatch.setattr(kernels, "_INTERPRETED", False)
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert load() == []


GLUON = "triton.experimental.gluon.language.nvidia.hopper"


@pytest.mark.parametrize("missing", ["triton.experimental.gluon", GLUON, "triton.experimental.gluon.nvidia.hopper"])
def test_a_triton_without_gluon_for_hopper(load, monkeypatch, missing):
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ImportError, match="The wide decode kernel needs a Triton with Gluon for Hopper: pip install"):
        importlib.import_module("lamoe.kernels_wide")
    assert load() == []


def test_a_gluon_with_other_names(load, monkeypatch):
    for name in ("async_load", "async_copy_global_to_shared"):
        monkeypatch.delattr(f"{GLUON}.tma.{name}", raising=False)
    assert load() == []


# What needs a GPU.

WIDTHS = [(512, 64), (256, 64), (128, 32), (512, 0), (512, 32)]


def gpu(function):
    for mark in on_gpu:
        function = mark(function)
    return function


@gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("T", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("H", [16, 20, 24, 40, 64, 128])
def test_gpu_definition(H, T, dtype):
    for B, S in ((1, 3000), (7, 700), (200 if H * T <= 160 else 70, 130)):
        for float8 in (False, True):
            step = Step(H, B, T, 512, 64, S, dtype, float8=float8)
            assert_within_budget(step.run(), step)


@gpu
@pytest.mark.parametrize("C, R", WIDTHS)
@pytest.mark.parametrize("H", [16, 24, 128])
def test_gpu_widths_and_caches(H, C, R):
    step = Step(H, 5, 2, C, R, 900, torch.bfloat16)
    assert_within_budget(step.run(batch_invariant=True), step)
    for page in (1, 16, 64, 256):
        assert_within_budget(step.pages(page), step)
    assert_within_budget(step.pages(256, room=508), step)
    assert_within_budget(step.pages(1, flat=True), step)
    for float8 in (False, True):
        seen = Step(H, 5, 2, C, R, 900, torch.bfloat16, seen=True, float8=float8)
        assert_within_budget(seen.run(), seen)


@gpu
@pytest.mark.parametrize("C, R", WIDTHS)
@pytest.mark.parametrize("H", [16, 20, 128])
def test_gpu_latents_in_float8(H, C, R, float8_way):
    for B, S in ((2, 3000), (140, 200)):
        step = Step(H, B, 1, C, R, S, torch.bfloat16, float8=True)
        first = step.run()
        assert_within_budget(first, step)
        assert_within_budget(step.run(batch_invariant=True), step)
        for _ in range(RUNS):
            assert all(torch.equal(a, b) for a, b in zip(step.run(), first, strict=True))


@gpu
@pytest.mark.parametrize("float8", [False, True])
@pytest.mark.parametrize("H", [16, 40, 128])
def test_gpu_a_row_alone_equals_the_row_in_a_batch_of_128(H, float8):
    step = Step(H, 128, 1, 512, 64, 3000, torch.bfloat16, float8=float8)
    out, _ = step.run(batch_invariant=True)
    for b in (0, 1, 64, 127):
        assert torch.equal(step.alone(b, batch_invariant=True)[0][:, 0], out[:, b])
    for _ in range(10):
        assert torch.equal(step.run(batch_invariant=True)[0], out)


@gpu
@pytest.mark.parametrize("H, float8", [(16, False), (16, True), (128, False)])
def test_gpu_graph_replays_for_other_lengths(H, float8):
    step = Step(H, 4, 1, 512, 64, 2000, torch.bfloat16, float8=float8)
    step.run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, _ = step.run()
    for lengths in ([1, 2000, 77, 64], [5, 6, 7, 8]):
        for part in step.cached or (step.c, step.k):
            part.copy_(part.to(torch.bfloat16).nan_to_num())
        step.lengths.copy_(torch.tensor(lengths))
        graph.replay()
        assert torch.equal(out, step.run()[0])


@pytest.fixture
def launches(monkeypatch) -> list[int]:
    """How many splits each launch of the wide kernel had, from here on; one that fails does not count."""
    (fits, real), splits = kernels._wide(torch.empty(0, device=DEVICE).device), []

    def count(*arguments):
        real(*arguments)
        splits.append(arguments[10])

    monkeypatch.setattr(kernels, "_wide", lambda device, found=[fits, count]: found)
    return splits


def on_hopper(function):
    return gpu(pytest.mark.skipif(not HOPPER, reason="needs a Hopper")(function))


@on_hopper
@pytest.mark.parametrize(
    "H, T, C, R, dtype",
    [
        *((H, T, 512, 64, torch.bfloat16) for H, T in ((64, 1), (128, 1), (20, 4), (5, 8))),
        *((64, 1, C, R, torch.bfloat16) for C, R in WIDTHS[1:]),
        (64, 1, 512, 64, torch.float16),
    ],
)  # fmt: skip
def test_gpu_wide_kernel(H, T, C, R, dtype, launches, monkeypatch):
    """In several splits and in one, some empty, some of one key; with memory poisoned that nobody has written."""
    poison(monkeypatch)
    rows = 1 if R else 0  # of no width they are no grid
    long, many = [3000, T, 64, 65, 1024, 1025, 2999, 700], [T, T, 63, 64, 65, 127, 128, 129, 130, 100] * 7
    for S, lengths, calls in ((3000, long, ((64, {}), (256, {"batch_invariant": True}))), (130, many, ((256, {}),))):
        for seen in (False, True):
            step = Step(H, len(lengths), T, C, R, S, dtype, seen=seen, lengths=lengths)
            for page, options in calls:
                del launches[:]
                assert_within_budget(step.run(**options), step)
                if not seen:
                    assert_within_budget(step.pages(page, **options), step)
                assert len(launches) == rows + (not seen)
                assert all((splits > 1) == (S == 3000) for splits in launches)


@on_hopper
def test_gpu_wide_kernel_of_fewer_keys_than_a_tile(launches):
    step = Step(64, 4, 1, 512, 64, 40, torch.bfloat16, lengths=[40, 0, 1, 39])
    out, lse = step.run(batch_invariant=True)
    assert_within_budget((out, lse), step)
    assert launches == [1] and not out[:, 1].any() and (lse[:, 1] == float("-inf")).all()


@on_hopper
def test_gpu_what_the_wide_kernel_does_not_take(launches):
    step = Step(64, 16, 1, 512, 64, 1000, torch.bfloat16)
    for got in (step.pages(16), step.pages(1, flat=True)):
        assert_within_budget(got, step)
    both = torch.full((16, 1000, 577), float("nan"), device=DEVICE, dtype=torch.bfloat16)
    both[..., :512], both[..., 512:576] = step.c, step.k
    step.c, step.k = both[..., :512], both[..., 512:576]  # slots of no whole 16 bytes
    assert_within_budget(step.run(), step)
    wide = Step(64, 16, 1, 512, 128, 1000, torch.bfloat16)
    assert_within_budget(wide.run(), wide)
    assert_within_budget(wide.pages(64), wide)
    assert not launches


@on_hopper
@pytest.mark.parametrize("H", [64, 128])
def test_gpu_wide_kernel_runs_are_equal_bit_for_bit(H, launches):
    step = Step(H, 16, 1, 512, 64, 2000, torch.bfloat16)
    for call in (step.run, lambda: step.pages(64)):
        first = call()
        for _ in range(RUNS - 1):
            assert all(torch.equal(a, b) for a, b in zip(call(), first, strict=True))
    assert len(launches) == 2 * RUNS and min(launches) > 1


@on_hopper
def test_gpu_a_kernel_that_does_not_compile_leaves_the_other(monkeypatch):
    found = [lambda *arguments: True, lambda *arguments: [][0]]
    monkeypatch.setattr(kernels, "_wide", lambda device: found)
    step = Step(64, 16, 1, 512, 64, 1000, torch.bfloat16)
    assert_within_budget(step.run(), step)
    assert not found
