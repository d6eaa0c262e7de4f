"""The tables of README.md, printed from the measured rows in model_cards/results/."""

import json
from pathlib import Path


def read_rows(folder: Path) -> dict[str, list[dict]]:
    """All rows of the folder's JSONL files, by suite."""
    suites: dict[str, list[dict]] = {}
    for file in sorted(folder.glob("*.jsonl")):
        for line in file.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            suites.setdefault(row["suite"], []).append(row)
    return suites


def markdown_tables(folder: Path) -> dict[str, str]:
    """Every table in Markdown, by the name of its suite; suites without rows have none."""
    makers = {
        "decode": _decode, "mla": _mla, "attention": _attention, "prefill": _prefill, "mtp": _mtp,
        "batching": _batching, "cache": _cache, "moe": _moe, "moe-sonic": _moe_sonic, "moe-decode": _moe_decode,
        "step": _step, "train": _train,
    }  # fmt: skip
    suites = read_rows(folder)
    return {suite: "\n".join(make(suites[suite])) for suite, make in makers.items() if suite in suites}


def _short(device: str) -> str:
    return device.removeprefix("NVIDIA ").split()[0]


def _decode(rows: list[dict]) -> list[str]:
    by = {(r["cache"], r["batch"], r["context"], r["model"]): r for r in rows}
    lines = [
        "| decode | native, ms a step | Lamoe, ms a step | ratio | Lamoe, tokens/s | peak, GiB: native / Lamoe |",
        "|---|---|---|---|---|---|",
    ]
    for cache, batch, context in sorted({key[:3] for key in by}):
        native, ours = by.get((cache, batch, context, "native")), by[cache, batch, context, "lamoe"]
        shape = f"{cache} cache, batch {batch}, context {context // 1024}k"
        cells = ("[not measured]", "", "[not measured]")
        if native is not None:
            ratio = f"{native['step_ms'] / ours['step_ms']:.1f}"
            cells = (f"{native['step_ms']:.1f}", ratio, f"{native['peak_gib']:.1f}")
        lines.append(
            f"| {shape} | {cells[0]} | {ours['step_ms']:.2f} | {cells[1]} | {ours['tokens_per_second']:,.0f} "
            f"| {cells[2]} / {ours['peak_gib']:.1f} |"
        )
    return lines


def _mla(rows: list[dict]) -> list[str]:
    by = {(r["heads"], r["batch"], r["context"], r["who"]): r for r in rows}
    shapes = list(dict.fromkeys((r["batch"], r["context"]) for r in rows))
    head = " | ".join(f"{batch} x {context // 1024}k" for batch, context in shapes)
    lines = [
        f"| one step's attention over latents by CUDA graph, µs: FlashMLA / Lamoe | {head} |",
        "|---" * (len(shapes) + 1) + "|",
    ]
    for heads in sorted({r["heads"] for r in rows}):
        pairs = [[by[heads, *shape, who]["us"] for who in ("FlashMLA", "lamoe")] for shape in shapes]
        cells = (" / ".join(f"{us:.1f}" if us < 100 else f"{us:,.0f}" for us in pair) for pair in pairs)
        lines.append(f"| {heads} heads | " + " | ".join(cells) + " |")
    for heads in sorted({r["heads"] for r in rows if r["who"] == "lamoe fp8"}):
        cells = [by[heads, *shape, "lamoe fp8"] for shape in shapes]
        shown = (f"{r['us']:,.{1 if r['us'] < 100 else 0}f} ({r['error']:.1%})" for r in cells)
        lines.append(f"| {heads} heads, Lamoe with latents in float8 (relative error) | " + " | ".join(shown) + " |")
    return lines


def _attention(rows: list[dict]) -> list[str]:
    head = "| attention of one layer, one new token | native | Lamoe | ratio (without projections) |"
    lines = [head, "|---|---|---|---|"]
    for r in rows:
        shape = f"{r['preset']}, context {r['context'] // 1024}k, {r['device']}, {r['dtype']}"
        shape += ", eager" if r.get("decode", "eager") == "eager" else ", Triton"
        cells = [f"{r[f'{name}_ms']:.1f} ms, {r[f'{name}_temporary_mib']:.0f} MiB" for name in ("native", "lamoe")]
        core = f" ({r['core_speedup']:.0f})" if "core_speedup" in r else ""
        lines.append(f"| {shape} | {cells[0]} | {cells[1]} | {r['speedup']:.2f}{core} |")
    return lines


def _prefill(rows: list[dict]) -> list[str]:
    by = {(r["preset"], r["feed_forward"], r["batch"], r["context"], r["device"], r["model"]): r for r in rows}
    lines = [
        "| a prompt through one layer | native, ms | Lamoe, ms | beyond weights and cache, GiB: native / Lamoe |",
        "|---|---|---|---|",
    ]
    for key in dict.fromkeys(key[:5] for key in by):
        preset, feed_forward, batch, context, device = key
        times, peaks = [], []
        for row in (by.get((*key, name)) for name in ("native", "lamoe")):
            missing = "[not measured]" if row is None else "out of memory"
            times.append(f"{row['ms']:,.0f}" if row and row["ms"] else missing)
            peaks.append(f"{row['peak_gib']:.1f}" if row and row["peak_gib"] else missing)
        shape = f"{preset}, {feed_forward}, {batch} x {context // 1024}k tokens, {_short(device)}"
        lines.append(f"| {shape} | {times[0]} | {times[1]} | {' / '.join(peaks)} |")
    return lines


def _mtp(rows: list[dict]) -> list[str]:
    lines = [
        "| `use_mtp`, batch 1 | a step, ms | a round, ms | pays above an acceptance of |",
        "|---|---|---|---|",
    ]
    for r in rows:
        name = f"{r['preset']}, context {r['context'] // 1024}k, {r['drafts']} draft, {_short(r['device'])}"
        lines.append(f"| {name} | {r['step_ms']:.2f} | {r['round_ms']:.2f} | {r['pays_above']:.0%} |")
    return lines


def _batching(rows: list[dict]) -> list[str]:
    ways = list(dict.fromkeys(r["way"] for r in rows))
    lines = [
        "| `generate_batch`, tokens a second | " + " | ".join(ways) + " |",
        "|---" * (len(ways) + 1) + "|",
    ]
    by: dict[str, dict[str, float]] = {}
    for r in rows:
        requests = f"{r['requests']} requests of {r['prompt']} + {r['new_tokens']} tokens"
        by.setdefault(f"{r['preset']}, {requests}, {_short(r['device'])}", {})[r["way"]] = r["tokens_per_second"]
    for shape, speeds in by.items():
        cells = (f"{speeds[way]:,.0f}" if way in speeds else "[not measured]" for way in ways)
        lines.append(f"| {shape} | " + " | ".join(cells) + " |")
    return lines


def _cache(rows: list[dict]) -> list[str]:
    lines = ["| cache, bytes a token in bfloat16 | keys and values | latents, as cached |", "|---|---|---|"]
    return lines + [f"| {r['preset']} | {r['expanded_bytes']:,} | {r['latent_bytes']:,} |" for r in rows]


def _moe(rows: list[dict]) -> list[str]:
    by = {(r["device"], r["shape"], r["routing"], r["who"]): r for r in rows}
    lines = [
        "| experts, forward + backward, TFLOP/s | dense cuBLAS | Transformers grouped_mm | Lamoe | over grouped_mm "
        "| over dense | held, MiB: grouped_mm / Lamoe | half the rows to one expert |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for device, shape in dict.fromkeys((r["device"], r["shape"]) for r in rows):
        dense, rival, ours = (
            by[device, shape, "uniform", who] for who in ("dense cuBLAS", "transformers grouped_mm", "lamoe")
        )
        skewed = by.get((device, shape, "skewed", "lamoe"))
        slower = f"{skewed['step_ms'] / ours['step_ms']:.2f} times the time" if skewed else "[not measured]"
        lines.append(
            f"| {shape}, {_short(device)} | {dense['step_tflops']:.0f} | {rival['step_tflops']:.0f} "
            f"| {ours['step_tflops']:.0f} | {rival['step_ms'] / ours['step_ms']:.2f} | {ours['over_dense']:.2f} "
            f"| {rival['held_mib']:,.0f} / {ours['held_mib']:,.0f} | {slower} |"
        )
    return lines


def _moe_sonic(rows: list[dict]) -> list[str]:
    by = {(r["shape"], r["who"]): r for r in rows}
    lines = [
        "| experts, ms: SonicMoE / Lamoe | forward | forward + backward | SonicMoE's time over Lamoe's "
        "| Transformers grouped_mm's | dense cuBLAS's |",
        "|---|---|---|---|---|---|",
    ]
    for shape in dict.fromkeys(r["shape"] for r in rows):
        rival, ours = by[shape, "sonicmoe"], by[shape, "lamoe"]
        others = ("sonicmoe", "transformers grouped_mm", "dense cuBLAS")
        ratios = (f"{by[shape, who]['step_ms'] / ours['step_ms']:.2f}" for who in others)
        lines.append(
            f"| {shape}, {_short(ours['device'])} | {rival['forward_ms']:.2f} / {ours['forward_ms']:.2f} "
            f"| {rival['step_ms']:.2f} / {ours['step_ms']:.2f} | " + " | ".join(ratios) + " |"
        )
    return lines


def _moe_decode(rows: list[dict]) -> list[str]:
    by = {(r["shape"], r["tokens"], r["who"]): r for r in rows}
    tokens = sorted({r["tokens"] for r in rows})
    heads = " | ".join(f"{n} token{'s' if n > 1 else ''}" for n in tokens)
    lines = [
        f"| experts by CUDA graph, µs: grouped_mm / Lamoe (share of the memory's limit) | {heads} |",
        "|---" * (len(tokens) + 1) + "|",
    ]
    for shape in dict.fromkeys(r["shape"] for r in rows):
        cells = []
        for n in tokens:
            rival, ours = by[shape, n, "transformers grouped_mm"], by[shape, n, "lamoe"]
            cells.append(f"{rival['graph_us']:.0f} / {ours['graph_us']:.0f} ({ours['share_of_floor']:.0%})")
        lines.append(f"| {shape} | " + " | ".join(cells) + " |")
    return lines


def _step(rows: list[dict]) -> list[str]:
    lines = ["| forward + backward | tokens a second | peak, GiB |", "|---|---|---|"]
    for r in rows:
        name = f"{r['model']}, {r['layers']} layers, {r['tokens']:,} tokens, {_short(r['device'])}"
        lines.append(f"| {name} | {r['tokens_per_second']:,.0f} | {r['peak_gib']:.1f} |")
    return lines


def _train(rows: list[dict]) -> list[str]:
    by = {(r["device"], r["case"], r["model"]): r for r in rows}
    lines = [
        "| step of training, tokens a second (peak, GiB) | native grouped_mm | native boosted | Lamoe | over native "
        "| share of its peak |",
        "|---|---|---|---|---|---|",
    ]
    for device, case in dict.fromkeys((r["device"], r["case"]) for r in rows):
        native, boosted, ours = (by[device, case, who] for who in ("native grouped_mm", "native boosted", "lamoe"))
        what = f"LoRA r={ours['lora_rank']}" if ours["lora_rank"] else "all weights"
        shape = f"{ours['layers']} layers, {what}, {ours['batch']} x {ours['length']:,}"
        cells = [f"{r['tokens_per_second']:,.0f} ({r['peak_gib']:.1f})" for r in (native, boosted, ours)]
        lines.append(
            f"| {shape}{', checkpointed' * ours['checkpointing']}, {_short(device)} | {' | '.join(cells)} "
            f"| {ours['tokens_per_second'] / native['tokens_per_second']:.2f} "
            f"| {ours['peak_gib'] / native['peak_gib']:.0%} |"
        )
    return lines
