"""What every test begins with: Transformers warns, and each once-only warning is yet to be given."""

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
