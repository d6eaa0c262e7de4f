"""The effective weight of a linear projection, for whoever computes with it instead of calling the module.

PEFT's classes are known by name: whoever has no adapters need not have PEFT.
"""

import torch
from torch import Tensor, nn

_LORA = ("peft.tuners.lora.layer", "Linear")
_LORA_ATTRIBUTES = (
    "base_layer", "lora_A", "lora_B", "lora_dropout", "lora_variant", "scaling", "use_dora", "fan_in_fan_out",
    "merged", "disable_adapters", "active_adapters",
)  # fmt: skip


def unreadable_weight(projection: nn.Module, hidden_states: Tensor, kind: type = nn.Linear) -> str | None:
    """Why the effective weight of `projection`, which should be a `kind`, is not its `weight` alone; None if it is."""
    if type(projection) is not kind:
        return f"is a {type(projection).__module__}.{type(projection).__qualname__}"
    if projection._forward_hooks or projection._forward_pre_hooks or "forward" in vars(projection):
        return "has hooks"
    weight = projection.weight
    if type(weight) not in (nn.Parameter, Tensor) or not weight.is_floating_point():
        return f"holds a {type(weight).__name__} of {weight.dtype}"
    if weight.device != hidden_states.device:
        return f"lies on {weight.device}"
    return None


def uncomputable_weight(projection: nn.Module, hidden_states: Tensor) -> str | None:
    """Why `effective_weight` cannot give the weight that `projection` applies; None if it can.

    It can for a plain nn.Linear, and for PEFT's LoRA around one: merged, disabled, or with any active adapters that
    are low-rank products and nothing else (no DoRA, bias, hooks or, in training, dropout).
    """
    if not is_lora(projection):
        return unreadable_weight(projection, hidden_states)
    reason = unreadable_weight(projection.base_layer, hidden_states)
    if reason:
        return reason
    if projection._forward_hooks or projection._forward_pre_hooks or "forward" in vars(projection):
        return "has hooks"
    if projection.merged:
        return "is to be unmerged by its next call" if projection.disable_adapters else None
    if projection.fan_in_fan_out:
        return "has a transposed adapter"
    for name in _active(projection):
        if name in projection.lora_variant or projection.use_dora.get(name):
            return f"has the adapter {name!r}, which is no plain LoRA"
        if projection.lora_B[name].bias is not None or not isinstance(projection.scaling[name], int | float):
            return f"has the adapter {name!r}, which is more than a product of two matrices"
        if projection.training and not isinstance(projection.lora_dropout[name], nn.Identity):
            return f"has the adapter {name!r} with dropout"
        for factor in (projection.lora_A[name], projection.lora_B[name]):
            reason = unreadable_weight(factor, hidden_states)
            if reason:
                return f"has the adapter {name!r}, of which a factor {reason}"
    return None


def effective_weight(projection: nn.Module) -> Tensor:
    """The weight [out, in] of a projection that `uncomputable_weight` has nothing against; W + sum of s B A for LoRA.

    The sum is made anew at each call, in one launch an adapter that reads and writes W once: 4 MB each way a layer and
    step for V2-Lite, beside 38 MB of latents at a context of 32k. Factors at the side of the absorbed products,
    (q B) A and (o Aᵀ) Bᵀ, would move less but take four launches, and a step of few tokens waits for launches. It is
    rounded as a merged adapter is, and differentiable in W, A and B.
    """
    if not is_lora(projection):
        return projection.weight
    weight = projection.base_layer.weight
    for name in _active(projection):
        a, b = (factor[name].weight.to(weight.dtype) for factor in (projection.lora_A, projection.lora_B))
        weight = torch.addmm(weight, b, a, alpha=projection.scaling[name])
    return weight


def is_lora(module: nn.Module) -> bool:
    """Whether this is PEFT's LoRA around a linear layer, with the attributes that are read here."""
    kind = type(module)
    return (kind.__module__, kind.__qualname__) == _LORA and all(hasattr(module, n) for n in _LORA_ATTRIBUTES)


def _active(lora: nn.Module) -> list[str]:
    """The adapters that the layer's forward adds to its base."""
    if lora.disable_adapters or lora.merged:
        return []
    return [name for name in lora.active_adapters if name in lora.lora_A]


def adapter_layers(model: nn.Module) -> list[nn.Module]:
    """The modules that PEFT has put into `model`."""
    return [module for module in model.modules() if type(module).__module__.startswith("peft.")]


def adapter_state(layer: nn.Module) -> tuple:
    """What shows that one of `adapter_layers` was switched, disabled, merged or scaled, or has other factors.

    It is read without the modules' own attribute look-up, since it is for every step of a decoding.
    """
    own = vars(layer)
    states = (own.get("_active_adapter"), own.get("_disable_adapters"), own.get("merged_adapters"), own.get("scaling"))
    sides = [own["_modules"][name]._modules.values() for name in ("lora_A", "lora_B") if name in own["_modules"]]
    factors = [weight for side in sides for factor in side for weight in factor._parameters.values()]
    return (*map(str, states), *(weight.data_ptr() for weight in factors if weight is not None))
