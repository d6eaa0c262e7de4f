"""Texts for the commands: files to documents, documents to packed sequences, and how well a model predicts them."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor


def read_documents(files: Sequence[str]) -> list[str]:
    """The texts in `files`: a `.jsonl` file holds one in the field "text" of each line, any other file is one itself.

    Raises:
        ValueError: a file is empty or not UTF-8, or a line has no "text"; the message says where.
    """
    documents = []
    for path in map(Path, files):
        try:
            content = path.read_bytes().decode("utf-8")
        except FileNotFoundError as error:
            raise ValueError(f"There is no file {path}.") from error
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not UTF-8 at byte {error.start}; convert it first.") from error
        found = [content]
        if path.suffix == ".jsonl":
            found = [
                _text_of(line, f"{path}, line {i}") for i, line in enumerate(content.split("\n"), 1) if line.strip()
            ]
        if not any(found):
            raise ValueError(f"{path} holds no text.")
        documents += found
    return documents


def _text_of(line: str, where: str) -> str:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is not JSON: {error}.") from error
    if not isinstance(record, dict) or not isinstance(record.get("text"), str):
        raise ValueError(f'{where} has no field "text" that holds a string.')
    return record["text"]


def refuse_larger_tokenizer(tokenizer, vocab_size: int):
    """Raise if the tokenizer makes ids that the model has no embedding for."""
    if len(tokenizer) > vocab_size:
        raise ValueError(
            f"The tokenizer has {len(tokenizer)} entries and the model's vocabulary {vocab_size}; take the tokenizer "
            f"that belongs to the model, or call model.resize_token_embeddings({len(tokenizer)}) and save it first."
        )


def pack(tokenizer, documents: Sequence[str], sequence_length: int) -> list[dict[str, Tensor]]:
    """Training examples of exactly `sequence_length` tokens: documents end to end, each closed by the end token.

    Raises:
        ValueError: the documents do not fill one sequence.
    """
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    stream = []
    for document in documents:
        stream += tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"] + end
    rows = len(stream) // sequence_length
    if rows < 1:
        raise ValueError(
            f"The text is {len(stream)} tokens, less than one sequence of {sequence_length}; lower --sequence_length."
        )
    packed = torch.tensor(stream[: rows * sequence_length]).view(rows, sequence_length)
    return [{"input_ids": row, "labels": row} for row in packed]


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
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if start is None:
        raise ValueError("The tokenizer has no beginning or end token to predict the first token from; set one.")
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
