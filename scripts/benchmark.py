"""Measure cache, attention and decoding against the native classes; rows go to a JSONL file, a table to the screen."""

import copy
import datetime
import gc
import itertools
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
import transformers
from rich.console import Console
from rich.table import Table
from transformers import (
    AutoModelForCausalLM,
    DeepseekV2Config,
    DeepseekV3Config,
    DynamicCache,
    Glm4MoeLiteConfig,
    StaticCache,
)
from trl import TrlParser

from lamoe import LamoeConfig, LamoeForCausalLM, boost, unboost
from lamoe.attention import decode_view, kernel_refusal
from lamoe.decode_graph import record
from lamoe.scripts.expert_speed import SHAPES, decode_cost, model_step_cost, train_cost
from lamoe.scripts.expert_tiles import best_tiles
from lamoe.scripts.prefill_speed import peak_of, prompt_cost
from lamoe.scripts.result_tables import markdown_tables
from lamoe.scripts.serving_speed import WAYS, StepClock, batching_cost, draft_cost
from lamoe.scripts.train_speed import CASES, balance_cost, documents_cost, train_step_cost

SUITES = (
    "cache", "attention", "prefill", "decode", "mla", "mtp", "batching", "moe", "moe-decode", "step", "train",
    "balance", "documents", "tune", "tables",
)  # fmt: skip
_NATIVE = {"deepseek_v2": DeepseekV2Config, "deepseek_v3": DeepseekV3Config}


@dataclass
class Arguments:
    """What to measure, and where the rows go."""

    suite: str = field(metadata={"help": f"One of {', '.join(SUITES)}."})
    preset: str = field(default="v2-lite", metadata={"help": "Published shape, with random weights."})
    layers: int | None = field(default=None, metadata={"help": "Decoder layers instead of the preset's number."})
    batch: list[int] = field(default_factory=lambda: [1], metadata={"help": "Batch sizes, paired with --context."})
    context: list[int] = field(default_factory=lambda: [1024], metadata={"help": "Tokens in the cache."})
    new_tokens: int = field(default=64, metadata={"help": "Decode steps that are timed."})
    cache: str = field(default="static", metadata={"help": "decode: static or dynamic."})
    models: list[str] = field(
        default_factory=lambda: ["lamoe", "native"],
        metadata={"help": "prefill, decode: whom; decode: also boosted, the native class after lamoe.boost."},
    )
    feed_forward: list[str] = field(
        default_factory=lambda: ["dense", "experts"], metadata={"help": "prefill: the layer's, dense or experts."}
    )
    price: float = field(default=2.5, metadata={"help": "decode: dollars that the machine costs an hour."})
    heads: list[int] = field(default_factory=lambda: [16, 64, 128], metadata={"help": "mla: query heads."})
    experts: str = field(default="default", metadata={"help": "decode: an experts implementation to force."})
    shapes: list[str] = field(
        default_factory=lambda: list(SHAPES), metadata={"help": f"moe, moe-decode, tune: of {', '.join(SHAPES)}."}
    )
    routing: list[str] = field(default_factory=lambda: ["uniform"], metadata={"help": "moe: uniform, skewed."})
    who: list[str] = field(
        default_factory=list,
        metadata={"help": "moe: whom to run beside dense cuBLAS; none is all."},
    )
    cases: list[str] = field(default_factory=lambda: list(CASES), metadata={"help": f"train: of {', '.join(CASES)}."})
    length: int = field(default=4096, metadata={"help": "train: tokens a sequence."})
    tokens: list[int] = field(default_factory=lambda: [1, 8, 64, 256], metadata={"help": "moe-decode: tokens a call."})
    rows: Path | None = field(
        default=None, metadata={"help": "JSONL file that the rows are added to; tables: the folder that is printed."}
    )


def main(arguments: Arguments):
    """Run one suite, print its table, append its rows."""
    if arguments.suite not in SUITES:
        raise ValueError(f"suite={arguments.suite!r} is not one of {', '.join(SUITES)}.")
    if arguments.suite == "tables":
        print("\n\n".join(markdown_tables(arguments.rows or Path("model_cards/results")).values()))
        return
    suites = {
        "cache": cache_bytes, "attention": attention_step, "prefill": prefill, "decode": decode, "mla": mla,
        "mtp": mtp, "batching": batching, "moe": moe, "moe-decode": moe_decode, "step": step, "train": train,
        "balance": balance, "documents": documents, "tune": tune,
    }  # fmt: skip
    rows = suites[arguments.suite](arguments)
    table = Table(*rows[0], title=f"{arguments.suite}, {device_name()}")
    for row in rows:
        table.add_row(*(f"{value:.4g}" if isinstance(value, float) else str(value) for value in row.values()))
    Console(width=160).print(table)
    if arguments.rows:
        arguments.rows.parent.mkdir(parents=True, exist_ok=True)
        with arguments.rows.open("a", encoding="utf-8") as file:
            for row in rows:
                file.write(json.dumps(row | provenance(arguments.suite)) + "\n")


def cache_bytes(arguments: Arguments) -> list[dict]:
    """Bytes a token in every preset's cache, measured from the cache's tensors and computed by the formula."""
    rows = []
    for preset in LamoeConfig.presets():
        config = LamoeConfig.from_preset(preset)
        small = LamoeConfig.from_preset(
            preset, num_hidden_layers=1, first_k_dense_replace=1, hidden_size=64, intermediate_size=64,
            num_attention_heads=2, num_key_value_heads=2, vocab_size=64, bos_token_id=None, eos_token_id=None,
            pad_token_id=None,
        )  # fmt: skip
        model = LamoeForCausalLM(small).to(torch.bfloat16).eval()
        cache = DynamicCache(config=small)
        with torch.no_grad():
            model(torch.zeros(1, 8, dtype=torch.long), past_key_values=cache)
        layer = cache.layers[0]
        measured = (layer.keys.nbytes + layer.values.nbytes) // 8 * config.num_hidden_layers
        rows.append(
            {
                "preset": preset,
                "latent_bytes": measured,
                "formula_bytes": config.kv_bytes_per_token(),
                "expanded_bytes": config.kv_bytes_per_token(expanded=True),
            }
        )
        if rows[-1]["latent_bytes"] != rows[-1]["formula_bytes"]:
            raise ValueError(f"The cache of {preset} does not hold what the formula says: {rows[-1]}.")
    return rows


def attention_step(arguments: Arguments) -> list[dict]:
    """One layer, one new token: ours, the native class and that class boosted, and the memory that each takes.

    `speedup` is of the whole module, `core_speedup` of what is left without the projections that all share.
    """
    device, dtype = place()
    ours, native = pair(arguments.preset, 1, device, dtype, dense=True)
    rows = []
    for batch, context in paired(arguments):
        row = {"preset": arguments.preset, "batch": batch, "context": context, "dtype": str(dtype)[6:]}
        row["decode"] = "eager" if kernel_refusal(ours.config, dtype, ours.device) else "triton"
        for name, model in (("lamoe", ours), ("native", native), ("boosted", native)):
            (boost if name == "boosted" else unboost)(model)
            row[f"{name}_ms"], row[f"{name}_temporary_mib"] = attention_cost(model, batch, context)
        row["projections_ms"] = projections_cost(native, batch)
        row["speedup"] = row["native_ms"] / row["lamoe_ms"]
        core = [row[name] - row["projections_ms"] for name in ("native_ms", "lamoe_ms")]
        row["core_speedup"] = core[0] / max(core[1], 1e-9)
        rows.append(row)
    return rows


@torch.no_grad()
def attention_cost(model, batch: int, context: int, repeats: int = 15) -> tuple[float, float]:
    """Median milliseconds of one attention step, and MiB of the tensors that it made beyond its cache.

    On a GPU the step is a CUDA graph, whoever computes it, or both would wait for launches.
    """
    attention, config = model.model.layers[0].self_attn, model.config
    device, dtype = model.device, model.dtype
    cache = StaticCache(config=config, max_cache_len=context)
    latents = torch.randn(batch, 1, context - 1, config.kv_lora_rank, device=device, dtype=dtype)
    keys = torch.randn(batch, 1, context - 1, config.qk_rope_head_dim, device=device, dtype=dtype)
    cache.update(latents, keys, 0)
    del latents, keys
    hidden = torch.randn(batch, 1, config.hidden_size, device=device, dtype=dtype)
    positions = torch.full((batch, 1), context - 1, device=device)
    angles = model.model.rotary_emb(hidden, positions)
    length, ours = cache.layers[0].cumulative_length, isinstance(model, LamoeForCausalLM)

    def step() -> tuple:
        length.fill_(context - 1)
        view = {"view": decode_view(config, hidden, None, cache, None, {})} if ours else {}
        return attention(hidden, position_embeddings=angles, attention_mask=None, past_key_values=cache, **view)

    median = median_cost(step, device, repeats)
    with torch.profiler.profile(profile_memory=True) as profile:
        step()
    return median, peak_of(profile) / 2**20


@torch.no_grad()
def projections_cost(model, batch: int, repeats: int = 15) -> float:
    """Median milliseconds of the projections of an attention step: of queries, of the latent, and of the output."""
    attention = model.model.layers[0].self_attn
    hidden = torch.randn(batch, 1, model.config.hidden_size, device=model.device, dtype=model.dtype)
    summed = hidden.new_zeros(batch, 1, attention.o_proj.in_features)

    def step() -> tuple:
        if model.config.q_lora_rank is None:
            queries = attention.q_proj(hidden)
        else:
            queries = attention.q_b_proj(attention.q_a_layernorm(attention.q_a_proj(hidden)))
        return queries, attention.kv_a_proj_with_mqa(hidden), attention.o_proj(summed)

    return median_cost(step, model.device, repeats)


def median_cost(step: Callable[[], tuple], device: torch.device, repeats: int) -> float:
    """Median milliseconds of `step`, on a GPU of its replay as a CUDA graph."""
    replay = record(step, device)[0].replay if device.type == "cuda" else step
    replay()
    times = []
    for _ in range(repeats):
        synchronize(device)
        start = time.perf_counter()
        replay()
        synchronize(device)
        times.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times)


def prefill(arguments: Arguments) -> list[dict]:
    """One layer, dense and with experts: a prompt in one forward, ours and native with the same weights."""
    device, dtype = place()
    rows = []
    for feed_forward in arguments.feed_forward:
        if feed_forward not in ("dense", "experts"):
            raise ValueError(f"feed_forward={feed_forward!r} is not one of dense, experts.")
        ours, native = pair(arguments.preset, 1, device, dtype, dense_layers=int(feed_forward == "dense"))
        for batch, context in paired(arguments):
            for name, model in (("lamoe", ours), ("native", native)):
                if name in arguments.models:
                    shape = {"preset": arguments.preset, "feed_forward": feed_forward, "dtype": str(dtype)[6:]}
                    cost = prompt_cost(model, batch, context)
                    rows.append({**shape, "model": name, "batch": batch, "context": context, **cost})
                    print(rows[-1], flush=True)
        del ours, native, model
    return rows


def decode(arguments: Arguments) -> list[dict]:
    """Milliseconds a step of `generate`, ours, native and native boosted: same weights, prompt and cache."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    ours, native = pair(arguments.preset, arguments.layers, device, torch.bfloat16)
    rows = []
    for batch, context in paired(arguments):
        for name, model in (("lamoe", ours), ("native", native), ("boosted", native)):
            if name not in arguments.models:
                continue
            (boost if name == "boosted" else unboost)(model)
            if arguments.experts != "default":
                model.set_experts_implementation(arguments.experts)
            step, prefill, peak = generate_cost(model, batch, context, arguments)
            rows.append(
                {
                    "preset": arguments.preset,
                    "layers": model.config.num_hidden_layers,
                    "model": name,
                    "cache": arguments.cache,
                    "experts": arguments.experts,
                    "batch": batch,
                    "context": context,
                    "step_ms": step,
                    "tokens_per_second": batch * 1e3 / step,
                    "dollars_per_million": arguments.price / 3.6 * step / batch,
                    "prefill_ms": prefill,
                    "peak_gib": peak,
                }
            )
            print(rows[-1], flush=True)
    return rows


def mtp(arguments: Arguments) -> list[dict]:
    """A step of `generate` beside a round with `use_mtp`, for one sequence, with one prediction layer."""
    model = random_model(config_of(arguments.preset, arguments.layers, drafts=1), *place())
    rows = []
    for context in arguments.context:
        row = {"preset": arguments.preset, "layers": model.config.num_hidden_layers}
        rows.append(row | draft_cost(model, context, arguments.new_tokens))
    return rows


def batching(arguments: Arguments) -> list[dict]:
    """`generate_batch` with block tables and recorded steps, and without: `batch` requests, prompts of `context`."""
    model = random_model(config_of(arguments.preset, arguments.layers), *place())
    rows = []
    for (requests, prompt), way in itertools.product(paired(arguments), WAYS):
        if model.device.type == "cpu" and way.startswith("recorded"):
            continue
        row = {"preset": arguments.preset, "layers": model.config.num_hidden_layers}
        rows.append(row | batching_cost(model, requests, prompt, arguments.new_tokens, way))
        print(rows[-1], flush=True)
    return rows


def generate_cost(model, batch: int, context: int, arguments: Arguments) -> tuple[float, float, float]:
    """Median milliseconds a step, milliseconds until the first token, and peak GiB; after a run that compiles."""
    ids = torch.randint(5, model.config.vocab_size, (batch, context), device=model.device)
    settings = {"max_new_tokens": arguments.new_tokens, "min_new_tokens": arguments.new_tokens, "do_sample": False}
    if arguments.cache == "static":
        settings["cache_implementation"] = "static"
    torch._dynamo.reset()
    gc.collect()
    if model.device.type == "cuda":
        torch.cuda.empty_cache()
    mask = torch.ones_like(ids)
    model.generate(ids, attention_mask=mask, **settings)
    if model.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    clock = StepClock()
    synchronize(model.device)
    start = time.perf_counter()
    model.generate(ids, attention_mask=mask, streamer=clock, **settings)
    marks = clock.times[1:]  # the first call of a streamer shows the prompt
    steps = [(b - a) * 1e3 for a, b in itertools.pairwise(marks)]
    peak = torch.cuda.max_memory_allocated() / 2**30 if model.device.type == "cuda" else float("nan")
    return statistics.median(steps), (marks[0] - start) * 1e3, peak


def mla(arguments: Arguments) -> list[dict]:
    """The attention of one decode step over latents, kernel against kernel, with cold caches."""
    if not torch.cuda.is_available():
        raise ValueError("suite='mla' needs a GPU.")
    from lamoe.scripts.mla_speed import SHAPES, kernel_cost

    rows = []
    for heads, (batch, context) in itertools.product(arguments.heads, SHAPES):
        rows += kernel_cost(heads, batch, context)
        torch.cuda.empty_cache()
    return rows


def moe(arguments: Arguments) -> list[dict]:
    """Experts alone, against every rival that is installed: forward, forward + backward, bytes held, peak."""
    rows = []
    for shape, routing in itertools.product(known_shapes(arguments), arguments.routing):
        if routing not in ("uniform", "skewed"):
            raise ValueError(f"routing={routing!r} is not one of uniform, skewed.")
        rows += train_cost(shape, routing, arguments.who)
        torch.cuda.empty_cache()
    return rows


def moe_decode(arguments: Arguments) -> list[dict]:
    """Experts alone, for few tokens, beside the time that their weights take through memory."""
    rows = []
    for shape in known_shapes(arguments):
        rows += decode_cost(shape, arguments.tokens)
        torch.cuda.empty_cache()
    return rows


def step(arguments: Arguments) -> list[dict]:
    """Forward + backward of whole models: ours, the native class with grouped_mm, and that class boosted."""
    ours, native = pair(arguments.preset, arguments.layers, "cuda", torch.bfloat16)
    batch, length = paired(arguments)[0]
    turns = {
        "lamoe": (ours, lambda: None),
        "native grouped_mm": (native, lambda: native.set_experts_implementation("grouped_mm")),
        "native boosted": (native, lambda: boost(native)),
    }
    return model_step_cost(turns, batch, length)


def train(arguments: Arguments) -> list[dict]:
    """A step of training on real text, all weights and LoRA: ours, the native class, and that class boosted."""
    unknown = [case for case in arguments.cases if case not in CASES]
    if unknown:
        raise ValueError(f"cases={unknown} are not among {', '.join(CASES)}.")
    device, rows = "cuda" if torch.cuda.is_available() else "cpu", []
    for name in arguments.cases:
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        models = pair(arguments.preset, arguments.layers or CASES[name].layers, device, dtype)
        rows += train_step_cost(name, CASES[name], *models, arguments.length)
        del models
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()
    return rows


def balance(arguments: Arguments) -> list[dict]:
    """What balancing by bias costs of a step, with a report of every layer's load after each."""
    config = config_of(arguments.preset, arguments.layers)
    if config.topk_method != "noaux_tc":
        raise ValueError(f"preset={arguments.preset!r} has no correction bias; balance one that has: moonlight, v3.")
    config.num_nextn_predict_layers = 0
    model = random_model(config, *place())
    return [{"preset": arguments.preset, **row} for row in balance_cost(model, arguments.batch[0], arguments.length)]


def documents(arguments: Arguments) -> list[dict]:
    """Attention over packed documents, one causal call for each against one call for all: what LONG_DOCUMENT is by."""
    if not torch.cuda.is_available():
        raise ValueError("suite='documents' needs a GPU.")
    lengths, ways = [256, 512, 1024, 2048, 4096, 8192], ["each", "varlen", "masked"]
    return [
        row
        for heads in arguments.heads[:1]
        for row in documents_cost(heads, (192, 128), 16384, lengths, "cuda", torch.bfloat16, ways)
    ]


def tune(arguments: Arguments) -> list[dict]:
    """The best tiles for each shape on this device, as kernels_tiles.py wants them."""
    return [row for shape in known_shapes(arguments) for row in best_tiles(shape)]


def known_shapes(arguments: Arguments) -> list[str]:
    """The shapes asked for."""
    unknown = [shape for shape in arguments.shapes if shape not in SHAPES]
    if unknown:
        raise ValueError(f"shapes={unknown} are not among {', '.join(SHAPES)}.")
    if not torch.cuda.is_available():
        raise ValueError(f"suite={arguments.suite!r} needs a GPU.")
    return arguments.shapes


def pair(
    preset: str, layers: int | None, device: str, dtype: torch.dtype, dense: bool = False,
    dense_layers: int | None = None,
):  # fmt: skip
    """Our model of this shape with random weights, and the native class over the very same tensors."""
    config = config_of(preset, layers)
    if dense_layers is not None:
        config.first_k_dense_replace, config.vocab_size = dense_layers, 64
    if dense:
        config.first_k_dense_replace, config.vocab_size, config.intermediate_size = config.num_hidden_layers, 64, 64
    ours = random_model(config, device, dtype)
    written = config.serving_dict()
    model_type, _ = config.native_form()
    kept = {k: v for k, v in written.items() if k not in ("auto_map", "architectures", "model_type")}
    if preset.startswith("glm"):
        kinds = ["sparse" if layer in config.moe_layers else "dense" for layer in range(config.num_hidden_layers)]
        native_config = Glm4MoeLiteConfig(**copy.deepcopy(kept), mlp_layer_types=kinds)
    else:
        native_config = _NATIVE[model_type](**copy.deepcopy(kept))
    with torch.device("meta"):
        native = AutoModelForCausalLM.from_config(native_config, dtype=dtype).eval()
    native.load_state_dict(ours.state_dict(), assign=True)
    native.model.rotary_emb = type(native.model.rotary_emb)(native_config).to(device)
    return ours, native


def config_of(preset: str, layers: int | None, drafts: int = 0) -> LamoeConfig:
    """The preset's, of so many decoder `layers` if given, with `drafts` prediction layers; it never ends by itself."""
    config = LamoeConfig.from_preset(preset, eos_token_id=None, pad_token_id=0)
    config.num_hidden_layers, config.num_nextn_predict_layers = layers or config.num_hidden_layers, drafts
    return config


def random_model(config: LamoeConfig, device: str, dtype: torch.dtype) -> LamoeForCausalLM:
    """Our model with random weights, in evaluation mode."""
    with torch.device(device):
        return LamoeForCausalLM._from_config(config, dtype=dtype).eval()


def place() -> tuple[str, torch.dtype]:
    """The GPU and bfloat16, or without one the CPU and float32."""
    return ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)


def paired(arguments: Arguments) -> list[tuple[int, int]]:
    """Batch sizes with contexts, one by one; a single batch size goes with every context."""
    batches = arguments.batch * len(arguments.context) if len(arguments.batch) == 1 else arguments.batch
    if len(batches) != len(arguments.context):
        raise ValueError(
            f"--batch has {len(batches)} values and --context {len(arguments.context)}; give equally many."
        )
    return list(zip(batches, arguments.context, strict=True))


def synchronize(device):
    """Wait until the device has done what it was asked."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()


def device_name() -> str:
    """The GPU, or the processor."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()


def provenance(suite: str) -> dict:
    """Where a row comes from: device, versions, commit, command, time."""
    git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return {
        "suite": suite,
        "device": device_name(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "commit": git.stdout.strip() or "[unknown]",
        "command": " ".join(["lamoe benchmark", *sys.argv[1:]]),
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


if __name__ == "__main__":
    main(TrlParser(Arguments).parse_args_and_config()[0])
