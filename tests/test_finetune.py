"""lamoe finetune: SFT, DPO and GRPO on tiny checkpoints, ours and native ones; what it saves and what it refuses."""

import itertools
import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from trl.rewards import think_format_reward

from lamoe import LamoeForCausalLM
from lamoe.scripts import finetune, training
from tests.commands import options
from tests.registry import native_tiny
from tests.tiny import random_ids

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"
TEXT = (SCRIPTS / "data" / "shakespeare.txt").read_text(encoding="utf-8")[:6_000]
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|end|>{% endgeneration %}"
    "{% else %}{{ m.role }}: {{ m.content }}\n{% endif %}{% endfor %}"
)


@pytest.fixture
def text_file(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text(TEXT, encoding="utf-8")
    return file


@pytest.fixture
def short(tmp_path):
    """Words for a short training into tmp_path/out."""
    words = [
        "--output_dir",
        tmp_path / "out",
        "--sequence_length",
        32,
        "--steps",
        4,
        "--batch_size",
        4,
        "--precision",
        "float32",
    ]
    return [*words, "--accumulation", 2, "--learning_rate", "1e-2", "--rank", 4, "--logging_steps", 1]


@pytest.fixture(scope="module")
def moe_checkpoint(tmp_path_factory, tokenizer):
    """Folders of random tiny native models by name, with a tokenizer."""

    def save(name):
        folder = tmp_path_factory.mktemp(name)
        native_tiny(name, vocab_size=304).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder

    return save


def lines(path, *records):
    """A .jsonl file of `records`, eight times over."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records * 8), encoding="utf-8")
    return path


def chat(question, answer):
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def logits(model, ids):
    with torch.no_grad():
        return model.eval()(ids).logits


def before_and_after(printed, name):
    """The figures in the row `name` of the table about held-out data."""
    row = next(line for line in printed.splitlines() if line.startswith("│") and name in line)
    return tuple(map(float, row.strip("│").split("│")[1:]))


def history(folder):
    return json.loads((folder / "training.json").read_text())["log_history"]


# What is trained and saved


def test_an_adapter_on_attention_and_shared_experts(checkpoint, text_file, short, tmp_path, capsys):
    words = ["--model", checkpoint, "--texts", text_file, "--held_out", text_file, *short, "--checkpointing"]
    finetune.main(options(finetune, *words))
    before, after = before_and_after(capsys.readouterr().out, "bits per byte")
    assert after < before
    saved = load_file(tmp_path / "out" / "adapter_model.safetensors")
    trained = {name.split(".lora_")[0].split("layers.1.")[-1] for name in saved if "layers.1." in name}
    attention = {f"self_attn.{name}" for name in ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "o_proj")}
    assert trained == attention | {f"mlp.shared_experts.{name}_proj" for name in ("gate", "up", "down")}
    assert not [name for name in saved if "layers.0.mlp" in name]
    base = LamoeForCausalLM.from_pretrained(checkpoint)
    ids = random_ids(1, 9)
    plain = logits(base, ids)
    assert (logits(PeftModel.from_pretrained(base, tmp_path / "out"), ids) - plain).abs().max() > 1e-3
    logged = [log for log in history(tmp_path / "out") if "loss" in log]
    assert len(logged) == 4
    assert all({"entropy", "mean_token_accuracy", "num_tokens", "max_violation"} <= set(log) for log in logged)
    assert not list(tmp_path.glob("*.training"))


def test_merging_leaves_a_dual_mode_folder(checkpoint, text_file, short, tmp_path):
    finetune.main(options(finetune, "--model", checkpoint, "--texts", text_file, *short, "--merge"))
    native = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(native).__name__ == "DeepseekV3ForCausalLM"
    written, source = (AutoConfig.from_pretrained(folder) for folder in (tmp_path / "out", checkpoint))
    for name in ("use_cache", "output_router_logits", "aux_loss_alpha"):  # Trainer and TRL turn them off
        assert getattr(written, name, None) == getattr(source, name, None), name
    ids = random_ids(1, 9)
    ours = LamoeForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits(native, ids), logits(ours, ids), rtol=1e-3, atol=1e-3)
    assert (logits(ours, ids) - logits(LamoeForCausalLM.from_pretrained(checkpoint), ids)).abs().max() > 1e-3


@pytest.mark.parametrize("router", ["frozen", "trained"])
def test_all_weights_with_frozen_or_trained_router(checkpoint, text_file, short, tmp_path, router):
    words = ["--model", checkpoint, "--texts", text_file, *short, "--no_lora", "--router", router]
    finetune.main(options(finetune, *words))
    before, after = LamoeForCausalLM.from_pretrained(checkpoint), LamoeForCausalLM.from_pretrained(tmp_path / "out")
    same = {name for name, x in before.state_dict().items() if torch.equal(x, after.state_dict()[name])}
    routers = {name for name in before.state_dict() if name.endswith("mlp.gate.weight")}
    biases = {name for name in before.state_dict() if name.endswith("e_score_correction_bias")}
    assert same == biases | (routers if router == "frozen" else set())


def test_the_bias_moves_if_it_is_told_to(checkpoint, text_file, short, tmp_path):
    words = ["--model", checkpoint, "--texts", text_file, *short, "--merge", "--bias_speed", 0.5]
    finetune.main(options(finetune, *words))
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    before, after = (load_file(folder / "model.safetensors")[name] for folder in (checkpoint, tmp_path / "out"))
    moved = (after - before).abs() / 0.5
    torch.testing.assert_close(moved, moved.round(), rtol=0, atol=1e-5)
    assert moved.max() > 0


# Chats, completions, packing


@pytest.mark.parametrize("packed", [True, False])
def test_only_what_the_assistant_says_counts(checkpoint, tokenizer, short, tmp_path, packed, monkeypatch):
    """The batches that the trainer sees: labels only in answers, and position ids that start anew in each chat."""
    data = lines(tmp_path / "chat.jsonl", chat("who", "Hamlet"), chat("where", "Elsinore, in Denmark"))
    (tmp_path / "template.jinja").write_text(TEMPLATE)
    seen = []
    compute_loss = finetune.SFTTrainer.compute_loss

    def watched(self, model, inputs, **kwargs):
        seen.append({name: x.clone() for name, x in inputs.items() if torch.is_tensor(x)})
        return compute_loss(self, model, inputs, **kwargs)

    monkeypatch.setattr(finetune.SFTTrainer, "compute_loss", watched)
    words = ["--model", checkpoint, "--texts", data, *short, "--chat_template", tmp_path / "template.jinja"]
    words += ["--loss_on", "assistant", "--held_out", data]
    finetune.main(options(finetune, *words, *([] if packed else ["--no_packing"])))
    answers = {"Hamlet<|end|>", "Elsinore, in Denmark<|end|>"}
    for batch in seen:
        labels = batch["labels"].flatten()
        runs = "".join("|" if label == -100 else tokenizer.decode([label]).replace("|", "¦") for label in labels)
        assert {run.replace("¦", "|") for run in runs.split("|") if run} <= answers
        assert ("position_ids" in batch) == (packed and "attention_mask" not in batch)
    if packed:
        starts = [int((batch["position_ids"] == 0).sum()) for batch in seen if "position_ids" in batch]
        assert max(starts) > 4  # more documents than rows
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == TEMPLATE


def test_packed_documents_do_not_see_one_another(checkpoint):
    """A row of two documents as TRL's collator gives it: each has the log-probabilities that it has alone."""
    model = LamoeForCausalLM.from_pretrained(checkpoint).train()
    collator = finetune.SFTTrainer.__init__.__globals__["DataCollatorForLanguageModeling"](0, padding_free=True)
    first, second = random_ids(2, 7).tolist()
    batch = collator([{"input_ids": first}, {"input_ids": second}])
    together = model(**{name: x for name, x in batch.items() if name != "labels"}).logits
    for ids, rows in ((first, slice(0, 7)), (second, slice(7, 14))):
        torch.testing.assert_close(together[0, rows], model(torch.tensor([ids])).logits[0], rtol=1e-4, atol=1e-4)


def test_prompts_and_completions(checkpoint, short, tmp_path, capsys):
    data = lines(tmp_path / "pairs.jsonl", {"prompt": "To be, ", "completion": "or not to be"})
    words = ["--model", checkpoint, "--texts", data, "--held_out", data, *short, "--loss_on"]
    losses = []
    for loss_on in ("auto", "all"):
        finetune.main(options(finetune, *words, loss_on, "--overwrite", "--steps", 1))
        losses.append(before_and_after(capsys.readouterr().out, "loss")[0])
    model, tokenizer = LamoeForCausalLM.from_pretrained(checkpoint), AutoTokenizer.from_pretrained(checkpoint)
    ids = torch.tensor([tokenizer("To be, or not to be<|end|>")["input_ids"]])
    of_all = torch.nn.functional.cross_entropy(logits(model, ids)[0, :-1], ids[0, 1:], reduction="none")
    completion = of_all[len(tokenizer("To be, ")["input_ids"]) - 1 :]
    assert losses == [pytest.approx(x.mean().item(), abs=1e-3) for x in (completion, of_all)]


# DPO and GRPO, ours and native


def pairs(tmp_path):
    return lines(tmp_path / "pairs.jsonl", {"prompt": "To be ", "chosen": "or not to be", "rejected": "is easy"})


def brief(tmp_path):
    """A reward for saying little."""
    (tmp_path / "rewards.py").write_text(
        "def brief(completions, **columns):\n    return [-float(len(text)) for text in completions]\n"
    )
    return f"{tmp_path / 'rewards.py'}:brief"


@pytest.mark.parametrize("lora", [True, False])
def test_dpo(checkpoint, short, tmp_path, lora, capsys):
    words = ["--model", checkpoint, "--texts", pairs(tmp_path), "--held_out", pairs(tmp_path), *short]
    words += ["--method", "dpo", "--merge", *([] if lora else ["--no_lora"])]
    finetune.main(options(finetune, *words))
    printed = capsys.readouterr().out
    before, after = before_and_after(printed, "loss")
    assert before == pytest.approx(0.6931, abs=1e-3)  # policy and reference are the same at first
    assert after < 0.5
    assert before_and_after(printed, "chosen over rejected")[1] == 1
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path / "out")).__name__ == "DeepseekV3ForCausalLM"


def test_grpo(checkpoint, short, tmp_path):
    prompts = lines(tmp_path / "prompts.jsonl", {"prompt": "To be "})
    words = ["--model", checkpoint, "--texts", prompts, *short, "--method", "grpo", "--reward", brief(tmp_path)]
    finetune.main(options(finetune, *words, "--settings", '{"num_generations": 4, "max_completion_length": 6}'))
    logged = [log for log in history(tmp_path / "out") if "reward" in log]
    assert len(logged) == 4
    assert all(log["rewards/brief/mean"] < 0 and "max_violation" in log for log in logged)
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
def test_a_native_class_with_our_kernels(moe_checkpoint, text_file, short, tmp_path, family, capsys):
    words = ["--model", moe_checkpoint(family), "--texts", text_file, *short, "--boost", "--merge"]
    words += ["--steps", 1, "--sequence_length", 8, "--batch_size", 1, "--accumulation", 1]
    finetune.main(options(finetune, *words))
    assert "Experts, fused" in capsys.readouterr().out
    assert AutoConfig.from_pretrained(tmp_path / "out").model_type == family
    assert [log["loss"] for log in history(tmp_path / "out") if "loss" in log]


def test_dpo_and_grpo_on_a_native_class(moe_checkpoint, short, tmp_path):
    folder = moe_checkpoint("qwen3_moe")
    words = ["--model", folder, *short, "--steps", 2, "--overwrite"]
    finetune.main(options(finetune, *words, "--texts", pairs(tmp_path), "--method", "dpo"))
    assert "rewards/margins" in history(tmp_path / "out")[0]
    prompts = lines(tmp_path / "prompts.jsonl", {"prompt": "To be "})
    words += ["--texts", prompts, "--method", "grpo", "--reward", brief(tmp_path)]
    finetune.main(options(finetune, *words, "--settings", '{"num_generations": 4, "max_completion_length": 4}'))
    assert "rewards/brief/mean" in history(tmp_path / "out")[0]


def test_native_takes_transformers_class(checkpoint, text_file, short, tmp_path):
    words = ["--model", checkpoint, "--texts", text_file, *short, "--native", "--no_lora", "--steps", 1]
    finetune.main(options(finetune, *words))
    assert not (tmp_path / "out" / "modeling_lamoe.py").exists()
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "deepseek_v3"


def test_native_classes_get_no_adapter_on_experts_by_mistake(checkpoint, text_file, short, tmp_path):
    """PEFT takes their shared experts for the routed ones."""
    words = ["--model", checkpoint, "--texts", text_file, *short, "--native", "--steps", 1, "--overwrite"]
    finetune.main(options(finetune, *words))
    adapter = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert set(adapter["target_modules"]) == {name for name in finetune.TARGETS if not name.startswith("shared")}
    assert not adapter["target_parameters"]
    with pytest.raises(ValueError, match=r"adapts the routed experts in place of the shared .* leave --native out"):
        finetune.main(options(finetune, *words, "--targets", *finetune.TARGETS))


# Broken off and resumed


@pytest.mark.parametrize("whole", [False, True])
def test_broken_off_and_resumed_loses_nothing(
    checkpoint, moe_checkpoint, text_file, short, tmp_path, monkeypatch, whole
):
    """An adapter of ours, and all weights of a native class, whose experts Trainer by itself would not restore."""
    model = ["--model", moe_checkpoint("qwen3_moe"), "--no_lora"] if whole else ["--model", checkpoint]
    words = [*model, "--texts", text_file, *short, "--steps", 6, "--save_steps", 2, "--seed", 3]
    finetune.main(options(finetune, *words))
    (tmp_path / "out").rename(tmp_path / "unbroken")

    forwards = itertools.count(1)
    compute_loss = finetune.SFTTrainer.compute_loss

    def broken(self, *args, **kwargs):
        if next(forwards) == 10:  # in the middle of step 5
            raise KeyboardInterrupt
        return compute_loss(self, *args, **kwargs)

    work = tmp_path / "out.training"
    with pytest.raises(KeyboardInterrupt), monkeypatch.context() as patch:
        patch.setattr(finetune.SFTTrainer, "compute_loss", broken)
        finetune.main(options(finetune, *words))
    assert {path.name for path in work.glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-4"}
    with pytest.raises(ValueError, match=r"out.training holds the checkpoints of an unfinished .* with --resume, or "):
        finetune.main(options(finetune, *words))
    with pytest.raises(ValueError, match=r"the arguments of the beginning, but rank was 4 and is 8\."):
        finetune.main(options(finetune, *words, "--resume", "--rank", 8))
    finetune.main(options(finetune, *words, "--resume"))
    losses, unbroken = (
        [(log["loss"], log.get("max_violation")) for log in history(folder) if "loss" in log]
        for folder in (tmp_path / "out", tmp_path / "unbroken")
    )
    assert losses == unbroken
    file = "model.safetensors" if whole else "adapter_model.safetensors"
    again, weights = (load_file(tmp_path / name / file) for name in ("out", "unbroken"))
    assert all(torch.equal(x, again[name]) for name, x in weights.items())
    assert not work.exists()


# What is refused


def test_data_that_do_not_fit_are_refused(checkpoint, text_file, short, tmp_path):
    def refused(words, *more):
        with pytest.raises(ValueError, match=words):
            finetune.main(options(finetune, "--model", checkpoint, *short, *more))
        assert not (tmp_path / "out").exists()

    chats = lines(tmp_path / "chat.jsonl", chat("who", "Hamlet"))
    refused(r"columns text; dpo needs chosen and rejected\.", "--texts", text_file, "--method", "dpo")
    refused(
        r"chat.jsonl, line 1 has no text in a field \"chosen\" or \"rejected\"\.", "--texts", chats, "--method", "dpo"
    )
    refused(r"no chat template; name one with --chat_template\.", "--texts", chats)
    refused(
        r"loss_on='assistant' needs messages; the data have text\.", "--texts", text_file, "--loss_on", "assistant"
    )
    refused(r"method='grpo' needs --reward", "--texts", text_file, "--method", "grpo")
    refused(r"--held_out is for sft and dpo\.", "--texts", text_file, "--method", "grpo", "--reward", "a.b",
            "--held_out", text_file)  # fmt: skip
    refused(r"settings='\{beta' is not JSON", "--texts", text_file, "--settings", "{beta")
    refused(r"settings='3' is not an object of JSON", "--texts", text_file, "--settings", "3")
    refused(r"save_steps=3 is not a multiple of logging_steps=2; .* Use 4\.", "--texts", text_file,
            "--save_steps", 3, "--logging_steps", 2)  # fmt: skip


def test_an_adapter_names_the_model_of_the_hub(checkpoint, text_file, short, tmp_path, monkeypatch):
    monkeypatch.setattr(finetune, "snapshot_download", lambda name, allow_patterns: checkpoint)
    finetune.main(options(finetune, "--model", "somebody/tiny", "--texts", text_file, *short, "--steps", 1))
    written = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert written["base_model_name_or_path"] == "somebody/tiny"


def test_a_model_that_is_nowhere_is_refused(text_file, short, monkeypatch):
    def offline(*args, **kwargs):
        raise OSError("no connection\nat all")

    monkeypatch.setattr(finetune, "snapshot_download", offline)
    words = r"nobody/nothing is neither a folder nor a model that the Hub gives: no connection$"
    with pytest.raises(ValueError, match=words):
        finetune.main(options(finetune, "--model", "nobody/nothing", "--texts", text_file, *short))


def test_a_reward_by_its_module():
    assert finetune.find_reward("trl.rewards.think_format_reward") is think_format_reward


@pytest.mark.parametrize("name", ["absent.py:f", "trl.rewards.absent", "absent.module.f", "f"])
def test_a_reward_that_is_nowhere_is_refused(name):
    with pytest.raises(ValueError, match=r"is neither file.py:function nor package.module.function: "):
        finetune.find_reward(name)


@pytest.fixture
def mtp_folder(mtp_checkpoint, tokenizer, tmp_path):
    """A checkpoint with a multi-token-prediction layer, and a tokenizer that fits it."""
    model = LamoeForCausalLM.from_pretrained(mtp_checkpoint, dtype=torch.float32)
    model.resize_token_embeddings(304)
    model.save_pretrained(tmp_path / "mtp")
    tokenizer.save_pretrained(tmp_path / "mtp")
    return tmp_path / "mtp"


@pytest.mark.parametrize("mtp", ["keep", "drop"])
def test_mtp_layers_are_kept_as_they_are_or_left_out(mtp_folder, text_file, tmp_path, mtp):
    words = ["--model", mtp_folder, "--texts", text_file, "--output_dir", tmp_path / "out", "--sequence_length", 32]
    words += ["--steps", 2, "--rank", 4, "--precision", "float32"]
    finetune.main(options(finetune, *words, "--merge", "--mtp", mtp))
    merged, model = (LamoeForCausalLM.from_pretrained(folder) for folder in (tmp_path / "out", mtp_folder))
    assert merged.config.num_nextn_predict_layers == (mtp == "keep")
    if mtp == "keep":
        kept, old = (m.model.mtp_layers[0].state_dict() for m in (merged, model))
        assert all(torch.equal(kept[name], old[name]) for name in old)


def test_a_plan_alone_writes_nothing(checkpoint, text_file, tmp_path, capsys):
    words = ["--model", checkpoint, "--texts", text_file, "--output_dir", tmp_path / "out", "--plan"]
    finetune.main(options(finetune, *words))
    assert "activations" in capsys.readouterr().out
    assert not list(tmp_path.glob("out*"))
    with pytest.raises(ValueError, match="--plan knows SFT with Lamoe's classes; leave out --native"):
        finetune.main(options(finetune, *words, "--native"))


def test_native_classes_will_not_lose_mtp_layers(mtp_folder, text_file, tmp_path):
    words = ["--model", mtp_folder, "--texts", text_file, "--output_dir", tmp_path / "out", "--native", "--merge"]
    with pytest.raises(ValueError, match=r"num_nextn_predict_layers=1: with a native class .* pass --mtp drop"):
        finetune.main(options(finetune, *words))


def test_precision():
    assert training.choose_precision("bf16") == "bf16"
    with pytest.raises(ValueError, match="precision='fp8' is not one of auto, bf16, fp16, float32"):
        training.choose_precision("fp8")
    with pytest.warns(UserWarning, match="fp16 overflows in the routers .* bf16 does not"):
        assert training.choose_precision("fp16") == "fp16"
