"""Each command through its `main`, on tiny checkpoints: what it writes, what it prints and what it refuses."""

import json
import math
import re
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from lamoe import LamoeConfig, LamoeForCausalLM
from lamoe.hub import checkpoint_tensors
from lamoe.scripts import convert, corpus, evaluate, finetune, folders, generate, pretrain, quickstart
from tests.commands import options
from tests.tiny import FAMILIES, native_model, random_ids

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"
TEXT = quickstart.SHAKESPEARE.read_text(encoding="utf-8")[:30_000]


@pytest.fixture
def text_file(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text(TEXT[:6_000], encoding="utf-8")
    return str(file)


def logits(model, ids):
    with torch.no_grad():
        return model.eval()(ids).logits


# Output folders


def test_a_full_folder_is_refused_and_kept(tmp_path):
    (tmp_path / "mine").write_text("kept")
    words = rf"{tmp_path} is not empty; choose another folder, or replace its content with --overwrite\."
    with pytest.raises(ValueError, match=words), folders.fresh_folder(tmp_path):
        raise AssertionError("not reached")
    assert (tmp_path / "mine").read_text() == "kept"
    with pytest.raises(ValueError, match=r"mine is a file; choose another output folder\."):
        folders.refuse_full(tmp_path / "mine")


@pytest.mark.parametrize("full", [False, True])
def test_a_folder_is_complete_or_as_before(tmp_path, full):
    final = tmp_path / "out"
    if full:
        final.mkdir()
        (final / "old").write_text("old")
    with pytest.raises(KeyboardInterrupt), folders.fresh_folder(final, overwrite=True) as folder:
        (folder / "new").write_text("half")
        raise KeyboardInterrupt
    assert [path.name for path in tmp_path.rglob("*")] == (["out", "old"] if full else [])
    with folders.fresh_folder(final, overwrite=True) as folder:
        (folder / "new").write_text("whole")
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "new"]


@pytest.mark.parametrize(
    ("script", "words"),
    [
        (quickstart, ()),
        (pretrain, ("--texts", "absent")),
        (finetune, ("--model", "absent", "--texts", "absent")),
        (convert, ("--model", "absent")),
    ],
)
def test_every_writer_refuses_first(script, words, tmp_path):
    (tmp_path / "mine").write_text("kept")
    with pytest.raises(ValueError, match="is not empty"):
        script.main(options(script, *words, "--output_dir", tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


@pytest.mark.parametrize("script", [pretrain, finetune])
def test_overwriting_takes_nothing_away_for_what_cannot_be_read(script, tmp_path):
    state = tmp_path / "out.training" / "checkpoint-3" / "trainer_state.json"
    state.parent.mkdir(parents=True)
    state.write_text('{"global_step": 3}')
    words = ("--texts", "absent", "--model", tmp_path / "nothing", "--output_dir", tmp_path / "out", "--overwrite")
    with pytest.raises((ValueError, OSError)):
        script.main(options(script, *words))
    assert state.exists()


# Texts


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.txt", b"", "a.txt holds no text."),
        ("a.txt", b"ab\xffc", "a.txt is not UTF-8 at byte 2; convert it first."),
        ("a.jsonl", b'{"text": "x"}\n\n{"body": "y"}\n', 'a.jsonl, line 3 has no text in a field "text".'),
        ("a.jsonl", b"{text}", "a.jsonl, line 1 is not JSON"),
        ("b.txt", None, "There is no file "),
    ],
)
def test_unreadable_texts_say_where(tmp_path, name, content, words):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError) as error:
        corpus.read_documents([tmp_path / name])
    assert words in str(error.value)


def test_documents(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "one\\u2028"}\n{"text": "two"}\n', encoding="utf-8")
    (tmp_path / "b.md").write_bytes("drei\r\nöäü".encode())
    assert corpus.read_documents([tmp_path / "a.jsonl", tmp_path / "b.md"]) == ["one\u2028", "two", "drei\r\nöäü"]


@pytest.mark.parametrize(("length", "window", "stride"), [(1, 8, 4), (8, 8, 8), (9, 8, 8), (50, 8, 3), (50, 64, 1)])
def test_windows_score_each_token_once(length, window, stride):
    covered = corpus.windows(length, window, stride)
    assert [i for _, first, end in covered for i in range(first, end)] == list(range(length))
    for number, (begin, first, end) in enumerate(covered):
        assert 0 <= begin <= first < end <= length
        assert end - begin <= window
        assert number == 0 or first - begin >= window - stride


def test_score_is_the_sum_over_all_tokens(checkpoint, tokenizer):
    """In one window, the loss that the model itself gives; in many, each token with its own context."""
    model = LamoeForCausalLM.from_pretrained(checkpoint).eval()
    text = TEXT[:100] + "öß€"
    ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer(text)["input_ids"]]])
    whole = corpus.score(model, tokenizer, [text], window=160, stride=160)
    with torch.no_grad():
        expected = model(ids, labels=ids).loss.item() * (ids.shape[1] - 1)
    assert whole.nats == pytest.approx(expected, rel=1e-5)
    assert (whole.tokens, whole.bytes) == (ids.shape[1] - 1, 100 + 2 + 2 + 3)
    assert whole.bits_per_byte == pytest.approx(expected / math.log(2) / 107, rel=1e-5)

    pieces = corpus.score(model, tokenizer, [text, text], window=24, stride=7, batch_size=3)
    nats = 0.0
    for begin, first, end in corpus.windows(ids.shape[1] - 1, 24, 7):
        chances = logits(model, ids[:, begin:end]).log_softmax(-1)[0]
        nats -= sum(chances[i - begin, ids[0, i + 1]].item() for i in range(first, end))
    assert pieces.nats == pytest.approx(2 * nats, rel=1e-5)
    assert pieces.tokens == 2 * whole.tokens


def test_score_refuses_gaps(tokenizer):
    with pytest.raises(ValueError, match="stride=9 does not lie between 1 and window=8"):
        corpus.score(None, tokenizer, ["x"], window=8, stride=9)


# quickstart


@pytest.fixture(scope="module")
def quickstarted(tmp_path_factory):
    """What three steps of the quickstart leave behind and print."""
    folder = tmp_path_factory.mktemp("quickstart")
    (folder / "text.txt").write_text(TEXT, encoding="utf-8")
    sizes = {"vocab_size": 400, "batch_size": 2, "sequence_length": 64, "held_out": 0.1, "max_new_tokens": 4}
    words = ["--steps", 3, *(word for name, size in sizes.items() for word in (f"--{name}", size))]
    with pytest.MonkeyPatch.context() as patch:
        printed = []
        patch.setattr(quickstart.Console, "print", lambda self, *values: printed.extend(values))
        quickstart.main(options(quickstart, *words, "--text", folder / "text.txt", "--output_dir", folder / "out"))
    return folder / "out", printed


def test_quickstart_leaves_a_dual_mode_folder(quickstarted):
    folder, _ = quickstarted
    assert not [path.name for path in folder.parent.iterdir() if path.name.startswith(".")]
    written = json.loads((folder / "config.json").read_text())
    assert (written["model_type"], written["vocab_size"], written["use_cache"]) == ("deepseek_v3", 400, True)
    assert (folder / "modeling_lamoe.py").is_file()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.decode(tokenizer("To be, or not tö be\n")["input_ids"]) == "To be, or not tö be\n"
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (written["eos_token_id"], written["pad_token_id"])


def test_quickstart_prints_what_it_measured(quickstarted):
    _, printed = quickstarted
    tables = {table.title: table for table in printed if hasattr(table, "columns")}
    model, training, ways = (
        {cells[0]: cells[1:] for cells in zip(*(list(c.cells) for c in table.columns), strict=True)}
        for table in (tables["The model"], tables["The training"], tables["Equal, three ways"])
    )
    config = LamoeConfig.from_preset("tiny", vocab_size=400)
    expected = LamoeForCausalLM(config)
    assert model["parameters"] == (f"{sum(p.numel() for p in expected.parameters()):,}",)
    assert model["KV cache a token in bf16: latent attention"] == ("1,280 bytes",)
    before, after = training["loss, nats a token"]
    assert float(before) == pytest.approx(math.log(400), rel=0.1)
    assert float(after) < float(before)
    assert ways["native"][0] == "DeepseekV3ForCausalLM"
    assert {cells[0] for cells in ways.values()} == {"DeepseekV3ForCausalLM", "LamoeForCausalLM"}
    assert all(float(cells[1]) < 1e-4 for cells in ways.values())


def test_active_parameters_are_those_that_a_token_changes():
    """Counted by hand for the tiny preset, and by gradients: experts that were not chosen get none."""
    model = LamoeForCausalLM(LamoeConfig.from_preset("tiny", vocab_size=64, num_hidden_layers=2))
    total, active = quickstart.count_parameters(model)
    model(random_ids(1, 2, vocab_size=64), labels=torch.tensor([[-100, 3]])).loss.backward()
    model.zero_grad()
    ids = torch.tensor([[5]])
    model(ids).logits.sum().backward()
    reached = 0
    for name, parameter in model.named_parameters():
        if ".experts." in name:
            reached += int((parameter.grad.flatten(1).abs().sum(1) > 0).sum()) * parameter[0].numel()
        else:
            reached += parameter.numel()
    assert (active, total) == (reached, sum(p.numel() for p in model.parameters()))


# generate


def test_generate_from_a_prompt(checkpoint, capsys):
    generate.main(options(generate, "--model", checkpoint, "--prompt", "To be", "--max_new_tokens", 6, "--stats"))
    printed = capsys.readouterr().out
    assert printed.startswith("To be")
    rows = dict(line.strip("│").split("│") for line in printed.splitlines() if line.startswith("│"))
    rows = {name.strip(): value.strip() for name, value in rows.items()}
    assert rows["new tokens"] == "6"
    assert rows["cache a token, measured"] == rows["cache a token, by formula"] == f"{3 * (16 + 4) * 4} bytes"


@pytest.mark.parametrize("static", [False, True])
def test_generate_samples_from_the_seed(checkpoint, capsys, static):
    words = ["--model", checkpoint, "--prompt", "To be", "--temperature", 1, "--max_new_tokens", 8]
    printed = []
    for seed in (1, 1, 2):
        generate.main(options(generate, *words, "--seed", seed, *["--static"] * static))
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1] != printed[2]


def test_generate_answers_a_chat(checkpoint, tokenizer, tmp_path, capsys):
    with pytest.raises(ValueError, match=r"has no chat template; use --prompt\."):
        generate.main(options(generate, "--model", checkpoint, "--chat", "Who's there?"))
    with pytest.raises(ValueError, match=r"Give exactly one of --prompt and --chat\."):
        generate.main(options(generate, "--model", checkpoint))
    tokenizer.save_pretrained(tmp_path)
    talking = AutoTokenizer.from_pretrained(tmp_path)
    talking.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}answer:"
    arguments = options(generate, "--model", "x", "--chat", "Who's there?", "--system", "Be brief.")
    inputs = generate.encode(talking, arguments)
    assert tokenizer.decode(inputs["input_ids"][0]) == "system: Be brief.\nuser: Who's there?\nanswer:"


# evaluate


def test_evaluate(checkpoint, tokenizer, text_file, tmp_path, capsys):
    (tmp_path / "two.jsonl").write_text('{"text": "To be"}\n{"text": "or not to be"}\n')
    words = ["--model", checkpoint, "--texts", text_file, tmp_path / "two.jsonl", "--window", 100, "--stride", 50]
    evaluate.main(options(evaluate, *words, "--json"))
    first, second, both = map(json.loads, capsys.readouterr().out.splitlines())
    assert (first["bytes"], second["bytes"], both["bytes"]) == (6_000, 17, 6_017)
    assert first["tokens"] == len(tokenizer(TEXT[:6_000])["input_ids"])
    assert both["nats"] == pytest.approx(first["nats"] + second["nats"])
    assert both["perplexity"] == pytest.approx(math.exp(both["nats"] / both["tokens"]))
    assert both["bits_per_byte"] == pytest.approx(both["nats"] / math.log(2) / 6_017)
    evaluate.main(options(evaluate, *words))
    assert f"{both['bits_per_byte']:.4f}" in capsys.readouterr().out


@pytest.mark.parametrize("script", [evaluate, finetune])
def test_a_tokenizer_that_is_too_large_is_refused(script, checkpoint, tmp_path, text_file):
    larger = quickstart.train_tokenizer(TEXT, 310)
    for file in checkpoint.iterdir():
        (tmp_path / "model").mkdir(exist_ok=True)
        (tmp_path / "model" / file.name).write_bytes(file.read_bytes())
    larger.save_pretrained(tmp_path / "model")
    words = ["--model", tmp_path / "model", "--texts", text_file]
    words += ["--output_dir", tmp_path / "out"] if script is finetune else []
    with pytest.raises(ValueError, match=r"has 310 entries and the model's vocabulary 304; .*embeddings\(310\)"):
        script.main(options(script, *words))


# finetune


def test_generate_drafts_with_mtp_layers(mtp_checkpoint, tokenizer, tmp_path, capsys):
    model = LamoeForCausalLM.from_pretrained(mtp_checkpoint, dtype=torch.float32)
    model.resize_token_embeddings(304)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    words = ["--model", tmp_path, "--prompt", "To be", "--max_new_tokens", 8, "--stats"]
    generate.main(options(generate, *words))
    plain = capsys.readouterr().out
    generate.main(options(generate, *words, "--mtp"))
    drafted = capsys.readouterr().out
    assert drafted.splitlines()[0] == plain.splitlines()[0]
    assert re.search(r"drafts accepted.*\d% in \d rounds; by depth: \d of \d", " ".join(drafted.split()))
    assert "drafts accepted" not in plain


# convert


def same_logits(folder, source, dtype=torch.float32):
    ids = random_ids(2, 15)
    native = AutoModelForCausalLM.from_pretrained(source, dtype=dtype)
    ours = LamoeForCausalLM.from_pretrained(folder, dtype=dtype)
    torch.testing.assert_close(logits(ours, ids), logits(native, ids), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_convert_every_family(family, tmp_path, capsys):
    native_model(family, torch.float32).save_pretrained(tmp_path / "in")
    convert.main(options(convert, "--model", tmp_path / "in", "--output_dir", tmp_path / "out"))
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["model_type"] == ("deepseek_v2" if family.startswith("v2") else "deepseek_v3")
    assert written["num_nextn_predict_layers"] == 0
    assert "auto_map" in written
    same_logits(tmp_path / "out", tmp_path / "in")
    printed = capsys.readouterr().out
    assert f"source by {type(native_model(family)).__name__}" in printed
    assert "remote code" in printed


def test_convert_kimi_k2_by_its_own_name(tmp_path, capsys):
    native_model("kimi-k2", torch.float32).save_pretrained(tmp_path / "in")
    file = tmp_path / "in" / "config.json"
    written = json.loads(file.read_text()) | {"model_type": "kimi_k2"}
    file.write_text(json.dumps(written))
    convert.main(options(convert, "--model", tmp_path / "in", "--output_dir", tmp_path / "out"))
    assert "source by DeepseekV3ForCausalLM" in capsys.readouterr().out


def test_convert_says_what_is_not_native(tmp_path, capsys):
    config = LamoeConfig.from_preset("tiny", vocab_size=64, num_hidden_layers=2, n_shared_experts=0)
    LamoeForCausalLM(config).save_pretrained(tmp_path / "in")
    convert.main(options(convert, "--model", tmp_path / "in", "--output_dir", tmp_path / "out"))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "lamoe"
    printed = " ".join(capsys.readouterr().out.split())
    assert "(n_shared_experts=0: the native classes always have one); the folder will say model_type lamoe" in printed


@pytest.mark.parametrize("shard_size", ["5GB", "40KB"])
def test_convert_keeps_mtp_layers_byte_for_byte(mtp_checkpoint, tmp_path, shard_size):
    out = tmp_path / "out"
    convert.main(options(convert, "--model", mtp_checkpoint, "--output_dir", out, "--max_shard_size", shard_size))
    assert json.loads((out / "config.json").read_text())["num_nextn_predict_layers"] == 1
    before, after = checkpoint_tensors(mtp_checkpoint), checkpoint_tensors(out)
    assert set(before) == set(after)
    assert (out / "model.safetensors").exists() == (shard_size == "5GB")
    for name in before:
        with safe_open(before[name], "pt") as a, safe_open(after[name], "pt") as b:
            old, new = a.get_tensor(name), b.get_tensor(name)
        assert new.dtype == (torch.float32 if ".mlp.gate." in name else old.dtype)  # routers are float32
        assert torch.equal(old.float(), new.float()), name
    assert (out / "tokenizer.json").read_text() == "{}"
    same_logits(out, mtp_checkpoint)


def test_convert_drops_mtp_layers_if_told_to(mtp_checkpoint, tmp_path):
    words = ["--model", mtp_checkpoint, "--output_dir", tmp_path / "out", "--mtp", "drop"]
    convert.main(options(convert, *words))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_nextn_predict_layers"] == 0
    assert not [name for name in checkpoint_tensors(tmp_path / "out") if "layers.3." in name]


def quantise(folder: Path, block: int = 16) -> dict[str, torch.Tensor]:
    """Turn the checkpoint in `folder` into an FP8 one in blocks, and return what its weights mean."""
    stored, meant = {}, {}
    for name, weight in load_file(folder / "model.safetensors").items():
        stored[name] = meant[name] = weight
        if not name.endswith(("proj.weight", "proj_with_mqa.weight")):
            continue
        stored[name] = torch.empty_like(weight, dtype=torch.float8_e4m3fn)
        stored[f"{name}_scale_inv"] = torch.empty([-(-size // block) for size in weight.shape])
        meant[name] = torch.empty_like(weight, dtype=torch.float32)
        for i, j in torch.cartesian_prod(*map(torch.arange, stored[f"{name}_scale_inv"].shape)).tolist():
            at = slice(i * block, (i + 1) * block), slice(j * block, (j + 1) * block)
            scale = weight[at].float().abs().max() / 448
            stored[f"{name}_scale_inv"][i, j] = scale
            stored[name][at] = (weight[at] / scale).to(torch.float8_e4m3fn)
            meant[name][at] = stored[name][at].float() * scale
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    scheme = {"quant_method": "fp8", "weight_block_size": [block, block]}
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": scheme}))
    return meant


def test_convert_dequantises_fp8_blocks_that_are_not_full(tmp_path):
    """V3's kv_a_proj_with_mqa has 576 rows in blocks of 128; here they are 20 in blocks of 16."""
    native_model("v3", torch.float32).to(torch.bfloat16).save_pretrained(tmp_path / "in")
    meant = quantise(tmp_path / "in")
    convert.main(options(convert, "--model", tmp_path / "in", "--output_dir", tmp_path / "out"))
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert set(written) == set(meant)
    for name, weight in written.items():
        torch.testing.assert_close(weight.float(), meant[name].float(), rtol=2**-8, atol=0, msg=name)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]


def test_convert_refuses_a_missing_scale(tmp_path):
    native_model("v3", torch.float32).save_pretrained(tmp_path / "in")
    quantise(tmp_path / "in")
    tensors = load_file(tmp_path / "in" / "model.safetensors")
    del tensors["model.layers.0.self_attn.o_proj.weight_scale_inv"]
    save_file(tensors, tmp_path / "in" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"o_proj.weight is FP8 and needs scales \[2, 2\] in .*; there is none"):
        convert.main(options(convert, "--model", tmp_path / "in", "--output_dir", tmp_path / "out"))
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda folder: (folder / "config.json").unlink(), "has no config.json"),
        (lambda folder: (folder / "model.safetensors").rename(folder / "model.bin"), "only safetensors are read"),
        (
            lambda folder: (folder / "model.safetensors").write_bytes(
                (folder / "model.safetensors").read_bytes()[:-100]
            ),
            "is damaged or cut short",
        ),
        (
            lambda folder: (folder / "model.safetensors.index.json").write_text(
                '{"weight_map": {"lm_head.weight": "../model.safetensors"}}'
            ),
            "which is no file of that folder",
        ),
    ],
)
def test_convert_refuses_what_it_cannot_read(checkpoint, tmp_path, spoil, words):
    (tmp_path / "in").mkdir()
    for file in checkpoint.iterdir():
        (tmp_path / "in" / file.name).write_bytes(file.read_bytes())
    spoil(tmp_path / "in")
    with pytest.raises(ValueError, match=words):
        convert.main(options(convert, "--model", tmp_path / "in", "--output_dir", tmp_path / "out"))
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_convert_leaves_nothing_if_logits_differ(checkpoint, tmp_path):
    words = ["--model", checkpoint, "--output_dir", tmp_path / "out", "--tolerance", "-1"]
    with pytest.raises(ValueError, match=r"away from those by"):
        convert.main(options(convert, *words))
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match="is both source and output folder"):
        convert.main(options(convert, "--model", checkpoint, "--output_dir", checkpoint, "--overwrite"))
