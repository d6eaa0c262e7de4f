"""Transformers' own tests of a model, of exactly the installed version, on ours; see transformers_suite/."""

import unittest

import torch

from lamoe import LamoeConfig

from .transformers_suite.mixins import (
    ConfigTester,
    ExpertParallelTesterMixin,
    FSDPTesterMixin,
    GenerationTesterMixin,
    ModelTesterMixin,
    TensorParallelTesterMixin,
    TrainingTesterMixin,
)
from .transformers_suite.model_tester import LamoeModelTester

V3_SHAPE = {
    "q_lora_rank": 20,
    "n_group": 2,
    "topk_group": 1,
}
V2_SHAPE = {
    "q_lora_rank": None,
    "topk_method": "greedy",
    "scoring_func": "softmax",
    "norm_topk_prob": False,
    "routed_scaling_factor": 1.0,
    "n_group": 1,
    "topk_group": 1,
    "n_shared_experts": 2,
}

# Why a test may skip itself, by a part of its reason. Any other skip fails: it would be a test that stopped testing.
# (What needs an accelerator, flash-attention, kernels or deepspeed is marked by its decorator, and not counted here.)
ACCOUNTED_SKIPS = (
    "composite",  # models of several models
    "No subconfigs",
    "LamoeModel does not support SDPA",  # so says the composite models' test of every other
    "No sequence-to-sequence",
    "does not have position embeddings",  # learnt ones
    "sliding window",
    "partial rope",  # a latent-attention key is rotary as a whole
    "axial RoPE",
    "requires torchao",
    "CPU-only",  # tensor and expert parallelism, on a machine with a GPU
)


class Shape:
    """What every class below shares; a subclass names its `shape`, fields of the configuration."""

    shape: dict

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        # The test processes fill the cores; and the tests print each tensor that they compare, needed or not.
        cls.addClassCleanup(torch.set_num_threads, torch.get_num_threads())
        cls.addClassCleanup(torch.set_printoptions, profile="default")
        torch.set_num_threads(1)
        torch.set_printoptions(threshold=2, edgeitems=1)

    def setUp(self):
        self.model_tester = LamoeModelTester(**self.shape)

    def skipTest(self, reason):
        if not any(part in reason for part in ACCOUNTED_SKIPS):
            self.fail(f"unaccounted skip: {reason}")
        super().skipTest(reason)


class Suite(
    Shape,
    ModelTesterMixin,
    GenerationTesterMixin,
    TrainingTesterMixin,
    TensorParallelTesterMixin,
    ExpertParallelTesterMixin,
):
    """All classes under all mixins of one process, and under tensor and expert parallelism of two."""

    all_model_classes = (
        LamoeModelTester.base_model_class,
        LamoeModelTester.causal_lm_class,
        LamoeModelTester.sequence_classification_class,
        LamoeModelTester.token_classification_class,
    )
    _torch_compile_train_cls = LamoeModelTester.causal_lm_class
    # else skipped, for want of a copyright line with a year in the configuration's file
    test_can_init_all_missing_weights_before_2023 = True

    def test_config(self):
        ConfigTester(self, config_class=LamoeConfig, **self.shape).run_common_tests()


class DeepseekV3Shape(Suite, FSDPTesterMixin, unittest.TestCase):
    """Sigmoid scores, group-limited choice with a correction bias, low-rank queries; also sharded, to 8 ranks."""

    shape = V3_SHAPE


class DeepseekV2Shape(Suite, unittest.TestCase):
    """Softmax scores, the best K of all experts, full-rank queries."""

    shape = V2_SHAPE
    # a hundred tests of what both shapes share
    vars().update(dict.fromkeys(name for name in dir(Suite) if name.startswith("test_eager_matches_sdpa_inference")))
