"""Fine-tune a checkpoint on text with LoRA on its attention and shared experts (Trainer + PEFT)."""

import warnings
from dataclasses import dataclass, field
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer, Trainer, TrainingArguments, default_data_collator, set_seed
from trl import TrlParser

from lamoe import BalanceCallback, LamoeConfig, LamoeForCausalLM
from lamoe.hub import load_complete
from lamoe.scripts.convert import mtp_tensors
from lamoe.scripts.corpus import pack, read_documents, refuse_larger_tokenizer, score
from lamoe.scripts.folders import fresh_folder, refuse_full

TARGETS = [
    "q_proj",
    "q_a_proj",
    "q_b_proj",
    "kv_a_proj_with_mqa",
    "o_proj",
    "shared_experts.gate_proj",
    "shared_experts.up_proj",
    "shared_experts.down_proj",
]


@dataclass
class Arguments:
    model: str = field(metadata={"help": "Folder of the checkpoint, with its tokenizer."})
    texts: list[str] = field(metadata={"help": 'Text files, or .jsonl files with a field "text" a line, to train on.'})
    output_dir: str = field(metadata={"help": "Folder for the adapter, or with --merge for the merged checkpoint."})
    held_out: list[str] = field(
        default_factory=list, metadata={"help": "Such files to measure on before and after; none measures nothing."}
    )
    rank: int = field(default=16, metadata={"help": "Rank of the LoRA factors."})
    alpha: float = field(default=32, metadata={"help": "Scale of the LoRA, divided by its rank."})
    targets: list[str] = field(
        default_factory=lambda: list(TARGETS),
        metadata={
            "help": "Endings of the names of the layers that get a LoRA. kv_b_proj is left out by default: with an "
            "unmerged adapter on it, each step of decoding expands the whole context."
        },
    )
    learning_rate: float = field(default=2e-4, metadata={"help": "Peak learning rate of AdamW."})
    epochs: float = field(default=1.0, metadata={"help": "Passes over the text."})
    steps: int = field(default=-1, metadata={"help": "Optimizer steps; if positive, --epochs does not count."})
    sequence_length: int = field(default=1024, metadata={"help": "Tokens a sequence; texts are packed end to end."})
    batch_size: int = field(default=1, metadata={"help": "Sequences a device and a forward."})
    accumulation: int = field(default=8, metadata={"help": "Forwards a step."})
    checkpointing: bool = field(
        default=False, metadata={"help": "Gradient checkpointing: less memory, about a third more time."}
    )
    precision: str = field(
        default="auto", metadata={"help": "bf16, fp16 or float32; auto is bf16 on a GPU that has it, else float32."}
    )
    merge: bool = field(
        default=False, metadata={"help": "Save the merged model, which loads without PEFT, in place of the adapter."}
    )
    mtp: str = field(
        default="keep",
        metadata={
            "help": "drop lets --merge lose the multi-token-prediction layers of a checkpoint that has them.",
            "choices": ["keep", "drop"],
        },
    )
    seed: int = field(default=0, metadata={"help": "Seed of the LoRA's weights and of the order of the data."})
    overwrite: bool = field(default=False, metadata={"help": "Replace the output folder if it is not empty."})


def choose_precision(precision: str) -> str:
    """One of bf16, fp16 and float32.

    Raises:
        ValueError: `precision` is not one of these, nor auto.
    """
    if precision not in ("auto", "bf16", "fp16", "float32"):
        raise ValueError(f"precision={precision!r} is not one of auto, bf16, fp16, float32.")
    if precision == "fp16":
        warnings.warn("fp16 overflows in the routers and experts of large models; bf16 does not.", stacklevel=2)
    if precision == "auto":
        return "bf16" if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else "float32"
    return precision


def main(arguments: Arguments):
    """Check everything, train, measure and save.

    Raises:
        ValueError: the output folder is not empty, a text cannot be read, the tokenizer does not fit the checkpoint,
            or merging would lose its multi-token-prediction layers.
    """
    refuse_full(arguments.output_dir, arguments.overwrite)
    precision = choose_precision(arguments.precision)
    config = LamoeConfig.from_pretrained(arguments.model)
    if arguments.merge and arguments.mtp != "drop" and mtp_tensors(Path(arguments.model), config):
        raise ValueError(
            f"num_nextn_predict_layers={config.num_nextn_predict_layers}: the merged checkpoint would lose these "
            "multi-token-prediction layers; pass --mtp drop to let them go, or save the adapter without --merge."
        )
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    refuse_larger_tokenizer(tokenizer, config.vocab_size)
    examples = pack(tokenizer, read_documents(arguments.texts), arguments.sequence_length)
    held_out = read_documents(arguments.held_out)

    console = Console()
    set_seed(arguments.seed)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    base = load_complete(LamoeForCausalLM, arguments.model, dtype=dtype)
    lora = LoraConfig(
        r=arguments.rank, lora_alpha=arguments.alpha, target_modules=arguments.targets, task_type="CAUSAL_LM"
    )
    model = get_peft_model(base, lora)
    model.print_trainable_parameters()

    with fresh_folder(arguments.output_dir, arguments.overwrite) as folder:
        trainer = Trainer(
            model=model,
            args=TrainingArguments(
                output_dir=str(folder),
                max_steps=arguments.steps,
                num_train_epochs=arguments.epochs,
                per_device_train_batch_size=arguments.batch_size,
                gradient_accumulation_steps=arguments.accumulation,
                activation_checkpointing=arguments.checkpointing,
                activation_checkpointing_kwargs={"use_reentrant": False},
                learning_rate=arguments.learning_rate,
                lr_scheduler_type="cosine",
                warmup_steps=0.03,
                bf16=precision == "bf16",
                fp16=precision == "fp16",
                logging_steps=10,
                save_strategy="no",
                report_to="none",
                label_names=["labels"],
                seed=arguments.seed,
                dataloader_pin_memory=torch.cuda.is_available(),
            ),
            train_dataset=examples,
            data_collator=default_data_collator,
            callbacks=[BalanceCallback(speed=0)],
        )

        def measure():
            window = min(arguments.sequence_length, config.max_position_embeddings)
            return score(model, tokenizer, held_out, window, max(1, window // 2)) if held_out else None

        before = measure()
        trainer.train()
        after = measure()
        if held_out:
            table = Table("on held-out text", "before", "after")
            table.add_row("loss, nats a token", f"{before.loss:.4f}", f"{after.loss:.4f}")
            table.add_row("bits per byte", f"{before.bits_per_byte:.4f}", f"{after.bits_per_byte:.4f}")
            console.print(table)

        base.config.use_cache = True  # Trainer turns it off, and it would stay off in the saved config.json
        if arguments.merge:
            merged = model.merge_and_unload()
            merged.config.num_nextn_predict_layers = 0
            merged.save_pretrained(folder)
        else:
            model.save_pretrained(folder, save_embedding_layers=False)
        tokenizer.save_pretrained(folder)
    console.print(f"{'Merged checkpoint' if arguments.merge else 'Adapter'} in {arguments.output_dir}")


if __name__ == "__main__":
    main(TrlParser(Arguments).parse_args_and_config()[0])
