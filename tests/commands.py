"""Running the commands in tests: their arguments, and killing them in the middle."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from trl import TrlParser


def options(script, *words):
    """The arguments of `script` as the command line gives them."""
    return TrlParser(script.Arguments).parse_args_and_config([str(word) for word in words])[0]


def run_until(command: str, words: list, done: Path, limit: float = 300.0):
    """Run `lamoe command words` in a process of its own, and kill it by SIGKILL as soon as `done` is there."""
    line = [sys.executable, "-m", "lamoe.scripts", command, *map(str, words)]
    process = subprocess.Popen(
        line, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=os.environ | {"COLUMNS": "80"}
    )
    deadline = time.monotonic() + limit
    while not done.exists():
        assert process.poll() is None, process.stderr.read().decode()[-3000:]
        assert time.monotonic() < deadline, f"{done} is not there after {limit} seconds."
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
