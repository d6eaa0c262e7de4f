"""Output folders of the commands: refused if something lies in them, and complete or not there at all.

A training that is killed leaves its checkpoints beside its output folder, in `<output folder>.training`.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def refuse_full(folder: str | Path, overwrite: bool = False) -> Path:
    """`folder` as a path, if it may be written to.

    Raises:
        ValueError: it is a file, or it is not empty and `overwrite` is false.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; choose another output folder.")
    if folder.is_dir() and any(folder.iterdir()) and not overwrite:
        raise ValueError(f"{folder} is not empty; choose another folder, or replace its content with --overwrite.")
    return folder


@contextmanager
def fresh_folder(folder: str | Path, overwrite: bool = False) -> Iterator[Path]:
    """A new folder beside `folder` that takes its name, and its place, once the block has ended without an error.

    Raises:
        ValueError: as `refuse_full`.
    """
    final = refuse_full(folder, overwrite).absolute()
    final.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{final.name}.", dir=final.parent))
    unfinished.chmod(0o777 & ~_umask())
    try:
        yield unfinished
        if final.exists():
            replaced = unfinished.with_name(unfinished.name + ".replaced")
            final.rename(replaced)
            unfinished.rename(final)
            shutil.rmtree(replaced)
        else:
            unfinished.rename(final)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


ARGUMENTS_FILE = "arguments.json"
FREE = {"resume", "overwrite", "keep_checkpoints", "report_to"}  # arguments that a resumed training may change


def last_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint of Trainer in `folder`: its state, which is written last, can be read."""
    found = []
    for state in folder.glob("checkpoint-*/trainer_state.json"):
        try:
            found.append((json.loads(state.read_text(encoding="utf-8"))["global_step"], state.parent))
        except (ValueError, KeyError):  # cut short by what killed the training
            continue
    return max(found)[1] if found else None


def refuse_begun(folder: str | Path, resume: bool, overwrite: bool) -> Path:
    """`<folder>.training`; raises a ValueError where `training_folder` would, but for other arguments."""
    work = refuse_full(folder, overwrite).absolute()
    work = work.with_name(f"{work.name}.training")
    if last_checkpoint(work) is not None and not (resume or overwrite):
        raise ValueError(
            f"{work} holds the checkpoints of an unfinished training; continue it with --resume, or begin anew with "
            "--overwrite."
        )
    return work


@contextmanager
def training_folder(folder: str | Path, arguments: dict, resume: bool, overwrite: bool) -> Iterator[Path]:
    """`<folder>.training`, for the checkpoints of a training until it has ended.

    New, or with `resume` as an earlier one with the same arguments left it. Kept if the block is left by an error and
    a checkpoint is there; else removed, with `arguments["keep_checkpoints"]` but for its checkpoints.

    Raises:
        ValueError: as `refuse_full`; or it holds checkpoints, and neither `resume` nor `overwrite` is given; or
            those of other arguments, and `resume` is given.
    """
    work = refuse_begun(folder, resume, overwrite)
    if resume and last_checkpoint(work) is not None:
        _refuse_other_arguments(work, arguments)
    else:
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        (work / ARGUMENTS_FILE).write_text(json.dumps(arguments, indent=1), encoding="utf-8")
    ended = False
    try:
        yield work
        ended = not arguments.get("keep_checkpoints")
    finally:
        if ended or last_checkpoint(work) is None:
            shutil.rmtree(work, ignore_errors=True)


def _refuse_other_arguments(work: Path, arguments: dict):
    before = json.loads((work / ARGUMENTS_FILE).read_text(encoding="utf-8"))
    now = json.loads(json.dumps(arguments))
    changed = [name for name in sorted({*before, *now} - FREE) if before.get(name) != now.get(name)]
    if changed:
        told = "; ".join(f"{name} was {before.get(name)!r} and is {now.get(name)!r}" for name in changed)
        raise ValueError(f"--resume continues with the arguments of the beginning, but {told}.")


def _umask() -> int:
    """The process's umask, which can only be read by setting it; mkdtemp ignores it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
