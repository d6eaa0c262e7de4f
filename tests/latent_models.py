"""Tiny native models of every family with latent attention in Transformers."""

import importlib

import torch
from torch import nn
from transformers import AutoConfig

_COMMON = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 16, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 4, "q_lora_rank": 24, "kv_lora_rank": 16, "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4, "v_head_dim": 12, "n_routed_experts": 4, "num_local_experts": 4, "n_shared_experts": 1,
    "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
    "max_position_embeddings": 160, "initializer_range": 0.3,
    "bos_token_id": 0, "eos_token_id": None, "pad_token_id": None,
}  # fmt: skip
_DENSE_AND_SPARSE = {"mlp_layer_types": ["dense", "sparse"]}
_SPARSE_ATTENTION = {"index_topk": 8, "index_n_heads": 2, "index_head_dim": 8}
_LINEAR = {"linear_head_dim": 8, "linear_num_heads": 2}
_YARN = {
    "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 40,
    "mscale": 1.0, "mscale_all_dim": 1.0,
}  # fmt: skip
_LLAMA_4 = {**_YARN, "llama_4_scaling_beta": 0.1, "original_max_position_embeddings": 8}

# By model type: the class, what differs from _COMMON, and how many of the layers have latent attention.
FAMILIES = {
    "axk1": ("AXK1ForCausalLM", {**_DENSE_AND_SPARSE, "rope_interleave": False}, 2),
    "bailing_hybrid": ("BailingHybridForCausalLM", {"layer_group_size": 2, "head_dim": 8, "num_mtp_layers": 0}, 1),
    "deepseek_v2": ("DeepseekV2ForCausalLM", {"q_lora_rank": None, "topk_method": "greedy"}, 2),
    "deepseek_v3": ("DeepseekV3ForCausalLM", {"rope_parameters": _YARN}, 2),
    "glm4_moe_lite": ("Glm4MoeLiteForCausalLM", _DENSE_AND_SPARSE, 2),
    "kimi_linear": (
        "KimiLinearForCausalLM",
        {**_LINEAR, **_DENSE_AND_SPARSE, "q_lora_rank": None, "layer_types": ["linear_attention", "full_attention"]},
        1,
    ),
    "longcat_flash": (
        "LongcatFlashForCausalLM",
        {"num_layers": 1, "ffn_hidden_size": 32, "expert_ffn_hidden_size": 16, "moe_topk": 2, "zero_expert_num": 1,
         "head_dim": 4},
        2,
    ),
    "minicpm3": ("MiniCPM3ForCausalLM", {"dim_model_base": 16}, 2),
    "mistral4": ("Mistral4ForCausalLM", {"rope_parameters": _LLAMA_4}, 2),
    "youtu": ("YoutuForCausalLM", {"attention_bias": True}, 2),
    # Sparse attention: an indexer chooses eight keys.
    "axk2": ("AXK2ForCausalLM", {**_SPARSE_ATTENTION, "gated_norm_rank": 4}, 2),
    "deepseek_v32": ("DeepseekV32ForCausalLM", _SPARSE_ATTENTION, 2),
    "dots3_note_text": ("Dots3NoteForCausalLM", _SPARSE_ATTENTION, 2),
    "glm_moe_dsa": ("GlmMoeDsaForCausalLM", _SPARSE_ATTENTION, 2),
    "glm5_next_text": (
        "Glm5NextTextModel",
        {**_SPARSE_ATTENTION, **_LINEAR, "qk_rope_head_dim": 0, "index_kpool": 2,
         "layer_types": ["indexed_attention"] * 2},
        2,
    ),
    "mistral_large4_text": ("MistralLarge4TextModel", _SPARSE_ATTENTION, 2),
    "hy_v4": ("HYV4ForCausalLM", _SPARSE_ATTENTION, 2),
}  # fmt: skip


def latent_model(name: str, **changes) -> nn.Module:
    """A tiny model of this family with eager experts, in evaluation mode; no parameter is zero."""
    class_name, own, _ = FAMILIES[name]
    attention = {key: changes.pop(key) for key in ("attn_implementation",) if key in changes}
    config = AutoConfig.for_model(name, **{**_COMMON, **own, **changes})
    folder = name.removesuffix("_text")
    cls = getattr(importlib.import_module(f"transformers.models.{folder}.modeling_{folder}"), class_name)
    torch.manual_seed(0)
    model = cls._from_config(config, experts_implementation="eager", **attention).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                nn.init.normal_(parameter, std=0.3)
    return model
