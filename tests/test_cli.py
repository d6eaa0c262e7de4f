"""`lamoe <command>` and `python scripts/<command>.py` are one thing."""

import importlib.metadata
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from lamoe.scripts import __main__ as cli

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"
COMMANDS = cli.find_commands(SCRIPTS)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with one command, `greet`, in place of the package's."""
    (tmp_path / "greet.py").write_text(
        '"""Greet somebody.\n\nMore."""\nimport sys\n\ndef main(arguments):\n    print(__name__, arguments)\n\n'
        'if __name__ == "__main__":\n    main(sys.argv[1:])\n'
    )
    (tmp_path / "shared.py").write_text('"""No command: it has no main."""\n')
    (tmp_path / "_main.py").write_text("def main(): ...\n")
    monkeypatch.setattr(cli, "FOLDER", tmp_path)
    monkeypatch.setattr(sys, "argv", ["lamoe"])
    return tmp_path


@pytest.mark.parametrize("argv", [[], ["-h"], ["--help"]])
def test_help_lists_the_commands(argv, capsys):
    assert cli.main(argv) == 0
    listed = [line.split(None, 1) for line in capsys.readouterr().out.splitlines() if line.startswith("  ")]
    assert listed == [[command, summary] for command, summary in COMMANDS.items()]


def test_commands_are_the_files_with_a_main(folder):
    assert cli.find_commands(folder) == {"greet": "Greet somebody."}


def test_a_command_runs_as_main_with_its_own_arguments(folder, capsys):
    assert cli.main(["greet", "--name", "Ada"]) == 0
    assert capsys.readouterr().out == "__main__ ['--name', 'Ada']\n"


@pytest.mark.parametrize(
    ("command", "hint"), [("gret", "did you mean greet?"), ("shared", "use one of greet."), ("../greet", "greet")]
)
def test_an_unknown_command_names_the_nearest(folder, capsys, command, hint):
    assert cli.main([command]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert f"there is no command {command!r}" in err
    assert hint in err


def test_the_console_script_is_this_main():
    (entry_point,) = importlib.metadata.entry_points(group="console_scripts", name="lamoe")
    assert entry_point.load() is cli.main


def printed_help(run, capsys) -> str:
    with pytest.raises(SystemExit) as end:
        run()
    assert not end.value.code
    return capsys.readouterr().out


@pytest.mark.parametrize("command", COMMANDS)
def test_both_ways_print_the_same_help(command, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "100")
    path = str(SCRIPTS / f"{command}.py")
    monkeypatch.setattr(sys, "argv", [path, "--help"])
    by_file = printed_help(lambda: runpy.run_path(path, run_name="__main__"), capsys)
    monkeypatch.setattr(sys, "argv", ["lamoe"])
    assert "usage:" in by_file
    assert printed_help(lambda: cli.main([command, "--help"]), capsys) == by_file


def test_a_script_runs_from_any_folder(tmp_path):
    script = [sys.executable, str(SCRIPTS / "plan.py"), "--help"]
    run = subprocess.run(script, capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert "usage:" in run.stdout


def test_no_script_hides_a_library():
    """`python scripts/x.py` puts scripts/ before every library: inspect.py there would break `import dataclasses`."""
    names = {path.stem for path in SCRIPTS.glob("*.py")} - {"__init__", "__main__"}
    libraries = {*sys.stdlib_module_names, *importlib.metadata.packages_distributions()}
    assert names & libraries - {"evaluate"} == set()  # Hugging Face's evaluate: no script of ours needs it
