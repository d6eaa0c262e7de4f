"""Decode steps of `generate` with its default cache, replayed as a CUDA graph.

A step of one token launches about a thousand kernels, and the host takes ten times as long to launch them as the GPU
to run them. Recording them once needs no compiler, and takes as long as a step or two.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import MoeCausalLMOutputWithPast
from transformers.utils import logging

from .attention import decode_view
from .cache import GrowingCache, GrowingLayer
from .experts import NAME

logger = logging.get_logger(__name__)

STEPS_BEFORE = 3  # steps of one token that run as ever, so that short answers record nothing
MOST_RECORDINGS = 64  # of one cache: whoever replaces its tensors all the time gains nothing from graphs
# What generation passes to `forward` and what means the same for one token; with anything else there is no graph.
_NEUTRAL = {"use_cache": (None, True), "logits_to_keep": (0, 1), "return_dict": (None, True)}
_FIXED_ROPES = ("default", "linear", "yarn", "llama3", "proportional")


@dataclass
class Recorded:
    """A recorded step: the graph, what it reads (`seen` is None if nothing is padding), what it writes, and with which
    buffers of the cache and weights of the model it was recorded."""

    graph: torch.cuda.CUDAGraph
    ids: Tensor
    positions: Tensor
    cursor: Tensor
    seen: Tensor | None
    logits: Tensor
    checksums: Tensor | None
    versions: int
    weights: tuple
    times: int


def replayed_step(
    model, input_ids: Tensor | None, mask: Tensor | None, positions: Tensor | None, cache, arguments: dict
) -> MoeCausalLMOutputWithPast | None:
    """One token for each sequence by a graph: `model`'s logits [B, 1, W]; None if the step has to run as ever.

    Args:
        model: a LamoeForCausalLM. input_ids: [B, 1].
        mask: [B, cached + 1], 0 at padding, or None. positions: [B, 1] or None.
        arguments: whatever else `forward` was called with.
    """
    if type(cache) is not GrowingCache or cache.cursor is not None or cache.recorded is False:
        return None
    if input_ids is None or input_ids.shape[-1] != 1 or not can_record(input_ids.device):
        return None
    cache.steps += 1
    if cache.steps <= STEPS_BEFORE or model.training or torch.is_grad_enabled():
        return None
    for name, value in arguments.items():
        if isinstance(value, Tensor) or value not in _NEUTRAL.get(name, (None,)):
            return None
    cached = cache.get_seq_length()
    if mask is not None and (mask.dim() != 2 or mask.shape != (len(input_ids), cached + 1)):
        return None
    recorded = cache.recorded
    if recorded is None:
        reason = _why_not(model, input_ids, mask, cache)
        if reason:
            logger.info(f"Decode steps are not recorded as a CUDA graph: {reason}.")
            cache.recorded = False
            return None
    for layer in cache.layers:
        layer.make_room(1)
    versions, weights = sum(layer.version for layer in cache.layers), _weights(model)
    same = recorded is not None and recorded.versions == versions and recorded.weights == weights
    if not same or (recorded.seen is None) != (mask is None):
        times = 1 if recorded is None else recorded.times + 1
        if times > MOST_RECORDINGS:
            cache.recorded = False
            return None
        cache.recorded = None  # its memory first
        try:
            recorded = cache.recorded = _record(model, input_ids, mask, cache, versions, weights, times)
        except RuntimeError as reason:  # a layer of somebody else's that waits for the GPU, or no memory
            logger.warning_once(f"Decode steps could not be recorded as a CUDA graph and run as ever: {reason}")
            cache.recorded = False
            return None
    recorded.ids.copy_(input_ids)
    recorded.cursor.fill_(cached)
    recorded.positions.copy_(recorded.cursor if positions is None else positions)
    if mask is not None:
        recorded.seen[:, : cached + 1].copy_(mask)
    recorded.graph.replay()
    for layer in cache.layers:
        layer.advance(1)
    if recorded.checksums is not None:
        model.model.refuse_nonfinite(recorded.checksums)
    return MoeCausalLMOutputWithPast(logits=recorded.logits.clone(), past_key_values=cache)


def _why_not(model, input_ids: Tensor, mask: Tensor | None, cache) -> str | None:
    """Why a step cannot be recorded, or None if it can."""
    config = model.config
    if _waits(model):
        return f"the experts run as {config._experts_implementation!r} in {model.dtype}, which waits for the GPU"
    if config.rope_parameters["rope_type"] not in _FIXED_ROPES:
        return "the rotary frequencies depend on the length"
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return "the model may be spread over processes"
    if any(type(layer) is not GrowingLayer or not layer.is_initialized for layer in cache.layers):
        return "the cache is not filled, or not of one kind"
    if any(parameter.device != input_ids.device for parameter in model.parameters()):
        return "the model is spread over devices"
    if any(_hooked(module) for module in model.modules()):
        return "a module has hooks"
    x = model.model.embed_tokens.weight[:1, None].expand(len(input_ids), -1, -1)
    if decode_view(config, x, mask, cache, None, {}) is None or not model.model.decodes(x):
        return "the decode kernel does not run here"
    return None


def _weights(model) -> tuple:
    """What shows that the model was moved, or set to compute in another way, since a recording."""
    some = (model.model.embed_tokens.weight, model.model.layers[-1].self_attn.kv_b_proj.weight, model.lm_head.weight)
    ways = model.config._experts_implementation, model.config.mla_implementation
    return (*(weight.data_ptr() for weight in some), *ways)


def _waits(model) -> bool:
    """Whether the host looks at results of the experts' to go on."""
    experts = model.config._experts_implementation
    return experts != NAME and not (experts == "grouped_mm" and model.dtype == torch.bfloat16)


def _hooked(module: nn.Module) -> bool:
    """Whether somebody's hook runs with the module; those of Transformers that wait to be asked for outputs do not."""
    hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    foreign = [hook for hook in hooks if getattr(hook, "__module__", None) != "transformers.utils.output_capturing"]
    return bool(foreign) or "forward" in vars(module)


def can_record(device: torch.device) -> bool:
    """Whether CUDA graphs can be recorded on `device` now."""
    return device.type == "cuda" and not (torch.compiler.is_compiling() or torch.cuda.is_current_stream_capturing())


def record(step: Callable[[], tuple[Tensor, Tensor | None]], device: torch.device):
    """`step` as a graph, and its outputs, which each replay writes anew."""
    graph, side = torch.cuda.CUDAGraph(), torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        step()  # whatever compiles or allocates at its first use does so here
    torch.cuda.current_stream(device).wait_stream(side)
    with torch.cuda.graph(graph):
        outputs = step()
    return graph, *outputs


def _record(
    model, input_ids: Tensor, mask: Tensor | None, cache: GrowingCache, versions: int, weights: tuple, times: int
) -> Recorded:
    """Record the step behind what is cached; what this writes is written again by the first replay."""
    device = input_ids.device
    ids, positions = input_ids.clone(), torch.zeros_like(input_ids)
    cursor = torch.full((1,), cache.get_seq_length(), device=device)
    room, seen = cache.layers[0]._buffers[0].shape[-2], None
    if mask is not None:
        seen = torch.zeros(len(input_ids), room, dtype=torch.int32, device=device)
        seen[:, : mask.shape[1]].copy_(mask)

    def step() -> tuple[Tensor, Tensor | None]:
        out = model(input_ids=ids, attention_mask=seen, position_ids=positions, past_key_values=cache, use_cache=True)
        return out.logits, model.model.checksums()

    with cache.cursor_at(cursor):
        graph, logits, checksums = record(step, device)
    return Recorded(graph, ids, positions, cursor, seen, logits, checksums, versions, weights, times)
