"""Texts to training sequences without padding: documents end to end, each knowing where it begins.

`position_ids` start anew with every document, and that is how the model knows the borders: no token attends to another
document, and none is predicted from one.
"""

import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path

import datasets
import torch
from datasets import Dataset, IterableDataset, concatenate_datasets, load_dataset, load_from_disk
from torch import Tensor

from lamoe.scripts.corpus import read_records, start_token

AT_ONCE = 64  # documents that the tokenizer gets in one call
TEXT_FILES = (".txt", ".md", ".jsonl", ".parquet")


def load_rows(
    sources: Iterable[str], split: str = "train", streaming: bool = False, fields: tuple[str, ...] = ("text",)
) -> Dataset | IterableDataset:
    """All rows of `sources`, one after the other.

    Args:
        sources: each a text file (one row with the column "text"), a `.jsonl` or `.parquet` file, a folder (of data
            files, or written by `Dataset.save_to_disk`), or the name of a dataset on the Hub, its configuration after
            a colon: "name" or "name:configuration".
        split: which split of folders and datasets.
        streaming: read while training, not before.
        fields: columns of which a row has at least one; looked at in `.jsonl` files.

    Raises:
        ValueError: a source cannot be read; the message says which and why.
    """
    return concatenate_datasets([_load(str(source), split, streaming, fields) for source in sources])


def _load(source: str, split: str, streaming: bool, fields: tuple[str, ...]) -> Dataset | IterableDataset:
    path = Path(source)
    if path.is_dir() and (path / "state.json").is_file():
        rows = load_from_disk(source)
        return rows.to_iterable_dataset() if streaming else rows
    if path.is_file() or path.suffix in TEXT_FILES:
        if path.suffix == ".parquet" and path.is_file():
            return load_dataset("parquet", data_files=source, split="train", streaming=streaming)
        if not streaming or not path.is_file():
            return Dataset.from_list(read_records(path, fields))
        if path.suffix == ".jsonl":
            return load_dataset("json", data_files=source, split="train", streaming=True)
        return load_dataset("text", data_files=source, split="train", streaming=True, sample_by="document")
    name, _, configuration = (source, "", "") if path.is_dir() else source.partition(":")
    try:
        return load_dataset(name, configuration or None, split=split, streaming=streaming)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"{source} is neither a file nor a dataset whose split {split!r} can be loaded: {reason}"
        ) from error


def documents(rows: Iterable[dict], text_field: str = "text", separator: str | None = None) -> Iterator[str]:
    """The texts of `rows`, cut at each `separator`; empty ones are left out.

    Raises:
        ValueError: a row has no string in its column `text_field`.
    """
    for row in rows:
        text = row.get(text_field)
        if not isinstance(text, str):
            raise ValueError(
                f"A row has no text in the column {text_field!r}, but {', '.join(row)}; name the one to train on "
                "with --text_field."
            )
        yield from filter(None, text.split(separator) if separator else [text])


def packed(tokenizer, texts: Iterable[str], sequence_length: int) -> Iterator[dict[str, Tensor]]:
    """Sequences of exactly `sequence_length` tokens: documents end to end, what does not fill the last one left out.

    A document is its beginning token (or the end token, if the tokenizer has none), its text and its end token; one
    that does not fit goes on in the next sequence.

    Yields:
        "input_ids", and "position_ids" that count from 0 in each document or piece of one, [sequence_length] int64.
    """
    start, end = start_token(tokenizer), tokenizer.eos_token_id
    texts, ids, places = iter(texts), [], []
    while batch := list(itertools.islice(texts, AT_ONCE)):
        for found in tokenizer(batch, add_special_tokens=False, verbose=False)["input_ids"]:
            document = [start, *found] + ([] if end is None else [end])
            ids += document
            places += range(len(document))
            whole = len(ids) - len(ids) % sequence_length
            for first in range(0, whole, sequence_length):
                part = slice(first, first + sequence_length)
                row, place = torch.tensor(ids[part]), torch.tensor(places[part])
                begun = (place != torch.arange(sequence_length) + place[0]).cumsum(0) > 0  # after the first border
                yield {"input_ids": row, "position_ids": torch.where(begun, place, place - place[0])}
            ids, places = ids[whole:], places[whole:]  # once a document, or a long one would be copied again and again


def labelled(sequence: dict[str, Tensor]) -> dict[str, Tensor]:
    """`sequence` with its labels, in int64: every token but the first of a document, which nothing predicts."""
    ids, places = sequence["input_ids"].long(), sequence["position_ids"].long()
    return {"input_ids": ids, "position_ids": places, "labels": ids.masked_fill(places == 0, -100)}


class PackedSequences(torch.utils.data.Dataset):
    """Packed sequences held in memory, eight bytes a token: `input_ids` and `position_ids` [rows, length], int32."""

    def __init__(self, input_ids: Tensor, position_ids: Tensor):
        self.input_ids, self.position_ids = input_ids, position_ids

    def __len__(self) -> int:
        return len(self.input_ids)

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        return labelled({"input_ids": self.input_ids[row], "position_ids": self.position_ids[row]})

    def split(self, count: int) -> tuple["PackedSequences", "PackedSequences"]:
        """All but the last `count` sequences, and these."""
        cut = len(self) - count
        return tuple(
            PackedSequences(self.input_ids[part], self.position_ids[part])
            for part in (slice(None, cut), slice(cut, None))
        )


def pack(tokenizer, texts: Iterable[str], sequence_length: int) -> PackedSequences:
    """`packed` sequences of all `texts`.

    Raises:
        ValueError: the texts do not fill one sequence.
    """
    read = 0

    def counted():
        nonlocal read
        for text in texts:
            read += len(text)
            yield text

    rows = [
        [sequence[name].int() for name in ("input_ids", "position_ids")]
        for sequence in packed(tokenizer, counted(), sequence_length)
    ]
    if not rows:
        raise ValueError(
            f"The text has {read} characters, which do not fill one sequence of {sequence_length} tokens; lower "
            "--sequence_length."
        )
    return PackedSequences(*(torch.stack(column) for column in zip(*rows, strict=True)))


def hold_out(tokenizer, rows: IterableDataset, count: int, sequence_length: int, text_field: str, separator):
    """The first `count` packed sequences of a stream, and the stream without the rows that they came from.

    Raises:
        ValueError: the stream ends before.
    """
    used = 0

    def counted():
        nonlocal used
        for row in rows:
            used += 1
            yield row

    found = packed(tokenizer, documents(counted(), text_field, separator), sequence_length)
    sequences = list(itertools.islice(found, count))
    if len(sequences) < count:
        raise ValueError(f"The stream fills {len(sequences)} sequences, less than held_out={count}; lower --held_out.")
    columns = (torch.stack([sequence[name].int() for sequence in sequences]) for name in ("input_ids", "position_ids"))
    return PackedSequences(*columns), rows.skip(used)


class PackedStream(torch.utils.data.IterableDataset):
    """Packed sequences of rows that are read while training, over and over, in an order that `seed` alone decides.

    Args:
        rows: a streamed dataset of Hugging Face.
        buffer: rows that are shuffled together; 0 keeps their order.
    """

    def __init__(self, tokenizer, rows: IterableDataset, sequence_length, text_field, separator, buffer=0, seed=0):
        self.rows = rows.shuffle(seed=seed, buffer_size=buffer) if buffer else rows
        self.settings = (tokenizer, sequence_length, text_field, separator)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        tokenizer, sequence_length, text_field, separator = self.settings
        for epoch in itertools.count():  # endless: resuming skips what was seen, and must not meet an end
            self.rows.set_epoch(epoch)
            empty = True
            for sequence in packed(tokenizer, documents(self.rows, text_field, separator), sequence_length):
                empty = False
                yield labelled(sequence)
            if empty:
                raise ValueError(
                    f"The stream does not fill one sequence of {sequence_length} tokens; lower --sequence_length."
                )
