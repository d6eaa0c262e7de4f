"""Checkpoints on disk: what may be read, and proof that a saved folder loads with and without our code."""

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from .modeling_lamoe import LamoeForCausalLM, refuse_foreign_shards


def checkpoint_tensors(folder: str | Path) -> dict[str, Path]:
    """Where each tensor of the checkpoint in `folder` lies: name -> safetensors file.

    Every file is opened and its header read, so a truncated one is found here and not in the middle of the work.

    Raises:
        ValueError: there are only pickled weights, the index names a path outside the folder, or a file is missing,
            damaged or without a tensor that the index promises; the message says which, expected and found.
    """
    folder = Path(folder)
    refuse_foreign_shards(folder)
    index = folder / SAFE_WEIGHTS_INDEX_NAME
    if index.is_file():
        promised = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    elif (folder / SAFE_WEIGHTS_NAME).is_file():
        promised = None
    else:
        pickled = sorted(file.name for file in folder.glob("*") if file.suffix in (".bin", ".pt", ".pth"))
        if pickled:
            raise ValueError(
                f"{folder} holds {', '.join(pickled)}: only safetensors are read, since pickles run code."
            )
        raise ValueError(f"{folder} has neither {SAFE_WEIGHTS_NAME} nor {SAFE_WEIGHTS_INDEX_NAME}.")

    names = [SAFE_WEIGHTS_NAME] if promised is None else sorted(set(promised.values()))
    found: dict[str, Path] = {}
    for name in names:
        try:
            with safe_open(folder / name, framework="pt") as file:
                found |= dict.fromkeys(file.keys(), folder / name)
        except FileNotFoundError as error:
            raise ValueError(f"{folder / name} is missing; the index expects it.") from error
        except SafetensorError as error:
            raise ValueError(f"{folder / name} is damaged or cut short: {error}.") from error
    for tensor, name in (promised or {}).items():
        if found.get(tensor) != folder / name:
            where = found[tensor].name if tensor in found else "nowhere"
            raise ValueError(f"{tensor} should be in {name} and is {where}.")
    return found


def load_complete(model_class, folder: str | Path, **kwargs) -> PreTrainedModel:
    """`model_class.from_pretrained(folder)`, refusing what Transformers only reports: missing or misshapen weights.

    Raises:
        ValueError: as `checkpoint_tensors`, or weights are missing, unexpected or of another shape.
    """
    checkpoint_tensors(folder)
    model, report = model_class.from_pretrained(
        folder, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs
    )
    kinds = ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")
    wrong = {kind: sorted(map(str, report[kind])) for kind in kinds if report.get(kind)}
    first = model.config.num_hidden_layers  # past the last layer lie those of multi-token prediction
    extra = tuple(
        f"model.layers.{first + k}." for k in range(getattr(model.config, "num_nextn_predict_layers", 0) or 0)
    )
    if wrong.get("unexpected_keys") and extra:
        wrong["unexpected_keys"] = [name for name in wrong["unexpected_keys"] if not name.startswith(extra)]
    if any(wrong.values()):
        listed = "; ".join(f"{kind.replace('_', ' ')}: {', '.join(names)}" for kind, names in wrong.items() if names)
        raise ValueError(f"{folder} does not fit {type(model).__name__}: {listed}.")
    return model


def load_three_ways(folder: str | Path, **kwargs) -> dict[str, PreTrainedModel]:
    """The dual-mode checkpoint in `folder` as its native class, by its own remote code, and as this package's class.

    Keyword arguments go to each `from_pretrained`. The remote code that runs is what lies in the folder.
    """
    return {
        "native": load_complete(AutoModelForCausalLM, folder, trust_remote_code=False, **kwargs),
        "remote code": load_complete(AutoModelForCausalLM, folder, trust_remote_code=True, **kwargs),
        "package": load_complete(LamoeForCausalLM, folder, **kwargs),
    }


@torch.no_grad()
def compare_logits(models: dict[str, PreTrainedModel], input_ids: Tensor, tolerance: float = 1e-4) -> dict[str, float]:
    """How far each model's logits are from the first one's, as |difference| / |logits| in the Frobenius norm.

    Args:
        input_ids: [B, T].
        tolerance: 1e-4 is right for float32; bfloat16 needs about 3e-2.

    Raises:
        ValueError: one is further away than `tolerance`, or not finite.
    """
    first, *_ = models
    reference = models[first].eval()(input_ids.to(models[first].device)).logits.double().cpu()
    distances = {}
    for name, model in models.items():
        logits = model.eval()(input_ids.to(model.device)).logits.double().cpu()
        distances[name] = float((logits - reference).norm() / reference.norm())
        if not distances[name] <= tolerance:
            raise ValueError(
                f"Logits by {name} are {distances[name]:.2e} away from those by {first}; {tolerance:.0e} is allowed."
            )
    return distances
