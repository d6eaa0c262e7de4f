"""Measure perplexity and bits per byte of a checkpoint on text files."""

import json
from dataclasses import asdict, dataclass, field

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer
from trl import TrlParser

from lamoe import LamoeForCausalLM
from lamoe.hub import load_complete
from lamoe.scripts.corpus import Score, read_documents, refuse_larger_tokenizer, score


@dataclass
class Arguments:
    model: str = field(metadata={"help": "Folder of the checkpoint, with its tokenizer."})
    texts: list[str] = field(metadata={"help": 'Text files, or .jsonl files with a field "text" a line.'})
    window: int | None = field(
        default=None, metadata={"help": "Tokens that the model reads at once; 2048, or its longest position if less."}
    )
    stride: int | None = field(
        default=None,
        metadata={
            "help": "Tokens that a window scores; fewer means more context for each, and more time. Half a window."
        },
    )
    batch_size: int = field(default=4, metadata={"help": "Windows at once."})
    dtype: str = field(default="auto", metadata={"help": "auto (the checkpoint's), float32, bfloat16 or float16."})
    device: str | None = field(default=None, metadata={"help": "Where to run; a GPU if there is one."})
    json: bool = field(default=False, metadata={"help": "Print one JSON object a line instead of the table."})


def main(arguments: Arguments):
    """Print loss, perplexity and bits per byte of each file, and of all together.

    Raises:
        ValueError: a file cannot be read, the checkpoint is incomplete, or the tokenizer does not fit it.
    """
    documents = {file: read_documents([file]) for file in arguments.texts}
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    model = load_complete(LamoeForCausalLM, arguments.model, dtype=arguments.dtype)
    refuse_larger_tokenizer(tokenizer, model.config.vocab_size)
    model.to(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    window = arguments.window or min(2048, model.config.max_position_embeddings)
    stride = arguments.stride or max(1, window // 2)

    scores = {
        file: score(model, tokenizer, texts, window, stride, arguments.batch_size) for file, texts in documents.items()
    }
    if len(scores) > 1:
        parts = scores.values()
        scores["all"] = Score(sum(s.nats for s in parts), sum(s.tokens for s in parts), sum(s.bytes for s in parts))
    table = Table("text", "bytes", "tokens", "loss", "perplexity", "bits per byte")
    for name, result in scores.items():
        figures = {"loss": result.loss, "perplexity": result.perplexity, "bits_per_byte": result.bits_per_byte}
        if arguments.json:
            setup = {"model": arguments.model, "text": name, "window": window, "stride": stride}
            print(json.dumps(setup | asdict(result) | figures))
        else:
            rounded = (f"{figure:.4f}" for figure in figures.values())
            table.add_row(name, f"{result.bytes:,}", f"{result.tokens:,}", *rounded)
    if not arguments.json:
        Console().print(table)


if __name__ == "__main__":
    main(TrlParser(Arguments).parse_args_and_config()[0])
