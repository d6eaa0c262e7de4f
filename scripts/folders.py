"""Output folders of the commands: refused if something lies in them, and complete or not there at all."""

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


def _umask() -> int:
    """The process's umask, which can only be read by setting it; mkdtemp ignores it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
