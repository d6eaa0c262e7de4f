"""Balance of the experts in training: what the routers choose is counted, and moves their correction biases.

For Lamoe, and for every native class with routed experts: hooks count there, and the class stays as it is.

Letters: N tokens, E experts of a layer, K experts a token.
"""

import inspect
import math
import re
from collections import Counter
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .correction import move_biases, summed_over_ranks
from .moe import _recomputing, expert_scores

BIASES = ("e_score_correction_bias", "expert_bias")  # as the native classes call it; on router, block or a part
_INDEX_NAMES = ("top_k_index", "router_indices", "selected_experts")  # of the argument that holds a token's experts


def max_violation(counts_E: Tensor) -> float:
    """MaxVio = max load / mean load - 1 of one layer (arXiv 2408.15664, section 4.1); 0 is perfect balance."""
    return _max_violation(counts_E.detach().cpu().numpy())


def _max_violation(counts_E: np.ndarray) -> float:
    total = float(counts_E.sum())
    return float(counts_E.max()) * len(counts_E) / total - 1 if total else 0.0


@dataclass(frozen=True)
class LayerBalance:
    """One layer's balance since the last `RouterBalance.report`; the loads are of all ranks, without padding.

    Args:
        label: "layer_3", or the block's name where several blocks share that.
        max_violation: MaxVio of all steps together.
        max_violation_batch: MaxVio of the last step.
        dead_experts: experts that got no token.
        load_entropy: entropy of the experts' shares of the load, divided by log E: 1 is even.
        router_entropy: mean over tokens of the entropy of their normalised affinities, divided by log E: 1 is a router
            that prefers nobody, 0 one that is certain. Of Lamoe only; elsewhere None.
        bias_range: greatest less smallest correction bias; None without one.
        busiest: the expert with the highest load.
        load: tokens of each expert, all steps together.
    """

    label: str
    max_violation: float
    max_violation_batch: float
    dead_experts: int
    load_entropy: float
    router_entropy: float | None
    bias_range: float | None
    busiest: int
    load: tuple[int, ...]


class _Layer:
    """A layer with routed experts: where its choices can be seen, what they sum up to, and its bias."""

    def __init__(self, name: str, watched: nn.Module, owner: tuple[nn.Module, str] | None, num_experts: int):
        self.name = name
        self.watched = watched
        self.owner = owner
        self.num_experts = num_experts
        self.counts: Tensor | None = None
        self.entropy: Tensor | None = None

    @property
    def bias(self) -> Tensor | None:
        """The correction bias, if there is one and this rank has all of it."""
        return None if self.owner is None or self.is_sharded else getattr(*self.owner)

    @property
    def is_sharded(self) -> bool:
        return self.owner is not None and hasattr(getattr(*self.owner), "device_mesh")

    def count(self, index_NK: Tensor, real_N: Tensor | None):
        """Add a forward's choices; `real_N` is 0 at padding."""
        if self.counts is None or self.counts.device != index_NK.device:
            self.counts = torch.zeros(self.num_experts, dtype=torch.int64, device=index_NK.device)
        if real_N is None or len(real_N) != len(index_NK):
            ones = torch.ones_like(index_NK, dtype=torch.int64)
        else:
            ones = real_N.to(index_NK.device).unsqueeze(-1).expand_as(index_NK)
        self.counts.scatter_add_(0, index_NK.reshape(-1).long(), ones.reshape(-1))

    def add_entropy(self, logits_NE: Tensor, scoring_func: str, mask_N: Tensor | None):
        scores = expert_scores(logits_NE.detach(), scoring_func)
        entropy_N = torch.special.entr(scores / scores.sum(dim=-1, keepdim=True)).sum(dim=-1)
        total = (entropy_N if mask_N is None else entropy_N * mask_N).sum()
        self.entropy = total if self.entropy is None else self.entropy + total


class RouterBalance:
    """Counts what the routers of a model choose in training, and moves their correction biases towards balance.

    What `BalanceCallback` does within Trainer, for loops of one's own and any model: Lamoe, or a native class with
    routed experts, plain or wrapped (PEFT, DistributedDataParallel). Counted are forwards in training mode with
    gradients, without padding (a 2-D `attention_mask`) and without the recomputation of gradient checkpointing.
    Where a layer sees other tokens than the mask has, as in vision towers, all of them count.

        balance = RouterBalance(model)
        for batch in batches:
            model(**batch).loss.backward()
            optimizer.step(), optimizer.zero_grad()
            balance.step(1e-3)
        balance.close()

    A correction bias must be float32: at 1, bfloat16 does not see a step of 1e-3. One that a native class lets become
    bfloat16 (by `.to()` or `dtype=`) is made float32 in place by the first `step` that moves it.

    Args:
        model: moved to its device already, or not.
        group: data-parallel process group over which counts are summed; None is the default one, if there is one.

    Raises:
        ValueError: the model has no routed experts that can be watched.
    """

    def __init__(self, model: nn.Module, group=None):
        self.group = group
        self.lamoe = next((m for m in model.modules() if hasattr(m, "update_router_bias")), None)
        self.layers = self._lamoe_layers(model) if self.lamoe is not None else list(_native_layers(model))
        if not self.layers:
            raise ValueError(
                f"{type(model).__name__} has no routed experts to balance: it is no Lamoe model, and has no module "
                f"...Experts whose forward takes {', '.join(_INDEX_NAMES[:-1])} or {_INDEX_NAMES[-1]}."
            )
        self.load: list[Tensor] = []
        self.last: list[Tensor] = []
        self.entropy: list[Tensor] = []
        self._real: Tensor | None = None
        self._uncounted = False
        self._handles = []
        for name, module in model.named_modules():
            prefix = f"{name}." if name else ""
            if isinstance(module, PreTrainedModel) and any(layer.name.startswith(prefix) for layer in self.layers):
                self._watch_model(module)
        for layer in self.layers:
            self._watch_layer(layer)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.close()

    def close(self):
        """Remove the hooks; the model is as it was, but for its biases."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    @torch.no_grad()
    def step(self, speed: float = 1e-3) -> list[Tensor]:
        """Move every bias by the counts since the last call: b += speed · sign(mean - count). Once per optimizer step.

        Every rank must call it. Nothing waits for a device.

        Args:
            speed: step of the bias; 0 only collects the counts.

        Returns:
            for each layer the counts [E] that were used, int64, over all ranks.

        Raises:
            ValueError: a bias is sharded over ranks.
        """
        if self.lamoe is not None:
            used = self.lamoe.update_router_bias(speed, self.group)
            entropy = [layer.entropy for layer in self.layers if layer.entropy is not None]
            if len(entropy) == len(self.layers):
                entropy = summed_over_ranks([e.view(1) for e in entropy], self.group)
                self.entropy = _added(self.entropy, entropy)
        else:
            seen = next((layer.counts.device for layer in self.layers if layer.counts is not None), None)
            for layer in self.layers:
                if layer.counts is None:  # another rank may have counted it
                    layer.counts = torch.zeros(layer.num_experts, dtype=torch.int64, device=seen)
            used = summed_over_ranks([layer.counts for layer in self.layers], self.group)
            moved = [i for i, layer in enumerate(self.layers) if layer.owner is not None] if speed else []
            move_biases([_float32_bias(self.layers[i]) for i in moved], [used[i] for i in moved], speed)
        self.last = used
        self.load = _added(self.load, used)
        self._forget()
        return used

    def skip(self):
        """Forget the counts since the last `step`: the optimizer skipped it."""
        if self.lamoe is not None:
            for router in self.lamoe.routers:
                router.reset_counts()
        self._forget()

    def report(self) -> list[LayerBalance]:
        """Each layer's balance over the steps since the last call, and start anew; none if there was no step."""
        if not self.load:
            return []
        # All in one copy: whoever logs waits for the device, which then has nothing to do.
        counts = torch.cat([*self.load, *self.last])
        kept = [i for i, layer in enumerate(self.layers) if layer.bias is not None]
        spans = [torch.aminmax(self.layers[i].bias) for i in kept]
        more = [*self.entropy, *(span.max.double() - span.min for span in spans)]
        found = torch.cat([counts.double(), *(x.reshape(1).double().to(counts.device) for x in more)]).cpu().numpy()
        ends = np.cumsum([layer.num_experts for layer in self.layers] * 2)
        *counts, more = np.split(found, ends)
        entropy, spans = more[: len(self.entropy)], dict(zip(kept, more[len(self.entropy) :], strict=True))
        load, last = counts[: len(self.layers)], counts[len(self.layers) :]
        rows = [
            self._row(label, load[i], last[i], entropy[i] if len(entropy) else None, spans.get(i))
            for i, label in enumerate(self.labels)
        ]
        self.load, self.last, self.entropy = [], [], []
        return rows

    def _row(self, label: str, load: np.ndarray, last: np.ndarray, entropy: float | None, bias_range: float | None):
        total = float(load.sum())
        shares = load[load > 0] / max(total, 1.0)
        most = math.log(len(load)) if len(load) > 1 else 1.0
        tokens = total / (self.lamoe.config.num_experts_per_tok if self.lamoe is not None else 1)
        return LayerBalance(
            label=label,
            max_violation=_max_violation(load),
            max_violation_batch=_max_violation(last),
            dead_experts=int((load == 0).sum()),
            load_entropy=float(-(shares * np.log(shares)).sum()) / most,
            router_entropy=None if entropy is None or not tokens else float(entropy) / tokens / most,
            bias_range=None if bias_range is None else float(bias_range),
            busiest=int(load.argmax()),
            load=tuple(load.astype(np.int64).tolist()),
        )

    @property
    def labels(self) -> list[str]:
        """What the layers are called in logs."""
        found = [re.search(r"\blayers\.(\d+)\b", layer.name) for layer in self.layers]
        short = [f"layer_{match[1]}" if match else None for match in found]
        often = Counter(short)
        names = [layer.name for layer in self.layers]
        return [s if s and often[s] == 1 else name for s, name in zip(short, names, strict=True)]

    def state_dict(self) -> dict:
        """What a checkpoint must hold to go on as if nothing had happened, as plain numbers; biases by layer name.

        Biases are in it since not every checkpoint has them: one of an adapter has not, and one of a native class may
        have them in bfloat16.
        """
        biases = {layer.name: layer.bias.tolist() for layer in self.layers if layer.bias is not None}
        load = {name: [x.tolist() for x in getattr(self, name)] for name in ("load", "last", "entropy")}
        return {"biases": biases, **load}

    @torch.no_grad()
    def load_state_dict(self, state: dict):
        """Go on from a `state_dict`.

        Raises:
            ValueError: it is of a model with other layers.
        """
        names = [layer.name for layer in self.layers if layer.bias is not None]
        if list(state["biases"]) != names:
            raise ValueError(
                f"The saved balance is of the layers {', '.join(state['biases']) or '(none)'}, the model has "
                f"{', '.join(names) or '(none)'}; resume with the model that was saved."
            )
        for layer in self.layers:
            if layer.bias is not None:
                saved = torch.tensor(state["biases"][layer.name], dtype=torch.float32, device=layer.bias.device)
                if not torch.equal(saved, layer.bias.float()):
                    _float32_bias(layer).copy_(saved)
        device = next((layer.bias.device for layer in self.layers if layer.bias is not None), None)
        if device is None:
            device = next(self.layers[0].watched.parameters()).device
        for name, dtype in (("load", torch.int64), ("last", torch.int64), ("entropy", torch.float32)):
            setattr(self, name, [torch.tensor(x, dtype=dtype, device=device) for x in state[name]])

    def _forget(self):
        for layer in self.layers:
            layer.entropy = None
        counted = [layer.counts for layer in self.layers if layer.counts is not None]
        if counted:
            torch._foreach_zero_(counted)

    def _lamoe_layers(self, model: nn.Module) -> list[_Layer]:
        names = {module: name for name, module in model.named_modules()}
        layers = []
        for router in self.lamoe.routers:
            owner = (router, "e_score_correction_bias") if hasattr(router, "e_score_correction_bias") else None
            layers.append(_Layer(names[router].removesuffix(".gate"), router, owner, router.tokens_per_expert.numel()))
        return layers

    def _watch_model(self, module: nn.Module):
        names = list(inspect.signature(module.forward).parameters)
        position = names.index("attention_mask") if "attention_mask" in names else None

        def enter(module, args, kwargs):
            mask = kwargs.get("attention_mask")
            if mask is None and position is not None and position < len(args):
                mask = args[position]
            if self.lamoe is None and isinstance(mask, Tensor) and mask.dim() == 2:  # Lamoe tells its routers itself
                self._real = mask.ne(0).long().reshape(-1)
            self._uncounted = not torch.is_grad_enabled()

        def leave(module, args, output):
            self._real, self._uncounted = None, False

        self._handles.append(module.register_forward_pre_hook(enter, with_kwargs=True))
        self._handles.append(module.register_forward_hook(leave, always_call=True))

    def _watch_layer(self, layer: _Layer):
        if self.lamoe is None:
            hook = layer.watched.register_forward_pre_hook(self._native_hook(layer), with_kwargs=True, prepend=True)
            self._handles.append(hook)
            return

        def enter(router, args, kwargs):
            if self._uncounted and router.training:  # it counts by itself: a mask without tokens
                x = args[0] if args else kwargs["hidden_states"]
                return (x, torch.zeros(x.shape[:-1], dtype=torch.bool, device=x.device).flatten()), {}
            return None

        def leave(router, args, kwargs, output):
            if router.training and not self._uncounted and not _recomputing():
                mask = args[1] if len(args) > 1 else kwargs.get("token_mask")
                layer.add_entropy(output[0], router.config.scoring_func, mask)

        self._handles.append(layer.watched.register_forward_pre_hook(enter, with_kwargs=True))
        self._handles.append(layer.watched.register_forward_hook(leave, with_kwargs=True))

    def _native_hook(self, layer: _Layer):
        def enter(experts, args, kwargs):
            if not experts.training or self._uncounted or _recomputing():
                return
            index = args[1] if len(args) > 1 else next(kwargs[name] for name in _INDEX_NAMES if name in kwargs)
            layer.count(index.detach().flatten(0, -2), self._real)

        return enter


def _added(total: list[Tensor], more: list[Tensor]) -> list[Tensor]:
    return torch._foreach_add(total, more) if total else [x.clone() for x in more]


def _float32_bias(layer: _Layer) -> Tensor:
    """The layer's bias, made float32 in place if it is not."""
    if layer.is_sharded:
        raise ValueError(f"The correction bias of {layer.name} is sharded over ranks and cannot be moved; use DDP.")
    bias = layer.bias
    if bias.dtype != torch.float32:
        bias.data = bias.data.float()
    return bias


def _native_layers(model: nn.Module):
    """The experts of every native layer, with the bias and the number of experts of the block around them."""
    modules = dict(model.named_modules())
    for name, module in modules.items():
        if not type(module).__name__.endswith("Experts") or ".original_module" in name:
            continue
        parameters = list(inspect.signature(type(module).forward).parameters)
        if len(parameters) < 3 or parameters[2] not in _INDEX_NAMES:
            continue
        block = re.sub(r"\.?experts(\.base_layer)*$", "", name)  # PEFT wraps experts whose tensors get a LoRA
        owner = None
        for part_name, part in modules[block].named_modules():
            if "original_module" not in part_name and owner is None:
                owner = next(((part, bias) for bias in BIASES if isinstance(getattr(part, bias, None), Tensor)), None)
        # Under expert parallelism the experts know only how many there are on this rank; the router knows them all.
        others = [child for child in modules[block].children() if child is not module]
        known = [child.num_experts for child in (*others, module) if hasattr(child, "num_experts")]
        if owner is None and not known:
            continue
        yield _Layer(block, module, owner, getattr(*owner).numel() if owner else known[0])
