"""The test folder of the installed Transformers' source distribution: fetched by pip once, kept in pytest's cache."""

import subprocess
import sys
import tarfile
import tempfile
from importlib.metadata import version
from pathlib import Path

from filelock import FileLock

PYTEST_CACHE = Path(__file__).parents[2] / ".pytest_cache" / "d"


class Unavailable(Exception):
    """The source distribution cannot be had; the message says why."""


def unpacked_tests() -> Path:
    """Return the folder of Transformers' own tests, of exactly the installed version.

    Raises:
        Unavailable: pip does not bring that source distribution (offline, or a development version).
    """
    name = f"transformers-{version('transformers')}"
    folder = PYTEST_CACHE / name
    folder.mkdir(parents=True, exist_ok=True)
    tests = folder / "tests"
    with FileLock(folder / "lock"):  # xdist workers arrive together
        if not tests.is_dir():
            with tempfile.TemporaryDirectory(dir=folder) as scratch:
                archive = _download(name, Path(scratch))
                with tarfile.open(archive) as tar:
                    members = [member for member in tar if member.name.startswith(f"{name}/tests/")]
                    tar.extractall(scratch, members, filter="data")
                unpacked = Path(scratch) / name / "tests"
                (unpacked / "__init__.py").touch()  # left out of the distribution; the configuration tests run it
                unpacked.rename(tests)  # last, and atomic: an interrupted run leaves no half of it
    return tests


def _download(name: str, folder: Path) -> Path:
    requirement = name.replace("-", "==", 1)
    command = ["download", "--quiet", "--no-deps", "--no-binary=transformers", f"--dest={folder}", requirement]
    done = subprocess.run([sys.executable, "-m", "pip", *command], capture_output=True, text=True)
    archive = folder / f"{name}.tar.gz"
    if done.returncode or not archive.is_file():
        raise Unavailable(
            f"Transformers' own tests need its source distribution, and `pip download --no-binary=transformers "
            f"{requirement}` did not bring it; connect to a package index once. pip said: {done.stderr.strip()[-300:]}"
        )
    return archive
