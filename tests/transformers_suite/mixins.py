"""Transformers' mixins, opened for a model that is not one of theirs: import them from here."""

from lamoe import LamoeForCausalLM

from . import test_expert_parallel_mixin, test_fsdp_mixin, test_tensor_parallel_mixin
from .test_configuration_common import ConfigTester
from .test_expert_parallel_mixin import ExpertParallelTesterMixin
from .test_fsdp_mixin import FSDPTesterMixin
from .test_modeling_common import GenerationTesterMixin, ModelTesterMixin
from .test_tensor_parallel_mixin import TensorParallelTesterMixin
from .test_training_mixin import TrainingTesterMixin

__all__ = [
    "ConfigTester",
    "ExpertParallelTesterMixin",
    "FSDPTesterMixin",
    "GenerationTesterMixin",
    "ModelTesterMixin",
    "TensorParallelTesterMixin",
    "TrainingTesterMixin",
]

# By default a short list of model types is tested; None is their documented word for "all".
test_expert_parallel_mixin.EP_DISTRIBUTED_TEST_MODEL_TYPES = None
test_fsdp_mixin.FSDP_DISTRIBUTED_TEST_MODEL_TYPES = None
test_tensor_parallel_mixin.TP_DISTRIBUTED_TEST_MODEL_TYPES = None
# They want a core for every rank; gloo ranks of a tiny model share one without harm.
test_fsdp_mixin._get_available_fsdp_workers = lambda: 8


class _AutoModelForCausalLM:
    """The FSDP tests load what they saved through AutoModelForCausalLM: for a dual-mode file, the native class."""

    from_config = LamoeForCausalLM._from_config
    from_pretrained = LamoeForCausalLM.from_pretrained


test_fsdp_mixin.AutoModelForCausalLM = _AutoModelForCausalLM
