"""What generation needs beyond the cache convention: pages of latents, and the experts' way at decode."""

import copy
from contextlib import nullcontext
from types import SimpleNamespace

import torch
from transformers.generation.configuration_utils import ContinuousBatchingConfig


def paged_view(config):
    """A copy of `config` from which the paged cache sizes its slots: one key-value head of width ceil((C + R) / 2).

    A token's key slot and value slot then hold the two halves of its latent [c; k], and nothing else.
    """
    view = copy.copy(config)
    view.num_key_value_heads = 1
    view.qk_rope_head_dim = -(-(config.kv_lora_rank + config.qk_rope_head_dim) // 2)  # read as head_dim
    return view


class LamoeGenerationMixin:
    """`generate_batch` and `transformers serve --continuous-batching` over latents; no copies of experts at decode.

    To stand before GenerationMixin in a class's bases. Native latent-attention classes fail in continuous batching.
    """

    def _optimize_model_for_decode(self):
        """Keep grouped_mm at decode where Transformers would switch to batched_mm, which copies every chosen expert.

        V2-Lite's shape, compiled, one H100, milliseconds a step: 6.1 against 7.0 at batch 1, 11.1 against 17.5 at 4,
        29.8 against 64.3 at 16 (context 8k). Elsewhere grouped_mm is a loop, so all is as ever.
        """
        fast = self.device.type == "cuda" and self.dtype == torch.bfloat16
        if fast and torch.cuda.get_device_capability(self.device) >= (8, 0):
            return nullcontext()
        return super()._optimize_model_for_decode()

    def init_continuous_batching(self, generation_config=None, continuous_batching_config=None, workload_hints=None):
        """Transformers' manager, with pages as wide as the latent and without the flash kernels' own page tables.

        Flash attention is used only if it was chosen by name: over latents it would expand every context.
        """
        settings = copy.copy(continuous_batching_config) or ContinuousBatchingConfig()
        settings.auto_switch_to_flash = False
        settings.max_blocks_per_request = 0  # block tables are read and written by flash kernels alone
        manager = super().init_continuous_batching(generation_config, settings, workload_hints)
        create = type(manager)._create_batch_processor

        def create_with_latent_pages():
            sizes = {"device": self.device, "dtype": self.dtype}
            manager.model = SimpleNamespace(
                config=paged_view(self.config), _supports_logits_to_keep=self._supports_logits_to_keep, **sizes
            )
            try:
                return create(manager)
            finally:
                manager.model = self

        manager._create_batch_processor = create_with_latent_pages
        return manager
