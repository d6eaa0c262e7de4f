"""Losses of training: balance of the experts per layer, router z-loss, and next-token loss without stored logits.

Letters: B sequences, T tokens each, E experts, K experts a token, D hidden, W vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .moe import expert_scores, route


def balance_loss(logits_BTE: Tensor, token_mask_BT: Tensor | None, config) -> Tensor:
    """Balancing loss of one layer for each sequence, [B] float32: sum over experts of f·P.

    f is E/K times the share of the tokens that choose the expert, P the mean of its normalised affinity. This is
    DeepSeek-V3 (arXiv 2412.19437) eq. 17-20 without its factor alpha; choices are those without the correction bias,
    as eq. 18 has it. With `seq_aux=False` f and P are taken over all sequences at once (Switch, arXiv 2101.03961,
    eq. 4-6), and all B values are equal.

    Args:
        logits_BTE: router logits [B, T, E]; differentiable.
        token_mask_BT: [B, T] boolean, False at padding, or None.
    """
    logits_BTE = logits_BTE.to(torch.promote_types(logits_BTE.dtype, torch.float32))
    scores = expert_scores(logits_BTE, config.scoring_func)
    _, chosen = route(logits_BTE.detach().flatten(0, 1), None, config)
    chosen_BTE = torch.zeros_like(scores).view(-1, scores.shape[-1]).scatter_(1, chosen, 1.0).view_as(scores)
    affinity_BTE = scores / scores.sum(dim=-1, keepdim=True)
    mask_BT1 = torch.ones_like(scores[..., :1]) if token_mask_BT is None else token_mask_BT.unsqueeze(-1).to(scores)
    axes = (1,) if config.seq_aux else (0, 1)
    tokens = mask_BT1.sum(dim=axes, keepdim=True).clamp(min=1)
    f = (chosen_BTE * mask_BT1).sum(dim=axes, keepdim=True) / tokens
    P = (affinity_BTE * mask_BT1).sum(dim=axes, keepdim=True) / tokens
    factor = config.n_routed_experts / config.num_experts_per_tok
    return (factor * (f * P).sum(dim=-1)).flatten().expand(scores.shape[0])


def z_loss(logits_BTE: Tensor, token_mask_BT: Tensor | None) -> Tensor:
    """Mean squared log-sum-exp of the router's logits for each sequence, [B] (ST-MoE, arXiv 2202.08906, eq. 5)."""
    z_BT = logits_BTE.logsumexp(dim=-1).square()
    if token_mask_BT is None:
        return z_BT.mean(dim=1)
    mask = token_mask_BT.to(z_BT)
    return (z_BT * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1)


def router_losses(
    router_logits, labels: Tensor, token_mask_BT: Tensor | None, num_items, config, shifted: bool = False
):
    """Balance and z-loss of all layers, each layer by itself and then averaged, and what to add to the token loss.

    Sequences count by their labelled tokens, so that the gradient is that of one large batch however it is cut into
    accumulation steps and ranks: sum over sequences of (labelled tokens · loss) / `num_items`.

    Args:
        router_logits: for each layer [B·T, E].
        labels: [B, T], -100 where nothing is predicted; `shifted` if they are already moved by one.
        num_items: labelled tokens of the whole optimizer step over all ranks, or None for this batch alone.

    Returns:
        mean balance loss (for logs), and the term to add to the loss.
    """
    B, T = labels.shape
    counted = labels if shifted else labels[:, 1:]
    weight_B = counted.ne(-100).sum(dim=1).to(router_logits[0].dtype)
    layers = [logits.view(B, T, -1).to(labels.device) for logits in router_logits]
    balance_B = torch.stack([balance_loss(logits, token_mask_BT, config) for logits in layers]).mean(dim=0)
    added_B = config.aux_loss_alpha * balance_B
    if config.router_z_loss_coef:
        z_B = torch.stack([z_loss(logits, token_mask_BT) for logits in layers]).mean(dim=0)
        added_B = added_B + config.router_z_loss_coef * z_B
    mean = (weight_B * balance_B).sum() / weight_B.sum().clamp(min=1)
    return mean, (weight_B * added_B).sum() / (weight_B.sum().clamp(min=1) if num_items is None else num_items)


def next_token_loss(
    hidden_BTD: Tensor, head_weight_WD: Tensor, labels: Tensor, num_items=None, shift_labels: Tensor | None = None
) -> Tensor | None:
    """Cross entropy of the next token without ever holding [B·T, W] logits, or None where no library here offers it.

    PyTorch's chunked `linear_cross_entropy` where there is one, else Liger's fused kernel on a GPU. Same value and
    gradients as Transformers' causal-LM loss, up to rounding.

    Args:
        hidden_BTD: last hidden states; differentiable.
        head_weight_WD: weight of the head, without bias; differentiable.
        labels: [B, T], shifted here; or `shift_labels` that are shifted already.
        num_items: as in `router_losses`.
    """
    if shift_labels is None:
        shift_labels = F.pad(labels, (0, 1), value=-100)[:, 1:]
    x, target = hidden_BTD.flatten(0, 1).to(head_weight_WD.dtype), shift_labels.reshape(-1).to(hidden_BTD.device)
    if hasattr(torch.nn, "LinearCrossEntropyOptions"):
        options = torch.nn.LinearCrossEntropyOptions()
        total = F.linear_cross_entropy(x, head_weight_WD, target, reduction="sum", options=options)
    else:
        try:
            from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy
        except ImportError:
            return None
        if x.device.type == "cpu":
            return None
        total = liger_fused_linear_cross_entropy(x, head_weight_WD, target, reduction="sum")
    return total / (target.ne(-100).sum() if num_items is None else num_items)
