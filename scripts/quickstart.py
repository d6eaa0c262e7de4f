"""Train a tiny model on Shakespeare, save it, load it three ways and let it write: two minutes on two CPU cores."""

import math
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from transformers import (
    GenerationConfig,
    TextStreamer,
    Trainer,
    TrainingArguments,
    default_data_collator,
    set_seed,
)
from transformers.utils import logging
from trl import TrlParser

from lamoe import BalanceCallback, LamoeConfig, LamoeForCausalLM
from lamoe.balance import max_violation
from lamoe.hub import compare_logits, load_three_ways
from lamoe.scripts.corpus import Score, read_documents, score, train_tokenizer
from lamoe.scripts.folders import fresh_folder
from lamoe.scripts.packing import pack

SHAKESPEARE = Path(__file__).parent / "data" / "shakespeare.txt"


@dataclass
class Arguments:
    output_dir: str = field(
        default="outputs/quickstart", metadata={"help": "Folder for the trained model and its tokenizer."}
    )
    text: str | None = field(default=None, metadata={"help": "Text file to train on; ten plays by default."})
    preset: str = field(default="tiny", metadata={"help": "Shape of the model, one of LamoeConfig.presets()."})
    vocab_size: int | None = field(
        default=None,
        metadata={"help": "Entries of the tokenizer that is trained on the text; the preset's by default."},
    )
    steps: int = field(default=200, metadata={"help": "Optimizer steps."})
    batch_size: int = field(default=8, metadata={"help": "Sequences a step."})
    sequence_length: int = field(default=128, metadata={"help": "Tokens a sequence."})
    learning_rate: float = field(default=3e-3, metadata={"help": "Peak learning rate of AdamW."})
    bias_speed: float = field(
        default=1e-2, metadata={"help": "Step of the routers' balancing bias; 0 leaves the experts unbalanced."}
    )
    held_out: float = field(
        default=0.02, metadata={"help": "Share of the text, its end, that is kept for evaluation."}
    )
    prompt: str = field(default="HAMLET.\n", metadata={"help": "What the trained model continues."})
    max_new_tokens: int = field(default=120, metadata={"help": "Length of the continuation."})
    seed: int = field(default=0, metadata={"help": "Seed of weights, data order and sampling."})
    overwrite: bool = field(default=False, metadata={"help": "Replace the output folder if it is not empty."})


def split(text: str, held_out: float) -> tuple[str, str]:
    """The text for training and its end for evaluation, cut between lines."""
    cut = text.find("\n", int(len(text) * (1 - held_out))) + 1
    return text[:cut], text[cut:]


@torch.no_grad()
def measure_balance(model: LamoeForCausalLM, input_ids: torch.Tensor) -> float:
    """MaxVio of the routers over `input_ids` [B, T], the mean of the layers."""
    model.train()  # routers count in training only
    model.update_router_bias(speed=0)
    for batch in input_ids.split(8):
        model.model(batch.to(model.device))
    counts = model.update_router_bias(speed=0)
    return sum(map(max_violation, counts)) / len(counts)


def count_parameters(model: LamoeForCausalLM) -> tuple[int, int]:
    """All parameters, and those that take part in one token: all but the routed experts that it does not choose."""
    config = model.config
    total = sum(parameter.numel() for parameter in model.parameters())
    idle = config.n_routed_experts - config.num_experts_per_tok
    return total, total - len(config.moe_layers) * idle * 3 * config.hidden_size * config.moe_intermediate_size


def report(model: LamoeForCausalLM, speed: float, before: tuple, after: tuple, logs: list[dict], console: Console):
    """Print what was trained and what came of it."""
    config = model.config
    total, active = count_parameters(model)
    latent, heads = config.kv_bytes_per_token(2), config.kv_bytes_per_token(2, expanded=True)
    grouped = heads * 2 // config.num_attention_heads
    widths = f"keys of {config.qk_head_dim}, values of {config.v_head_dim}"
    shape = Table("", "", title="The model", show_header=False)
    shape.add_row("parameters", f"{total:,}")
    shape.add_row("of which one token uses", f"{active:,}")
    shape.add_row("KV cache a token in bf16: latent attention", f"{latent:,} bytes")
    shape.add_row(f"... grouped attention, 2 KV heads ({widths})", f"{grouped:,} bytes")
    shape.add_row(f"... full attention, {config.num_attention_heads} heads ({widths})", f"{heads:,} bytes")
    shape.add_row("training speed", f"{speed:,.0f} tokens a second")
    console.print(shape)
    results = Table("on held-out text", "before", "after", title="The training")
    for name, figure in (
        ("loss, nats a token", lambda result: f"{result[0].loss:.3f}"),
        ("bits per byte", lambda result: f"{result[0].bits_per_byte:.3f}"),
        ("MaxVio, most loaded expert over the mean", lambda result: f"{result[1]:.2f}"),
    ):
        results.add_row(name, figure(before), figure(after))
    console.print(results)
    loads = [(log["max_violation"], log["step"]) for log in logs if "max_violation" in log]
    console.print("MaxVio in training: " + ", ".join(f"{load:.2f} by step {step}" for load, step in loads) + ".")


def main(arguments: Arguments):
    """Train, report, save, prove and generate.

    Raises:
        ValueError: the output folder is not empty, or the text is too short.
    """
    console = Console()
    with fresh_folder(arguments.output_dir, arguments.overwrite) as folder:
        set_seed(arguments.seed)
        (text,) = read_documents([arguments.text or SHAKESPEARE])
        training_text, held_out_text = split(text, arguments.held_out)
        config = LamoeConfig.from_preset(arguments.preset)
        tokenizer = train_tokenizer(training_text, arguments.vocab_size or config.vocab_size)
        examples = pack(tokenizer, [training_text], arguments.sequence_length)
        held_out = pack(tokenizer, [held_out_text], arguments.sequence_length)

        config = LamoeConfig.from_preset(
            arguments.preset,
            vocab_size=len(tokenizer),
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        on_gpu = torch.cuda.is_available()
        model = LamoeForCausalLM(config).to("cuda" if on_gpu else "cpu")

        def evaluate() -> tuple[Score, float]:
            length = arguments.sequence_length
            return score(model, tokenizer, [held_out_text], length, length), measure_balance(
                model, held_out.input_ids[:32]
            )

        console.print(
            f"Training {config.num_hidden_layers} layers of {config.n_routed_experts} experts on "
            f"{len(examples) * arguments.sequence_length:,} tokens ({len(tokenizer):,} different ones); "
            f"{len(held_out_text.encode()):,} bytes are held out."
        )
        before = evaluate()
        settings = TrainingArguments(
            output_dir=str(folder),
            max_steps=arguments.steps,
            per_device_train_batch_size=arguments.batch_size,
            learning_rate=arguments.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=math.ceil(arguments.steps / 20),
            weight_decay=0.1,
            adam_beta2=0.95,
            bf16=on_gpu,
            logging_steps=max(1, arguments.steps // 6),
            save_strategy="no",
            report_to="none",
            dataloader_pin_memory=on_gpu,
            seed=arguments.seed,
        )
        trainer = Trainer(
            model=model,
            args=settings,
            train_dataset=examples,
            data_collator=default_data_collator,
            callbacks=[BalanceCallback(arguments.bias_speed)],
        )
        start = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - start
        after = evaluate()
        speed = arguments.steps * arguments.batch_size * arguments.sequence_length / seconds
        report(model, speed, before, after, trainer.state.log_history, console)

        model.config.use_cache = True  # Trainer turns it off, and it would stay off in the saved config.json
        model.generation_config = GenerationConfig(
            do_sample=True,
            temperature=0.8,
            top_p=0.95,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        logging.set_verbosity_error()
        loaded = load_three_ways(folder, dtype=torch.float32)
        distances = compare_logits(loaded, held_out[0]["input_ids"][None])
        ways = Table("loaded", "as", "logits differ by", title="Equal, three ways")
        for way, distance in distances.items():
            ways.add_row(way, type(loaded[way]).__name__, f"{distance:.1e}")
        console.print(ways)

    console.print(f"Saved in {arguments.output_dir}. It writes:\n")
    model.eval()
    prompt = tokenizer(arguments.prompt, return_tensors="pt").to(model.device)
    streamer = TextStreamer(tokenizer, skip_special_tokens=True)
    model.generate(**prompt, max_new_tokens=arguments.max_new_tokens, streamer=streamer)


if __name__ == "__main__":
    main(TrlParser(Arguments).parse_args_and_config()[0])
