"""The multi-token-prediction loss in Trainer's logs, and the schedule of its coefficient."""

from collections.abc import Callable

from transformers import TrainerCallback


class MTPCallback(TrainerCallback):
    """Logs `mtp_loss`, the mean cross entropy of the multi-token-prediction layers since the last log, over all ranks.

    Args:
        schedule: the coefficient by the share of the steps that are done, 0 to 1; None leaves that of the
            configuration. `lambda done: 0.3 if done < 10 / 14.8 else 0.1` is DeepSeek-V3's (section 4.2).

    Raises:
        ValueError: with `schedule`, a coefficient is not positive: what the layers' gradients are needed for is
            decided once, before training.
    """

    def __init__(self, schedule: Callable[[float], float] | None = None):
        self.schedule = schedule

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        """Refuse to start a schedule where training has been told to leave the layers out."""
        if self.schedule is not None and not _causal_lm(model).config.mtp_loss_coef > 0:
            raise ValueError("mtp_loss_coef=0 leaves the layers out; a schedule needs a positive one to begin with.")

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        """Set the coefficient of the step."""
        if self.schedule is None:
            return
        coefficient = float(self.schedule(state.global_step / max(state.max_steps, 1)))
        if not coefficient > 0:
            raise ValueError(
                f"The schedule gives mtp_loss_coef={coefficient} at step {state.global_step}; keep it > 0."
            )
        _causal_lm(model).config.mtp_loss_coef = coefficient

    def on_log(self, args, state, control, logs=None, model=None, **kwargs):
        """Add the loss since the last log to Trainer's own logs."""
        if logs is None or "loss" not in logs:
            return
        loss = _causal_lm(model).collect_mtp_loss()
        if loss is not None:
            logs["mtp_loss"] = loss  # for the callbacks after this one, which report
            state.log_history[-1]["mtp_loss"] = loss  # Trainer has copied the logs there already


def _causal_lm(model):
    """The Lamoe model inside DistributedDataParallel, torch.compile or a PEFT wrapper."""
    for module in model.modules():
        if hasattr(type(module), "collect_mtp_loss"):
            return module
    raise ValueError(f"MTPCallback found no LamoeForCausalLM in {type(model).__name__}.")
