"""What decoding over latents costs: one step of one layer's attention, and whom to compare with. For benchmark.py."""

import statistics
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from lamoe.attention import absorbed_attention
from lamoe.kernels_attention import latent_decode, latent_decode_pages
from lamoe.scripts.expert_speed import captured, copy_speed, milliseconds

C, R, PAGE = 512, 64, 64  # the published widths, and a page of FlashMLA
SHAPES = ((1, 1024), (1, 16384), (1, 65536), (8, 4096), (8, 65536), (32, 16384), (128, 4096), (128, 65536))
# bytes that lie between two uses of a cache, so that none is found in the L2 cache
COLD = 2**27


class Caches:
    """Several caches of one shape in bfloat16, each in rows and in permuted pages, and queries for all."""

    def __init__(self, heads: int, batch: int, context: int, new_tokens: int = 1):
        self.bytes = batch * context * (C + R) * 2
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

    def rivals(self) -> Iterator[tuple[str, Callable[[int], Tensor]]]:
        """Name, and the output [H, B, T, C] or [B, T, H, C] of the i-th call."""
        scaling, lengths, count = self.scaling, self.lengths, len(self.rows)

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
            return absorbed_attention(self.q.transpose(0, 1), self.r.transpose(0, 1), c, k, None, scaling)[0]

        yield "lamoe", lamoe
        yield "lamoe pages", lamoe_pages
        flash = flash_mla()
        if flash is not None:
            q = torch.cat((self.q, self.r), dim=-1).permute(1, 2, 0, 3).contiguous()

            def flash_call(i: int) -> Tensor:
                return flash(q, self.rows[i % count].view(-1, PAGE, 1, C + R), self.table, lengths, scaling)

            yield "FlashMLA", flash_call
        if self.bytes < 2**31:
            yield "torch absorbed", eager


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
    """Microseconds of one step by CUDA graph, with cold caches, beside the time that they take through memory."""
    caches = Caches(heads, batch, context, new_tokens)
    floor = caches.bytes / copy_speed() * 1e6
    rows = []
    for name, call in caches.rivals():

        def run(call=call):
            for i in range(caches.calls):
                call(i)

        graph = captured(run)
        us = statistics.median(milliseconds(graph.replay, 3) for _ in range(5)) / caches.calls * 1e3
        rows.append(
            {
                "heads": heads, "batch": batch, "context": context, "new_tokens": new_tokens, "who": name,
                "us": us, "floor_us": floor, "share_of_floor": floor / us,
            }
        )  # fmt: skip
    for row in rows:
        row["over_lamoe"] = row["us"] / rows[0]["us"]
    return rows
