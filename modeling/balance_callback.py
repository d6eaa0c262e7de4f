"""Balance of the experts in Trainer and TRL: the speed of the correction bias over a training, its state, its logs."""

import math
import sys
from dataclasses import fields

from transformers import TrainerCallback
from transformers.trainer_callback import CallbackHandler, ExportableState
from transformers.utils import logging

from .balance import LayerBalance, RouterBalance

logger = logging.get_logger(__name__)

SCHEDULES = ("constant", "linear", "cosine")


def bias_speed(
    step: int, total: int, speed: float, schedule: str = "constant", warmup: float = 0.0, stop: float = 1.0
) -> float:
    """Step of the correction bias after optimizer step `step` (from 1) of `total`.

    It rises in a line over the share `warmup` of the training, then stays at `speed` or falls to 0 in a line or half a
    cosine, and is 0 after the share `stop` (DeepSeek-V3: constant 1e-3, stop 0.966).

    Raises:
        ValueError: an argument is out of its range.
    """
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule={schedule!r} is not one of {', '.join(map(repr, SCHEDULES))}.")
    if speed < 0:
        raise ValueError(f"speed={speed} is negative, which unbalances; use 1e-3, or 0 to leave the bias alone.")
    if not 0 <= warmup <= stop <= 1:
        raise ValueError(f"warmup={warmup} and stop={stop} are shares of the training: 0 <= warmup <= stop <= 1.")
    if step > stop * total:
        return 0.0
    if step < warmup * total:
        return speed * step / (warmup * total)
    done = (step - 1 - warmup * total) / max((stop - warmup) * total, 1)
    done = min(max(done, 0.0), 1.0)
    if schedule == "linear":
        return speed * (1 - done)
    return speed * (1 + math.cos(math.pi * done)) / 2 if schedule == "cosine" else speed


class BalanceCallback(TrainerCallback, ExportableState):
    """Auxiliary-loss-free load balancing (DeepSeek-V3, arXiv 2412.19437, section 2.1.2) for Trainer and TRL.

    For Lamoe and every native class with routed experts (see `RouterBalance`). After each optimizer step it moves the
    correction biases, if any, by the counts of that step over accumulation steps and ranks; of a step that a loss
    scaler skipped, the counts are dropped. Each log gets: `max_violation`, MaxVio of all steps since the last log, and
    `max_violation_batch`, that of the last step, as the mean over layers; `dead_experts`, their number in all layers
    since the last log; `load_entropy` and, for Lamoe, `router_entropy`, means over layers; `bias_range`, the largest;
    and `bias_speed`; see `LayerBalance`. Biases, and what was counted since the last log, are saved in Trainer's
    checkpoints (trainer_state.json).

    Args:
        speed: step of the bias; 0, the default, leaves the biases alone and only logs, as it should be in fine-tuning.
            DeepSeek-V3 was pretrained with 1e-3.
        schedule, warmup, stop: as for `bias_speed`, over the `max_steps` of the training.
        per_layer: log each layer too, as `max_violation/layer_3`.
        alarm: MaxVio since the last log past which a layer is warned of, once; None never warns.
        group: data-parallel process group; None is the default one, if there is one.

    Raises:
        ValueError: an argument is out of its range; or, when training begins, the model has no routed experts.
    """

    def __init__(
        self,
        speed: float = 0.0,
        schedule: str = "constant",
        warmup: float = 0.0,
        stop: float = 1.0,
        per_layer: bool = False,
        alarm: float | None = 5.0,
        group=None,
    ):
        bias_speed(1, 1, speed, schedule, warmup, stop)
        if alarm is not None and alarm <= 0:
            raise ValueError(f"alarm={alarm} is a bound of MaxVio, which is 0 in perfect balance; use more, or None.")
        self.speed, self.schedule, self.warmup, self.stop = speed, schedule, warmup, stop
        self.per_layer, self.alarm, self.group = per_layer, alarm, group
        self.balance: RouterBalance | None = None
        self.rows: list[LayerBalance] = []  # of the last log
        self.alarmed: set[str] = set()

    def state(self) -> dict:
        """What Trainer writes into a checkpoint's trainer_state.json."""
        names = ("speed", "schedule", "warmup", "stop", "per_layer", "alarm")
        restored = None if self.balance is None else self.balance.state_dict()
        return {"args": {name: getattr(self, name) for name in names}, "attributes": {"restored": restored}}

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        """Set the hooks, and go on from a checkpoint if the training does."""
        _report_first(self, sys._getframe(1))
        self._close()
        self.balance, self.alarmed = RouterBalance(model, self.group), set()
        saved = state.stateful_callbacks.get(type(self).__name__) if state.global_step else None
        saved = saved[0] if isinstance(saved, list) else saved
        if saved and saved["attributes"]["restored"]:
            self.balance.load_state_dict(saved["attributes"]["restored"])

    def on_step_end(self, args, state, control, optimizer=None, **kwargs):
        """Move the biases, unless a loss scaler skipped the optimizer step."""
        if getattr(optimizer, "step_was_skipped", False):
            self.balance.skip()
        else:
            self.balance.step(self._speed(state))

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Add the balance since the last log to Trainer's own logs."""
        if self.balance is None or logs is None or "loss" not in logs:
            return
        self.rows = rows = self.balance.report()
        if not rows:
            return
        added = {"bias_speed": self._speed(state)} if any(row.bias_range is not None for row in rows) else {}
        totals = {"dead_experts": sum, "bias_range": max}
        for name in [field.name for field in fields(LayerBalance) if field.name not in ("label", "busiest", "load")]:
            values = {row.label: getattr(row, name) for row in rows if getattr(row, name) is not None}
            if values:
                added[name] = totals.get(name, _mean)(values.values())
            if self.per_layer:
                added |= {f"{name}/{label}": value for label, value in values.items()}
        for row in rows:
            self._warn(row)
        logs.update(added)  # for the callbacks after this one, which report
        state.log_history[-1].update(added)  # Trainer has copied the logs there already

    def on_train_end(self, args, state, control, **kwargs):
        """Remove the hooks."""
        self._close()

    def _close(self):
        if self.balance is not None:
            self.balance.close()

    def _speed(self, state) -> float:
        return bias_speed(state.global_step, state.max_steps, self.speed, self.schedule, self.warmup, self.stop)

    def _warn(self, row: LayerBalance):
        if self.alarm is None or row.max_violation <= self.alarm or row.label in self.alarmed:
            return
        self.alarmed.add(row.label)
        moved = row.bias_range is not None
        logger.warning(
            f"{row.label}: MaxVio {row.max_violation:.2f} since the last log is past alarm={self.alarm}; expert "
            f"{row.busiest} gets {1 + row.max_violation:.1f} times the mean load and {row.dead_experts} experts got "
            f"none. Raise {f'speed={self.speed} or ' if moved else ''}the weight of the balancing loss, or lower the "
            "learning rate."
        )


def _mean(values) -> float:
    return sum(values) / len(values)


def _report_first(callback: TrainerCallback, caller):
    """Put `callback` before the callbacks that report to TensorBoard and the like.

    Trainer puts its own first, and they would report logs to which nothing was added yet. An event does not say which
    handler sent it, but the handler is the `self` of the frame that called.
    """
    handler = caller.f_locals.get("self")
    if isinstance(handler, CallbackHandler) and callback in handler.callbacks:
        handler.callbacks.remove(callback)
        handler.callbacks.insert(0, callback)
