"""Trainings with BalanceCallback, and one that dies in the middle; with few imports, for a process of its own."""

import os
import signal

import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

from lamoe import BalanceCallback
from tests.steps import W, native_training_model, training_model
from tests.tiny import random_ids

MODELS = {"lamoe": training_model, "native": native_training_model}


def make_trainer(folder, model, *callbacks, parts: int = 1, **changes) -> Trainer:
    """A Trainer over sixteen rows, four a step."""
    rows = [{"input_ids": row, "labels": row} for row in random_ids(16, 10, seed=4, vocab_size=W)]
    settings = {
        "max_steps": 2, "logging_steps": 1, "report_to": "none", "save_strategy": "no", "use_cpu": True,
        "learning_rate": 1e-2, "disable_tqdm": True, "seed": 1, "data_seed": 1, "max_grad_norm": 0.0,
    }  # fmt: skip
    arguments = TrainingArguments(
        str(folder),
        per_device_train_batch_size=4 // parts,
        gradient_accumulation_steps=parts,
        **{**settings, **changes},
    )
    return Trainer(model, arguments, train_dataset=rows, callbacks=list(callbacks))


class Kill(TrainerCallback):
    """Ends the process as a power failure would, in the middle of the fifth step's end."""

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 5:
            os.kill(os.getpid(), signal.SIGKILL)


RESUMED = {"max_steps": 9, "logging_steps": 3, "save_strategy": "steps", "save_steps": 2, "learning_rate": 3e-3}


def resumable_trainer(kind: str, folder, *callbacks) -> Trainer:
    """Lamoe in float32; the native class in bfloat16, where its bias becomes float32 only in training."""
    model = MODELS[kind]() if kind == "lamoe" else MODELS[kind]().to(torch.bfloat16)
    return make_trainer(folder, model, BalanceCallback(1e-3), *callbacks, parts=2, **RESUMED)


def train_until_killed(folder: str):
    """Train each model in a process of its own, all of which are killed."""
    for kind in MODELS:
        child = os.fork()
        if child == 0:
            resumable_trainer(kind, f"{folder}/{kind}", Kill()).train()
            os._exit(0)
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, status
