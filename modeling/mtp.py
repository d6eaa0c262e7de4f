"""Multi-token prediction (DeepSeek-V3, arXiv 2412.19437, section 2.2): its layers, and their loss in training.

The layer of depth k = 1, 2, … joins the state that depth k - 1 has of token i with the embedding of token i + k, and
predicts token i + k + 1. Depth 0 is the model itself. Embedding and head are the model's. In generation the layers
draft (mtp_drafts.py); on disk they are layers past the last (mtp_checkpoint.py).

Letters: B sequences, T tokens each, D hidden, W vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_outputs import MoeModelOutputWithPast
from transformers.utils.output_capturing import capture_outputs

from .attention import LamoeRMSNorm, decode_view
from .attention_choice import documents_or_mask
from .losses import next_token_loss, router_losses
from .moe import Routing
from .projections import unreadable_weight
from .token_loss import logits_loss


class LamoeMTPHead(nn.Module):
    """The norm before the head, and a head where the checkpoint's differs from the model's."""

    def __init__(self, config):
        super().__init__()
        self.norm = LamoeRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.register_module("head", None)


class MTPLayerMixin:
    """Makes a decoder layer one of multi-token prediction. To stand before it in a class's bases."""

    def __init__(self, config, layer_idx: int):
        super().__init__(config, layer_idx)
        self.enorm = LamoeRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.hnorm = LamoeRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.eh_proj = nn.Linear(2 * config.hidden_size, config.hidden_size, bias=False)
        self.shared_head = LamoeMTPHead(config)
        self.register_module("embed_tokens", None)  # likewise: one of its own only if it differs from the model's
        self.self_attn.layer_idx = 0  # each depth has a cache for itself

    def forward(self, embeds: Tensor, hidden_states: Tensor, **kwargs) -> Tensor:
        """The state of this depth (eq. 21-22) after `shared_head.norm`, ready for the head and for the next depth.

        The next depth gets it normed, as the first one gets the model's states after the model's last norm; so do
        Transformers and SGLang. The report leaves it open, and published checkpoints have one depth.

        Args:
            embeds: embeddings of the tokens i + k, [B, T, D].
            hidden_states: states of the tokens i by depth k - 1, [B, T, D].
            kwargs: as for a decoder layer.
        """
        joined = torch.cat((self.enorm(embeds), self.hnorm(hidden_states)), dim=-1)
        return self.shared_head.norm(super().forward(self.eh_proj(joined), **kwargs))


def documents(position_ids: Tensor | None, attention_mask: Tensor | None, x_BTD: Tensor) -> Tensor:
    """Which document each token belongs to, [B, T] int64, -1 for padding.

    A document begins where a position is not its predecessor plus one, as for Transformers' masks.

    Args:
        position_ids: [B or 1, T] or None, which is one document a row.
        attention_mask: [B, S] with 0 at padding, of which the last T count; anything else tells of no padding.
    """
    B, T, _ = x_BTD.shape
    found = torch.zeros(B, T, dtype=torch.int64, device=x_BTD.device)
    if position_ids is not None:
        found = found + F.pad(position_ids.diff(dim=-1) != 1, (1, 0)).cumsum(dim=-1)
    if attention_mask is not None and attention_mask.dim() == 2:
        found = found.masked_fill(attention_mask[:, -T:] == 0, -1)
    return found


def shifted(x: Tensor, by: int, fill) -> Tensor:
    """`x` [B, T] or [B, T, D] moved to the left along T, with `fill` at the end."""
    by = min(by, x.shape[1])
    return F.pad(x[:, by:], (0, by) if x.dim() == 2 else (0, 0, 0, by), value=fill)


def inside(documents_BT: Tensor, ahead: int) -> Tensor:
    """[B, T] boolean: the token so many places `ahead` belongs to the same document; never for padding."""
    return (shifted(documents_BT, ahead, -1) == documents_BT) & (documents_BT >= 0)


def mtp_targets(next_ids: Tensor, documents_BT: Tensor, depth: int) -> Tensor:
    """What depth k has to predict at each place, [B, T]: token i + k + 1, or -100 where it is another document's.

    Args:
        next_ids: [B, T], token i + 1 at place i, -100 where nothing is predicted. What stands at the last place may be
            the first token of a following part of the row.
    """
    border = ~inside(documents_BT, depth + 1)
    border[:, max(border.shape[1] - depth - 1, 0) :] = False  # of these tokens the documents are not known
    return shifted(next_ids, depth, -100).masked_fill(~inside(documents_BT, depth) | border, -100)


class MTPModelMixin:
    """What a model with `mtp_layers` can do with them. To stand before the model class in a class's bases."""

    def mtp_step(
        self,
        depth: int,
        embeds: Tensor,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor,
        packed_ids: Tensor | None = None,
        past_key_values=None,
        **kwargs,
    ) -> Tensor:
        """States [B, T, D] of `depth` (the first is 1) from embeddings and states of the depth before.

        Args:
            attention_mask: [B, cached + T], 0 at what nobody may see, or a ready mask [B, 1, T, S].
            packed_ids: positions that tell documents apart, as `LamoeModel.forward` gets them.
            past_key_values: a cache of this depth alone, of one layer.
        """
        layer = self.mtp_layers[depth - 1]
        view = decode_view(self.config, embeds, attention_mask, past_key_values, None, kwargs)
        if view is not None and not self.decodes(embeds, depth):
            view = None
        mask = None
        if view is None:
            mask = documents_or_mask(self.config, embeds, attention_mask, packed_ids, past_key_values, None, kwargs)
        return layer(
            embeds,
            hidden_states,
            position_embeddings=self.rotary_emb(embeds, position_ids),
            attention_mask=mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            view=view,
            **kwargs,
        )

    def mtp_embeds(self, depth: int, input_ids: Tensor) -> Tensor:
        """Embeddings of `input_ids` for the layer of `depth`."""
        own = self.mtp_layers[depth - 1].embed_tokens
        return (self.embed_tokens if own is None else own)(input_ids)

    @capture_outputs
    def predict_ahead(
        self,
        hidden_states: Tensor,
        input_ids: Tensor | None,
        inputs_embeds: Tensor | None,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        documents_BT: Tensor,
        **kwargs,
    ) -> MoeModelOutputWithPast:
        """States of all depths, [depths, B, T, D], in training; `output_router_logits` as for `LamoeModel.forward`.

        Where token i + k is another document's, or there is none, zeros take the place of its embedding.

        Args:
            hidden_states: the model's [B, T, D], after its last norm.
            input_ids, inputs_embeds: of the same forward; one of them.
            documents_BT: as `documents` finds them.
        """
        T = hidden_states.shape[1]
        positions = position_ids
        if positions is None:
            positions = torch.arange(T, device=hidden_states.device).unsqueeze(0)
        if attention_mask is not None and attention_mask.dim() == 2:
            attention_mask = attention_mask[:, -T:]
        states = []
        for depth in range(1, len(self.mtp_layers) + 1):
            embeds = inputs_embeds if input_ids is None else self.mtp_embeds(depth, input_ids)
            known = inside(documents_BT, depth)
            embeds = shifted(embeds, depth, 0.0) * known.unsqueeze(-1)
            hidden_states = self.mtp_step(
                depth, embeds, hidden_states, attention_mask, positions, position_ids, token_mask=known,
                routing=None if torch.compiler.is_compiling() else Routing(), **kwargs,
            )  # fmt: skip
            states.append(hidden_states)
        self._refuse_nonfinite_ahead()
        return MoeModelOutputWithPast(last_hidden_state=torch.stack(states))

    def _refuse_nonfinite_ahead(self):
        routers = [layer.mlp.gate for layer in self.mtp_layers]
        found = [router.checksum for router in routers]
        for router in routers:
            router.checksum = None
        if self.config.router_nonfinite == "raise" and not any(x is None or x.is_meta for x in found):
            first = self.config.num_hidden_layers
            sums = torch.stack([x.sum().to(found[0].device) for x in found])
            self.refuse_nonfinite(sums, range(first, first + len(found)))


class MTPHeadMixin:
    """The loss of the layers, for a causal-LM class with `model` and `lm_head`. To stand before it in the bases."""

    _mtp_sums: Tensor | None = None  # [2, depths]: cross entropies and targets since `collect_mtp_loss`

    def mtp_head(self, depth: int) -> nn.Module:
        """The head of `depth`: the model's, or its own where the checkpoint's differs."""
        own = self.model.mtp_layers[depth - 1].shared_head.head
        return self.lm_head if own is None else own

    def _mtp_losses(
        self,
        hidden_states: Tensor,
        input_ids: Tensor | None,
        inputs_embeds: Tensor | None,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        labels: Tensor,
        skip_logits: bool,
        shift_labels: Tensor | None = None,
        num_items_in_batch=None,
        **kwargs,
    ) -> tuple[Tensor, Tensor]:
        """The mean for logs, and what to add to the token loss (eq. 24-25), routers' losses included.

        Eq. 24 divides by all tokens and not by those that have a target at that depth; so does this: by the labelled
        tokens of the whole optimizer step, `num_items_in_batch`, so that neither accumulation nor world size changes
        the gradient. A layer's router losses weigh what those of any other layer do.

        Args:
            skip_logits: never hold [B·T, W] logits, where a library here can do without.
        """
        config = self.config
        weighted = bool(config.aux_loss_alpha or config.router_z_loss_coef)
        kept = documents(position_ids, attention_mask, hidden_states)
        outputs = self.model.predict_ahead(
            hidden_states, input_ids, inputs_embeds, attention_mask, position_ids, kept,
            output_router_logits=weighted, **kwargs,
        )  # fmt: skip
        next_ids = shifted(labels, 1, -100) if shift_labels is None else shift_labels
        next_ids = next_ids.to(hidden_states.device)
        items = next_ids.ne(-100).sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
        sums, counts, added = [], [], 0.0
        for depth, states in enumerate(outputs.last_hidden_state, start=1):
            targets = mtp_targets(next_ids, kept, depth)
            sums.append(self._summed_loss(depth, states, targets, skip_logits))
            counts.append(targets.ne(-100).sum())
            if weighted:
                router_logits, known = [outputs.router_logits[depth - 1]], inside(kept, depth)
                _, more = router_losses(router_logits, next_ids, known, num_items_in_batch, config, shifted=True)
                added = added + more / max(len(config.moe_layers), 1)
        total, seen = torch.stack(sums), torch.stack(counts)
        with torch.no_grad():
            both = torch.stack((total.detach().double(), seen.double()))
            self._mtp_sums = both if self._mtp_sums is None else self._mtp_sums + both
            mean = (total.detach() / seen.clamp(min=1)).mean()
        return mean, config.mtp_loss_coef * (total / items).mean() + added

    def _summed_loss(self, depth: int, states: Tensor, targets: Tensor, skip_logits: bool) -> Tensor:
        head, loss = self.mtp_head(depth), None
        if skip_logits and not unreadable_weight(head, states):
            loss = next_token_loss(states, head.weight, targets, num_items=1, shift_labels=targets)
        if loss is None:
            logits = head(states)
            if logits.dtype in (torch.bfloat16, torch.float16):
                return logits_loss(logits, targets, 1, shift_labels=targets)
            loss = F.cross_entropy(logits.flatten(0, 1), targets.reshape(-1), ignore_index=-100, reduction="sum")
        return loss

    @torch.no_grad()
    def collect_mtp_loss(self, group=None) -> float | None:
        """The mean multi-token-prediction loss since the last call, over all ranks; None if there was none.

        Args:
            group: data-parallel process group; None is the default one, if there is one.
        """
        if self._mtp_sums is None:
            return None
        sums, self._mtp_sums = self._mtp_sums, None
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(sums, group=group)
        return float((sums[0] / sums[1].clamp(min=1)).mean())
