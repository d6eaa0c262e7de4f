"""What a long prompt costs: milliseconds, and the memory that a model takes beyond its weights. For benchmark.py."""

import gc
import statistics
import time

import torch


@torch.no_grad()
def prompt_cost(model, batch: int, context: int, repeats: int = 3) -> dict:
    """Median milliseconds of a prompt given in one forward, and GiB held beyond weights and cache at its peak.

    Both are None, and `outcome` says so, where the GPU's memory does not suffice.
    """
    ids = torch.randint(0, model.config.vocab_size, (batch, context), device=model.device)
    cuda = model.device.type == "cuda"

    def run() -> int:
        """Bytes of the cache that the prompt has filled."""
        cache = model(ids, use_cache=True, logits_to_keep=1).past_key_values
        if cuda:
            torch.cuda.synchronize()
        return sum(t.untyped_storage().nbytes() for layer in cache.layers for t in (layer.keys, layer.values))

    try:
        run()  # libraries plan and allocate at the first use
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            run()
            times.append((time.perf_counter() - start) * 1e3)
        peak = _peak_on_gpu(run) if cuda else _peak_on_cpu(run)
    except torch.OutOfMemoryError:
        times = []  # what was allocated is freed behind this block, with the error
    if times:
        return {"ms": statistics.median(times), "peak_gib": peak / 2**30, "outcome": "done"}
    gc.collect()
    torch.cuda.empty_cache()
    return {"ms": None, "peak_gib": None, "outcome": "out of memory"}


def _peak_on_gpu(run) -> int:
    gc.collect()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    cached = run()
    return torch.cuda.max_memory_allocated() - before - cached


def _peak_on_cpu(run) -> int:
    with torch.profiler.profile(profile_memory=True) as profile:
        cached = run()
    return peak_of(profile) - cached


def peak_of(profile) -> int:
    """The most bytes that lived at once above the start, from the allocations that the profiler saw."""
    live = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    return peak
