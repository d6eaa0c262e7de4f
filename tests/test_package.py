"""What is installed: one package, lamoe, with all its files, and nothing beside it."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = {"modeling": "lamoe", "configuration": "lamoe/configuration", "scripts": "lamoe/scripts"}
KINDS = {"modeling": ["*.py"], "configuration": ["*.py", "presets/*.json"]}
KINDS["scripts"] = ["*.py", "recipes/*.yaml", "data/*"]


@pytest.fixture(scope="module")
def wheel_names(tmp_path_factory):
    """The names in a wheel that is built from a source distribution of this tree."""
    folder = tmp_path_factory.mktemp("package")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    for name in PACKAGES:
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    build = "from setuptools.build_meta import build_sdist; build_sdist('.')"
    subprocess.run([sys.executable, "-c", build], cwd=folder, check=True, capture_output=True)
    (source,) = folder.glob("*.tar.gz")
    pip = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", str(source)]
    subprocess.run(pip, cwd=folder, check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    return {name for name in zipfile.ZipFile(wheel).namelist() if not name.endswith("/")}


def test_the_only_top_level_package_is_lamoe(wheel_names):
    tops = {name.split("/")[0] for name in wheel_names}
    assert tops == {"lamoe"} | {top for top in tops if top.startswith("lamoe-") and top.endswith(".dist-info")}


def test_every_file_is_in_the_wheel_and_no_other(wheel_names):
    expected = {
        f"{PACKAGES[folder]}/{path.relative_to(ROOT / folder).as_posix()}"
        for folder, kinds in KINDS.items()
        for kind in kinds
        for path in (ROOT / folder).glob(kind)
    }
    assert {name for name in wheel_names if name.startswith("lamoe/")} == expected


@pytest.mark.parametrize(
    "name",
    [
        "lamoe/__init__.py",
        "lamoe/modeling_lamoe.py",
        "lamoe/configuration_lamoe.py",
        "lamoe/configuration/configuration_lamoe.py",
        "lamoe/configuration/presets/tiny.json",
        "lamoe/scripts/__main__.py",
        "lamoe/scripts/data/README.md",
    ],
)
def test_the_wheel_holds(name, wheel_names):
    assert name in wheel_names


def test_the_folders_are_no_packages_of_their_own(tmp_path):
    """Of an installed Lamoe, editable or not, `modeling` and its siblings cannot be imported."""
    code = "import importlib.util as u, sys; sys.exit(any(map(u.find_spec, ['modeling', 'configuration', 'scripts'])))"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
