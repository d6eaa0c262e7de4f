"""What Transformers' mixins ask of a model under test: its classes, a tiny configuration, inputs."""

from lamoe import (
    LamoeConfig,
    LamoeForCausalLM,
    LamoeForSequenceClassification,
    LamoeForTokenClassification,
    LamoeModel,
)

from .test_modeling_common import ids_tensor, random_attention_mask

# All widths differ where they may, so that a mixed-up pair shows: C=16, P=8, R=4, V=12. One dense and one sparse
# layer: the mixins demand at most two. They also want an odd vocabulary, which does not divide among ranks.
TINY = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 40,
    "moe_intermediate_size": 24,
    "num_hidden_layers": 2,
    "first_k_dense_replace": 1,
    "num_attention_heads": 4,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 12,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


class LamoeModelTester:
    """The mixins' `model_tester` for one shape: `TINY` with `shape` over it."""

    base_model_class = LamoeModel
    causal_lm_class = LamoeForCausalLM
    sequence_classification_class = LamoeForSequenceClassification
    token_classification_class = LamoeForTokenClassification

    batch_size = 5
    seq_length = 7
    is_training = True

    def __init__(self, **shape):
        self.shape = {**TINY, **shape}
        self.hidden_size = self.shape["hidden_size"]
        self.num_hidden_layers = self.shape["num_hidden_layers"]
        self.num_attention_heads = self.shape["num_attention_heads"]

    def get_config(self):
        return LamoeConfig(**self.shape)

    def prepare_config_and_inputs_for_common(self):
        config = self.get_config()
        size = [self.batch_size, self.seq_length]
        input_ids = ids_tensor(size, config.vocab_size)
        return config, {"input_ids": input_ids, "attention_mask": random_attention_mask(size)}
