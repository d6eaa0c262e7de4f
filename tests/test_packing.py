"""Texts from every source to packed sequences: no token lost, documents that do not leak, streams that do not end."""

import itertools
import json
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset

from lamoe import LamoeForCausalLM
from lamoe.scripts import packing

TEXTS = ["To be", "or not to be: that is the question", "", "x"]


def write(folder):
    """The same two rows in every form that there is, by the name of the source."""
    rows = Dataset.from_list([{"text": "one"}, {"text": "two"}])
    (folder / "rows.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    rows.to_parquet(folder / "rows.parquet")
    (folder / "data").mkdir()
    rows.to_parquet(folder / "data" / "train.parquet")
    rows.save_to_disk(folder / "disk")
    (folder / "one.txt").write_text("one")
    (folder / "two.md").write_text("two")
    return [["rows.jsonl"], ["rows.parquet"], ["data"], ["disk"], ["one.txt", "two.md"]]


@pytest.mark.parametrize("streaming", [False, True])
def test_every_source_gives_its_rows(tmp_path, streaming):
    for sources in write(tmp_path):
        rows = packing.load_rows([tmp_path / name for name in sources], streaming=streaming)
        assert list(packing.documents(rows)) == ["one", "two"], sources


def test_sources_that_cannot_be_read(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"There is no file .*absent.txt\."):
        packing.load_rows([tmp_path / "absent.txt"], streaming=True)
    with pytest.raises(ValueError, match=r"empty is neither a file nor a dataset whose split 'train' can be loaded: "):
        packing.load_rows([tmp_path / "empty"])
    with pytest.raises(ValueError, match=r"no text in the column 'body', but text; name the one .* --text_field\."):
        list(packing.documents([{"text": "x"}], "body"))


def test_a_name_of_the_hub_and_its_configuration(monkeypatch):
    asked = []

    def load(name, configuration, **kwargs):
        asked.append((name, configuration, kwargs))
        return Dataset.from_list([{"text": "one"}])

    monkeypatch.setattr(packing, "load_dataset", load)
    packing.load_rows(["somebody/texts:small"], "test")
    packing.load_rows(["somebody/texts"], "train", streaming=True)
    assert asked == [
        ("somebody/texts", "small", {"split": "test", "streaming": False}),
        ("somebody/texts", None, {"split": "train", "streaming": True}),
    ]


def test_separators_part_documents():
    assert list(packing.documents([{"text": "a||b||"}, {"text": "c"}], separator="||")) == ["a", "b", "c"]


@pytest.mark.parametrize("length", [1, 2, 5, 16])
def test_every_token_is_there_once_and_knows_its_place(tokenizer, length):
    """Against a plain loop over all documents."""
    begin, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    stream = [
        (token, place) for text in TEXTS for place, token in enumerate([begin, *tokenizer(text)["input_ids"], end])
    ]
    sequences = packing.pack(tokenizer, TEXTS, length)
    assert len(sequences) == len(stream) // length
    for number, row in enumerate(sequences):
        expected = stream[number * length : (number + 1) * length]
        assert row["input_ids"].tolist() == [token for token, _ in expected]
        offset = expected[0][1]  # until the first border, the row goes on with a document
        places = []
        for index, (_, place) in enumerate(expected):
            offset = 0 if index and place == 0 else offset
            places.append(place - offset)
        assert row["position_ids"].tolist() == places
        labels = [-100 if place == 0 else token for (token, _), place in zip(expected, places, strict=True)]
        assert row["labels"].tolist() == labels


def test_pieces_of_other_documents_do_not_leak(checkpoint, tokenizer):
    """In a packed row each piece has the loss and the gradients that it has in a row of its own."""
    model = LamoeForCausalLM.from_pretrained(checkpoint).train()
    model.config.aux_loss_alpha = 0.0  # per row, and the rows differ here
    row = packing.pack(tokenizer, ["to be", "not to be", "nobler in the mind to suffer"], 24)[0]
    starts = [*(row["position_ids"] == 0).nonzero().flatten().tolist(), 24]
    assert len(starts) > 3
    model(**{name: x[None] for name, x in row.items()}, num_items_in_batch=1).loss.backward()
    gradients = {name: x.grad.clone() for name, x in model.named_parameters() if x.grad is not None}
    model.zero_grad()
    for begin, end in itertools.pairwise(starts):
        ids = row["input_ids"][None, begin:end]
        model(ids, labels=ids, num_items_in_batch=1).loss.backward()
    for name, x in model.named_parameters():
        if name in gradients:
            torch.testing.assert_close(gradients[name], x.grad, rtol=1e-3, atol=1e-3)


def test_a_tokenizer_without_an_end_is_refused():
    with pytest.raises(ValueError, match=r"has no beginning or end token to predict the first token from; set one\."):
        packing.pack(SimpleNamespace(bos_token_id=None, eos_token_id=None), ["To be"], 4)


def test_too_little_text_is_refused(tokenizer, tmp_path):
    with pytest.raises(
        ValueError, match=r"has 5 characters, .* one sequence of 4000 tokens; lower --sequence_length\."
    ):
        packing.pack(tokenizer, ["To be"], 4000)
    rows = Dataset.from_list([{"text": "To be"}]).to_iterable_dataset()
    with pytest.raises(ValueError, match=r"fills 0 sequences, less than held_out=2; lower --held_out\."):
        packing.hold_out(tokenizer, rows, 2, 4000, "text", None)
    with pytest.raises(ValueError, match=r"does not fill one sequence of 4000 tokens; lower --sequence_length\."):
        next(iter(packing.PackedStream(tokenizer, rows, 4000, "text", None)))


def test_a_stream_goes_on_for_ever_and_is_the_same_each_time(tokenizer, tmp_path):
    texts = [f"{number} is a number" for number in range(200)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    rows = packing.load_rows([tmp_path / "rows.jsonl"], streaming=True)
    held_out, rest = packing.hold_out(tokenizer, rows, 3, 16, "text", None)
    assert torch.equal(held_out.input_ids, packing.pack(tokenizer, texts, 16).input_ids[:3])
    left = list(packing.documents(rest))
    assert 0 < len(left) < 200 and left == texts[-len(left) :]
    once = len(packing.pack(tokenizer, left, 16))

    def read(count, buffer):
        stream = packing.PackedStream(tokenizer, rest, 16, "text", None, buffer, seed=1)
        return torch.stack([row["input_ids"] for row in itertools.islice(stream, count)])

    plain = read(2 * once, 0)
    assert torch.equal(plain[:once], plain[once:])
    assert torch.equal(plain[:once].int(), packing.pack(tokenizer, left, 16).input_ids)
    shuffled = read(2 * once, 50)
    assert torch.equal(shuffled, read(2 * once, 50))
    assert not torch.equal(shuffled[:once], plain[:once])
    assert not torch.equal(shuffled[:once], shuffled[once:])  # each pass in an order of its own
