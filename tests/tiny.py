"""Tiny random checkpoints with the structure of the published ones, native and ours."""

import torch
from transformers import AutoModelForCausalLM, DeepseekV2Config, DeepseekV3Config, Glm4MoeLiteConfig

from lamoe import LamoeForCausalLM

_COMMON = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 3,
    "first_k_dense_replace": 1,
    "max_position_embeddings": 160,
    "initializer_range": 0.3,
    "bos_token_id": 0,
    "eos_token_id": None,
    "pad_token_id": None,
}
_YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 40,
    "beta_fast": 32,
    "beta_slow": 1,
}

# By the name of the published model: the native configuration class and what differs from _COMMON.
FAMILIES = {
    "v2-lite": (
        DeepseekV2Config,
        {
            "q_lora_rank": None,
            "n_shared_experts": 2,
            "topk_method": "greedy",
            "routed_scaling_factor": 1.0,
            "rope_parameters": {**_YARN, "mscale": 0.707, "mscale_all_dim": 0.707},
        },
    ),
    "v2": (
        DeepseekV2Config,
        {
            "q_lora_rank": 24,
            "n_group": 4,
            "topk_group": 2,
            "topk_method": "group_limited_greedy",
            "routed_scaling_factor": 16.0,
            "rope_parameters": {**_YARN, "mscale": 0.707, "mscale_all_dim": 0.707},
        },
    ),
    "moonlight": (
        DeepseekV3Config,
        {
            "q_lora_rank": None,
            "n_group": 1,
            "topk_group": 1,
            "n_shared_experts": 2,
            "routed_scaling_factor": 2.446,
            "rms_norm_eps": 1e-5,
            "rope_parameters": {"rope_type": "default", "rope_theta": 50000.0},
        },
    ),
    "v3": (
        DeepseekV3Config,
        {
            "q_lora_rank": 24,
            "n_group": 4,
            "topk_group": 2,
            "routed_scaling_factor": 2.5,
            "rope_parameters": {**_YARN, "mscale": 1.0, "mscale_all_dim": 1.0},
        },
    ),
    "kimi-k2": (
        DeepseekV3Config,
        {
            "q_lora_rank": 24,
            "n_group": 1,
            "topk_group": 1,
            "n_routed_experts": 12,
            "routed_scaling_factor": 2.827,
            "rope_parameters": {**_YARN, "rope_theta": 50000.0, "beta_fast": 1, "mscale": 1.0, "mscale_all_dim": 1.0},
        },
    ),
    "glm-4.7-flash": (
        Glm4MoeLiteConfig,
        {
            "num_attention_heads": 5,
            "num_key_value_heads": 5,
            "q_lora_rank": 24,
            "qk_nope_head_dim": 12,
            "v_head_dim": 16,
            "n_group": 1,
            "topk_group": 1,
            "routed_scaling_factor": 1.8,
            "rms_norm_eps": 1e-5,
            "mlp_layer_types": ["dense", "sparse", "sparse"],
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
        },
    ),
}

# Bytes a token in bfloat16, as published or counted by hand: latent, and expanded where it is published.
KV_BYTES = {
    "v2-lite": (31_104, 276_480),
    "moonlight": (31_104, 276_480),
    "glm-4.7-flash": (54_144, 962_560),
    "v2": (69_120, None),
    "v3": (70_272, 4_997_120),
    "kimi-k2": (70_272, 2_498_560),
}


def native_model(family: str, dtype=torch.float64, seed: int = 0, **changes):
    """A native model of this family with random weights, correction biases included, in evaluation mode."""
    config_class, own = FAMILIES[family]
    settings = {**_COMMON, **own, **changes}
    if config_class is Glm4MoeLiteConfig:
        del settings["first_k_dense_replace"]
    torch.manual_seed(seed)
    experts = "eager" if dtype == torch.float64 else "grouped_mm"  # PyTorch's grouped_mm has no float64
    model = AutoModelForCausalLM.from_config(config_class(**settings), experts_implementation=experts).to(dtype)
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.copy_(torch.randn(buffer.shape) * 0.1)
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(torch.randn(parameter.shape) * 0.1)
    return model.eval()


def lamoe_model(family: str, folder, dtype=torch.float64, **changes):
    """The native model of this family, and ours loaded from its checkpoint in `folder`."""
    native = native_model(family, dtype, **changes)
    native.save_pretrained(folder)
    experts = native.config._experts_implementation
    return native, LamoeForCausalLM.from_pretrained(folder, dtype=dtype, experts_implementation=experts).eval()


def random_ids(batch: int, length: int, seed: int = 1, vocab_size: int = 97) -> torch.Tensor:
    """Token ids [batch, length]."""
    return torch.randint(0, vocab_size, (batch, length), generator=torch.Generator().manual_seed(seed))
