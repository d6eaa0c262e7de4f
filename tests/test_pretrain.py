"""lamoe pretrain: what it leaves behind, its samples and curves, and that a killed run loses nothing."""

import json
import math
from pathlib import Path

import pytest
import torch
import transformers.trainer
from datasets import Dataset
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.integrations import TensorBoardCallback

from lamoe import LamoeForCausalLM
from lamoe.scripts import curves, folders, pretrain, training
from tests.commands import options, run_until

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "scripts" / "data" / "shakespeare.txt").read_text(encoding="utf-8")[:12_000]
SMALL = {"num_hidden_layers": 3, "hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 16}
SIZES = [
    "--overrides", json.dumps(SMALL), "--vocab_size", 300, "--sequence_length", 32, "--batch_size", 2, "--steps", 6,
    "--held_out", 4, "--learning_rate", "1e-2", "--bias_speed", 0.05, "--separator", "\n\n", "--accumulation", 2,
    "--logging_steps", 1, "--eval_steps", 3, "--save_steps", 2, "--sample_steps", 3, "--sample_tokens", 5,
]  # fmt: skip


@pytest.fixture(scope="module")
def text_file(tmp_path_factory):
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text(TEXT, encoding="utf-8")
    return file


class Writer:
    """In place of TensorBoard's, which need not be installed."""

    def __init__(self):
        self.scalars, self.texts, self.figures = {}, {}, {}

    def add_scalar(self, name, value, step):
        self.scalars[name, step] = value

    def add_text(self, name, text, step=0):
        self.texts[name, step] = text

    def add_figure(self, name, figure, step):
        self.figures[name, step] = figure

    def flush(self): ...

    close = flush


class Reporter(TensorBoardCallback):
    def __init__(self, writer):
        self.tb_writer, self.logging_dir, self._SummaryWriter = writer, "unused", None


@pytest.fixture(scope="module")
def trained(tmp_path_factory, text_file):
    """The folder that an unbroken training leaves, and what it reported."""
    folder, writer = tmp_path_factory.mktemp("trained") / "out", Writer()
    with pytest.MonkeyPatch.context() as patch:
        for module in (training, transformers.trainer):
            patch.setattr(module, "get_reporting_integration_callbacks", lambda to: [Reporter] if to else [])
        patch.setattr(Reporter.__init__, "__defaults__", (writer,))
        pretrain.main(
            options(pretrain, "--texts", text_file, "--output_dir", folder, *SIZES, "--report_to", "tensorboard")
        )
    return folder, writer


def history(folder):
    return json.loads((folder / "training.json").read_text())["log_history"]


def losses(folder):
    return [log.get("loss", log.get("eval_loss")) for log in history(folder) if "loss" in log or "eval_loss" in log]


# What it leaves behind


def test_the_folder_is_dual_mode_and_complete(trained):
    folder, _ = trained
    native = AutoModelForCausalLM.from_pretrained(folder)
    assert type(native).__name__ == "DeepseekV3ForCausalLM"
    assert (native.config.num_hidden_layers, native.config.vocab_size, native.config.use_cache) == (3, 300, True)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = torch.tensor([tokenizer("To be, or not to be")["input_ids"]])
    ours = LamoeForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        torch.testing.assert_close(ours(ids).logits, native.eval()(ids).logits, rtol=1e-3, atol=1e-3)
    assert sorted(path.name for path in (folder / "curves").iterdir()) == [
        f"{name}.png" for name in ("balance", "learning_rate", "load", "loss")
    ]
    assert not list(folder.parent.glob("*.training")) and not list(folder.parent.glob(".*"))
    record = json.loads((folder / "training.json").read_text())
    assert record["arguments"]["steps"] == 6 and set(record["versions"]) == {"torch", "transformers"}


def test_the_logs_hold_everything_that_is_drawn(trained):
    folder, writer = trained
    logged = [log for log in history(folder) if "loss" in log]
    assert [log["step"] for log in logged] == [1, 2, 3, 4, 5, 6]
    assert logged[-1]["loss"] < logged[0]["loss"] == pytest.approx(math.log(300), rel=0.1)
    tokens = 2 * 2 * 32 * 4  # sequences, accumulation, length, experts a token
    for log in logged:
        assert [sum(layer) for layer in log[curves.LOAD]] == [tokens, tokens]
        worst = [max(layer) * len(layer) / tokens - 1 for layer in log[curves.LOAD]]
        assert log["max_violation"] == pytest.approx(sum(worst) / 2)
    assert [log["step"] for log in history(folder) if "eval_loss" in log] == [3, 6]
    # Reporters come after our callbacks, and so are told of what these add.
    assert writer.scalars["train/max_violation", 2] == logged[1]["max_violation"]
    assert writer.texts["train/sample", 3] == logged[2]["sample"] != logged[5]["sample"]
    assert {name for name, _ in writer.figures} == {"balance", "learning_rate", "load", "loss"}


def test_the_figures_show_what_was_logged(trained):
    log_history = history(trained[0])
    figures = curves.draw(log_history, (1, 2))
    line = figures["loss"].axes[0].lines[0]
    assert line.get_ydata().tolist() == [log["loss"] for log in log_history if "loss" in log]
    first, last = (axes.images[0].get_array() for axes in figures["load"].axes[:2])
    counts = torch.tensor(log_history[0][curves.LOAD]).double()
    torch.testing.assert_close(torch.as_tensor(first.data), counts / counts.mean(1, keepdim=True))
    assert (first.shape, last.shape) == ((2, 16), (2, 16))
    assert figures["load"].axes[0].get_title(loc="left") == "Load of the experts, steps 1 to 1"
    assert figures["load"].axes[1].get_title(loc="left") == "Load of the experts, steps 6 to 6"
    assert [label.get_text() for label in figures["load"].axes[0].get_yticklabels()] == ["1", "2"]
    assert set(curves.draw([{"step": 1, "loss": 2.0, "learning_rate": 0.1}], ())) == {"loss", "learning_rate"}


def test_samples_do_not_disturb_training(trained):
    """The same text for the same seed, and neither random numbers nor the model's mode are changed."""
    model, tokenizer = (kind.from_pretrained(trained[0]) for kind in (LamoeForCausalLM, AutoTokenizer))
    samples = training.Samples(tokenizer, "To be", 1, 8, 0, Console())
    model.train()
    before = torch.get_rng_state()
    texts = [samples.write(model, seed) for seed in (1, 1, 2)]
    assert torch.equal(torch.get_rng_state(), before) and model.training
    assert texts[0] == texts[1] != texts[2]
    assert texts[0].startswith("To be")
    assert not any(router.tokens_per_expert.any() for router in model.routers)


# Killed and resumed


@pytest.mark.slow
def test_killed_and_resumed_loses_nothing(trained, text_file, tmp_path):
    """By SIGKILL, after the checkpoint of step 4: the same losses, biases and weights as the unbroken training."""
    words = ["--texts", text_file, "--output_dir", tmp_path / "out", *SIZES]
    work = tmp_path / "out.training"
    run_until("pretrain", words, work / "checkpoint-4" / "trainer_state.json")
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match=r"out.training holds the checkpoints of an unfinished training; .* --resume"):
        pretrain.main(options(pretrain, *words))
    with pytest.raises(ValueError, match=r"but learning_rate was 0.01 and is 0.1; seed was 0 and is 1\."):
        pretrain.main(options(pretrain, *words, "--resume", "--seed", 1, "--learning_rate", 0.1))
    newest = folders.last_checkpoint(work)
    (work / "checkpoint-9").mkdir()
    (work / "checkpoint-9" / "trainer_state.json").write_text('{"global_st')  # cut short by the kill
    assert folders.last_checkpoint(work) == newest
    pretrain.main(options(pretrain, *words, "--resume"))
    assert losses(tmp_path / "out") == losses(trained[0])
    assert [log[curves.LOAD] for log in history(tmp_path / "out") if "loss" in log] == [
        log[curves.LOAD] for log in history(trained[0]) if "loss" in log
    ]
    before, after = (load_file(folder / "model.safetensors") for folder in (trained[0], tmp_path / "out"))
    assert all(torch.equal(x, after[name]) for name, x in before.items())
    assert not work.exists()


def test_what_a_killed_run_left_is_kept_until_told_otherwise(tmp_path):
    work = tmp_path / "out.training"

    def begin(resume=False, overwrite=False, keep=False, save=True):
        with folders.training_folder(tmp_path / "out", {"keep_checkpoints": keep}, resume, overwrite) as folder:
            found = sorted(path.name for path in folder.glob("checkpoint-*"))
            if save:
                (folder / f"checkpoint-{len(found) + 1}").mkdir()
                (folder / f"checkpoint-{len(found) + 1}" / "trainer_state.json").write_text('{"global_step": 1}')
        return found

    assert begin(save=False) == [] and not work.exists()
    assert begin(keep=True) == [] and work.is_dir()
    with pytest.raises(ValueError, match=r"continue it with --resume, or begin anew with --overwrite\."):
        begin()
    assert begin(resume=True, keep=True) == ["checkpoint-1"]
    assert begin(overwrite=True, keep=True) == []
    assert begin(resume=True) == ["checkpoint-1"] and not work.exists()
    work.mkdir()  # killed before the first checkpoint: nothing to lose
    assert begin() == []


def test_a_stream_resumes_where_it_was(text_file, tmp_path, monkeypatch):
    texts = [text for text in TEXT.split("\n\n") if text]
    Dataset.from_dict({"body": texts}).to_parquet(tmp_path / "data" / "train.parquet")
    words = ["--texts", tmp_path / "data", "--text_field", "body", "--output_dir", tmp_path / "out", *SIZES]
    words += ["--streaming", "--shuffle_buffer", 20, "--sample_steps", 0]
    pretrain.main(options(pretrain, *words))
    (tmp_path / "out").rename(tmp_path / "unbroken")

    def broken(self, model, inputs, *args, **kwargs):
        if self.state.global_step == 5:
            raise KeyboardInterrupt
        return training_step(self, model, inputs, *args, **kwargs)

    training_step = pretrain.Trainer.training_step
    with pytest.raises(KeyboardInterrupt), monkeypatch.context() as patch:
        patch.setattr(pretrain.Trainer, "training_step", broken)
        pretrain.main(options(pretrain, *words))
    pretrain.main(options(pretrain, *words, "--resume", "--keep_checkpoints"))
    assert losses(tmp_path / "out") == losses(tmp_path / "unbroken")
    assert (tmp_path / "out.training" / "checkpoint-6").is_dir()


# Where a model comes from, and what is refused


def test_from_a_config_and_from_weights(trained, text_file, tmp_path):
    folder, _ = trained
    config = pretrain.read_config(str(folder / "config.json"), {"num_hidden_layers": 2})
    assert (config.num_hidden_layers, config.hidden_size) == (2, 32)
    assert pretrain.read_config(str(folder), {}).num_hidden_layers == 3
    tokenizer = AutoTokenizer.from_pretrained(folder)
    arguments = options(pretrain, "--texts", text_file, "--output_dir", tmp_path / "out", "--model", folder)
    arguments.sequence_length = 64
    model = pretrain.build_model(arguments, {}, folder, tokenizer)
    saved = load_file(folder / "model.safetensors")
    assert torch.equal(model.lm_head.weight, saved["lm_head.weight"])
    with pytest.raises(ValueError, match=r"overrides=\{'num_hidden_layers': 2\} do not go with the weights in "):
        pretrain.build_model(arguments, {"num_hidden_layers": 2}, folder, tokenizer)
    arguments.sequence_length = 5000
    with pytest.raises(ValueError, match=r"sequence_length=5000 is longer than max_position_embeddings=4096; lower"):
        pretrain.build_model(arguments, {}, folder, tokenizer)


def test_a_given_tokenizer_sets_the_vocabulary(tokenizer, text_file, tmp_path):
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    arguments = options(
        pretrain, "--texts", text_file, "--output_dir", tmp_path / "out", "--tokenizer", tmp_path / "tokenizer"
    )
    found = pretrain.find_tokenizer(arguments, tmp_path, None, [], 4096)
    config = pretrain.build_model(arguments, SMALL, None, found).config
    assert (config.vocab_size, config.eos_token_id) == (len(tokenizer), tokenizer.eos_token_id)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--overrides", "{"], r"overrides='\{' is not JSON: "),
        (["--overrides", "3"], r"overrides='3' is not an object of JSON, as .* is\."),
        (["--model", "v5"], r"model='v5' is neither a config.json, nor a folder with one, nor a preset: .*tiny.*"),
        (["--save_steps", 3, "--logging_steps", 2], r"save_steps=3 is not a multiple of logging_steps=2; .* Use 4\."),
        (["--held_out", 900], r"fill \d+ sequences, and held_out=900 keeps them all; lower it\."),
    ],
)
def test_what_cannot_work_is_refused_before_training(text_file, tmp_path, words, message):
    small = ["--vocab_size", 300, "--sequence_length", 32, "--eval_steps", 0, "--sample_steps", 0]
    with pytest.raises(ValueError, match=message):
        pretrain.main(options(pretrain, "--texts", text_file, "--output_dir", tmp_path / "out", *small, *words))
    assert not list(tmp_path.iterdir())


def test_a_plan_alone_writes_nothing(text_file, tmp_path, capsys):
    pretrain.main(options(pretrain, "--texts", text_file, "--output_dir", tmp_path / "out", *SIZES, "--plan"))
    assert "activations" in capsys.readouterr().out
    assert not list(tmp_path.glob("out*"))
