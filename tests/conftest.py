"""What every test begins with: Transformers warns, and each once-only warning is yet to be given."""

import pytest
from transformers.utils import logging


@pytest.fixture(autouse=True)
def fresh_logging():
    """Undo what a script's `main`, run in this process by an earlier test, did to the verbosity."""
    logging.set_verbosity_warning()
    logging.warning_once.cache_clear()
