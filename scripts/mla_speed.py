"""What decoding over latents costs: one step of one layer's attention, and whom to compare with. For benchmark.py."""

import statistics
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from lamoe.attention import absorbed_attention
from lamoe.float8 import COLUMNS, FLOAT8, quantised
from lamoe.kernels_attention import latent_decode, latent_decode_pages
from lamoe.scripts.expert_speed import captured, copy_speed, milliseconds

C, R, PAGE = 512, 64, 64  # the published widths, and a page of FlashMLA
SHAPES = ((1, 1024), (1, 16384), (1, 65536), (8, 4096), (8, 65536), (32, 16384), (128, 4096), (128, 65536))
# bytes that lie between two uses of a cache, so that none is found in the L2 cache
COLD = 2**27


class Rival(NamedTuple):
    """Name; the output [H, B, T, C] or [B, T, H, C] of the i-th call; bytes of a cache; and whether the output is
    [H, B, T, C] of the sequences in their order, and so can be judged."""

    name: str
    call: Callable[[int], Tensor]
    bytes: int
    judged: bool = True


class Caches:
    """Several caches of one shape in bfloat16, each in rows and in permuted pages, and queries for all."""

    def __init__(self, heads: int, batch: int, context: int, new_tokens: int = 1):
        self.bytes = batch * context * (C + R) * 2
        self.float8_bytes = batch * context * (C + (R + COLUMNS) * 2)
        copies = max(1, min(8, -(-COLD // self.bytes)))
        self.calls = 8
        self.lengths = torch.full((batch,), context, dtype=torch.int32, device="cuda")
        self.scaling = (128 + R) ** -0.5
        shape = (heads, batch, new_tokens)
        self.q = torch.randn(*shape, C, device="cuda", dtype=torch.bfloat16)
        self.r = torch.randn(*shape, R, device="cuda", dtype=torch.bfloat16)
        self.rows = [torch.randn(batch, context, C + R, device="cuda", dtype=torch.bfloat16) for _ in range(copies)]
        pages = context // PAGE
        self.table = torch.randperm(batch * pages, device="cuda", dtype=torch.int32).view(batch, pages)

    def in_float8(self) -> list[tuple[Tensor, Tensor]]:
        """The same with latents in float8, as a GrowingCache holds them; enough of them to be cold."""
        batch, context, _ = self.rows[0].shape
        made = []
        for i in range(max(1, min(8, -(-COLD // self.float8_bytes)))):
            c8 = torch.empty(batch, context, C, device="cuda", dtype=FLOAT8)
            values = torch.empty(batch, context, R + COLUMNS, device="cuda", dtype=torch.bfloat16)
            for row, *parts in zip(self.rows[i % len(self.rows)], c8, values, strict=True):
                for part, states in zip(parts, quantised(*row.split((C, R), dim=-1)), strict=True):
                    part.copy_(states)
            made.append((c8, values))
        return made

    def error(self, out: Tensor) -> float:
        """How far the first sequence's [H, T, C] of `out` [H, B, T, C] is from attention over its unrounded cache in
        float64, relative to that."""
        c, k = self.rows[0][0].double().split((C, R), dim=-1)
        q, r, got = (x[:, 0].double() for x in (self.q, self.r, out))
        T, S = q.shape[1], len(c)
        limit = S - T + torch.arange(T, device="cuda").unsqueeze(1)
        scores = (q @ c.mT + r @ k.mT).masked_fill(torch.arange(S, device="cuda") > limit, float("-inf"))
        exact = (scores * self.scaling).softmax(dim=-1) @ c
        return ((got - exact).norm() / exact.norm()).item()

    def rivals(self) -> Iterator[Rival]:
        """Whom to compare; the first is the measure of the others."""
        scaling, lengths, count = self.scaling, self.lengths, len(self.rows)
        float8 = self.in_float8()

        def lamoe(i: int) -> Tensor:
            c, k = self.rows[i % count].split((C, R), dim=-1)
            return latent_decode(self.q, self.r, c, k, lengths, scaling=scaling)[0]

        def lamoe_pages(i: int) -> Tensor:
            both = self.rows[i % count].view(-1, 2, (C + R) // 2)  # the same numbers, in the order of halves
            return latent_decode_pages(
                self.q, self.r, both[:, 0], both[:, 1], self.table, PAGE, lengths, scaling=scaling
            )[0]

        def eager(i: int) -> Tensor:
            c, k = self.rows[i % count].split((C, R), dim=-1)
            out, _ = absorbed_attention(self.q.transpose(0, 1), self.r.transpose(0, 1), c, k, None, scaling)
            return out.transpose(0, 1)

        def lamoe_float8(i: int) -> Tensor:
            return latent_decode(self.q, self.r, *float8[i % len(float8)], lengths, scaling=scaling)[0]

        yield Rival("lamoe", lamoe, self.bytes)
        yield Rival("lamoe fp8", lamoe_float8, self.float8_bytes)
        yield Rival("lamoe pages", lamoe_pages, self.bytes, judged=False)
        flash = flash_mla()
        if flash is not None:
            q = torch.cat((self.q, self.r), dim=-1).permute(1, 2, 0, 3).contiguous()

            def flash_call(i: int) -> Tensor:
                return flash(q, self.rows[i % count].view(-1, PAGE, 1, C + R), self.table, lengths, scaling)

            yield Rival("FlashMLA", flash_call, self.bytes, judged=False)
        if self.bytes < 2**31:
            yield Rival("torch absorbed", eager, self.bytes, judged=self.q.shape[2] == 1)


def flash_mla() -> Callable | None:
    """FlashMLA's dense decoding of bfloat16, if a build of it is installed and loads here."""
    try:
        from flash_mla import flash_mla_with_kvcache, get_mla_metadata
    except (ImportError, OSError, RuntimeError) as reason:
        print(f"FlashMLA is not here: {reason}")
        return None
    plans = {}

    def call(q: Tensor, cache: Tensor, table: Tensor, lengths: Tensor, scaling: float) -> Tensor:
        plan = plans.setdefault(q.shape, get_mla_metadata()[0])
        return flash_mla_with_kvcache(
            q, cache, table, lengths, C, plan, softmax_scale=scaling, causal=True, use_legacy=True
        )[0]

    return call


@torch.no_grad()
def kernel_cost(heads: int, batch: int, context: int, new_tokens: int = 1) -> list[dict]:
    """Microseconds of one step by CUDA graph, with cold caches, beside the time that they take through memory; and the
    output's relative error."""
    caches, speed = Caches(heads, batch, context, new_tokens), copy_speed()
    rows = []
    for rival in caches.rivals():
        floor = rival.bytes / speed * 1e6

        def run(call=rival.call):
            for i in range(caches.calls):
                call(i)

        graph = captured(run)
        us = statistics.median(milliseconds(graph.replay, 3) for _ in range(5)) / caches.calls * 1e3
        rows.append(
            {
                "heads": heads, "batch": batch, "context": context, "new_tokens": new_tokens, "who": rival.name,
                "us": us, "floor_us": floor, "share_of_floor": floor / us,
                "error": caches.error(rival.call(0)) if rival.judged else None,
            }
        )  # fmt: skip
    for row in rows:
        row["over_lamoe"] = row["us"] / rows[0]["us"]
    return rows
