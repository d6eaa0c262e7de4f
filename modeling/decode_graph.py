"""Decode steps of `generate` with its default cache, replayed as a CUDA graph.

A step launches about a thousand kernels, and the host takes ten times as long to launch them as the GPU to run them.
Recording them once needs no compiler, and takes as long as a step or two. A step takes one token of each sequence, or
in speculative generation several; so does that of a prediction layer.

Letters: B sequences, T new tokens each, D hidden, W vocabulary.
"""

from collections.abc import Callable
from contextlib import contextmanager, suppress
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

STEPS_BEFORE = 3  # steps that run as ever, so that short answers record nothing
MOST_RECORDINGS = 64  # of one cache: whoever replaces its tensors all the time gains nothing from graphs
# What generation passes to `forward` beside `logits_to_keep`, and what changes nothing; else there is no graph.
_NEUTRAL = {"use_cache": (None, True), "return_dict": (None, True)}
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
            self.copied.record(torch.cuda.current_stream(checksums.device))
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
    inputs: tuple[Tensor, ...]
    cursor: Tensor
    seen: Tensor | None
    outputs: tuple[Tensor, ...]
    checksums: Tensor | None
    room: int
    versions: int
    weights: tuple
    adapters: list[nn.Module]
    times: int
    watch: Watch | None
    at: int = -1

    def fits(self, model, cache, ids: Tensor, mask: Tensor | None) -> bool:
        """Whether it was made with these buffers and weights, for as many tokens, and with a mask if there is one."""
        same = self.versions == _versions(cache) and self.weights == state_of(model, self.adapters)
        return same and self.inputs[0].shape == ids.shape and (self.seen is None) == (mask is None)


def replayed_step(
    model, input_ids: Tensor | None, mask: Tensor | None, positions: Tensor | None, cache, arguments: dict
) -> LamoeCausalLMOutput | None:
    """One token for each sequence by a graph: `model`'s logits [B, 1, W]; None if the step has to run as ever.

    Args:
        model: a LamoeForCausalLM. input_ids: [B, 1].
        mask: [B, cached + 1], 0 at padding, or None. positions: [B, 1] or None.
        arguments: whatever else `forward` was called with.
    """
    if input_ids is None or input_ids.shape[-1] != 1:
        return None
    found = replayed_tokens(model, input_ids, mask, positions, cache, arguments)
    return None if found is None else LamoeCausalLMOutput(logits=found[1].clone(), past_key_values=cache)


def replayed_tokens(
    model, input_ids: Tensor, mask: Tensor | None, positions: Tensor | None, cache, arguments: dict
) -> tuple[Tensor, Tensor] | None:
    """T tokens for each sequence by a graph: `model`'s states after the last norm, [B, T, D], and logits [B, T, W].

    None if they have to run as ever. The next replay overwrites them. A recording is for one T. Arguments as for
    `replayed_step`, with T in place of 1.
    """
    if not _may_record(cache, input_ids.device):
        return None
    T, cached = input_ids.shape[1], cache.get_seq_length()
    neutral = {**_NEUTRAL, "logits_to_keep": (0, T)}
    for name, value in arguments.items():
        if isinstance(value, Tensor) or value not in neutral.get(name, (None,)):
            return None
    if positions is None:
        positions = torch.arange(cached, cached + T, device=input_ids.device).unsqueeze(0)

    def run(ids: Tensor, positions: Tensor, seen: Tensor | None) -> tuple[Tensor, Tensor]:
        out = model.model(
            input_ids=ids, attention_mask=seen, position_ids=positions, past_key_values=cache, use_cache=True
        )
        return out.last_hidden_state, model.lm_head(out.last_hidden_state)

    return replayed(model, run, (input_ids, positions.expand_as(input_ids)), mask, cache)


def replayed(
    model,
    run: Callable[..., tuple[Tensor, ...]],
    inputs: tuple[Tensor, ...],
    mask: Tensor | None,
    cache,
    depth: int = 0,
) -> tuple[Tensor, ...] | None:
    """What `run(*inputs, mask)` returns, by a graph; None if it has to run as ever. The next replay overwrites it.

    Args:
        run: the model, or its prediction layer of `depth`, over T tokens behind those of `cache`; returns new tensors.
        inputs: the first is [B, T]; each has the same shape in all calls.
        mask: [B, cached + T], 0 at padding, or None.
    """
    ids = inputs[0]
    if not _may_record(cache, ids.device):
        return None
    cache.steps += 1
    if cache.steps <= STEPS_BEFORE or model.training or torch.is_grad_enabled():
        return None
    T, cached = ids.shape[1], cache.get_seq_length()
    if mask is not None and (mask.dim() != 2 or mask.shape != (len(ids), cached + T)):
        return None
    recorded = cache.recorded
    if recorded is None or cached + T > recorded.room or not recorded.fits(model, cache, ids, mask):
        recorded = _renewed(model, run, inputs, mask, cache, depth)
        if recorded is None:
            return None
    for own, given in zip(recorded.inputs, inputs, strict=True):
        own.copy_(given)
    if recorded.at != cached:  # the first replay, or some tokens were cropped
        recorded.cursor.fill_(cached)
    if mask is not None:
        recorded.seen[:, : cached + T].copy_(mask)
    recorded.graph.replay()
    recorded.at = cached + T  # the graph has moved the cursor
    for layer in cache.layers:
        layer.advance(T)
    settle(model, cache)  # while the GPU is busy
    if recorded.watch is not None:
        recorded.watch.send(recorded.checksums)
    return recorded.outputs


def _renewed(model, run, inputs: tuple[Tensor, ...], mask: Tensor | None, cache, depth: int) -> Recorded | None:
    """A recording for the cache, the weights and the mask as they are now; None if there can be none."""
    settle(model, cache)
    recorded, ids = cache.recorded, inputs[0]
    if recorded is None or recorded.weights != state_of(model, recorded.adapters):
        reason = _why_not(model, ids, mask, cache, depth)
        if reason:
            logger.info(f"Decode steps are not recorded as a CUDA graph: {reason}.")
            cache.recorded = False
            return None
    for layer in cache.layers:
        layer.make_room(ids.shape[1])
    if recorded is not None and recorded.fits(model, cache, ids, mask):
        return recorded
    times = 1 if recorded is None else recorded.times + 1
    if times > MOST_RECORDINGS:
        cache.recorded = False
        return None
    cache.recorded = recorded = None  # its memory first
    try:
        cache.recorded = _record(model, run, inputs, mask, cache, depth, times)
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


def _may_record(cache, device: torch.device) -> bool:
    free = type(cache) is GrowingCache and cache.cursor is None and cache.recorded is not False
    return free and can_record(device)


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


def _why_not(model, ids: Tensor, mask: Tensor | None, cache, depth: int) -> str | None:
    """Why a step cannot be recorded, or None if it can."""
    reason = never_recorded(model, ids.device)
    if reason:
        return reason
    if any(type(layer) is not GrowingLayer or not layer.is_initialized for layer in cache.layers):
        return "the cache is not filled, or not of one kind"
    x = model.model.embed_tokens.weight[:1, None].expand(*ids.shape, -1)
    if decode_view(model.config, x, mask, cache, None, {}) is None or not model.model.decodes(x, depth):
        return "the decode kernel does not run here"
    return None


def _versions(cache) -> int:
    return sum(layer.version for layer in cache.layers)


def state_of(model, adapters: list[nn.Module]) -> tuple:
    """What shows that the model was moved, or set to compute in another way, since a recording.

    Training is not among it: a graph reads weights and factors of adapters where they lie. Modules are found without
    their own attribute look-up, since this is for every step of a decoding.
    """
    config, parts = model.config, model._modules["model"]._modules
    layers = list(parts["layers"]._modules.values())
    last = [layer._modules["self_attn"] for layer in (layers[config.num_hidden_layers - 1], layers[-1])]
    some = [parts["embed_tokens"], model._modules["lm_head"], *(attention._modules["kv_b_proj"] for attention in last)]
    ways = config._experts_implementation, config.mla_implementation
    return (*(module.weight.data_ptr() for module in some), *ways, *map(adapter_state, adapters))


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


def record(step: Callable[[], tuple[Tensor | None, ...]], device: torch.device):
    """`step` as a graph, and its outputs, which each replay writes anew. Other threads may use the GPU meanwhile."""
    graph, side, pool = torch.cuda.CUDAGraph(), torch.cuda.Stream(device), torch.cuda.graph_pool_handle()
    with torch.cuda.device(device):
        current = torch.cuda.current_stream()
        side.wait_stream(current)
        with torch.cuda.stream(side):
            step()  # whatever compiles or allocates at its first use does so here
        current.wait_stream(side)
        capture = torch.cuda.graph(graph, pool=pool, stream=side, capture_error_mode="thread_local")
        with unharmed(device, pool), capture:
            outputs = step()
    return graph, *outputs


@contextmanager
def unharmed(device: torch.device, pool: tuple[int, int] | None):
    """Around a recording: if it fails, stream and allocator are as before; PyTorch would leave both inside of it.

    Args:
        pool: the memory that the recording allocates from.
    """
    before = torch.cuda.current_stream(device) if device.type == "cuda" else None
    try:
        yield
    except BaseException:
        if before is not None:
            torch.cuda.set_stream(before)
        if before is not None and pool is not None:
            with suppress(RuntimeError):  # newer releases have ended it themselves (pytorch#180395)
                torch._C._cuda_endAllocateToPool(before.device_index, pool)
        raise


def _record(model, run, inputs, mask: Tensor | None, cache: GrowingCache, depth: int, times: int) -> Recorded:
    """Record the step behind what is cached; what this writes is written again by the first replay."""
    own, device = tuple(x.clone() for x in inputs), inputs[0].device
    cursor = torch.full((1,), cache.get_seq_length(), device=device)
    room, seen = min(layer.room for layer in cache.layers), None
    if mask is not None:
        seen = torch.zeros(len(mask), room, dtype=torch.int32, device=device)
        seen[:, : mask.shape[1]].copy_(mask)

    def step() -> tuple[Tensor | None, ...]:
        with cache.cursor_at(cursor):
            outputs = run(*own, seen)
        cursor.add_(own[0].shape[1])
        return *outputs, None if depth else model.model.checksums()

    graph, *outputs, checksums = record(step, device)
    watch = None if checksums is None else Watch(checksums)
    adapters = adapter_layers(model)
    made_with = _versions(cache), state_of(model, adapters), adapters, times
    return Recorded(graph, own, cursor, seen, tuple(outputs), checksums, room, *made_with, watch)
