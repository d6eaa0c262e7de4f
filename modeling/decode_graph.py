"""Decode steps of `generate` with its default cache, replayed as a CUDA graph.

A step of one token launches about a thousand kernels, and the host takes ten times as long to launch them as the GPU
to run them. Recording them once needs no compiler, and takes as long as a step or two.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.utils import logging

from .attention import decode_view, kernel_refusal
from .cache import GrowingCache, GrowingLayer
from .experts import NAME
from .projections import adapter_layers, adapter_state
from .replay import LamoeCausalLMOutput

logger = logging.get_logger(__name__)

STEPS_BEFORE = 3  # steps of one token that run as ever, so that short answers record nothing
MOST_RECORDINGS = 64  # of one cache: whoever replaces its tensors all the time gains nothing from graphs
# What generation passes to `forward` and what means the same for one token; with anything else there is no graph.
_NEUTRAL = {"use_cache": (None, True), "logits_to_keep": (0, 1), "return_dict": (None, True)}
_FIXED_ROPES = ("default", "linear", "yarn", "llama3", "proportional")


class Watch:
    """The last replay's checksums on their way to the host: whoever waited for them would leave the GPU idle."""

    def __init__(self, checksums: Tensor):
        self.host = torch.empty_like(checksums, device="cpu", pin_memory=checksums.is_cuda)
        self.copied = torch.cuda.Event() if checksums.is_cuda else None
        self.unread = False

    def send(self, checksums: Tensor):
        """Begin to copy what a replay has written."""
        self.host.copy_(checksums, non_blocking=True)
        if self.copied is not None:
            self.copied.record()
        self.unread = True

    def read(self) -> Tensor | None:
        """What was sent, once it has arrived; None if it was read before."""
        if not self.unread:
            return None
        self.unread = False
        if self.copied is not None:
            self.copied.synchronize()
        return self.host


@dataclass
class Recorded:
    """A recorded step: the graph, what it reads (`seen` is None if nothing is padding), what it writes, and with which
    buffers of the cache, weights of the model and state of its adapters it was recorded.

    There is `room` for so many tokens in the cache; `at` is where the graph has left the cursor."""

    graph: torch.cuda.CUDAGraph
    ids: Tensor
    positions: Tensor
    cursor: Tensor
    seen: Tensor | None
    logits: Tensor
    checksums: Tensor | None
    room: int
    versions: int
    weights: tuple
    adapters: list[nn.Module]
    times: int
    watch: Watch | None
    at: int = -1

    def fits(self, model, cache, mask: Tensor | None) -> bool:
        """Whether it was made with these buffers and weights, and with a mask if there is one."""
        same = self.versions == _versions(cache) and self.weights == state_of(model, self.adapters)
        return same and (self.seen is None) == (mask is None)


def replayed_step(
    model, input_ids: Tensor | None, mask: Tensor | None, positions: Tensor | None, cache, arguments: dict
) -> LamoeCausalLMOutput | None:
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
    if recorded is None or cached >= recorded.room or not recorded.fits(model, cache, mask):
        recorded = _renewed(model, input_ids, mask, cache)
        if recorded is None:
            return None
    recorded.ids.copy_(input_ids)
    if recorded.at != cached:
        recorded.cursor.fill_(cached)
    recorded.positions.copy_(recorded.cursor if positions is None else positions)
    if mask is not None:
        recorded.seen[:, : cached + 1].copy_(mask)
    recorded.graph.replay()
    recorded.at = cached + 1  # the graph has moved the cursor
    for layer in cache.layers:
        layer.advance(1)
    settle(model, cache)  # while the GPU is busy
    if recorded.watch is not None:
        recorded.watch.send(recorded.checksums)
    return LamoeCausalLMOutput(logits=recorded.logits.clone(), past_key_values=cache)


def _renewed(model, input_ids: Tensor, mask: Tensor | None, cache) -> Recorded | None:
    """A recording for the cache, the weights and the mask as they are now; None if there can be none."""
    settle(model, cache)
    recorded = cache.recorded
    if recorded is None or recorded.weights != state_of(model, recorded.adapters):
        reason = _why_not(model, input_ids, mask, cache)
        if reason:
            logger.info(f"Decode steps are not recorded as a CUDA graph: {reason}.")
            cache.recorded = False
            return None
    for layer in cache.layers:
        layer.make_room(1)
    if recorded is not None and recorded.fits(model, cache, mask):
        return recorded
    times = 1 if recorded is None else recorded.times + 1
    if times > MOST_RECORDINGS:
        cache.recorded = False
        return None
    cache.recorded = recorded = None  # its memory first
    try:
        cache.recorded = _record(model, input_ids, mask, cache, times)
    except RuntimeError as reason:  # a layer of somebody else's that waits for the GPU, or no memory
        logger.warning_once(f"Decode steps could not be recorded as a CUDA graph and run as ever: {reason}")
        cache.recorded = False
        return None
    return cache.recorded


def settle(model, cache):
    """Raise if a router of the last replayed step of `cache` saw NaN or infinite values; each step is looked at once.

    The next step does this after its launch, and at its end `generate`.
    """
    recorded = getattr(cache, "recorded", None)
    checksums = recorded.watch.read() if recorded and recorded.watch is not None else None
    if checksums is not None:
        model.model.refuse_nonfinite(checksums)


def never_recorded(model, device: torch.device) -> str | None:
    """Why no step of `model` on `device` can be recorded, whatever the cache; None if that depends on the cache."""
    config = model.config
    if not can_record(device):
        return "there are no CUDA graphs here"
    if _waits(model):
        return f"the experts run as {config._experts_implementation!r} in {model.dtype}, which waits for the GPU"
    if config.rope_parameters["rope_type"] not in _FIXED_ROPES:
        return "the rotary frequencies depend on the length"
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return "the model may be spread over processes"
    if any(parameter.device != device for parameter in model.parameters()):
        return "the model is spread over devices"
    if any(_hooked(module) for module in model.modules()):
        return "a module has hooks"
    if config.mla_implementation == "eager" or config.mla_form == "expanded":
        return "the decode kernel is not chosen"
    return kernel_refusal(config, model.dtype, device)


def _why_not(model, input_ids: Tensor, mask: Tensor | None, cache) -> str | None:
    """Why a step cannot be recorded, or None if it can."""
    reason = never_recorded(model, input_ids.device)
    if reason:
        return reason
    if any(type(layer) is not GrowingLayer or not layer.is_initialized for layer in cache.layers):
        return "the cache is not filled, or not of one kind"
    x = model.model.embed_tokens.weight[:1, None].expand(len(input_ids), -1, -1)
    if decode_view(model.config, x, mask, cache, None, {}) is None or not model.model.decodes(x):
        return "the decode kernel does not run here"
    return None


def _versions(cache) -> int:
    return sum(layer.version for layer in cache.layers)


def state_of(model, adapters: list[nn.Module]) -> tuple:
    """What shows that the model was moved, or set to compute in another way, since a recording.

    Training is not among it: a graph reads weights and factors of adapters where they lie.
    """
    some = (model.model.embed_tokens.weight, model.model.layers[-1].self_attn.kv_b_proj.weight, model.lm_head.weight)
    ways = model.config._experts_implementation, model.config.mla_implementation
    return (*(weight.data_ptr() for weight in some), *ways, *map(adapter_state, adapters))


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


def recording(x: Tensor) -> bool:
    """Whether what is computed from `x` is being recorded, not run."""
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


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


def _record(model, input_ids: Tensor, mask: Tensor | None, cache: GrowingCache, times: int) -> Recorded:
    """Record the step behind what is cached; what this writes is written again by the first replay."""
    device = input_ids.device
    ids, positions = input_ids.clone(), torch.zeros_like(input_ids)
    cursor = torch.full((1,), cache.get_seq_length(), device=device)
    room, seen = min(layer.room for layer in cache.layers), None
    if mask is not None:
        seen = torch.zeros(len(input_ids), room, dtype=torch.int32, device=device)
        seen[:, : mask.shape[1]].copy_(mask)

    def step() -> tuple[Tensor, Tensor | None]:
        out = model(input_ids=ids, attention_mask=seen, position_ids=positions, past_key_values=cache, use_cache=True)
        cursor.add_(1)
        return out.logits, model.model.checksums()

    with cache.cursor_at(cursor):
        graph, logits, checksums = record(step, device)
    watch = None if checksums is None else Watch(checksums)
    adapters = adapter_layers(model)
    made_with = _versions(cache), state_of(model, adapters), adapters, times
    return Recorded(graph, ids, positions, cursor, seen, logits, checksums, room, *made_with, watch)
