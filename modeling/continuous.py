"""Continuous batching over latents: Transformers' manager with block tables and recorded steps.

Transformers (5.23) has both for flash attention alone. Here the decode kernel reads the tables, and a batch in which
every request has one new token is recorded as a CUDA graph, for each power of two of requests. Its manager, scheduler
and pages are used as they are; the runner of batches differs.
"""

import copy
import weakref
from types import SimpleNamespace

import torch
from transformers.generation.configuration_utils import ContinuousBatchingConfig
from transformers.generation.continuous_batching.model_runner import ModelRunner
from transformers.generation.continuous_batching.utils import CudaGraphBuffer, stream_context
from transformers.utils import logging
from transformers.utils.generic import is_flash_attention_requested

from .attention import kernel_decodes
from .decode_graph import Watch, never_recorded, state_of, unharmed
from .projections import adapter_layers

logger = logging.get_logger(__name__)

# Blocks of a request that tables have room for, at most, if nobody chose: 131,072 tokens, in pages of 256 as usual.
# Tables of its 1,024 requests then take 2 MiB, which is what a step copies to the GPU.
MOST_BLOCKS = 512


def paged_view(config):
    """A copy of `config` from which the paged cache sizes its slots: one key-value head of width ceil((C + R) / 2).

    A token's key slot and value slot then hold the two halves of its latent [c; k], and nothing else. And masks are
    planned for, but not made: the name of the attention is none that Transformers makes masks for.
    """
    view = copy.copy(config)
    view.num_key_value_heads = 1
    view.qk_rope_head_dim = -(-(config.kv_lora_rank + config.qk_rope_head_dim) // 2)  # read as head_dim
    if not is_flash_attention_requested(config):
        view._attn_implementation = "latent"
    return view


def use_latent_pages(model, manager, asked: ContinuousBatchingConfig):
    """Let a manager that Transformers has made for `model` batch over pages of latents.

    Args:
        asked: the settings that were given, before Transformers completed them.
    """
    if "_create_batch_processor" in vars(manager):  # kept from an earlier call, and adapters may have come or gone
        if manager.batch_processor is not None:
            manager.batch_processor.model_runner.look_again(model)
        return
    settings = manager.continuous_batching_config
    settings.max_blocks_per_request = _blocks(model, asked)
    settings.use_cuda_graph = _graphs(model, settings, asked)
    if asked.use_async_batching is None:
        settings.use_async_batching = False  # which plans for a fifth more of cache
    create, known = type(manager)._create_batch_processor, weakref.ref(manager)

    def create_with_latent_pages():
        manager = known()  # which holds this function: in a circle both would stay, with the cache
        manager.model = SimpleNamespace(
            config=paged_view(model.config), _supports_logits_to_keep=model._supports_logits_to_keep,
            device=model.device, dtype=model.dtype,
        )  # fmt: skip
        try:
            processor = create(manager)
        finally:
            manager.model = model
        if type(processor.model_runner) is ModelRunner:
            _use_runner(model, processor)
        return processor

    manager._create_batch_processor = create_with_latent_pages


def _blocks(model, asked: ContinuousBatchingConfig) -> int:
    """Blocks that a request's row of the table has, 0 for no tables."""
    if not _reads_tables(model):
        if asked.max_blocks_per_request:
            logger.warning("max_blocks_per_request is ignored: block tables are for the decode kernel alone.")
        return 0
    if asked.max_blocks_per_request is not None:
        return asked.max_blocks_per_request
    return min(MOST_BLOCKS, -(-model.config.max_position_embeddings // asked.page_size))


def _reads_tables(model) -> bool:
    """Whether the decode kernel runs decode-only batches as the model is now."""
    config, x = model.config, model.model.embed_tokens.weight[:1, None]
    return kernel_decodes(config, x, config.mla_form) and model.model.decodes(x) and not config.output_attentions


def _recordable(model) -> bool:
    """Whether a batch can be recorded as the model is now: without the kernel, it asks the GPU for lengths."""
    return never_recorded(model, model.device) is None and _reads_tables(model)


def _graphs(model, settings: ContinuousBatchingConfig, asked: ContinuousBatchingConfig) -> tuple[bool, bool]:
    """Whether mixed and decode-only batches are recorded: the former if that was asked for, the latter by default."""
    reason = never_recorded(model, model.device)
    if reason is None:
        decode = asked.use_cuda_graph is None or asked.cuda_graph_booleans[1]
        return settings.cuda_graph_booleans[0], decode and settings.max_blocks_per_request > 0
    if any(asked.cuda_graph_booleans):
        logger.warning(f"use_cuda_graph is ignored: {reason}.")
    return False, False


def _use_runner(model, processor):
    """Replace the processor's runner; tokens of a replayed batch are looked at only after its routers' checksums."""
    old = processor.model_runner
    processor.model_runner = runner = PagedRunner(
        old.logit_processor, old.cb_config, old.inputs_and_outputs, old.cache, old.do_sample, old.return_logprobs
    )
    update, known = type(processor).update_batch, weakref.ref(processor)

    def update_batch():
        runner.settle(model)
        update(known())

    processor.update_batch = update_batch


class PagedRunner(ModelRunner):
    """Transformers' runner, which pads only batches that are recorded or compiled.

    Graphs hold for the weights, adapters and implementations that they were recorded with; others are recorded anew.
    """

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.state: tuple | None = None  # of the model, when graphs were recorded
        self.adapters: list = []
        self.recordable = False
        self.checksums: dict = {}  # by graph, what its replays write
        self.watches: dict[int, Watch] = {}  # by pair of inputs and outputs, of which there are two where it is async

    def _static(self, decode: bool) -> bool:
        compiled = self._compiled_decode if decode else self._compiled_varlen
        return compiled is not None or (self.use_cuda_graph_decode if decode else self.use_cuda_graph_varlen)

    def maybe_pad_inputs(self, num_q_tokens: int, max_kv_read: int, use_decode_fast_path: bool) -> tuple[int, int]:
        """Sizes of the next batch. Padded to whole intervals, a mixed one would attend to thousands of empty slots."""
        self.pad_inputs = self._static(use_decode_fast_path)
        copies = getattr(self.inputs_and_outputs, "h2d_stream", None)  # where it is async
        if copies is not None:
            # Transformers clears inputs, when it makes or resets them, on another stream than it copies them on.
            copies.wait_stream(torch.cuda.current_stream(copies.device))
        return super().maybe_pad_inputs(num_q_tokens, max_kv_read, use_decode_fast_path)

    def run_one_warmup(self, model, num_q_tokens: int, max_kv_read: int | None) -> float:
        """Seconds of a warm-up; of none for batches that have nothing to warm up."""
        if not self._static(max_kv_read is None):
            return 0.0
        return super().run_one_warmup(model, num_q_tokens, max_kv_read)

    def compute_batch(self, model, batch_data: dict):
        """Run or replay the batch; a replay's checksums are sent to the host, for `settle`."""
        self._forget_stale(model)
        io = self.inputs_and_outputs
        if io.compute_stream is not None:
            # Transformers fills the inputs on this stream, and a replay can be faster than the last of these copies.
            io.compute_stream.wait_stream(torch.cuda.current_stream(model.device))
        graph = io.get_graph() if self._get_forward_fn(io.use_block_table)[1] else None
        super().compute_batch(model, batch_data)
        checksums = self.checksums.get(graph)
        if checksums is not None:
            pair = getattr(io, "current_pair", 0)
            if pair not in self.watches:
                self.watches[pair] = Watch(checksums)
            with stream_context(io.compute_stream):
                self.watches[pair].send(checksums)

    def settle(self, model):
        """Raise if a router saw NaN or infinite values in the replayed batch whose tokens are read next."""
        watch = self.watches.get(getattr(self.inputs_and_outputs, "current_pair", 0))
        checksums = None if watch is None else watch.read()
        if checksums is None:
            return
        try:
            model.model.refuse_nonfinite(checksums)
        except BaseException:
            self.watches.clear()  # nor is the other pair asked again, when the weights may have been repaired
            raise

    def look_again(self, model):
        """Let the next batch record anew if adapters or hooks have come or gone, which not every batch looks for."""
        if self.adapters != adapter_layers(model) or self.recordable != _recordable(model):
            self.state = None

    def _forget_stale(self, model):
        if self.state is not None and self.state == state_of(model, self.adapters):
            return
        self.adapters, self.recordable = adapter_layers(model), _recordable(model)
        self.state = state_of(model, self.adapters)
        mixed, decode = self.cb_config.cuda_graph_booleans
        self.use_cuda_graph_varlen, self.use_cuda_graph_decode = mixed and self.recordable, decode and self.recordable
        io = self.inputs_and_outputs
        if io.compute_stream is not None:
            io.compute_stream.synchronize()
        self.checksums.clear()
        for device_io in [pair.device_io for pair in getattr(io, "io_pairs", ())] or [io]:
            device_io.graphs = CudaGraphBuffer()

    def _capture_graph(self, forward_fn, compute_stream, model, *arguments):
        """Transformers' recording, with the routers' checksums; without it, where recording fails."""
        found = []

        def forward(*arguments):
            forward_fn(*arguments)
            found.append(model.model.checksums())

        try:
            with unharmed(model.device, self.graph_pool_id):
                super()._capture_graph(forward, compute_stream, model, *arguments)
        except RuntimeError as reason:  # a layer of somebody else's that waits for the GPU, or no memory
            logger.warning_once(f"Batches could not be recorded as a CUDA graph and run as ever: {reason}")
            if self.inputs_and_outputs.use_block_table:
                self.use_cuda_graph_decode = False
            else:
                self.use_cuda_graph_varlen = False
            with stream_context(compute_stream):
                forward_fn(model, *arguments)
            return
        self.checksums[self.inputs_and_outputs.get_graph()] = found[-1]
