"""Every recipe fits its script and the model that it names; those that need no download run."""

import json
from pathlib import Path

import pytest
import torch

from lamoe.scripts import finetune, pretrain
from lamoe.scripts.rewards import lines_of_verse
from tests import tiny
from tests.commands import options
from tests.registry import native_tiny
from tests.tiny import native_model

ROOT = Path(__file__).resolve().parents[1]
RECIPES = {path.stem: path for path in sorted((ROOT / "scripts" / "recipes").glob("*.yaml"))}
# The tiny model of the family that a recipe names.
FAMILIES = {
    "sft-v2-lite": "v2-lite",
    "sft-moonlight": "moonlight",
    "sft-glm-4.7-flash": "glm-4.7-flash",
    "sft-qwen3-30b-a3b": "qwen3_moe",
    "sft-mixtral": "mixtral",
}


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_fits_its_script_and_yields_to_flags(name, tmp_path):
    script = pretrain if name == "pretrain" else finetune
    arguments = options(script, "--config", RECIPES[name], "--output_dir", "elsewhere", "--seed", 7)
    assert (arguments.output_dir, arguments.seed) == ("elsewhere", 7)
    assert isinstance(arguments.learning_rate, float) and 0 < arguments.learning_rate < 0.1
    if script is pretrain:
        pretrain.settings(arguments, tmp_path)
    else:
        finetune.trl_config(arguments, tmp_path, "float32")
    for reward in getattr(arguments, "reward", []):
        assert callable(finetune.find_reward(reward))
    command, _, rest = RECIPES[name].read_text().partition("\n")
    assert command.startswith(f"# lamoe {script.__name__.rpartition('.')[2]} --config scripts/recipes/{name}.yaml ")


def test_every_recipe_of_a_published_model_has_a_family():
    assert {name for name in RECIPES if name.startswith("sft-")} == set(FAMILIES)


@pytest.mark.parametrize("name", FAMILIES)
def test_targets_are_layers_of_the_model(name):
    """Each target ends the name of some layer, and none is of kv_b_proj, of a router or of the routed experts."""
    arguments = options(finetune, "--config", RECIPES[name], "--output_dir", "x")
    family = FAMILIES[name]
    model = native_model(family, torch.float32) if family in tiny.FAMILIES else native_tiny(family)
    layers = [layer for layer, _ in model.named_modules()]
    hit = {target: [layer for layer in layers if layer.endswith(f".{target}")] for target in arguments.targets}
    assert all(hit.values()), hit
    chosen = [layer for layers in hit.values() for layer in layers]
    assert not [layer for layer in chosen if "kv_b_proj" in layer or ".experts." in layer or layer.endswith(".gate")]
    attention = [layer for layer in layers if ".self_attn." in layer and layer.endswith("_proj")]
    assert set(attention) - set(chosen) <= {layer for layer in layers if layer.endswith("kv_b_proj")}
    if not arguments.boost:
        assert set(arguments.targets) <= set(finetune.TARGETS)


@pytest.mark.parametrize("name", ["dpo", "grpo"])
def test_recipes_for_preferences_and_rewards_run(checkpoint, tmp_path, monkeypatch, name):
    monkeypatch.chdir(ROOT)
    words = ["--config", RECIPES[name], "--model", checkpoint, "--output_dir", tmp_path / "out", "--steps", 1]
    finetune.main(options(finetune, *words, "--logging_steps", 1))
    (logged,) = (
        log for log in json.loads((tmp_path / "out/training.json").read_text())["log_history"] if "loss" in log
    )
    assert {"dpo": "rewards/margins", "grpo": "rewards/lines_of_verse/mean"}[name] in logged


def test_the_reward_of_the_recipe():
    verse = "To be, or not to be: that is the question:"
    assert lines_of_verse([verse, f"{verse}\n\nWhether", "", "x" * 61]) == [1.0, 0.5, 0.0, 0.0]
    assert lines_of_verse([[{"role": "assistant", "content": verse}]], prompts=["x"]) == [1.0]


def test_preferences_are_words_of_the_plays():
    plays = (ROOT / "scripts/data/shakespeare.txt").read_text(encoding="utf-8")
    rows = [json.loads(line) for line in (ROOT / "scripts/data/preferences.jsonl").read_text().splitlines()]
    assert len(rows) == 32
    for row in rows:
        assert row["prompt"] + row["chosen"] in plays
        assert sorted(row["chosen"].split()) == sorted(row["rejected"].split())
