"""What every test begins with: the same seed, and Transformers warns anew of what it says only once."""

import dataclasses
import functools
import os
from contextlib import suppress

import pytest
import torch
from transformers.utils import logging

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when Triton is imported, which nobody has done yet

with suppress(ImportError):
    import triton
    from triton.runtime import interpreter

    patched: set[int] = set()

    def call_device_function(self, *arguments, **options):
        """As the interpreter has it, but it patches Triton's language once: at each call, that is half of its time."""
        if id(self.fn.__globals__) not in patched:
            patched.add(id(self.fn.__globals__))
            interpreter._patch_lang(self.fn)
        return self.rewrite()(*arguments, **options)

    interpreter.InterpretedFunction.__call__ = call_device_function
    # it looks for overflows, a quarter of its time, and then says nothing of them
    options = dataclasses.replace(interpreter.interpreter_builder.options, sanitize_overflow=False)
    interpreter.interpreter_builder.options = options

    scalar_dtype = functools.cache(interpreter._get_np_dtype)  # it makes a table of them at each call
    address = scalar_dtype(triton.language.uint64)
    interpreter._get_np_dtype = lambda kind: address if kind.scalar.is_ptr() else scalar_dtype(kind.scalar)


@pytest.fixture(autouse=True)
def fresh_logging():
    """Undo what a script's `main`, run in this process by an earlier test, did to the verbosity."""
    logging.set_verbosity_warning()
    logging.warning_once.cache_clear()


@pytest.fixture(autouse=True)
def same_seed():
    """Let every test draw the same numbers, whichever tests ran before it."""
    torch.manual_seed(0)


@pytest.fixture
def calls(monkeypatch) -> dict[str, int]:
    """How often each of the kernels' two ways is taken."""
    from tests.registry import count_calls

    return count_calls(monkeypatch)


@pytest.fixture(scope="session")
def tokenizer():
    """A byte-level tokenizer of 300 entries, without a chat template."""
    from lamoe.scripts import quickstart

    return quickstart.train_tokenizer(quickstart.SHAKESPEARE.read_text(encoding="utf-8")[:30_000], 300)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory, tokenizer):
    """A folder with a random tiny model of V3's shape, saved by us, and a tokenizer that fits it."""
    from lamoe import LamoeForCausalLM
    from tests.tiny import native_model

    folder = tmp_path_factory.mktemp("checkpoint")
    native_model("v3", torch.float32, vocab_size=304, max_position_embeddings=160).save_pretrained(folder)
    model = LamoeForCausalLM.from_pretrained(folder)
    model.config.num_nextn_predict_layers = 0
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def mtp_checkpoint(tmp_path_factory):
    """A native checkpoint of V3's shape with one multi-token-prediction layer, in bfloat16, and its tokenizer."""
    from safetensors.torch import load_file, save_file

    from tests.tiny import native_model

    folder = tmp_path_factory.mktemp("mtp")
    native_model("v3", torch.float32, num_nextn_predict_layers=1).to(torch.bfloat16).save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    extra = {name.replace("layers.2.", "layers.3."): x + 1 for name, x in tensors.items() if "layers.2." in name}
    shapes = {
        "eh_proj": (32, 64),
        "enorm": (32,),
        "hnorm": (32,),
        "shared_head.norm": (32,),
        "shared_head.head": (97, 32),
    }
    for name, shape in shapes.items():
        extra[f"model.layers.3.{name}.weight"] = torch.randn(shape).to(torch.bfloat16)
    extra["model.layers.3.embed_tokens.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors | extra, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "tokenizer.json").write_text("{}")
    return folder
