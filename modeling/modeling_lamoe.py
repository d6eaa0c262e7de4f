"""The Lamoe model: decoder layers, model, heads, losses and what Transformers wants to know about them.

Parameter names are DeepSeek-V3's. Attention is in attention.py, experts in moe.py.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Unpack

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter
from transformers.generation import GenerationMixin
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_layers import (
    GenericForSequenceClassification,
    GenericForTokenClassification,
    GradientCheckpointingLayer,
)
from transformers.modeling_utils import PreTrainedModel, slice_logits_to_keep
from transformers.utils import TransformersKwargs, can_return_tuple, logging
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .attention import LamoeAttention, LamoeRMSNorm, LamoeRotaryEmbedding, add_and_norm, decode_view
from .attention_choice import documents_or_mask
from .cache import GrowingCache
from .configuration_lamoe import LamoeConfig
from .correction import move_biases, summed_over_ranks
from .decode_graph import recording, replayed_step
from .decode_step import few_tokens_layer, fuses
from .experts import default_implementation
from .generation import LamoeGenerationMixin
from .losses import RunningLoad, next_token_loss, router_losses
from .moe import LamoeExperts, LamoeMLP, LamoeMoE, LamoeTopkRouter, Routing
from .mtp import MTPHeadMixin, MTPLayerMixin, MTPModelMixin
from .mtp_checkpoint import fit_to_checkpoint, with_copies
from .pages import batch_mask, listed
from .prefill import feed_by_tokens, prompt_view, tokens_at_once
from .projections import uncomputable_weight, unreadable_weight
from .replay import LamoeCausalLMOutput, LamoeModelOutput, routings, stacked
from .token_loss import logits_loss

logger = logging.get_logger(__name__)

_HALF = (torch.bfloat16, torch.float16)

# On disk there is one tensor an expert, in memory one for all (FACTS: DeepSeek's names): merged while loading, split
# again while saving. Without this entry experts would stay random with a mere report.
register_checkpoint_conversion_mapping(
    LamoeConfig.model_type,
    [
        WeightConverter(
            source_patterns=["mlp.experts.*.gate_proj.weight", "mlp.experts.*.up_proj.weight"],
            target_patterns="mlp.experts.gate_up_proj",
            operations=[MergeModulelist(dim=0), Concatenate(dim=1)],
        ),
        WeightConverter(
            source_patterns="mlp.experts.*.down_proj.weight",
            target_patterns="mlp.experts.down_proj",
            operations=[MergeModulelist(dim=0)],
        ),
    ],
    overwrite=True,
)


def refuse_foreign_shards(folder: Path):
    """Raise a ValueError if an index in `folder` names a file elsewhere; Transformers would follow it."""
    for index in folder.glob("*.safetensors.index*.json"):  # a variant has an index of its own
        for name in set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()):
            if Path(name).name != name or name in ("", ".", ".."):
                raise ValueError(f"{index} names {name!r}, which is no file of that folder; refused.")


class LamoeDecoderLayer(GradientCheckpointingLayer):
    """Attention, then experts (or a dense feed-forward), each behind its norm and beside its residual."""

    def __init__(self, config, layer_idx: int):
        super().__init__()
        self.self_attn = LamoeAttention(config, layer_idx)
        sparse = layer_idx in config.moe_layers or layer_idx >= config.num_hidden_layers
        self.mlp = LamoeMoE(config, layer_idx) if sparse else LamoeMLP(config, config.intermediate_size)
        self.input_layernorm = LamoeRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = LamoeRMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self, hidden_states: Tensor, token_mask: Tensor | None = None, routing: Routing | None = None, **kwargs
    ) -> Tensor:
        """[B, T, D] to [B, T, D]; `token_mask` [B, T] is False at padding, `routing` is of this call alone.

        The rest goes to the attention.
        """
        cache, view = kwargs.get("past_key_values"), kwargs.get("view")
        if view is not None and view.recorded and fuses(self, hidden_states):
            layer = cache.layers[self.self_attn.layer_idx]
            return few_tokens_layer(self, hidden_states, kwargs["position_embeddings"], layer, view)
        hidden_states, normed = add_and_norm(self.input_layernorm, hidden_states)
        attended, _ = self.self_attn(normed, **kwargs)
        del normed
        recorded = kwargs.get("output_router_logits", self.self_attn.config.output_router_logits)
        tokens = tokens_at_once(hidden_states, self.mlp, bool(recorded))
        if routing is None and tokens < hidden_states.shape[0] * hidden_states.shape[1]:
            hidden_states = hidden_states + attended
            del attended
            return feed_by_tokens(hidden_states, self.post_attention_layernorm, self.mlp, tokens)
        hidden_states, normed = add_and_norm(self.post_attention_layernorm, hidden_states, attended)
        del attended
        fed = self.mlp(normed, token_mask, routing) if isinstance(self.mlp, LamoeMoE) else self.mlp(normed)
        return hidden_states + fed


class LamoeMTPLayer(MTPLayerMixin, LamoeDecoderLayer):
    """A multi-token-prediction layer, always with experts; in `model.layers` behind the decoder layers, as on disk."""


class LamoePreTrainedModel(PreTrainedModel):
    """What all Lamoe models share: initialisation, plans, and the flags that Transformers' tools rely on."""

    config: LamoeConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["LamoeDecoderLayer", "LamoeMTPLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {
        "hidden_states": LamoeDecoderLayer,
        "attentions": LamoeAttention,
        "router_logits": OutputRecorder(LamoeTopkRouter, index=0),
    }
    _keep_in_fp32_modules_strict = ["e_score_correction_bias", "mlp.gate.weight"]

    def __init__(self, config, *inputs, **kwargs):
        super().__init__(config, *inputs, **kwargs)
        if config.topk_method != "noaux_tc":  # such a router has no bias
            self._keep_in_fp32_modules_strict = ["mlp.gate.weight"]

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
        """Transformers' loader, for safetensors alone and for shards that lie in the checkpoint's own folder.

        Raises:
            ValueError: the index names a file outside the folder.
        """
        refuse_foreign_shards(Path(str(pretrained_model_name_or_path)) / (kwargs.get("subfolder") or ""))
        kwargs.setdefault("use_safetensors", True)
        return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)

    @staticmethod
    def _load_pretrained_model(model, state_dict, checkpoint_files, *args, **kwargs):
        fit_to_checkpoint(model, state_dict, checkpoint_files)
        return PreTrainedModel._load_pretrained_model(model, state_dict, checkpoint_files, *args, **kwargs)

    def gather_sharded_state_dict_for_save(self, *args, **kwargs):
        """Transformers' state to save, the last before names are turned into those on disk; with MTP's copies."""
        return with_copies(self, super().gather_sharded_state_dict_for_save(*args, **kwargs))

    def resize_token_embeddings(self, *args, **kwargs):
        """Transformers' resizing; a prediction layer's own embedding and head follow."""
        embedding = super().resize_token_embeddings(*args, **kwargs)
        words = embedding.weight.shape[0]
        for layer in self.base_model.mtp_layers:
            if layer.embed_tokens is not None:
                layer.embed_tokens = self._get_resized_embeddings(layer.embed_tokens, words)
            if layer.shared_head.head is not None:
                layer.shared_head.head = self._get_resized_lm_head(layer.shared_head.head, words)
        return embedding

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        return True  # Transformers looks for this in the source of the class's own file; ours is in attention.py

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        return True  # likewise: @use_experts_implementation stands in moe.py

    def get_correct_experts_implementation(self, requested_experts: str | None) -> str:
        """Transformers' answer; where nobody asked for another one, the fused experts if there is a GPU for them."""
        return super().get_correct_experts_implementation(requested_experts or default_implementation())

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, LamoeTopkRouter):
            module.reset_parameters()
        elif isinstance(module, LamoeExperts):
            module.reset_parameters(self.config.initializer_range)

    @property
    def routers(self) -> list[LamoeTopkRouter]:
        """The routers of all layers that have experts, in order; of prediction layers only where they are trained."""
        idle = (
            set()
            if self._trains_mtp
            else {router for layer in self.base_model.mtp_layers for router in layer.modules()}
        )
        found = [(name, module) for name, module in self.named_modules() if isinstance(module, LamoeTopkRouter)]
        kept = [(name, module) for name, module in found if module not in idle]
        return [module for name, module in kept if not name.endswith(".original_module")]  # which PEFT sets aside

    @property
    def _trains_mtp(self) -> bool:
        """Whether training runs the multi-token-prediction layers: no other head but the causal-LM one does."""
        return isinstance(self, MTPHeadMixin) and bool(self.config.mtp_loss_coef)

    @property
    def _ddp_params_and_buffers_to_ignore(self) -> list[str]:
        """What DistributedDataParallel must leave alone.

        Each rank counts its own tokens, and rank 0's counts must not be broadcast over them; and it would wait for
        gradients of layers that do not run.
        """
        idle = set() if self._trains_mtp else {p for layer in self.base_model.mtp_layers for p in layer.parameters()}
        ignored = [name for name, _ in self.named_buffers() if name.endswith(".tokens_per_expert")]
        return ignored + [name for name, parameter in self.named_parameters() if parameter in idle]

    @torch.no_grad()
    def update_router_bias(self, speed: float = 1e-3, group=None) -> list[Tensor]:
        """Move every correction bias towards balance, once per optimizer step: b += speed · sign(mean - count).

        Counts are of all tokens routed in training since the last call, summed over accumulation steps and over the
        ranks of `group`, without padding and recomputation (DeepSeek-V3, arXiv 2412.19437, section 2.1.2). They start
        anew afterwards.

        Args:
            speed: step of the bias; 0 only collects the counts.
            group: data-parallel process group; None is the default one, if there is one.

        Returns:
            for each layer with experts the counts [E] that were used, int64.
        """
        routers = self.routers
        counts = [router.tokens_per_expert for router in routers]
        used = summed_over_ranks(counts, group)
        if speed and self.config.topk_method == "noaux_tc":
            move_biases([router.e_score_correction_bias for router in routers], used, speed)
        if counts:
            torch._foreach_zero_(counts)
        return used


class LamoeModel(MTPModelMixin, LamoePreTrainedModel):
    """Embedding, decoder layers and final norm; behind the decoder layers those of multi-token prediction."""

    def __init__(self, config):
        super().__init__(config)
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        ahead = range(config.num_hidden_layers, config.num_hidden_layers + config.num_nextn_predict_layers)
        self.layers = nn.ModuleList(LamoeDecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.layers.extend(LamoeMTPLayer(config, i) for i in ahead)
        self.norm = LamoeRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = LamoeRotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.forwards_in_training = 0
        self.post_init()

    @property
    def decoder_layers(self) -> list[LamoeDecoderLayer]:
        """The layers that `forward` runs."""
        return [layer for layer in self.layers if not isinstance(layer, LamoeMTPLayer)]

    @property
    def mtp_layers(self) -> list[LamoeMTPLayer]:
        """The multi-token-prediction layers, by depth."""
        return [layer for layer in self.layers if isinstance(layer, LamoeMTPLayer)]

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        mla_form: str | None = None,
        routed_experts: Tensor | Sequence[Tensor] | None = None,
        output_routed_experts: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> LamoeModelOutput:
        """Hidden states [B, T, D] of `input_ids` [B, T] or `inputs_embeds` [B, T, D].

        Args:
            attention_mask: [B, S], 0 at padding; or a ready mask [B, 1, T, S].
            position_ids: [B, T]; several sequences packed in a row each start anew at 0.
            mla_form: "expanded" or "absorbed" overrides `config.mla_form`.
            routed_experts: experts to replay in place of the routers' choice, see `replay.routings`.
            output_routed_experts: also return the experts that were used.

        Raises:
            ValueError: not exactly one of `input_ids` and `inputs_embeds`; `routed_experts` do not fit the model or
                the tokens; or a router saw NaN or infinite values and `config.router_nonfinite` is "raise".
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        self._warn_of_float16(inputs_embeds)
        T = inputs_embeds.shape[1]
        packed_ids = position_ids  # only positions that were given can tell of packing, and the search waits for a GPU
        if position_ids is None:
            seen = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = (torch.arange(T, device=inputs_embeds.device) + seen).unsqueeze(0)

        view = decode_view(self.config, inputs_embeds, attention_mask, past_key_values, mla_form, kwargs)
        if view is not None and not self.decodes(inputs_embeds):
            view = None
        if view is None and kwargs.get("cache") is not None:
            kwargs = listed(kwargs)
            attention_mask = batch_mask(self.config, inputs_embeds, attention_mask, kwargs)
        prompt = None
        if view is None:
            prompt = prompt_view(
                self.config, inputs_embeds, attention_mask, past_key_values, packed_ids, mla_form, kwargs
            )
        causal_mask = None
        if view is None and (prompt is None or prompt.ready):
            causal_mask = documents_or_mask(
                self.config, inputs_embeds, attention_mask, packed_ids, past_key_values, mla_form, kwargs,
                masked=prompt is not None,
            )  # fmt: skip
        if use_cache and past_key_values is None:  # not before: with any cache the mask ignores packing
            past_key_values = GrowingCache(config=self.config)
        token_mask = None
        if self.training and attention_mask is not None and attention_mask.dim() == 2:
            token_mask = attention_mask[:, -T:].bool()

        layers = routings(self.config, inputs_embeds, routed_experts, output_routed_experts)
        hidden_states = inputs_embeds
        del inputs_embeds  # a long prompt's would be held by all layers
        position_embeddings = self.rotary_emb(hidden_states, position_ids)
        for layer, routing in zip(self.decoder_layers, layers, strict=True):
            hidden_states = layer(
                hidden_states,
                token_mask=token_mask,
                routing=routing,
                position_embeddings=position_embeddings,
                attention_mask=causal_mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                use_cache=use_cache,
                mla_form=mla_form,
                view=view,
                prompt=prompt,
                **kwargs,
            )
        if self.config.router_nonfinite == "raise" and not torch.compiler.is_compiling():
            self.forwards_in_training += self.training
            recorded = view is not None and view.recorded  # whoever records looks at the checksums
            if not recorded and not recording(hidden_states):
                checksums = self.checksums()
                if checksums is not None:
                    self.refuse_nonfinite(checksums)
        return LamoeModelOutput(
            last_hidden_state=self.norm(hidden_states),
            past_key_values=past_key_values,
            routed_experts=stacked(layers, hidden_states) if output_routed_experts else None,
        )

    def decodes(self, x: Tensor, depth: int = 0) -> bool:
        """Whether each kv_b_proj of the decoder layers, or of the prediction layer of `depth`, can be absorbed.

        Where one cannot, a mask is needed.
        """
        layers = self.mtp_layers[depth - 1 : depth] if depth else self.decoder_layers
        return not any(uncomputable_weight(layer.self_attn.kv_b_proj, x) for layer in layers)

    def _warn_of_float16(self, x: Tensor):
        if not self.training or x.is_meta or torch.compiler.is_compiling():
            return
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        if dtype == torch.float16:
            logger.warning_once("Training in float16: routers overflow in it; bfloat16 has the range that they need.")

    def checksums(self) -> Tensor | None:
        """The checksums of all routers since the last call, [layers with experts]; None if there are none, or no use.

        There are none where a forward was compiled, and no use unless `config.router_nonfinite` is "raise".
        """
        routers = [layer.mlp.gate for layer in self.decoder_layers if isinstance(layer.mlp, LamoeMoE)]
        found = [router.checksum for router in routers if router.checksum is not None]
        for router in routers:
            router.checksum = None
        if not found or len(found) < len(routers) or found[0].device.type == "meta":
            return None
        stacked = torch.stack([checksum.to(found[0].device) for checksum in found])
        return stacked.view(len(found), -1).sum(dim=1)

    def refuse_nonfinite(self, checksums: Tensor, layers: Sequence[int] | None = None):
        """Raise if a router's logits were not finite: the tokens would all go to the same experts without an error.

        Args:
            checksums: one a router. layers: the indices of their layers; None is all decoder layers with experts.
        """
        finite = torch.isfinite(checksums).tolist()
        if not all(finite):
            layer = (layers or self.config.moe_layers)[finite.index(False)]
            when = f"in training forward {self.forwards_in_training}" if self.training else "in evaluation"
            raise ValueError(
                f"The router of layer {layer} got NaN or infinite values {when}. Train in bfloat16, not float16,"
                " lower the learning rate, or look at the batch; router_nonfinite='zero' keeps such tokens out of the"
                " experts, 'ignore' routes them as they are."
            )


class LamoeForCausalLM(LamoeGenerationMixin, MTPHeadMixin, LamoePreTrainedModel, GenerationMixin):
    """Lamoe with a language-model head: trains with `labels`, generates with `generate` and `generate_batch`."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}
    _fsdp_plan = {"lm_head": "keep_full_weight"}

    def __init__(self, config):
        super().__init__(config)
        self.model = LamoeModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.running_load = RunningLoad()
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        output_router_logits: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        skip_logits: bool | None = None,
        mla_form: str | None = None,
        routed_experts: Tensor | Sequence[Tensor] | None = None,
        output_routed_experts: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> LamoeCausalLMOutput:
        """Logits [B, T, vocabulary] of the next token, and the loss if there are `labels` [B, T] (-100 is no target).

        In training the loss includes the balancing losses and the z-loss of the router, with the weights of the
        configuration and the scale of `losses.router_losses`; `aux_loss` is the expert-level one, unweighted. Likewise
        the loss of the multi-token-prediction layers with `config.mtp_loss_coef`, and `mtp_loss`.

        Args:
            output_router_logits: also return each layer's router logits [B·T, E]; None takes the configuration's.
            logits_to_keep: compute only the last so many logits (0 is all), or those at these positions.
            skip_logits: with labels, never hold the logits, and return None for them; None takes the configuration's
                in training.
            mla_form, routed_experts, output_routed_experts: as for `LamoeModel.forward`.
        """
        arguments = {
            "inputs_embeds": inputs_embeds, "labels": labels, "use_cache": use_cache, "logits_to_keep": logits_to_keep,
            "output_router_logits": output_router_logits, "skip_logits": skip_logits, "mla_form": mla_form,
            "routed_experts": routed_experts, "output_routed_experts": output_routed_experts or None, **kwargs,
        }  # fmt: skip
        replayed = replayed_step(self, input_ids, attention_mask, position_ids, past_key_values, arguments)
        if replayed is not None:
            return replayed

        config = self.config
        if output_router_logits is None:
            output_router_logits = config.output_router_logits
        alphas = (config.aux_loss_alpha, config.device_loss_alpha, config.communication_loss_alpha)
        balanced = self.training and labels is not None and any((*alphas, config.router_z_loss_coef))
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            mla_form=mla_form,
            output_router_logits=output_router_logits or balanced,
            routed_experts=routed_experts,
            output_routed_experts=output_routed_experts,
            **kwargs,
        )
        hidden_states = slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep)

        loss = logits = aux_loss = mtp_loss = None
        skip_logits = config.skip_logits and self.training if skip_logits is None else skip_logits
        if labels is not None and skip_logits:
            loss = self._loss_without_logits(hidden_states, labels, **kwargs)
        if loss is None:
            logits = self.lm_head(hidden_states)
            if labels is not None:
                loss = self._loss_of_logits(logits, labels, **kwargs)
        if outputs.router_logits and labels is not None:
            aux_loss, added = self._router_losses(
                outputs.router_logits, labels, attention_mask, position_ids, **kwargs
            )
            loss = loss + added.to(loss.device) if balanced else loss
        if self.training and labels is not None and self._trains_mtp and self.model.mtp_layers:
            mtp_loss, added = self._mtp_losses(
                outputs.last_hidden_state, input_ids, inputs_embeds, attention_mask, position_ids, labels, skip_logits,
                **kwargs,
            )  # fmt: skip
            loss = loss + added.to(loss.device)
        return LamoeCausalLMOutput(
            loss=loss,
            aux_loss=aux_loss,
            mtp_loss=mtp_loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=outputs.router_logits if output_router_logits else None,
            routed_experts=outputs.routed_experts,
        )

    def _loss_of_logits(self, logits: Tensor, labels: Tensor, **kwargs) -> Tensor:
        """`self.loss_function`; of half-precision logits its default without the float32 copies that it would hold."""
        if self.loss_function is ForCausalLMLoss and logits.dtype in _HALF and not torch.compiler.is_compiling():
            known = ("num_items_in_batch", "shift_labels", "ignore_index")
            return logits_loss(logits, labels, **{name: kwargs[name] for name in known if name in kwargs})
        return self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)

    def _loss_without_logits(self, hidden_states, labels, num_items_in_batch=None, shift_labels=None, **kwargs):
        if unreadable_weight(self.lm_head, hidden_states):
            logger.warning_once("lm_head is wrapped, so the loss is computed from its logits.")
            return None
        return next_token_loss(hidden_states, self.lm_head.weight, labels, num_items_in_batch, shift_labels)

    def _router_losses(
        self, router_logits, labels, attention_mask, position_ids, num_items_in_batch=None, shift_labels=None, **_
    ):
        if self.training and self.model.gradient_checkpointing and not any(x.requires_grad for x in router_logits):
            logger.warning_once(
                "Reentrant gradient checkpointing gives the balancing loss no gradient; pass "
                "gradient_checkpointing_kwargs={'use_reentrant': False}."
            )
        token_mask = None
        if attention_mask is not None and attention_mask.dim() == 2:
            token_mask = attention_mask[:, -labels.shape[1] :].bool()
        targets = labels if shift_labels is None else shift_labels
        running = self.running_load if self.training and torch.is_grad_enabled() else None
        return router_losses(
            router_logits, targets, token_mask, num_items_in_batch, self.config, shift_labels is not None,
            position_ids, running,
        )  # fmt: skip


class LamoeForSequenceClassification(GenericForSequenceClassification, LamoePreTrainedModel):
    """Lamoe with one label a sequence, read at its last token."""

    def __init__(self, config):
        LamoePreTrainedModel.__init__(self, config)  # the generic one goes through AutoModel, which remote code fails
        self.num_labels = config.num_labels
        self.model = LamoeModel(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.post_init()


class LamoeForTokenClassification(GenericForTokenClassification, LamoePreTrainedModel):
    """Lamoe with a label for each token."""

    def __init__(self, config):
        LamoePreTrainedModel.__init__(self, config)
        self.num_labels = config.num_labels
        self.model = LamoeModel(config)
        rates = (getattr(config, name, None) for name in ("classifier_dropout", "hidden_dropout"))
        self.dropout = nn.Dropout(next((rate for rate in rates if rate is not None), 0.1))
        self.score = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()


# Saving any of these copies the code into the folder, where `trust_remote_code=True` finds it.
LamoeConfig.register_for_auto_class()
LamoeModel.register_for_auto_class("AutoModel")
LamoeForCausalLM.register_for_auto_class("AutoModelForCausalLM")
LamoeForSequenceClassification.register_for_auto_class("AutoModelForSequenceClassification")
LamoeForTokenClassification.register_for_auto_class("AutoModelForTokenClassification")

__all__ = [
    "LamoeConfig",
    "LamoeForCausalLM",
    "LamoeForSequenceClassification",
    "LamoeForTokenClassification",
    "LamoeModel",
    "LamoePreTrainedModel",
]
