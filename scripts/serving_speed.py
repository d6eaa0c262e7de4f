"""What serving costs: rounds of multi-token prediction beside steps, and continuous batching. For benchmark.py."""

import itertools
import statistics
import time

import torch
from transformers import ContinuousBatchingConfig, GenerationConfig
from transformers.generation.streamers import BaseStreamer

# How decode-only batches run: without block tables as with plain Transformers' lists of slots, and with what we add.
WAYS = {
    "lists": {"max_blocks_per_request": 0, "use_cuda_graph": False, "use_async_batching": False},
    "tables": {"use_cuda_graph": False, "use_async_batching": False},
    "recorded": {"use_async_batching": False},
    "recorded, asynchronous": {"use_async_batching": True},
}


class StepClock(BaseStreamer):
    """Notes when each token of `generate` has reached the host."""

    def __init__(self):
        self.times: list[float] = []

    def put(self, value):
        self.times.append(time.perf_counter())

    def end(self):
        """There is nothing to flush."""


def draft_cost(model, context: int, new_tokens: int) -> dict:
    """Milliseconds of a step of `generate` and of a round with `use_mtp`, medians of the later half, for one sequence.

    Layers with random weights draft badly, so what counts is from which acceptance of a draft on rounds pay.
    """
    ids = torch.randint(5, model.config.vocab_size, (1, context), device=model.device)
    options = {"max_new_tokens": new_tokens, "do_sample": False, "pad_token_id": 0}
    options["attention_mask"] = torch.ones_like(ids)
    row = {"context": context, "drafts": model.config.num_nextn_predict_layers}
    for name, use_mtp in (("step_ms", False), ("round_ms", True)):
        model.generate(ids, use_mtp=use_mtp, **options)  # compiles, and records
        clock = StepClock()
        model.generate(ids, use_mtp=use_mtp, streamer=clock, **options)
        gaps = [(b - a) * 1e3 for a, b in itertools.pairwise(clock.times[1:])]
        gaps = gaps[len(gaps) // 2 :]
        row[name] = statistics.median([gap for gap in gaps if gap > 0.05] or gaps)  # kept drafts come with their round
    row["pays_above"] = (row["round_ms"] / row["step_ms"] - 1) / row["drafts"]
    row["acceptance"] = model.speculation.acceptance_rate
    return row


def batching_cost(model, requests: int, prompt: int, new_tokens: int, way: str, runs: int = 3) -> dict:
    """Tokens a second of `generate_batch`, median of `runs` after one that compiles and records; all requests at once.

    Raises:
        RuntimeError: a request failed.
    """
    prompts = torch.randint(5, model.config.vocab_size, (requests, prompt)).tolist()
    options = GenerationConfig(max_new_tokens=new_tokens, do_sample=False, eos_token_id=-1)
    batching = ContinuousBatchingConfig(
        max_batch_tokens=8192, max_requests_per_batch=requests, max_memory_percent=0.8, allow_block_sharing=False,
        **WAYS[way],
    )  # fmt: skip
    seconds = []
    try:
        for _ in range(runs + 1):
            start = time.perf_counter()
            answers = model.generate_batch(prompts, options, batching, persistent_manager=True).values()
            seconds.append(time.perf_counter() - start)
            errors = [answer.error for answer in answers if answer.error]
            if errors:
                raise RuntimeError(errors[0])
    finally:
        model.destroy_cached_continuous_batching_manager()  # and with it the cache
    return {
        "way": way, "requests": requests, "prompt": prompt, "new_tokens": new_tokens, "first_run_s": seconds[0],
        "tokens_per_second": requests * new_tokens / statistics.median(seconds[1:]),
    }  # fmt: skip
