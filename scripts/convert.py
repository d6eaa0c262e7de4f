"""Convert a DeepSeek-shaped checkpoint into a dual-mode folder, and prove that its logits are the same."""

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, logging
from trl import TrlParser

from lamoe import LamoeConfig, LamoeForCausalLM
from lamoe.hub import checkpoint_tensors, compare_logits, load_complete, load_three_ways
from lamoe.scripts.folders import fresh_folder, refuse_full

TOKENIZER_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "*.tiktoken",
    "*.jinja",
    "tokenization_*.py",
    "LICENSE*",
)


@dataclass
class Arguments:
    model: str = field(
        metadata={"help": "Folder of a deepseek_v2, deepseek_v3, kimi_k2, glm4_moe_lite or lamoe checkpoint."}
    )
    output_dir: str = field(metadata={"help": "Folder for the dual-mode checkpoint."})
    mtp: str = field(
        default="keep",
        metadata={"help": "Copy the multi-token-prediction layers, or leave them out.", "choices": ["keep", "drop"]},
    )
    dtype: str = field(
        default="auto", metadata={"help": "auto (the checkpoint's; bfloat16 for FP8), float32, bfloat16 or float16."}
    )
    max_shard_size: str = field(default="5GB", metadata={"help": "Most bytes of a file of weights."})
    tolerance: float = field(
        default=1e-4, metadata={"help": "How far the logits may be apart, relative, in float32, on random tokens."}
    )
    check_tokens: int = field(default=64, metadata={"help": "Random tokens on which logits are compared."})
    overwrite: bool = field(default=False, metadata={"help": "Replace the output folder if it is not empty."})


def reference(folder: Path, config: LamoeConfig) -> tuple[str, LamoeForCausalLM]:
    """The checkpoint in `folder` by the best witness there is, in float32, and that witness's name.

    That is Transformers' class of its `model_type`; for kimi_k2, which has none, the native class of the same
    architecture; else our own.
    """
    family = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")
    native, _ = config.native_form()
    options = {"dtype": torch.float32, "trust_remote_code": False}
    if family not in CONFIG_MAPPING and native:
        written = config.serving_dict()
        written.pop("auto_map", None)
        options["config"] = CONFIG_MAPPING[native].from_dict(written)
    model, found = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **options)
    if found["missing_keys"] or found["mismatched_keys"]:
        raise ValueError(f"{folder} lacks weights of {type(model).__name__}: {found}.")
    return type(model).__name__, model


def mtp_tensors(folder: Path, config: LamoeConfig) -> dict[str, Path]:
    """The tensors of the checkpoint's multi-token-prediction layers, if it has any: name -> safetensors file.

    The configuration alone does not tell: native saving drops the layers and leaves `num_nextn_predict_layers`.
    """
    first = config.num_hidden_layers
    prefixes = tuple(f"model.layers.{first + k}." for k in range(config.num_nextn_predict_layers))
    return {name: file for name, file in checkpoint_tensors(folder).items() if name.startswith(prefixes)}


def append_shard(folder: Path, wanted: dict[str, Path]):
    """Add the tensors `wanted`, byte for byte as in their files, to the checkpoint in `folder` as its last shard."""
    there = checkpoint_tensors(folder)
    shards = sorted(set(there.values()))
    names = [f"model-{i:05d}-of-{len(shards) + 1:05d}.safetensors" for i in range(1, len(shards) + 2)]
    for shard, name in zip(shards, names, strict=False):
        shard.rename(folder / name)
    renamed = dict(zip(shards, names, strict=False))
    copied = {}
    for file in sorted(set(wanted.values())):
        with safe_open(file, framework="pt") as opened:
            copied |= {name: opened.get_tensor(name) for name, holder in wanted.items() if holder == file}
    save_file(copied, folder / names[-1], metadata={"format": "pt"})
    weight_map = {name: renamed[file] for name, file in there.items()} | dict.fromkeys(copied, names[-1])
    size = 0
    for name in names:
        with safe_open(folder / name, framework="pt") as opened:
            for tensor in opened.keys():  # noqa: SIM118 (the file is no dict)
                size += opened.get_tensor(tensor).nbytes
    index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    checkpoint_tensors(folder)


def main(arguments: Arguments):
    """Read, write, compare and copy; the folder appears under its name only when all of it has succeeded.

    Raises:
        ValueError: the output folder is not empty, the source cannot be read whole, or logits differ.
    """
    source = Path(arguments.model)
    refuse_full(arguments.output_dir, arguments.overwrite)
    if Path(arguments.output_dir).resolve() == source.resolve():
        raise ValueError(f"{source} is both source and output folder; choose another output folder.")
    if not (source / "config.json").is_file():
        raise ValueError(f"{source} has no config.json; give the folder of a checkpoint.")
    config = LamoeConfig.from_pretrained(source)
    extra = {} if arguments.mtp == "drop" else mtp_tensors(source, config)
    if extra and any(name.endswith("weight_scale_inv") for name in extra):
        raise ValueError(
            "The multi-token-prediction layers are in FP8 and the converted checkpoint is not, so that they cannot be "
            "copied as they are; leave them out with --mtp drop."
        )
    console = Console()
    native, reason = config.native_form()
    if native:
        console.print(f"Natively a {native} model: the folder will load with and without Lamoe.")
    else:
        console.print(f"No native class can express it ({reason}); the folder will say model_type lamoe.")

    model = load_complete(LamoeForCausalLM, source, dtype=arguments.dtype)
    model.config.num_nextn_predict_layers = config.num_nextn_predict_layers if extra else 0
    with fresh_folder(arguments.output_dir, arguments.overwrite) as folder:
        model.save_pretrained(folder, max_shard_size=arguments.max_shard_size)
        for pattern in TOKENIZER_FILES:
            for file in source.glob(pattern):
                shutil.copyfile(file, folder / file.name)
        del model

        witness, expected = reference(source, config)
        if native:
            ways = load_three_ways(folder, dtype=torch.float32)
        else:
            options = {"dtype": torch.float32}
            ways = {"remote code": load_complete(AutoModelForCausalLM, folder, trust_remote_code=True, **options)}
            ways["package"] = load_complete(LamoeForCausalLM, folder, **options)
        generator = torch.Generator().manual_seed(0)
        length = min(arguments.check_tokens, config.max_position_embeddings)
        ids = torch.randint(0, config.vocab_size, (1, length), generator=generator)
        distances = compare_logits({f"source by {witness}": expected, **ways}, ids, arguments.tolerance)
        del expected, ways
        if extra:
            append_shard(folder, extra)

    table = Table("loaded", "distance of its logits", title=f"{arguments.output_dir}")
    for way, distance in distances.items():
        table.add_row(way, f"{distance:.1e}")
    console.print(table)
    if extra:
        console.print(
            f"{len(extra)} tensors of {config.num_nextn_predict_layers} multi-token-prediction layers copied."
        )


if __name__ == "__main__":
    logging.set_verbosity_error()  # what load_complete refuses need not be reported as well
    main(TrlParser(Arguments).parse_args_and_config()[0])
