"""Lamoe: mixture of experts + multi-head latent attention for plain Transformers.

Importing the package registers the model with Transformers' Auto classes and the fused experts with its experts
registries, both under the name `lamoe`.
"""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)
from transformers.models.auto import modeling_auto

from .balance import RouterBalance
from .balance_callback import BalanceCallback
from .configuration_lamoe import LamoeConfig
from .experts import register
from .modeling_lamoe import (
    LamoeForCausalLM,
    LamoeForSequenceClassification,
    LamoeForTokenClassification,
    LamoeModel,
    LamoePreTrainedModel,
)
from .mtp_callback import MTPCallback
from .native import BoostReport, boost, unboost
from .replay import record_routed_experts

register(overwrite=True)  # over what a checkpoint's copy of the code may have put there
AutoConfig.register(LamoeConfig.model_type, LamoeConfig, exist_ok=True)
for auto_class, model_class, names in (
    (AutoModel, LamoeModel, modeling_auto.MODEL_MAPPING_NAMES),
    (AutoModelForCausalLM, LamoeForCausalLM, modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
    (
        AutoModelForSequenceClassification,
        LamoeForSequenceClassification,
        modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    ),
    (
        AutoModelForTokenClassification,
        LamoeForTokenClassification,
        modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
    ),
):
    auto_class.register(LamoeConfig, model_class, exist_ok=True)
    names.setdefault(LamoeConfig.model_type, model_class.__name__)  # Trainer and pipelines look classes up by name


def __getattr__(name: str):
    if name == "fused_experts":  # only here, since it needs Triton; the ImportError says so
        from .kernels_moe import fused_experts

        return fused_experts
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "BalanceCallback",
    "BoostReport",
    "LamoeConfig",
    "LamoeForCausalLM",
    "LamoeForSequenceClassification",
    "LamoeForTokenClassification",
    "LamoeModel",
    "LamoePreTrainedModel",
    "MTPCallback",
    "RouterBalance",
    "boost",
    "record_routed_experts",
    "unboost",
]
