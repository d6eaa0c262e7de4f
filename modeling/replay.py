"""Routing that is told and returned: training repeats the experts that generation has used (arXiv 2510.11370).

The layout is that of vLLM's and SGLang's `routed_experts`, [tokens, layers, K] a sequence, with a batch before it.
Letters: B sequences, T tokens, L layers with experts, E experts, K experts a token.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast

from .moe import Routing

UNSET = -1  # the id of tokens that nothing is known of: they are routed anew


@dataclass
class LamoeModelOutput(MoeModelOutputWithPast):
    """Transformers' output, and `routed_experts` [B, T, L, K] int64 if they were asked for."""

    routed_experts: torch.LongTensor | None = None


@dataclass
class LamoeCausalLMOutput(MoeCausalLMOutputWithPast):
    """Transformers' output, `routed_experts` [B, T, L, K] int64 if they were asked for, and `mtp_loss`.

    The latter is the mean cross entropy of the multi-token-prediction layers' targets, averaged over depths, without
    its coefficient; None where it was not computed.
    """

    routed_experts: torch.LongTensor | None = None
    mtp_loss: Tensor | None = None


def routings(config, x_BTD: Tensor, given: Tensor | Sequence[Tensor] | None, returned: bool) -> list[Routing | None]:
    """What each decoder layer's router is told and notes in this forward; None where it need not note anything.

    Args:
        given: integers [B, T, L, K], or for each layer [B, T, K]; L counts the layers with experts, or all layers, as
            servers do, of which the dense ones are not looked at. A token with a negative id (`UNSET`) is routed anew.
        returned: whether the choice is wanted afterwards.

    Raises:
        ValueError: shape or ids do not fit; the message says what was expected.
    """
    count, sparse = config.num_hidden_layers, config.moe_layers
    compiling = torch.compiler.is_compiling()  # within, checkpointing takes no object that is written to
    if given is None:
        if not returned and (compiling or not torch.is_grad_enabled()):
            return [None] * count
        return [Routing() if i in sparse else None for i in range(count)]
    given = _checked(config, x_BTD, given if isinstance(given, Tensor) else _joined(config, x_BTD, given))
    own = given.shape[2] == len(sparse)
    layers = iter(given.unbind(2))
    return [
        Routing(told) if i in sparse else None
        for i, told in ((i, next(layers) if i in sparse or not own else None) for i in range(count))
    ]


def stacked(layers: list[Routing | None], x_BTD: Tensor) -> Tensor:
    """The experts that a forward has used, [B, T, L, K] int64."""
    chosen = [routing.chosen.view(*x_BTD.shape[:2], -1).to(x_BTD.device) for routing in layers if routing is not None]
    return torch.stack(chosen, dim=2)


def _joined(config, x_BTD: Tensor, given: Sequence[Tensor]) -> Tensor:
    if not given:
        raise ValueError(f"routed_experts is empty; {_expected(config, x_BTD)}.")
    shapes = [list(layer.shape) for layer in given]
    if any(shape != shapes[0] for shape in shapes):
        raise ValueError(f"The layers of routed_experts have different shapes, {shapes}; {_expected(config, x_BTD)}.")
    return torch.stack([layer.to(x_BTD.device) for layer in given], dim=2 if given[0].dim() == 3 else 0)


def _expected(config, x_BTD: Tensor) -> str:
    B, T = x_BTD.shape[:2]
    return (
        f"it must be [B={B}, T={T}, L, K={config.num_experts_per_tok}], or for each layer [B, T, K], with L="
        f"{len(config.moe_layers)} layers that have experts, or all {config.num_hidden_layers}; tokens that nothing "
        f"is known of get {UNSET}"
    )


def _checked(config, x_BTD: Tensor, given: Tensor) -> Tensor:
    (B, T), K, E = x_BTD.shape[:2], config.num_experts_per_tok, config.n_routed_experts
    if given.is_floating_point() or given.dtype == torch.bool:
        raise ValueError(f"routed_experts are {given.dtype}; they must be integers, ids of experts.")
    legal = (len(config.moe_layers), config.num_hidden_layers)
    if given.dim() != 4 or given.shape[:2] != (B, T) or given.shape[2] not in legal or given.shape[3] != K:
        raise ValueError(f"routed_experts are {list(given.shape)}; {_expected(config, x_BTD)}.")
    given = given.to(x_BTD.device, torch.int64)
    if torch.compiler.is_compiling():
        return given
    used = given if given.shape[2] == legal[0] else given[:, :, config.moe_layers]
    known = used[(used >= 0).all(dim=-1)]
    in_order = known.sort(dim=-1).values
    twice = (in_order[:, 1:] == in_order[:, :-1]).any(dim=-1)
    wrong = twice | (in_order[:, -1] >= E)
    if wrong.any():
        ids = known[wrong][0].tolist()
        raise ValueError(
            f"routed_experts hold {ids} for a token; a token's {K} ids must be different and below "
            f"n_routed_experts={E}. Tokens that nothing is known of get {UNSET}."
        )
    return given


class RoutedExperts:
    """What `record_routed_experts` has seen."""

    def __init__(self):
        self._steps: list[list[Tensor]] = []

    def experts(self, length: int | None = None) -> Tensor:
        """[B, T, L, K] int64 of all tokens that went through the model, in the order of its forwards.

        Args:
            length: tokens of the finished sequences; those that no forward has seen, as the last one that was
                generated, get `UNSET`. None is those that were seen.

        Raises:
            ValueError: there was no forward, its batch has changed, or more tokens were seen than `length`.
        """
        layers = [torch.stack(list(step), dim=2) for step in zip(*self._steps, strict=True)]
        if not layers:
            raise ValueError("No forward was recorded; run the model, or its generate, inside the `with` block.")
        batches = {len(step) for step in layers}
        if len(batches) > 1:
            raise ValueError(f"The batch has changed between forwards: {sorted(batches)}; record one generate alone.")
        seen = torch.cat(layers, dim=1)
        missing = 0 if length is None else length - seen.shape[1]
        if missing < 0:
            raise ValueError(
                f"{seen.shape[1]} tokens were seen, more than length={length}; record one generate alone."
            )
        return F.pad(seen, (0, 0, 0, 0, 0, missing), value=UNSET)


@contextmanager
def record_routed_experts(model) -> Iterator[RoutedExperts]:
    """Note the experts of every token that goes through `model` in the block, a `generate` included.

    Sampling and greedy search alone: beams change places, and candidates that assistants offer are thrown away.
    Decode steps are not recorded as CUDA graphs meanwhile.
    """
    found = RoutedExperts()
    found._steps = [[] for _ in model.routers]
    handles = []
    try:
        for steps, router in zip(found._steps, model.routers, strict=True):

            def note(module, inputs, output, steps=steps):
                steps.append(output[2].view(*inputs[0].shape[:-1], -1))

            handles.append(router.register_forward_hook(note))
        yield found
    finally:
        for handle in handles:
            handle.remove()
