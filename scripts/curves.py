"""Curves of a training, drawn from Trainer's log history: loss, learning rate, balance, load by layer and expert."""

from pathlib import Path

import torch
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback

from lamoe import BalanceCallback

LOAD = "tokens_per_expert"  # in the log history: for each layer with experts, the tokens that each got since the last
BLUE, ORANGE, GREY = "#1f6fb4", "#e07b00", "#8a8a8a"


class Curves(TrainerCallback):
    """Keeps the load of every expert in the log history, and draws all curves when training ends.

    `balance` puts itself before all other callbacks, so that what it reports is there.

    Args:
        folder: where the PNG files go.
        layers: indices of the layers with experts.
    """

    def __init__(self, balance: BalanceCallback, folder: Path, layers: tuple[int, ...]):
        self.balance, self.folder, self.layers = balance, folder, layers
        self.reporters: list[TrainerCallback] = []  # of which TensorBoard gets the figures

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.balance.rows and "loss" in (logs or ()):
            state.log_history[-1][LOAD] = [list(row.load) for row in self.balance.rows]

    def on_train_end(self, args, state, control, **kwargs):
        if not state.is_world_process_zero:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        for name, figure in draw(state.log_history, self.layers).items():
            figure.savefig(self.folder / f"{name}.png", dpi=110)
            for callback in self.reporters:
                if isinstance(callback, TensorBoardCallback) and callback.tb_writer is not None:
                    callback.tb_writer.add_figure(name, figure, state.global_step)


def draw(log_history: list[dict], layers: tuple[int, ...]) -> dict[str, Figure]:
    """The figures by name: "loss" and "learning_rate", and where routers were logged "balance" and "load"."""
    figures = {"loss": _loss(log_history), "learning_rate": _learning_rate(log_history)}
    if any("max_violation" in log for log in log_history):
        figures["balance"] = _balance(log_history)
    if any(LOAD in log for log in log_history):
        figures["load"] = _load([log for log in log_history if LOAD in log], layers)
    return figures


def _series(log_history: list[dict], name: str) -> tuple[list[int], list[float]]:
    found = [(log["step"], log[name]) for log in log_history if name in log]
    return [step for step, _ in found], [value for _, value in found]


def _axes(title: str, ylabel: str):
    figure = Figure(figsize=(6.4, 3.8), layout="constrained")
    axes = figure.subplots()
    axes.set_title(title, loc="left", fontsize=11)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel(ylabel)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _loss(log_history: list[dict]) -> Figure:
    figure, axes = _axes("Loss", "nats a token")
    axes.plot(*_series(log_history, "loss"), color=BLUE, label="training, mean since the last log")
    steps, values = _series(log_history, "eval_loss")
    if steps:
        axes.plot(steps, values, color=ORANGE, marker="o", markersize=4, label="held-out text")
        note = f"{values[-1]:.3f}"
        axes.annotate(note, (steps[-1], values[-1]), (0, 7), textcoords="offset points", ha="right", color=ORANGE)
    axes.legend(frameon=False)
    return figure


def _learning_rate(log_history: list[dict]) -> Figure:
    figure, axes = _axes("Learning rate", "learning rate")
    axes.plot(*_series(log_history, "learning_rate"), color=BLUE)
    axes.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    axes.set_ylim(bottom=0)
    return figure


def _balance(log_history: list[dict]) -> Figure:
    figure, axes = _axes("Balance of the experts, mean of the layers", "MaxVio: largest load / mean load - 1")
    axes.plot(*_series(log_history, "max_violation"), color=BLUE)
    axes.set_ylim(bottom=0)
    steps, dead = _series(log_history, "dead_experts")
    if any(dead):
        twin = axes.twinx()
        twin.step(steps, dead, color=GREY, where="mid", linewidth=1)
        twin.set_ylabel("experts without a token, all layers", color=GREY)
        twin.yaxis.set_major_locator(MaxNLocator(integer=True))
        twin.set_ylim(bottom=0)
        twin.spines["top"].set_visible(False)
    return figure


def _load(logs: list[dict], layers: tuple[int, ...]) -> Figure:
    """Heat maps of load / mean load by layer and expert, at the first log and at the last one."""
    counts = [torch.tensor(log[LOAD], dtype=torch.float64) for log in (logs[0], logs[-1])]
    shares = [count / count.mean(dim=1, keepdim=True).clamp(min=1) for count in counts]
    experts = shares[0].shape[1]
    figure = Figure(figsize=(min(6.4 + experts / 40, 14), 1.9 + 0.36 * min(2 * len(layers), 30)), layout="constrained")
    scale = TwoSlopeNorm(vcenter=1, vmin=0, vmax=max(2.0, *(float(share.max()) for share in shares)))
    panels = figure.subplots(2, 1, sharex=True)
    for axes, share, log in zip(panels, shares, (logs[0], logs[-1]), strict=True):
        before = max([other["step"] for other in logs if other["step"] < log["step"]], default=0)
        image = axes.imshow(share, aspect="auto", cmap="RdBu_r", norm=scale, interpolation="nearest")
        axes.set_title(f"Load of the experts, steps {before + 1} to {log['step']}", loc="left", fontsize=11)
        axes.set_ylabel("layer")
        ticks = torch.linspace(0, len(layers) - 1, min(len(layers), 8)).round().int().tolist()
        axes.set_yticks(ticks, [layers[tick] for tick in ticks])
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    panels[1].set_xlabel("expert")
    bar = figure.colorbar(image, ax=panels, label="load / mean load of its layer")
    bar.ax.axhline(1, color="black", linewidth=0.8)
    return figure
