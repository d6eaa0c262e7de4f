"""Tiny native models and experts modules of Transformers' registry, and how to compare what runs them."""

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.activations import ACT2FN
from transformers.integrations.moe import use_experts_implementation

from lamoe import experts, native
from tests.tiny import native_model

COMMON = {
    "vocab_size": 97, "hidden_size": 16, "intermediate_size": 12, "moe_intermediate_size": 12, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8, "num_experts": 4, "num_local_experts": 4,
    "n_routed_experts": 4, "num_experts_per_tok": 2, "max_position_embeddings": 64, "initializer_range": 0.3,
    "bos_token_id": 0, "eos_token_id": None, "pad_token_id": None,
}  # fmt: skip


# By model type: what differs from COMMON, the path and the reason. Each has one layer of experts.
NATIVE = {
    "mixtral": ({}, "fused", ""),
    "olmoe": ({}, "fused", ""),
    "qwen2_moe": ({"shared_expert_intermediate_size": 12}, "fused", ""),
    "qwen3_moe": ({}, "fused", ""),
    "glm4_moe": ({"first_k_dense_replace": 0, "n_group": 1, "topk_group": 1}, "fused", ""),
    "gpt_oss": (
        {"layer_types": ["full_attention"]},
        "composite", "its gate is its own; it has biases; its weights are transposed",
    ),
    "nemotron_h": (
        {"layers_block_type": ["moe", "full_attention"], "moe_shared_expert_intermediate_size": 12},
        "composite", "it has no gate",
    ),
    "dbrx": (
        {"d_model": 16, "n_heads": 2, "n_layers": 1,
         "attn_config": {"kv_n_heads": 1, "clip_qkv": 8, "rope_theta": 1e4},
         "ffn_config": {"ffn_hidden_size": 12, "moe_num_experts": 4, "moe_top_k": 2, "ffn_act_fn": {"name": "gelu"}}},
        "composite", "gate and up projection are apart",
    ),
}  # fmt: skip


FAMILIES = ("v2-lite", "v3", "glm-4.7-flash")  # of tests/tiny.py: DeepSeek-V2, DeepSeek-V3 and GLM-4-MoE-Lite


def native_tiny(name: str, **changes):
    """A tiny native model with eager experts, of a model type of NATIVE or a family of FAMILIES."""
    if name in FAMILIES:
        model = native_model(name, torch.float32, num_hidden_layers=2, **_first_dense(name))
        model.set_experts_implementation("eager")
        return model
    own = NATIVE[name][0]
    settings = own if name == "dbrx" else {**COMMON, **own}
    kept = {key: settings[key] for key in settings if key != "num_hidden_layers" or name != "nemotron_h"}
    torch.manual_seed(0)
    config = AutoConfig.for_model(name, **{**kept, "vocab_size": 97, **changes})
    model = AutoModelForCausalLM.from_config(config, experts_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():  # biases
                nn.init.normal_(parameter, std=0.3)
    return model


def _first_dense(name):
    return {"mlp_layer_types": ["dense", "sparse"]} if name == "glm-4.7-flash" else {}


def logits_and_gradients(model, ids):
    """Logits, and by name the gradient of every parameter that has one."""
    model.zero_grad()
    logits = model(ids).logits
    logits.square().sum().backward()
    return logits.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(got, expected):
    torch.testing.assert_close(got[0], expected[0], rtol=1e-4, atol=1e-5)
    assert got[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        torch.testing.assert_close(
            got[1][name], gradient, rtol=1e-3, atol=1e-4 * float(gradient.abs().max()), msg=name
        )


def experts_module(seed=0, E=4, D=8, F=12, act="silu", base=nn.Module, **flags):
    """An experts module of the registry with these flags, and what runs it."""

    @use_experts_implementation(**flags)
    class TinyExperts(base):
        def __init__(self, config):
            super().__init__()
            self.num_experts, self.act_fn = E, ACT2FN[act]
            up, down = [E, 2 * F if flags.get("has_gate", True) else F, D], [E, D, F]
            if flags.get("is_transposed"):
                up, down = [E, up[2], up[1]], [E, F, D]
            name = "gate_up_proj" if flags.get("has_gate", True) else "up_proj"
            setattr(self, name, nn.Parameter(torch.randn(up) * 0.3))
            self.down_proj = nn.Parameter(torch.randn(down) * 0.3)
            if flags.get("has_bias"):
                wide = up[2 if flags.get("is_transposed") else 1]
                setattr(self, f"{name}_bias", nn.Parameter(torch.randn(E, wide)))
                self.down_proj_bias = nn.Parameter(torch.randn(E, D))
            if flags.get("has_post_expert_norm"):
                self.post_expert_norm = nn.RMSNorm(D, eps=1e-6)

        def forward(self, x, index, weights):  # of the layout without flags
            out = 0
            for k in range(index.shape[1]):
                gate, up = torch.einsum("nd,nfd->nf", x, self.gate_up_proj[index[:, k]]).chunk(2, dim=-1)
                y = torch.einsum("nf,ndf->nd", self.act_fn(gate) * up, self.down_proj[index[:, k]])
                out = out + y * weights[:, k : k + 1]
            return out

    torch.manual_seed(seed)
    config = AutoConfig.for_model("mixtral")
    config._experts_implementation = "lamoe"
    return TinyExperts(config)


def routed(N, K, E=4, D=8, seed=1):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(N, D, generator=generator, requires_grad=True)
    index = (
        torch.stack([torch.randperm(E, generator=generator)[:K] for _ in range(N)]) if N else torch.zeros(0, K).long()
    )
    return x, index, torch.rand(N, K, generator=generator).requires_grad_()


def run(module, implementation, x, index, weights, **kwargs):
    """Output, and the gradients of x, the router's weights and all parameters."""
    module.config._experts_implementation = implementation
    inputs = [x, weights, *module.parameters()]
    out = module(x, index, weights, **kwargs)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(5))
    return [out, *torch.autograd.grad(out, inputs, upstream)]


def close(got, expected):
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def on_the_cpu(module, monkeypatch):
    monkeypatch.setattr(experts, "INTERPRETED", False)


def without_triton(module, monkeypatch):
    monkeypatch.setattr(experts, "MISSING", "Triton or a part of it is missing (No module named 'triton')")


def count_calls(monkeypatch) -> dict[str, int]:
    """How often each of the kernels' two ways is taken from now on."""
    count = {"fused": 0, "composite": 0}
    fused_experts, rows = experts.fused_experts, experts.GroupedRows

    def fused(*args, **kwargs):
        count["fused"] += 1
        return fused_experts(*args, **kwargs)

    class Counted(rows):
        def __init__(self, *args):
            count["composite"] += 1
            super().__init__(*args)

    monkeypatch.setattr(experts, "fused_experts", fused)
    for module in (experts, native):
        monkeypatch.setattr(module, "GroupedRows", Counted)
    return count
