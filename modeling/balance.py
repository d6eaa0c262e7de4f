"""Balance of the experts in training with Trainer: the bias moves once per optimizer step, the load is logged."""

import torch
from torch import Tensor
from transformers import TrainerCallback


def max_violation(counts_E: Tensor) -> float:
    """MaxVio = max load / mean load - 1 of one layer (arXiv 2408.15664, section 4.1); 0 is perfect balance."""
    counts = counts_E.double()
    return float(counts.max() / counts.mean().clamp(min=torch.finfo(torch.double).tiny) - 1) if counts.any() else 0.0


class BalanceCallback(TrainerCallback):
    """Auxiliary-loss-free load balancing (DeepSeek-V3, arXiv 2412.19437, section 2.1.2) for Trainer.

    After each optimizer step that was not skipped it calls `model.update_router_bias(speed)`; with each log it adds
    `max_violation`, the mean over layers of MaxVio since the last log, and `dead_experts`, how many got no token then.

    Args:
        speed: step of the bias; 0 only logs.
    """

    def __init__(self, speed: float = 1e-3):
        self.speed = speed
        self.load: list[Tensor] = []

    def on_step_end(self, args, state, control, model=None, optimizer=None, **kwargs):
        """Move the bias, unless a loss scaler skipped the optimizer step."""
        model = _unwrapped(model)
        if getattr(optimizer, "step_was_skipped", False):
            for router in model.routers:
                router.reset_counts()
            return
        counts = [layer.cpu() for layer in model.update_router_bias(self.speed)]
        self.load = [a + b for a, b in zip(self.load, counts, strict=True)] if self.load else counts

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Add the load since the last log to Trainer's own logs."""
        if self.load and logs is not None and "loss" in logs:
            load = {
                "max_violation": sum(map(max_violation, self.load)) / len(self.load),
                "dead_experts": int(sum((layer == 0).sum() for layer in self.load)),
            }
            logs.update(load)  # for the callbacks after this one, which report
            state.log_history[-1].update(load)  # Trainer has copied the logs there already
            self.load = []


def _unwrapped(model):
    """The Lamoe model inside DistributedDataParallel, torch.compile or a PEFT wrapper."""
    for inner in ("module", "_orig_mod", "base_model", "model"):
        while not hasattr(model, "update_router_bias") and hasattr(model, inner):
            model = getattr(model, inner)
    if not hasattr(model, "update_router_bias"):
        raise ValueError(f"BalanceCallback found no Lamoe model in {type(model).__name__}.")
    return model
