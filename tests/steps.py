"""One optimizer step of a tiny model, cut into accumulation steps, padded or packed, and what it leaves behind."""

import torch

from lamoe import LamoeForCausalLM
from tests.test_moe import make_config
from tests.tiny import native_model, random_ids

W = 64


def training_model(**changes) -> LamoeForCausalLM:
    """A tiny Lamoe model in training mode, with every loss of the router."""
    torch.manual_seed(5)
    losses = {
        "aux_loss_alpha": 0.5, "router_z_loss_coef": 0.1, "expert_devices": 4, "device_loss_alpha": 0.3,
        "communication_loss_alpha": 0.2,
    }  # fmt: skip
    return LamoeForCausalLM(make_config(**{**losses, **changes})).train()


def plain_model(**changes) -> LamoeForCausalLM:
    """`training_model` without any loss of the router."""
    return training_model(
        aux_loss_alpha=0.0, router_z_loss_coef=0.0, device_loss_alpha=0.0, communication_loss_alpha=0.0, **changes
    )


def native_training_model():
    """A tiny native DeepSeek-V3 in training mode, with biases of zero."""
    model = native_model("moonlight", torch.float32, vocab_size=W).train()
    for name, bias in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            bias.zero_()
    return model


def ragged_batch():
    """Four rows, padded on the left: ids, mask and labels, of which the first half of row 2 has none."""
    ids = random_ids(4, 10, seed=9, vocab_size=W)
    mask = torch.ones_like(ids)
    mask[1, :3] = mask[3, :6] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[2, :5] = -100
    return ids, mask, labels


def packed(ids, mask, labels) -> dict:
    """The same documents end to end in one row, without padding, as padding-free collators make them."""
    rows = [(i[m > 0], y[m > 0].clone()) for i, m, y in zip(ids, mask, labels, strict=True)]
    for _, targets in rows:
        targets[0] = -100  # of the first token nothing is predicted
    positions = torch.cat([torch.arange(len(row)) for row, _ in rows])
    joined = {
        "input_ids": torch.cat([row for row, _ in rows]),
        "position_ids": positions,
        "labels": torch.cat([y for _, y in rows]),
    }
    return {name: x.unsqueeze(0) for name, x in joined.items()}


def forwards(parts: int, pack: bool = False, rows=slice(None)) -> list[dict]:
    """Keyword arguments of the forwards of one optimizer step over `rows` of `ragged_batch`."""
    batch = ragged_batch()
    items = packed(*batch)["labels"][:, 1:].ne(-100).sum()
    chunks = zip(*(x[rows].chunk(parts) for x in batch), strict=True)
    if pack:
        inputs = [packed(*chunk) for chunk in chunks]
    else:
        inputs = [dict(zip(("input_ids", "attention_mask", "labels"), chunk, strict=True)) for chunk in chunks]
        for chunk in inputs:
            first = chunk["attention_mask"].argmax(dim=1, keepdim=True)
            chunk["labels"] = chunk["labels"].scatter(1, first, -100)  # predicted from padding
            chunk["position_ids"] = (chunk["attention_mask"].cumsum(1) - 1).clamp(min=0)
    # With a cache, the native classes take no note of packing.
    return [{**chunk, "num_items_in_batch": items, "use_cache": False} for chunk in inputs]


def gradients(model, parts: int = 1, **layout) -> tuple[float, dict]:
    """Loss of an optimizer step over `ragged_batch`, and its gradients by name."""
    loss = 0.0
    for arguments in forwards(parts, **layout):
        one = model(**arguments).loss
        one.backward()
        loss += one.item()
    return loss, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_step(got, expected):
    """Compare two results of `gradients`, in float32 within rounding."""
    torch.testing.assert_close(got[0], expected[0], rtol=1e-5, atol=1e-6)
    assert got[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        torch.testing.assert_close(got[1][name], gradient, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
