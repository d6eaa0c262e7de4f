"""What a step of training costs, and attention over packed documents: cases and how they are timed. For benchmark.py.

The text is the one that ships with the repository, cut by a tokenizer that is trained on it and packed end to end, so
that routing is as uneven as text makes it; weights are random.
"""

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from lamoe import boost
from lamoe.attention_choice import Documents, sdpa_attention
from lamoe.balance import RouterBalance
from lamoe.memory import ATTENTION_AND_SHARED
from lamoe.scripts.corpus import read_documents
from lamoe.scripts.packing import pack
from lamoe.scripts.quickstart import train_tokenizer

TEXT = Path(__file__).parent / "data/shakespeare.txt"


@dataclass(frozen=True)
class TrainCase:
    """One step: decoder layers (None is all of the preset), sequences, LoRA or everything, checkpointing."""

    layers: int | None
    batch: int
    lora: bool
    checkpointing: bool


CASES = {
    "full": TrainCase(10, 4, False, False),
    "lora": TrainCase(None, 2, True, False),
    "lora-checkpointed": TrainCase(None, 4, True, True),
}
RANK = 16


def text_batches(vocab_size: int, batch: int, length: int, count: int, device: str) -> list[Tensor]:
    """`count` batches [batch, length] of token ids, of different text while there is any."""
    text = read_documents([str(TEXT)])[0]
    rows = [row["input_ids"] for row in pack(train_tokenizer(text, min(vocab_size, 8192)), [text], length)]
    return [torch.stack([rows[(i * batch + j) % len(rows)] for j in range(batch)]).to(device) for i in range(count)]


def train_step_cost(name: str, case: TrainCase, ours, native, length: int, rounds: int = 3) -> list[dict]:
    """Forward + backward of ours, the native class with grouped_mm, and that class boosted, in alternating rounds.

    Args:
        ours, native: models over the same weights; with `case.lora` both get adapters of their own here.
    """
    if case.lora:
        ours, native = adapted(ours), adapted(native)
    turns = {
        "lamoe": (ours, lambda: None),
        "native grouped_mm": (native, lambda: native.set_experts_implementation("grouped_mm")),
        "native boosted": (native, lambda: boost(native)),
    }
    device = ours.device.type
    batches = text_batches(ours.config.vocab_size, case.batch, length, 4, device)
    times: dict[str, list[float]] = {who: [] for who in turns}
    peaks = dict.fromkeys(turns, float("nan"))
    for model in (ours, native):
        model.train()
        if case.checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for _ in range(rounds):
        for who, (model, prepare) in turns.items():
            prepare()
            train_step(model, batches[0])  # compiles, and fills the allocator
            if device == "cuda":
                torch.cuda.reset_peak_memory_stats()
            times[who].append(seconds(lambda model=model: [train_step(model, ids) for ids in batches[1:]], device))
            if device == "cuda":
                peaks[who] = torch.cuda.max_memory_allocated() / 2**30
            model.zero_grad(set_to_none=True)
            gc.collect()
            if device == "cuda":
                torch.cuda.empty_cache()
    return [
        {
            "case": name,
            "model": who,
            "layers": model.config.num_hidden_layers,
            "batch": case.batch,
            "length": length,
            "lora_rank": RANK if case.lora else None,
            "checkpointing": case.checkpointing,
            "step_ms": statistics.median(times[who]) / (len(batches) - 1) * 1e3,
            "tokens_per_second": case.batch * length * (len(batches) - 1) / statistics.median(times[who]),
            "peak_gib": peaks[who],
        }
        for who, (model, _) in turns.items()
    ]


def balance_cost(model: nn.Module, batch: int, length: int, rounds: int = 5) -> list[dict]:
    """A step of training without balancing, and with the bias moved and every layer's load reported after it, in
    alternating rounds; `cost` is the share by which a step takes longer."""
    device = model.device.type
    model.train()
    batches = text_batches(model.config.vocab_size, batch, length, 4, device)
    times: dict[str, list[float]] = {"plain": [], "balanced and reported": []}

    def run(balance: RouterBalance | None):
        for ids in batches[1:]:
            train_step(model, ids)
            if balance is not None:
                balance.step(1e-3)
                balance.report()

    run(None)
    with RouterBalance(model) as balance:
        run(balance)
    for _ in range(rounds):
        times["plain"].append(seconds(lambda: run(None), device))
        with RouterBalance(model) as balance:
            times["balanced and reported"].append(seconds(lambda balance=balance: run(balance), device))
    steps = {way: statistics.median(found) / (len(batches) - 1) for way, found in times.items()}
    return [
        {
            "way": way, "layers": model.config.num_hidden_layers, "batch": batch, "length": length,
            "step_ms": step * 1e3, "cost": step / steps["plain"] - 1,
        }
        for way, step in steps.items()
    ]  # fmt: skip


def adapted(model: nn.Module) -> nn.Module:
    """`model` with a LoRA on attention and shared experts, in the weights' own dtype, everything else frozen.

    The layers get it, not the model: of a native class PEFT would know the family, and adapt the routed experts where
    it is asked for the shared ones (huggingface/peft#3711).
    """
    model.requires_grad_(False)
    lora = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=list(ATTENTION_AND_SHARED))
    inject_adapter_in_model(lora, model.model.layers)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(model.dtype)
    return model


def train_step(model: nn.Module, ids: Tensor):
    """Forward and backward with fresh gradients."""
    model.zero_grad(set_to_none=True)
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()


def seconds(call: Callable[[], object], device: str) -> float:
    """Seconds until the device has done what `call` asks."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def documents_cost(
    heads: int,
    widths: tuple[int, int],
    tokens: int,
    lengths: list[int],
    device: str,
    dtype: torch.dtype,
    ways: list[str],
) -> list[dict]:
    """Milliseconds of attention, forward + backward, over `tokens` tokens of documents of each length, by way."""
    q, k = (torch.randn(1, heads, tokens, widths[0], device=device, dtype=dtype) for _ in range(2))
    v = torch.randn(1, heads, tokens, widths[1], device=device, dtype=dtype)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    rows = []
    for length in lengths:
        spans = tuple((0, first, min(first + length, tokens)) for first in range(0, tokens, length))
        numbers = torch.arange(tokens, device=device) // length
        for way in ways:
            mask = Documents(spans, 1, tokens, way)
            if way == "masked":
                mask = (numbers[:, None] == numbers).tril()[None, None]

            def step(mask=mask):
                out, _ = sdpa_attention(_Causal, q, k, v, mask, scaling=widths[0] ** -0.5)
                torch.autograd.grad(out.sum(), leaves)

            step()
            times = [seconds(step, device) * 1e3 for _ in range(5)]
            rows.append(
                {"heads": heads, "tokens": tokens, "document": length, "way": way, "ms": statistics.median(times)}
            )
    return rows


class _Causal:
    """What Transformers' function looks at of an attention module."""

    is_causal, num_key_value_groups, training = True, 1, True
