"""The memory plan against what PyTorch really holds, at small widths on a processor."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

from lamoe import LamoeConfig, LamoeForCausalLM
from lamoe.memory import ATTENTION_AND_SHARED, GIB, memory_explained, memory_plan
from lamoe.scripts import train_speed
from lamoe.scripts.plan import Arguments, main
from lamoe.scripts.train_speed import CASES, RANK, TrainCase, adapted, documents_cost, text_batches, train_step_cost
from tests.test_recompute import kept_bytes

SHAPE = {
    "vocab_size": 320, "hidden_size": 128, "intermediate_size": 352, "moe_intermediate_size": 88,
    "num_hidden_layers": 4, "num_attention_heads": 4, "q_lora_rank": None, "kv_lora_rank": 32, "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16, "v_head_dim": 32, "n_routed_experts": 8, "num_experts_per_tok": 3, "n_shared_experts": 2,
    "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "max_position_embeddings": 64, "pad_token_id": None,
    "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip


def make(**changes) -> LamoeConfig:
    return LamoeConfig(**{**SHAPE, **changes})


def test_the_whole_of_v2_lite_by_its_published_number():
    plan = memory_plan(LamoeConfig.from_preset("v2-lite"), 1, 4096, lora_rank=16)
    assert plan.parameters == 15_706_484_224
    assert plan.trained == 11_185_152


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_gradients_and_states_are_exact(dtype):
    config = make()
    plan = memory_plan(config, 2, 8, dtype=dtype)
    model = LamoeForCausalLM._from_config(config, dtype=dtype).train()
    ids = torch.arange(16).view(2, 8)
    model.set_experts_implementation("eager")
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    model(ids, labels=ids, use_cache=False).loss.backward()
    optimizer.step()
    states = [state[name] for state in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
    grown = sum(tensor.nbytes for tensor in states)
    held = sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()])
    assert plan.parameters == plan.trained == sum(p.numel() for p in model.parameters())
    assert (plan.weights, plan.optimizer) == (held, grown)
    assert plan.gradients == sum(p.grad.nbytes for p in model.parameters())


def test_lora_is_exact():
    model = LamoeForCausalLM._from_config(make(q_lora_rank=24), dtype=torch.bfloat16)
    lora = LoraConfig(r=4, target_modules=list(ATTENTION_AND_SHARED), task_type="CAUSAL_LM")
    model = get_peft_model(model, lora, autocast_adapter_dtype=False)
    plan = memory_plan(make(q_lora_rank=24), 1, 8, lora_rank=4)
    assert plan.trained == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert plan.weights == sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()])


@pytest.mark.parametrize(
    "changes",
    [{}, {"q_lora_rank": 48}, {"first_k_dense_replace": 4}, {"n_shared_experts": 0}, {"num_experts_per_tok": 6}],
)
def test_activations_are_within_a_tenth(changes):
    """What the decoder layers keep, without embedding and head, with grouped_mm, which runs on a processor.

    A processor's norm keeps one tensor more than a GPU's, so that is taken off.
    """
    config = make(**changes)
    torch.manual_seed(0)
    model = LamoeForCausalLM(config).train()
    model.set_experts_implementation("grouped_mm")
    ids = torch.randint(0, 320, (2, 32))
    kept = kept_bytes(lambda: model.model(ids, use_cache=False).last_hidden_state, *model.parameters())
    norms = (2 * config.num_hidden_layers + 1) * config.hidden_size + config.num_hidden_layers * config.kv_lora_rank
    norms += config.num_hidden_layers * (config.q_lora_rank or 0)
    planned = memory_plan(config, 2, 32, dtype=torch.float32, experts="grouped_mm").activations
    assert abs(kept - 64 * 4 * norms - planned) < 0.1 * planned


def test_fused_experts_keep_their_pre_activation_unless_they_recompute():
    """As test_recompute.py measures it; all else that they keep is kept by others, or is a few bytes a row."""
    config = make()
    much, little = (memory_plan(config, 2, 16, expert_recompute=again).activations for again in (False, True))
    rows = 32 * config.num_experts_per_tok * len(config.moe_layers)
    assert much - little == rows * 2 * config.moe_intermediate_size * 2


def test_checkpointing_keeps_inputs_alone():
    config = make()
    model = LamoeForCausalLM(config).train()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    model.enable_input_require_grads()
    ids = torch.randint(0, 320, (2, 32))
    kept = kept_bytes(lambda: model.model(ids, use_cache=False).last_hidden_state, *model.parameters())
    plan = memory_plan(config, 2, 32, dtype=torch.float32, checkpointing=True)
    assert abs(kept - plan.activations) < 0.2 * plan.activations
    assert plan.activations < 0.1 * memory_plan(config, 2, 32, dtype=torch.float32).activations


def test_the_plan_prints_every_part_and_the_cheapest_ways_out():
    plan = memory_plan(LamoeConfig.from_preset("v2-lite", num_hidden_layers=10), 4, 4096, optimizer="sgd")
    text = str(plan)
    assert "5,764,070,400 parameters in bfloat16" in text and "activations, 4 x 4,096 tokens" in text
    assert [line.split()[-1] for line in text.splitlines()] == ["GiB"] * 6
    ways = plan.ways_out()
    assert [way.split(":")[0].split()[0] for way in ways] == ["skip_logits=True", "expert_recompute=True", "gradient"]
    # The target: at most 70 % of the 61.5 GiB that the native class took in this very step.
    assert plan.peak < 0.7 * 61.5 * GIB
    tight = memory_plan(LamoeConfig.from_preset("v2-lite"), 1, 4096, checkpointing=True, skip_logits=True)
    assert "8 bits" in tight.ways_out()[0] and "LoRA" in tight.ways_out()[1]


def test_accumulation_lets_gradients_stand_beside_activations():
    one, two = (memory_plan(make(), 2, 32, accumulation=n) for n in (1, 2))
    assert two.peak - two.weights - two.optimizer == two.gradients + two.activations + two.loss > 0
    assert one.peak <= two.peak


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"optimizer": "lion"}, "optimizer='lion' is not one of adamw, adamw_8bit, adafactor"),
        ({"dtype": torch.float64}, "dtype=torch.float64 is not one of torch.float32"),
        ({"accumulation": 0}, "batch=1, length=8 and accumulation=0 must all be at least 1."),
    ],
)
def test_what_cannot_be_planned_is_refused(given, text):
    with pytest.raises(ValueError, match=text):
        memory_plan(make(), 1, 8, **given)


def test_the_end_of_memory_shows_the_plan_and_three_ways_out():
    plan = memory_plan(LamoeConfig.from_preset("tiny"), 8, 512)
    with pytest.raises(torch.OutOfMemoryError) as caught, memory_explained(plan):
        raise torch.OutOfMemoryError("CUDA out of memory.")
    text = str(caught.value)
    assert text.startswith("CUDA out of memory.") and str(plan) in text and "Ways out:\n1. " in text
    with pytest.raises(KeyError), memory_explained(plan):
        raise KeyError("another")


def test_the_command_prints_the_plan(capsys):
    main(Arguments(preset="tiny", layers=2, batch_size=2, sequence_length=64, rank=4))
    assert "trained (LoRA r=4)" in capsys.readouterr().out
    with pytest.raises(ValueError, match="Give either --preset or --model"):
        main(Arguments())


@pytest.mark.parametrize("lora", [False, True])
def test_the_training_step_is_measured(lora, monkeypatch):
    from lamoe.scripts.benchmark import pair

    monkeypatch.setattr("lamoe.scripts.train_speed.boost", lambda model: None)  # kernels: a minute in an interpreter
    monkeypatch.setattr("lamoe.scripts.train_speed.text_batches", lambda *_: [torch.arange(32).view(2, 16)] * 2)
    models = pair("tiny", 2, "cpu", torch.float32)
    rows = train_step_cost("x", TrainCase(2, 2, lora, True), *models, 16, rounds=1)
    assert [row["model"] for row in rows] == ["lamoe", "native grouped_mm", "native boosted"]
    assert all(row["tokens_per_second"] > 0 and row["lora_rank"] == (RANK if lora else None) for row in rows)
    trained = [p for p in models[0].parameters() if p.requires_grad]
    assert len(trained) < len(list(models[0].parameters())) if lora else True


def test_cases_and_their_text(tmp_path, monkeypatch):
    text = tmp_path / "text.txt"
    text.write_text(train_speed.TEXT.read_text(encoding="utf-8")[:20000], encoding="utf-8")
    monkeypatch.setattr(train_speed, "TEXT", text)
    assert CASES["full"] == TrainCase(10, 4, False, False) and CASES["lora-checkpointed"].checkpointing
    first, second = text_batches(400, 2, 64, 2, "cpu")
    assert first.shape == (2, 64) and int(first.max()) < 400 and not torch.equal(first, second)


@pytest.mark.parametrize("preset", LamoeConfig.presets())
@pytest.mark.parametrize("options", [{"dense": True}, {"dense_layers": 0}, {"dense_layers": 1}], ids=str)
def test_rivals_share_their_weights(preset, options):
    from lamoe.scripts.benchmark import pair

    ours, native = pair(preset, 1, "meta", torch.bfloat16, **options)
    assert ours.state_dict().keys() == native.state_dict().keys()


def test_adapters_are_the_same_for_both_and_train_alone():
    from lamoe.scripts.benchmark import pair

    def trained(model):
        return {name: p.shape for name, p in adapted(model).named_parameters() if p.requires_grad}

    ours, native = map(trained, pair("tiny", 2, "cpu", torch.bfloat16))
    assert ours == native and any("shared_experts.down_proj" in name for name in ours)
    assert {name.split(".")[-3] for name in ours} == {"lora_A", "lora_B"}


def test_serving_is_measured():
    """Rounds of multi-token prediction, and continuous batching with and without tables."""
    from lamoe.scripts import benchmark

    arguments = {"preset": "tiny", "layers": 2, "context": [16]}
    (row,) = benchmark.mtp(benchmark.Arguments("mtp", new_tokens=12, **arguments))
    assert row["pays_above"] == row["round_ms"] / row["step_ms"] - 1 and 0 <= row["acceptance"] <= 1
    rows = benchmark.batching(benchmark.Arguments("batching", batch=[2], new_tokens=2, **arguments))
    assert [row["way"] for row in rows][:2] == ["lists", "tables"]
    assert all(row["tokens_per_second"] > 0 and row["requests"] == 2 for row in rows)


def test_balancing_is_measured():
    from lamoe.scripts import benchmark

    plain, balanced = benchmark.balance(benchmark.Arguments("balance", preset="tiny", layers=2, length=32))
    assert plain["cost"] == 0 and balanced["cost"] == pytest.approx(balanced["step_ms"] / plain["step_ms"] - 1)
    assert (plain["way"], balanced["way"]) == ("plain", "balanced and reported")
    with pytest.raises(ValueError, match="preset='v2-lite' has no correction bias"):
        benchmark.balance(benchmark.Arguments("balance"))


def test_attention_over_documents_is_measured():
    rows = documents_cost(2, (6, 4), 20, [5, 8], "cpu", torch.float32, ["each", "masked"])
    assert [(row["document"], row["way"]) for row in rows] == [(n, way) for n in (5, 8) for way in ("each", "masked")]
    assert all(row["ms"] > 0 for row in rows)


def test_the_table_of_the_training_step():
    from lamoe.scripts.result_tables import _train

    row = {"device": "NVIDIA H100 80GB", "case": "lora", "layers": 27, "batch": 2, "length": 4096, "lora_rank": 16}
    row["checkpointing"] = True
    speeds = {"native grouped_mm": (10000, 50.0), "native boosted": (12000, 45.0), "lamoe": (16000, 30.0)}
    rows = [row | {"model": who, "tokens_per_second": t, "peak_gib": g} for who, (t, g) in speeds.items()]
    assert _train(rows)[-1] == (
        "| 27 layers, LoRA r=16, 2 x 4,096, checkpointed, H100 | 10,000 (50.0) | 12,000 (45.0) | 16,000 (30.0) "
        "| 1.60 | 60% |"
    )
