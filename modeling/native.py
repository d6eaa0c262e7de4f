"""Lend the kernels to models that are not ours: `boost` any Transformers model with experts or latent attention.

Experts are reached through Transformers' registry, but for DBRX's: the forward of its experts modules is replaced.
What happens to latent attention is told in native_attention.py.
"""

import functools
import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .experts import NAME, PARAMETRIZED, ExpertOptions, describe, unfit, warn_of_fallback
from .native_attention import attention_modules, lend, take_back

try:
    from .kernels_moe import GroupedRows, in_one_dtype
except ImportError:
    GroupedRows = in_one_dtype = None  # `unfit` says so, and neither is called

_DBRX = "DbrxExperts"
# Layers of routed experts that compute in ways of their own; jetmoe has them in its attention, too.
_FOREIGN = re.compile(r"(?<!Shared)Experts$|^JetMoeMo[AE]$|^DogeCDMoE$")


@dataclass(frozen=True)
class BoostRow:
    """One layer: its module's name and class, the path that it takes now, and why not a faster one."""

    name: str
    kind: str
    path: str
    reason: str


@dataclass(frozen=True)
class BoostReport:
    """What runs where after `boost`: one row a layer with experts, then one a layer of latent attention.

    `path` is "fused", "composite", "grouped_mm" or "eager" of experts (see experts.py); "triton", "absorbed" or
    "expanded" of the decode steps of latent attention (see native_attention.py); or "not reached".
    """

    rows: tuple[BoostRow, ...]

    def __str__(self) -> str:
        lines = []
        for (kind, path, reason), group in itertools.groupby(self.rows, lambda row: (row.kind, row.path, row.reason)):
            names = [row.name for row in group]
            where = names[0] if len(names) == 1 else f"{names[0]} to {names[-1]} ({len(names)} layers)"
            lines.append(f"{where}: {kind}, {path}" + (f": {reason}" if reason else ""))
        return "\n".join(lines)


@dataclass(frozen=True)
class _Before:
    """What `unboost` restores: the experts implementation of each configuration that was changed."""

    implementations: list[tuple[object, str | None]]


def boost(
    model: nn.Module, *, recompute: bool = False, batch_invariant: bool = False, accumulate: bool = False
) -> BoostReport:
    """Let Lamoe's kernels run the experts of any Transformers model, and let its latent attention decode absorbed.

    Parameters, caches and saved files stay as they are. Of latent attention, steps of few new tokens over a cache are
    changed; prefill, training, and calls with gradients or under autocast keep the stock forward. To be called again
    after what changes the answer (device, dtype, adapters), or to change an option.

    Args:
        model: a Transformers model, or one wrapped by PEFT.
        recompute: keep less for the backward, and compute a quarter more.
        batch_invariant: a token gets the same bits alone as in any batch; slower for few tokens.
        accumulate: the backward adds the expert weights' gradients to an existing `.grad` without a copy of its size.
            The options act on "fused" experts only.

    Returns:
        layer by layer, what runs now and why.

    Raises:
        ValueError: the model has neither experts nor latent attention.
    """
    found, latent = list(_experts_modules(model)), list(attention_modules(model))
    if not found and not latent:
        raise ValueError(
            f"{type(model).__name__} has neither experts nor latent attention: no module in it is of a class with "
            f"Transformers' @use_experts_implementation, a {_DBRX}, or called Experts, and none has a kv_b_proj."
        )
    reached = [module for _, module in found if _in_registry(module) or _is_dbrx(module)]
    options = ExpertOptions(recompute, batch_invariant, accumulate)
    before = _remember(model, reached)
    for module in reached:
        module._lamoe_before = before
        module._lamoe_options = options
        if _is_dbrx(module):
            module.forward = functools.partial(_dbrx_forward, module)
    for module in model.modules() if reached else ():
        if isinstance(module, PreTrainedModel):
            module.set_experts_implementation(NAME)
    for module in reached:
        if _in_registry(module):  # the line above does nothing where the model class does not look switchable
            module.config._experts_implementation_internal = NAME
    adapted = _adapted(model)
    rows = [BoostRow(name, type(module).__name__, *_path(module, adapted)) for name, module in found]
    rows += [BoostRow(name, type(module).__name__, *lend(module)) for name, module in latent]
    return BoostReport(tuple(rows))


def unboost(model: nn.Module):
    """Undo `boost`: the model computes everything as it did before the first one."""
    for _, module in attention_modules(model):
        take_back(module)
    for module in model.modules():
        before = module.__dict__.pop("_lamoe_before", None)
        if before is None:
            continue
        del module._lamoe_options
        if _is_dbrx(module):
            del module.forward
        for config, implementation in before.implementations:
            config._experts_implementation_internal = implementation


def _in_registry(module: nn.Module) -> bool:
    return hasattr(module, "_is_expert_parallel") and hasattr(module, "is_transposed")  # as the decorator leaves them


def _is_dbrx(module: nn.Module) -> bool:
    """Whether this is a DBRX layer that has its own forward, or that of a boost."""
    forward = module.__dict__.get("forward")
    return type(module).__name__ == _DBRX and (forward is None or getattr(forward, "func", None) is _dbrx_forward)


def _experts_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """All layers of routed experts, reachable or not; nothing inside of one."""
    last = None
    for name, module in model.named_modules():
        if last is not None and name.startswith(last):
            continue
        listed = isinstance(module, nn.ModuleList | nn.ModuleDict) and name.split(".")[-1] == "experts"
        if _in_registry(module) or listed or _FOREIGN.search(type(module).__name__):
            last = f"{name}."
            yield name, module


def _remember(model: nn.Module, reached: list[nn.Module]) -> _Before:
    """The implementation of each configuration, as it was before the first boost."""
    known = {}
    for module in reached:
        if "_lamoe_before" in module.__dict__:
            known |= {id(config): value for config, value in module._lamoe_before.implementations}
    configs = [module.config for module in model.modules() if isinstance(module, PreTrainedModel)]
    configs += [module.config for module in reached if _in_registry(module)]
    unique = {id(config): config for config in configs}.values()
    return _Before([(config, known.get(id(config), config._experts_implementation)) for config in unique])


def _adapted(model: nn.Module) -> set[int]:
    """Ids of modules in which a PEFT adapter of whole tensors is active: it parametrizes them for each call."""
    wrappers = (module for module in model.modules() if hasattr(module, "parameter_name"))
    return {id(w.get_base_layer()) for w in wrappers if not (w.merged or w.disable_adapters)}


def _path(module: nn.Module, adapted: set[int]) -> tuple[str, str]:
    if id(module) in adapted:
        return "grouped_mm", PARAMETRIZED
    if _in_registry(module):
        return describe(module, sharded=True)
    if _is_dbrx(module):
        return _describe_dbrx(module)
    if type(module).__name__ == _DBRX:
        return "not reached", "something else has replaced its forward"
    return "not reached", "its class is not in Transformers' experts registry"


def _describe_dbrx(module: nn.Module) -> tuple[str, str]:
    """The path of a DBRX layer and why, as `describe` has it for the registry's."""
    glu = module.mlp
    if type(glu).__name__ != "DbrxExpertGLU" or torch.nn.utils.parametrize.is_parametrized(glu):
        return "eager", PARAMETRIZED
    reason = unfit(glu.w1, glu.v1, glu.w2)
    return ("composite", "gate and up projection are apart") if reason is None else ("eager", reason)


def _dbrx_forward(self: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """What DbrxExperts.forward promises: [B, T, D] of [B, T, D] and [B·T, K]."""
    path, reason = _describe_dbrx(self)
    if path == "eager":
        warn_of_fallback(self, reason, path)
        return type(self).forward(self, hidden_states, top_k_index, top_k_weights)
    glu = self.mlp
    split = (self.num_experts, self.ffn_hidden_size, self.hidden_size)
    weights = (glu.w1.view(split), glu.v1.view(split), glu.w2.view(split))
    x, (gate, up, down) = in_one_dtype(hidden_states.reshape(-1, self.hidden_size), *weights)
    rows = GroupedRows(x, top_k_index, self.num_experts)
    inner = glu.activation_fn(rows.linear(x, gate, tokens=True)) * rows.linear(x, up, tokens=True)
    out = rows.sum(rows.linear(inner, down, transposed=True), top_k_weights)
    return out.to(hidden_states.dtype).view(hidden_states.shape[0], -1, self.hidden_size)
