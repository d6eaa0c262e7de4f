"""Losses of training: balance of the experts per layer, router z-loss, and next-token loss without stored logits.

Letters: B rows, T tokens each, S sequences, L layers, E experts, K experts a token, Y = E or E + devices, D hidden,
W vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .moe import expert_scores, route

# Layers are taken together up to so many logits: a step of few tokens waits for launches, one of many has no room.
_AT_ONCE = 2**22


class Sequences:
    """Which tokens of a batch [B, T] are one sequence, without padding: the rows, or the documents packed into them.

    A document begins where its positions do not go on by one. Their number is not asked of the device: there is room
    for as many as there are tokens, and those that are not there are empty.

    Args:
        token_mask_BT: False at padding; None is no padding.
        position_ids: [B, T] or [1, T], of packed documents each from its own start; None is one sequence a row.
        shape: (B, T).
        whole: all tokens are one sequence instead.
    """

    def __init__(self, token_mask_BT: Tensor | None, position_ids: Tensor | None, shape, device, whole: bool = False):
        self.mask_BT = torch.ones(shape, device=device) if token_mask_BT is None else token_mask_BT.to(device).float()
        self.whole = whole
        self.ids = None
        if position_ids is not None and not whole:
            position_ids = position_ids.to(device).expand(shape)
            begins_BT = torch.ones(shape, dtype=torch.bool, device=device)
            begins_BT[:, 1:] = position_ids[:, 1:] != position_ids[:, :-1] + 1
            self.ids = begins_BT.flatten().cumsum(0) - 1
        self.tokens_S1 = self.sum(self.mask_BT.unsqueeze(-1)).clamp(min=1)

    def sum(self, x: Tensor) -> Tensor:
        """[S, ...]: the sum over each sequence's tokens of [B, T, ...]; exact, and so deterministic, of integers."""
        if self.whole:
            return x.sum(dim=(0, 1)).unsqueeze(0)
        if self.ids is None:
            return x.sum(dim=1)
        tokens = x.flatten(0, 1)
        return torch.zeros_like(tokens).index_add_(0, self.ids, tokens)

    def spread(self, y: Tensor) -> Tensor:
        """What belongs to a token's sequence, of [S, ...], for each token: broadcastable to [B, T, ...]."""
        return y.unsqueeze(1) if self.ids is None else y[self.ids].unflatten(0, self.mask_BT.shape)

    def weights(self, labelled_BT: Tensor) -> Tensor:
        """[B, T] that turn a sum over tokens into one over sequences of (labelled tokens · mean over its tokens)."""
        labelled_S1 = self.sum(labelled_BT.to(self.mask_BT).unsqueeze(-1))
        return self.spread(labelled_S1 / self.tokens_S1).squeeze(-1) * self.mask_BT


class RunningLoad:
    """Choices of the optimizer step so far, over all ranks: what `aux_loss_scope="global"` takes as the load.

    With "Demons in the Detail" (arXiv 2501.11873, section 3): counts are summed over ranks at each forward, and over
    the forwards of a step in a buffer; a forward's loss uses the buffer as it then stands. A step ends when as many
    labelled tokens were seen as it has; nothing waits for the device to know it.
    """

    def __init__(self):
        self.choices: Tensor | None = None
        self.labelled: Tensor | None = None

    @torch.no_grad()
    def add(self, choices: list[Tensor], tokens: Tensor, labelled: Tensor, num_items, group=None):
        """Add a forward of this rank.

        Args:
            choices: for all layers, [L, Y] each, tokens that chose each expert or reached each device.
            tokens, labelled: how many there are in this forward, with and without those that predict nothing.
            num_items: labelled tokens of the optimizer step over all ranks, or None if this forward is all of it.

        Returns:
            the choices of the step likewise, and its tokens, [1].
        """
        flat = torch.cat([*(some.flatten() for some in choices), tokens.view(1), labelled.view(1)]).long()
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(flat, group=group)
        new, labelled = flat[:-1], flat[-1]
        if num_items is not None and self.choices is not None and self.choices.shape == new.shape:
            # Half a forward's slack: some count a label that another shifts out of its row.
            goes_on = (num_items - self.labelled) * 2 >= labelled
            new = new + self.choices * goes_on
            labelled = labelled + self.labelled * goes_on
        self.choices, self.labelled = new, labelled
        *parts, tokens = new.float().split([*(some.numel() for some in choices), 1])
        return [part.view_as(some) for part, some in zip(parts, choices, strict=True)], tokens.clamp(min=1)


def choices_and_affinity(logits: Tensor, config) -> tuple[Tensor, Tensor]:
    """Of logits [..., E], who chose whom [..., Y] as 0 and 1, and the normalised affinity [..., E], differentiable.

    Choices are those without the correction bias, as DeepSeek-V3's eq. 18 has it. Behind the E experts come the
    devices that a token reaches, if `config.communication_loss_alpha` asks for them.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    scores = expert_scores(logits, config.scoring_func)
    _, experts = route(logits.detach().flatten(0, -2), None, config)
    chosen = torch.zeros_like(scores).view(-1, scores.shape[-1]).scatter_(1, experts, 1.0).view_as(scores)
    affinity = scores / scores.sum(dim=-1, keepdim=True)
    if not config.communication_loss_alpha:
        return chosen, affinity
    reached = chosen.unflatten(-1, (config.loss_devices, -1)).amax(dim=-1)
    return torch.cat((chosen, reached), dim=-1), affinity


def balance_coefficients(share: Tensor, config) -> tuple[Tensor, Tensor]:
    """What an affinity costs, [..., E]: the expert-level loss without its alpha, and all three losses with theirs.

    All three are linear in the affinity: sum over experts of f·P (DeepSeek-V2, arXiv 2405.04434, eq. 23-25 and
    DeepSeek-V3 eq. 17-20), over devices of f'·P' (V2 eq. 26-28: f' the mean f of a device's experts, P' the sum of
    their P), and of f''·P'' (V2 eq. 29-31: f'' the share of tokens that reach the device, times devices / those that
    a token may reach).

    Args:
        share: [..., Y], of the tokens that choose an expert or reach a device; no gradient.
    """
    E, K, devices = config.n_routed_experts, config.num_experts_per_tok, config.loss_devices
    f = share[..., :E] * (E / K)
    weighted = config.aux_loss_alpha * f
    if config.device_loss_alpha:
        f_device = f.unflatten(-1, (devices, -1)).mean(dim=-1)
        weighted = weighted + config.device_loss_alpha * f_device.repeat_interleave(E // devices, dim=-1)
    if config.communication_loss_alpha:
        limited = config.topk_method != "greedy" and devices == config.n_group
        most = config.topk_group if limited else min(K, devices)
        f_sent = share[..., E:].repeat_interleave(E // devices, dim=-1) * (devices / most)
        weighted = weighted + config.communication_loss_alpha * f_sent
    return f, weighted


def router_losses(
    router_logits, labels: Tensor, token_mask_BT: Tensor | None, num_items, config, shifted: bool = False,
    position_ids: Tensor | None = None, running: RunningLoad | None = None,
):  # fmt: skip
    """Balance and z-loss of all layers, each layer by itself and then averaged, and what to add to the token loss.

    Sequences count by their labelled tokens, so that the gradient is that of one large batch however it is cut into
    accumulation steps and ranks, padded or packed: sum over sequences of (labelled tokens · loss) / `num_items`. With
    `config.balance_scope` "batch" the micro-batch is one sequence; with "global" the affinity is each sequence's, and
    the load is that of `running`.

    Args:
        router_logits: for each layer [B·T, E].
        labels: [B, T], -100 where nothing is predicted; `shifted` if they are already moved by one.
        token_mask_BT: False at padding, or None.
        num_items: labelled tokens of the whole optimizer step over all ranks, or None for this batch alone.
        position_ids: [B, T] or [1, T]; they tell packed documents apart.
        running: the optimizer step so far; None takes this forward of this rank alone.

    Returns:
        mean expert-level balance loss (for logs), and the term to add to the loss.
    """
    B, T = labels.shape
    labelled_BT = labels.ne(-100)
    if not shifted:
        labelled_BT = F.pad(labelled_BT[:, 1:], (1, 0))
    scope = config.balance_scope
    layers = [logits.view(B, T, 1, -1).to(labels.device) for logits in router_logits]
    # a compiler sets launches together itself, and would compile anew for each number of layers
    at_once = 1 if torch.compiler.is_compiling() else max(_AT_ONCE // max(layers[0].numel(), 1), 1)
    stacks = layers
    if at_once > 1:
        stacks = [torch.cat(layers[i : i + at_once], dim=2) for i in range(0, len(layers), at_once)]  # [B, T, L, E]
    sequences = Sequences(token_mask_BT, position_ids, (B, T), labels.device)
    grouped = Sequences(token_mask_BT, None, (B, T), labels.device, whole=True) if scope == "batch" else sequences
    weight_BT1, weight_z_BT1 = grouped.weights(labelled_BT).unsqueeze(-1), sequences.weights(labelled_BT).unsqueeze(-1)
    labelled = labelled_BT.sum().to(weight_BT1)

    chosen, affinity = zip(*(choices_and_affinity(logits, config) for logits in stacks), strict=True)
    with torch.no_grad():
        masked = [choices * sequences.mask_BT[..., None, None] for choices in chosen]
        if scope == "global":
            sums, tokens = [choices.sum(dim=(0, 1)) for choices in masked], sequences.mask_BT.sum().clamp(min=1)
            if running is not None:
                sums, tokens = running.add(sums, tokens, labelled, num_items)
            shares = [(choices / tokens)[None, None] for choices in sums]
        else:
            shares = [grouped.spread(grouped.sum(choices) / grouped.tokens_S1.unsqueeze(-1)) for choices in masked]
    alone = not (config.device_loss_alpha or config.communication_loss_alpha)
    balance = added = 0.0
    for logits, share, affinity_BTLE in zip(stacks, shares, affinity, strict=True):
        f, weighted = balance_coefficients(share, config)
        some = (weight_BT1 * (f * affinity_BTLE).sum(dim=-1)).sum()
        balance = balance + some
        if alone:
            added = added + config.aux_loss_alpha * some
        else:
            added = added + (weight_BT1 * (weighted * affinity_BTLE).sum(dim=-1)).sum()
        if config.router_z_loss_coef:
            added = added + config.router_z_loss_coef * (weight_z_BT1 * z_loss(logits)).sum()
    items = labelled.clamp(min=1)
    return balance / (len(layers) * items), added / (len(layers) * (items if num_items is None else num_items))


def z_loss(logits: Tensor) -> Tensor:
    """Squared log-sum-exp of the router's logits [..., E] (ST-MoE, arXiv 2202.08906, eq. 5)."""
    return logits.logsumexp(dim=-1).square()


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
