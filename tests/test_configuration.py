"""LamoeConfig: published files read, nonsense refused with a way out, dual-mode files written."""

import json
import logging

import pytest
from transformers import AutoConfig, DeepseekV2Config, DeepseekV3Config, Glm4MoeLiteConfig

from lamoe import LamoeConfig
from tests.tiny import FAMILIES, KV_BYTES, native_model

SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}

# What must be refused: settings over SMALL, and the whole message.
REFUSED = {
    "experts not divisible": (
        {"n_group": 3, "topk_group": 1},
        "n_routed_experts=8 is not divisible by n_group=3; use one of 1, 2, 4, 8.",
    ),
    "more chosen than there are": (
        {"num_experts_per_tok": 9},
        "num_experts_per_tok=9 is more than n_routed_experts=8; choose at most 8.",
    ),
    "more chosen than the groups hold": (
        {"n_group": 4, "num_experts_per_tok": 3},
        "num_experts_per_tok=3 is more than the 2 experts that topk_group=1 of n_group=4 groups hold; "
        "raise topk_group to >= 2.",
    ),
    "one expert a group": (
        {"n_group": 8, "topk_group": 4},
        "n_group=8 leaves one expert a group (n_routed_experts=8); noaux_tc scores a group by its two best experts: "
        "use n_group of at most 4, or topk_method='greedy'.",
    ),
    "more groups chosen than there are": (
        {"topk_group": 3},
        "topk_group=3 does not lie between 1 and n_group=2; use at most 2.",
    ),
    "no experts": (
        {"n_routed_experts": 0},
        "n_routed_experts=0 and num_experts_per_tok=2 must be at least 1; for a dense model set "
        "first_k_dense_replace=num_hidden_layers (2).",
    ),
    "topk_method": (
        {"topk_method": "best"},
        "topk_method='best' is not one of 'greedy', 'group_limited_greedy', 'noaux_tc'.",
    ),
    "scoring_func": ({"scoring_func": "tanh"}, "scoring_func='tanh' is not one of 'softmax', 'sigmoid'."),
    "hidden_act": (
        {"hidden_act": "swish"},
        "hidden_act='swish' is not one of 'silu', 'gelu', 'gelu_pytorch_tanh', 'relu'; "
        "only silu is served by vLLM, SGLang and llama.cpp.",
    ),
    "router_nonfinite": (
        {"router_nonfinite": "skip"},
        "router_nonfinite='skip' is not one of 'raise', 'zero', 'ignore'.",
    ),
    "mla_form": ({"mla_form": "wide"}, "mla_form='wide' is not one of 'auto', 'expanded', 'absorbed'."),
    "mla_implementation": (
        {"mla_implementation": "cuda"},
        "mla_implementation='cuda' is not one of 'auto', 'eager', 'triton'.",
    ),
    "latent_cache_dtype": (
        {"latent_cache_dtype": "float8_e5m2"},
        "latent_cache_dtype='float8_e5m2' is not one of 'float8_e4m3fn'; None is the model's dtype.",
    ),
    "odd rotary width": (
        {"qk_rope_head_dim": 7},
        "qk_rope_head_dim=7 must be even and not negative: positions turn pairs; use 64 as the published models do, "
        "or 0 for attention without positions.",
    ),
    "no query width": (
        {"qk_rope_head_dim": 0, "qk_nope_head_dim": 0},
        "qk_nope_head_dim and qk_rope_head_dim are both 0; a query needs some width.",
    ),
    "grouped heads": (
        {"num_key_value_heads": 2},
        "num_key_value_heads=2 is not num_attention_heads=4; all heads share one latent, so there is nothing to "
        "group: leave num_key_value_heads out.",
    ),
    "kv_lora_rank": ({"kv_lora_rank": 0}, "kv_lora_rank=0 must be at least 1."),
    "partial rotary": (
        {"partial_rotary_factor": 0.5},
        "partial_rotary_factor is not 1; a latent-attention key is rotary or plain as a whole.",
    ),
    "layer kinds": (
        {"mlp_layer_types": ["sparse", "dense"]},
        "mlp_layer_types=['sparse', 'dense'] is not dense layers, then sparse ones; Lamoe has no mixture.",
    ),
    "scope of a loss": (
        {"aux_loss_scope": "rank"},
        "aux_loss_scope='rank' is not one of 'sequence', 'batch', 'global'.",
    ),
    "negative loss": (
        {"device_loss_alpha": -0.1},
        "device_loss_alpha=-0.1 is negative, which rewards imbalance; use 0 or more.",
    ),
    "devices not divisible": (
        {"expert_devices": 3},
        "n_routed_experts=8 is not divisible by expert_devices=3; use one of 1, 2, 4, 8.",
    ),
    "one device": (
        {"communication_loss_alpha": 0.02, "expert_devices": 1},
        "communication_loss_alpha=0.02 balances devices, but the experts are on one (expert_devices=1, n_group=2); "
        "set expert_devices, or 0 here.",
    ),
    "misspelt": ({"num_expert": 8}, "num_expert=8 is not a field of LamoeConfig; did you mean 'num_experts'?"),
    "unknown": (
        {"zebra": "stripes"},
        "zebra='stripes' is not a field of LamoeConfig; its docstring lists the legal ones.",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_with_the_way_out(case):
    settings, message = REFUSED[case]
    with pytest.raises(ValueError) as caught:
        LamoeConfig(**{**SMALL, **settings})
    assert str(caught.value) == message


def test_nulls_of_published_files_are_accepted():
    config = LamoeConfig(**{**SMALL, "n_group": None, "topk_group": None, "n_shared_experts": None})
    assert (config.n_group, config.topk_group, config.n_shared_experts) == (1, 1, 0)
    assert config.num_key_value_heads == config.num_attention_heads


def test_aliases_set_the_field_before_it_is_checked():
    assert LamoeConfig(**{**SMALL, "num_local_experts": 16}).n_routed_experts == 16
    assert LamoeConfig(**SMALL, router_aux_loss_coef=0.5).aux_loss_alpha == 0.5
    with pytest.raises(ValueError, match="n_routed_experts=9 is not divisible"):
        LamoeConfig(**{**SMALL, "num_experts": 9})


def test_scope_of_the_balancing_loss_follows_seq_aux_unless_it_is_given(tmp_path):
    assert LamoeConfig(**SMALL).balance_scope == "sequence"
    assert LamoeConfig(**SMALL, seq_aux=False).balance_scope == "batch"
    config = LamoeConfig(**SMALL, aux_loss_scope="global", expert_devices=4)
    assert (config.balance_scope, config.seq_aux, config.loss_devices) == ("global", False, 4)
    config.save_pretrained(tmp_path)
    again = LamoeConfig.from_pretrained(tmp_path)
    assert (again.balance_scope, again.seq_aux, again.loss_devices) == ("global", False, 4)
    assert LamoeConfig(**{**SMALL, "n_group": 2}).loss_devices == 2
    assert "aux_loss_scope" not in LamoeConfig(**SMALL).serving_dict(use_diff=False)


def test_kv_bytes_are_the_published_ones():
    for preset, (latent, expanded) in KV_BYTES.items():
        config = LamoeConfig.from_preset(preset)
        assert config.kv_bytes_per_token() == latent
        assert expanded in (None, config.kv_bytes_per_token(expanded=True))


def test_absorbing_wins_below_171_new_tokens_at_published_widths():
    assert LamoeConfig.from_preset("v2-lite").absorb_limit == LamoeConfig.from_preset("v3").absorb_limit == 170
    assert LamoeConfig.from_preset("tiny", mla_absorb_max_tokens=3).absorb_limit == 3
    assert LamoeConfig.from_preset("tiny", kv_lora_rank=32).absorb_limit == 4096


def test_presets_are_named_and_the_nearest_is_suggested():
    assert LamoeConfig.presets() == ["glm-4.7-flash", "kimi-k2", "moonlight", "tiny", "v2", "v2-lite", "v3"]
    with pytest.raises(ValueError, match=r"no preset 'v2lite'. Did you mean 'v2-lite'"):
        LamoeConfig.from_preset("v2lite")


# A config.json as it was published: keys and spellings of the originals, which no native class writes today.
PUBLISHED = {
    "v2-lite": {
        "model_type": "deepseek_v2",
        "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV2Config"},
        "architectures": ["DeepseekV2ForCausalLM"],
        "aux_loss_alpha": 0.001,
        "bos_token_id": 100000,
        "eos_token_id": 100001,
        "ep_size": 1,
        "hidden_size": 2048,
        "intermediate_size": 10944,
        "kv_lora_rank": 512,
        "moe_intermediate_size": 1408,
        "n_routed_experts": 64,
        "n_shared_experts": 2,
        "num_experts_per_tok": 6,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "num_hidden_layers": 27,
        "first_k_dense_replace": 1,
        "max_position_embeddings": 163840,
        "n_group": 1,
        "topk_group": 1,
        "q_lora_rank": None,
        "rope_scaling": {
            "beta_fast": 32,
            "beta_slow": 1,
            "factor": 40,
            "mscale": 0.707,
            "mscale_all_dim": 0.707,
            "original_max_position_embeddings": 4096,
            "type": "yarn",
        },
        "rope_theta": 10000,
        "routed_scaling_factor": 1.0,
        "scoring_func": "softmax",
        "seq_aux": True,
        "topk_method": "greedy",
        "torch_dtype": "bfloat16",
        "transformers_version": "4.33.1",
        "vocab_size": 102400,
    },
    "kimi-k2": {
        "model_type": "kimi_k2",
        "hidden_size": 7168,
        "kv_lora_rank": 512,
        "n_routed_experts": 384,
        "n_group": 1,
        "topk_group": 1,
        "num_attention_heads": 64,
        "rope_scaling": {
            "beta_fast": 1.0,
            "beta_slow": 1.0,
            "factor": 32.0,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "original_max_position_embeddings": 4096,
            "type": "yarn",
        },
        "rope_theta": 50000.0,
        "max_position_embeddings": 131072,
        "vocab_size": 163840,
        "unsloth_fixed": True,
    },
    "glm-4.7-flash": {
        "model_type": "glm4_moe_lite",
        "hidden_size": 2048,
        "n_routed_experts": 64,
        "num_experts_per_tok": 4,
        "num_attention_heads": 20,
        "num_hidden_layers": 47,
        "q_lora_rank": 768,
        "qk_nope_head_dim": 192,
        "v_head_dim": 256,
        "rope_theta": 1000000,
        "rope_scaling": None,
        "partial_rotary_factor": 1.0,
        "num_nextn_predict_layers": 1,
        "eos_token_id": [154820, 154827],
        "vocab_size": 154880,
    },
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_files_are_read_with_missing_keys_filled(name, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED[name]))
    config = LamoeConfig.from_pretrained(tmp_path)
    preset = LamoeConfig.from_preset(name)
    for field in (
        "topk_method", "scoring_func", "norm_topk_prob", "routed_scaling_factor", "n_group", "topk_group",
        "n_shared_experts", "first_k_dense_replace", "rope_parameters", "rms_norm_eps", "model_type",
    ):  # fmt: skip
        assert getattr(config, field) == getattr(preset, field), field


@pytest.mark.parametrize("family", FAMILIES)
def test_native_files_are_read(family, tmp_path):
    native = native_model(family).config
    native.save_pretrained(tmp_path)
    config = LamoeConfig.from_pretrained(tmp_path)
    for field in (
        "hidden_size", "n_routed_experts", "num_experts_per_tok", "rope_parameters", "routed_scaling_factor",
        "kv_lora_rank", "q_lora_rank", "v_head_dim", "n_shared_experts", "rms_norm_eps", "num_attention_heads",
    ):  # fmt: skip
        assert getattr(config, field) == getattr(native, field), field


def test_foreign_keys_of_a_file_are_named_once_and_dropped(tmp_path, caplog):
    (tmp_path / "config.json").write_text(json.dumps({**PUBLISHED["kimi-k2"], "num_expert_per_tok": 8}))
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    try:
        config = LamoeConfig.from_pretrained(tmp_path)
    finally:
        logger.removeHandler(caplog.handler)
    assert "num_expert_per_tok=8 is not a field of LamoeConfig; did you mean 'num_experts_per_tok'?" in caplog.text
    assert "unsloth_fixed=True is not a field" in caplog.text
    assert not hasattr(config, "unsloth_fixed")


def test_other_architectures_are_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "hidden_size": 64}))
    with pytest.raises(
        ValueError, match=r"model_type=.llama. is not a DeepSeek-shaped checkpoint; Lamoe reads lamoe, deepseek_v2"
    ):
        LamoeConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize("preset", LamoeConfig.presets())
def test_written_files_are_natively_readable_and_come_back(preset, tmp_path):
    config = LamoeConfig.from_preset(preset, architectures=["LamoeForCausalLM"])
    config.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    native_type = "deepseek_v2" if config.scoring_func == "softmax" else "deepseek_v3"
    assert written["model_type"] == native_type
    assert written["architectures"] == [f"Deepseek{native_type[-2:].upper()}ForCausalLM"]
    for key in ("topk_method", "scoring_func", "rope_theta", "rope_scaling", "rope_parameters", "norm_topk_prob"):
        assert key in written, key  # servers read these, and native saving leaves some out
    native = AutoConfig.from_pretrained(tmp_path)
    assert type(native) is (DeepseekV2Config if native_type == "deepseek_v2" else DeepseekV3Config)
    assert {k: v for k, v in native.rope_parameters.items() if k != "type"} == config.rope_parameters
    assert native.num_nextn_predict_layers == config.num_nextn_predict_layers
    again = LamoeConfig.from_pretrained(tmp_path).to_dict()
    assert {k: v for k, v in again.items() if k != "auto_map"} == {
        k: v for k, v in config.to_dict().items() if k not in ("auto_map", "architectures")
    } | {"architectures": written["architectures"]}


def test_the_dtype_of_cached_latents_is_written_if_it_is_chosen(tmp_path):
    config = LamoeConfig.from_preset("tiny", latent_cache_dtype="float8_e4m3fn")
    config.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["latent_cache_dtype"] == "float8_e4m3fn"
    assert LamoeConfig.from_pretrained(tmp_path).latent_cache_dtype == "float8_e4m3fn"
    assert type(AutoConfig.from_pretrained(tmp_path)) in (DeepseekV2Config, DeepseekV3Config)
    assert "latent_cache_dtype" not in LamoeConfig.from_preset("tiny").serving_dict(use_diff=False)


def test_a_configuration_saved_without_its_model_leads_to_no_model_code(tmp_path):
    config = LamoeConfig.from_preset("tiny", auto_map={"AutoModel": "modeling_lamoe.LamoeModel"})
    config.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["auto_map"] == {
        "AutoConfig": "configuration_lamoe.LamoeConfig"
    }
    assert AutoConfig.from_pretrained(tmp_path, trust_remote_code=True).kv_lora_rank == config.kv_lora_rank


NOT_NATIVE = {
    "n_shared_experts=0: the native classes always have one": {"n_shared_experts": 0},
    "moe_layer_freq=2: the native classes know only 1": {"moe_layer_freq": 2},
    "qk_rope_head_dim=0: the native classes always rotate": {"qk_rope_head_dim": 0},
    "topk_method='greedy' with sigmoid scores": {"topk_method": "greedy"},
    "topk_method='noaux_tc' with softmax scores": {"scoring_func": "softmax"},
    "norm_topk_prob=True: deepseek_v2 never normalises": {"scoring_func": "softmax", "topk_method": "greedy"},
}


@pytest.mark.parametrize("reason", NOT_NATIVE)
def test_what_is_not_natively_expressible_says_why(reason, tmp_path):
    config = LamoeConfig(**{**SMALL, **NOT_NATIVE[reason]})
    assert config.native_form() == (None, reason)
    config.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "lamoe"
    assert LamoeConfig.from_pretrained(tmp_path).native_form() == (None, reason)


def test_the_table_of_published_shapes():
    rows = {
        "v2-lite": (2048, 27, 16, None, 64, 2, 6, 1, 1),
        "v2": (5120, 60, 128, 1536, 160, 2, 6, 8, 3),
        "moonlight": (2048, 27, 16, None, 64, 2, 6, 1, 1),
        "v3": (7168, 61, 128, 1536, 256, 1, 8, 8, 4),
        "kimi-k2": (7168, 61, 64, 1536, 384, 1, 8, 1, 1),
        "glm-4.7-flash": (2048, 47, 20, 768, 64, 1, 4, 1, 1),
    }
    for preset, row in rows.items():
        c = LamoeConfig.from_preset(preset)
        assert row == (
            c.hidden_size, c.num_hidden_layers, c.num_attention_heads, c.q_lora_rank, c.n_routed_experts,
            c.n_shared_experts, c.num_experts_per_tok, c.n_group, c.topk_group,
        )  # fmt: skip
        assert Glm4MoeLiteConfig().v_head_dim == 256 if preset.startswith("glm") else c.v_head_dim == 128
