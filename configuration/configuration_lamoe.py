"""LamoeConfig: DeepSeek-V3's field names for every DeepSeek-shaped model (mixture of experts + latent attention).

Reads the config.json of deepseek_v2, deepseek_v3, kimi_k2 and glm4_moe_lite checkpoints; writes one that the native
classes, vLLM, SGLang and llama.cpp understand wherever the model can be expressed in their terms. This file is also
part of the code bundle of every saved checkpoint, so it imports nothing of Lamoe, and no torch.
"""

import difflib
import json
from pathlib import Path
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import GenerationConfig, PreTrainedConfig
from transformers.utils import logging

logger = logging.get_logger(__name__)

TOPK_METHODS = ("greedy", "group_limited_greedy", "noaux_tc")
SCORING_FUNCS = ("softmax", "sigmoid")
HIDDEN_ACTS = ("silu", "gelu", "gelu_pytorch_tanh", "relu")

_V2 = {
    "topk_method": "greedy",
    "scoring_func": "softmax",
    "norm_topk_prob": False,
    "routed_scaling_factor": 1.0,
    "n_group": 1,
    "topk_group": 1,
    "n_shared_experts": 2,
    "first_k_dense_replace": 0,
    "num_nextn_predict_layers": 0,
    "max_position_embeddings": 2048,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_V3 = {
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "n_group": 8,
    "topk_group": 4,
    "n_shared_experts": 1,
    "first_k_dense_replace": 3,
    "num_nextn_predict_layers": 0,
    "max_position_embeddings": 4096,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
# What a config.json means by leaving an optional key out, by its model_type (the native classes' defaults).
FAMILY_DEFAULTS: dict[str, dict[str, Any]] = {
    "deepseek_v2": _V2,
    "deepseek_v3": _V3,
    "kimi_k2": {**_V3, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "routed_scaling_factor": 2.827},
    "glm4_moe_lite": {
        **_V3,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "routed_scaling_factor": 1.8,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 202752,
    },
}

# The configuration is found by way of the model's file: Transformers files local code by a hash of a file and what it
# imports, and keeps the first model class that it met for a configuration class. By its own file, two revisions with
# the same configuration would share that class, and the second would run the code of the first.
_AUTO_MAP = {
    "AutoConfig": "modeling_lamoe.LamoeConfig",
    "AutoModel": "modeling_lamoe.LamoeModel",
    "AutoModelForCausalLM": "modeling_lamoe.LamoeForCausalLM",
    "AutoModelForSequenceClassification": "modeling_lamoe.LamoeForSequenceClassification",
    "AutoModelForTokenClassification": "modeling_lamoe.LamoeForTokenClassification",
}
_NATIVE_PREFIX = {"deepseek_v2": "DeepseekV2", "deepseek_v3": "DeepseekV3"}

# Keywords that Transformers itself takes out of a configuration, or keeps on it, beside its dataclass fields.
_TRANSFORMERS_KEYS = {
    "_attn_implementation", "_commit_hash", "_experts_implementation", "_name_or_path", "_output_attentions",
    "attn_implementation", "auto_map", "base_model_tp_plan", "classifier_dropout", "compile_config",
    "distributed_config", "experts_implementation", "finetuning_task", "hidden_dropout", "is_causal", "is_decoder",
    "name_or_path", "num_labels", "output_attentions", "per_layer_config", "prefix", "pruned_heads",
    "quantization_config", "rope_scaling", "rope_theta", "task_specific_params", "tie_encoder_decoder",
    "tie_last_hidden_states", "token_classification_bias", "tokenizer_class", "torch_dtype", "torchscript",
    "transformers_weights", "use_bfloat16", "add_cross_attention", "cross_attention_hidden_size",
    "decoder_start_token_id", "sep_token_id", "tf_legacy_loss",
}  # fmt: skip
# Fields of ours alone that no other program needs to know.
_OWN_CHOICES = (
    "router_nonfinite", "router_implementation", "mla_form", "mla_absorb_max_tokens", "mla_implementation",
    "latent_cache_dtype", "skip_logits", "expert_recompute", "aux_loss_scope", "device_loss_alpha",
    "communication_loss_alpha", "expert_devices", "mtp_loss_coef",
)  # fmt: skip
# Keys of published config.json files that say nothing this model needs: read, and not kept.
_SUPERSEDED_KEYS = ("head_dim", "qk_head_dim", "mlp_bias", "_post_init_done")


@strict
class LamoeConfig(PreTrainedConfig):
    """Configuration of a Lamoe model. Fields that DeepSeek-V3's config.json has keep its names and meaning.

    Args:
        topk_method: how experts are chosen: "greedy" (the best K), "group_limited_greedy" (DeepSeek-V2: the best
            `topk_group` of `n_group` groups by their best expert, then the best K in them) or "noaux_tc"
            (DeepSeek-V3: groups by the sum of their two best experts, choice by score + correction bias).
        scoring_func: "sigmoid" or "softmax" over the router's float32 logits.
        aux_loss_alpha: weight of the balancing loss that training adds (`router_aux_loss_coef` is the same field);
            0 adds none. `seq_aux` chooses the loss per sequence (DeepSeek-V3 eq. 17-20) or over the whole batch.
        aux_loss_scope: finer than `seq_aux`, and wins over it: over which tokens an expert's load is taken, "sequence"
            (the sequence, or packed document), "batch" (the micro-batch of one rank) or "global" (all ranks, and the
            optimizer step so far). None takes the first or second by `seq_aux`.
        device_loss_alpha: weight of DeepSeek-V2's loss over devices (eq. 26-28); 0 adds none.
        communication_loss_alpha: weight of its loss over what devices receive (eq. 29-31); 0 adds none.
        expert_devices: devices over which these two take the experts to be spread, in order; None is `n_group`.
        router_z_loss_coef: weight of the router z-loss (ST-MoE eq. 5).
        router_nonfinite: what becomes of NaN or infinite values before a router: "raise" (names the layer and the
            step; not in layers that are compiled), "zero" (such a token enters the experts as zeros) or "ignore".
        router_implementation: who routes: "auto" (the Triton kernel on a GPU, PyTorch elsewhere), "eager" (PyTorch) or
            "triton" (an error where the kernel does not run). The chosen experts are the same.
        num_nextn_predict_layers: multi-token-prediction layers (DeepSeek-V3, section 2.2), each one depth.
        mtp_loss_coef: weight of their loss, that training adds: by default DeepSeek-V3's 0.3 of its first 10 of 14.8T
            tokens (0.1 afterwards). Layers that the model does not train along with itself draft ever worse; with 0
            they do not run in training.
        mla_form: "auto" expands keys and values for many new tokens and absorbs the up-projections into query and
            output for few; "expanded" and "absorbed" force one form. The results are equal to float rounding.
        mla_absorb_max_tokens: the most new tokens that "auto" absorbs; None takes C(P+V)/(2C-P-V), the number of
            tokens below which the absorbed form costs less.
        mla_implementation: who computes the absorbed form: "auto" (the best there is here), "triton" (the kernel, or
            an error that says why not) or "eager" (PyTorch).
        latent_cache_dtype: of the latents in `generate`'s default cache: None is the model's dtype, "float8_e4m3fn"
            takes half the bytes of bfloat16, with a scale a token; rotated keys stay in the model's dtype.
        skip_logits: in training with labels, compute the loss without holding [tokens, vocabulary] logits; the
            output's `logits` are then None. `forward(skip_logits=...)` overrides it.
        expert_recompute: the fused experts keep no pre-activation for the backward and compute it again: 4·K·F bytes a
            token and layer less in bfloat16 (K experts of width F), a quarter more arithmetic in them. `lamoe.boost`
            overrides it.

    Raises:
        ValueError: a field is unknown, or fields contradict each other; the message names field, value and way out.
    """

    model_type = "lamoe"
    keys_to_ignore_at_inference = ["past_key_values"]
    attribute_map = {
        "num_local_experts": "n_routed_experts",
        "num_experts": "n_routed_experts",
        "num_mtp_layers": "num_nextn_predict_layers",
        "router_aux_loss_coef": "aux_loss_alpha",
    }
    base_model_tp_plan = {
        "layers.*.self_attn.q_proj": "colwise",
        "layers.*.self_attn.q_b_proj": "colwise",
        "layers.*.self_attn.kv_a_proj_with_mqa": "mla_kv_a_proj",
        "layers.*.self_attn.kv_b_proj": "colwise",
        "layers.*.self_attn.o_proj": "rowwise",
        "layers.*.mlp.experts.gate_up_proj": "packed_colwise",
        "layers.*.mlp.experts.down_proj": "rowwise",
        "layers.*.mlp.experts": "moe_tp_experts",
        "layers.*.mlp.shared_experts.gate_proj": "colwise",
        "layers.*.mlp.shared_experts.up_proj": "colwise",
        "layers.*.mlp.shared_experts.down_proj": "rowwise",
        "layers.*.mlp.gate_proj": "colwise",
        "layers.*.mlp.up_proj": "colwise",
        "layers.*.mlp.down_proj": "rowwise",
    }
    base_model_ep_plan = {
        "layers.*.mlp.experts.gate_up_proj": "grouped_gemm",
        "layers.*.mlp.experts.down_proj": "grouped_gemm",
        "layers.*.mlp.experts": "ep_dispatch_experts",
    }
    base_model_pp_plan = {
        "embed_tokens": (["input_ids"], ["inputs_embeds"]),
        "layers": (["hidden_states", "attention_mask"], ["hidden_states"]),
        "norm": (["hidden_states"], ["hidden_states"]),
    }

    vocab_size: int = 129280
    hidden_size: int = 7168
    intermediate_size: int = 18432
    moe_intermediate_size: int = 2048
    num_hidden_layers: int = 61
    num_attention_heads: int = 128
    num_key_value_heads: int | None = None
    q_lora_rank: int | None = 1536
    kv_lora_rank: int = 512
    qk_nope_head_dim: int = 128
    qk_rope_head_dim: int = 64
    v_head_dim: int = 128
    n_routed_experts: int = 256
    n_shared_experts: int | None = 1
    num_experts_per_tok: int = 8
    n_group: int | None = 8
    topk_group: int | None = 4
    topk_method: str = "noaux_tc"
    scoring_func: str = "sigmoid"
    norm_topk_prob: bool | None = True
    routed_scaling_factor: float | int = 2.5
    first_k_dense_replace: int | None = 3
    moe_layer_freq: int | None = 1
    num_nextn_predict_layers: int | None = 0
    mtp_loss_coef: float | int = 0.3
    hidden_act: str = "silu"
    max_position_embeddings: int = 163840
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    attention_bias: bool | None = False
    attention_dropout: float | int | None = 0.0
    rope_parameters: dict | None = None
    rope_interleave: bool | None = True
    tie_word_embeddings: bool = False
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    output_router_logits: bool = False
    aux_loss_alpha: float | int = 0.0
    seq_aux: bool = True
    aux_loss_scope: str | None = None
    device_loss_alpha: float | int = 0.0
    communication_loss_alpha: float | int = 0.0
    expert_devices: int | None = None
    router_z_loss_coef: float | int = 0.0
    router_nonfinite: str = "raise"
    router_implementation: str = "auto"
    mla_form: str = "auto"
    mla_absorb_max_tokens: int | None = None
    mla_implementation: str = "auto"
    latent_cache_dtype: str | None = None
    skip_logits: bool = False
    expert_recompute: bool = False
    ep_size: int = 1
    pretraining_tp: int = 1

    def __post_init__(self, **kwargs):
        kwargs.pop("model_type", None)  # a dual-mode file says deepseek_v3; in memory the class attribute holds
        for name in _SUPERSEDED_KEYS:
            kwargs.pop(name, None)
        for alias, name in self.attribute_map.items():
            if alias in kwargs:
                setattr(self, name, kwargs.pop(alias))
        mlp_layer_types = kwargs.pop("mlp_layer_types", None)
        if mlp_layer_types is not None:
            self.first_k_dense_replace, self.moe_layer_freq = _dense_prefix(mlp_layer_types), 1
        if kwargs.pop("partial_rotary_factor", None) not in (None, 1, 1.0):
            raise ValueError("partial_rotary_factor is not 1; a latent-attention key is rotary or plain as a whole.")

        for name, value in self._absent().items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        self._refuse_unknown(kwargs)
        super().__post_init__(**kwargs)
        self.rope_parameters = _clean_rope(self.rope_parameters)
        absent = "q_b_proj" if self.q_lora_rank is None else "q_proj"
        plan = type(self).base_model_tp_plan.items()
        self.base_model_tp_plan = {name: style for name, style in plan if not name.endswith(f".{absent}")}
        self.validate_experts()
        self.validate_choices()
        self.validate_losses()
        self.validate_attention()
        if self.aux_loss_scope is not None:
            self.seq_aux = self.aux_loss_scope == "sequence"

    def _absent(self) -> dict[str, Any]:
        """What null means in a published config.json, by field."""
        return {
            "num_key_value_heads": self.num_attention_heads,
            "n_group": 1,
            "topk_group": 1,
            "n_shared_experts": 0,
            "first_k_dense_replace": 0,
            "moe_layer_freq": 1,
            "num_nextn_predict_layers": 0,
            "norm_topk_prob": False,
            "attention_bias": False,
            "attention_dropout": 0.0,
            "rope_interleave": True,
        }

    @property
    def head_dim(self) -> int:
        """The rotary width R; the name under which Transformers' rotary functions look for it."""
        return self.qk_rope_head_dim

    @property
    def qk_head_dim(self) -> int:
        """Width of a query-key head, P + R."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def absorb_limit(self) -> int:
        """The most new tokens for which "auto" takes the absorbed form, C(P+V)/(2C-P-V); always if C is small."""
        if self.mla_absorb_max_tokens is not None:
            return self.mla_absorb_max_tokens
        extra = 2 * self.kv_lora_rank - self.qk_nope_head_dim - self.v_head_dim
        if extra <= 0:
            return self.max_position_embeddings
        return self.kv_lora_rank * (self.qk_nope_head_dim + self.v_head_dim) // extra

    @property
    def balance_scope(self) -> str:
        """Over which tokens the balancing losses take the load: "sequence", "batch" or "global"."""
        return self.aux_loss_scope or ("sequence" if self.seq_aux else "batch")

    @property
    def loss_devices(self) -> int:
        """Devices over which the balancing losses take the experts to be spread."""
        return self.n_group if self.expert_devices is None else self.expert_devices

    @property
    def moe_layers(self) -> list[int]:
        """Indices of the decoder layers that have experts."""
        first = self.first_k_dense_replace
        return [i for i in range(first, self.num_hidden_layers) if i % self.moe_layer_freq == 0]

    def kv_bytes_per_token(self, bytes_per_element: int = 2, expanded: bool = False) -> int:
        """Bytes that a token holds in the caches of all layers, as latents or as the keys and values behind them.

        Latents are counted in `latent_cache_dtype`: in float8 with eight more columns beside the key, for the scale.
        """
        latent = (self.kv_lora_rank + self.qk_rope_head_dim) * bytes_per_element
        if self.latent_cache_dtype is not None:
            latent = self.kv_lora_rank + (self.qk_rope_head_dim + 8) * bytes_per_element
        heads = self.num_attention_heads * (self.qk_head_dim + self.v_head_dim) * bytes_per_element
        return self.num_hidden_layers * (heads if expanded else latent)

    def validate_experts(self):
        """Refuse expert counts that cannot be routed."""
        experts, groups, chosen = self.n_routed_experts, self.n_group, self.num_experts_per_tok
        if experts < 1 or chosen < 1:
            raise ValueError(
                f"n_routed_experts={experts} and num_experts_per_tok={chosen} must be at least 1; for a dense model "
                f"set first_k_dense_replace=num_hidden_layers ({self.num_hidden_layers})."
            )
        if chosen > experts:
            raise ValueError(
                f"num_experts_per_tok={chosen} is more than n_routed_experts={experts}; choose at most {experts}."
            )
        if groups < 1 or experts % groups:
            legal = ", ".join(str(n) for n in range(1, experts + 1) if experts % n == 0)
            raise ValueError(f"n_routed_experts={experts} is not divisible by n_group={groups}; use one of {legal}.")
        if not 1 <= self.topk_group <= groups:
            raise ValueError(
                f"topk_group={self.topk_group} does not lie between 1 and n_group={groups}; use at most {groups}."
            )
        if self.topk_method == "greedy":
            return
        a_group = experts // groups
        if self.topk_method == "noaux_tc" and a_group < 2 and groups > 1:
            raise ValueError(
                f"n_group={groups} leaves one expert a group (n_routed_experts={experts}); noaux_tc scores a group by "
                f"its two best experts: use n_group of at most {experts // 2}, or topk_method='greedy'."
            )
        if chosen > self.topk_group * a_group:
            raise ValueError(
                f"num_experts_per_tok={chosen} is more than the {self.topk_group * a_group} experts that "
                f"topk_group={self.topk_group} of n_group={groups} groups hold; raise topk_group to >= "
                f"{-(-chosen // a_group)}."
            )

    def validate_choices(self):
        """Refuse values outside a field's legal set."""
        _one_of("topk_method", self.topk_method, TOPK_METHODS)
        _one_of("scoring_func", self.scoring_func, SCORING_FUNCS)
        _one_of("hidden_act", self.hidden_act, HIDDEN_ACTS, "; only silu is served by vLLM, SGLang and llama.cpp")
        _one_of("router_nonfinite", self.router_nonfinite, ("raise", "zero", "ignore"))
        _one_of("router_implementation", self.router_implementation, ("auto", "eager", "triton"))
        _one_of("mla_form", self.mla_form, ("auto", "expanded", "absorbed"))
        _one_of("mla_implementation", self.mla_implementation, ("auto", "eager", "triton"))
        if self.latent_cache_dtype is not None:
            _one_of("latent_cache_dtype", self.latent_cache_dtype, ("float8_e4m3fn",), "; None is the model's dtype")

    def validate_losses(self):
        """Refuse balancing losses that are undefined or reward imbalance."""
        if self.aux_loss_scope is not None:
            _one_of("aux_loss_scope", self.aux_loss_scope, ("sequence", "batch", "global"))
        for name in ("aux_loss_alpha", "device_loss_alpha", "communication_loss_alpha", "router_z_loss_coef"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} is negative, which rewards imbalance; use 0 or more.")
        experts, devices = self.n_routed_experts, self.loss_devices
        if devices < 1 or experts % devices:
            legal = ", ".join(str(n) for n in range(1, experts + 1) if experts % n == 0)
            raise ValueError(
                f"n_routed_experts={experts} is not divisible by expert_devices={devices}; use one of {legal}."
            )
        for name in ("device_loss_alpha", "communication_loss_alpha"):
            if getattr(self, name) and devices == 1:
                raise ValueError(
                    f"{name}={getattr(self, name)} balances devices, but the experts are on one "
                    f"(expert_devices={self.expert_devices}, n_group={self.n_group}); set expert_devices, or 0 here."
                )

    def validate_attention(self):
        """Refuse widths that no latent attention can have."""
        for name in ("kv_lora_rank", "v_head_dim", "num_attention_heads", "moe_layer_freq"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1.")
        if self.qk_rope_head_dim % 2 or self.qk_rope_head_dim < 0:
            raise ValueError(
                f"qk_rope_head_dim={self.qk_rope_head_dim} must be even and not negative: positions turn pairs; "
                "use 64 as the published models do, or 0 for attention without positions."
            )
        if self.num_key_value_heads != self.num_attention_heads:
            raise ValueError(
                f"num_key_value_heads={self.num_key_value_heads} is not num_attention_heads={self.num_attention_heads}"
                "; all heads share one latent, so there is nothing to group: leave num_key_value_heads out."
            )
        for name in ("num_nextn_predict_layers", "mtp_loss_coef"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative; 0 is without.")
        if self.qk_head_dim < 1:
            raise ValueError("qk_nope_head_dim and qk_rope_head_dim are both 0; a query needs some width.")

    @classmethod
    def field_names(cls) -> set[str]:
        """Every keyword that a Lamoe configuration takes."""
        generation = set(GenerationConfig._get_default_generation_params())
        return set(cls.__dataclass_fields__) | set(cls.attribute_map) | _TRANSFORMERS_KEYS | generation

    def _refuse_unknown(self, given: dict[str, Any]):
        unknown = {name: value for name, value in given.items() if name not in self.field_names()}
        if unknown:
            raise ValueError("\n".join(self._unknown(name, value) for name, value in unknown.items()))

    @classmethod
    def _unknown(cls, name: str, value: Any) -> str:
        near = difflib.get_close_matches(name, [*cls.__dataclass_fields__, *cls.attribute_map], 1, cutoff=0.7)
        hint = f"; did you mean {near[0]!r}?" if near else "; its docstring lists the legal ones."
        shown = repr(value)
        return f"{name}={shown if len(shown) < 60 else '...'} is not a field of LamoeConfig{hint}"

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path, **kwargs):
        """Transformers' reader; its config.json may be of any family in `FAMILY_DEFAULTS`.

        The translation happens here already, or Transformers would warn of every foreign `model_type`.
        """
        found, unused = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        return cls.from_family(found), unused

    @classmethod
    def from_family(cls, found: dict[str, Any]) -> dict[str, Any]:
        """Translate the content of a config.json into keywords of this class, without its `model_type`.

        The family's defaults fill the keys that the file leaves out, and keys that mean nothing here are named once
        and dropped: a published file may carry what it likes, a keyword written by hand may not.
        """
        known = cls.field_names() | {*_SUPERSEDED_KEYS, "mlp_layer_types", "partial_rotary_factor", "model_type"}
        ignored = {name: value for name, value in found.items() if name not in known}
        if ignored:
            named = " ".join(cls._unknown(name, value) for name, value in sorted(ignored.items()))
            logger.warning_once(f"Not used: {named}")
        family = found.get("model_type")
        if family not in (None, cls.model_type, *FAMILY_DEFAULTS):
            raise ValueError(
                f"model_type={family!r} is not a DeepSeek-shaped checkpoint; Lamoe reads "
                f"{', '.join([cls.model_type, *FAMILY_DEFAULTS])}."
            )
        kept = {name: value for name, value in found.items() if name in known and name != "model_type"}
        defaults = FAMILY_DEFAULTS.get(family, {})
        aliased = {cls.attribute_map[name] for name in kept if name in cls.attribute_map}
        return {**{name: value for name, value in defaults.items() if name not in aliased}, **kept}

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        """Transformers' constructor from the content of a config.json, through the same translation."""
        return super().from_dict(cls.from_family(config_dict), **kwargs)

    @classmethod
    def from_json_file(cls, json_file):
        """Transformers' reader of one file, through the same translation."""
        return cls(**cls.from_family(cls._dict_from_json_file(json_file)))

    @classmethod
    def presets(cls) -> list[str]:
        """Names that `from_preset` knows."""
        return sorted(file.stem for file in (Path(__file__).parent / "presets").glob("*.json"))

    @classmethod
    def from_preset(cls, name: str, **overrides) -> "LamoeConfig":
        """A published shape (see `presets()`), with any field overridden.

        Raises:
            ValueError: there is no such preset; the message names the nearest and lists all.
        """
        if name not in cls.presets():
            near = difflib.get_close_matches(name, cls.presets(), 1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"There is no preset {name!r}.{hint} Presets: {', '.join(cls.presets()) or 'none here'}.")
        text = (Path(__file__).parent / "presets" / f"{name}.json").read_text(encoding="utf-8")
        return cls(**{**cls.from_family(json.loads(text)), **overrides})

    def native_form(self) -> tuple[str | None, str | None]:
        """The native `model_type` that expresses this model and None, or None and the field that is in the way."""
        common = [
            (self.n_shared_experts < 1, "n_shared_experts=0: the native classes always have one"),
            (self.moe_layer_freq != 1, f"moe_layer_freq={self.moe_layer_freq}: the native classes know only 1"),
            (self.qk_rope_head_dim == 0, "qk_rope_head_dim=0: the native classes always rotate"),
            (self.num_key_value_heads != self.num_attention_heads, "num_key_value_heads is not num_attention_heads"),
        ]
        if self.scoring_func == "sigmoid":
            native, own = "deepseek_v3", [
                (self.topk_method != "noaux_tc", f"topk_method={self.topk_method!r} with sigmoid scores"),
                (self.n_routed_experts // self.n_group < 2, "one expert a group: deepseek_v3 scores groups by two"),
            ]  # fmt: skip
        else:
            native, own = "deepseek_v2", [
                (self.topk_method == "noaux_tc", "topk_method='noaux_tc' with softmax scores"),
                (self.norm_topk_prob, "norm_topk_prob=True: deepseek_v2 never normalises"),
                (not self.rope_interleave, "rope_interleave=False: deepseek_v2 always interleaves"),
                (self.hidden_size % self.num_attention_heads > 0, "hidden_size is no multiple of the heads"),
            ]  # fmt: skip
        for blocked, reason in common + own:
            if blocked:
                return None, reason
        return native, None

    def to_json_file(self, json_file_path, use_diff: bool = True):
        """Write config.json as other programs need it (see `serving_dict`)."""
        written = self.serving_dict(use_diff)
        if "auto_map" in written and not (Path(json_file_path).parent / "modeling_lamoe.py").is_file():
            written["auto_map"] = {"AutoConfig": "configuration_lamoe.LamoeConfig"}  # saved without its model
        text = json.dumps(self._encode_special_floats(written), indent=2, sort_keys=True) + "\n"
        Path(json_file_path).write_text(text, encoding="utf-8")

    def serving_dict(self, use_diff: bool = True) -> dict[str, Any]:
        """The content of config.json: dual-mode where the model is natively expressible, else `model_type: lamoe`.

        Both spellings of rope are written, and the keys that servers read and native saving omits; `auto_map` names
        all our classes when model code lies beside it.
        """
        written = self.to_diff_dict() if use_diff else self.to_dict()
        defaults = {name: field.default for name, field in type(self).__dataclass_fields__.items()}
        for name in _OWN_CHOICES:
            if written.get(name) == defaults[name]:
                written.pop(name, None)  # ours alone, and as by default: nothing that a stranger's file need say
        rope = dict(self.rope_parameters)
        written["rope_theta"] = rope.pop("rope_theta")
        written["rope_scaling"] = None if rope["rope_type"] == "default" else {**rope, "type": rope["rope_type"]}
        written["rope_parameters"] = dict(self.rope_parameters)
        native, _ = self.native_form()
        if native:
            prefix = _NATIVE_PREFIX[native]
            written["model_type"] = native
            names = [_native_class(name, prefix) for name in self.architectures or []]
            if names:
                written["architectures"] = names
        if set(written.get("auto_map") or {}) - {"AutoConfig"}:
            written["auto_map"] = dict(_AUTO_MAP)
        return written


def _native_class(name: str, prefix: str) -> str:
    """The native class of ours: LamoeForCausalLM -> DeepseekV3ForCausalLM."""
    return name.replace("Lamoe", prefix, 1) if name.startswith("Lamoe") else name


def _dense_prefix(mlp_layer_types: list[str]) -> int:
    """`first_k_dense_replace` of glm4_moe_lite's list of layer kinds."""
    dense = next((i for i, kind in enumerate(mlp_layer_types) if kind != "dense"), len(mlp_layer_types))
    if any(kind != "sparse" for kind in mlp_layer_types[dense:]):
        raise ValueError(
            f"mlp_layer_types={mlp_layer_types} is not dense layers, then sparse ones; Lamoe has no mixture."
        )
    return dense


def _clean_rope(rope_parameters: dict[str, Any]) -> dict[str, Any]:
    """One spelling: `rope_type`, without the older `type` and without a factor for all of the width."""
    kept = {name: value for name, value in rope_parameters.items() if name != "type"}
    if kept.get("partial_rotary_factor") in (1, 1.0):
        del kept["partial_rotary_factor"]
    return kept


def _one_of(field: str, value: str, legal: tuple[str, ...], note: str = ""):
    if value not in legal:
        raise ValueError(f"{field}={value!r} is not one of {', '.join(map(repr, legal))}{note}.")
