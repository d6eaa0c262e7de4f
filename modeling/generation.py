"""What generation needs beyond the cache convention: pages of latents, and the experts' way at decode."""

import copy
from contextlib import nullcontext

import torch
from transformers.cache_utils import DynamicCache, StaticCache, StaticLayer
from transformers.generation.configuration_utils import ContinuousBatchingConfig
from transformers.utils import logging

from .cache import GrowingCache, default_cache
from .decode_graph import never_recorded, settle
from .mtp_generation import Speculation, speculate

logger = logging.get_logger(__name__)

_ONE_TOKEN = {"position_ids", "use_cache", "logits_to_keep"}
MOST_REQUESTS = 1024  # of a batch, Transformers' own bound
MANY_ROWS = 20  # chosen experts a step, from which copying their weights costs more than grouped_mm's launches


class LamoeGenerationMixin:
    """`generate_batch` and `transformers serve --continuous-batching` over latents; no copies of experts at decode.

    To stand before GenerationMixin in a class's bases. Native latent-attention classes fail in continuous batching.
    """

    _launch_bound = False
    speculation: Speculation | None = None  # of the last `generate(..., use_mtp=True)`

    def _assisted_decoding(
        self, input_ids, generation_config=None, inputs_tensor=None, assistant_model=None, synced_gpus=False, **kwargs
    ):
        """Transformers' assisted generation; `use_mtp=True` drafts with the model's own layers, in any batch.

        Raises:
            ValueError: there are two kinds of drafts, or several processes that have to take as many steps.
        """
        if not generation_config.use_mtp:
            return super()._assisted_decoding(
                input_ids, generation_config=generation_config, inputs_tensor=inputs_tensor,
                assistant_model=assistant_model, synced_gpus=synced_gpus, **kwargs,
            )  # fmt: skip
        if assistant_model is not None or synced_gpus:
            reason = "synced_gpus would need as many rounds on every rank" if synced_gpus else "or an assistant_model"
            raise ValueError(f"use_mtp=True: {reason}; leave one of them out.")
        for name in ("tokenizer", "assistant_tokenizer"):
            kwargs.pop(name, None)
        return speculate(self, input_ids, generation_config=generation_config, **kwargs)

    def generate(self, *args, **kwargs):
        """Transformers' `generate`, in evaluation mode as long as it runs: TRL's GRPO calls it in a training step.

        Else routers would count tokens that nobody trains on, and each step would go the slower ways of training.
        """
        in_training = [module for module in self.modules() if module.training]
        self.eval()
        try:
            return super().generate(*args, **kwargs)
        finally:
            for module in in_training:
                module.training = True

    def _valid_auto_compile_criteria(self, model_kwargs, generation_config) -> bool:
        """Transformers' answer; and note whether decoding will wait for launches, as few rows do without a graph."""
        compiles = super()._valid_auto_compile_criteria(model_kwargs, generation_config)
        mask = model_kwargs.get("attention_mask")
        rows = MANY_ROWS if mask is None else mask.shape[0] * self.config.num_experts_per_tok
        self._launch_bound = not compiles and rows < MANY_ROWS
        return compiles

    def _optimize_model_for_decode(self):
        """Keep grouped_mm at decode where Transformers would switch to batched_mm, which copies every chosen expert.

        V2-Lite's shape, one H100, milliseconds a step, grouped against batched: compiled 6.1/7.0 at batch 1, 11.1/17.5
        at 4, 29.8/64.3 at 16 (context 8k). Only few rows without a graph go the other way, 47/34 at batch 1, since
        grouped_mm takes more launches. In other dtypes and on older GPUs grouped_mm is a loop, and all is as ever.
        """
        fast = self.device.type == "cuda" and self.dtype == torch.bfloat16
        if fast and not self._launch_bound and torch.cuda.get_device_capability(self.device) >= (8, 0):
            return nullcontext()
        return super()._optimize_model_for_decode()

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, *args, **kwargs):
        """Transformers' choice of a cache; its default one grows in place.

        So does a static one that would be compiled, if steps can be recorded instead: with all its room from the
        start, it is faster and does not wait for a compiler. A `compile_config` asks for the compiler. Both hold
        latents in `config.latent_cache_dtype`.
        """
        given = model_kwargs.get("past_key_values")
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
        if type(given) is GrowingCache:
            given.recorded = None  # adapters may have come or gone since
        cache = model_kwargs.get("past_key_values")
        if given is None and type(cache) is DynamicCache and not cache.offloading:
            model_kwargs["past_key_values"] = default_cache(self.config)
        elif given is None and type(cache) is StaticCache and self._records_instead(cache, generation_config):
            drafts = self.config.num_nextn_predict_layers if generation_config.use_mtp else 0
            room = cache.layers[0].max_cache_len + drafts  # which the last round makes too many of
            model_kwargs["past_key_values"] = default_cache(self.config, room)
        elif cache is not None and getattr(cache, "latent_dtype", None) is None:
            self._warn_of_latents_in_full(type(cache).__name__)

    def _warn_of_latents_in_full(self, cache: str):
        if self.config.latent_cache_dtype is not None:
            logger.warning_once(
                f"latent_cache_dtype={self.config.latent_cache_dtype!r} is for generate's default cache; this "
                f"{cache} holds latents in its own dtype."
            )

    def _records_instead(self, cache: StaticCache, generation_config) -> bool:
        if cache.offloading or generation_config.compile_config is not None or generation_config.disable_compile:
            return False
        untouched = all(type(layer) is StaticLayer and not layer.is_initialized for layer in cache.layers)
        return untouched and not never_recorded(self, self.device)

    def prepare_inputs_for_generation(
        self, input_ids, next_sequence_length=None, past_key_values=None, attention_mask=None, inputs_embeds=None,
        is_first_iteration=False, **kwargs,
    ) -> dict:  # fmt: skip
        """Transformers' inputs of a forward; of a recorded step, for which the GPU waits, without its questions."""
        recorded = type(past_key_values) is GrowingCache and past_key_values.recorded
        if not recorded or next_sequence_length != 1 or kwargs.keys() - _ONE_TOKEN:
            return super().prepare_inputs_for_generation(
                input_ids, next_sequence_length, past_key_values, attention_mask, inputs_embeds, is_first_iteration,
                **kwargs,
            )  # fmt: skip
        if kwargs.get("position_ids") is not None:
            kwargs["position_ids"] = kwargs["position_ids"][..., -1:]
        last = {"input_ids": input_ids[:, -1:], "past_key_values": past_key_values, "attention_mask": attention_mask}
        return last | kwargs

    def _sample(self, *args, **kwargs):
        """Transformers' loop; an error in its last step is no less an error."""
        answer = super()._sample(*args, **kwargs)
        settle(self, kwargs.get("past_key_values"))
        return answer

    def generate_batch(
        self, inputs, generation_config=None, continuous_batching_config=None, record_timestamps=False,
        progress_bar=False, persistent_manager=False, warmup=True, **kwargs,
    ):  # fmt: skip
        """Transformers' `generate_batch`, prepared for as many requests at once as there are and not for 1,024."""
        settings = self._batching_settings(generation_config, continuous_batching_config)
        if settings.max_requests_per_batch is None and inputs and not persistent_manager:
            sequences = (generation_config or self.generation_config).num_return_sequences or 1
            settings.max_requests_per_batch = min(len(inputs) * sequences, MOST_REQUESTS)
        return super().generate_batch(
            inputs, generation_config, settings, record_timestamps, progress_bar, persistent_manager, warmup, **kwargs
        )

    def init_continuous_batching(self, generation_config=None, continuous_batching_config=None, workload_hints=None):
        """Transformers' manager, with pages of latents, which the decode kernel reads by their block tables.

        Decode-only batches are recorded as CUDA graphs where steps of `generate` could be. Flash attention is used
        only if it was chosen by name: over latents it would expand every context.
        """
        from .continuous import use_latent_pages

        self._warn_of_latents_in_full("paged cache")
        asked = self._batching_settings(generation_config, continuous_batching_config)
        settings = copy.copy(asked)
        settings.auto_switch_to_flash = False
        settings.max_blocks_per_request = 0  # Transformers looks for flash kernels, which tables are not for here
        manager = super().init_continuous_batching(generation_config, settings, workload_hints)
        use_latent_pages(self, manager, asked)
        return manager

    def _batching_settings(self, generation_config, settings) -> ContinuousBatchingConfig:
        """A copy of the settings that were given, or the default ones."""
        if settings is None:  # older callers put it into the generation configuration
            settings = getattr(generation_config or self.generation_config, "continuous_batching_config", None)
        return copy.copy(settings) if isinstance(settings, ContinuousBatchingConfig) else ContinuousBatchingConfig()
