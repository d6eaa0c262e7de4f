"""What every test begins with: the same seed, and Transformers warns anew of what it says only once."""

import os

import pytest
import torch
from transformers.utils import logging

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when Triton is imported, which nobody has done yet


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
