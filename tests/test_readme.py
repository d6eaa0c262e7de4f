"""Every command and every Python block of README.md runs, in its order; its tables are those of the measured rows."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

from lamoe.scripts.result_tables import markdown_tables

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(bash|python)\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
# What makes a command short enough for a test.
SHORT = {
    "quickstart": "--steps 2 --max_new_tokens 4",
    "pretrain": "--steps 2 --logging_steps 2 --eval_steps 2 --save_steps 0 --sample_steps 2 --sample_tokens 4",
    "finetune": "--steps 2",
    "evaluate": "--window 64",
}
INSTALLS = ["pip install -e '.[train]' && lamoe quickstart", "pip install -e '.[dev]' && pytest -n 2"]


def test_tables_are_printed_from_the_rows():
    shown = dict(re.findall(r"<!-- tables: ([\w-]+) -->\n(.*?)\n<!-- /tables -->", README, re.DOTALL))
    assert shown == markdown_tables(ROOT / "model_cards/results")


def test_the_two_commands_are_what_ci_runs():
    commands = [block.strip() for kind, block in BLOCKS if kind == "bash"]
    assert commands[:2] == INSTALLS
    ci = (ROOT / ".ci/run").read_text(encoding="utf-8")
    assert "install -qq -e '.[dev]'" in ci and "pytest -n 2" in ci


def test_everything_runs_in_its_order(tmp_path):
    (tmp_path / "scripts").symlink_to(ROOT / "scripts")
    (tmp_path / "model_cards").symlink_to(ROOT / "model_cards")
    commands, python = [], []
    for kind, block in BLOCKS:
        if kind == "python":
            python.append(block)
            continue
        for line in block.strip().splitlines():
            if line == INSTALLS[1]:
                continue  # that would be this very run
            command = shlex.split(line.rpartition("&& ")[2])
            assert command[0] == "lamoe", line
            command += shlex.split(SHORT.get(command[1], ""))
            if command[1] == "evaluate":  # a page instead of ten plays
                page = tmp_path / "page.txt"
                page.write_text((ROOT / "scripts/data/shakespeare.txt").read_text()[:3000])
                command[command.index("--texts") + 1] = str(page)
            commands.append(command[1:])
    # one process for all commands, and one for all of Python: to import the libraries takes longer than most of them
    every = f"from lamoe.scripts.__main__ import main\nfor command in {commands!r}:\n    assert main(command) == 0"
    for code in (every, "\n".join(python)):
        done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
    assert "'package'" in done.stdout
