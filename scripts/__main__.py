"""`lamoe <command> ...` is `python scripts/<command>.py ...`: every file here that has a `main` is a command."""

import ast
import difflib
import runpy
import sys
from pathlib import Path

FOLDER = Path(__file__).parent


def find_commands(folder: Path) -> dict[str, str]:
    """Map each command to the first line of its docstring; files are read, not imported."""
    commands = {}
    for path in sorted(folder.glob("[!_]*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        if any(isinstance(node, ast.FunctionDef) and node.name == "main" for node in tree.body):
            commands[path.stem] = (ast.get_docstring(tree) or "").partition("\n")[0]
    return commands


def main(argv: list[str] | None = None) -> int:
    """Run one command as `__main__`, with the arguments that follow its name.

    Args:
        argv: the words after `lamoe`; `sys.argv[1:]` if None.

    Returns:
        The exit code: 0, or 2 if there is no such command.
    """
    argv = sys.argv[1:] if argv is None else argv
    commands = find_commands(FOLDER)
    if not argv or argv[0] in ("-h", "--help"):
        print("usage: lamoe <command> [options]\n\ncommands:")
        width = max(map(len, commands), default=0)
        for command, summary in commands.items():
            print(f"  {command:{width}}  {summary}".rstrip())
        print("\nlamoe <command> --help shows the options of a command.")
        return 0
    command, *options = argv
    if command not in commands:
        nearest = difflib.get_close_matches(command, commands, n=1)
        hint = f"did you mean {nearest[0]}?" if nearest else f"use one of {', '.join(commands)}."
        print(f"lamoe: there is no command {command!r}; {hint}", file=sys.stderr)
        return 2
    path = str(FOLDER / f"{command}.py")
    sys.argv = [path, *options]
    runpy.run_path(path, run_name="__main__")
    return 0


if __name__ == "__main__":
    sys.exit(main())
