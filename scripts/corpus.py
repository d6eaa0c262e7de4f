"""Texts for the commands: files to documents, a tokenizer for them, and how well a model predicts them."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

BEGIN, END = "<|begin|>", "<|end|>"


def read_records(path: str | Path, fields: Sequence[str] = ("text",)) -> list[dict]:
    """What `path` holds: a `.jsonl` file one record in each line, any other file one text, {"text": ...}.

    Args:
        fields: names of which each record has at least one, with a string or a list (of messages).

    Raises:
        ValueError: the file is missing, empty or not UTF-8, or a line holds no such record; the message says where.
    """
    path = Path(path)
    try:
        content = path.read_bytes().decode("utf-8")
    except FileNotFoundError as error:
        raise ValueError(f"There is no file {path}.") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 at byte {error.start}; convert it first.") from error
    if path.suffix == ".jsonl":
        lines = content.split("\n")  # not splitlines: a JSON string may hold other ends of lines
        records = [_record(line, fields, f"{path}, line {i}") for i, line in enumerate(lines, 1) if line.strip()]
    else:
        records = [{"text": content}] if content else []
    if not any(any(record.values()) for record in records):
        raise ValueError(f"{path} holds no text.")
    return records


def _record(line: str, fields: Sequence[str], where: str) -> dict:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is not JSON: {error}.") from error
    if not isinstance(record, dict) or not any(isinstance(record.get(name), (str, list)) for name in fields):
        names = " or ".join(f'"{name}"' for name in fields)
        raise ValueError(f"{where} has no text in a field {names}.")
    return record


def read_documents(files: Sequence[str | Path]) -> list[str]:
    """The texts in `files`: a `.jsonl` file holds one in the field "text" of each line, any other file is one itself.

    Raises:
        ValueError: as `read_records`.
    """
    return [record["text"] for path in files for record in read_records(path)]


def train_tokenizer(text: str, vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer: every text has an encoding, and decoding gives it back."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BEGIN, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(text.splitlines(keepends=True), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BEGIN, eos_token=END, pad_token=END)


def start_token(tokenizer) -> int:
    """The token that a document's first one is predicted from: the beginning token, or the end token if there is none.

    Raises:
        ValueError: the tokenizer has neither.
    """
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if start is None:
        raise ValueError("The tokenizer has no beginning or end token to predict the first token from; set one.")
    return start


def refuse_larger_tokenizer(tokenizer, vocab_size: int):
    """Raise if the tokenizer makes ids that the model has no embedding for."""
    if len(tokenizer) > vocab_size:
        raise ValueError(
            f"The tokenizer has {len(tokenizer)} entries and the model's vocabulary {vocab_size}; take the tokenizer "
            f"that belongs to the model, or call model.resize_token_embeddings({len(tokenizer)}) and save it first."
        )


@dataclass
class Score:
    """How well a model predicts texts: total nats over so many tokens, which spell so many bytes of UTF-8."""

    nats: float
    tokens: int
    bytes: int

    @property
    def loss(self) -> float:
        """Nats a token."""
        return self.nats / self.tokens

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700.0))

    @property
    def bits_per_byte(self) -> float:
        """Comparable between tokenizers, unlike loss and perplexity."""
        return self.nats / math.log(2) / self.bytes


def windows(length: int, window: int, stride: int) -> list[tuple[int, int, int]]:
    """Cover targets 0 ... length - 1: (begin, first, end) reads inputs [begin, end) and scores targets [first, end).

    Each target is scored exactly once, and after the first window with at least `window - stride` tokens before it.
    """
    covered = [(0, 0, min(window, length))]
    while (first := covered[-1][2]) < length:
        end = min(first + stride, length)
        covered.append((end - window, first, end))
    return covered


@torch.no_grad()
def score(model, tokenizer, documents: Sequence[str], window: int, stride: int, batch_size: int = 8) -> Score:
    """Score every token of every document once, each document on its own, by sliding windows.

    The first token of a document is predicted from the tokenizer's beginning token, or its end token if it has none.

    Args:
        window: tokens that the model reads at once.
        stride: tokens that a window scores, all but the first one; 1 to `window`.

    Raises:
        ValueError: `stride` is not in 1 ... `window`, or the tokenizer has neither such token.
    """
    if not 1 <= stride <= window:
        raise ValueError(f"stride={stride} does not lie between 1 and window={window}; else tokens would be left out.")
    start = start_token(tokenizer)
    training, total = model.training, Score(0.0, 0, 0)
    model.eval()
    for document in documents:
        ids = tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"]
        if not ids:
            continue
        inputs, targets = torch.tensor([start, *ids[:-1]]), torch.tensor(ids)
        first_window, *rest = windows(len(ids), window, stride)
        for batch in [[first_window], *(rest[i : i + batch_size] for i in range(0, len(rest), batch_size))]:
            keep = max(end - first for _, first, end in batch)
            wanted = torch.full((len(batch), keep), -100)
            for row, (_, first, end) in enumerate(batch):
                wanted[row, keep - (end - first) :] = targets[first:end]
            read = torch.stack([inputs[begin:end] for begin, _, end in batch]).to(model.device)
            logits = model(read, logits_to_keep=keep, use_cache=False).logits.float()
            total.nats += F.cross_entropy(
                logits.flatten(0, 1), wanted.flatten().to(logits.device), reduction="sum"
            ).item()
        total.tokens += len(ids)
        total.bytes += len(document.encode("utf-8"))
    model.train(training)
    return total
