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


class LamoeSuite(
    ModelTesterMixin,
    GenerationTesterMixin,
    TrainingTesterMixin,
    TensorParallelTesterMixin,
    ExpertParallelTesterMixin,
    FSDPTesterMixin,
):
    """All mixins on all our classes; a subclass names the shape."""

    shape: dict
    model_tester = None
    # else skipped, for want of a copyright line with a year in the configuration's file
    test_can_init_all_missing_weights_before_2023 = True

    all_model_classes = (
        LamoeModelTester.base_model_class,
        LamoeModelTester.causal_lm_class,
        LamoeModelTester.sequence_classification_class,
        LamoeModelTester.token_classification_class,
    )

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        # The tests fill every core by themselves, and print each tensor that they compare, needed or not.
        cls.addClassCleanup(torch.set_num_threads, torch.get_num_threads())
        cls.addClassCleanup(torch.set_printoptions, profile="default")
        torch.set_num_threads(1)
        torch.set_printoptions(threshold=2, edgeitems=1)

    def setUp(self):
        self.model_tester = LamoeModelTester(**self.shape)

    def test_config(self):
        ConfigTester(self, config_class=LamoeConfig, **self.model_tester.shape).run_common_tests()


class DeepseekV3Shape(LamoeSuite, unittest.TestCase):
    """Sigmoid scores, group-limited choice with a correction bias, low-rank queries."""

    shape = {
        "q_lora_rank": 20,
        "n_group": 2,
        "topk_group": 1,
    }


class DeepseekV2Shape(LamoeSuite, unittest.TestCase):
    """Softmax scores, the best K of all experts, full-rank queries."""

    shape = {
        "q_lora_rank": None,
        "topk_method": "greedy",
        "scoring_func": "softmax",
        "norm_topk_prob": False,
        "routed_scaling_factor": 1.0,
        "n_group": 1,
        "topk_group": 1,
        "n_shared_experts": 2,
    }
