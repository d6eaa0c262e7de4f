"""Convert a DeepSeek-shaped checkpoint into a dual-mode folder, and prove that its logits are the same."""

import json
import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel
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
        metadata={"help": "Keep the multi-token-prediction layers, or leave them out.", "choices": ["keep", "drop"]},
    )
    dtype: str = field(
        default="auto", metadata={"help": "auto (the checkpoint's; bfloat16 for FP8), float32, bfloat16 or float16."}
    )
    max_shard_size: str = field(default="5GB", metadata={"help": "Most bytes of a file of weights."})
    tolerance: float | None = field(
        default=None,
        metadata={
            "help": "How far the logits may be apart, relative, on random tokens in float32; 1e-4, or 3e-2 if --dtype "
            "rounds the weights."
        },
    )
    check_tokens: int = field(default=64, metadata={"help": "Random tokens on which logits are compared."})
    overwrite: bool = field(default=False, metadata={"help": "Replace the output folder if it is not empty."})


def reference(folder: Path, config: LamoeConfig) -> PreTrainedModel:
    """The checkpoint in `folder` by the best witness there is, in float32.

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
    return model


def dequantise(source: Path, folder: Path):
    """Write the FP8 checkpoint in `source` (DeepSeek-V3's block scales) to `folder` in bfloat16, file by file.

    Transformers 5.23 does this too, but takes the block's size from the number of scales: where the last block is not
    full (576 rows in blocks of 128) it refuses, or multiplies rows by their neighbours' scale.

    Raises:
        ValueError: it is quantised in another way, or a scale is missing or of another shape.
    """
    written = json.loads((source / "config.json").read_text(encoding="utf-8"))
    scheme = written.pop("quantization_config")
    block = scheme.get("weight_block_size")
    if scheme.get("quant_method") != "fp8" or not block:
        raise ValueError(f"quantization_config={scheme} is not FP8 in blocks, the only quantisation that is read.")
    (folder / "config.json").write_text(json.dumps(written | {"dtype": "bfloat16"}), encoding="utf-8")
    if (source / "generation_config.json").is_file():
        shutil.copyfile(source / "generation_config.json", folder / "generation_config.json")

    files = checkpoint_tensors(source)
    scales = {}
    for file in sorted(set(files.values())):
        with safe_open(file, framework="pt") as opened:
            scales |= {name: opened.get_tensor(name) for name in opened.keys() if name.endswith("_scale_inv")}  # noqa: SIM118
    weight_map = {}
    for file in sorted(set(files.values())):
        names = [name for name, holder in files.items() if holder == file and name not in scales]
        with safe_open(file, framework="pt") as opened:
            tensors = {name: opened.get_tensor(name) for name in names}
        for name, weight in tensors.items():
            if weight.element_size() == 1:
                tensors[name] = _times_scale(name, weight, scales.get(f"{name}_scale_inv"), block)
        save_file(tensors, folder / file.name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file.name)
    if len(set(files.values())) > 1:
        (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps({"weight_map": weight_map}), encoding="utf-8")


def _times_scale(name: str, weight: torch.Tensor, scale: torch.Tensor | None, block: list[int]) -> torch.Tensor:
    """FP8 `weight` [rows, columns] times the scale of its block, rounded once, to bfloat16."""
    expected = [-(-size // width) for size, width in zip(weight.shape, block, strict=True)]
    if scale is None or list(scale.shape) != expected:
        found = "none" if scale is None else list(scale.shape)
        raise ValueError(f"{name} is FP8 and needs scales {expected} in {name}_scale_inv; there is {found}.")
    whole = scale.float().repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
    return (weight.float() * whole[: weight.shape[0], : weight.shape[1]]).bfloat16()


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
    checkpoint_tensors(source)
    with fresh_folder(arguments.output_dir, arguments.overwrite) as folder:
        if "quantization_config" in json.loads((source / "config.json").read_text(encoding="utf-8")):
            with tempfile.TemporaryDirectory(prefix=f"{folder.name}.", dir=folder.parent) as plain:
                dequantise(source, Path(plain))
                convert(Path(plain), folder, arguments)
        else:
            convert(source, folder, arguments)
        for pattern in TOKENIZER_FILES:
            for file in source.glob(pattern):
                shutil.copyfile(file, folder / file.name)
    Console().print(f"Saved in {arguments.output_dir}")


def convert(source: Path, folder: Path, arguments: Arguments):
    """Write the checkpoint in `source`, which is not quantised, to the empty `folder` and compare the two."""
    console = Console()
    config = LamoeConfig.from_pretrained(source)
    native, reason = config.native_form()
    if native:
        console.print(f"Natively a {native} model: the folder will load with and without Lamoe.")
    else:
        console.print(f"No native class can express it ({reason}); the folder will say model_type lamoe.")
    without = {"num_nextn_predict_layers": 0} if arguments.mtp == "drop" else {}
    model = load_complete(LamoeForCausalLM, source, dtype=arguments.dtype, **without)
    model.save_pretrained(folder, max_shard_size=arguments.max_shard_size)
    layers = model.config.num_nextn_predict_layers
    del model

    options = {"dtype": torch.float32}
    if native:
        ways = load_three_ways(folder, **options)
    else:
        ways = {"remote code": load_complete(AutoModelForCausalLM, folder, trust_remote_code=True, **options)}
        ways["package"] = load_complete(LamoeForCausalLM, folder, **options)
    expected = reference(source, config)
    rounded = arguments.dtype in ("bfloat16", "float16")
    tolerance = arguments.tolerance if arguments.tolerance is not None else 3e-2 if rounded else 1e-4
    generator = torch.Generator().manual_seed(0)
    length = min(arguments.check_tokens, config.max_position_embeddings)
    ids = torch.randint(0, config.vocab_size, (1, length), generator=generator)
    distances = compare_logits({f"source by {type(expected).__name__}": expected, **ways}, ids, tolerance)
    table = Table("loaded", "distance of its logits")
    for way, distance in distances.items():
        table.add_row(way, f"{distance:.1e}")
    console.print(table)
    if layers:
        console.print(f"Multi-token-prediction layers kept: {layers}.")


if __name__ == "__main__":
    logging.set_verbosity_error()  # what load_complete refuses need not be reported as well
    main(TrlParser(Arguments).parse_args_and_config()[0])
