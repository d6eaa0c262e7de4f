"""The kernels of a decode step against norm, linear and attention in float64; a fused layer against the layer."""

import pytest
import torch
import torch.nn.functional as F

from lamoe import modeling_lamoe
from lamoe.attention import LamoeRMSNorm, rotate_pairs
from lamoe.cache import GrowingCache
from lamoe.float8 import FLOAT8, dequantised, quantised
from tests.kernels import assert_within_budget
from tests.tiny import lamoe_model, random_ids

kernels = pytest.importorskip("lamoe.kernels_step")
latent_decode = pytest.importorskip("lamoe.kernels_attention").latent_decode

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"  # on CPU Triton interprets
DTYPES = [torch.bfloat16, torch.float16, torch.float32] if GPU else [torch.float32]
EPS = 1e-5


def random(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def norm(x, weight):
    return F.rms_norm(x, weight.shape, weight, EPS)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("N, D, rows", [(1, 40, (50, 7)), (3, 32, (8, 16)), (4, 24, (5, None)), (2, 1, (3, 2))])
def test_norm_linear(N, D, rows, dtype):
    x, weight = random(N, D + 5, dtype=dtype)[:, :D], random(D, seed=1, dtype=dtype)
    w0, w1 = (None if r is None else random(r, D, seed=2 + r, dtype=dtype) for r in rows)
    both = w0 if w1 is None else torch.cat((w0, w1))
    got = kernels.norm_linear(x, weight, EPS, w0, w1)
    exact = norm(x.double(), weight.double()) @ both.double().T
    assert_within_budget("products", got, norm(x, weight) @ both.T, exact)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_norm_router(dtype):
    x, weight, router = random(3, 40, dtype=dtype), random(40, seed=1, dtype=dtype), random(9, 40, seed=2)
    normed, logits = kernels.norm_router(x, weight, EPS, router)
    exact = norm(x.double(), weight.double())
    assert_within_budget("normed", normed, norm(x, weight), exact)
    assert_within_budget("logits", logits, norm(x, weight).float() @ router.T, exact @ router.double().T)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_linear_add(dtype):
    x, weight, residual = random(2, 40, dtype=dtype), random(21, 40, seed=1, dtype=dtype), random(2, 21, dtype=dtype)
    exact = residual.double() + x.double() @ weight.double().T
    assert_within_budget("sum", kernels.linear_add(x, weight, residual), residual + x @ weight.T, exact)


def test_nothing_in_nothing_out():
    assert kernels.norm_linear(random(0, 8), random(8), EPS, random(3, 8), None).shape == (0, 3)
    assert kernels.linear_add(random(0, 8), random(3, 8), random(0, 3)).shape == (0, 3)


@pytest.mark.parametrize("T, one_position", [(1, True), (3, False)])
@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("P, R", [(6, 0), (16, 8), (12, 20)])
def test_write_latents(P, R, interleaved, T, one_position):
    B, H, C, room = 2, 19, 32, 11
    kv, q = random(B, T, C + R + 3)[..., : C + R], random(B, T, H, P + R, seed=1).transpose(1, 2)
    plain, q = q.split((P, R), dim=-1)
    up_key = random(H, P + 5, C, seed=2)[:, :P]
    cos, sin = (random(1 if one_position else B, T, R // 2, seed=3 + i) for i in range(2))
    layer = LamoeRMSNorm(C, EPS).to(DEVICE)
    layer.weight.data = random(C, seed=5)
    lengths = torch.tensor([5, 11], device=DEVICE, dtype=torch.int32)
    turned = rotate_pairs(torch.cat((q, kv[:, None, :, C:]), dim=1), cos, sin, interleaved)
    for absorbs in ((), (plain, up_key)):
        c, k = (torch.full((B, room, width), float("nan"), device=DEVICE) for width in (C, R))
        arguments = kv, layer.weight.data, EPS, q, cos, sin, lengths, c, k, interleaved, *absorbs
        r, latent = kernels.write_latents(*arguments)
        torch.testing.assert_close(r, turned[:, :H].transpose(0, 1))
        expected = torch.einsum("bhtp,hpc->hbtc", plain, up_key) if absorbs else r.new_empty(0)
        torch.testing.assert_close(latent, expected, rtol=1e-5, atol=1e-5)
        for b, last in enumerate(lengths.tolist()):
            torch.testing.assert_close(c[b, last - T : last], layer(kv[b, :, :C]))
            torch.testing.assert_close(k[b, last - T : last], turned[b, H])
            for part in (c, k):
                assert part[b, : last - T].isnan().all() and part[b, last:].isnan().all()


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16][: len(DTYPES) + (not GPU)], ids=str)
@pytest.mark.parametrize("C, R", [(32, 0), (48, 8), (512, 20)])
def test_write_latents_in_float8(C, R, dtype):
    """Bit for bit what `quantised` makes of the latents that the kernel writes in full."""
    B, H, T, room = 3, 5, 2, 11
    kv, q = random(B, T, C + R, dtype=dtype), random(B, H, T, R, seed=1, dtype=dtype)
    cos, sin, weight = random(B, T, R // 2, seed=3), random(B, T, R // 2, seed=4), random(C, seed=5, dtype=dtype)
    weight *= torch.exp2(torch.linspace(-14, 3, C, device=DEVICE)).to(dtype)
    kv[1, 1] = 0
    lengths = torch.tensor([5, 11, 2], device=DEVICE, dtype=torch.int32)
    full, rounded = ([torch.zeros(B, room, width, device=DEVICE, dtype=dtype) for width in (C, R)] for _ in range(2))
    rounded = [x.clone() for x in quantised(*rounded)]
    untouched = [x.clone() for x in rounded]
    arguments = kv, weight, EPS, q, cos, sin, lengths
    expected = kernels.write_latents(*arguments, *full, True)
    got = kernels.write_latents(*arguments, *rounded, True)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    for b, last in enumerate(lengths.tolist()):
        new = slice(last - T, last)
        for part, made, kept in zip(rounded, quantised(*(x[b, new] for x in full)), untouched, strict=True):
            kept[b, new] = made
            assert torch.equal(part[b].view(torch.uint8), kept[b].view(torch.uint8))
    kv[0, 0, 3] = float("nan")
    kernels.write_latents(*arguments, *rounded, True)
    read = dequantised(*rounded)[0]
    assert read[0, 3].isnan().all() and not read[0, 4].isnan().any()


def test_bytes_of_float8():
    """The nearest, or nearest even one: of all of float8, the middles between them, and their neighbours."""
    every = torch.arange(127, dtype=torch.uint8).view(FLOAT8).float()
    middles = (every[1:] + every[:-1]) / 2
    beside = [middles.nextafter(torch.tensor(end)) for end in (0.0, 448.0)]
    x = torch.cat((every, middles, *beside, torch.rand(7) * 2**-12)).to(DEVICE)  # 512, whose mean is exact
    none = x.new_zeros(2, 1, 1, 0)
    c, k = quantised(x.new_zeros(2, 1, len(x)), none[:, 0])
    signs = torch.tensor([1.0, -1.0], device=DEVICE).view(2, 1, 1).repeat(1, 1, len(x))  # of which the norm is one
    lengths = torch.ones(2, dtype=torch.int32, device=DEVICE)
    kernels.write_latents(signs, x, 0.0, none, none[:, 0], none[:, 0], lengths, c, k, True)
    assert torch.equal(c.view(torch.uint8), quantised(signs * x, none[:, 0])[0].view(torch.uint8))
    assert torch.equal(dequantised(c, k)[0][:, 0, :127], signs[:, 0, :127] * every.to(DEVICE))


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16][: len(DTYPES) + (not GPU)], ids=str)
def test_the_greatest_latents_stay_finite_in_float8(dtype):
    info = torch.finfo(dtype)
    weight = torch.tensor([info.max, -info.max, 1.0, 0.0] * 8, device=DEVICE, dtype=dtype)
    none, ones = weight.new_zeros(1, 1, 1, 0), weight.new_ones(1, 1, 32)  # of which the norm is one
    c, k = quantised(torch.zeros_like(ones), none[:, 0])
    lengths = torch.ones(1, dtype=torch.int32, device=DEVICE)
    kernels.write_latents(ones, weight, 0.0, none, none[:, 0], none[:, 0], lengths, c, k, True)
    expected = quantised(weight, weight[:0])
    assert torch.equal(c[0, 0].view(torch.uint8), expected[0].view(torch.uint8)) and torch.equal(k[0, 0], expected[1])
    assert dequantised(c, k)[0].isfinite().all()


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("R", [0, 8, 20])
def test_write_pages(R, interleaved):
    """To the slots that are named, in halves; a token without one gets its queries, and is written nowhere."""
    N, H, C, slots = 5, 19, 32, 12
    kv, q = random(1, N, C + R + 3)[..., : C + R], random(1, N, H, R + 6, seed=1).transpose(1, 2)[..., 6:]
    cos, sin = (random(1, N, R // 2, seed=3 + i) for i in range(2))
    layer = LamoeRMSNorm(C, EPS).to(DEVICE)
    layer.weight.data = random(C, seed=5)
    written = torch.tensor([5, 0, -1, 8, -1], device=DEVICE)
    rows = torch.full((slots, (C + R) // 2), float("nan"), device=DEVICE)
    first, second = rows[:-2], rows[2:]  # views of one tensor, as a paged cache's
    expected = rows.clone()
    r = kernels.write_pages(kv, layer.weight.data, EPS, q, cos, sin, written, first, second, interleaved)
    turned = rotate_pairs(torch.cat((q, kv[:, None, :, C:]), dim=1), cos, sin, interleaved)
    torch.testing.assert_close(r, turned[:, :H].transpose(0, 1))
    latents, keys = layer(kv[0, :, :C]).detach().chunk(2, -1), turned[0, H].chunk(2, -1)
    for half, c, k in zip((expected[:-2], expected[2:]), latents, keys, strict=True):
        half[written[written >= 0]] = torch.cat((c, k), dim=-1)[written >= 0]
    torch.testing.assert_close(rows, expected, equal_nan=True)


@pytest.mark.parametrize("float8", [False, True])
@pytest.mark.parametrize("V, B, S", [(8, 2, 150), (20, 3, 7)])  # several splits, and one
def test_decode_values(V, B, S, float8):
    H, T, C, R = 3, 2, 32, 8
    q, r, c, k = random(H, B, T, C), random(H, B, T, R, seed=1), random(B, S, C, seed=2), random(B, S, R, seed=3)
    if float8:
        c, k = quantised(c, k)
    up_value = random(H, V + 4, C, seed=4)[:, 4:]
    lengths = torch.arange(S - B + 1, S + 1, device=DEVICE, dtype=torch.int32)
    out, _ = latent_decode(q, r, c, k, lengths, scaling=0.2)
    got = kernels.decode_values(q, r, c, k, lengths, None, up_value, scaling=0.2)
    torch.testing.assert_close(got, torch.einsum("hbtc,hvc->bthv", out, up_value).flatten(2), rtol=1e-4, atol=1e-5)


def test_operators():
    x, weight, lengths = random(2, 16), random(16, seed=1), torch.tensor([3, 4], device=DEVICE, dtype=torch.int32)
    torch.library.opcheck(kernels.norm_linear.registered, (x, weight, EPS, random(5, 16), random(3, 16)))
    torch.library.opcheck(kernels.norm_router.registered, (x, weight, EPS, random(5, 16)))
    torch.library.opcheck(kernels.linear_add.registered, (x, random(5, 16), random(2, 5)))
    kv, q, angles = random(2, 1, 48), random(2, 4, 1, 16), random(1, 1, 8)
    c, k = random(2, 6, 32), random(2, 6, 16)
    written = (kv, random(32), EPS, q, angles, angles, lengths, c, k, True)
    torch.library.opcheck(kernels.write_latents.registered, written)
    torch.library.opcheck(kernels.write_latents.registered, (*written, random(2, 4, 1, 6), random(4, 6, 32)))
    known = ("test_autograd_registration", "test_faketensor")  # the others multiply what they are given
    torch.library.opcheck(kernels.write_latents.registered, (*written[:7], *quantised(c, k), True), test_utils=known)
    slots = torch.tensor([3, -1], device=DEVICE), random(6, 24), random(6, 24, seed=1)
    torch.library.opcheck(kernels.write_pages.registered, (*written[:6], *slots, True))
    latent, turned = random(4, 2, 1, 32), random(4, 2, 1, 16)
    torch.library.opcheck(
        kernels._decode_values.registered, (latent, turned, c, k, lengths, None, random(4, 8, 32), 0.2)
    )


@pytest.mark.parametrize(
    "family, B, T, latent_dtype",
    [("v3", 1, 1, None), ("v2-lite", 3, 1, None), ("glm-4.7-flash", 2, 1, FLOAT8), ("v3", 2, 2, None)],
)
def test_a_fused_layer_is_the_layer(family, B, T, latent_dtype, tmp_path, monkeypatch):
    """Recorded steps, in the order of a recording, against the same steps by the layers' own forward."""
    _, model = lamoe_model(family, tmp_path, torch.float32, kv_lora_rank=32)
    model.config.mla_implementation = "triton"
    model.set_experts_implementation("lamoe" if GPU else "grouped_mm")  # the interpreter takes long
    model.to(DEVICE)
    ids = random_ids(B, 10 + 2 * T).to(DEVICE)
    calls, fused = [], modeling_lamoe.few_tokens_layer

    def counted(*arguments):
        calls.append(arguments)
        return fused(*arguments)

    monkeypatch.setattr(modeling_lamoe, "few_tokens_layer", counted)

    @torch.no_grad()
    def logits(recorded: bool):
        cache, found = GrowingCache(config=model.config, latent_dtype=latent_dtype), []
        model(ids[:, :10], past_key_values=cache)
        for i in (10, 10 + T):
            step = {"input_ids": ids[:, i : i + T], "past_key_values": cache}
            if recorded:
                for layer in cache.layers:
                    layer.make_room(T)
                with cache.cursor_at(torch.full((1,), i, device=DEVICE)):
                    positions = torch.arange(i, i + T, device=DEVICE).expand(B, -1)
                    found.append(model(position_ids=positions, **step).logits)
                for layer in cache.layers:
                    layer.advance(T)
            else:
                found.append(model(**step).logits)
        return torch.cat(found, dim=1), [layer.keys.float() for layer in cache.layers]

    expected, latents = logits(False)
    assert not calls
    got, written = logits(True)
    assert len(calls) == 2 * model.config.num_hidden_layers
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    for a, b in zip(written, latents, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_what_is_not_fused(tmp_path):
    _, model = lamoe_model("v3", tmp_path, torch.float32)
    layer, x = model.model.layers[1], torch.zeros(1, 1, 32)
    assert modeling_lamoe.fuses(layer, x)
    assert not modeling_lamoe.fuses(layer, torch.zeros(5, 1, 32))
    assert not modeling_lamoe.fuses(layer, x.double())
    layer.self_attn.o_proj.bias = torch.nn.Parameter(torch.zeros(32))
    assert not modeling_lamoe.fuses(layer, x)
    layer.self_attn.o_proj.bias = None
    layer.self_attn.q_b_proj = torch.nn.Sequential(layer.self_attn.q_b_proj)
    assert not modeling_lamoe.fuses(layer, x)
