"""The code bundle of a saved checkpoint, in fresh processes: without Lamoe, without Triton, without sockets."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lamoe import LamoeForCausalLM, LamoeForSequenceClassification, LamoeForTokenClassification
from lamoe.hub import checkpoint_tensors, compare_logits, load_complete, load_three_ways
from tests.test_moe import make_config
from tests.tiny import FAMILIES, lamoe_model, random_ids

ROOT = Path(__file__).resolve().parents[1]
CODE = {
    "attention", "attention_choice", "cache", "configuration_lamoe", "continuous", "correction", "decode_graph",
    "decode_step", "experts", "float8", "generation", "kernels_attention", "kernels_decode", "kernels_gated",
    "kernels_gemm", "kernels_heads", "kernels_hidden", "kernels_launch", "kernels_logits", "kernels_loss",
    "kernels_moe", "kernels_norm", "kernels_plan", "kernels_router", "kernels_step", "kernels_tiles",
    "kernels_up", "kernels_weight", "kernels_wide", "losses", "modeling_lamoe", "moe", "mtp", "mtp_checkpoint",
    "mtp_drafts", "mtp_generation", "pages", "precision", "prefill", "projections", "recompute", "replay",
    "token_loss",
}  # fmt: skip

# What every child process begins with: neither package can be found, and a socket is an error.
BARE = """
import socket, sys, os
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("lamoe", "triton"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Absent())
import torch, transformers
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
def refuse(*args, **kwargs):
    raise OSError("a socket was opened")
socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
torch.manual_seed(0)
ids = torch.arange(12).view(2, 6)
"""


def child(code: str, folder: Path, *arguments) -> dict:
    """Run `BARE` + `code` in a new process with a module cache of its own; the last line that it prints, as JSON."""
    import os

    environment = {**os.environ, "HF_MODULES_CACHE": str(folder / "modules"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", BARE + code, *map(str, arguments)],
        capture_output=True, text=True, cwd=folder, env=environment, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture
def saved(tmp_path):
    torch.manual_seed(0)
    model = LamoeForCausalLM(make_config()).eval()
    model.save_pretrained(tmp_path / "model")
    return model, tmp_path / "model"


def test_bundle_is_the_repository_byte_for_byte(saved):
    _, folder = saved
    assert {file.stem for file in folder.glob("*.py")} == CODE
    for name in CODE:
        origin = ROOT / ("configuration" if name == "configuration_lamoe" else "modeling") / f"{name}.py"
        assert (folder / f"{name}.py").read_bytes() == origin.read_bytes(), name


LIVES = """
import json
source, target = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(source, trust_remote_code=True).eval()
logits = model(ids).logits
generated = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False)
model.train()
optimizer = torch.optim.SGD(model.parameters(), 0.1)
losses = []
for _ in range(3):
    loss = model(ids, labels=ids).loss
    loss.backward(); optimizer.step(); optimizer.zero_grad(); model.update_router_bias()
    losses.append(loss.item())
model.save_pretrained(target)
print(json.dumps({"module": type(model).__module__, "logits": logits.tolist(), "losses": losses,
                  "generated": generated.tolist(), "lamoe": "lamoe" in sys.modules}))
"""


def test_bundle_works_trains_and_saves_itself_again(saved, tmp_path):
    model, folder = saved
    ids = torch.arange(12).view(2, 6)
    first = child(LIVES, tmp_path, folder, tmp_path / "second")
    assert first["module"].startswith("transformers_modules.") and not first["lamoe"]
    torch.testing.assert_close(torch.tensor(first["logits"]), model(ids).logits)
    mask = torch.ones_like(ids)
    assert first["generated"] == model.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False).tolist()
    assert first["losses"][2] < first["losses"][0]

    second = tmp_path / "second"
    for file in folder.glob("*.py"):
        assert (second / file.name).read_bytes() == file.read_bytes()
    for key in ("auto_map", "model_type", "architectures"):
        assert (
            json.loads((second / "config.json").read_text())[key]
            == json.loads((folder / "config.json").read_text())[key]
        )
    third = child(LIVES, tmp_path, second, tmp_path / "third")
    ours = load_complete(LamoeForCausalLM, second).eval()
    torch.testing.assert_close(torch.tensor(third["logits"]), ours(ids).logits)
    assert {file.stem for file in (tmp_path / "third").glob("*.py")} == CODE


TWO = """
import json
one, two = sys.argv[1:]
load = lambda folder: AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
first = load(one)
before = first(ids).logits
second = load(two)
other = second(ids).logits
print(json.dumps({
    "same": torch.equal(first(ids).logits, before), "again": torch.equal(load(one)(ids).logits, before),
    "differs": float((other - before).abs().max()), "apart": type(first) is not type(second),
    "attention apart": type(first.model.layers[0].self_attn) is not type(second.model.layers[0].self_attn),
}))
"""


def test_two_revisions_do_not_touch_each_other(saved, tmp_path):
    _, folder = saved
    other = tmp_path / "later" / "model"  # the same name, as two revisions of one repository have
    shutil.copytree(folder, other)
    code = (other / "attention.py").read_text()
    changed = code.replace("scale = config.qk_head_dim**-0.5", "scale = 3 * config.qk_head_dim**-0.5")
    assert changed != code
    (other / "attention.py").write_text(changed)
    found = child(TWO, tmp_path, folder, other)
    assert found["same"] and found["again"] and found["apart"] and found["attention apart"]
    assert found["differs"] > 1e-3


TWO_EXPERTS = """
import json
one, two = sys.argv[1:]
kept = {"trust_remote_code": True, "experts_implementation": "lamoe"}
load = lambda folder: AutoModelForCausalLM.from_pretrained(folder, **kept).eval()
first = load(one)
before = first(ids).logits
second = load(two)
grouped = AutoModelForCausalLM.from_pretrained(one, trust_remote_code=True, experts_implementation="grouped_mm").eval()
print(json.dumps({
    "same": torch.equal(first(ids).logits, before), "differs": float((second(ids).logits - before).abs().max()),
    "grouped": float((grouped(ids).logits - before).abs().max()),
}))
"""


def test_two_revisions_share_a_registry_and_run_their_own_experts(saved, tmp_path):
    """Without Triton, too: then by grouped_mm."""
    _, folder = saved
    other = tmp_path / "later" / "model"
    shutil.copytree(folder, other)
    code = (other / "experts.py").read_text()
    changed = code.replace(
        "out if shared is None else out + shared", "3 * out if shared is None else 3 * out + shared"
    )
    assert changed != code
    (other / "experts.py").write_text(changed)
    found = child(TWO_EXPERTS, tmp_path, folder, other)
    assert found["same"] and found["grouped"] < 1e-5 and found["differs"] > 1e-3


LEAVES_NO_TRACE = """
import json
from transformers.conversion_mapping import USER_REGISTERED_MAPPINGS
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.dynamic_module_utils import get_class_from_dynamic_module
import builtins, logging, pathlib, warnings
def state():
    return {
        "attention": sorted(ALL_ATTENTION_FUNCTIONS), "experts": sorted(ALL_EXPERTS_FUNCTIONS),
        "types": sorted(CONFIG_MAPPING), "environment": dict(os.environ), "filters": list(map(str, warnings.filters)),
        "operators": sorted(dir(torch.ops)), "handlers": [str(h) for h in logging.getLogger().handlers],
        "dtype": str(torch.get_default_dtype()), "threads": torch.get_num_threads(), "hooks": len(sys.meta_path),
        "mappings": sorted(USER_REGISTERED_MAPPINGS),
    }
before = state()
written, opened = [], builtins.open
cache = os.environ["HF_MODULES_CACHE"]
def watch(file, mode="r", *args, **kwargs):
    if set(mode) & set("wax+") and not str(file).startswith(cache):
        written.append(str(file))
    return opened(file, mode, *args, **kwargs)
builtins.open = watch
get_class_from_dynamic_module("modeling_lamoe.LamoeForCausalLM", sys.argv[1])
after = state()
print(json.dumps({"changed": {k: [before[k], after[k]] for k in before if before[k] != after[k]}, "written": written}))
"""


def test_importing_the_bundle_leaves_no_trace_but_its_own_name(saved, tmp_path):
    _, folder = saved
    found = child(LEAVES_NO_TRACE, tmp_path, folder)
    before, after = found["changed"].pop("experts")
    assert sorted([*before, "lamoe"]) == after
    assert found == {"changed": {"mappings": [[], ["lamoe"]]}, "written": []}


HEADS = """
import json
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification
sequences, tokens, own = sys.argv[1:]
a = AutoModelForSequenceClassification.from_pretrained(sequences, trust_remote_code=True).eval()
b = AutoModelForTokenClassification.from_pretrained(tokens, trust_remote_code=True).eval()
c = AutoModelForCausalLM.from_pretrained(own, trust_remote_code=True).eval()
base = AutoModel.from_pretrained(own, trust_remote_code=True).eval()
print(json.dumps([a(ids[:1]).logits.tolist(), b(ids).logits.tolist(), c(ids).logits.tolist(), type(base).__name__]))
"""


def test_every_head_and_what_is_not_native_load_by_remote_code(tmp_path):
    torch.manual_seed(0)
    ids = torch.arange(12).view(2, 6)
    heads = (LamoeForSequenceClassification, LamoeForTokenClassification, LamoeForCausalLM)
    models = [head(make_config(num_labels=3)).eval() for head in heads[:2]]
    models.append(LamoeForCausalLM(make_config(n_shared_experts=0)).eval())
    for i, model in enumerate(models):
        model.save_pretrained(tmp_path / str(i))
    found = child(HEADS, tmp_path, *(tmp_path / str(i) for i in range(3)))
    torch.testing.assert_close(torch.tensor(found[0]), models[0](ids[:1]).logits)
    torch.testing.assert_close(torch.tensor(found[1]), models[1](ids).logits)
    torch.testing.assert_close(torch.tensor(found[2]), models[2](ids).logits)
    assert found[3] == "LamoeModel"
    written = json.loads((tmp_path / "2" / "config.json").read_text())
    assert (written["model_type"], written["architectures"]) == ("lamoe", ["LamoeForCausalLM"])


@pytest.mark.parametrize("family", FAMILIES)
def test_saved_checkpoints_load_three_ways_with_the_names_of_today(family, tmp_path):
    native, ours = lamoe_model(family, tmp_path / "source", dtype=torch.float32)
    ours.save_pretrained(tmp_path / "saved")
    before, after = (checkpoint_tensors(tmp_path / name) for name in ("source", "saved"))
    assert set(before) == set(after)
    assert any(name.endswith("mlp.experts.0.gate_proj.weight") for name in after)
    old, new = (load_file(tmp_path / name / "model.safetensors") for name in ("source", "saved"))
    assert all(torch.equal(old[name], new[name].to(old[name].dtype)) for name in old)
    models = load_three_ways(tmp_path / "saved")
    assert [type(m).__module__.split(".")[0] for m in models.values()] == [
        "transformers",
        "transformers_modules",
        "lamoe",
    ]
    assert max(compare_logits({"source": native} | models, random_ids(2, 9)).values()) < 1e-4


def test_compare_logits_refuses_a_difference(saved):
    model, folder = saved
    other = load_complete(LamoeForCausalLM, folder)
    with torch.no_grad():
        other.model.norm.weight.mul_(1.01)
    with pytest.raises(ValueError, match=r"Logits by other are 1.00e-02 away from those by first; 1e-04 is allowed."):
        compare_logits({"first": model, "other": other}, random_ids(1, 5, vocab_size=64))


def sharded(folder: Path) -> Path:
    """Split a saved checkpoint into two shards with an index."""
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    halves = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, kept in halves.items():
        save_file({name: tensors[name] for name in kept}, folder / file, metadata={"format": "pt"})
    (folder / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": {name: file for file, kept in halves.items() for name in kept}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def edit_index(folder: Path, change):
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    change(index["weight_map"])
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def test_what_is_wrong_with_a_checkpoint_is_named(saved):
    _, folder = saved
    sharded(folder)
    load_complete(LamoeForCausalLM, folder)
    second = folder / "model-00002-of-00002.safetensors"
    whole = second.read_bytes()

    second.write_bytes(whole[:-100])
    with pytest.raises(ValueError, match=r"model-00002-of-00002.safetensors is damaged or cut short"):
        checkpoint_tensors(folder)
    second.unlink()
    with pytest.raises(ValueError, match=r"model-00002-of-00002.safetensors is missing; the index expects it"):
        checkpoint_tensors(folder)
    second.write_bytes(whole)

    edit_index(folder, lambda names: names.update({"model.extra": second.name}))
    with pytest.raises(ValueError, match=r"model.extra should be in model-00002-of-00002.safetensors and is nowhere"):
        checkpoint_tensors(folder)
    edit_index(folder, lambda names: names.pop("model.extra"))
    edit_index(folder, lambda names: names.update({"model.norm.weight": "../model.safetensors"}))
    for load in (checkpoint_tensors, LamoeForCausalLM.from_pretrained):
        with pytest.raises(
            ValueError, match=r"names '../model.safetensors', which is no file of that folder; refused"
        ):
            load(folder)


def test_the_index_of_a_variant_is_watched_too(saved):
    model, folder = saved
    model.save_pretrained(folder, variant="x", max_shard_size="20KB")
    (index,) = folder.glob("*index.x.json")
    index.write_text(index.read_text().replace('"model.x-', '"../model.x-'))
    with pytest.raises(ValueError, match=r"which is no file of that folder; refused"):
        LamoeForCausalLM.from_pretrained(folder, variant="x")


def test_a_missing_or_misshapen_expert_is_an_error_and_not_a_report(saved):
    _, folder = saved
    file = folder / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.1.mlp.experts.3.down_proj.weight"
    kept = tensors.pop(name)
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"does not fit LamoeForCausalLM: .*layers.1.mlp.experts.down_proj"):
        load_complete(LamoeForCausalLM, folder)
    tensors[name] = kept
    tensors["model.norm.weight"] = torch.ones(3)
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"does not fit LamoeForCausalLM: mismatched keys: .*model.norm.weight"):
        load_complete(LamoeForCausalLM, folder)


def test_pickled_weights_are_refused(tmp_path, saved):
    _, folder = saved
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(OSError, match=r"model.safetensors"):
        LamoeForCausalLM.from_pretrained(folder)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(
        ValueError, match=r"holds pytorch_model.bin: only safetensors are read, since pickles run code"
    ):
        checkpoint_tensors(tmp_path)
    (tmp_path / "pytorch_model.bin").unlink()
    with pytest.raises(ValueError, match=r"has neither model.safetensors nor model.safetensors.index.json"):
        checkpoint_tensors(tmp_path)
