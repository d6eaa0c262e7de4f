"""The experts function "lamoe" of Transformers' registry: who computes a layer's experts, and why.

The paths: "fused" (kernels_moe.fused_experts), "composite" (the same kernels as linear layers over routed rows, with
the module's own gate, activation and norm between) and, where the kernels do not run, Transformers' "grouped_mm", or
the module's own "eager" forward if that does not take the weights either.
Letters: N tokens, K experts a token, D hidden, F expert width, E experts.
"""

from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
import transformers.integrations.moe as registry
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized
from transformers import activations
from transformers.integrations.finegrained_fp8 import FP8Experts, FP8ExpertsInterface
from transformers.utils import logging

try:
    from triton import knobs

    from .kernels_moe import GroupedRows, fused_experts, in_one_dtype, why_not

    MISSING = None
    INTERPRETED = knobs.runtime.interpret  # read by Triton, too, when the kernels are defined
except ImportError as error:
    MISSING = f"Triton or a part of it is missing ({error.__cause__ or error})"
    INTERPRETED = False

NAME = "lamoe"
PARAMETRIZED = "its weights are parametrized, as adapters on whole expert tensors are"

logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class ExpertOptions:
    """What the fused path does beyond the result; the arguments of `fused_experts`."""

    recompute: bool = False
    batch_invariant: bool = False
    accumulate: bool = False


DEFAULT_OPTIONS, RECOMPUTING = ExpertOptions(), ExpertOptions(recompute=True)
_OPTION_NAMES = tuple(field.name for field in fields(ExpertOptions))


def expert_options(module: nn.Module) -> ExpertOptions:
    """What `boost` was told for this layer; of a Lamoe model that was not boosted, what its configuration says."""
    options = getattr(module, "_lamoe_options", None)
    if options is None:
        recompute = bool(getattr(getattr(module, "config", None), "expert_recompute", False))
        options = RECOMPUTING if recompute else DEFAULT_OPTIONS
    return options


_ACTIVATIONS = {
    nn.SiLU: "silu",
    activations.SiLUActivation: "silu",
    nn.ReLU: "relu",
    activations.GELUActivation: "gelu",
    activations.GELUTanh: "gelu_tanh",
    activations.NewGELUActivation: "gelu_tanh",
    activations.FastGELUActivation: "gelu_tanh",
    activations.AccurateGELUActivation: "gelu_tanh",
}
_FUNCTIONS = {F.silu: "silu", F.gelu: "gelu", F.relu: "relu"}


def activation_name(act_fn) -> str | None:
    """The name that the kernels have for an activation module or function; None if they do not know it."""
    if type(act_fn) is nn.GELU:
        return "gelu_tanh" if act_fn.approximate == "tanh" else "gelu"
    if isinstance(act_fn, nn.Module):
        return _ACTIVATIONS.get(type(act_fn))
    return _FUNCTIONS.get(act_fn)


def default_implementation() -> str | None:
    """What a Lamoe model runs if nobody chose: "lamoe" where there is a GPU for it; None leaves it to Transformers."""
    return NAME if MISSING is None and torch.cuda.is_available() else None


def unfit(*weights: Tensor) -> str | None:
    """Why the kernels cannot take these expert weights; None if they can."""
    if MISSING is not None:
        return MISSING
    kind = weights[0].device.type
    if kind not in ("cuda", "meta") and not (kind == "cpu" and INTERPRETED):
        return f"the weights are on {kind}, and the kernels run on GPUs"
    return why_not(weights[0], *weights)


def describe(module: nn.Module, *, sharded: bool = False) -> tuple[str, str]:
    """The path that a call of this experts module takes now, and why; the reason of "fused" is empty.

    Args:
        sharded: judge DTensors by their local parts, which Transformers puts in their place for the call.
    """
    if is_parametrized(module):
        return "grouped_mm", PARAMETRIZED
    weights = _weights(module)
    if sharded:
        weights = [weight.to_local() if hasattr(weight, "to_local") else weight for weight in weights]
    reason = unfit(*weights)
    if reason is not None:
        return "grouped_mm" if _grouped_mm_runs(module, weights) else "eager", reason
    why = _not_fused(module)
    if not why:
        return "fused", ""
    options = expert_options(module)
    idle = [name for name in _OPTION_NAMES if getattr(options, name)]
    if idle:
        why.append(f"{', '.join(idle)}: without effect here")
    return "composite", "; ".join(why)


def _weights(module: nn.Module) -> list[Tensor]:
    """Projection up, projection down, and their biases if there are any."""
    up = "gate_up_proj" if module.has_gate else "up_proj"
    names = [up, "down_proj"] + ([f"{up}_bias", "down_proj_bias"] if module.has_bias else [])
    return [getattr(module, name) for name in names]


def _grouped_mm_runs(module: nn.Module, weights: list[Tensor]) -> bool:
    """Whether Transformers' function takes these weights: PyTorch's wants strides of whole 16 bytes and no float64."""
    compiled = torch.compiler.is_compiling() and weights[0].dtype != torch.bfloat16
    if compiled or isinstance(module, FP8Experts):  # other products, which take anything
        return True
    widths = {width * weight.element_size() for weight in weights for width in weight.shape[1:]}
    return weights[0].dtype != torch.float64 and not any(width % 16 for width in widths)


def _not_fused(module: nn.Module) -> list[str]:
    """What keeps a layer from the fused path."""
    why = []
    default = getattr(registry, "_default_apply_gate", None)
    if not module.has_gate:
        why.append("it has no gate")
    elif type(module)._apply_gate is not default or "_apply_gate" in module.__dict__:
        why.append("its gate is its own")
    elif activation_name(module.act_fn) is None:
        why.append(f"the kernels do not know {type(module.act_fn).__name__}")
    if module.has_bias:
        why.append("it has biases")
    if module.is_transposed:
        why.append("its weights are transposed")
    if module.has_post_expert_norm:
        why.append("it has a norm behind each expert")
    return why


def warn_of_fallback(module: nn.Module, reason: str, instead: str):
    """Say once for each class and reason that the kernels do not run; nothing while torch.compile traces."""
    if not torch.compiler.is_compiling():
        logger.warning_once(
            f"The experts of {type(module).__name__} run by {instead}, not by Lamoe's kernels: {reason}."
        )


def lamoe_experts_forward(
    self: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor, shared: Tensor | None = None
) -> Tensor:
    """Sum of each token's experts, weighted: [N, D] in `hidden_states`' dtype, summed in float32, in order.

    Args:
        self: an experts module of Transformers' registry.
        hidden_states: [N, D].
        top_k_index: [N, K]; ids of `num_experts` and above are sentinels of expert parallelism: they give zero.
        top_k_weights: [N, K].
        shared: [N, D], added to the sum.
    """
    own = getattr(type(self), "lamoe_forward", lamoe_experts_forward)  # that of the class's own revision of this code
    if own is not lamoe_experts_forward:
        return own(self, hidden_states, top_k_index, top_k_weights, shared)
    path, reason = describe(self)
    if path not in ("fused", "composite"):
        warn_of_fallback(self, reason, path)
        functions = FP8ExpertsInterface() if isinstance(self, FP8Experts) else registry.ExpertsInterface()
        forward = functions[path] if path == "grouped_mm" else type(self).forward.__wrapped__  # before the decorator
        out = forward(self, hidden_states, top_k_index, top_k_weights)
        return out if shared is None else out + shared
    weights = [w if len(w) == self.num_experts else w[: self.num_experts] for w in _weights(self)]
    if path == "composite":
        out = _composite(self, hidden_states, top_k_index, top_k_weights, *weights)
        return out if shared is None else out + shared
    options = expert_options(self)
    return fused_experts(
        hidden_states, top_k_index, top_k_weights, *weights,
        activation=activation_name(self.act_fn), shared=shared, recompute=options.recompute,
        batch_invariant=options.batch_invariant, accumulate=options.accumulate,
    )  # fmt: skip


def _composite(module, hidden_states, top_k_index, top_k_weights, *weights):
    x, (up, down, *biases) = in_one_dtype(hidden_states, *weights)
    up_bias, down_bias = biases or (None, None)
    rows = GroupedRows(x, top_k_index, module.num_experts)
    inner = rows.linear(x, up, up_bias, tokens=True, transposed=module.is_transposed)
    inner = module._apply_gate(inner) if module.has_gate else module.act_fn(inner)
    outer = rows.linear(inner.to(x.dtype), down, down_bias, transposed=module.is_transposed)
    if module.has_post_expert_norm:
        outer = module.post_expert_norm(outer)
    return rows.sum(outer, top_k_weights).to(hidden_states.dtype)


def register(overwrite: bool = False):
    """Put `lamoe_experts_forward` into both registries: a name in only one of them fails in the forward.

    Copies of this code, as checkpoints carry them, leave an entry alone: each class finds its own copy's function.
    """
    for functions in (registry.ExpertsInterface, FP8ExpertsInterface):
        if overwrite or NAME not in functions():
            functions.register(NAME, lamoe_experts_forward)


register()
