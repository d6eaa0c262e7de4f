"""Fine-tune a checkpoint with TRL on text, chats, preferences or rewards: LoRA or all weights (SFT, DPO, GRPO)."""

import dataclasses
import importlib
import importlib.util
import json
import re
import shutil
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft
import torch
from huggingface_hub import snapshot_download
from peft import LoraConfig
from rich.console import Console
from rich.table import Table
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, Trainer, set_seed
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer, TrlParser

import lamoe
from lamoe import BalanceCallback, LamoeConfig, LamoeForCausalLM
from lamoe.configuration.configuration_lamoe import FAMILY_DEFAULTS
from lamoe.hub import checkpoint_tensors, load_complete
from lamoe.memory import MemoryPlan, memory_explained, memory_plan
from lamoe.scripts.corpus import refuse_larger_tokenizer, score
from lamoe.scripts.folders import fresh_folder, last_checkpoint, refuse_begun, training_folder
from lamoe.scripts.packing import load_rows
from lamoe.scripts.training import (
    choose_precision,
    read_mapping,
    refuse_steps,
    report_last,
    write_record,
)

# Attention and shared experts of Lamoe's classes, and attention of the others. Not kv_b_proj: unmerged, its adapter
# costs each decode step a product of the factors, and with a native class the whole context expanded.
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
OTHER_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj"]
# For each method, the columns of which the data need one of these sets.
COLUMNS = {
    "sft": (("text",), ("messages",), ("prompt", "completion")),
    "dpo": (("chosen", "rejected"),),
    "grpo": (("prompt",),),
}
TRAINERS = {"sft": (SFTTrainer, SFTConfig), "dpo": (DPOTrainer, DPOConfig), "grpo": (GRPOTrainer, GRPOConfig)}


@dataclass
class Arguments:
    model: str = field(metadata={"help": "Folder or name on the Hub of the checkpoint, with its tokenizer."})
    texts: list[str] = field(
        metadata={
            "help": 'What to train on: text files; .jsonl or .parquet files with "text", "messages", or "prompt" and '
            '"completion" (dpo: "chosen" and "rejected", grpo: "prompt"); folders of them, or names of datasets on '
            "the Hub, with a configuration after a colon."
        }
    )
    output_dir: str = field(
        metadata={
            "help": "Folder for the adapter, or with --merge or --no_lora for the whole checkpoint. While training, "
            "its checkpoints lie in <output_dir>.training."
        }
    )
    method: str = field(
        default="sft",
        metadata={"help": "Supervised, on preferences, or on rewards.", "choices": ["sft", "dpo", "grpo"]},
    )
    held_out: list[str] = field(
        default_factory=list,
        metadata={"help": "Such data to measure on before and after (sft, dpo); none measures nothing."},
    )
    split: str = field(default="train", metadata={"help": "Split of folders and datasets."})
    text_field: str = field(default="text", metadata={"help": "Column that holds plain text."})
    chat_template: str | None = field(
        default=None, metadata={"help": "Jinja file of the chat template, in place of the tokenizer's own."}
    )
    loss_on: str = field(
        default="auto",
        metadata={
            "help": "Which tokens count in sft: auto is the completion where data have one and else all; assistant is "
            "what the assistant says in messages.",
            "choices": ["auto", "assistant", "all"],
        },
    )
    packing: bool = field(
        default=True,
        metadata={"help": "Pack sft data without padding; documents do not see one another. Else pad each batch."},
    )
    reward: list[str] = field(
        default_factory=list,
        metadata={"help": "Rewards of grpo: file.py:function or package.module.function, as TRL calls them."},
    )
    lora: bool = field(default=True, metadata={"help": "Train a LoRA; --no_lora trains the weights themselves."})
    rank: int = field(default=16, metadata={"help": "Rank of the LoRA factors."})
    alpha: float = field(default=32, metadata={"help": "Scale of the LoRA, divided by its rank."})
    targets: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Endings of the names of the layers that get a LoRA: by default attention without kv_b_proj, "
            "and the shared experts of Lamoe's classes."
        },
    )
    router: str = field(
        default="frozen",
        metadata={"help": "Whether --no_lora also trains the routers.", "choices": ["frozen", "trained"]},
    )
    bias_speed: float = field(
        default=0.0, metadata={"help": "Step of the routers' balancing bias; 0 leaves it as it is, and logs the load."}
    )
    router_aux_loss_coef: float = field(
        default=0.0, metadata={"help": "Weight of TRL's balancing loss (Mixtral's, over all layers at once)."}
    )
    native: bool = field(
        default=False, metadata={"help": "Take Transformers' own class also where Lamoe has one for the checkpoint."}
    )
    boost: bool = field(default=False, metadata={"help": "Lend Lamoe's kernels to a native class: lamoe.boost."})
    weights: str = field(
        default="auto",
        metadata={
            "help": "What the base weights are held in: auto is bf16 for LoRA in bf16, and else float32, which small "
            "steps need.",
            "choices": ["auto", "bf16", "float32"],
        },
    )
    learning_rate: float = field(default=2e-4, metadata={"help": "Peak learning rate of AdamW."})
    epochs: float = field(default=1.0, metadata={"help": "Passes over the data."})
    steps: int = field(default=-1, metadata={"help": "Optimizer steps; if positive, --epochs does not count."})
    sequence_length: int = field(default=1024, metadata={"help": "Tokens a packed sequence, or at most in one."})
    batch_size: int = field(default=1, metadata={"help": "Sequences a device and a forward."})
    accumulation: int = field(default=8, metadata={"help": "Forwards a step."})
    checkpointing: bool = field(
        default=False, metadata={"help": "Gradient checkpointing: less memory, about a third more time."}
    )
    precision: str = field(
        default="auto", metadata={"help": "bf16, fp16 or float32; auto is bf16 on a GPU that has it, else float32."}
    )
    settings: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": "More fields of TRL's SFTConfig, DPOConfig or GRPOConfig, as JSON: '{\"beta\": 0.1}'."},
    )
    merge: bool = field(
        default=False, metadata={"help": "Save the merged model, which loads without PEFT, in place of the adapter."}
    )
    mtp: str = field(
        default="keep",
        metadata={
            "help": "keep leaves the checkpoint's multi-token-prediction layers as they are, drop leaves them out. "
            "Native classes cannot keep them: --merge and --no_lora then need drop.",
            "choices": ["keep", "drop"],
        },
    )
    logging_steps: int = field(default=10, metadata={"help": "Steps between logs."})
    save_steps: int = field(default=0, metadata={"help": "Steps between checkpoints; 0 is none."})
    report_to: list[str] = field(
        default_factory=list, metadata={"help": "Where to log besides: tensorboard, wandb, trackio, ..."}
    )
    resume: bool = field(
        default=False, metadata={"help": "Go on with what a killed run left; with nothing there, begin."}
    )
    keep_checkpoints: bool = field(
        default=False, metadata={"help": "Leave <output_dir>.training with its checkpoints when training has ended."}
    )
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Let the checkpoint's own code make its tokenizer; read it first."}
    )
    plan: bool = field(
        default=False, metadata={"help": "Only print what SFT of a Lamoe model takes of a GPU's memory."}
    )
    seed: int = field(default=0, metadata={"help": "Seed of the LoRA's weights and of the order of the data."})
    overwrite: bool = field(
        default=False, metadata={"help": "Replace the output folder, and what a killed run left for it."}
    )


def find_checkpoint(model: str) -> Path:
    """The folder `model`, or that of a model on the Hub once it is downloaded (or was).

    Raises:
        ValueError: it is neither.
    """
    if Path(model).is_dir():
        return Path(model)
    try:
        return Path(snapshot_download(model, allow_patterns=["*.safetensors", "*.json", "*.jinja", "*.model", "*.py"]))
    except (OSError, ValueError) as error:  # the errors of huggingface_hub are among these
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(f"{model} is neither a folder nor a model that the Hub gives: {reason}") from error


def read_rows(arguments: Arguments, sources: list[str], tokenizer):
    """The data in `sources`.

    Raises:
        ValueError: their columns are not those of the method, or they are chats and there is no template for them.
    """
    wanted = [
        [arguments.text_field if name == "text" else name for name in names] for names in COLUMNS[arguments.method]
    ]
    rows = load_rows(sources, arguments.split, fields=tuple(name for names in wanted for name in names))
    if not any(set(names) <= set(rows.column_names) for names in wanted):
        raise ValueError(
            f"The data have the columns {', '.join(rows.column_names)}; {arguments.method} needs "
            f"{', or '.join(' and '.join(names) for names in wanted)}."
        )
    chats = any(isinstance(value, list) for value in rows[0].values())
    if chats and not tokenizer.chat_template:
        raise ValueError("The data are chats, and the tokenizer has no chat template; name one with --chat_template.")
    if arguments.loss_on == "assistant" and "messages" not in rows.column_names:
        raise ValueError(f"loss_on='assistant' needs messages; the data have {', '.join(rows.column_names)}.")
    return rows


def find_reward(name: str):
    """The function `name`: file.py:function or package.module.function.

    Raises:
        ValueError: there is none.
    """
    file, _, function = name.rpartition(":") if ":" in name else name.rpartition(".")
    try:
        if file.endswith(".py"):
            spec = importlib.util.spec_from_file_location(Path(file).stem, file)
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        else:
            module = importlib.import_module(file)
        return getattr(module, function)
    except (ImportError, OSError, AttributeError, ValueError) as error:
        raise ValueError(
            f"reward={name!r} is neither file.py:function nor package.module.function: {error}."
        ) from error


def planned(arguments: Arguments) -> MemoryPlan | None:
    """The memory that it takes, if that is known: of SFT with one of Lamoe's classes.

    Raises:
        ValueError: --plan asks for what is not known.
    """
    config = read_config(find_checkpoint(arguments.model), arguments.native)
    if arguments.method != "sft" or not isinstance(config, LamoeConfig):
        if arguments.plan:
            raise ValueError("--plan knows SFT with Lamoe's classes; leave out --native, and --method dpo or grpo.")
        return None
    half = halves(arguments, choose_precision(arguments.precision))
    return memory_plan(
        config, arguments.batch_size, arguments.sequence_length, dtype=torch.bfloat16 if half else torch.float32,
        checkpointing=arguments.checkpointing, accumulation=arguments.accumulation,
        lora_rank=arguments.rank if arguments.lora else None, lora_targets=tuple(arguments.targets or TARGETS),
    )  # fmt: skip


def halves(arguments: Arguments, precision: str) -> bool:
    """Whether the weights are held in bfloat16."""
    return arguments.weights == "bf16" or (arguments.weights == "auto" and precision == "bf16" and arguments.lora)


def has_mtp(folder: Path, config) -> bool:
    """Whether the checkpoint holds multi-token-prediction layers; native saving leaves their number without them."""
    first, count = config.num_hidden_layers, getattr(config, "num_nextn_predict_layers", 0) or 0
    prefixes = tuple(f"model.layers.{layer}." for layer in range(first, first + count))
    return bool(prefixes) and any(name.startswith(prefixes) for name in checkpoint_tensors(folder))


def load_model(arguments: Arguments, folder: Path, config, precision: str):
    """The model in `folder`: Lamoe's class where it reads the family, else Transformers' own.

    Raises:
        ValueError: its weights are not complete.
    """
    ours = isinstance(config, LamoeConfig)
    model_class = LamoeForCausalLM if ours else AutoModelForCausalLM
    half = halves(arguments, precision)
    without = {"num_nextn_predict_layers": 0} if ours and arguments.mtp == "drop" else {}
    model = load_complete(model_class, folder, dtype=torch.bfloat16 if half else torch.float32, **without)
    if ours:
        for layer in model.model.mtp_layers:
            layer.requires_grad_(False)  # TRL's losses do not reach them
    model.name_or_path = model.config.name_or_path = arguments.model  # not the folder of a download: adapters name it
    if arguments.boost:
        lamoe.boost(model)
    return model


def freeze_routers(model):
    """Let the routers' weights be; their biases are no parameters."""
    for module in model.modules():
        if re.search(r"Router$", type(module).__name__):
            module.requires_grad_(False)


def default_targets(config) -> list[str]:
    """Endings of the layers that get a LoRA if nobody says which."""
    if not hasattr(config, "kv_lora_rank"):
        return OTHER_TARGETS
    return TARGETS if isinstance(config, LamoeConfig) else [name for name in TARGETS if not name.startswith("shared")]


def refuse_swapped_targets(trainer: Trainer, targets: list[str]):
    """Raise a ValueError if PEFT took shared experts for the routed ones, as 0.21 does with native classes."""
    adapters = getattr(trainer.model, "peft_config", {}).values()
    if any("shared" in name for name in targets) and any(adapter.target_parameters for adapter in adapters):
        raise ValueError(
            f"targets={targets}: of this native class PEFT {peft.__version__} adapts the routed experts in place of "
            "the shared ones (huggingface/peft#3711); leave --native out, or name attention alone."
        )


def trl_config(arguments: Arguments, work: Path, precision: str):
    """TRL's arguments for the method.

    Raises:
        ValueError: `settings` is no object of JSON, or a count of steps does not fit that between logs.
    """
    refuse_steps(arguments.logging_steps, save_steps=arguments.save_steps)
    more = read_mapping("settings", arguments.settings)
    own = {}
    if arguments.method == "sft":
        own = {
            "max_length": arguments.sequence_length,
            "dataset_text_field": arguments.text_field,
            "packing": arguments.packing,
            "packing_strategy": "bfd_split",  # plain "bfd" would cut long documents off
            "eval_packing": False,
            "assistant_only_loss": arguments.loss_on == "assistant",
            "completion_only_loss": False if arguments.loss_on == "all" else None,
        }
    elif arguments.method == "dpo":
        own = {"max_length": arguments.sequence_length}
    _, config_class = TRAINERS[arguments.method]
    common = {
        "output_dir": str(work),
        "max_steps": arguments.steps,
        "num_train_epochs": arguments.epochs,
        "per_device_train_batch_size": arguments.batch_size,
        "gradient_accumulation_steps": arguments.accumulation,
        "activation_checkpointing": arguments.checkpointing,
        "activation_checkpointing_kwargs": {"use_reentrant": False},
        "learning_rate": arguments.learning_rate,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.03,
        "router_aux_loss_coef": arguments.router_aux_loss_coef,
        "bf16": precision == "bf16",
        "fp16": precision == "fp16",
        "logging_steps": arguments.logging_steps,
        "save_strategy": "steps" if arguments.save_steps else "no",
        "save_steps": arguments.save_steps or 500,
        "save_total_limit": 2,
        "report_to": arguments.report_to or "none",
        "dataloader_pin_memory": torch.cuda.is_available(),
        "seed": arguments.seed,
    }
    return config_class(**{**common, **own, **more})


def measure(arguments: Arguments, trainer: Trainer, tokenizer, held_out) -> dict[str, float]:
    """Figures of the held-out data by name: of plain text the loss and bits per byte, else what TRL measures."""
    if trainer.eval_dataset is None:
        window = min(arguments.sequence_length, trainer.model.config.max_position_embeddings)
        found = score(trainer.model, tokenizer, held_out[arguments.text_field], window, max(1, window // 2))
        return {"loss, nats a token": found.loss, "bits per byte": found.bits_per_byte}
    names = {
        "eval_loss": "loss",
        "eval_mean_token_accuracy": "token accuracy",
        "eval_rewards/accuracies": "chosen over rejected",
    }
    figures = trainer.evaluate()
    return {name: figures[key] for key, name in names.items() if key in figures}


def main(arguments: Arguments):
    """Check everything, train or go on with training, measure and save.

    Raises:
        ValueError: the output folder is not empty, data, tokenizer or settings do not fit, or saving would lose the
            checkpoint's multi-token-prediction layers.
    """
    console = Console()
    if arguments.plan:
        console.print(str(planned(arguments)), markup=False, highlight=False)
        return
    refuse_begun(arguments.output_dir, arguments.resume, arguments.overwrite)
    plan = planned(arguments)  # and what cannot be read is refused before --overwrite takes anything away
    if plan is not None:
        console.print(str(plan), markup=False, highlight=False)
    told = dataclasses.asdict(arguments)
    with training_folder(arguments.output_dir, told, arguments.resume, arguments.overwrite) as work:
        precision = choose_precision(arguments.precision)
        trainer_arguments = trl_config(arguments, work, precision)
        checkpoint = find_checkpoint(arguments.model)
        config = read_config(checkpoint, arguments.native)
        whole = arguments.merge or not arguments.lora
        extra = getattr(config, "num_nextn_predict_layers", 0)
        if whole and arguments.mtp != "drop" and not isinstance(config, LamoeConfig) and has_mtp(checkpoint, config):
            raise ValueError(
                f"num_nextn_predict_layers={extra}: with a native class the "
                f"{'merged' if arguments.lora else 'trained'} checkpoint would lose these multi-token-prediction "
                "layers; leave --native out, or pass --mtp drop to let them go, or save an adapter (neither --merge "
                "nor --no_lora)."
            )
        if arguments.method == "grpo" and not arguments.reward:
            raise ValueError("method='grpo' needs --reward, a function that judges what the model writes.")
        if arguments.method == "grpo" and arguments.held_out:
            raise ValueError("method='grpo' logs its rewards while it trains; --held_out is for sft and dpo.")
        tokenizer = AutoTokenizer.from_pretrained(checkpoint, trust_remote_code=arguments.trust_remote_code)
        refuse_larger_tokenizer(tokenizer, config.vocab_size)
        if arguments.chat_template is not None:
            tokenizer.chat_template = Path(arguments.chat_template).read_text(encoding="utf-8")
        rows = read_rows(arguments, arguments.texts, tokenizer)
        held_out = read_rows(arguments, arguments.held_out, tokenizer) if arguments.held_out else None

        set_seed(arguments.seed)
        last = last_checkpoint(work)
        # Trainer resumes by load_state_dict, which knows nothing of native experts with one tensor each on disk.
        source = last if last and not arguments.lora else checkpoint
        model = load_model(arguments, source, config, precision)
        before_training = {name: getattr(model.config, name, None) for name in SAVED}
        if not arguments.lora and arguments.router == "frozen":
            freeze_routers(model)
        lora = None
        if arguments.lora:
            lora = LoraConfig(
                r=arguments.rank,
                lora_alpha=arguments.alpha,
                target_modules=arguments.targets or default_targets(config),
                task_type="CAUSAL_LM",
            )
        needed = {}
        if held_out is not None and arguments.text_field not in held_out.column_names:
            needed["eval_dataset"] = held_out
        if arguments.method == "grpo":
            needed["reward_funcs"] = [find_reward(name) for name in arguments.reward]
        elif arguments.method == "dpo" and lora is None:
            needed["ref_model"] = load_model(arguments, checkpoint, config, precision)
        trainer_class, _ = TRAINERS[arguments.method]
        trainer = trainer_class(
            model=model,
            args=trainer_arguments,
            train_dataset=rows,
            processing_class=tokenizer,
            peft_config=lora,
            callbacks=[BalanceCallback(arguments.bias_speed)],
            **needed,
        )
        report_last(trainer)
        refuse_swapped_targets(trainer, arguments.targets)
        if arguments.boost:  # again: what runs depends on the adapters, and on the device that the trainer moved it to
            console.print(str(lamoe.boost(trainer.model)), markup=False, highlight=False)
        trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        console.print(
            f"Training {trained:,} of {sum(parameter.numel() for parameter in model.parameters()):,} weights."
        )

        before = measure(arguments, trainer, tokenizer, held_out) if held_out is not None else {}
        with nullcontext() if plan is None else memory_explained(plan):
            trainer.train(resume_from_checkpoint=str(last) if last else None)
        if held_out is not None:
            after = measure(arguments, trainer, tokenizer, held_out)
            table = Table("on held-out text", "before", "after")
            for name, figure in before.items():
                table.add_row(name, f"{figure:.4f}", f"{after[name]:.4f}")
            console.print(table)

        if trainer.is_world_process_zero():
            for name, value in before_training.items():
                setattr(model.config, name, value)
            with fresh_folder(arguments.output_dir, arguments.overwrite) as folder:
                if whole:
                    final = trainer.model.merge_and_unload() if arguments.lora else trainer.model
                    if extra and not isinstance(config, LamoeConfig):  # whose class knows what it has
                        final.config.num_nextn_predict_layers = 0
                    final.save_pretrained(folder)
                else:
                    trainer.model.save_pretrained(folder, save_embedding_layers=False)
                tokenizer.save_pretrained(folder)
                write_record(folder, told, trainer.state.log_history)
                if (work / "runs").is_dir():  # TensorBoard's
                    shutil.copytree(work / "runs", folder / "runs")
    console.print(f"{'Checkpoint' if whole else 'Adapter'} in {arguments.output_dir}")


# What Trainer and TRL change in the configuration while they train, and what would stay so in the saved config.json.
SAVED = ("use_cache", "output_router_logits", "router_aux_loss_coef")


def read_config(folder: Path, native: bool):
    """The checkpoint's configuration, as a LamoeConfig if Lamoe has a class for it and `native` is false."""
    family = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")
    if not native and family in (LamoeConfig.model_type, *FAMILY_DEFAULTS):
        return LamoeConfig.from_pretrained(folder)
    return AutoConfig.from_pretrained(folder)


if __name__ == "__main__":
    main(TrlParser(Arguments).parse_args_and_config()[0])
