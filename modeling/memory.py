"""What training takes on one GPU: parameters, gradients, optimizer, activations, and what to do when it is too much.

Letters: D hidden, H heads, C latent rank, P plain and R rotary width of a query-key head, V value width, E experts, K
experts a token, F expert width, W vocabulary. Counted is what autograd keeps, tensor by tensor, and not what kernels
use in passing, nor what the allocator loses to gaps: allow a tenth more.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import nn

from .modeling_lamoe import LamoeForCausalLM
from .token_loss import CHUNK

GIB = 2**30
# Bytes of state for each trained number, as multiples of its own size, and in bytes where that does not matter.
_STATES = {
    "adamw": (2, 0),
    "adamw_8bit": (0, 2),
    "adafactor": (0, 0),
    "sgd": (0, 0),
    "momentum": (1, 0),
    "muon": (1, 0),
}
ATTENTION_AND_SHARED = (
    "q_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "o_proj", "shared_experts.gate_proj",
    "shared_experts.up_proj", "shared_experts.down_proj",
)  # fmt: skip


@dataclass(frozen=True)
class Setting:
    """What the plan is for; see `memory_plan`."""

    config: object
    batch: int
    length: int
    optimizer: str = "adamw"
    dtype: torch.dtype = torch.bfloat16
    checkpointing: bool = False
    lora_rank: int | None = None
    lora_targets: tuple[str, ...] = ATTENTION_AND_SHARED
    accumulation: int = 1
    experts: str = "lamoe"
    expert_recompute: bool = False
    skip_logits: bool = False


@dataclass(frozen=True)
class MemoryPlan:
    """Numbers and bytes of one training step of `setting`; print it."""

    setting: Setting
    parameters: int
    trained: int
    weights: int
    gradients: int
    optimizer: int
    activations: int
    loss: int
    a_layer: int

    @property
    def peak(self) -> int:
        """The most bytes at once: when the loss is computed, or when the last gradient is."""
        kept = self.gradients if self.setting.accumulation > 1 else 0
        layer = min(self.a_layer, self.activations)
        return self.weights + self.optimizer + max(kept + self.activations + self.loss, self.gradients + layer)

    def __str__(self) -> str:
        s = self.setting
        what = "full" if s.lora_rank is None else f"LoRA r={s.lora_rank}"
        rows = [
            (f"weights, {self.parameters:,} parameters in {str(s.dtype)[6:]}", self.weights),
            (f"gradients, {self.trained:,} trained ({what})", self.gradients),
            (f"optimizer, {s.optimizer}", self.optimizer),
            (f"activations, {s.batch} x {s.length:,} tokens{', checkpointed' * s.checkpointing}", self.activations),
            ("logits and their gradient" if not s.skip_logits else "loss in chunks", self.loss),
            ("peak, without the allocator's gaps", self.peak),
        ]
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"{name:{width}}  {size / GIB:8.2f} GiB" for name, size in rows)

    def ways_out(self) -> list[str]:
        """Up to three changes that lower the peak by 3 % or more, the one that costs least first."""
        s = self.setting
        changes = [
            ("skip_logits=True: no logits are held, none returned", {"skip_logits": True}),
            (f"batch size {s.batch // 2}, twice the accumulation", {"batch": s.batch // 2, "accumulation": 2}),
            ("expert_recompute=True: a quarter more arithmetic in the experts", {"expert_recompute": True}),
            ("gradient checkpointing: about a third more time", {"checkpointing": True}),
            ("an optimizer in 8 bits (adamw_8bit)", {"optimizer": "adamw_8bit"}),
            (f"half the length, {s.length // 2}", {"length": s.length // 2}),
            ("LoRA of rank 16 in place of full training", {"lora_rank": s.lora_rank or 16}),
        ]
        found = []
        for name, change in changes:
            if all(getattr(s, key) == value for key, value in change.items()) or not change.get("batch", 1):
                continue
            if s.optimizer != "adamw" and "optimizer" in change:
                continue
            less = self.peak - plan_of(replace(s, **change)).peak
            if less >= 0.03 * self.peak:
                found.append(f"{name}: {less / GIB:.1f} GiB less")
        return found[:3]


def memory_plan(config, batch: int, length: int, **setting) -> MemoryPlan:
    """Plan the memory of training a Lamoe model of `config` on one GPU, `batch` sequences of `length` tokens at once.

    Args:
        optimizer: one of adamw, adamw_8bit, adafactor, sgd, momentum, muon.
        dtype: of the weights, which everything is computed in; routers stay in float32.
        checkpointing: whether decoder layers keep their input alone.
        lora_rank, lora_targets: rank of the LoRA and endings of the names of the layers that get one; rank None trains
            everything.
        accumulation: forwards an optimizer step; from 2 on gradients stand beside the activations.
        experts: the experts' implementation, "lamoe" or any other (counted as grouped_mm).
        expert_recompute, skip_logits: fields of the configuration, taken from it if not given.

    Raises:
        ValueError: batch, length or accumulation below 1, or an optimizer or dtype that is not known.
    """
    setting.setdefault("expert_recompute", config.expert_recompute)
    setting.setdefault("skip_logits", config.skip_logits)
    return plan_of(Setting(config, batch, length, **setting))


def plan_of(s: Setting) -> MemoryPlan:
    """The plan of a setting."""
    if min(s.batch, s.length, s.accumulation) < 1:
        raise ValueError(
            f"batch={s.batch}, length={s.length} and accumulation={s.accumulation} must all be at least 1."
        )
    if s.optimizer not in _STATES:
        raise ValueError(f"optimizer={s.optimizer!r} is not one of {', '.join(_STATES)}.")
    if s.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"dtype={s.dtype} is not one of torch.float32, torch.bfloat16, torch.float16.")
    with torch.device("meta"):
        model = LamoeForCausalLM._from_config(s.config, dtype=s.dtype)
    parameters = list(model.parameters())
    weights = _bytes(parameters) + _bytes(model.buffers())
    trained = [(p.numel(), p.element_size()) for p in parameters]
    if s.lora_rank is not None:
        trained = [(numel, 4 if s.dtype == torch.float16 else s.dtype.itemsize) for numel in _lora(model, s)]
        weights += sum(numel * size for numel, size in trained)
    times, plus = _STATES[s.optimizer]
    tokens, layers = s.batch * s.length, [_layer(s, i) for i in range(s.config.num_hidden_layers)]
    kept = [_input(s)] * len(layers) if s.checkpointing else layers
    around = 2 * s.config.hidden_size * s.dtype.itemsize + 4 * s.config.qk_rope_head_dim  # last norm, angles
    largest = max(layers, default=0)
    return MemoryPlan(
        setting=s,
        parameters=sum(p.numel() for p in parameters),
        trained=sum(numel for numel, _ in trained),
        weights=weights,
        gradients=sum(numel * size for numel, size in trained),
        optimizer=sum(numel * (times * size + plus) for numel, size in trained),
        activations=tokens * (sum(kept) + around),
        loss=_loss(s, tokens),
        a_layer=tokens * largest,
    )


def _bytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _lora(model: nn.Module, s: Setting) -> list[int]:
    """Numbers of the two factors of every layer that gets a LoRA."""
    chosen = (
        module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and any(f".{name}".endswith(f".{target}") for target in s.lora_targets)
    )
    return [s.lora_rank * (module.in_features + module.out_features) for module in chosen]


def _input(s: Setting) -> int:
    """Bytes a token that a checkpointed layer keeps: its input, and the experts that it chose."""
    return s.config.hidden_size * s.dtype.itemsize + 8 * s.config.num_experts_per_tok


def _layer(s: Setting, index: int) -> int:
    """Bytes a token that decoder layer `index` keeps for its backward."""
    c, size = s.config, s.dtype.itemsize
    D, H, C = c.hidden_size, c.num_attention_heads, c.kv_lora_rank
    P, R, V = c.qk_nope_head_dim, c.qk_rope_head_dim, c.v_head_dim
    queries = 2 * (c.q_lora_rank or 0) + H * (P + R)  # the latent before and behind its norm, and what SDPA keeps
    latents = 2 * C + R
    keys_and_values = H * (P + R) + H * (P + V)  # values are a view of kv_b_proj's output
    numbers = 2 * D + queries + latents + keys_and_values + H * V  # residual stream and its norm
    exact = 4 * H + 8  # log-sum-exps, and the norms' own
    numbers += 2 * D  # the residual stream behind attention, and its norm
    if index not in c.moe_layers:
        return (numbers + 2 * c.intermediate_size) * size + exact
    K, F = c.num_experts_per_tok, c.moe_intermediate_size
    rows = 2 * F * (not s.expert_recompute) if s.experts == "lamoe" else 2 * D + 4 * F
    numbers += 2 * F * c.n_shared_experts + K * rows
    return numbers * size + exact + 4 * c.n_routed_experts + 12 * K


def _loss(s: Setting, tokens: int) -> int:
    W, chunk = s.config.vocab_size, 2 * 4 * min(CHUNK, tokens * s.config.vocab_size)
    if s.skip_logits:
        return chunk
    if s.dtype == torch.float32:
        return 3 * 4 * tokens * W  # Transformers' loss: logits, their log-softmax, its gradient
    return 2 * s.dtype.itemsize * tokens * W + chunk


@contextmanager
def memory_explained(plan: MemoryPlan) -> Iterator[None]:
    """Add the plan and the ways out to the error when the memory of the block's GPU ends.

    Raises:
        torch.OutOfMemoryError: what the block raised, with the plan behind its message.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        ways = [f"{number}. {way}" for number, way in enumerate(plan.ways_out(), start=1)]
        raise torch.OutOfMemoryError("\n".join([str(error), "", str(plan), "", "Ways out:", *ways])) from error
