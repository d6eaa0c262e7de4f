"""Train a model from scratch on text: from a preset or config.json, with balanced experts, samples and curves."""

import dataclasses
import json
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import (
    AutoTokenizer,
    GenerationConfig,
    Trainer,
    TrainingArguments,
    default_data_collator,
    set_seed,
)
from trl import TrlParser

from lamoe import BalanceCallback, LamoeConfig, LamoeForCausalLM
from lamoe.hub import load_complete
from lamoe.memory import MemoryPlan, memory_explained, memory_plan
from lamoe.scripts.corpus import refuse_larger_tokenizer, train_tokenizer
from lamoe.scripts.curves import Curves
from lamoe.scripts.folders import fresh_folder, last_checkpoint, refuse_begun, training_folder
from lamoe.scripts.packing import PackedStream, documents, hold_out, load_rows, pack
from lamoe.scripts.training import Samples, choose_precision, read_mapping, refuse_steps, report_last, write_record


@dataclass
class Arguments:
    texts: list[str] = field(
        metadata={
            "help": "What to train on: text files, .jsonl or .parquet files, folders of them, or names of datasets "
            "on the Hub, with a configuration after a colon."
        }
    )
    output_dir: str = field(
        metadata={
            "help": "Folder for the trained model, its tokenizer, training.json and curves. Checkpoints lie in "
            "<output_dir>.training until training has ended."
        }
    )
    model: str = field(
        default="tiny",
        metadata={
            "help": "One of LamoeConfig.presets(), a config.json, or a folder with weights to go on from (then its "
            "tokenizer is taken)."
        },
    )
    overrides: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": "Fields of the configuration in place of the model's: '{\"num_hidden_layers\": 6}'."},
    )
    tokenizer: str | None = field(
        default=None, metadata={"help": "Folder or name of a tokenizer; without one, it is trained on the texts."}
    )
    vocab_size: int | None = field(
        default=None, metadata={"help": "Entries of a tokenizer that is trained; the model's vocab_size by default."}
    )
    tokenizer_characters: int = field(
        default=20_000_000, metadata={"help": "Characters, from the beginning, that a tokenizer is trained on."}
    )
    split: str = field(default="train", metadata={"help": "Split of folders and datasets."})
    text_field: str = field(default="text", metadata={"help": "Column that holds the text."})
    separator: str | None = field(
        default=None, metadata={"help": "What parts the documents inside a text; none: each text is one."}
    )
    streaming: bool = field(
        default=False, metadata={"help": "Read texts while training; else 8 bytes a token are held in memory."}
    )
    shuffle_buffer: int = field(
        default=1000, metadata={"help": "With --streaming, texts that are shuffled together; 0 keeps their order."}
    )
    held_out: int = field(
        default=32,
        metadata={"help": "Sequences kept from training to measure on: the last, in a stream the first ones."},
    )
    steps: int = field(default=1000, metadata={"help": "Optimizer steps."})
    batch_size: int = field(default=8, metadata={"help": "Sequences a device and a forward."})
    accumulation: int = field(default=1, metadata={"help": "Forwards a step."})
    sequence_length: int = field(
        default=1024, metadata={"help": "Tokens a sequence; documents are packed, and do not see one another."}
    )
    learning_rate: float = field(default=1e-3, metadata={"help": "Peak learning rate of AdamW."})
    schedule: str = field(default="cosine", metadata={"help": "lr_scheduler_type of Transformers."})
    warmup: float = field(default=0.05, metadata={"help": "Share of the steps in which the learning rate rises."})
    weight_decay: float = field(default=0.1, metadata={"help": "Weight decay of AdamW."})
    max_grad_norm: float = field(default=1.0, metadata={"help": "Norm that gradients are cut to."})
    bias_speed: float = field(
        default=1e-3, metadata={"help": "Step of the routers' balancing bias; 0 leaves the experts to the losses."}
    )
    precision: str = field(
        default="auto",
        metadata={"help": "bf16, fp16 or float32; auto is bf16 on a GPU that has it. Weights stay float32."},
    )
    checkpointing: bool = field(
        default=False, metadata={"help": "Gradient checkpointing: less memory, about a third more time."}
    )
    logging_steps: int = field(default=10, metadata={"help": "Steps between logs."})
    eval_steps: int = field(default=100, metadata={"help": "Steps between measurements on held-out text; 0 is none."})
    save_steps: int = field(default=100, metadata={"help": "Steps between checkpoints; 0 is none."})
    sample_steps: int = field(default=100, metadata={"help": "Steps between samples of text; 0 is none."})
    sample_prompt: str = field(default="", metadata={"help": "What the samples continue."})
    sample_tokens: int = field(default=60, metadata={"help": "Tokens of a sample."})
    report_to: list[str] = field(
        default_factory=list, metadata={"help": "Where to log besides: tensorboard, wandb, trackio, ..."}
    )
    resume: bool = field(
        default=False, metadata={"help": "Go on with what a killed run left; with nothing there, begin."}
    )
    keep_checkpoints: bool = field(
        default=False, metadata={"help": "Leave <output_dir>.training with its checkpoints when training has ended."}
    )
    seed: int = field(default=0, metadata={"help": "Seed of weights, data order and samples."})
    plan: bool = field(
        default=False,
        metadata={"help": "Only print what it takes of a GPU's memory; an upper bound where it computes in bf16."},
    )
    overwrite: bool = field(
        default=False, metadata={"help": "Replace the output folder, and what a killed run left for it."}
    )


def read_config(model: str, overrides: dict) -> LamoeConfig:
    """The configuration of a preset, a config.json or the folder that it lies in, with `overrides`.

    Raises:
        ValueError: there is no such preset or file, or a field does not fit.
    """
    path = Path(model)
    path = path / "config.json" if path.is_dir() else path
    if path.suffix != ".json" and model in LamoeConfig.presets():
        return LamoeConfig.from_preset(model, **overrides)
    if not path.is_file():
        raise ValueError(
            f"model={model!r} is neither a config.json, nor a folder with one, nor a preset: "
            f"{', '.join(LamoeConfig.presets())}."
        )
    return LamoeConfig(**{**LamoeConfig.from_family(json.loads(path.read_text(encoding="utf-8"))), **overrides})


def find_tokenizer(arguments: Arguments, work: Path, weights: Path | None, rows, vocab_size: int):
    """The tokenizer that is named, or that belongs to the weights, or that is trained on the beginning of the texts.

    Kept in `work`, where a resumed run finds it.
    """
    kept = work / "tokenizer"
    if (kept / "tokenizer_config.json").is_file():
        return AutoTokenizer.from_pretrained(kept)
    named = arguments.tokenizer or weights
    if named is not None:
        tokenizer = AutoTokenizer.from_pretrained(named)
    else:
        beginning, length = [], 0
        for text in documents(rows, arguments.text_field, arguments.separator):
            beginning.append(text[: arguments.tokenizer_characters - length])
            length += len(beginning[-1])
            if length >= arguments.tokenizer_characters:
                break
        tokenizer = train_tokenizer("\n".join(beginning), arguments.vocab_size or vocab_size)
    tokenizer.save_pretrained(kept)
    return tokenizer


def build_model(arguments: Arguments, overrides: dict, weights: Path | None, tokenizer) -> LamoeForCausalLM:
    """The model with float32 weights, new or from `weights`, and a vocabulary that fits `tokenizer`.

    Raises:
        ValueError: weights are given together with overrides or a tokenizer that is too large for them.
    """
    if weights is not None:
        if overrides:
            raise ValueError(
                f"overrides={overrides} do not go with the weights in {weights}; name its config.json to train anew."
            )
        model = load_complete(LamoeForCausalLM, weights, dtype=torch.float32)
    else:
        ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
        config = read_config(arguments.model, {"vocab_size": len(tokenizer), **ids, **overrides})
        model = LamoeForCausalLM(config)
    refuse_larger_tokenizer(tokenizer, model.config.vocab_size)
    if arguments.sequence_length > model.config.max_position_embeddings:
        raise ValueError(
            f"sequence_length={arguments.sequence_length} is longer than max_position_embeddings="
            f"{model.config.max_position_embeddings}; lower it, or override that field."
        )
    return model


def read_sequences(arguments: Arguments, tokenizer, rows):
    """What to train on, and what to measure on or None.

    Raises:
        ValueError: the texts do not fill the sequences that are asked for.
    """
    length, count = arguments.sequence_length, arguments.held_out
    form = (arguments.text_field, arguments.separator)
    if arguments.streaming:
        held_out = None
        if count:
            held_out, rows = hold_out(tokenizer, rows, count, length, *form)
        return PackedStream(tokenizer, rows, length, *form, arguments.shuffle_buffer, arguments.seed), held_out
    sequences = pack(tokenizer, documents(rows, *form), length)
    if count >= len(sequences):
        raise ValueError(f"The texts fill {len(sequences)} sequences, and held_out={count} keeps them all; lower it.")
    training, held_out = sequences.split(count)
    return training, held_out if count else None


def settings(arguments: Arguments, work: Path) -> TrainingArguments:
    """Trainer's arguments.

    Raises:
        ValueError: a count of steps does not fit those between logs.
    """
    refuse_steps(
        arguments.logging_steps,
        eval_steps=arguments.eval_steps,
        save_steps=arguments.save_steps,
        sample_steps=arguments.sample_steps,
    )
    precision = choose_precision(arguments.precision)
    measured = arguments.held_out and arguments.eval_steps
    return TrainingArguments(
        output_dir=str(work),
        max_steps=arguments.steps,
        per_device_train_batch_size=arguments.batch_size,
        per_device_eval_batch_size=arguments.batch_size,
        gradient_accumulation_steps=arguments.accumulation,
        activation_checkpointing=arguments.checkpointing,
        activation_checkpointing_kwargs={"use_reentrant": False},
        learning_rate=arguments.learning_rate,
        lr_scheduler_type=arguments.schedule,
        warmup_steps=arguments.warmup,
        weight_decay=arguments.weight_decay,
        adam_beta2=0.95,
        max_grad_norm=arguments.max_grad_norm,
        bf16=precision == "bf16",
        fp16=precision == "fp16",
        logging_steps=arguments.logging_steps,
        eval_strategy="steps" if measured else "no",
        eval_steps=arguments.eval_steps or None,
        prediction_loss_only=True,
        save_strategy="steps" if arguments.save_steps else "no",
        save_steps=arguments.save_steps or 500,
        save_total_limit=2,
        report_to=arguments.report_to or "none",
        dataloader_pin_memory=torch.cuda.is_available(),
        seed=arguments.seed,
    )


def report(trainer: Trainer, arguments: Arguments, first_step: int, seconds: float, console: Console):
    """Print what came of it."""
    logs = trainer.state.log_history
    table = Table("", "", title="The training", show_header=False)
    table.add_row("parameters", f"{sum(parameter.numel() for parameter in trainer.model.parameters()):,}")
    tokens = trainer.state.max_steps * arguments.sequence_length * trainer.args.train_batch_size
    tokens *= trainer.args.gradient_accumulation_steps * trainer.args.world_size
    table.add_row("tokens", f"{tokens:,}")
    share = 1 - first_step / trainer.state.max_steps
    table.add_row("tokens a second, all included", f"{tokens * share / seconds:,.0f}")
    losses = [log["eval_loss"] for log in logs if "eval_loss" in log]
    if losses:
        table.add_row("loss on held-out text, nats a token", f"{losses[0]:.3f} at first, {losses[-1]:.3f} at last")
    loads = [log["max_violation"] for log in logs if "max_violation" in log]
    if loads:
        table.add_row("MaxVio, most loaded expert over the mean", f"{loads[0]:.2f} at first, {loads[-1]:.2f} at last")
    console.print(table)


def planned(arguments: Arguments, config: LamoeConfig) -> MemoryPlan:
    """The memory that training takes, by count."""
    return memory_plan(
        config, arguments.batch_size, arguments.sequence_length, dtype=torch.float32,
        checkpointing=arguments.checkpointing, accumulation=arguments.accumulation,
    )  # fmt: skip


def main(arguments: Arguments):
    """Check everything, train or go on with training, and save.

    Raises:
        ValueError: the output folder is not empty, or texts, tokenizer, configuration or steps do not fit.
    """
    console = Console()
    overrides = read_mapping("overrides", arguments.overrides)
    if arguments.plan:
        console.print(str(planned(arguments, read_config(arguments.model, overrides))), markup=False, highlight=False)
        return
    refuse_begun(arguments.output_dir, arguments.resume, arguments.overwrite)
    config = read_config(arguments.model, overrides)  # refused, if at all, before --overwrite takes anything away
    plan = planned(arguments, config)
    console.print(str(plan), markup=False, highlight=False)
    told = dataclasses.asdict(arguments)
    with training_folder(arguments.output_dir, told, arguments.resume, arguments.overwrite) as work:
        trainer_arguments = settings(arguments, work)
        weights = Path(arguments.model) if any(Path(arguments.model).glob("*.safetensors")) else None
        fields = (arguments.text_field,)
        rows = load_rows(arguments.texts, arguments.split, arguments.streaming, fields)
        tokenizer = find_tokenizer(arguments, work, weights, rows, config.vocab_size)
        training, held_out = read_sequences(arguments, tokenizer, rows)
        set_seed(arguments.seed)
        model = build_model(arguments, overrides, weights, tokenizer)

        balance = BalanceCallback(arguments.bias_speed)
        curves = Curves(balance, work / "curves", model.config.moe_layers)
        samples = Samples(
            tokenizer,
            arguments.sample_prompt,
            arguments.sample_steps,
            arguments.sample_tokens,
            arguments.seed,
            console,
        )
        trainer = Trainer(
            model=model,
            args=trainer_arguments,
            train_dataset=training,
            eval_dataset=held_out,
            data_collator=default_data_collator,
            callbacks=[
                curves,
                balance,
                *([samples] if arguments.sample_steps else []),
            ],
        )
        curves.reporters = report_last(trainer)
        checkpoint = last_checkpoint(work)
        first_step = int(checkpoint.name.rpartition("-")[2]) if checkpoint else 0
        console.print(
            f"{'Going on with' if checkpoint else 'Training'} {model.config.num_hidden_layers} layers of "
            f"{model.config.n_routed_experts} experts, step {first_step} to {arguments.steps}, on "
            + ("a stream" if arguments.streaming else f"{len(training) * arguments.sequence_length:,} tokens")
            + f" ({len(tokenizer):,} different ones)."
        )
        start = time.perf_counter()
        with memory_explained(plan):
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        seconds = time.perf_counter() - start
        report(trainer, arguments, first_step, seconds, console)

        if trainer.is_world_process_zero():
            model.config.use_cache = True  # Trainer turns it off, and it would stay off in the saved config.json
            model.generation_config = GenerationConfig(
                do_sample=True,
                temperature=0.8,
                top_p=0.95,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
            with fresh_folder(arguments.output_dir, arguments.overwrite) as folder:
                model.save_pretrained(folder)
                tokenizer.save_pretrained(folder)
                write_record(folder, told, trainer.state.log_history)
                for name in ("curves", "runs"):  # runs is TensorBoard's
                    if (work / name).is_dir():
                        shutil.copytree(work / name, folder / name)
    console.print(f"Model, tokenizer, training.json and curves in {arguments.output_dir}")


if __name__ == "__main__":
    main(TrlParser(Arguments).parse_args_and_config()[0])
