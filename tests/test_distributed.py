"""Sharded training in bfloat16 on two gloo ranks: FSDP2 takes a model whose router is float32."""

import torch
from transformers.distributed.configuration_utils import DistributedConfig

from lamoe import LamoeForCausalLM
from tests.ranks import on_two_ranks
from tests.test_moe import make_config
from tests.tiny import random_ids


def _rank(rank: int, folder: str):
    model = LamoeForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, distributed_config=DistributedConfig(fsdp_size=2)
    ).train()
    ids = random_ids(4, 8, vocab_size=64)[2 * rank : 2 * rank + 2]
    loss = model(ids, labels=ids).loss
    loss.backward()
    gate = model.routers[0].weight
    assert model.model.layers[1].self_attn.o_proj.weight.dtype == torch.bfloat16
    used = model.update_router_bias(0.5)
    if rank == 0:
        torch.save([loss.detach(), gate.dtype, used, model.routers[0].e_score_correction_bias.cpu()], f"{folder}/out")
    assert gate.grad.full_tensor().abs().max() > 0


def test_fsdp2_trains_a_bfloat16_model_with_a_float32_router(tmp_path):
    torch.manual_seed(0)
    whole = LamoeForCausalLM(make_config())
    whole.save_pretrained(tmp_path)
    on_two_ranks(_rank, tmp_path, str(tmp_path))
    loss, dtype, used, bias = torch.load(tmp_path / "out", weights_only=False)
    assert dtype == torch.float32
    ids = random_ids(4, 8, vocab_size=64)
    expected = whole.to(torch.bfloat16).train()(ids[:2], labels=ids[:2]).loss
    torch.testing.assert_close(loss, expected.detach(), rtol=2e-2, atol=2e-2)
    assert used[0].sum() == 4 * 8 * whole.config.num_experts_per_tok
    assert set(bias.abs().tolist()) <= {0.0, 0.5}
