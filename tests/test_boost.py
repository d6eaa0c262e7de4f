"""`lamoe.boost` of native models: results equal to their eager path, true reports, and other tools beside it."""

import copy
import json

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

import lamoe
from lamoe import boost, experts, native, unboost
from lamoe.experts import describe
from tests.registry import (
    COMMON,
    FAMILIES,
    NATIVE,
    assert_same,
    close,
    experts_module,
    logits_and_gradients,
    native_tiny,
    on_the_cpu,
)
from tests.tiny import random_ids

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="in float32, by Triton's interpreter, on the CPU")


def of_experts(report) -> list[native.BoostRow]:
    return [row for row in report.rows if "self_attn" not in row.name]


@pytest.mark.parametrize("name", [*NATIVE, *FAMILIES])
def test_boosted_native_models_equal_their_eager_path(name, calls):
    model = native_tiny(name)
    ids = random_ids(1, 5)
    expected = logits_and_gradients(model, ids)
    keys = list(model.state_dict())
    report = boost(model)
    _, path, reason = NATIVE.get(name, (None, "fused", ""))
    assert [(row.path, row.reason) for row in of_experts(report)] == [(path, reason)]
    assert len(report.rows) == (3 if name in FAMILIES else 1)  # latent attention of two layers
    assert_same(logits_and_gradients(model, ids), expected)
    assert calls == {"fused": 0, "composite": 0} | {path: 1}
    assert list(model.state_dict()) == keys
    unboost(model)
    again = logits_and_gradients(model, ids)
    assert calls[path] == 1  # none since
    assert torch.equal(again[0], expected[0])


def test_report_names_layers_classes_and_reasons_and_folds_equal_ones():
    report = boost(native_tiny("mixtral", num_hidden_layers=2), recompute=True)
    assert report.rows[1] == native.BoostRow("model.layers.1.mlp.experts", "MixtralExperts", "fused", "")
    assert str(report) == "model.layers.0.mlp.experts to model.layers.1.mlp.experts (2 layers): MixtralExperts, fused"
    report = boost(native_tiny("nemotron_h"), recompute=True, batch_invariant=True)
    assert str(report) == (
        "model.layers.0.mixer.experts: NemotronHExperts, composite: it has no gate; recompute, batch_invariant: "
        "without effect here"
    )


OUTSIDE = {
    "doge": ({"is_moe": True, "num_experts": 4}, {"DogeCDMoE"}),
    "jetmoe": ({"kv_channels": 8, "num_key_value_heads": 1}, {"JetMoeMoA", "JetMoeMoE"}),
    "longcat_flash": (
        {"num_layers": 1, "num_hidden_layers": 2,
         "ffn_hidden_size": 12, "expert_ffn_hidden_size": 12, "q_lora_rank": 8, "kv_lora_rank": 8,
         "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8, "moe_topk": 2, "zero_expert_num": 1},
        {"LongcatFlashExperts"},
    ),
    "llama4_text": ({"intermediate_size_mlp": 12}, {"Llama4TextExperts"}),
}  # fmt: skip


@pytest.mark.parametrize("name", OUTSIDE)
def test_what_is_outside_the_registry_is_reported_as_not_reached(name):
    own, kind = OUTSIDE[name]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **{**COMMON, **own}))
    before = model.config._experts_implementation
    rows = of_experts(boost(model))
    assert {row.path for row in rows} == {"not reached"}
    assert {row.kind for row in rows} == kind
    assert rows[0].reason == "its class is not in Transformers' experts registry"
    assert model.config._experts_implementation == before


@pytest.mark.parametrize("name", ["nllb-moe", "switch_transformers"])
def test_one_module_an_expert_is_reported_as_not_reached(name):
    from transformers import AutoModel

    sizes = {"d_model": 8, "d_ff": 8, "d_kv": 4, "encoder_layers": 2, "decoder_layers": 2, "num_layers": 2}
    sizes |= {"encoder_ffn_dim": 8, "decoder_ffn_dim": 8, "num_decoder_layers": 2, "num_heads": 2, "vocab_size": 32}
    sizes |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "num_experts": 3}
    sizes |= {"encoder_sparse_step": 1, "decoder_sparse_step": 1, "num_sparse_encoder_layers": 2}
    with torch.device("meta"):
        report = boost(AutoModel.from_config(AutoConfig.for_model(name, **sizes)))
    assert report.rows and {row.path for row in report.rows} == {"not reached"}
    assert all(row.kind.endswith("Experts") for row in report.rows)


def test_a_model_without_experts_and_latent_attention_is_an_error_that_says_what_was_looked_for():
    with pytest.raises(ValueError) as caught:
        boost(nn.Linear(2, 2))
    assert str(caught.value) == (
        "Linear has neither experts nor latent attention: no module in it is of a class with Transformers' "
        "@use_experts_implementation, a DbrxExperts, or called Experts, and none has a kv_b_proj."
    )


def test_boosting_twice_is_boosting_once_and_unboost_restores_what_was_there():
    model = native_tiny("mixtral")
    model.set_experts_implementation("batched_mm")
    layer = model.model.layers[0].mlp.experts
    boost(layer)
    boost(model, recompute=True)
    boost(model, accumulate=True)
    assert model.config._experts_implementation == "lamoe"
    assert (layer._lamoe_options.recompute, layer._lamoe_options.accumulate) == (False, True)
    unboost(copy.deepcopy(model))
    assert model.config._experts_implementation == "lamoe"
    unboost(model)
    unboost(model)
    assert model.config._experts_implementation == "batched_mm"
    assert not [key for key in vars(layer) if "lamoe" in key]
    dbrx = native_tiny("dbrx")
    boost(dbrx)
    boost(dbrx)
    unboost(dbrx)
    assert "forward" not in vars(dbrx.transformer.blocks[0].ffn.experts)


def test_a_copy_of_a_boosted_dbrx_has_its_own_weights():
    model = native_tiny("dbrx")
    boost(model)
    copied = copy.deepcopy(model).transformer.blocks[0].ffn.experts
    assert copied.forward.args == (copied,)
    mlp = copied.mlp
    mlp.w2 = nn.Parameter(mlp.w2.detach().half())
    assert native._describe_dbrx(copied) == ("eager", "the weights differ in dtype")
    model.transformer.blocks[0].ffn.experts.forward = print
    assert boost(model).rows[0].reason == "something else has replaced its forward"


def test_the_report_judges_sharded_weights_by_what_a_call_gets(tmp_path):
    from torch import distributed
    from torch.distributed.tensor import Shard, distribute_tensor
    from transformers.distributed.parallel_utils import _use_local_dtensor_params

    module = experts_module()
    distributed.init_process_group("gloo", store=distributed.FileStore(str(tmp_path / "s"), 1), rank=0, world_size=1)
    try:
        mesh = distributed.device_mesh.init_device_mesh("cpu", (1,))
        for name, weight in list(module.named_parameters()):
            setattr(module, name, nn.Parameter(distribute_tensor(weight.detach(), mesh, [Shard(0)])))
        assert boost(module).rows[0].path == "fused"
        assert describe(module)[0] == "grouped_mm"
        with _use_local_dtensor_params(module):  # as expert and tensor parallelism call
            assert describe(module)[0] == "fused"
    finally:
        distributed.destroy_process_group()


def test_boost_sets_what_set_experts_implementation_does_not(monkeypatch):
    model = native_tiny("mixtral")
    monkeypatch.setattr(PreTrainedModel, "_can_set_experts_implementation", classmethod(lambda cls: False))
    model.set_experts_implementation("lamoe")
    assert model.config._experts_implementation == "eager"
    boost(model)
    assert model.model.layers[0].mlp.experts.config._experts_implementation == "lamoe"


@pytest.mark.parametrize("name", ["mixtral", "dbrx"])
def test_saving_a_boosted_model_writes_nothing_of_ours(name, tmp_path):
    model = native_tiny(name)
    ids = random_ids(1, 4)
    model.save_pretrained(tmp_path / "before")
    boost(model, recompute=True)
    model.save_pretrained(tmp_path / "after")
    for file in ("config.json", "model.safetensors"):
        assert (tmp_path / "after" / file).read_bytes() == (tmp_path / "before" / file).read_bytes()
    assert "lamoe" not in json.dumps(json.loads((tmp_path / "after" / "config.json").read_text()))
    other = AutoModelForCausalLM.from_pretrained(tmp_path / "after")
    assert other.config._experts_implementation != "lamoe"
    torch.testing.assert_close(other(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-5)


def test_options_reach_the_kernels(monkeypatch):
    model = native_tiny("mixtral")
    ids = random_ids(1, 3)
    expected = logits_and_gradients(model, ids)
    given = []

    def spy(*args, **kwargs):
        given.append({key: kwargs[key] for key in ("recompute", "batch_invariant", "accumulate")})
        return lamoe.fused_experts(*args, **kwargs)

    monkeypatch.setattr(experts, "fused_experts", spy)
    boost(model, recompute=True, batch_invariant=True)
    assert_same(logits_and_gradients(model, ids), expected)
    assert given == [{"recompute": True, "batch_invariant": True, "accumulate": False}]
    boost(model, accumulate=True)
    model.zero_grad()
    for _ in range(2):
        model(ids).logits.square().sum().backward()
    weight = model.model.layers[0].mlp.experts.down_proj
    name = "model.layers.0.mlp.experts.down_proj"
    torch.testing.assert_close(weight.grad, 2 * expected[1][name], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant):
    model = native_tiny("qwen3_moe").train()
    ids = random_ids(1, 3)
    expected = logits_and_gradients(model, ids)
    boost(model)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    assert_same(logits_and_gradients(model, ids), expected)


def test_lora_on_attention_trains_beside_boosted_experts(calls):
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(native_tiny("mixtral"), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    ids = random_ids(1, 5)
    expected = logits_and_gradients(model, ids)
    assert {row.path for row in boost(model).rows} == {"fused"}
    got = logits_and_gradients(model, ids)
    assert_same(got, expected)
    assert got[1] and all("lora_" in name for name in got[1])
    assert calls["fused"] == 1
    unboost(model.get_base_model())
    assert model.config._experts_implementation == "eager"


def test_lora_on_whole_expert_tensors_runs_by_grouped_mm_and_the_report_knows(calls):
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=2, target_modules=[], target_parameters=["mlp.experts.down_proj"], init_lora_weights=False)
    model = get_peft_model(native_tiny("mixtral"), config)
    ids = random_ids(1, 5)
    expected = logits_and_gradients(model, ids)
    report = boost(model)
    assert [(row.path, row.reason) for row in report.rows] == [("grouped_mm", experts.PARAMETRIZED)]
    assert_same(logits_and_gradients(model, ids), expected)
    assert calls["fused"] == 0
    model.merge_adapter()
    assert {row.path for row in boost(model).rows} == {"fused"}
    torch.testing.assert_close(model(ids).logits, expected[0], rtol=1e-4, atol=1e-4)
    assert calls["fused"] == 1


@pytest.mark.parametrize("path", ["fused", "composite", "grouped_mm"])
def test_a_native_block_compiles_in_one_graph(path, monkeypatch):
    model = native_tiny("gpt_oss" if path == "composite" else "mixtral")
    block = model.model.layers[0].mlp
    if path == "grouped_mm":
        on_the_cpu(None, monkeypatch)
    assert boost(model).rows[0].path == path
    x = torch.randn(1, 3, 16, requires_grad=True)

    def outcome(function):
        out = function(x)
        out = out[0] if isinstance(out, tuple) else out
        return [out, *torch.autograd.grad(out.square().sum(), [x, *block.parameters()])]

    expected = outcome(block)
    torch._dynamo.reset()
    close(outcome(torch.compile(block, fullgraph=True, backend="aot_eager")), expected)
