"""Continuous batching over pages of latents: how Transformers' paged cache is made to hold them."""

import copy

from transformers.generation.configuration_utils import ContinuousBatchingConfig


def paged_view(config):
    """A copy of `config` from which the paged cache sizes its slots: one key-value head of width ceil((C + R) / 2).

    A token's key slot and value slot then hold the two halves of its latent [c; k], and nothing else.
    """
    view = copy.copy(config)
    view.num_key_value_heads = 1
    view.qk_rope_head_dim = -(-(config.kv_lora_rank + config.qk_rope_head_dim) // 2)  # read as head_dim
    return view


class LatentBatchingMixin:
    """`generate_batch` and `transformers serve --continuous-batching` for a model whose cache holds latents.

    To stand before PreTrainedModel in a class's bases. Native latent-attention classes fail there.
    """

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
            config = self.config
            self.config = paged_view(config)
            try:
                return create(manager)
            finally:
                self.config = config

        manager._create_batch_processor = create_with_latent_pages
        return manager
