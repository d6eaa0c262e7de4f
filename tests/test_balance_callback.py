"""BalanceCallback: its speeds and logs, and that a training killed in the middle goes on as if unbroken."""

import logging
import math
import subprocess
import sys

import pytest
import torch
from accelerate.optimizer import AcceleratedOptimizer
from datasets import Dataset
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, TrainerCallback
from trl import SFTConfig, SFTTrainer

from lamoe import BalanceCallback
from lamoe.balance_callback import bias_speed
from tests.resumed import MODELS, make_trainer, resumable_trainer
from tests.steps import W, training_model
from tests.test_moe import E
from tests.tiny import random_ids

KEYS = {
    "max_violation", "max_violation_batch", "dead_experts", "load_entropy", "router_entropy", "bias_range",
    "bias_speed",
}  # fmt: skip


def training_logs(trainer) -> list[dict]:
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def biases_of(model) -> list[torch.Tensor]:
    return [b.clone() for name, b in model.named_buffers() if name.endswith("e_score_correction_bias")]


@pytest.mark.parametrize("kind", MODELS)
def test_trainer_balances_logs_and_does_not_depend_on_accumulation(kind, tmp_path):
    runs = []
    for parts in (1, 4):
        trainer = make_trainer(tmp_path, MODELS[kind](), BalanceCallback(0.125), parts=parts)
        trainer.train()
        runs.append(trainer)
    whole, parts = runs
    for a, b in zip(whole.model.parameters(), parts.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    for a, b in zip(biases_of(whole.model), biases_of(parts.model), strict=True):
        assert torch.equal(a, b)
        assert a.abs().max() in (0.125, 0.25)
    keys = KEYS if kind == "lamoe" else KEYS - {"router_entropy"}
    for entry, other in zip(training_logs(whole), training_logs(parts), strict=True):
        assert set(entry) & KEYS == keys
        assert {key: entry[key] for key in keys} == pytest.approx({key: other[key] for key in keys}, rel=1e-4)
    assert not [m for m in whole.model.modules() if m._forward_pre_hooks]


def test_the_default_only_logs(tmp_path):
    model = training_model()
    trainer = make_trainer(tmp_path, model, BalanceCallback())
    trainer.train()
    assert not any(bias.any() for bias in biases_of(model))
    assert [entry["bias_speed"] for entry in training_logs(trainer)] == [0.0, 0.0]
    assert training_logs(trainer)[0]["max_violation"] > 0


def test_what_reports_before_it_sees_its_logs_and_layers_are_logged_on_request(tmp_path):
    class Report(TrainerCallback):
        seen = []

        def on_log(self, args, state, control, logs=None, **kwargs):
            self.seen.append(dict(logs))

    callback = BalanceCallback(0.125, per_layer=True)
    make_trainer(tmp_path, training_model(), Report(), callback, max_steps=1).train()
    logs = Report.seen[0]
    assert set(logs) > KEYS
    per_layer = [key for key in logs if "/" in key]
    assert sorted(per_layer) == sorted(f"{key}/layer_{i}" for key in KEYS - {"bias_speed"} for i in (1, 2))
    for key in ("max_violation", "max_violation_batch", "load_entropy", "router_entropy"):
        assert logs[key] == pytest.approx((logs[f"{key}/layer_1"] + logs[f"{key}/layer_2"]) / 2)
    assert logs["dead_experts"] == logs["dead_experts/layer_1"] + logs["dead_experts/layer_2"]
    assert logs["bias_range"] == max(logs["bias_range/layer_1"], logs["bias_range/layer_2"])


def test_the_alarm_names_layer_bound_and_way_out_once(tmp_path, caplog):
    model = training_model()
    model.routers[1].e_score_correction_bias[[0, 3, 7]] = 9.0  # every token chooses these three
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    try:
        make_trainer(tmp_path, model, BalanceCallback(1e-4, alarm=2.5)).train()
    finally:
        logger.removeHandler(caplog.handler)
    assert caplog.text.count("past alarm") == 1
    assert (
        "layer_2: MaxVio 3.00 since the last log is past alarm=2.5; expert 0 gets 4.0 times the mean load and "
        f"{E - 3} experts got none. Raise speed=0.0001 or the weight of the balancing loss, or lower the learning "
        "rate."
    ) in caplog.text


def test_a_skipped_step_moves_nothing(tmp_path, monkeypatch):
    # what AcceleratedOptimizer does and says when the loss scaler met an infinite gradient
    monkeypatch.setattr(AcceleratedOptimizer, "step", lambda self, closure=None: None)
    monkeypatch.setattr(AcceleratedOptimizer, "step_was_skipped", True)
    for kind in MODELS:
        model = MODELS[kind]()
        trainer = make_trainer(tmp_path, model, BalanceCallback(0.125), max_steps=1)
        trainer.train()
        assert not any(bias.any() for bias in biases_of(model))
        assert "max_violation" not in training_logs(trainer)[0]
        assert not any(router.tokens_per_expert.any() for router in getattr(model, "routers", []))


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({}, [2.0] * 10),
        ({"stop": 0.8}, [2.0] * 8 + [0.0] * 2),
        ({"schedule": "linear"}, [2.0 - 0.2 * i for i in range(10)]),
        ({"schedule": "cosine"}, [1 + math.cos(math.pi * i / 10) for i in range(10)]),
        ({"warmup": 0.4}, [0.5, 1.0, 1.5] + [2.0] * 7),
        ({"schedule": "linear", "warmup": 0.2, "stop": 0.6}, [1.0, 2.0, 2.0, 1.5, 1.0, 0.5] + [0.0] * 4),
    ],
)
def test_speed_over_a_training_of_ten_steps(arguments, expected):
    got = [bias_speed(step, 10, 2.0, **arguments) for step in range(1, 11)]
    assert got == pytest.approx(expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"schedule": "step"}, "schedule='step' is not one of 'constant', 'linear', 'cosine'."),
        ({"speed": -1.0}, "speed=-1.0 is negative, which unbalances; use 1e-3, or 0 to leave the bias alone."),
        (
            {"warmup": 0.5, "stop": 0.2},
            "warmup=0.5 and stop=0.2 are shares of the training: 0 <= warmup <= stop <= 1.",
        ),
        ({"alarm": 0}, "alarm=0 is a bound of MaxVio, which is 0 in perfect balance; use more, or None."),
    ],
)
def test_arguments_are_checked_at_once(arguments, message):
    with pytest.raises(ValueError) as caught:
        BalanceCallback(**arguments)
    assert str(caught.value) == message


def test_a_model_without_experts_is_refused_when_training_begins(tmp_path):
    model = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match="Linear has no routed experts to balance"):
        make_trainer(tmp_path, model, BalanceCallback(0.1)).train()


@pytest.mark.slow
def test_a_killed_training_goes_on_as_unbroken(tmp_path):
    command = f"from tests.resumed import train_until_killed; train_until_killed({str(tmp_path)!r})"
    done = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    for kind in MODELS:
        assert sorted(path.name for path in (tmp_path / kind).iterdir()) == ["checkpoint-2", "checkpoint-4"]
        resumed = resumable_trainer(kind, tmp_path / kind)
        if kind == "native":  # whose experts Trainer does not restore (huggingface/transformers#48805)
            found = AutoModelForCausalLM.from_pretrained(tmp_path / kind / "checkpoint-4", dtype=torch.bfloat16)
            resumed.model.load_state_dict(found.state_dict())
        resumed.train(resume_from_checkpoint=True)
        unbroken = resumable_trainer(kind, tmp_path / f"{kind}-unbroken")
        unbroken.train()
        for a, b in zip(resumed.model.state_dict().values(), unbroken.model.state_dict().values(), strict=True):
            assert a.dtype == b.dtype and torch.equal(a, b)
        assert all(bias.dtype == torch.float32 and bias.any() for bias in biases_of(resumed.model))
        logs = [training_logs(trainer) for trainer in (resumed, unbroken)]
        assert [entry["step"] for entry in logs[0]] == [3, 6, 9]
        for entries in logs:
            entries[1].pop("loss")  # Trainer averages it from where it went on, not from the log before
        assert logs[0] == logs[1]


@pytest.mark.parametrize("kind", MODELS)
def test_sft_of_trl_balances(kind, tmp_path):
    words = {f"w{i}": i for i in range(W)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w0")), eos_token="w1", pad_token="w2"
    )
    ids = random_ids(8, 14, vocab_size=W)
    rows = Dataset.from_dict({"input_ids": [row[: 5 + i].tolist() for i, row in enumerate(ids)]})
    arguments = SFTConfig(
        str(tmp_path), max_steps=2, per_device_train_batch_size=2, gradient_accumulation_steps=2, logging_steps=1,
        report_to="none", save_strategy="no", use_cpu=True, bf16=False, disable_tqdm=True, max_length=16,
    )  # fmt: skip
    model = MODELS[kind]()
    trainer = SFTTrainer(
        model, arguments, train_dataset=rows, processing_class=tokenizer, callbacks=[BalanceCallback(0.125)]
    )
    counted = []
    trainer.add_callback(Counts(trainer, counted))
    trainer.train()
    assert all({"max_violation", "mean_token_accuracy"} < set(entry) for entry in training_logs(trainer))
    assert training_logs(trainer)[0]["bias_range"] == 0.25
    total = sum(min(5 + i, 14) for i in range(8)) * model.config.num_experts_per_tok
    assert sum(counted) == total  # each row once, no padding


class Counts(TrainerCallback):
    """Keeps how many choices each step of the first layer counted."""

    def __init__(self, trainer, counted: list):
        self.trainer, self.counted = trainer, counted

    def on_step_end(self, args, state, control, **kwargs):
        balance = next(c.balance for c in self.trainer.callback_handler.callbacks if isinstance(c, BalanceCallback))
        self.counted.append(int(balance.last[0].sum()))
