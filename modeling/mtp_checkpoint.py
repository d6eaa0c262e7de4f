"""Multi-token-prediction layers on disk: DeepSeek-V3's layout, layers past the last one.

A layer's folder of names holds `embed_tokens` and `shared_head.head` as well, which the report says are the model's
(arXiv 2412.19437, section 2.2). In memory there is then one of each: what is trained stays one, and nothing that
shards or counts parameters meets a shared one. Where a checkpoint's copy differs from the model's, the layer has its
own. Copies are always written, since vLLM's reader has its own embedding and head and fills them from there; SGLang
and Transformers leave them out.
"""

import re
from collections.abc import Callable, Iterable
from contextlib import ExitStack

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers.utils import logging

logger = logging.get_logger(__name__)

EMBEDDING, HEAD = "embed_tokens.weight", "shared_head.head.weight"
_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.(.+)$")


def fit_to_checkpoint(model, state_dict: dict[str, Tensor] | None, files: Iterable[str] | None):
    """Let `model`, not loaded yet, have the prediction layers that the checkpoint has, and say so if some are missing.

    Layers without a tensor of their own are taken out of the model, and `config.num_nextn_predict_layers` says how
    many are left: native saving drops the layers and leaves the number. A layer gets an embedding or a head of its
    own if the checkpoint's copy differs from the model's.

    Args:
        state_dict: what is loaded, or None if it is in `files`, of which only safetensors are looked into.
    """
    with ExitStack() as stack:
        if state_dict is not None:
            fit_to_tensors(model, state_dict, state_dict.__getitem__)
            return
        holders = {}
        for file in files or ():
            if not str(file).endswith(".safetensors"):
                return
            opened = stack.enter_context(safe_open(file, framework="pt"))
            holders |= dict.fromkeys(opened.keys(), opened)
        fit_to_tensors(model, holders, lambda name: holders[name].get_tensor(name))


def fit_to_tensors(model, names: Iterable[str], read: Callable[[str], Tensor]):
    """`fit_to_checkpoint` for tensors of these `names`, which `read` reads."""
    config, base = model.config, model.base_model
    first, promised = config.num_hidden_layers, len(base.mtp_layers)
    inside: dict[int, dict[str, str]] = {}
    for name in names:
        match = _LAYER.search(name)
        if match and int(match[1]) >= first:
            inside.setdefault(int(match[1]), {})[match[2]] = name
    held = 0
    while held < promised and set(inside.get(first + held, ())) - {EMBEDDING, HEAD}:
        held += 1
    if held < promised:
        logger.warning(
            f"num_nextn_predict_layers={promised}, but the checkpoint has {held or 'no'} multi-token-prediction "
            f"layers: the model goes on with {held or 'none'}."
        )
        del base.layers[first + held :]
        config.num_nextn_predict_layers = held

    ignored = [rf"layers\.{index}\." for index in inside if index >= first + held]
    for depth, layer in enumerate(base.mtp_layers):
        copies = inside[first + depth]
        embedding = _whole_name(names, EMBEDDING)
        head = "lm_head.weight" if "lm_head.weight" in names else embedding
        for end, main in ((EMBEDDING, embedding), (HEAD, head)):
            if end not in copies:
                continue
            if main is not None and _equal(read(copies[end]), read(main)):
                ignored.append(re.escape(copies[end]))
            else:
                _give_own(layer, end, base.embed_tokens.weight)
    model._keys_to_ignore_on_load_unexpected = set(ignored)


def _whole_name(names: Iterable[str], end: str) -> str | None:
    return next((name for name in (f"model.{end}", end) if name in names), None)


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a, b)


def _give_own(layer, end: str, like: Tensor):
    words, width = like.shape
    kind = {"device": like.device, "dtype": like.dtype}
    if end == EMBEDDING:
        layer.embed_tokens = nn.Embedding(words, width, **kind)
    else:
        layer.shared_head.head = nn.Linear(width, words, bias=False, **kind)


def with_copies(model, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """`state_dict` and, for each prediction layer in it, copies of the model's embedding and head.

    A copy is left out where the state has none to take (an adapter's, one that is offloaded, a model without head).
    """
    first = model.config.num_hidden_layers
    embedding = _whole_name(state_dict, EMBEDDING)
    whole = dict(state_dict)
    for depth in range(len(model.base_model.mtp_layers)):
        name = _whole_name(state_dict, f"layers.{first + depth}.eh_proj.weight")
        if name is None:
            continue
        prefix = name.removesuffix("eh_proj.weight")
        for end, main in ((EMBEDDING, embedding), (HEAD, "lm_head.weight")):
            if main in state_dict and state_dict[main].device.type != "meta":
                whole.setdefault(prefix + end, state_dict[main].clone())  # safetensors takes no shared storage
    return whole
