"""Print what training would take of a GPU's memory: parameters, gradients, optimizer, activations."""

from dataclasses import dataclass, field

import torch
from trl import TrlParser

from lamoe import LamoeConfig
from lamoe.memory import ATTENTION_AND_SHARED, memory_plan


@dataclass
class Arguments:
    """Which training to plan."""

    preset: str | None = field(default=None, metadata={"help": "Published shape; or give --model."})
    model: str | None = field(default=None, metadata={"help": "Folder of a checkpoint, of which config.json is read."})
    layers: int | None = field(default=None, metadata={"help": "Decoder layers instead of that number."})
    batch_size: int = field(default=1, metadata={"help": "Sequences a forward."})
    sequence_length: int = field(default=4096, metadata={"help": "Tokens a sequence."})
    accumulation: int = field(default=1, metadata={"help": "Forwards a step."})
    optimizer: str = field(default="adamw", metadata={"help": "adamw, adamw_8bit, adafactor, sgd, momentum or muon."})
    dtype: str = field(
        default="bfloat16", metadata={"help": "Of the weights.", "choices": ["bfloat16", "float16", "float32"]}
    )
    checkpointing: bool = field(default=False, metadata={"help": "Gradient checkpointing."})
    rank: int | None = field(default=None, metadata={"help": "Rank of a LoRA; none trains everything."})
    targets: list[str] = field(
        default_factory=lambda: list(ATTENTION_AND_SHARED),
        metadata={"help": "Endings of the names of the layers that get a LoRA."},
    )
    experts: str = field(default="lamoe", metadata={"help": "The experts' implementation."})
    expert_recompute: bool = field(default=False, metadata={"help": "The configuration's field."})
    skip_logits: bool = field(default=False, metadata={"help": "The configuration's field."})


def main(arguments: Arguments):
    """Print the plan, and what would lower it.

    Raises:
        ValueError: not exactly one of `preset` and `model` is given, or what `memory_plan` refuses.
    """
    if (arguments.preset is None) == (arguments.model is None):
        raise ValueError("Give either --preset or --model, to say which shape is planned.")
    config = (
        LamoeConfig.from_preset(arguments.preset)
        if arguments.preset is not None
        else LamoeConfig.from_pretrained(arguments.model)
    )
    if arguments.layers is not None:
        config.num_hidden_layers = arguments.layers
    plan = memory_plan(
        config,
        arguments.batch_size,
        arguments.sequence_length,
        accumulation=arguments.accumulation,
        optimizer=arguments.optimizer,
        dtype=getattr(torch, arguments.dtype),
        checkpointing=arguments.checkpointing,
        lora_rank=arguments.rank,
        lora_targets=tuple(arguments.targets),
        experts=arguments.experts,
        expert_recompute=arguments.expert_recompute or config.expert_recompute,
        skip_logits=arguments.skip_logits or config.skip_logits,
    )
    print(plan)
    for way in plan.ways_out():
        print(f"  {way}")


if __name__ == "__main__":
    main(TrlParser(Arguments).parse_args_and_config()[0])
