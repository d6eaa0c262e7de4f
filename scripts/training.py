"""What pretrain and finetune share around Trainer: precision, samples, the order of the logs."""

import json
import warnings
from pathlib import Path

import torch
import transformers
from rich.console import Console
from transformers import Trainer, TrainerCallback
from transformers.integrations import get_reporting_integration_callbacks

from lamoe.scripts.corpus import start_token


def choose_precision(precision: str) -> str:
    """One of bf16, fp16 and float32.

    Raises:
        ValueError: `precision` is not one of these, nor auto.
    """
    if precision not in ("auto", "bf16", "fp16", "float32"):
        raise ValueError(f"precision={precision!r} is not one of auto, bf16, fp16, float32.")
    if precision == "fp16":
        warnings.warn("fp16 overflows in the routers and experts of large models; bf16 does not.", stacklevel=2)
    if precision == "auto":
        return "bf16" if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else "float32"
    return precision


def read_mapping(name: str, value: dict | str | None) -> dict:
    """A mapping of a recipe, or the command line's JSON for one.

    Raises:
        ValueError: it is not an object of JSON.
    """
    try:
        found = json.loads(value) if isinstance(value, str) else value or {}
    except json.JSONDecodeError as error:
        raise ValueError(f"{name}={value!r} is not JSON: {error}.") from error
    if not isinstance(found, dict):
        raise ValueError(f'{name}={value!r} is not an object of JSON, as {{"field": 6}} is.')
    return found


def refuse_steps(logging_steps: int, **others: int):
    """Raise unless each of `others`, where it is not 0, is a multiple of `logging_steps`.

    A checkpoint between two logs would lose what Trainer has summed since the first of them.
    """
    for name, steps in others.items():
        if steps % logging_steps:
            raise ValueError(
                f"{name}={steps} is not a multiple of logging_steps={logging_steps}; a resumed run would log other "
                f"losses. Use {max(1, round(steps / logging_steps)) * logging_steps}."
            )


def report_last(trainer: Trainer) -> list[TrainerCallback]:
    """Let what reports the logs (TensorBoard, W&B, ...) come after our callbacks, which add to them; returns these."""
    reporters = [trainer.pop_callback(kind) for kind in get_reporting_integration_callbacks(trainer.args.report_to)]
    for callback in reporters:
        trainer.add_callback(callback)
    return reporters


class Samples(TrainerCallback):
    """Lets the model write each so many steps: printed, and in the next logs as "sample"; training is not disturbed.

    Args:
        prompt: what it continues; a beginning token if empty.
        every: optimizer steps between samples, a multiple of those between logs.
    """

    def __init__(self, tokenizer, prompt: str, every: int, max_new_tokens: int, seed: int, console: Console):
        self.tokenizer, self.prompt, self.every = tokenizer, prompt, every
        self.max_new_tokens, self.seed, self.console = max_new_tokens, seed, console
        self.last: str | None = None

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step % self.every == 0 and state.is_world_process_zero:
            self.last = self.write(model, self.seed + state.global_step)
            self.console.rule(f"sample at step {state.global_step}")
            self.console.print(self.last, markup=False, highlight=False)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.last is not None and logs is not None and "loss" in logs:
            logs["sample"] = state.log_history[-1]["sample"] = self.last
            self.last = None

    @torch.no_grad()
    def write(self, model, seed: int) -> str:
        """A sample, always the same one for the same weights and `seed`."""
        model = getattr(model, "module", model)
        ids = [start_token(self.tokenizer), *self.tokenizer(self.prompt, add_special_tokens=False)["input_ids"]]
        device, training = next(model.parameters()).device, model.training
        ids = torch.tensor([ids], device=device)
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(seed)
            model.eval()
            written = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=self.max_new_tokens,
                do_sample=True,
                temperature=0.8,
                top_p=0.95,
                eos_token_id=self.tokenizer.eos_token_id,
                pad_token_id=self.tokenizer.pad_token_id,
                use_cache=True,
            )
            model.train(training)
        return self.tokenizer.decode(written[0], skip_special_tokens=True)


def write_record(folder: Path, arguments: dict, log_history: list[dict]):
    """Keep in `folder` how the model was trained: training.json with versions, arguments and all logs."""
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    record = {"versions": versions, "arguments": arguments, "log_history": log_history}
    (folder / "training.json").write_text(json.dumps(record, indent=1), encoding="utf-8")
