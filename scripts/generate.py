"""Let a checkpoint continue a prompt or answer a chat message, and say what that cost."""

import resource
import sys
import time
from dataclasses import dataclass, field

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer, StaticCache, TextStreamer, set_seed
from trl import TrlParser

from lamoe import LamoeForCausalLM
from lamoe.cache import default_cache
from lamoe.hub import load_complete


@dataclass
class Arguments:
    model: str = field(metadata={"help": "Folder of the checkpoint, with its tokenizer."})
    prompt: str | None = field(default=None, metadata={"help": "Text to continue."})
    chat: str | None = field(default=None, metadata={"help": "Message to answer, through the chat template."})
    system: str | None = field(default=None, metadata={"help": "System message before --chat."})
    max_new_tokens: int = field(default=256, metadata={"help": "Most tokens to generate."})
    temperature: float = field(default=0.0, metadata={"help": "0 always takes the likeliest token; 1 samples as is."})
    top_p: float = field(
        default=1.0, metadata={"help": "Sample among the likeliest tokens of this total probability."}
    )
    top_k: int = field(default=0, metadata={"help": "Sample among so many of the likeliest tokens; 0 is all."})
    repetition_penalty: float = field(
        default=1.0, metadata={"help": "Above 1, tokens already seen become less likely."}
    )
    seed: int = field(default=0, metadata={"help": "Seed of the sampling."})
    static: bool = field(
        default=False, metadata={"help": "Reserve the whole cache at once; on a GPU the decoding step is compiled."}
    )
    mtp: bool = field(
        default=False, metadata={"help": "Draft with the checkpoint's multi-token-prediction layers: fewer steps."}
    )
    dtype: str = field(default="auto", metadata={"help": "auto (the checkpoint's), float32, bfloat16 or float16."})
    device: str | None = field(default=None, metadata={"help": "Where to run; a GPU if there is one."})
    stats: bool = field(default=False, metadata={"help": "Print tokens, times, memory and cache size at the end."})


class TimedStreamer(TextStreamer):
    """Prints the text as it comes and notes when each token came."""

    def __init__(self, tokenizer):
        super().__init__(tokenizer, skip_special_tokens=True)
        self.times: list[float] = []

    def put(self, value):
        """Take the prompt first, then each new token."""
        self.times.append(time.perf_counter())
        super().put(value)


def encode(tokenizer, arguments: Arguments) -> dict[str, torch.Tensor]:
    """The prompt as the model reads it."""
    if (arguments.prompt is None) == (arguments.chat is None):
        raise ValueError("Give exactly one of --prompt and --chat.")
    if arguments.chat is None:
        return tokenizer(arguments.prompt, return_tensors="pt", return_token_type_ids=False)
    if not tokenizer.chat_template:
        raise ValueError(f"The tokenizer in {arguments.model} has no chat template; use --prompt.")
    messages = [{"role": "user", "content": arguments.chat}]
    if arguments.system is not None:
        messages.insert(0, {"role": "system", "content": arguments.system})
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)


def cache_bytes_per_token(cache) -> float:
    """Bytes a token of one sequence holds in `cache`, measured from its tensors [1, 1, tokens, width]."""
    tensors = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
    return sum(tensor.numel() * tensor.element_size() / tensor.shape[-2] for tensor in tensors)


def peak_memory(device: torch.device) -> int:
    """The most bytes that the GPU's tensors, or without a GPU this process, ever held."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def main(arguments: Arguments):
    """Load, generate while printing, and print the costs if asked to.

    Raises:
        ValueError: not exactly one of `prompt` and `chat`, no chat template, an incomplete checkpoint, or `mtp` where
            it has no such layers or with `static`.
    """
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    inputs = encode(tokenizer, arguments)
    model = load_complete(LamoeForCausalLM, arguments.model, dtype=arguments.dtype).eval()
    model.to(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    inputs = {name: tensor.to(model.device) for name, tensor in inputs.items()}
    length = inputs["input_ids"].shape[1]

    sampling = {"do_sample": False}
    if arguments.temperature > 0:
        sampling = {"do_sample": True, "temperature": arguments.temperature}
        sampling |= {"top_p": arguments.top_p, "top_k": arguments.top_k}
    cache = default_cache(model.config)
    if arguments.static:
        cache = StaticCache(config=model.config, max_cache_len=length + arguments.max_new_tokens)
    streamer = TimedStreamer(tokenizer)
    set_seed(arguments.seed)
    start = time.perf_counter()
    generated = model.generate(
        **inputs,
        **sampling,
        repetition_penalty=arguments.repetition_penalty,
        max_new_tokens=arguments.max_new_tokens,
        past_key_values=cache,
        streamer=streamer,
        use_mtp=arguments.mtp,
    )
    if arguments.stats:
        _, first, *rest = streamer.times
        width = next(model.parameters()).element_size()
        table = Table("", "", show_header=False)
        table.add_row("prompt tokens", f"{length:,}")
        table.add_row("new tokens", f"{generated.shape[1] - length:,}")
        table.add_row("time to the first token", f"{first - start:.3f} s")
        table.add_row(
            "decoding", f"{len(rest) / (rest[-1] - first):,.1f} tokens a second" if rest else "one token only"
        )
        if arguments.mtp:
            found = model.speculation
            kept = ", ".join(f"{a} of {n}" for a, n in zip(found.accepted, found.drafted, strict=True))
            table.add_row("drafts accepted", f"{found.acceptance_rate:.0%} in {found.rounds} rounds; by depth: {kept}")
        table.add_row("peak memory, " + model.device.type, f"{peak_memory(model.device) / 2**20:,.0f} MiB")
        table.add_row("cache a token, measured", f"{cache_bytes_per_token(cache):,.0f} bytes")
        table.add_row("cache a token, by formula", f"{model.config.kv_bytes_per_token(width):,} bytes")
        Console().print(table)


if __name__ == "__main__":
    main(TrlParser(Arguments).parse_args_and_config()[0])
