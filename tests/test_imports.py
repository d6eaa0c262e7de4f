"""The table of imports, and the rules that keep modeling/ loadable from the Hub as one flat folder of files."""

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("configuration", "modeling", "scripts", "tests")
MAX_LINES = 600

# A file of modeling/ may import from the rows above its own: neither from its own row nor from those below.
MODELING = (
    ("configuration_lamoe",),
    ("kernels_launch", "float8"),
    (
        "kernels_plan",
        "kernels_router",
        "kernels_loss",
        "kernels_heads",
        "kernels_gated",
        "kernels_logits",
        "kernels_wide",
    ),
    ("kernels_gemm",),
    ("kernels_decode", "kernels_attention", "kernels_norm", "kernels_up"),
    ("kernels_tiles", "kernels_step", "kernels_hidden", "kernels_weight"),
    ("kernels_moe",),
    ("precision", "experts", "cache", "projections", "correction", "attention_choice", "pages"),
    ("prefill", "recompute"),
    ("attention", "moe"),
    ("replay",),
    ("losses", "token_loss", "mtp_checkpoint", "decode_graph", "decode_step"),
    ("mtp_drafts", "continuous"),
    ("mtp_generation",),
    ("mtp", "generation"),
    ("modeling_lamoe",),
    ("native_attention",),
    ("hub", "balance", "lora", "mtp_callback", "native", "memory"),
    ("balance_callback",),
    ("__init__",),
)
CONFIGURATION = ("configuration_lamoe", "__init__")
ROW = {name: row for row, names in enumerate(MODELING) for name in names}

# What the files up to modeling_lamoe may need: the Hub loader refuses a model if any other package is missing.
HOST_PACKAGES = {"torch", "transformers", "safetensors", "numpy", "huggingface_hub"} | sys.stdlib_module_names


def imports(tree: ast.AST, guarded: bool = False) -> Iterator[tuple[ast.Import | ast.ImportFrom, bool]]:
    """Every import below `tree`, with whether an `except ImportError` guards it."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            yield node, guarded
        elif isinstance(node, ast.Try):
            caught = any(handler.type and "ImportError" in ast.unparse(handler.type) for handler in node.handlers)
            for part in node.body:
                yield from imports(ast.Module([part], []), guarded or caught)
            for part in (*node.handlers, *node.orelse, *node.finalbody):
                yield from imports(ast.Module([part], []), guarded)
        else:
            yield from imports(node, guarded)


def packages(node: ast.Import | ast.ImportFrom) -> list[str]:
    """The full names that an absolute import asks for; none for a relative one."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    return [node.module] if node.level == 0 else []


def own_environment(tree: ast.AST) -> Iterator[ast.expr]:
    """Every read or test of an environment variable whose name starts with LAMOE."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and re.search(r"\bgetenv$|\benviron\.\w+$", ast.unparse(node.func)):
            keys = node.args[:1]
        elif isinstance(node, ast.Subscript) and ast.unparse(node.value).endswith("environ"):
            keys = [node.slice]
        elif isinstance(node, ast.Compare) and ast.unparse(node.comparators[-1]).endswith("environ"):
            keys = [node.left]
        else:
            continue
        if any(isinstance(key, ast.Constant) and str(key.value).startswith("LAMOE") for key in keys):
            yield node


def modeling_problems(name: str, source: str, tree: ast.AST) -> Iterator[str]:
    if name not in ROW:
        yield f"modeling/{name}.py is not in the table: add it to MODELING in tests/test_imports.py."
        return
    import_lines = {node.lineno for node, _ in imports(tree)}
    for number, line in enumerate(source.splitlines(), start=1):
        if re.match(r"\s*(from|import)\s+\.", line) and number not in import_lines:
            yield f"line {number} of a text begins like a relative import, and the Hub loader takes it for one."
    for node, guarded in imports(tree):
        tops = {package.split(".")[0] for package in packages(node)}
        where = f"line {node.lineno}, `{ast.unparse(node)}`"
        if "triton" in tops and not guarded:
            yield f"{where}: put it inside `try` with `except ImportError`."
        elif ROW[name] <= ROW["modeling_lamoe"] and not guarded and tops - HOST_PACKAGES - {"lamoe"}:
            yield f"{where}: a file that the Hub loads may need only what Transformers installs."
        if name.startswith("kernels_") and "transformers" in tops:
            yield f"{where}: kernels know neither Transformers nor the configuration."
        if tops & {"configuration", "modeling", "scripts", "tests"}:
            yield f"{where}: there is no such package; the installed names start with lamoe."
        if name == "__init__":
            continue
        if "lamoe" in tops and name != "configuration_lamoe":
            yield f"{where}: files of modeling/ write `from .file import name`."
        if isinstance(node, ast.ImportFrom) and node.level:
            if node.level > 1 or node.module is None or ("." in node.module and name != "configuration_lamoe"):
                yield f"{where}: files of modeling/ write `from .file import name`."
            elif name == "configuration_lamoe":
                continue
            elif node.module not in ROW:
                yield f"{where}: {node.module} is not in the table."
            elif ROW[node.module] >= ROW[name]:
                yield f"{where}: {name} may import only from the rows above its own in the table."
            elif name.startswith("kernels_") and not node.module.startswith(("kernels_", "float8")):
                yield f"{where}: kernels know neither Transformers nor the configuration."


def configuration_problems(name: str, tree: ast.AST) -> Iterator[str]:
    if name not in CONFIGURATION:
        yield f"configuration/{name}.py is not in the table: add it to CONFIGURATION in tests/test_imports.py."
        return
    for node, _ in imports(tree):
        where = f"line {node.lineno}, `{ast.unparse(node)}`"
        tops = {package.split(".")[0] for package in packages(node)}
        if "torch" in tops:
            yield f"{where}: the configuration does without torch."
        relative = isinstance(node, ast.ImportFrom) and node.level > 0
        if tops & set(FOLDERS) or (name != "__init__" and ("lamoe" in tops or relative)):
            yield f"{where}: the configuration imports nothing of ours."


def scripts_problems(tree: ast.AST) -> Iterator[str]:
    for node, _ in imports(tree):
        tops = {package.split(".")[0] for package in packages(node)}
        if tops & set(FOLDERS) or (isinstance(node, ast.ImportFrom) and node.level):
            yield f"line {node.lineno}, `{ast.unparse(node)}`: scripts import from lamoe, by its full name."


def problems(path: str, source: str) -> list[str]:
    """What is wrong with the file `path` (relative to the repository's root) that holds `source`."""
    folder, _, name = path.removesuffix(".py").partition("/")
    tree = ast.parse(source)
    found = [f"{ast.unparse(node)}: no environment variables of our own." for node in own_environment(tree)]
    if (lines := source.count("\n")) > MAX_LINES:
        found.append(f"{lines} lines; at {MAX_LINES} a file is split by stage.")
    if folder == "modeling":
        found += modeling_problems(name, source, tree)
    elif folder == "configuration":
        found += configuration_problems(name, tree)
    elif folder == "scripts":
        found += scripts_problems(tree)
    return found


FILES = sorted(path.relative_to(ROOT).as_posix() for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))


@pytest.mark.parametrize("path", FILES)
def test_files_keep_the_table(path):
    assert problems(path, (ROOT / path).read_text(encoding="utf-8")) == []


GOOD = [
    ("modeling/moe.py", "from .kernels_moe import plan\n"),
    ("modeling/mtp.py", "from .attention import LamoeAttention\nfrom .configuration_lamoe import LamoeConfig\n"),
    ("modeling/kernels_moe.py", "from .kernels_gemm import x\n"),
    ("modeling/kernels_moe.py", "try:\n    import triton\nexcept ImportError as error:\n    raise error\n"),
    ("modeling/moe.py", "def f():\n  try:\n    import triton.language\n  except (ImportError, OSError):\n    pass"),
    ("modeling/hub.py", "from .modeling_lamoe import LamoeForCausalLM\nimport peft\n"),
    ("modeling/configuration_lamoe.py", "from lamoe.configuration.configuration_lamoe import LamoeConfig\n"),
    ("modeling/__init__.py", "from . import hub\nfrom .configuration.configuration_lamoe import LamoeConfig\n"),
    ("configuration/__init__.py", "from lamoe.configuration.configuration_lamoe import LamoeConfig\n"),
    ("scripts/pretrain.py", "import os\nfrom lamoe.balance import Callback\nx = os.environ['HF_HOME']\n"),
]
BAD = [
    ("modeling/news.py", "", "not in the table"),
    ("modeling/sub/moe.py", "", "not in the table"),
    ("configuration/news.py", "", "not in the table"),
    ("modeling/moe.py", "from .news import x", "news is not in the table"),
    ("modeling/moe.py", "from .attention import x", "rows above"),
    ("modeling/attention.py", "def f():\n    from .moe import x", "rows above"),
    ("modeling/moe.py", "from .modeling_lamoe import x", "rows above"),
    ("modeling/native.py", "from .hub import x", "rows above"),
    ("modeling/kernels_gemm.py", "from .kernels_moe import x", "rows above"),
    ("modeling/kernels_moe.py", "from .configuration_lamoe import LamoeConfig", "kernels know neither"),
    ("modeling/kernels_moe.py", "from transformers.utils import logging", "kernels know neither"),
    ("modeling/moe.py", "from . import kernels_moe", "from .file import name"),
    ("modeling/moe.py", "from ..configuration import x", "from .file import name"),
    ("modeling/moe.py", "from .configuration.configuration_lamoe import x", "from .file import name"),
    ("modeling/hub.py", "import lamoe", "from .file import name"),
    ("modeling/hub.py", "from lamoe.moe import x", "from .file import name"),
    ("modeling/hub.py", "from scripts.publish import x", "no such package"),
    ("modeling/moe.py", "import einops", "only what Transformers installs"),
    ("modeling/kernels_moe.py", "import triton", "inside `try`"),
    ("modeling/native.py", "def f():\n    from triton import jit", "inside `try`"),
    ("modeling/kernels_moe.py", "try:\n    import triton\nexcept OSError:\n    pass", "inside `try`"),
    ("modeling/kernels_moe.py", "try:\n    pass\nexcept ImportError:\n    import triton", "inside `try`"),
    ("modeling/moe.py", '"""Text.\n\n    from .moe import x\n"""', "the Hub loader takes it for one"),
    ("modeling/__init__.py", '"""Text.\nimport .moe\n"""', "the Hub loader takes it for one"),
    ("configuration/configuration_lamoe.py", "import torch.nn", "without torch"),
    ("configuration/configuration_lamoe.py", "from lamoe.moe import x", "nothing of ours"),
    ("configuration/configuration_lamoe.py", "from .presets import x", "nothing of ours"),
    ("scripts/pretrain.py", "from .finetune import x", "by its full name"),
    ("scripts/pretrain.py", "from tests.tiny import x", "by its full name"),
    ("modeling/moe.py", "import os\nx = os.environ['LAMOE_X']", "no environment variables"),
    ("scripts/pretrain.py", "from os import getenv\nx = getenv('LAMOE_X')", "no environment variables"),
    ("tests/test_moe.py", "import os\nx = os.environ.get('LAMOE_X', '')", "no environment variables"),
    ("tests/test_moe.py", "import os\nx = 'LAMOE_X' in os.environ", "no environment variables"),
    ("tests/test_moe.py", "x = 1\n" * (MAX_LINES + 1), "split by stage"),
]


@pytest.mark.parametrize(("path", "source"), GOOD)
def test_a_good_file_has_no_problem(path, source):
    assert problems(path, source) == []


@pytest.mark.parametrize(("path", "source", "message"), BAD)
def test_a_bad_file_has_the_problem(path, source, message):
    found = problems(path, source)
    assert len(found) == 1, found
    assert message in found[0]
