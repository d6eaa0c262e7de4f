"""Router, experts and their sum, eager: this file is the specification of the fused paths.

Letters: N tokens, D hidden, E routed experts, K experts a token, F expert width. Formulas: DeepSeek-V3 (arXiv
2412.19437) eq. 12-16, DeepSeek-V2 (arXiv 2405.04434) eq. 20-22 and section 2.2.2 for its groups.
"""

import re
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.integrations import use_experts_implementation

from .experts import DEFAULT_OPTIONS, NAME, activation_name, describe, lamoe_experts_forward
from .precision import KeepsFloat32
from .recompute import exact_linear, gated_linear, spread, two_linears

FEW_LOGITS = 2**14  # a layer's logits that are kept until all layers' are summed in one launch


def expert_scores(logits_NE: Tensor, scoring_func: str) -> Tensor:
    """Affinity of each token to each expert: softmax or sigmoid of the router's logits, in their dtype."""
    return logits_NE.softmax(dim=-1) if scoring_func == "softmax" else logits_NE.sigmoid()


def selection_values(logits_NE: Tensor, scores_NE: Tensor, config) -> Tensor:
    """What experts are chosen by, [N, E] without gradient: the scores, before any bias.

    Softmax is monotone, so where nothing is added to its scores the logits choose: they do not depend on the rounding
    of a sum, and do not underflow.
    """
    plain = config.scoring_func == "softmax" and config.topk_method != "noaux_tc"
    return (logits_NE if plain else scores_NE).detach()


def select_experts(values_NE: Tensor, bias_E: Tensor | None, config) -> Tensor:
    """The K experts of each token, [N, K] int64, descending by value + bias; of equals, the lowest id comes first.

    Of equal groups the lowest index wins as well. NaN counts as greater than all else.

    Args:
        values_NE: `selection_values`.
        bias_E: correction bias, added for the selection only; None is zero.
        config: `topk_method`, `n_group`, `topk_group`, `num_experts_per_tok`.
    """
    choice = values_NE if bias_E is None else values_NE + bias_E
    if config.topk_method != "greedy" and config.n_group > 1:
        grouped = choice.unflatten(-1, (config.n_group, -1))
        if config.topk_method == "noaux_tc":
            group_scores = grouped.topk(2, dim=-1).values.sum(dim=-1)
        else:
            group_scores = grouped.amax(dim=-1)
        best = _descending(group_scores, config.topk_group)
        closed = torch.ones_like(group_scores, dtype=torch.bool).scatter(1, best, False)
        choice = grouped.masked_fill(closed.unsqueeze(-1), float("-inf")).flatten(-2)
    return _descending(choice, config.num_experts_per_tok)


def _descending(values: Tensor, count: int) -> Tensor:
    """Indices of the `count` greatest of each row. topk would leave open which of equals it takes."""
    return values.sort(dim=-1, descending=True, stable=True).indices[..., :count]


def route_eager(logits_NE: Tensor, bias_E: Tensor | None, config) -> tuple[Tensor, Tensor]:
    """Weights [N, K] in the logits' dtype, differentiable, and experts [N, K] int64 as by `select_experts`."""
    scores = expert_scores(logits_NE, config.scoring_func)
    experts = select_experts(selection_values(logits_NE, scores, config), bias_E, config)
    return _weigh(scores, experts, config), experts


def weigh_experts(logits_NE: Tensor, experts_NK: Tensor, config) -> Tensor:
    """Weights [N, K] in the logits' dtype, differentiable, of experts that are chosen already."""
    return _weigh(expert_scores(logits_NE, config.scoring_func), experts_NK, config)


def _weigh(scores_NE: Tensor, experts_NK: Tensor, config) -> Tensor:
    weights = scores_NE.gather(1, experts_NK)
    if config.norm_topk_prob:
        weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
    if config.routed_scaling_factor != 1:
        weights = weights * config.routed_scaling_factor
    return weights


_ROUTING_FIELDS = (
    "num_experts_per_tok", "topk_method", "n_group", "topk_group", "scoring_func", "norm_topk_prob",
    "routed_scaling_factor",
)  # fmt: skip


def route(logits_NE: Tensor, bias_E: Tensor | None, config) -> tuple[Tensor, Tensor]:
    """`route_eager`, or its fused twin where `config.router_implementation` has it.

    Raises:
        ValueError: it is "triton", and the kernel does not run here; the message says why.
    """
    if not _routes_fused(logits_NE, bias_E, config):
        return route_eager(logits_NE, bias_E, config)
    from .kernels_router import route as route_fused

    return route_fused(logits_NE, bias_E, **{name: getattr(config, name) for name in _ROUTING_FIELDS})


def _routes_fused(logits_NE: Tensor, bias_E: Tensor | None, config) -> bool:
    """Whether the kernels route these logits; where they must and cannot, they or this say why."""
    implementation = config.router_implementation
    if implementation == "eager" or (implementation == "auto" and not logits_NE.is_cuda):
        return False
    try:
        from .kernels_router import why_not_route
    except ImportError as error:
        if implementation == "triton":
            raise ValueError(str(error)) from error
        return False
    fields = {name: getattr(config, name) for name in _ROUTING_FIELDS}
    return implementation == "triton" or not why_not_route(logits_NE, bias_E, **fields)


class _Weighing(torch.autograd.Function):
    """`weigh_experts`, which keeps the same two tensors whoever computes it: checkpointing counts what is kept."""

    @staticmethod
    def forward(ctx, logits_NE, experts_NK, weights_NK, config, fused):
        ctx.save_for_backward(logits_NE, experts_NK)
        ctx.config, ctx.fused = config, fused
        return weigh_experts(logits_NE, experts_NK, config) if weights_NK is None else weights_NK.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, dweights_NK):
        logits_NE, experts_NK = ctx.saved_tensors
        if ctx.fused:
            from .kernels_router import weigh_gradient

            fields = {name: getattr(ctx.config, name) for name in _ROUTING_FIELDS[-3:]}
            return weigh_gradient(dweights_NK, logits_NE, experts_NK, **fields), None, None, None, None
        with torch.enable_grad():
            leaf = logits_NE.detach().requires_grad_()
            weights = weigh_experts(leaf, experts_NK, ctx.config)
        return torch.autograd.grad(weights, leaf, dweights_NK)[0], None, None, None, None


class Routing:
    """What one call of a layer chooses: told beforehand, or written by its first forward and read by recomputation.

    Gradient checkpointing hands a layer the very same arguments again, so that each call finds its own, however many
    are in flight and in whatever order they are recomputed: it cannot route differently, and counts once.

    Args:
        given: [B, T, K] of any integer dtype; a token with a negative id is routed anew. None routes all anew.
    """

    def __init__(self, given: Tensor | None = None):
        self.given = given
        self.chosen: Tensor | None = None  # [N, K] int64, once there was a forward


class LamoeTopkRouter(KeepsFloat32, nn.Module):
    """Scores, selection and weights of the routed experts, in float32 whatever autocast and `.to()` say.

    `tokens_per_expert` [E] counts what training has routed since the last `reset_counts`: without padding, and without
    the second run of gradient checkpointing. `checksum`, the sum of the last forward's logits, is not finite if one of
    them was not; it costs one launch, and the model looks at those of all layers at once. Of few logits it is these.
    """

    def __init__(self, config, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size, dtype=torch.float32))
        if config.topk_method == "noaux_tc":
            self.e_score_correction_bias = nn.Buffer(torch.zeros(config.n_routed_experts, dtype=torch.float32))
        self.tokens_per_expert = nn.Buffer(torch.zeros(config.n_routed_experts, dtype=torch.int64), persistent=False)
        self.checksum: Tensor | None = None

    def reset_parameters(self):
        """Draw the weight and zero the buffers; leaves alone what a checkpoint has filled."""
        init.normal_(self.weight, mean=0.0, std=self.config.initializer_range)
        if self.config.topk_method == "noaux_tc":
            init.zeros_(self.e_score_correction_bias)
        init.zeros_(self.tokens_per_expert)

    def reset_counts(self):
        """Start counting anew."""
        self.tokens_per_expert.zero_()

    def forward(
        self, hidden_states: Tensor, token_mask: Tensor | None = None, routing: Routing | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Route `hidden_states` [..., D]: logits [N, E] float32, weights [N, K] float32, experts [N, K] int64.

        Args:
            token_mask: [N] boolean, False where a token is padding; such tokens are routed but not counted.
            routing: experts that are taken in place of those that the logits choose, and where the chosen are noted;
                weights are always of the current logits.
        """
        x_ND = hidden_states.flatten(0, -2)
        with nullcontext() if x_ND.is_meta else torch.autocast(x_ND.device.type, enabled=False):
            logits = exact_linear(x_ND, self.weight)
        if self.config.router_nonfinite == "zero":
            logits = torch.where(torch.isfinite(logits).all(dim=-1, keepdim=True), logits, 0.0)
        weights, experts = self.choose(logits, token_mask, routing)
        return logits, weights, experts

    def choose(
        self, logits: Tensor, token_mask: Tensor | None = None, routing: Routing | None = None
    ) -> tuple[Tensor, Tensor]:
        """Weights [N, K] float32 and experts [N, K] int64 of `logits` [N, E], watched and counted as in `forward`."""
        if self.config.router_nonfinite == "raise" and not torch.compiler.is_compiling():
            self.checksum = logits.detach() if logits.numel() <= FEW_LOGITS else logits.detach().sum()
        bias = self.e_score_correction_bias if self.config.topk_method == "noaux_tc" else None
        again = routing is not None and routing.chosen is not None
        if routing is None:
            weights, experts = route(logits, bias, self.config)
        else:
            weights, experts = self._route_as_told(logits, bias, routing)
        if self.training and not again and not _recomputing():
            self._count(experts, token_mask)
        return weights, experts

    def _route_as_told(self, logits: Tensor, bias: Tensor | None, routing: Routing) -> tuple[Tensor, Tensor]:
        weights, experts = None, routing.chosen
        if experts is None:
            with torch.no_grad():
                weights, experts = route(logits, bias, self.config)
            if routing.given is not None:
                given = routing.given.reshape(experts.shape).to(experts)
                experts = torch.where((given < 0).any(dim=-1, keepdim=True), experts, given)
                weights = None
            routing.chosen = experts
        if torch.compiler.is_compiling():
            return weigh_experts(logits, experts, self.config), experts
        return _Weighing.apply(
            logits, experts, weights, self.config, _routes_fused(logits, bias, self.config)
        ), experts

    @torch.no_grad()
    def _count(self, experts: Tensor, token_mask: Tensor | None):
        if token_mask is None:
            ones = torch.ones_like(experts)
        else:
            ones = token_mask.to(experts.dtype).unsqueeze(-1).expand_as(experts)
        self.tokens_per_expert.scatter_add_(0, experts.reshape(-1), ones.reshape(-1))


def _recomputing() -> bool:
    """Whether this is the second forward that gradient checkpointing runs inside the backward pass."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


@use_experts_implementation
class LamoeExperts(nn.Module):
    """All routed experts of a layer: gate_up_proj [E, 2F, D] (gate, then up) and down_proj [E, D, F].

    `config._experts_implementation` chooses who computes them; this forward is "eager".
    """

    lamoe_forward = lamoe_experts_forward  # the registry is one for all revisions of this code in a process

    def __init__(self, config):
        super().__init__()
        self.num_experts = config.n_routed_experts
        self.hidden_dim = config.hidden_size
        self.intermediate_dim = config.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(self.num_experts, 2 * self.intermediate_dim, self.hidden_dim))
        self.down_proj = nn.Parameter(torch.empty(self.num_experts, self.hidden_dim, self.intermediate_dim))
        self.act_fn = ACT2FN[config.hidden_act]

    def reset_parameters(self, std: float):
        """Draw both weights; leaves alone what a checkpoint has filled."""
        init.normal_(self.gate_up_proj, mean=0.0, std=std)
        init.normal_(self.down_proj, mean=0.0, std=std)

    @torch.no_grad()
    def _load_from_state_dict(self, state_dict, prefix, *args):
        """Also take one tensor an expert, as checkpoints have them, and some of them, as one of their shards has.

        Trainer resumes by `load_state_dict`, without the conversion of `from_pretrained`, and would only report that
        there are no experts for this module (huggingface/transformers#48805).
        """
        up = self.gate_up_proj.shape[1] // 2
        places = {"gate": self.gate_up_proj[:, :up], "up": self.gate_up_proj[:, up:], "down": self.down_proj}
        for key in list(state_dict):
            found = re.fullmatch(re.escape(prefix) + r"(\d+)\.(gate|up|down)_proj\.weight", key)
            if found:
                places[found[2]][int(found[1])].copy_(state_dict.pop(key))
                for name in ("gate_up_proj", "down_proj"):
                    state_dict[prefix + name] = getattr(self, name)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Sum of each token's experts, weighted: [N, D] in `hidden_states`' dtype, summed in float32, in order.

        Args:
            hidden_states: [N, D].
            top_k_index: [N, K]; ids of `num_experts` and above are sentinels of expert parallelism: they give zero.
            top_k_weights: [N, K].
        """
        N, K = top_k_index.shape
        by_expert, order = top_k_index.reshape(-1).clamp(max=self.num_experts).sort(stable=True)
        counts = torch.bincount(by_expert, minlength=self.num_experts + 1).tolist()
        pieces = []
        local = order.split(counts)[:-1]  # without the sentinels' rows
        # unbound, so that the backward makes one gradient for all experts and not a whole one for each
        for rows, gate_up, down in zip(local, self.gate_up_proj.unbind(0), self.down_proj.unbind(0), strict=False):
            if len(rows):
                gate, up = F.linear(hidden_states[rows // K].to(gate_up.dtype), gate_up).chunk(2, dim=-1)
                pieces.append(F.linear(self.act_fn(gate) * up, down))
        pieces.append(hidden_states.new_zeros((counts[-1], self.hidden_dim), dtype=self.down_proj.dtype))
        inverse = torch.empty_like(order).scatter_(0, order, torch.arange(N * K, device=order.device))
        rows_NKD = torch.cat(pieces)[inverse].view(N, K, self.hidden_dim)
        real = top_k_index < self.num_experts
        weights = top_k_weights.masked_fill(~real, 0.0).to(torch.promote_types(rows_NKD.dtype, torch.float32))
        return (rows_NKD * weights.unsqueeze(-1)).sum(dim=1).to(hidden_states.dtype)


class LamoeMLP(nn.Module):
    """A gated feed-forward: a dense layer, or all shared experts of a layer side by side."""

    def __init__(self, config, intermediate_size: int):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, config.hidden_size, bias=False)
        self.act_fn = ACT2FN[config.hidden_act]
        self.numbers_a_token = 3 * intermediate_size + 3 * config.hidden_size  # that are held at once, about

    def forward(self, hidden_states: Tensor) -> Tensor:
        gate, up = two_linears(hidden_states, self.gate_proj, self.up_proj)
        return gated_linear(gate, up, self.down_proj, self.act_fn, activation_name(self.act_fn) == "silu")


class LamoeMoE(nn.Module):
    """Routed experts plus the shared ones, of which there may be none."""

    def __init__(self, config, layer_idx: int):
        super().__init__()
        self.config = config
        self.gate = LamoeTopkRouter(config, layer_idx)
        self.experts = LamoeExperts(config)
        shared_width = config.moe_intermediate_size * config.n_shared_experts
        self.shared_experts = LamoeMLP(config, shared_width) if shared_width else None

    @property
    def numbers_a_token(self) -> int:
        """How many numbers are held at once for each token, about: its rows at the experts, and the router's copy."""
        config = self.config
        copies = 1 if config._experts_implementation == NAME else 3  # the others gather, gate, weight apart
        rows = config.num_experts_per_tok * (config.hidden_size + config.moe_intermediate_size)
        return copies * rows + 3 * config.moe_intermediate_size * config.n_shared_experts + 4 * config.hidden_size

    def forward(
        self, hidden_states: Tensor, token_mask: Tensor | None = None, routing: Routing | None = None
    ) -> Tensor:
        """Feed `hidden_states` [B, T, D] forward; `token_mask` [B, T] is False at padding."""
        if self.config.router_nonfinite == "zero":
            finite = torch.isfinite(hidden_states).all(dim=-1, keepdim=True)
            hidden_states = torch.where(finite, hidden_states, 0.0)
        x, routed, shared = (hidden_states,) * 3 if self.shared_experts is None else spread(hidden_states)
        _, weights, experts = self.gate(x, None if token_mask is None else token_mask.reshape(-1), routing)
        fed = self.feed(routed.flatten(0, -2), experts, weights, shared_ND=shared.flatten(0, -2))
        return fed.view_as(hidden_states)

    def feed(
        self, x_ND: Tensor, experts: Tensor, weights: Tensor, residual: Tensor | None = None,
        shared_ND: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """The experts [N, K] of `x_ND` by their `weights`, the shared ones, and a `residual` [N, D] if given.

        `shared_ND` is `x_ND` for the shared experts, where their gradient goes a way of its own.
        """
        shared_ND = x_ND if shared_ND is None else shared_ND
        if self.shared_experts is None:
            fed = self.experts(x_ND, experts, weights)
        elif self._adds_shared_inside():
            if len(x_ND) * self.config.num_experts_per_tok <= self.config.n_routed_experts and not self.training:
                fed = self._few_tokens(x_ND, experts, weights, residual)
                if fed is not None:
                    return fed
            fed = self.experts(x_ND, experts, weights, shared=self.shared_experts(shared_ND))
        else:
            fed = self.experts(x_ND, experts, weights) + self.shared_experts(shared_ND)
        return fed if residual is None else residual + fed

    def _few_tokens(
        self, x_ND: Tensor, top_k_index: Tensor, top_k_weights: Tensor, residual: Tensor | None
    ) -> Tensor | None:
        """`feed` in two launches, if the kernels have that for so few tokens; None if not."""
        shared, routed = self.shared_experts, self.experts
        projections = (shared.gate_proj, shared.up_proj, shared.down_proj)
        modules = (shared, *projections)
        plain = type(shared) is LamoeMLP and all(type(projection) is nn.Linear for projection in projections)
        if not plain or any(m._forward_hooks or m._forward_pre_hooks or "forward" in m.__dict__ for m in modules):
            return None
        if getattr(routed, "_lamoe_options", DEFAULT_OPTIONS).batch_invariant or describe(routed) != ("fused", ""):
            return None
        from .kernels_moe import few_experts

        weights = tuple(projection.weight for projection in projections)
        act = activation_name(routed.act_fn)
        tensors = routed.gate_up_proj, routed.down_proj, weights
        return few_experts(x_ND, top_k_index, top_k_weights, *tensors, act, residual)

    def _adds_shared_inside(self) -> bool:
        """Whether the experts' call may add the shared output: nobody else looks at its result, or sums up several."""
        experts = self.experts
        return (
            type(experts) is LamoeExperts
            and experts.config._experts_implementation == NAME
            and not experts._is_expert_parallel
            and "forward" not in experts.__dict__  # replaced by expert or tensor parallelism, or by accelerate
            and not (experts._forward_hooks or experts._forward_pre_hooks)
            and not (experts._backward_hooks or experts._backward_pre_hooks)
        )
